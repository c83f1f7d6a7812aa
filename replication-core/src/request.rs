//! Requests of the host.
//!
//! A write goes to the local disk and to the peer at once, after its extents are in the durable
//! activity log (AL-2), and is reported to the host when the protocol's condition holds (ACK-A,
//! ACK-B, ACK-C). The decision whether a write is mirrored is taken once, when it starts (BM-6);
//! what is not mirrored is marked out of sync before (ACK-1). A request is answered exactly once
//! (ACK-3), and not before nothing uses its memory any more (ORD-6).
//!
//! A read is served locally if the blocks are known to be good here (RD-2), else by the peer
//! (RD-3), else it fails.

mod finish;

use crate::action::{Action, DiskOp};
use crate::activity_log::Acquire;
use crate::connect::{Hold, Then};
use crate::event::{HostOp, HostRequest, HostTag, VolumeIx};
use crate::limits;
use crate::mutant::Mutant;
use crate::resource::{Op, Resource};
use crate::slab::Key;
use crate::state::{Conn, Disk, OnNoData, Role};
use crate::units::{Buf, Errno, Sector, SectorRange, Time};
use crate::wire::{
    BlockId, BlockRequest, DataHeader, Desc, DpFlags, Features, Packet, RangeHeader,
    ReplicationProtocol,
};

/// The local part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// Not started, or there is none.
    None,
    /// On its way.
    Busy,
    /// Done.
    Ok,
    /// Failed.
    Failed,
}

/// The peer's part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Net {
    /// Not started, or there is none.
    None,
    /// Sent; the protocol's condition is not fulfilled.
    Pending,
    /// The protocol's condition is fulfilled.
    Ok,
    /// The peer failed, or is lost.
    Failed,
}

/// Why a request is where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It has not started.
    Waiting,
    /// Its parts are under way.
    Running,
    /// It is finished and waits to be answered.
    Held,
    /// The host has its answer; it is still in the transfer log.
    Answered,
}

/// A request of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) volume: VolumeIx,
    tag: HostTag,
    op: HostOp,
    pub(crate) range: SectorRange,
    buf: Buf,
    progress: Progress,
    local: Local,
    net: Net,
    /// The driver may still read its memory for a packet.
    sending: bool,
    /// The driver may be writing the peer's answer into its memory.
    receiving: bool,
    /// It holds references in the activity log.
    pub(crate) in_al: bool,
    /// It is in the transfer log.
    in_transfer_log: bool,
    /// The protocol under which it was sent.
    protocol: ReplicationProtocol,
    /// It was sent to a good copy.
    to_good_copy: bool,
    /// Its epoch; for a flush: the last epoch that it waits for.
    epoch: u32,
    sent_at: Time,
}

impl Request {
    const fn is_write(&self) -> bool {
        match self.op {
            HostOp::Write { .. } | HostOp::Discard | HostOp::WriteZeroes { .. } => true,
            HostOp::Read | HostOp::Flush => false,
        }
    }
}

/// Whether a waiting request could start.
enum Try {
    Started,
    /// It must wait; later requests may start.
    Wait,
    /// It must wait, and later requests that need the activity log behind it (AL-8).
    WaitForLog,
}

impl Resource {
    pub(crate) fn on_host(&mut self, request: HostRequest) {
        let at = request.volume.at();
        let volume = &mut self.volumes[at];
        volume.counters.upper_pending += 1;
        let is_inside = request.range.end <= volume.size.0;
        let is_flush = request.op == HostOp::Flush;
        if volume.state.role != Role::Primary || !is_inside || request.range.is_empty() != is_flush
        {
            self.answer(request.volume, request.tag, Err(Errno::EIO));
            return;
        }
        let largest = match request.op {
            HostOp::Read | HostOp::Write { .. } => limits::MAX_BIO_SIZE,
            HostOp::Flush => 0,
            HostOp::Discard | HostOp::WriteZeroes { .. } => limits::MAX_DISCARD_SIZE,
        };
        if request.range.bytes() > u64::from(largest) {
            self.answer(request.volume, request.tag, Err(Errno::EINVAL));
            return;
        }
        let entry = Request {
            volume: request.volume,
            tag: request.tag,
            op: request.op,
            range: request.range,
            buf: request.buf,
            progress: Progress::Waiting,
            local: Local::None,
            net: Net::None,
            sending: false,
            receiving: false,
            in_al: false,
            in_transfer_log: false,
            protocol: self.config.net.protocol,
            to_good_copy: false,
            epoch: 0,
            sent_at: self.now,
        };
        let key = self.requests.insert(entry).expect("sized for every tag and the transfer log");
        self.volumes[at].waiting.push_back(key);
    }

