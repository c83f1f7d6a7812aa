#!/bin/bash
# Fault after fault on one pair under load: either engine killed, both at once, cables pulled, engines
# frozen, the Primary's part changing sides. After each round both nodes are in sync, hold the same
# bytes, and everything that was ever acknowledged. ROUNDS says how many, SEED which.
. "$(dirname "$0")/lib.sh"

readonly ROUNDS=${ROUNDS:-6}
RANDOM=${SEED:-1}
readonly BLOCK=4096
readonly FAULTS=(kill-primary kill-secondary kill-both cut freeze-secondary freeze-primary)
# The recorded writes of a round have this much room, behind the part that the load has.
readonly ROOM=$((2 << 20)) RECORD_AT=$((64 << 20))

SIZE_MB=128
NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
DISK="resync-rate 1G; c-plan-ahead 0; al-extents 67;"
lab_setup 1 < <(resource r0 $PORT 0)
step "a pair in sync"
bring_up r0
PRIMARY=alice SECONDARY=bob
swap() { read -r PRIMARY SECONDARY <<<"$SECONDARY $PRIMARY"; }

# Writes with a pattern for each place and round; no block is written twice in a round.
commands() {
	local i
	for ((i = 0; i < ROOM / BLOCK; i++)); do
		printf 'write -f -P %d %d %d\n' $(((i * 7 + $1) % 251 + 1)) $((RECORD_AT + ROOM * ($1 % 24) + i * BLOCK)) $BLOCK
	done
}
acknowledged() { grep -cE "wrote $BLOCK/$BLOCK bytes" "$LAB/record.$1"; }
recorded_more_than() { [ "$(acknowledged "$1")" -gt "$2" ]; }
# Everything that rounds up to this one have recorded.
all_there() {
	local round
	for ((round = 1; round <= $1; round++)); do
		[ -s "$LAB/record.$round" ] || continue
		# A place used again by a later round tells nothing about this one.
		[ $((round + 24)) -gt "$1" ] || continue
		grep -oE 'at offset [0-9]+' "$LAB/record.$round" | while read -r _ _ offset; do
			i=$(((offset - RECORD_AT) % ROOM / BLOCK))
			printf 'read -P %d %d %d\n' $(((i * 7 + round) % 251 + 1)) "$offset" $BLOCK
		done
	done >"$LAB/reads"
	NODE=$PRIMARY qemu-io -f raw "$(uri "$PRIMARY")" <"$LAB/reads" >"$LAB/read" 2>&1
	grep -m 3 -E 'verification failed|read failed' "$LAB/read"
	note "$(wc -l <"$LAB/reads") writes are looked for"
	[ "$(grep -cE "read $BLOCK/$BLOCK bytes" "$LAB/read")" = "$(wc -l <"$LAB/reads")" ] &&
		! grep -qE 'verification failed|read failed' "$LAB/read"
}
unconnected() { on "$1" is_not Connected connection r0; }
killed() { type_ "kill -9 $(engine_pid "$1")"; }

# What goes wrong, and what an operator does about it.
fault() {
	case $1 in
	kill-primary)
		killed "$PRIMARY"
		must "$SECONDARY notices" wait_until 10 unconnected "$SECONDARY"
		swap
		on "$PRIMARY" type_ "drbdctl primary r0"
		on "$PRIMARY" type_ "qemu-io -f raw -c 'write -P 0x33 60M 1M' '$(uri "$PRIMARY")'"
		on "$SECONDARY" type_ "drbdctl up r0"
		;;
	kill-secondary)
		killed "$SECONDARY"
		must "$PRIMARY notices" wait_until 10 unconnected "$PRIMARY"
		on "$SECONDARY" type_ "drbdctl up r0"
		;;
	kill-both)
		type_ "kill -9 $(engine_pid alice) $(engine_pid bob)"
		on "$SECONDARY" type_ "drbdctl up r0"
		on "$PRIMARY" type_ "drbdctl up r0"
		must "they find each other" wait_until 15 on "$PRIMARY" is Connected connection r0
		on "$PRIMARY" type_ "drbdctl wait-sync r0"
		[ $((RANDOM % 2)) = 0 ] || swap
		on "$PRIMARY" type_ "drbdctl primary r0"
		;;
	cut)
		type_ "cable down $SECONDARY"
		must "$PRIMARY notices" wait_until 10 unconnected "$PRIMARY"
		must "$SECONDARY notices" wait_until 10 unconnected "$SECONDARY"
		type_ "cable up $SECONDARY"
		;;
	freeze-secondary)
		type_ "kill -STOP $(engine_pid "$SECONDARY")"
		must "$PRIMARY notices" wait_until 10 unconnected "$PRIMARY"
		type_ "kill -CONT $(engine_pid "$SECONDARY")"
		;;
	freeze-primary)
		type_ "kill -STOP $(engine_pid "$PRIMARY")"
		must "$SECONDARY notices" wait_until 10 unconnected "$SECONDARY"
		type_ "kill -CONT $(engine_pid "$PRIMARY")"
		;;
	esac
}

one_round() {
	local what=$2 writer before
	step "round $1: $what, $PRIMARY is Primary"
	start_load "$PRIMARY" "$(uri "$PRIMARY")" "$LAB/load.json" --size=48M --rw=randwrite --bs=4k-64k \
		--iodepth=16 --fsync=128
	commands "$1" >"$LAB/commands"
	: >"$LAB/record.$1"
	NODE=$PRIMARY stdbuf -oL qemu-io -f raw "$(uri "$PRIMARY")" <"$LAB/commands" >"$LAB/record.$1" 2>&1 &
	writer=$!
	must "writes are acknowledged" wait_until 20 recorded_more_than "$1" $((RANDOM % 100))
	fault "$what"
	if [ "$what" = cut ] || [ "$what" = freeze-secondary ] || [ "$what" = freeze-primary ]; then
		must "I/O goes on" wait_until 10 wrote_more_than "$PRIMARY" $(($(written "$PRIMARY") + 1024))
	fi
	must "they find each other" wait_until 15 on "$PRIMARY" is Connected connection r0
	on "$PRIMARY" type_ "drbdctl wait-sync r0"
	stop_load
	wait $writer
	both_in_sync r0
	check "$PRIMARY is Primary" on "$PRIMARY" is Primary role_of r0
	check "$SECONDARY is Secondary" on "$SECONDARY" is Secondary role_of r0
	check "nothing is left out of sync" on "$PRIMARY" is 0 out_of_sync r0
	check "every acknowledged write is there" all_there "$1"
	hand_over "$PRIMARY" "$SECONDARY"
	swap
	identical "round $1"
	check "and on the other node" all_there "$1"
}

for ((ROUND = 1; ROUND <= ROUNDS; ROUND++)); do
	if [ "$ROUND" -le ${#FAULTS[@]} ]; then
		one_round "$ROUND" "${FAULTS[$((ROUND - 1))]}"
	else
		one_round "$ROUND" "${FAULTS[$((RANDOM % ${#FAULTS[@]}))]}"
	fi
	[ "$FAILED" -eq 0 ] || finish
done
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
