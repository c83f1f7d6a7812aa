#!/bin/bash
# The Primary loses power under load: the other node takes over with everything that was
# fsynced, and the dead one comes back as Secondary and gets only what may differ.
# guests: 2
# disks: faulty:192M
# timeout: 115
. ./lib.sh
. ./load.sh

readonly ENOUGH=30

NET=$QUICK
DISK="resync-rate 400M; c-plan-ahead 0; al-extents 67;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

come_back() {
	step "the dead node has power again"
	back_again r0 0
	meet back
	meet demoted
	identical powercut 0
	type_ "drbdctl down r0"
	finish
}
[ "$VM_BOOT" = 1 ] || come_back

step "a pair in sync"
bring_up r0

if [ "$VM_ID" = 1 ]; then
	# Without discard: that would make the whole disk hot, and a crash now resync all of it.
	type_ "mkfs.ext4 -q -E nodiscard $DEV"
	type_ "mount $DEV /mnt"
	meet mounted
	meet recorder
	step "load, and files that are fsynced one by one"
	fio --name=load --filename=/mnt/load --size=8M --rw=randwrite --bs=4k --iodepth=4 --direct=1 \
		--ioengine=io_uring --time_based --runtime=100 --output=/tmp/fio.log &
	write_files
	die "writing failed before the power did"
fi

meet mounted
record_files
meet recorder
must "files have been fsynced on the other node" wait_until 60 recorded_at_least $ENOUGH

step "power failure of the Primary"
type_ "vmctl kill 1"
must "the loss is noticed" wait_until 30 is_not Connected connection r0
type_ "drbdctl status r0"
note "$(recorded) files were fsynced"

step "take over"
type_ "drbdctl primary r0"
type_ "mount $DEV /mnt"
check "the journal was replayed" grep -q 'recovery complete' <(dmesg)
check "every fsynced file is there" all_files_there
type_ "vmctl boot 1"
type_ "cp -r /usr/share/zoneinfo/Europe /mnt/meanwhile && sync"
must "the other node comes back" wait_until 60 is Connected connection r0
must "UpToDate on both sides" wait_until 60 in_sync r0
meet back
check "the files are still there" all_files_there
type_ "umount /mnt"
type_ "e2fsck -f -n $DEV"
type_ "drbdctl secondary r0"
meet demoted
identical powercut 0
type_ "drbdctl down r0"
finish
