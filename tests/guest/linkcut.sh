#!/bin/bash
# The replication link is cut under load: I/O goes on after no longer than was configured, and
# when the link heals only the blocks that changed meanwhile travel.
# guests: 2
# disks: ram:48M
# timeout: 110
. ./lib.sh

# The link counts as dead when a ping that follows ping-int of silence is not answered within
# ping-timeout; a request may wait that long, and timeout bounds what was already under way.
readonly STALL_MS=$(((2 + 3 + 1) * 1000))
# What emulation adds: a node needs a while to run what has become due.
readonly SLACK_MS=3000
readonly LOAD_MB=16
readonly EXTRA_KB=4096

NET="timeout 20; ping-int 3; ping-timeout 10; connect-int 3;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)
step "a pair in sync"
bring_up r0

written() { field r0 '.devices[0].written'; }
wrote_more_than() { [ "$(written)" -gt "$1" ]; }
received() { peer_device r0 received; }

if [ "$VM_ID" = 1 ]; then
	step "load, and then the cable is pulled"
	before=$(written)
	fio --name=load --filename="$DEV" --size=${LOAD_MB}M --rw=randwrite --bs=4k --iodepth=8 --direct=1 \
		--ioengine=io_uring --time_based --runtime=60 --output-format=json --output=/tmp/fio.json 2>/tmp/fio.err &
	load=$!
	must "the load runs" wait_until 20 wrote_more_than $((before + 1024))
	type_ "vmctl link down 2"
	must "the loss is noticed" wait_until 20 is_not Connected connection r0
	at=$(written)
	must "I/O goes on without the peer" wait_until 10 wrote_more_than $((at + 1024))
	kill -INT $load
	wait $load
	stall=$(fio_report /tmp/fio.json '[.jobs[0].write | .clat_ns.max, .lat_ns.max] | max / 1000000 | floor')
	errors=$(fio_report /tmp/fio.json '.jobs[0].error')
	note "longest write $stall ms, allowed $STALL_MS ms (and $SLACK_MS ms for emulation)"
	check "no write failed" same "$errors" 0
	check "no write waited longer than configured" between 0 "$stall" $((STALL_MS + SLACK_MS))
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
	before=$(received)
fi
meet cut

step "the link heals"
[ "$VM_ID" = 1 ] && type_ "vmctl link up 2"
must "the nodes find each other again" wait_until 30 is Connected connection r0
type_ "drbdctl wait-sync r0"
must "UpToDate on both sides" wait_until 30 in_sync r0
check "the resync announced what had changed" same "$(will_sync r0)" "$changed"
[ "$VM_ID" = 1 ] || check "only that travelled" same $(($(received) - before)) "$changed"
check "nothing is left out of sync" is 0 out_of_sync r0
[ "$VM_ID" = 2 ] || type_ "drbdctl secondary r0"
meet healed
identical linkcut 0
type_ "drbdctl down r0"
finish
