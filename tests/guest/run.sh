#!/bin/sh
# In the test guest: the tests of this folder, as root, with ash.pyz where a person would have put it. `$1`: folder for results.
set -u
results=$1
cp /media/in/ash.pyz /root/ash.pyz
cp -r /media/in/project /root/project
uptime
systemd-detect-virt
cat /proc/cmdline
bwrap --version
