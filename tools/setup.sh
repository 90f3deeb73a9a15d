#!/bin/sh
# What `make` needs on a fresh Debian or Ubuntu: `setup.sh venv FOLDER` or `setup.sh bubblewrap`.
# Installs a missing system package when root; otherwise prints the exact command and stops.
set -eu

stop() {
    echo "setup: $*" >&2
    exit 1
}

install_package() { # install_package PACKAGE WHY
    command -v apt-get >/dev/null || stop "$2 is missing; install it (Debian's name: $1) and run make again"
    if [ "$(id -u)" != 0 ]; then
        stop "$2 is missing; run:  sudo apt-get update && sudo apt-get install -y $1   and then make again"
    fi
    echo "setup: installing $1"
    DEBIAN_FRONTEND=noninteractive apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$1" >/dev/null
}

make_venv() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || stop "$python is not there; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3.11"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "$python is Python $version; Ash needs 3.11 or newer: make PYTHON=/path/to/python3.11"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        install_package "python$version-venv" "the venv module of Python $version"
    fi
    echo "setup: virtual environment in $1 with locked packages"
    "$python" -m venv --clear "$1"
    "$1/bin/python" -m pip install -qq --no-input --disable-pip-version-check --require-hashes --only-binary=:all: -r requirements-dev.lock
}

case ${1:-} in
venv) make_venv "$2" ;;
bubblewrap) command -v bwrap >/dev/null || install_package bubblewrap "bubblewrap, which isolates the agents," ;;
*) stop "usage: setup.sh venv FOLDER | bubblewrap" ;;
esac
