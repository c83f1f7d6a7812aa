#!/bin/bash
# The reactions to a disk's error besides `detach`. With `pass_on` the host gets the error of a
# write that no good copy has, and the block is known to be bad; with `call-local-io-error` the
# operator's handler runs, is not waited for, and the disk is detached.
# guests: 2
# disks: faulty:24M faulty:24M ram:1M
# kernels: 7.2
# timeout: 120
. ./lib.sh
. ./load.sh

readonly SEEN=/tmp/handler
peer_disk() { peer_device "$1" peer-disk-state; }
# It tells what it was told, and does not end before the test says so.
readonly HANDLER="env >$SEEN.new; readlink /proc/self/ns/mnt >>$SEEN.new; mv $SEEN.new $SEEN; \
until [ -e $SEEN.end ]; do sleep 1; done; exit 3"

{
	NET=$QUICK DISK="resync-rate 400M; c-plan-ahead 0; on-io-error call-local-io-error;" resource r0 $PORT 0 |
		sed "s,^}$,    handlers {\n        local-io-error \"$HANDLER\";\n    }\n},"
	NET=$QUICK DISK="resync-rate 400M; c-plan-ahead 0; on-io-error pass_on;" resource r1 $((PORT + 1)) 1 |
		sed "s,meta-disk internal,meta-disk $(disk 2),"
} >/tmp/conf
node_setup </tmp/conf
step "two pairs in sync"
bring_up r0 r1

step "call-local-io-error: the disk of the Primary fails under load"
if [ "$VM_ID" = 1 ]; then
	start_load r0 "$(device 0)" 4
	type_ "vmctl disk 1 d0 fail"
	must "the disk is detached" wait_until 30 is Diskless disk_state r0
	must "the handler has run" wait_until 20 test -e $SEEN
	at=$(peer_device r0 sent)
	goes_on() { [ "$(peer_device r0 sent)" -gt $((at + 512)) ]; }
	must "the load goes on, the handler as well" wait_until 20 goes_on
	cat $SEEN
	for word in DRBD_RESOURCE=r0 DRBD_VOLUME=0 DRBD_MINOR=0 DRBD_LL_DISK="$(disk 0)" DRBD_PEER=g2 DRBD_PEERS=g2 \
		DRBD_PEER_AF=ipv4 DRBD_PEER_ADDRESS=10.0.0.2 DRBD_CONF=$CONF; do
		check "it was told $word" grep -qxF "$word" $SEEN
	done
	check "it sees the mounts of the host" grep -qxF "$(readlink /proc/self/ns/mnt)" $SEEN
	check "it ran once" same "$(grep -c 'helper command: local-io-error$' /run/drbd/r0.log)" 1
	type_ "touch $SEEN.end"
	ended() { grep -q 'helper command: local-io-error: exit status: 3' /run/drbd/r0.log; }
	check "its end is told" wait_until 20 ended
	stop_load
	type_ "vmctl disk 1 d0 ok"
	type_ "drbdctl attach r0"
else
	must "the other node says that it has no disk" wait_until 60 is Diskless peer_disk r0
	check "no handler here" [ ! -e $SEEN ]
fi
must "UpToDate on both sides" wait_until 60 in_sync r0
meet handled

# Its metadata have a disk of their own, and flushes succeed: both would detach it.
step "pass_on: writes fail on the Secondary, the host does not notice"
if [ "$VM_ID" = 2 ]; then
	type_ "vmctl disk 2 d1 full"
	tell failing yes
	must "the node knows that its copy is bad" wait_until 20 is Inconsistent disk_state r1
	check "what failed is marked" is_not 0 out_of_sync r1
	type_ "vmctl disk 2 d1 ok"
	meet passed
	# The marks become a resync with the next connection.
	type_ "drbdctl disconnect r1"
	type_ "drbdctl connect r1"
else
	ask failing >/dev/null
	type_ "dd if=/dev/urandom of=$(device 1) bs=64k count=4 seek=16 oflag=direct conv=notrunc status=none"
	must "the other one's copy is bad" wait_until 20 is Inconsistent peer_disk r1
	check "what failed is marked" is 256 out_of_sync r1
	meet passed
	must "the connection goes" wait_until 20 is_not Connected connection r1
fi
must "UpToDate on both sides" wait_until 60 in_sync r1
check "nothing is out of sync" is 0 out_of_sync r1
meet resynced

step "pass_on: writes fail on a Primary without peer, and the host is told"
if [ "$VM_ID" = 2 ]; then
	type_ "drbdctl disconnect r1"
	meet alone
	meet told
	type_ "drbdctl connect r1"
else
	must "the peer is gone" wait_until 20 is_not Connected connection r1
	meet alone
	type_ "vmctl disk 1 d1 full"
	refused 1 "Input/output error" "dd if=/dev/urandom of=$(device 1) bs=64k count=4 seek=32 oflag=direct conv=notrunc"
	check "the disk stays" is UpToDate disk_state r1
	type_ "vmctl disk 1 d1 ok"
	type_ "dd if=/dev/urandom of=$(device 1) bs=64k count=4 seek=32 oflag=direct conv=notrunc status=none"
	type_ "dd if=$(device 1) of=/dev/null bs=64k iflag=direct status=none"
	meet told
fi
must "UpToDate on both sides" wait_until 60 in_sync r1
for r in r0 r1; do
	check "nothing is out of sync ($r)" is 0 out_of_sync $r
	[ "$VM_ID" = 2 ] || type_ "drbdctl secondary $r"
done
meet demoted
identical ioerror-0 0
identical ioerror-1 1
type_ "drbdctl down all"
check "no ublk device" no_ublk_left
finish
