#!/bin/sh
# In the test guest, as root: the tests of this folder, with ash.pyz where a person would have put it. `$1`: folder for results.
# On the other disk lie ash.pyz, the project, the packages of the tests, and the words for pytest.
results=$1
cp /media/in/ash.pyz /root/ash.pyz
cp -r /media/in/project /root/project
useradd --create-home guest
set --
while IFS= read -r word; do set -- "$@" "$word"; done </media/in/words
[ $# -gt 0 ] || set -- tests/guest
# A unit of its own with a tree of cgroups, as the service has: the tests open sandboxes in their own process too.
exec systemd-run --quiet --wait --pipe --unit=ash-tests --working-directory=/root/project \
    -p Delegate=yes -p OOMPolicy=continue -p TasksMax=infinity \
    -E HOME=/root -E LANG=C.UTF-8 -E PYTHONPATH=/root/project:/media/in/site -E PYTHONUNBUFFERED=1 \
    python3 -m pytest -p no:cacheprovider -v --color=no --durations=10 --junitxml="$results/junit.xml" "$@"
