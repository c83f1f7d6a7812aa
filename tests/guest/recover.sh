#!/bin/bash
# The engine is killed under a mounted file system with load on it and started again: no I/O error,
# nothing lost, and the file system can be unmounted afterwards. On both nodes, one after the other.
# guests: 2
# disks: ram:64M
# timeout: 110
. ./lib.sh
. ./load.sh

NET=$QUICK
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

engine_pid() { pgrep -f 'ublk-target .*r0'; }
engine_gone() { [ -z "$(engine_pid)" ]; }
# What a power failure of the process alone looks like, and what an operator does about it.
kill_engine() {
	local pid
	pid=$(engine_pid)
	type_ "kill -KILL $pid"
	must "the engine is gone" wait_until 10 engine_gone
	type_ "drbdctl up r0"
	must "the nodes find each other again" wait_until 30 is Connected connection r0
	must "UpToDate on both sides" wait_until 40 in_sync r0
}

step "a pair in sync"
bring_up r0

if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q $DEV"
	type_ "mount $DEV /mnt"
	start_verified load /mnt/load 12
	step "the Primary's engine is killed"
	kill_engine
	check "it is Primary as before" is Primary role_of r0
	check "the load goes on" kill -0 "$LOAD"
	meet primary-killed
	meet secondary-killed
	stop_verified load "$LOAD" 256
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	type_ "drbdctl secondary r0"
else
	meet primary-killed
	step "the Secondary's engine is killed"
	kill_engine
	check "it is Secondary as before" is Secondary role_of r0
	meet secondary-killed
fi
meet done
check "still in sync" wait_until 20 in_sync r0
identical recover 0
meet compared
type_ "drbdctl down r0"
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left
finish
