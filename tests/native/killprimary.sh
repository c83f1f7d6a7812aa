#!/bin/bash
# The Primary's engine is killed under load: the other node takes over with everything that was
# acknowledged, and the dead one comes back as Secondary and gets only what may differ.
. "$(dirname "$0")/lib.sh"

readonly BLOCK=16384
# Where the recorded writes begin, and where the load is.
readonly RECORD_AT=$((128 << 20))
readonly LOAD_MB=16
readonly ENOUGH=200

NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
DISK="resync-rate 1G; c-plan-ahead 0; al-extents 67;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice) BOB=$(uri bob)
step "a pair in sync"
bring_up r0

# The pattern of the N-th recorded write.
pattern() { echo $(($1 % 251 + 1)); }
# Writes that never repeat a block: what was acknowledged is what must be there. Every other one
# demands to be durable on return, the others are followed by a flush.
commands() {
	local i
	for ((i = 0; i < 5000; i++)); do
		if ((i % 2)); then
			printf 'write -f -P %d %d %d\n' "$(pattern $i)" $((RECORD_AT + i * BLOCK)) $BLOCK
		else
			printf 'write -P %d %d %d\nflush\n' "$(pattern $i)" $((RECORD_AT + i * BLOCK)) $BLOCK
		fi
	done
}
acknowledged() { grep -cE "^(qemu-io> )*wrote $BLOCK/$BLOCK bytes" "$LAB/record"; }
enough() { [ "$(acknowledged)" -ge $ENOUGH ]; }
# Reads every acknowledged block and compares it with its pattern.
all_there() {
	local i
	grep -oE "wrote $BLOCK/$BLOCK bytes at offset [0-9]+" "$LAB/record" | grep -oE '[0-9]+$' |
		while read -r offset; do
			i=$(((offset - RECORD_AT) / BLOCK))
			printf 'read -P %d %d %d\n' "$(pattern $i)" "$offset" $BLOCK
		done >"$LAB/reads"
	NODE=$1 qemu-io -f raw "$2" <"$LAB/reads" >"$LAB/read" 2>&1
	grep -m 3 -E 'verification failed|read failed' "$LAB/read"
	[ "$(grep -cE "read $BLOCK/$BLOCK bytes" "$LAB/read")" = "$(wc -l <"$LAB/reads")" ] &&
		! grep -qE 'verification failed|read failed' "$LAB/read"
}

step "load, and writes that are recorded when they are acknowledged"
start_load alice "$ALICE" "$LAB/load.json" --size=${LOAD_MB}M --rw=randwrite --bs=4k --iodepth=16 --fsync=64
: >"$LAB/record"
commands >"$LAB/commands"
NODE=alice stdbuf -oL qemu-io -f raw "$ALICE" <"$LAB/commands" >"$LAB/record" 2>&1 &
writer=$!
must "$ENOUGH writes were acknowledged" wait_until 20 enough

step "the Primary's engine is killed"
check "the writer still writes" kill -0 $writer
pid=$(engine_pid alice)
type_ "kill -9 $pid"
must "it is gone" wait_until 5 [ ! -e "/proc/$pid" ]
wait $writer
wait "$LOAD"
count=$(acknowledged)
note "$count writes were acknowledged"
check "the writer had not come to its end" [ "$count" -lt 5000 ]
must "bob notices" wait_until 10 on bob is_not Connected connection r0
on alice refused 20 'died' "drbdctl status r0"

step "take over"
on bob type_ "drbdctl primary r0"
check "every acknowledged write is on bob" all_there bob "$BOB"
on bob type_ "qemu-io -f raw -c 'write -P 0xbb 224M 2M' -c flush '$BOB'"
on bob type_ "drbdctl status r0"
changed=$(on bob out_of_sync r0)
check "bob counts what it has changed" same "$changed" 2048

step "the dead node comes back"
on alice type_ "drbdctl up r0"
must "it finds the other one" wait_until 15 on alice is Connected connection r0
check "it is Secondary" on alice is Secondary role_of r0
check "bob stayed Primary" on bob is Primary role_of r0
on alice type_ "drbdctl wait-sync r0"
both_in_sync r0
synced=$(announced alice)
total=$(($(exposed) / 1024))
# Hot extents of 4 MiB: those of the load, and of the recorded writes, one each for good measure.
limit=$(((LOAD_MB + 4 + count * BLOCK / 1048576 + 8) * 1024 + changed))
note "resynced $synced KiB of $total KiB, at most $limit KiB may differ"
check "activity log and bitmap limited the resync" between "$changed" "$synced" "$limit"
check "no more than that travelled" between "$changed" "$(received alice r0)" "$limit"
check "nothing is left out of sync" on alice is 0 out_of_sync r0
identical "killed Primary"

step "it takes over again, with everything"
hand_over bob alice
check "every acknowledged write is on alice" all_there alice "$ALICE"
on alice type_ "qemu-io -f raw -r -c 'read -P 0xbb 224M 2M' '$ALICE'"
check "and what was written meanwhile" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
