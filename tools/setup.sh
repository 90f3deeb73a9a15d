#!/bin/sh
# What `make` needs on a fresh Debian or Ubuntu: `setup.sh venv FOLDER`, `setup.sh bubblewrap` or `setup.sh curl`.
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

find_python() { # the one asked for by PYTHON, else the first that is new enough
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    done
    stop "Ash needs Python 3.11 or newer, and ${PYTHON:-python3} is not; install one, or run: make PYTHON=/path/to/python3.12"
}

make_venv() {
    find_python
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        install_package "python$version-venv" "the venv module of Python $version"
    fi
    echo "setup: virtual environment in $1 with locked packages (about a minute, once)"
    "$python" -m venv --clear "$1"
    "$1/bin/python" -m pip install -qq --no-input --disable-pip-version-check --require-hashes --only-binary=:all: -r requirements-dev.lock
}

case ${1:-} in
venv) make_venv "$2" ;;
bubblewrap) command -v bwrap >/dev/null || install_package bubblewrap "bubblewrap, which isolates the agents," ;;
curl) command -v curl >/dev/null || install_package curl "curl, which the tests call as users do," ;;
*) stop "usage: setup.sh venv FOLDER | bubblewrap | curl" ;;
esac
