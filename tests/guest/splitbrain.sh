#!/bin/bash
# Both nodes are made Primary while they cannot see each other: detected on both sides, reported,
# resolved by throwing one side's changes away.
# guests: 2
# disks: ram:48M
# kernels: 6.12
# timeout: 110
. ./lib.sh
. ./load.sh

NET=$QUICK
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

detected() { grep -q 'Split-Brain detected' /run/drbd/r0.log; }
dropped() { [ "$(connection r0)" = StandAlone ] || { [ "$VM_ID" = 2 ] && [ "$(connection r0)" = Connecting ]; }; }

step "a pair in sync"
bring_up r0
[ "$VM_ID" = 2 ] || type_ "drbdctl secondary r0"
meet demoted

step "the link is cut, and both nodes become Primary"
[ "$VM_ID" = 2 ] || type_ "vmctl link down 2"
must "the loss is noticed" wait_until 30 is_not Connected connection r0
type_ "drbdctl primary r0"
type_ "dd if=/dev/urandom of=$DEV bs=64k count=16 seek=$((VM_ID * 32)) oflag=direct conv=fsync status=none"
type_ "drbdctl secondary r0"
meet diverged

step "the link heals"
[ "$VM_ID" = 2 ] || type_ "vmctl link up 2"
must "split brain is detected" wait_until 40 detected
must "the connection was dropped" wait_until 20 dropped
type_ "drbdctl status r0"
check "own data is still good" is UpToDate disk_state r0
meet detected

step "the changes of g2 are thrown away"
if [ "$VM_ID" = 2 ]; then
	is StandAlone connection r0 || type_ "drbdctl disconnect r0"
	type_ "drbdctl connect --discard-my-data r0"
else
	type_ "drbdctl connect r0"
fi
must "the nodes find each other" wait_until 30 is Connected connection r0
must "UpToDate on both sides" wait_until 40 in_sync r0
synced=$(will_sync r0)
note "resynced $synced KiB"
check "only what differed was copied" between 2048 "$synced" 4096
identical splitbrain 0
type_ "drbdctl down r0"
finish
