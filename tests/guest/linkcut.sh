#!/bin/bash
# The replication link is cut under load: I/O goes on after no longer than was configured, and
# when the link heals only the blocks that changed meanwhile travel.
# guests: 2
# disks: ram:48M
# kernels: 7.2
# timeout: 110
. ./lib.sh
. ./load.sh

readonly LOAD_MB=16
readonly EXTRA_KB=4096

NET=$QUICK
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)
step "a pair in sync"
bring_up r0

if [ "$VM_ID" = 1 ]; then
	step "load, and then the cable is pulled"
	start_load r0 "$DEV" $LOAD_MB
	type_ "vmctl link down 2"
	must "the loss is noticed" wait_until 20 is_not Connected connection r0
	at=$(written r0)
	must "I/O goes on without the peer" wait_until 10 wrote_more_than r0 $((at + 1024))
	stop_load
	type_ "dd if=/dev/urandom of=$DEV bs=64k count=$((EXTRA_KB / 64)) seek=$((32 * 16)) oflag=direct status=none"
	type_ "drbdctl status r0"
	check "the peer's state is unknown" is DUnknown peer_device r0 peer-disk-state
	changed=$(out_of_sync r0)
	note "$changed KiB changed since the cut"
	check "what changed is counted, and nothing else" between $EXTRA_KB "$changed" $((EXTRA_KB + LOAD_MB * 1024))
	tell changed "$changed"
else
	must "the loss is noticed here too" wait_until 60 is_not Connected connection r0
	changed=$(ask changed)
	before=$(received r0)
fi
meet cut

step "the link heals"
[ "$VM_ID" = 1 ] && type_ "vmctl link up 2"
must "the nodes find each other again" wait_until 30 is Connected connection r0
type_ "drbdctl wait-sync r0"
must "UpToDate on both sides" wait_until 30 in_sync r0
check "the resync announced what had changed" same "$(will_sync r0)" "$changed"
[ "$VM_ID" = 1 ] || check "only that travelled" same $(($(received r0) - before)) "$changed"
check "nothing is left out of sync" is 0 out_of_sync r0
[ "$VM_ID" = 2 ] || type_ "drbdctl secondary r0"
meet healed
identical linkcut 0
type_ "drbdctl down r0"
finish
