#!/bin/bash
# The connection is lost and made again, time after time, under load: by both sockets reset, by one
# of them reset, by a command on either node. Nothing leaks (WP-9): the engines end with no more
# descriptors and threads than in the beginning and hardly more memory; nothing is lost.
#
# ROUNDS in the environment says how many times (1000).
# guests: 2
# disks: ram:64M
# timeout: 3500
. ./lib.sh
. ./load.sh

ROUNDS=${ROUNDS:-1000}
# Everything has been used at least once by then.
readonly WARM=8
readonly GROWTH_KIB=1024
NET="timeout 9; ping-int 3; ping-timeout 9; connect-int 1;"
DISK="resync-rate 400M; c-plan-ahead 0; al-extents 67;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

handshakes() { grep -c 'Handshake to peer' /run/drbd/r0.log; }
shook_hands() { [ "$(handshakes)" -ge "$1" ]; }
engine() { cat /run/drbd/r0.lock; }
descriptors() { find "/proc/$(engine)/fd" -mindepth 1 | wc -l; }
threads() { find "/proc/$(engine)/task" -mindepth 1 -maxdepth 1 | wc -l; }
memory() { awk '/^VmRSS/ { print $2 }' "/proc/$(engine)/status"; }
has_no_more() { [ "$(descriptors)" -le "${had[0]}" ] && [ "$(threads)" -le "${had[1]}" ]; }
sockets() { ss -Htn state established "sport = :$PORT or dport = :$PORT" | wc -l; }

# Each ends the connection in its way, on node 1 only; the engines do the rest.
reset_both() { ss -HKtn "sport = :$PORT or dport = :$PORT" >/dev/null; }
reset_one() {
	local mine theirs _
	read -r _ _ mine theirs < <(ss -Htn state established "sport = :$PORT or dport = :$PORT")
	ss -HKtn src "$mine" dst "$theirs" >/dev/null
}
command_here() {
	drbdctl disconnect r0 && drbdctl connect r0 || die "disconnect and connect"
}
command_there() {
	tell "command-$round" please
}
readonly KINDS=(reset_both command_here reset_one command_there)

[ "$ROUNDS" -gt $WARM ] || die "ROUNDS=$ROUNDS: more than $WARM are needed"
step "a pair in sync, with load"
bring_up r0
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q $DEV"
	type_ "mount $DEV /mnt"
	start_verified load /mnt/load 8 --rate_iops=50
fi

for ((round = 1; round <= ROUNDS; round++)); do
	before=$(handshakes)
	kind=${KINDS[round % 4]}
	meet "round-$round"
	if [ "$VM_ID" = 1 ]; then
		$kind
	elif [ "$kind" = command_there ]; then
		ask "command-$round" >/dev/null
		command_here
	fi
	wait_until 60 shook_hands $((before + 1)) || die "round $round, $kind: no new connection"
	wait_until 60 in_sync r0 || die "round $round, $kind: not in sync again"
	if [ "$round" -eq "$WARM" ]; then
		had=("$(descriptors)" "$(threads)")
		rss=$(memory)
	fi
	[ $((round % 50)) -ne 0 ] ||
		note "round $round: $(descriptors) descriptors, $(threads) threads, $(memory) KiB, $(sockets) sockets"
done
pass "$ROUNDS times the connection came back"

step "the end"
# Whoever has asked for the state is served by a thread that ends a moment later.
check "no more descriptors and threads than after $WARM rounds" wait_until 10 has_no_more
check "hardly more memory than then" between 0 "$(memory)" $((rss + GROWTH_KIB))
check "two connections" same "$(sockets)" 2
meet counted
if [ "$VM_ID" = 1 ]; then
	stop_verified load "$LOAD" 256
	type_ "umount /mnt"
	type_ "drbdctl secondary r0"
fi
meet over
check "still in sync" wait_until 20 in_sync r0
identical reconnects 0
meet compared
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
