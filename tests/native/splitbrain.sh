#!/bin/bash
# Both nodes are made Primary while they cannot see each other: detected on both sides, reported,
# resolved by throwing one side's changes away; the survivor's stay. The operator's handlers tell of
# it, and of each resync that is done.
. "$(dirname "$0")/lib.sh"

NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
# with_handlers RESOURCE: each adds its name and what it is about to a file of the node.
with_handlers() {
	local name
	sed '$d' <<<"$1"
	printf '    handlers {\n'
	for name in initial-split-brain split-brain after-resync-target pri-on-incon-degr; do
		# shellcheck disable=SC2016 # the handler's shell expands it
		printf '        %s "echo %s $DRBD_RESOURCE/$DRBD_VOLUME $DRBD_PEER_ADDRESS >>%s/$(uname -n)/told";\n' \
			$name $name "$LAB"
	done
	printf '    }\n}\n'
}
# told NODE: the handlers that have run there since this was last asked, as often as they have.
told() { sed 's/ 10\.0\.0\.[12]$//' "$LAB/$1/told" 2>/dev/null | sort | tr '\n' ' '; }
is_told() { [ "$(told "$1")" = "$2" ]; }
forget_told() { rm -f "$LAB"/*/told; }

lab_setup 1 < <(with_handlers "$(resource r0 $PORT 0)")
ALICE=$(uri alice) BOB=$(uri bob)
step "a pair in sync"
bring_up r0
check "the target's handler tells that it is done" wait_until 10 is_told bob "after-resync-target r0/0 "
check "it is told who the peer is" grep -q ' 10\.0\.0\.1$' "$LAB/bob/told"
check "the source's does not" is_told alice ""
forget_told
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
	check "the handlers of $node tell" wait_until 10 is_told $node "initial-split-brain r0/0 split-brain r0/0 "
done
forget_told

step "the changes of bob are thrown away"
on bob alone || on bob type_ "drbdctl disconnect r0"
on bob type_ "drbdctl connect --discard-my-data r0"
on alice type_ "drbdctl connect r0"
must "the nodes find each other" wait_until 15 on bob is Connected connection r0
both_in_sync r0
check "on alice they tell that it was solved" wait_until 10 is_told alice "initial-split-brain r0/0 "
check "on bob also that the resync is done" wait_until 10 is_told bob "after-resync-target r0/0 initial-split-brain r0/0 "
synced=$(announced bob)
note "resynced $synced KiB"
check "what either node had changed was copied" same "$synced" 2048
identical "split brain"
on alice type_ "drbdctl primary r0"
on alice type_ "qemu-io -f raw -r -c 'read -P 0xa1 16M 1M' -c 'read -P 0 32M 1M' '$ALICE'"
check "the survivor's changes are there, the others are not" \
	same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0

step "a Primary is left with half a copy"
on alice type_ "drbdctl secondary r0"
on bob type_ "drbdctl pause-sync r0"
on bob type_ "drbdctl invalidate r0"
must "bob lacks data" wait_until 10 on bob is Inconsistent disk_state r0
on bob type_ "drbdctl primary r0"
forget_told
type_ "cable down"
must "the peer is gone" wait_until 10 on bob is_not Connected connection r0
check "the handler of bob tells" wait_until 10 is_told bob "pri-on-incon-degr r0/0 "
check "the one of alice does not" is_told alice ""
on bob type_ "drbdctl secondary r0"
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
