#!/bin/bash
# An engine that is stopped or was killed: no second one comes near its disk, `down --force` ends in
# bounded time, and neither leaves a device behind that only a reboot clears.
# guests: 1
# disks: ram:32M
# timeout: 110
. ./lib.sh
. ./load.sh

# Time for the answer, for the kill, and for what emulation adds.
readonly FORCE_S=40
# Time for a question that nobody answers, and for what emulation adds.
readonly QUERY_S=15

# The peer never comes.
ip addr add 10.0.0.1/24 dev lo
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

engine_pid() { pgrep -f 'ublk-target run .*r0'; }
signal_engine() { type_ "kill -$1 $(engine_pid)"; }
begin() {
	type_ "drbdctl up r0"
	type_ "drbdctl primary ${1:-} r0"
}
# A filter for the kernel's words about requests that failed; a Secondary fails the partition scan.
io_errors() { dmesg | grep -cE 'I/O error'; }

step "an engine under load is stopped"
type_ "drbdctl create-md --force r0"
begin --force
must "it has a device" wait_until 10 test -b "$DEV"
type_ "dmesg --clear"
start_verified load "$DEV" 8
must "the load runs" wait_until 20 wrote_more_than r0 512
first=$(engine_pid)
signal_engine STOP

step "no second engine, by whatever way"
refused 1 "r0 is served by another engine \(pid $first\)" "ublk-target run --config /run/drbd/r0.json"
refused 20 "process $first lives but does not answer.* state is T" "drbdctl up r0"
start=$SECONDS
refused 20 "process $first lives but does not answer.* state is T" "drbdctl status r0"
check "told soon" between 0 $((SECONDS - start)) $QUERY_S
resource r1 $((PORT + 1)) 0 | sed "s,$DEV;,/dev/drbd7;," >/tmp/other.conf
refused 10,20 "$(disk 0): device is in use \(open by pid $first \(ublk-target" "drbdctl -c /tmp/other.conf up r1"
check "the first one is the only one" same "$(pgrep -x ublk-target)" "$first"
signal_engine CONT
at=$(written r0)
must "the load goes on" wait_until 20 wrote_more_than r0 $((at + 512))
stop_verified load "$LOAD" 64
check "the kernel saw no I/O error" same "$(io_errors)" 0

step "down --force, while somebody has the device open"
# Nothing waits for its end.
sleep infinity <"$DEV" &
HOLDER=$!
signal_engine STOP
start=$SECONDS
refused 20 "in use \(open by pid $HOLDER" "drbdctl down --force r0"
check "in bounded time" between 0 $((SECONDS - start)) $FORCE_S
check "the engine is gone" no_engine r0
type_ "drbdctl up r0"
type_ "timeout 20 dd if=$DEV of=/dev/null bs=64k count=4 iflag=direct status=none"
check "it is Primary as before" is Primary role_of r0
kill $HOLDER
wait $HOLDER 2>/dev/null

step "down --force, when nobody has"
signal_engine STOP
start=$SECONDS
type_ "drbdctl down --force r0"
check "in bounded time" between 0 $((SECONDS - start)) $FORCE_S
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left

step "down, after the engine was killed"
begin
must "it has a device" wait_until 10 test -b "$DEV"
signal_engine KILL
must "the engine is gone" wait_until 10 no_engine r0
check "its device is not" test -b "$DEV"
type_ "drbdctl down r0"
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left
begin
must "a device as ever" wait_until 10 test -b "$DEV"
type_ "drbdctl down r0"
finish
