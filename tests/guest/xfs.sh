#!/bin/bash
# XFS on the replicated device, verified by fio on both nodes.
# guests: 2
# disks: ram:96M
# timeout: 115
. ./lib.sh

node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)
VERIFIED="fio --name=verified --directory=/mnt --size=24M --bs=4k-64k --rw=randwrite --direct=1 \
--ioengine=io_uring --iodepth=8 --verify=crc32c --verify_fatal=1 --minimal --output=/tmp/fio"

step "a pair in sync"
bring_up r0

if [ "$VM_ID" = 1 ]; then
	step "XFS on one node"
	# XFS wants 300 MB these days; this option lets tests have less.
	type_ "mkfs.xfs -q --unsupported $DEV"
	type_ "mount $DEV /mnt"
	type_ "$VERIFIED"
	type_ "cp -r /usr/share/zoneinfo /mnt/tree"
	type_ "umount /mnt"
	type_ "drbdctl secondary r0"
	meet handover
	meet returned
else
	meet handover
	step "the other node takes over"
	type_ "drbdctl primary r0"
	type_ "mount $DEV /mnt"
	type_ "$VERIFIED --verify_only"
	type_ "diff -r --no-dereference /usr/share/zoneinfo /mnt/tree"
	type_ "umount /mnt"
	type_ "xfs_repair -n $DEV"
	type_ "drbdctl secondary r0"
	meet returned
fi
check "still in sync" wait_until 10 in_sync r0
identical xfs 0
type_ "drbdctl down r0"
finish
