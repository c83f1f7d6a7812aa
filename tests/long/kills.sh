#!/bin/bash
# Engines are killed under load and started again, time after time: the Primary's, the Secondary's,
# both at once, and the Primary's while the other one is gone. Three resources, one of each
# protocol; a file system on the first. No I/O error, nothing lost or read back wrong, and both
# disks equal in the end (LV-2, AL-5, DUR-1, ORD-4).
#
# ROUNDS in the environment says how many times (45, which kill 201 engines).
# guests: 2
# disks: ram:48M ram:24M ram:24M
# timeout: 3000
. ./lib.sh
. ./load.sh

ROUNDS=${ROUNDS:-45}
readonly RESOURCES="r0 r1 r2"
configuration() {
	PROTOCOL=C NET=$QUICK resource r0 $PORT 0
	PROTOCOL=B NET=$QUICK resource r1 $((PORT + 1)) 1
	PROTOCOL=A NET=$QUICK resource r2 $((PORT + 2)) 2
}
node_setup < <(configuration)

killed=0
pids_of_engines() { local r; for r in $RESOURCES; do cat "/run/drbd/$r.lock"; done; }
none_alive() {
	local pid
	for pid in "$@"; do
		[ ! -e "/proc/$pid" ] || return 1
	done
}
# kill_engines: all of this node at once, as a lack of memory or a bug of ours might do it.
kill_engines() {
	local pids
	mapfile -t pids < <(pids_of_engines)
	kill -KILL "${pids[@]}" || die "not every engine was alive"
	must "the engines are gone" wait_until 10 none_alive "${pids[@]}"
}
start_engines() { type_ "drbdctl up all"; }
in_sync_again() {
	local r
	for r in $RESOURCES; do
		must "$r is UpToDate on both sides" wait_until 90 in_sync "$r"
	done
}
# Since its engine was started, it has served the host.
load_goes_on() {
	local r
	for r in $RESOURCES; do
		must "the load on $r goes on" wait_until 40 wrote_more_than "$r" 0
	done
	check "no load has ended" kill -0 "${LOADS[@]}"
}

# One round of each kind; "mine" and "theirs" are the Primary and the Secondary.
primary_killed() {
	[ "$VM_ID" = 2 ] && return
	kill_engines
	start_engines
}
secondary_killed() {
	[ "$VM_ID" = 1 ] && return
	kill_engines
	start_engines
}
both_killed() {
	meet "both-$round"
	kill_engines
	start_engines
}
primary_killed_alone() {
	[ "$VM_ID" = 1 ] || kill_engines
	meet "secondary-gone-$round"
	if [ "$VM_ID" = 1 ]; then
		kill_engines
		start_engines
		load_goes_on
	fi
	meet "primary-served-$round"
	[ "$VM_ID" = 1 ] || start_engines
}
readonly KINDS=(primary_killed secondary_killed both_killed primary_killed_alone)
readonly ENGINES=(3 3 6 6)

step "three pairs in sync"
bring_up r0 r1 r2
LOADS=()
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q $(device 0)"
	type_ "mount $(device 0) /mnt"
	start_verified r0 /mnt/load 8 && LOADS+=("$LOAD")
	start_verified r1 "$(device 1)" 8 && LOADS+=("$LOAD")
	start_verified r2 "$(device 2)" 8 && LOADS+=("$LOAD")
fi

for ((round = 1; round <= ROUNDS; round++)); do
	kind=$(((round - 1) % 4))
	step "round $round, after $killed: ${KINDS[kind]}"
	meet "round-$round"
	${KINDS[kind]}
	in_sync_again
	[ "$VM_ID" = 2 ] || load_goes_on
	killed=$((killed + ENGINES[kind]))
done

step "the end"
if [ "$VM_ID" = 1 ]; then
	for d in 0 1 2; do
		stop_verified r$d "${LOADS[d]}" 256
	done
	check "the kernel saw no I/O error" [ "$(dmesg | grep -cE 'EXT4-fs error|I/O error, dev ublkb[0-9]+, sector [1-9]')" -eq 0 ]
	type_ "umount /mnt"
	type_ "e2fsck -f -n $(device 0)"
	type_ "drbdctl secondary all"
fi
meet over
for r in $RESOURCES; do
	check "still in sync" wait_until 20 in_sync "$r"
done
meet synced
for d in 0 1 2; do
	identical kills-$d $d
done
meet compared
note "$killed engines were killed"
type_ "drbdctl down all"
check "no ublk device" no_ublk_left
finish
