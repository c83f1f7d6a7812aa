#!/bin/bash
# Protocols A and B, one after the other on the same files: after the role has changed both nodes
# hold the same bytes.
. "$(dirname "$0")/lib.sh"

one_protocol() {
	step "protocol $1"
	PROTOCOL=$1 resource r0 $PORT 0 >"$CONF"
	bring_up r0
	on alice type_ "fio --name=protocol-$1 --ioengine=nbd --uri=$(uri alice) --size=64M --io_size=32M \
--rw=randwrite --bs=4k --iodepth=32 --verify=crc32c --fsync=256 --minimal --output=$LAB/fio"
	hand_over alice bob
	both_in_sync r0
	check "nothing is out of sync" on bob is 0 out_of_sync r0
	identical "protocol $1"
	for node in alice bob; do
		pid=$(engine_pid $node)
		on $node type_ "drbdctl down r0"
		nothing_left $node r0 $PORT "$pid"
	done
}

lab_setup 1 </dev/null
one_protocol A
one_protocol B
finish