    fn answer(&mut self, volume: VolumeIx, tag: HostTag, result: Result<(), Errno>) {
        let counters = &mut self.volumes[volume.at()].counters;
        assert!(counters.upper_pending > 0, "every request is answered once");
        counters.upper_pending -= 1;
        self.out.push(Action::Complete { volume, tag, result });
    }

    /// Starts what can start among the waiting requests of a volume, in order.
    pub(crate) fn run_host_waiting(&mut self, at: usize) {
        let mut log_is_short = false;
        let mut index = 0;
        while let Some(key) = self.volumes[at].waiting.get(index).copied() {
            match self.try_start(at, key, log_is_short) {
                Try::Started => {
                    self.volumes[at].waiting.remove(index);
                    self.again = true;
                }
                Try::Wait => index += 1,
                Try::WaitForLog => {
                    log_is_short = true;
                    index += 1;
                }
            }
        }
    }

    fn try_start(&mut self, at: usize, key: Key, log_is_short: bool) -> Try {
        let request = *self.requests.get(key).expect("a waiting request is in the table");
        match request.op {
            HostOp::Read => self.try_read(at, key, &request),
            HostOp::Flush => self.try_flush(at, key),
            HostOp::Write { .. } | HostOp::Discard | HostOp::WriteZeroes { .. } => {
                self.try_write(at, key, &request, log_is_short)
            }
        }
    }

    /// Whether nothing of the host may start now.
    fn is_frozen(&self, at: usize) -> bool {
        let state = &self.volumes[at].state;
        self.volumes[at].is_paused
            || state.is_suspended()
            || matches!(state.disk, Disk::Attaching | Disk::Negotiating)
    }

    fn has_good_copy(&self, at: usize) -> bool {
        let state = &self.volumes[at].state;
        let is_peer_good = state.pdsk == Disk::UpToDate && state.conn >= Conn::Connected;
        state.disk == Disk::UpToDate || is_peer_good
    }

    fn try_read(&mut self, at: usize, key: Key, request: &Request) -> Try {
        if self.is_frozen(at) {
            return Try::Wait;
        }
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let range = request.range;
        let tried_here = request.local == Local::Failed;
        let is_good = state.disk == Disk::UpToDate;
        // Marks are complete once the bitmaps are merged; a write under way may have cleared one.
        let marks_hold =
            matches!(state.conn, Conn::Connected | Conn::SyncTarget | Conn::PausedSyncT)
                && volume.host_writes.first_overlap(range).is_none();
        let reads_marked = self.mutant.is_on(Mutant::ReadMarkedBlocks);
        let local = !tried_here
            && volume.usable_disk().is_some_and(|disk| {
                // RD-2: on an Inconsistent disk only blocks that are not marked are good.
                let is_marked = disk.bitmap.is_any_set(range.blocks_outward());
                let partly = state.disk == Disk::Inconsistent
                    && state.pdsk == Disk::UpToDate
                    && marks_hold
                    && (!is_marked || reads_marked);
                is_good || partly
            });
        if local {
            if self.mutant.is_on(Mutant::LogReads) {
                match self.acquire_log(at, key, false) {
                    Try::Started => {}
                    wait @ (Try::Wait | Try::WaitForLog) => return wait,
                }
            }
            self.start_local(key, DiskOp::Read);
            return Try::Started;
        }
        let is_peer_good = state.pdsk == Disk::UpToDate && state.conn >= Conn::Connected;
        if !is_peer_good {
            if self.config.on_no_data == OnNoData::SuspendIo && !is_good {
                return Try::Wait;
            }
            self.finish_with(key, Err(Errno::EIO));
            return Try::Started;
        }
        self.read_from_peer(at, key, range);
        Try::Started
    }

    fn read_from_peer(&mut self, at: usize, key: Key, range: SectorRange) {
        let now = self.now;
        let request = self.requests.get_mut(key).expect("it is being started");
        request.progress = Progress::Running;
        request.net = Net::Pending;
        request.receiving = false;
        request.sent_at = now;
        let size = u32::try_from(range.bytes()).expect("bounded by the frontend's largest request");
        let block = BlockRequest { sector: Sector(range.start), block_id: BlockId(key.0), size };
        self.unanswered.push_back(key);
        let nr = self.volumes[at].config.nr;
        self.send_data(nr, Packet::DataRequest(block), None, None);
    }

