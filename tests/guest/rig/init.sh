#!/bin/busybox sh
# The first process of a test guest, and the only one of its own: it carries out the commands that
# come over the serial port, one after the other.
#
#   from the test:   NUMBER BASE64            a script for sh
#   to the test:     @NUMBER CODE SIZE        its exit code and the size of what it printed
#                    ...                      that many bytes
#
# On the kernel's command line: rig.modules=A,B,... are loaded at the start; rig.root=LABEL is the
# file system to boot from: then this runs once more, from there.

/bin/busybox mkdir -p /proc /sys /dev /run
/bin/busybox mount -t proc proc /proc
word() {
	for each in $(/bin/busybox cat /proc/cmdline); do
		case $each in "$1="*) echo "${each#*=}" ;; esac
	done
}

if [ "$0" = /init ]; then
	/bin/busybox --install -s /bin
	mount -t sysfs sys /sys
	mount -t devtmpfs dev /dev
	mount -t tmpfs run /run
	mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
	for module in $(word rig.modules | tr , ' '); do modprobe "$module"; done
	root=$(word rig.root)
	if [ -n "$root" ]; then
		for try in $(seq 600); do
			device=$(findfs LABEL="$root" 2>/dev/null) && break
			usleep 50000
		done
		mount -t ext4 "$device" /mnt || echo "rig: no root file system" >/dev/ttyS0
		# Modules belong to the kernel, not to the file system.
		mkdir -p /mnt/lib/modules
		mount -t tmpfs modules /mnt/lib/modules
		cp -a /lib/modules/. /mnt/lib/modules/
		mount --move /dev /mnt/dev
		mount --move /sys /mnt/sys
		mount --move /run /mnt/run
		umount /proc
		exec switch_root /mnt /bin/busybox sh /sbin/rig-init
	fi
fi

PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
ln -sf /proc/self/fd /dev/fd
# Only the last words of a dying kernel may come in between. The log has everything.
echo 1 >/proc/sys/kernel/printk
echo 1 >/proc/sys/kernel/sysrq
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox stty raw -echo
echo "@ready $(busybox uname -r)"
while read -r number script; do
	echo "$script" | busybox base64 -d >/run/script
	busybox sh /run/script >/run/output 2>&1 </dev/null
	echo "@$number $? $(busybox stat -c %s /run/output)"
	busybox cat /run/output
done
