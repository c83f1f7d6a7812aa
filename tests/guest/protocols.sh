#!/bin/bash
# Protocols A, B and C, one after the other on the same disks.
# guests: 2
# disks: ram:24M
# kernels: 6.12
# timeout: 115
. ./lib.sh

one_protocol() {
	step "protocol $1"
	PROTOCOL=$1 resource r0 $PORT 0 >"$CONF"
	bring_up r0
	check "a new pair starts in sync" is 0 out_of_sync r0
	write_and_compare "protocol-$1" r0 0
	type_ "drbdctl down r0"
	nothing_left r0 $PORT 0
	meet "end-$1"
}

node_setup </dev/null
one_protocol A
one_protocol B
one_protocol C
check "no ublk device" no_ublk_left
finish
