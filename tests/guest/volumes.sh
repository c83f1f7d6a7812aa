#!/bin/bash
# Two volumes in one resource; three resources on one pair of nodes.
# guests: 2
# disks: ram:16M ram:16M ram:16M
# kernels: 7.2
# timeout: 170
. ./lib.sh

node_setup </dev/null

step "two volumes in one resource"
resource r0 $PORT 0 2 >"$CONF"
bring_up r0
check "the second volume is UpToDate as well" in_sync r0 1
write_and_compare volumes r0 0 1
type_ "drbdctl status r0"
type_ "drbdctl down r0"
nothing_left r0 $PORT 0 1
meet end-volumes

step "three resources on one pair"
{
	resource r0 $PORT 0
	resource r1 $((PORT + 1)) 1
	resource r2 $((PORT + 2)) 2
} >"$CONF"
bring_up r0 r1 r2
type_ "drbdctl status"
write_and_compare resources "r0 r1 r2" 0 1 2
type_ "drbdctl down r1"
nothing_left r1 $((PORT + 1)) 1
check "the other resources do not care" in_sync r0
meet end-one
type_ "drbdctl down all"
nothing_left r0 $PORT 0
nothing_left r2 $((PORT + 2)) 2
check "no ublk device" no_ublk_left
finish
