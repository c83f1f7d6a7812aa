#!/bin/bash
# Disks that fail, are full or hang under a mounted file system: the host sees no error and waits
# no longer than configured, the node that lost its disk works on that of the other one, and
# a disk that is attached again gets what it missed.
# guests: 2
# disks: faulty:40M
# timeout: 150
. ./lib.sh
. ./load.sh

NET="$QUICK ko-count 1;"
DISK="resync-rate 400M; c-plan-ahead 0; al-extents 67; on-io-error detach;"
DEV=$(device 0)
peer_disk() { peer_device r0 peer-disk-state; }
no_device_error() { ! dmesg | grep -E 'I/O error.*(ublkb|drbd)|EXT4-fs error|Buffer I/O error on dev ublk'; }
# What reached the own disk and the peer: one of the two grows while writes succeed.
moved() { echo $(($(written r0) + $(peer_device r0 sent))); }
moved_more_than() { [ "$(moved)" -gt "$1" ]; }
goes_on() { wait_until 20 moved_more_than $(($(moved) + 512)); }
# disk_gone NODE, disk_back NODE: on both nodes; in between the load has gone on.
disk_gone() {
	if [ "$VM_ID" = "$1" ]; then
		must "the disk is detached" wait_until 30 is Diskless disk_state r0
	else
		must "the other node says that it has no disk" wait_until 30 is Diskless peer_disk
	fi
	[ "$VM_ID" = 2 ] || must "the load goes on" goes_on
	meet "gone-$STEP"
}
disk_back() {
	if [ "$VM_ID" = "$1" ]; then
		type_ "vmctl disk $1 d0 ok"
		type_ "drbdctl attach r0"
	fi
	must "UpToDate on both sides" wait_until 40 in_sync r0
	meet "back-$STEP"
}

node_setup < <(resource r0 $PORT 0)
step "a pair in sync, a file system under load"
bring_up r0
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q -E nodiscard $DEV"
	type_ "mount $DEV /mnt"
	# The kernel looked for partitions while the node was Secondary, and said that it could not.
	type_ "dmesg --clear"
	type_ "head -c 4M /dev/urandom >/mnt/before && sync"
	sum=$(md5sum </mnt/before)
	start_load r0 /mnt/load 4
fi
meet loaded

STEP=secondary
step "the disk of the Secondary fails"
[ "$VM_ID" = 1 ] || type_ "vmctl disk 2 d0 fail"
disk_gone 2
disk_back 2

STEP=primary
step "the disk of the Primary fails"
[ "$VM_ID" = 2 ] || type_ "vmctl disk 1 d0 fail"
disk_gone 1
if [ "$VM_ID" = 1 ]; then
	type_ "echo 3 >/proc/sys/vm/drop_caches"
	check "reads are served by the other node" same "$sum" "$(md5sum </mnt/before)"
fi
disk_back 1

STEP=full
step "what is below the Primary's disk is full"
[ "$VM_ID" = 2 ] || type_ "vmctl disk 1 d0 full"
disk_gone 1
disk_back 1

step "the disk of the Secondary hangs"
if [ "$VM_ID" = 2 ]; then
	type_ "vmctl disk 2 d0 hang"
else
	must "the Primary gives it up" wait_until 30 is_not Connected connection r0
	must "the load goes on" goes_on
fi
meet given-up
if [ "$VM_ID" = 2 ]; then
	# In bounded time, and honestly: a process that waits for its disk cannot end before that does,
	# and keeps the lock, so that no other one comes near the disk.
	refused 20 "still there|wait for its disk" "timeout 40 drbdctl down --force r0"
	type_ "vmctl disk 2 d0 ok"
	must "the engine ends when its disk lets it" wait_until 20 no_engine r0
	type_ "drbdctl up r0"
fi
must "UpToDate on both sides" wait_until 60 in_sync r0
meet hang-over

if [ "$VM_ID" = 1 ]; then
	step "what the host saw of all this"
	stop_load
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	check "the kernel saw no I/O error on the device" no_device_error
	type_ "drbdctl secondary r0"
fi
meet demoted
check "nothing is out of sync" is 0 out_of_sync r0
identical diskerror 0
type_ "drbdctl down r0"
finish
