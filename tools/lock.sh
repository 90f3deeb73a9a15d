#!/bin/sh
# Writes requirements.lock (what ash.pyz holds) and requirements-dev.lock (that and the tools) from pyproject.toml, with hashes of
# every wheel, so that one lock serves all supported interpreters. Names no registry: whoever installs uses their own.
set -eu
venv=$1
"$venv/bin/python" -m pip install -qq --disable-pip-version-check uv
compile() {
    "$venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links "$@"
}
compile pyproject.toml -o requirements.lock
compile pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
if grep -nE '://|^-|^ *--(index|find)|/(opt|root|home)/' requirements.lock requirements-dev.lock; then
    echo "lock: the lines above name a place of this machine" >&2
    exit 1
fi
