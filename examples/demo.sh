#!/bin/sh
# What `make demo` shows: a server started from ash.pyz, an agent deployed, and two messages to it, the second of which makes it
# use a tool inside its sandbox. Needs no API key (the offline model answers); only what ash.pyz unpacked to its cache stays.
#   sh examples/demo.sh [dist/ash.pyz]
set -eu

examples=$(cd "$(dirname "$0")" && pwd)
absolute() { case $1 in */*) echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")" ;; *) echo "$1" ;; esac; }
pyz=$(absolute "${1:-$examples/../dist/ash.pyz}")
python=$(absolute "${PYTHON:-python3}")
folder=$(mktemp -d)

ash() { "$python" "$pyz" "$@"; }
show() {
    printf '\n$ ash'
    for word; do
        case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    ash "$@"
}
clean_up() {
    ash stop --data-dir "$folder/data" >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' HUP INT PIPE TERM

# A home of its own, so that the demo neither sees nor changes which server your command line is linked to.
export ASH_HOME="$folder/client"
unset ASH_SERVER_URL ASH_API_KEY

printf '$ ash start --detach --model offline\n'
ash start --detach --port 0 --data-dir "$folder/data" --model offline
ASH_SERVER_URL=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$folder/data/server.json")
export ASH_SERVER_URL

cd "$examples"
show deploy ./quickstart --name my-agent
show chat my-agent "What is a closure in JavaScript?"
show chat my-agent 'Run the command `uname -sm; id; ls -a /agent /workspace`' | tee "$folder/answer"
grep -q Linux "$folder/answer" || {
    echo "demo: the agent did not run the command in its sandbox" >&2
    exit 1
}
printf '\nThe last answer came from a tool that ran inside the sandbox of that session.\n'
printf 'Next: export ANTHROPIC_API_KEY=…, then: python3 dist/ash.pyz start. See README.md.\n'
