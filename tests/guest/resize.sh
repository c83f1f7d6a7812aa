#!/bin/bash
# A volume grows while it is mounted: the metadata moves to the new end of both disks, only the new
# part is synchronised, the file system follows. A kernel that cannot change the size of a live
# ublk device makes the operator wait until the device is unused, and is said to.
# guests: 2
# disks: ram:32M
# timeout: 110
. ./lib.sh

readonly GROWN=48M
DEV=$(device 0)

has_size() { [ "$(size_of 0)" = "$1" ]; }
disk_has_grown() { [ "$(blockdev --getsize64 "$(disk 0)")" = $((48 << 20)) ]; }
grows_live() { [[ $(uname -r) != 6.12.* ]]; }

node_setup < <(resource r0 $PORT 0)
step "a pair in sync, with a file system"
bring_up r0
old=$(size_of 0)
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q $DEV"
	type_ "mount $DEV /mnt"
	type_ "head -c 8M /dev/urandom >/mnt/before; md5sum /mnt/before >/tmp/sums"
fi
meet written

step "one disk grows: the smaller one still rules"
if [ "$VM_ID" = 1 ]; then
	type_ "vmctl resize 1 d0 $GROWN"
	must "the disk has grown" wait_until 10 disk_has_grown
	type_ "drbdctl resize r0"
	check "still in sync" wait_until 20 in_sync r0
	check "the size has not changed" has_size "$old"
fi
meet one-grown

step "the other one grows as well"
if [ "$VM_ID" = 2 ]; then
	type_ "vmctl resize 2 d0 $GROWN"
	must "the disk has grown" wait_until 10 disk_has_grown
fi
meet both-grown
if [ "$VM_ID" = 1 ]; then
	type_ "drbdctl resize r0"
	if ! grows_live; then
		check "the log says what to do" wait_until 10 grep -q "resize it in use" /run/drbd/r0.log
		check "the mounted device keeps its size" has_size "$old"
		type_ "cp /mnt/before /tmp/check && umount /mnt"
	fi
fi
# A MiB below the disk at the most: bitmap, activity log and superblock.
is_grown() { between $((47 << 20)) "$(size_of 0)" $((48 << 20)); }
if [ "$VM_ID" = 1 ] || ! grows_live; then
	must "the device has grown" wait_until 20 is_grown
fi
if [ "$VM_ID" = 1 ]; then
	note "$old bytes, now $(size_of 0)"
	grows_live || type_ "mount $DEV /mnt"
fi
must "UpToDate on both sides" wait_until 30 in_sync r0
must "and here as well" wait_until 20 is_grown
growth=$((($(size_of 0) - old) / 1024))
check "only the new part was synchronised" between 1 "$(will_sync r0)" "$growth"
meet grown

step "the file system follows"
if [ "$VM_ID" = 1 ]; then
	type_ "resize2fs $DEV"
	type_ "head -c 24M /dev/urandom >/mnt/after; md5sum /mnt/after >>/tmp/sums"
	type_ "umount /mnt && mount $DEV /mnt && md5sum --quiet -c /tmp/sums"
	type_ "umount /mnt"
	type_ "drbdctl secondary r0"
fi
meet filled
check "nothing is out of sync" is 0 out_of_sync r0
identical resize 0

step "the metadata at the new end is the metadata now"
type_ "drbdctl down r0"
meet down
type_ "drbdmeta --force 0 v08 $(disk 0) internal get-gi"
type_ "drbdctl up r0"
must "in sync without a word" wait_until 30 in_sync r0
check "the size stays" is_grown
meet up-again
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