    fn start_local(&mut self, key: Key, op: DiskOp) {
        let request = self.requests.get_mut(key).expect("it is being started");
        request.progress = Progress::Running;
        request.local = Local::Busy;
        let (volume, range) = (request.volume, request.range);
        let buf = matches!(op, DiskOp::Read | DiskOp::Write { .. }).then_some(request.buf);
        let counters = &mut self.volumes[volume.at()].counters;
        counters.lower_pending += 1;
        match op {
            DiskOp::Read => counters.read_sectors += range.sectors(),
            DiskOp::Write { .. } => counters.written_sectors += range.sectors(),
            DiskOp::Flush | DiskOp::Discard | DiskOp::Zeroes { .. } => {}
        }
        let id = self.new_op(Op::Host(key));
        self.out.push(Action::Disk { id, volume, op, range, buf });
    }

    fn try_flush(&mut self, at: usize, key: Key) -> Try {
        if self.is_frozen(at) || self.volumes[at].gate > 0 {
            return Try::Wait;
        }
        if !self.has_good_copy(at) {
            return self.without_data(key);
        }
        self.close_epoch();
        let is_good_here = self.volumes[at].state.disk == Disk::UpToDate;
        let waits = self.config.net.flush_waits_for_peer() || !is_good_here;
        let last = self.transfer_log.current().wrapping_sub(1);
        let request = self.requests.get_mut(key).expect("it is being started");
        request.progress = Progress::Running;
        if waits && self.transfer_log.holds_up_to(last) {
            request.net = Net::Pending;
            request.epoch = last;
            self.flushes.push(key);
        }
        if self.volumes[at].has_usable_disk() {
            self.start_local(key, DiskOp::Flush);
        } else {
            self.try_finish(key);
        }
        Try::Started
    }

    /// No good copy is left: an error, or wait for one (ACK-2).
    fn without_data(&mut self, key: Key) -> Try {
        if self.config.on_no_data == OnNoData::SuspendIo {
            return Try::Wait;
        }
        self.finish_with(key, Err(Errno::EIO));
        Try::Started
    }

    fn try_write(&mut self, at: usize, key: Key, request: &Request, log_is_short: bool) -> Try {
        let volume = &self.volumes[at];
        let conn = volume.state.conn;
        let bitmap_moves = matches!(conn, Conn::WFBitMapT | Conn::WFSyncUUID) || volume.bitmap_out;
        if self.is_frozen(at) || bitmap_moves || volume.gate > 0 || self.transfer_log.is_full() {
            return Try::Wait;
        }
        if !self.has_good_copy(at) {
            return self.without_data(key);
        }
        let range = request.range;
        let volume = &mut self.volumes[at];
        if volume.host_writes.first_overlap(range).is_some()
            || volume.peer_ops.first_overlap(range).is_some()
        {
            return Try::Wait;
        }
        if !self.may_mirror(at, request) {
            self.finish_with(key, Err(Errno::EOPNOTSUPP));
            return Try::Started;
        }
        match self.acquire_log(at, key, log_is_short) {
            Try::Started => {}
            wait @ (Try::Wait | Try::WaitForLog) => return wait,
        }
        self.start_write(at, key);
        Try::Started
    }

    /// Whether the peer knows this kind of write.
    fn may_mirror(&self, at: usize, request: &Request) -> bool {
        if !self.volumes[at].mirrors() {
            return true;
        }
        let agreed = self.link.agreed();
        let largest = if agreed.features.contains(Features::WSAME) {
            limits::MAX_DISCARD_SIZE
        } else {
            limits::MAX_DISCARD_SIZE_OLD
        };
        let bytes = request.range.bytes();
        match request.op {
            HostOp::Read | HostOp::Flush => true,
            HostOp::Write { .. } => bytes <= u64::from(agreed.max_payload()),
            HostOp::Discard => {
                agreed.features.contains(Features::TRIM) && bytes <= u64::from(largest)
            }
            HostOp::WriteZeroes { .. } => {
                agreed.features.contains(Features::WZEROES) && bytes <= u64::from(largest)
            }
        }
    }

