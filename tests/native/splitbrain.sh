#!/bin/bash
# Both nodes are made Primary while they cannot see each other: detected on both sides, reported,
# resolved by throwing one side's changes away; the survivor's stay.
. "$(dirname "$0")/lib.sh"

NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice) BOB=$(uri bob)
step "a pair in sync"
bring_up r0
on alice type_ "drbdctl secondary r0"

step "the link is cut, and both nodes become Primary"
type_ "cable down"
for node in alice bob; do
	must "$node notices the loss" wait_until 10 on $node is_not Connected connection r0
	on $node type_ "drbdctl primary r0"
done
on alice type_ "qemu-io -f raw -c 'write -P 0xa1 16M 1M' -c flush '$ALICE'"
on bob type_ "qemu-io -f raw -c 'write -P 0xb0 16M 512k' -c 'write -P 0xb0 32M 1M' -c flush '$BOB'"
for node in alice bob; do
	on $node type_ "drbdctl secondary r0"
done

step "the link heals"
type_ "cable up"
alone() { is StandAlone connection r0; }
for node in alice bob; do
	must "$node detects the split brain" wait_until 20 log_says $node 'Split-Brain detected'
done
some_alone() { on alice alone || on bob alone; }
must "the connection was dropped" wait_until 10 some_alone
for node in alice bob; do
	on $node type_ "drbdctl status r0"
	check "$node keeps its own data" on $node is UpToDate disk_state r0
done

step "the changes of bob are thrown away"
on bob alone || on bob type_ "drbdctl disconnect r0"
on bob type_ "drbdctl connect --discard-my-data r0"
on alice type_ "drbdctl connect r0"
must "the nodes find each other" wait_until 15 on bob is Connected connection r0
both_in_sync r0
synced=$(announced bob)
note "resynced $synced KiB"
check "what either node had changed was copied" same "$synced" 2048
identical "split brain"
on alice type_ "drbdctl primary r0"
on alice type_ "qemu-io -f raw -r -c 'read -P 0xa1 16M 1M' -c 'read -P 0 32M 1M' '$ALICE'"
check "the survivor's changes are there, the others are not" \
	same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
