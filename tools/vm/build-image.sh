#!/bin/sh
# Makes the test guest: `build-image.sh FOLDER` leaves root.ext4, vmlinuz, initrd and about.txt in FOLDER. A plain Debian of this machine's own
# suite, from this machine's own mirror, with what a server that runs Ash has, and one unit that runs what a second disk brings.
# Needs root, debootstrap and e2fsprogs. Works in a mount namespace of its own: however it ends, no mount stays.
set -eu

if [ "${ASH_VM_UNSHARED:-}" != 1 ]; then
    ASH_VM_UNSHARED=1 exec unshare --mount --propagation private "$0" "$@"
fi

out=$1
here=$(cd "$(dirname "$0")" && pwd)
packages=systemd,systemd-sysv,udev,dbus,kmod,procps,iproute2,util-linux,e2fsprogs,quota,ca-certificates,curl,git,python3,bubblewrap
packages=$packages,initramfs-tools,linux-image-cloud-$(dpkg --print-architecture)
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
# What apt uses here, whatever form its sources have. Without an entry debootstrap takes its own default.
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' | awk -v suite="$suite" '$1 == suite { print $2; exit }')

root=$out/root
mkdir -p "$root"
echo "vm: debootstrap of $suite (about 2 minutes)"
debootstrap --variant=minbase --merged-usr --include="$packages" "$suite" "$root" ${mirror:+"$mirror"} >"$out/debootstrap.log" 2>&1 || {
    tail -n 20 "$out/debootstrap.log" >&2
    exit 1
}

# Nothing that wakes up by itself in the middle of a test.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer \
    getty@tty1.service e2scrub_reap.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
echo ash-guest >"$root/etc/hostname"
echo 127.0.0.1 localhost ash-guest >"$root/etc/hosts"
echo 'LABEL=ash-root / ext4 defaults 0 1' >"$root/etc/fstab"
echo "this machine exists for Ash's tests; they may do anything to it" >"$root/etc/ash-test-guest"
rm -f "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_* "$root/etc/machine-id"
: >"$root/etc/machine-id"
install -m 0755 "$here/guest-run" "$root/usr/local/sbin/ash-test"
install -m 0644 "$here/guest.service" "$root/etc/systemd/system/ash-test.service"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf ../ash-test.service "$root/etc/systemd/system/multi-user.target.wants/ash-test.service"

cp -L "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp -L "$root"/boot/initrd.img-* "$out/initrd"
chroot "$root" /usr/bin/python3 -c 'import sys; print("python %d.%d" % sys.version_info[:2])' >"$out/about.txt"
(echo "suite $suite"; cd "$root/boot" && echo "kernel $(ls vmlinuz-* | sed s/vmlinuz-//)"; chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' \
    systemd bubblewrap python3) >>"$out/about.txt"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/boot/*

echo "vm: file system"
truncate -s 3G "$out/root.ext4"
mkfs.ext4 -q -L ash-root -d "$root" "$out/root.ext4"
rm -rf "$root"