    /// Sees to it that the extents of a write are in the durable activity log (AL-2).
    fn acquire_log(&mut self, at: usize, key: Key, log_is_short: bool) -> Try {
        let request = *self.requests.get(key).expect("it is waiting");
        let volume = &mut self.volumes[at];
        // The option takes effect with an attach, when the superblock says so (AL-9).
        let Some(disk) = volume.usable_disk().filter(|disk| !disk.log_disabled) else {
            return Try::Started;
        };
        let (first, last) = request.range.al_extents();
        if request.in_al {
            let is_hot = disk.log.is_hot(first, last);
            return if is_hot { Try::Started } else { Try::Wait };
        }
        if log_is_short && !disk.log.is_hot(first, last) {
            return Try::Wait;
        }
        let result = disk.log.acquire(first, last);
        if result != Acquire::Busy {
            self.requests.get_mut(key).expect("it is waiting").in_al = true;
        }
        match result {
            Acquire::Hot => Try::Started,
            Acquire::Pending if self.mutant.is_on(Mutant::SkipActivityLogWait) => Try::Started,
            Acquire::Pending => {
                self.again = true;
                Try::Wait
            }
            Acquire::Busy => Try::WaitForLog,
        }
    }

    fn start_write(&mut self, at: usize, key: Key) {
        let request = *self.requests.get(key).expect("it is being started");
        let range = request.range;
        let mirrored = self.volumes[at].mirrors();
        let volume = &mut self.volumes[at];
        volume.host_writes.insert(range, key);
        if !mirrored {
            let announces = volume.announces();
            let slips = announces && self.mutant.is_on(Mutant::SlipThrough);
            let newly = if slips { 0 } else { volume.set_out_of_sync(range) };
            if announces && newly > 0 && !self.mutant.is_on(Mutant::SkipNotices) {
                let size = u32::try_from(range.bytes()).expect("a request fits");
                let nr = volume.config.nr;
                let desc = Desc { sector: Sector(range.start), size };
                self.send_data(nr, Packet::OutOfSync(desc), None, None);
            }
        }
        let request = self.requests.get_mut(key).expect("it is being started");
        request.progress = Progress::Running;
        let op = match request.op {
            HostOp::Write { fua } => {
                DiskOp::Write { fua: fua && !self.mutant.is_on(Mutant::DropFua) }
            }
            // What a discarded range reads as must be the same on both nodes (ORD-8).
            HostOp::Discard => DiskOp::Zeroes { unmap: true },
            HostOp::WriteZeroes { unmap } => DiskOp::Zeroes { unmap },
            HostOp::Read | HostOp::Flush => unreachable!("only writes start here"),
        };
        if mirrored {
            self.mirror(at, key);
        }
        if self.volumes[at].has_usable_disk() {
            self.start_local(key, op);
        } else {
            self.try_finish(key);
        }
    }

    /// Sends a write to the peer.
    fn mirror(&mut self, at: usize, key: Key) {
        let now = self.now;
        // ACK-2: without a good copy here, what the peer has on its disk is all there is.
        let is_good_here = self.volumes[at].state.disk == Disk::UpToDate;
        let protocol = if is_good_here { self.config.net.protocol } else { ReplicationProtocol::C };
        let epoch = self.transfer_log.add(key);
        self.unanswered.push_back(key);
        let version = self.link.agreed().version;
        let volume = &mut self.volumes[at];
        let seq = volume.next_seq();
        let is_syncing = volume.is_syncing();
        let to_good_copy = volume.state.pdsk == Disk::UpToDate;
        volume.counters.sent_sectors += {
            let request = self.requests.get(key).expect("it is being started");
            if matches!(request.op, HostOp::Write { .. }) { request.range.sectors() } else { 0 }
        };
        let nr = volume.config.nr;
        let request = self.requests.get_mut(key).expect("it is being started");
        request.in_transfer_log = true;
        request.protocol = protocol;
        request.to_good_copy = to_good_copy;
        request.epoch = epoch;
        request.net = Net::Pending;
        request.sending = true;
        request.sent_at = now;
        let flags = flags_of(request.op, protocol, is_syncing).for_version(version);
        let size = u32::try_from(request.range.bytes()).expect("a request fits");
        let sector = Sector(request.range.start);
        let block_id = BlockId(key.0);
        let range = RangeHeader { sector, block_id, seq, flags, size };
        let (packet, payload) = match request.op {
            HostOp::Write { .. } => {
                let digest = crate::wire::Digest::new();
                let header = DataHeader { sector, block_id, seq, flags, digest, len: size };
                (Packet::Data(header), Some(request.buf))
            }
            HostOp::Discard => (Packet::Trim(range), None),
            HostOp::WriteZeroes { .. } => (Packet::Zeroes(range), None),
            HostOp::Read | HostOp::Flush => unreachable!("only writes are mirrored"),
        };
        self.send_data(nr, packet, payload, Some(Hold::Request(key)));
        // An old peer acknowledges by its own protocol; its word on the epoch has to do.
        let is_deaf = version < 100 && protocol != self.config.net.protocol;
        if self.transfer_log.is_epoch_full() || is_deaf {
            self.close_epoch();
        }
    }

