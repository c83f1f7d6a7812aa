#!/bin/bash
# Two nodes on one host, told apart by --node: the same configuration, addresses with different
# ports on loopback, NBD over TCP on one resource and on a named unix socket on the other.
NODES=loopback
. "$(dirname "$0")/lib.sh"

SIZE_MB=64
lab_setup 1 < <(OPTIONS="queue-depth 8; max-io-size 65536;" resource r0 $PORT 0)
ALICE=$(uri alice) BOB=$(uri bob)
step "a pair in sync on one host"
bring_up r0
on alice type_ "drbdctl status r0"
on bob type_ "drbdctl role r0"
check "bob is another node" same "$OUTPUT" Secondary/Primary

step "requests larger than the engine takes, deeper queues than it has"
on alice type_ "fio --name=large --ioengine=nbd --uri=$ALICE --size=32M --rw=randwrite --bs=4k-64k \
--iodepth=32 --verify=crc32c --minimal --output=$LAB/fio"
on alice type_ "qemu-io -f raw -c 'write -P 0x11 40M 4M' -c 'write -z 42M 1M' -c 'discard 43M 512k' -c flush '$ALICE'"
on alice type_ "qemu-io -f raw -r -c 'read -P 0x11 40M 2M' -c 'read -P 0 42M 1M' '$ALICE'"
check "what was written is read" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0

step "who uses the device is named"
start_load alice "$ALICE" "$LAB/load.json" --size=16M --rw=randwrite --bs=4k --iodepth=4
on alice refused 11 'fio' "drbdctl secondary r0"
on alice refused 11 'fio' "drbdctl down r0"
stop_load
check "the load was not disturbed" same "$(fio_report "$LAB/load.json" '.jobs[0].error')" 0
free_to_go() { drbdctl secondary r0 2>/dev/null; }
must "without a client alice becomes Secondary" wait_until 5 on alice free_to_go
identical loopback

step "a dead engine is replaced"
on bob type_ "drbdctl primary r0"
pid=$(engine_pid bob)
type_ "kill -9 $pid"
must "it is gone" wait_until 5 [ ! -e "/proc/$pid" ]
on bob refused 20 'died' "drbdctl status r0"
on bob type_ "drbdctl up r0"
both_in_sync r0
check "it came back as Secondary" on bob is Secondary role_of r0
on bob refused 10 'already up' "drbdctl up r0"

step "down leaves nothing"
for node in alice bob; do
	pid=$(engine_pid $node)
	port=$PORT
	[ $node = alice ] || port=$((PORT + 1000))
	on $node type_ "drbdctl down r0"
	nothing_left $node r0 $port "$pid"
done
finish
