#!/usr/bin/busybox sh
# Process 1 of the emergency initramfs.
b=/usr/bin/busybox
$b mkdir -p /bin /sbin /usr/bin /usr/sbin /etc
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TERM=linux
ln -sf /proc/mounts /etc/mtab

pool=
for word in $(cat /proc/cmdline); do
    case $word in
    fcvm.pool=*) pool=${word#fcvm.pool=} ;;
    esac
done

echo "Linux $(uname -r), emergency initramfs. Nothing is mounted for writing."
if ! command -v zpool >/dev/null; then
    echo "There is no zpool here: the system had none when this was made."
elif ! [ -e /dev/zfs ]; then
    echo "This kernel has no ZFS: pools cannot be imported."
elif [ -n "$pool" ]; then
    echo "Importing $pool, for reading:"
    zpool import -N -f -o readonly=on -R /mnt "$pool" && zpool status "$pool"
else
    zpool import
    echo "To read one: zpool import -N -f -o readonly=on -R /mnt POOL (or fcvm.pool=POOL on the kernel's command line),"
    echo "then: zfs mount POOL/DATASET"
fi
echo "'reboot -f' restarts, 'poweroff -f' switches off."
# Process 1 must not end.
while :; do
    setsid cttyhack sh
done