    /// Closes the current epoch, if it holds a write, and sends its barrier.
    pub(crate) fn close_epoch(&mut self) {
        if let Some(epoch) = self.transfer_log.close(self.now) {
            let barrier = crate::wire::BarrierToken(epoch);
            self.send_data(crate::units::VolumeNr(0), Packet::Barrier { barrier }, None, None);
        }
    }

    /// Whether host writes of a volume are waiting, running or held.
    pub(crate) fn is_host_idle(&self, at: usize) -> bool {
        self.volumes[at].counters.upper_pending == 0
    }

    /// When the oldest request to the peer is too old (WP-6).
    pub(crate) fn request_deadline(&self) -> Option<Time> {
        let net = &self.config.net;
        if net.ko_count == 0 || !self.link.is_established() {
            return None;
        }
        let limit = net.timeout.times(u64::from(net.ko_count));
        let oldest = self.unanswered.front().and_then(|key| self.requests.get(*key));
        let oldest =
            oldest.filter(|request| request.net == Net::Pending).map(|request| request.sent_at);
        let since = [oldest, self.transfer_log.oldest_barrier()].into_iter().flatten().min()?;
        Some(since.max(self.link.established_at) + limit)
    }

    pub(crate) fn request_timers(&mut self) {
        while let Some(key) = self.unanswered.front() {
            let request = self.requests.get(*key);
            if request.is_some_and(|r| r.net == Net::Pending && r.op != HostOp::Flush) {
                break;
            }
            self.unanswered.pop_front();
        }
        if self.request_deadline().is_some_and(|until| until <= self.now) {
            let net = &self.config.net;
            let text = format!(
                "Remote failed to finish a request within {}ms > ko-count ({}) * timeout ({} * \
                 0.1s)",
                net.timeout.as_ms() * u64::from(net.ko_count),
                net.ko_count,
                net.timeout.as_ms() / 100
            );
            self.lose_link(Conn::Timeout, Then::Reconnect, &text);
        }
    }

    /// Requests of a volume that wait for the peer.
    pub(crate) fn pending_of(&self, ix: VolumeIx) -> u64 {
        let of = self.requests.iter().filter(|(_, r)| r.volume == ix && r.net == Net::Pending);
        of.count() as u64
    }
}

/// What an acknowledgement says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AckKind {
    /// The peer has the data in memory.
    Received,
    /// The peer has written the data; with `in_sync` the blocks are known to be equal.
    Written {
        /// Clear the bits.
        in_sync: bool,
    },
    /// The peer could not write.
    Failed,
}

fn flags_of(op: HostOp, protocol: ReplicationProtocol, is_syncing: bool) -> DpFlags {
    let mut flags = DpFlags::RW_SYNC;
    let ack = match protocol {
        ReplicationProtocol::A => DpFlags::NONE,
        ReplicationProtocol::B => DpFlags::SEND_RECEIVE_ACK,
        ReplicationProtocol::C => DpFlags::SEND_WRITE_ACK,
    };
    flags = flags | ack;
    if is_syncing {
        flags = flags | DpFlags::MAY_SET_IN_SYNC | DpFlags::SEND_WRITE_ACK;
    }
    match op {
        HostOp::Write { fua: true } => flags | DpFlags::FUA,
        HostOp::Discard => flags | DpFlags::DISCARD,
        HostOp::WriteZeroes { unmap: true } => flags | DpFlags::ZEROES | DpFlags::DISCARD,
        HostOp::WriteZeroes { unmap: false } => flags | DpFlags::ZEROES,
        HostOp::Write { fua: false } | HostOp::Read | HostOp::Flush => flags,
    }
}
