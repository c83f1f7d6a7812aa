#!/bin/bash
# A pair from bare disks to a file system that has changed hands: metadata, first
# synchronisation, a tree of files under ext4, role change, byte identity, nothing left behind.
# guests: 2
# disks: ram:176M
# timeout: 170
. ./lib.sh

# A real tree with many small and some large files: at least 5,000 and 100 MB.
TREE="usr/share usr/lib/modules usr/lib/python3*"

node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)
digest() { sha256sum "$1" | cut -d " " -f 1; }

step "two nodes, one bare disk each, one configuration"
type_ "drbdctl --version"
type_ "cat $CONF"

step "create the metadata and start the engine on both nodes"
type_ "drbdctl create-md r0"
type_ "drbdctl up r0"
must "the nodes find each other" wait_until 20 is Connected connection r0
check "a fresh disk is Inconsistent" is Inconsistent disk_state r0
meet connected

if [ "$VM_ID" = 1 ]; then
	step "one node's data is declared good; the other one gets a copy"
	type_ "drbdctl primary --force r0"
	must "the first synchronisation ends" watch_sync r0 110
	check "its progress was seen" [ "$PROGRESS" -ge 2 ]
else
	type_ "drbdctl wait-sync r0"
fi
type_ "drbdctl status r0"
check "UpToDate on both sides" wait_until 110 in_sync r0
meet synced

if [ "$VM_ID" = 1 ]; then
	step "a file system with a real tree in it"
	type_ "mkfs.ext4 -q -i 16384 $DEV"
	type_ "mount $DEV /mnt"
	type_ "cd / && tar -cf - $TREE | tar -C /mnt -xf -"
	FILES=$(find /mnt/usr -type f | wc -l)
	MEGABYTES=$(du -sm --apparent-size /mnt/usr | cut -f 1)
	note "$FILES files, $MEGABYTES MB"
	check "at least 5000 files" [ "$FILES" -ge 5000 ]
	check "at least 100 MB" [ "$MEGABYTES" -ge 100 ]
	type_ "cd /mnt && find usr -type f -print0 | sort -z | xargs -0 md5sum >manifest"
	type_ "fio --name=verified --directory=/mnt --size=16M --bs=16k --rw=randwrite --direct=1 \
--verify=crc32c --minimal --output=/tmp/fio"
	tell manifest "$(digest /mnt/manifest)"
	type_ "umount /mnt"
	step "the other node takes over"
	type_ "drbdctl secondary r0"
	meet handover
	meet returned
else
	meet handover
	type_ "drbdctl primary r0"
	type_ "mount $DEV /mnt"
	check "the manifest is the one that was written" same "$(ask manifest)" "$(digest /mnt/manifest)"
	type_ "cd /mnt && md5sum --quiet -c manifest && echo every file is as it was written"
	type_ "fio --name=verified --directory=/mnt --size=16M --bs=16k --rw=randwrite --direct=1 \
--verify=crc32c --verify_only --minimal --output=/tmp/fio"
	type_ "echo written on the second node >/mnt/note"
	type_ "umount /mnt"
	type_ "drbdctl secondary r0"
	meet returned
fi

step "both disks hold the same bytes"
check "still in sync" wait_until 10 in_sync r0
identical story 0

step "down leaves nothing"
meet before-down
type_ "drbdctl down r0"
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left
type_ "drbdctl down r0"
type_ "drbdmeta --force 0 v08 $(disk 0) internal get-gi"
finish
