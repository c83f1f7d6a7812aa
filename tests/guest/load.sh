# Load that goes on while something happens to a node, and what a node finds that comes back.
# Sourced after lib.sh by the guest tests that need it.
# shellcheck shell=bash

# The link counts as dead when a ping that follows ping-int of silence is not answered within
# ping-timeout; a request may wait that long, and timeout bounds what was already under way.
readonly QUICK="timeout 20; ping-int 3; ping-timeout 10; connect-int 3;"
readonly STALL_MS=$(((2 + 3 + 1) * 1000))
# What emulation adds: a node needs a while to run what has become due.
readonly SLACK_MS=3000

# start_load RES FILE MEGABYTES: random writes in the background until stop_load.
start_load() {
	local before
	before=$(written "$1")
	fio --name=load --filename="$2" --size="$3M" --rw=randwrite --bs=4k --iodepth=8 --direct=1 \
		--ioengine=io_uring --time_based --runtime=120 --output-format=json --output=/tmp/fio.json 2>/tmp/fio.err &
	LOAD=$!
	wait_until 20 wrote_more_than "$1" $((before + 1024)) && return
	cat /tmp/fio.err /tmp/fio.json
	die "the load does not run"
}

# stop_load: no write failed, none waited longer than QUICK allows.
stop_load() {
	local stall errors
	kill -INT "$LOAD"
	wait "$LOAD"
	stall=$(fio_report /tmp/fio.json '[.jobs[0].write | .clat_ns.max, .lat_ns.max] | max / 1000000 | floor')
	errors=$(fio_report /tmp/fio.json '.jobs[0].error')
	note "longest write $stall ms, allowed $STALL_MS ms (and $SLACK_MS ms for emulation)"
	check "no write failed" same "$errors" 0
	check "no write waited longer than configured" between 0 "$stall" $((STALL_MS + SLACK_MS))
}

# start_verified NAME FILE MEGABYTES [OPTION...]: random writes that are read back and compared, in the
# background until stop_verified; the pid is in LOAD.
start_verified() {
	local name=$1 file=$2 size=$3
	shift 3
	fio --name="$name" --filename="$file" --size="${size}M" --rw=randwrite --bs=4k --iodepth=4 --direct=1 \
		--ioengine=io_uring --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime=3600 \
		--output-format=json --output="/tmp/$name.json" "$@" 2>"/tmp/$name.err" &
	LOAD=$!
}

# stop_verified NAME PID BLOCKS: it has gone on until now, and at least that many blocks were right.
stop_verified() {
	local report=/tmp/$1.json
	check "$1: the load has gone on" kill -INT "$2"
	wait "$2"
	check "$1: no write failed, nothing read back wrong" same "$(fio_report "$report" '.jobs[0].error')" 0
	check "$1: much was read back" between "$3" "$(fio_report "$report" '.jobs[0].read.total_ios')" 1000000000
	note "$1: longest write $(fio_report "$report" '[.jobs[0].write | .clat_ns.max, .lat_ns.max] | max / 1000000 | floor') ms"
}

# Both in KiB: what the host wrote through the device, what a resync brought to this node.
written() { field "$1" '.devices[0].written'; }
wrote_more_than() {
	local now
	now=$(written "$1")
	# An engine that does not answer has written nothing yet.
	[ -n "$now" ] && [ "$now" -gt "$2" ]
}
received() { peer_device "$1" received; }

# Files whose fsync has returned are reported to the other node, a line each, until that ends.
readonly RECORD=/tmp/record RECORD_PORT=9000
record_files() {
	socat -u "TCP-LISTEN:$RECORD_PORT,reuseaddr" "OPEN:$RECORD,creat,append" &
	must "the recorder listens" wait_until 10 recorder_listens
}
recorder_listens() { ! port_is_free $RECORD_PORT; }
write_files() {
	local i=0 sum
	exec 5<>"/dev/tcp/10.0.0.$VM_PEER/$RECORD_PORT"
	while :; do
		i=$((i + 1))
		head -c $((RANDOM + 1)) /dev/urandom >"/mnt/file.$i"
		sync "/mnt/file.$i" /mnt || return 1
		sum=$(md5sum <"/mnt/file.$i")
		echo "file.$i ${sum%% *}" >&5
	done
}
readonly WHOLE_LINE='^file\.[0-9]+ [0-9a-f]{32}$'
recorded() { grep -cE "$WHOLE_LINE" "$RECORD" 2>/dev/null; }
recorded_at_least() { [ -e "$RECORD" ] && [ "$(recorded)" -ge "$1" ]; }
all_files_there() {
	grep -E "$WHOLE_LINE" "$RECORD" | awk '{ print $2 "  /mnt/" $1 }' | md5sum --quiet -c -
}

# back_again RES N: what a node does that has lost power; its N-th disk must need little.
back_again() {
	local synced total
	type_ "drbdctl up $1"
	must "it finds the other one" wait_until 30 is Connected connection "$1"
	check "it is Secondary" is Secondary role_of "$1"
	type_ "drbdctl wait-sync $1"
	must "UpToDate on both sides" wait_until 60 in_sync "$1"
	type_ "drbdctl status $1"
	synced=$(will_sync "$1")
	total=$(($(size_of "$2") / 1024))
	note "resynced $synced KiB of $total KiB"
	check "activity log and bitmap limited the resync" between 1 "$synced" $((total / 2))
	check "nothing is left out of sync" is 0 out_of_sync "$1"
}
