#!/bin/bash
# The whole story of a pair: from bare disks to a file system that changes hands, goes on through
# a pulled cable, and survives the loss of the node that served it; more resources, volumes and
# the three protocols beside it; and nothing left behind.
# guests: 2
# disks: ram:160M ram:8M ram:8M ram:8M
# timeout: 230
. ./lib.sh
. ./load.sh

# A real tree with many small and some large files: at least 5,000 and 100 MB.
readonly TREE="usr/share usr/lib/python3* usr/lib/x86_64-linux-gnu/ceph"
readonly VERIFIED="fio --name=verified --directory=/mnt --size=4M --bs=16k --rw=randwrite --iodepth=8 \
--ioengine=io_uring --direct=1 --verify=crc32c --minimal --output=/tmp/fio"
readonly ENOUGH_FILES=20
DEV=$(device 0)

digest() { md5sum "$1" | cut -d " " -f 1; }

# One protocol each: r0 with C, r1 (two volumes) with A, r2 with B.
configuration() {
	PROTOCOL=C NET=$QUICK DISK="resync-rate 400M; c-plan-ahead 0; al-extents 67;" resource r0 $PORT 0
	PROTOCOL=A resource r1 $((PORT + 1)) 1 2
	PROTOCOL=B resource r2 $((PORT + 2)) 3
}

from_bare_disks_to_a_pair() {
	step "two nodes, bare disks, one configuration"
	type_ "drbdctl --version"
	type_ "sed '/^}/q' $CONF"

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
		must "the first synchronisation ends" wait_until 110 in_sync r0
	fi
	type_ "drbdctl status r0"
	check "UpToDate on both sides" wait_until 10 in_sync r0
	meet synced
}

a_file_system_changes_hands() {
	if [ "$VM_ID" = 1 ]; then
		step "a file system with a real tree in it"
		type_ "mkfs.ext4 -q -i 16384 $DEV"
		type_ "mount $DEV /mnt"
		type_ "cd / && tar -cf - $TREE | tar -C /mnt -xf -"
		local files megabytes
		files=$(find /mnt/usr -type f | wc -l)
		megabytes=$(du -sm --apparent-size /mnt/usr | cut -f 1)
		note "$files files, $megabytes MB"
		check "at least 5000 files" [ "$files" -ge 5000 ]
		check "at least 100 MB" [ "$megabytes" -ge 100 ]
		type_ "cd /mnt && find usr -type f -print0 | sort -z | xargs -0 md5sum >manifest"
		type_ "$VERIFIED"
		tell manifest "$(digest /mnt/manifest)"
		type_ "cd / && umount /mnt"
		step "the other node takes over"
		type_ "drbdctl secondary r0"
		meet handover
	else
		meet handover
		type_ "drbdctl primary r0"
		type_ "mount -o noatime $DEV /mnt"
		check "the manifest is the one that was written" same "$(ask manifest)" "$(digest /mnt/manifest)"
		type_ "cd /mnt && md5sum --quiet -c manifest && echo every file is as it was written"
		type_ "$VERIFIED --verify_only"
		type_ "cd / && umount /mnt"
	fi
	meet verified
	step "both disks hold the same bytes"
	identical handover 0
}

the_cable_is_pulled() {
	local at changed before
	if [ "$VM_ID" = 2 ]; then
		step "load, and then the cable is pulled"
		type_ "mount -o noatime $DEV /mnt"
		start_load r0 /mnt/load 8
		type_ "vmctl link down 2"
		must "the loss is noticed" wait_until 20 is_not Connected connection r0
		at=$(written r0)
		must "I/O goes on without the peer" wait_until 10 wrote_more_than r0 $((at + 1024))
		stop_load
		type_ "umount /mnt"
		type_ "drbdctl status r0"
		changed=$(out_of_sync r0)
		tell changed "$changed"
		note "$changed KiB changed since the cut"
	else
		must "the loss is noticed here too" wait_until 60 is_not Connected connection r0
		changed=$(ask changed)
		before=$(received r0)
	fi
	meet cut

	step "the link heals"
	[ "$VM_ID" = 1 ] || type_ "vmctl link up 2"
	must "the nodes find each other again" wait_until 30 is Connected connection r0
	must "UpToDate on both sides" wait_until 60 in_sync r0
	check "the resync announced what had changed" same "$(will_sync r0)" "$changed"
	[ "$VM_ID" = 2 ] || check "only that travelled" same $(($(received r0) - before)) "$changed"
	meet healed
	identical linkcut 0
}

the_primary_loses_power() {
	if [ "$VM_ID" = 2 ]; then
		step "load, and files that are fsynced one by one"
		type_ "mount -o noatime $DEV /mnt"
		meet recorder
		start_load r0 /mnt/load 8
		write_files
		die "writing failed before the power did"
	fi
	record_files
	meet recorder
	must "files have been fsynced on the other node" wait_until 60 recorded_at_least $ENOUGH_FILES
	step "power failure of the Primary"
	type_ "vmctl kill 2"
	type_ "vmctl boot 2"
	must "the loss is noticed" wait_until 30 is_not Connected connection r0
	note "$(recorded) files were fsynced"
	type_ "drbdctl primary r0"
	type_ "mount $DEV /mnt"
	check "the journal was replayed" grep -q 'recovery complete' <(dmesg)
	check "every fsynced file is there" all_files_there
	type_ "cp -r /usr/share/zoneinfo/Europe /mnt/meanwhile && sync"
	must "the other node comes back" wait_until 60 is Connected connection r0
	must "UpToDate on both sides" wait_until 60 in_sync r0
	check "the files are still there" all_files_there
	type_ "umount /mnt"
	meet back
	identical powercut 0
}

the_dead_node_comes_back() {
	step "the dead node has power again"
	back_again r0 0
	meet back
	identical powercut 0
}

more_resources_and_protocols() {
	step "two more resources: r1 with two volumes and protocol A, r2 with protocol B"
	bring_up r1 r2
	write_and_compare others "r1 r2" 1 2 3
	type_ "drbdctl status"
}

nothing_stays() {
	step "down leaves nothing"
	meet before-down
	type_ "drbdctl down all"
	nothing_left r0 $PORT 0
	nothing_left r1 $((PORT + 1)) 1 2
	nothing_left r2 $((PORT + 2)) 3
	check "no ublk device" no_ublk_left
	type_ "drbdctl down all"
	type_ "drbdmeta --force 0 v08 $(disk 0) internal get-gi"
}

node_setup < <(configuration)
if [ "$VM_BOOT" = 1 ]; then
	from_bare_disks_to_a_pair
	a_file_system_changes_hands
	the_cable_is_pulled
	the_primary_loses_power
else
	the_dead_node_comes_back
fi
more_resources_and_protocols
nothing_stays
finish
