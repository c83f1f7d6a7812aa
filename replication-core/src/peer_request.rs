//! Requests on behalf of the peer: mirrored writes, reads, and both ends of resync.
//!
//! Operations that touch the same sectors are ordered by their arrival (ORD-5, RS-2): each one
//! waits for all earlier overlapping ones. A mirrored write also waits for its epoch (ORD-2) and
//! for metadata that must be durable first. A request of resync keeps its range from the moment
//! the target asks until the block is written, so that no host write of this node slips in
//! between; mirrored writes of the peer pass it, because the peer answers after them in the same
//! stream.
//!
//! Source: protocol notes, sections 10, 12.6, 12.7 and 16.

use crate::action::{Action, DiskOp};
use crate::activity_log::Acquire;
use crate::connect::{Hold, Then};
use crate::epoch::{EpochId, VolumeSet};
use crate::event::VolumeIx;
use crate::limits;
use crate::mutant::Mutant;
use crate::resource::{Op, Resource};
use crate::slab::Key;
use crate::state::{Conn, Disk, Role};
use crate::units::{Buf, Errno, SECTORS_PER_BLOCK, Sector, SectorRange, Span, Time, VolumeNr};
use crate::volume::{Stage, Volume};
use crate::wire::{BlockAck, BlockId, BlockRequest, DataHeader, DpFlags, Features, Packet};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A mirrored write.
    Write {
        /// What to do with the disk.
        op: DiskOp,
        /// The packet's flags.
        flags: DpFlags,
        /// Its epoch.
        epoch: EpochId,
    },
    /// A read for the host of the peer.
    Read,
    /// This node is the source: read a block and send it.
    SourceRead,
    /// This node is the target and has asked for the range.
    TargetAsked,
    /// The block has come; write it.
    TargetWrite,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It waits to be started.
    Waiting,
    /// Before a write: the flush that its sender asked for.
    Flushing,
    /// On the disk.
    Running,
    /// Without a disk operation: waiting for the peer's answer.
    Asked,
}

/// A request on behalf of the peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerRequest {
    pub(crate) volume: VolumeIx,
    pub(crate) kind: Kind,
    pub(crate) range: SectorRange,
    buf: Option<Buf>,
    block_id: BlockId,
    step: Step,
    /// Order of arrival.
    arrival: u64,
    since: Time,
    /// It holds references in the activity log.
    pub(crate) in_al: bool,
    /// Its connection is lost: no answer is sent.
    orphan: bool,
}

/// How long a resync read gives way to the host.
const GIVE_WAY: Span = Span::from_ms(100);

/// A packet that the peer should not have sent.
pub(crate) type Wrong = String;

impl Resource {
    fn next_arrival(&mut self) -> u64 {
        self.arrivals += 1;
        self.arrivals
    }

    fn new_peer_request(&mut self, at: usize, kind: Kind, range: SectorRange) -> PeerRequest {
        PeerRequest {
            volume: self.volumes[at].ix,
            kind,
            range,
            buf: None,
            block_id: BlockId::SYNCER,
            step: Step::Waiting,
            arrival: self.next_arrival(),
            since: self.now,
            in_al: false,
            orphan: false,
        }
    }

    fn enter_peer_request(&mut self, request: PeerRequest) -> Key {
        let at = request.volume.at();
        let range = request.range;
        let waits = request.step == Step::Waiting;
        let key = self.peer_requests.insert(request).expect("may_receive keeps room");
        let volume = &mut self.volumes[at];
        volume.counters.unacked += 1;
        volume.peer_ops.insert(range, key);
        if waits {
            volume.peer_waiting.push_back(key);
            self.again = true;
        }
        key
    }

    /// The range of a packet, checked against the device (WP-4).
    pub(crate) fn checked_range(
        &self,
        at: usize,
        sector: Sector,
        bytes: u32,
    ) -> Result<SectorRange, Wrong> {
        let size = self.volumes[at].size;
        match SectorRange::from_bytes(sector, u64::from(bytes)) {
            Some(range) if !range.is_empty() && range.end <= size.0 => Ok(range),
            Some(range) if self.mutant.is_on(Mutant::TrustOffsets) => Ok(range),
            Some(_) | None => {
                Err(format!("{bytes} bytes at sector {} on a device of {size}", sector.0))
            }
        }
    }

    /// A mirrored write, or a discard or write-zeroes.
    pub(crate) fn on_peer_write(
        &mut self,
        at: usize,
        packet: &Packet,
        payload: &mut Option<Buf>,
    ) -> Result<(), Wrong> {
        let (sector, block_id, flags, bytes) = match packet {
            Packet::Data(h) => (h.sector, h.block_id, h.flags, h.len),
            Packet::Trim(h) | Packet::Zeroes(h) => (h.sector, h.block_id, h.flags, h.size),
            other => unreachable!("{} is no write", other.name()),
        };
        let flags = self.acks_for_old_versions(flags);
        let range = self.checked_range(at, sector, bytes)?;
        if self.volumes[at].state.role == Role::Primary {
            return Err(String::from("a mirrored write, but this node is Primary"));
        }
        let has_wzeroes = self.link.agreed().features.contains(Features::WZEROES);
        let op = match packet {
            Packet::Data(_) => DiskOp::Write { fua: flags.contains(DpFlags::FUA) },
            Packet::Trim(_) => DiskOp::Zeroes { unmap: has_wzeroes },
            _ => DiskOp::Zeroes { unmap: flags.contains(DpFlags::DISCARD) },
        };
        self.volumes[at].counters.received_sectors += range.sectors();
        if flags.contains(DpFlags::SEND_RECEIVE_ACK) {
            self.send_ack(at, Packet::RecvAck, range, block_id);
        }
        if !self.volumes[at].has_usable_disk() {
            // The data is lost here, and its sender must know (BM-5).
            self.send_ack(at, Packet::NegAck, range, block_id);
            self.epochs.add_refused();
            self.again = true;
            return Ok(());
        }
        let epoch = self.epochs.add(self.volumes[at].ix);
        let mut request = self.new_peer_request(at, Kind::Write { op, flags, epoch }, range);
        request.buf = payload.take();
        request.block_id = block_id;
        if self.volumes[at].state.pdsk < Disk::Inconsistent {
            // This node holds the only copy: it keeps the marks itself (10.5).
            self.serve_bare_primary(at);
            self.volumes[at].set_out_of_sync(range);
        }
        self.enter_peer_request(request);
        Ok(())
    }

    /// Before version 100 the configured protocol says which acknowledgements are wanted.
    fn acks_for_old_versions(&self, flags: DpFlags) -> DpFlags {
        use crate::wire::ReplicationProtocol;
        if self.link.agreed().version >= 100 {
            return flags;
        }
        match self.config.net.protocol {
            ReplicationProtocol::A => flags,
            ReplicationProtocol::B => flags | DpFlags::SEND_RECEIVE_ACK,
            ReplicationProtocol::C => flags | DpFlags::SEND_WRITE_ACK,
        }
    }

    /// Sends an acknowledgement, if the volume's state allows one.
    fn send_ack(
        &mut self,
        at: usize,
        packet: impl FnOnce(BlockAck) -> Packet,
        range: SectorRange,
        block_id: BlockId,
    ) {
        let volume = &mut self.volumes[at];
        if volume.state.conn < Conn::Connected {
            return;
        }
        let seq = volume.next_seq();
        let size = u32::try_from(range.bytes()).expect("ranges of packets fit");
        let ack = BlockAck { sector: Sector(range.start), block_id, size, seq };
        let nr = volume.config.nr;
        self.send_meta(nr, packet(ack));
    }

    /// The peer's host wants to read.
    pub(crate) fn on_data_request(&mut self, at: usize, block: &BlockRequest) -> Result<(), Wrong> {
        let range = self.checked_range(at, block.sector, block.size)?;
        if self.volumes[at].state.disk != Disk::UpToDate || !self.volumes[at].has_usable_disk() {
            self.send_ack(at, Packet::NegDReply, range, block.block_id);
            return Ok(());
        }
        let mut request = self.new_peer_request(at, Kind::Read, range);
        request.block_id = block.block_id;
        self.enter_peer_request(request);
        Ok(())
    }

    /// The target of a resync wants a block.
    pub(crate) fn on_resync_request(
        &mut self,
        at: usize,
        block: &BlockRequest,
    ) -> Result<(), Wrong> {
        let range = self.checked_range(at, block.sector, block.size)?;
        if block.size > limits::MAX_BIO_SIZE || range.start % SECTORS_PER_BLOCK != 0 {
            return Err(format!("a resync request for {range}"));
        }
        if self.volumes[at].state.conn == Conn::Ahead {
            self.send_ack(at, Packet::RsCancel, range, BlockId::SYNCER);
            return Ok(());
        }
        if self.volumes[at].state.disk != Disk::UpToDate || !self.volumes[at].has_usable_disk() {
            self.send_ack(at, Packet::NegRsDReply, range, BlockId::SYNCER);
            return Ok(());
        }
        let request = self.new_peer_request(at, Kind::SourceRead, range);
        self.enter_peer_request(request);
        Ok(())
    }

    /// Remembers that this node asked for a range.
    pub(crate) fn enter_target_request(&mut self, at: usize, range: SectorRange) {
        let mut request = self.new_peer_request(at, Kind::TargetAsked, range);
        request.step = Step::Asked;
        self.enter_peer_request(request);
    }

    /// Whether this node may ask for another range.
    pub(crate) fn may_ask(&self) -> bool {
        self.peer_requests.len() + 64 < self.peer_requests.capacity() as usize
            && self.ops.len() + 256 < self.ops.capacity() as usize
    }

    fn find_asked(&self, at: usize, range: SectorRange) -> Option<Key> {
        let of_range = self.volumes[at].peer_ops.overlaps(range).filter(|(r, _)| *r == range);
        of_range.map(|(_, key)| key).find(|key| {
            let request = self.peer_requests.get(*key);
            request.is_some_and(|r| r.kind == Kind::TargetAsked && !r.orphan)
        })
    }

    /// A block that this node asked for.
    pub(crate) fn on_resync_data(
        &mut self,
        at: usize,
        header: &DataHeader,
        payload: &mut Option<Buf>,
    ) -> Result<(), Wrong> {
        let range = self.checked_range(at, header.sector, header.len)?;
        let Some(key) = self.find_asked(at, range) else {
            return Err(format!("resync data for {range}, which was not asked for"));
        };
        let arrival = self.next_arrival();
        let request = self.peer_requests.get_mut(key).expect("it was just found");
        request.kind = Kind::TargetWrite;
        request.step = Step::Waiting;
        request.arrival = arrival;
        request.buf = payload.take();
        self.volumes[at].counters.received_sectors += range.sectors();
        self.volumes[at].peer_waiting.push_back(key);
        if let Some(resync) = self.volumes[at].resync.as_mut() {
            resync.received(range.sectors());
        }
        self.again = true;
        Ok(())
    }

    /// The source could not, or would not, send a block.
    pub(crate) fn on_resync_refused(
        &mut self,
        at: usize,
        ack: &BlockAck,
        failed: bool,
    ) -> Result<(), Wrong> {
        let range = self.checked_range(at, ack.sector, ack.size)?;
        let Some(key) = self.find_asked(at, range) else {
            let state = self.volumes[at].state;
            if matches!(state.conn, Conn::SyncTarget | Conn::PausedSyncT) {
                // What was asked for instead would be waited for without end.
                return Err(format!("no resync data for {range}, which was not asked for"));
            }
            return Ok(()); // Of a resync that ended meanwhile.
        };
        if let Some(resync) = self.volumes[at].resync.as_mut() {
            resync.received(range.sectors());
        }
        if failed && self.mutant.is_on(Mutant::ClearFailedBlocks) {
            self.volumes[at].set_in_sync(range);
        } else if failed {
            self.resync_failed(at, range);
        }
        self.remove_peer_request(key);
        Ok(())
    }

    /// Starts what can start among the waiting requests of a volume.
    pub(crate) fn run_peer_waiting(&mut self, at: usize) {
        let mut index = 0;
        while let Some(key) = self.volumes[at].peer_waiting.get(index).copied() {
            if self.try_peer(at, key) {
                self.volumes[at].peer_waiting.remove(index);
                self.again = true;
            } else {
                index += 1;
            }
        }
    }

    fn try_peer(&mut self, at: usize, key: Key) -> bool {
        let request = *self.peer_requests.get(key).expect("a waiting request is in the table");
        if !self.volumes[at].has_usable_disk() {
            self.fail_peer_request(key);
            return true;
        }
        if self.must_wait(at, &request) || self.gives_way(at, &request) {
            return false;
        }
        match request.kind {
            Kind::Write { op, flags, .. } => {
                if !self.acquire_for_peer(at, key) {
                    return false;
                }
                if flags.contains(DpFlags::FLUSH) {
                    self.start_peer(key, Step::Flushing, DiskOp::Flush);
                } else {
                    self.start_peer(key, Step::Running, op);
                }
                true
            }
            Kind::TargetWrite => {
                self.start_peer(key, Step::Running, DiskOp::Write { fua: false });
                true
            }
            Kind::Read | Kind::SourceRead => {
                let bytes = u32::try_from(request.range.bytes()).expect("bounded by the packet");
                let Some(buf) = self.pool.alloc(bytes) else { return false };
                self.peer_requests.get_mut(key).expect("it was just seen").buf = Some(buf);
                self.start_peer(key, Step::Running, DiskOp::Read);
                true
            }
            Kind::TargetAsked => unreachable!("it waits for the peer, not for its turn"),
        }
    }

    /// Whether an earlier operation, the epoch or metadata holds a request back.
    fn must_wait(&self, at: usize, request: &PeerRequest) -> bool {
        let volume = &self.volumes[at];
        let range = request.range;
        let is_write = matches!(request.kind, Kind::Write { .. } | Kind::TargetWrite);
        if is_write && (volume.gate > 0 || volume.is_paused) {
            return true;
        }
        let clears_bits = match request.kind {
            Kind::Write { flags, .. } => flags.contains(DpFlags::MAY_SET_IN_SYNC),
            Kind::TargetWrite => true,
            Kind::Read | Kind::SourceRead | Kind::TargetAsked => false,
        };
        if clears_bits && volume.saves_bitmap() {
            // What it clears would reach the disk before its data (BM-1).
            return true;
        }
        if let Kind::Write { epoch, .. } = request.kind
            && !request.orphan
            && !self.epochs.may_submit(epoch)
            && !self.mutant.is_on(Mutant::IgnoreEpochs)
        {
            return true;
        }
        if self.mutant.is_on(Mutant::IgnoreConflicts) {
            return false;
        }
        if request.kind != Kind::Read && volume.host_writes.first_overlap(range).is_some() {
            return true;
        }
        volume.peer_ops.overlaps(range).any(|(_, key)| {
            let other = self.peer_requests.get(key).expect("the interval's owner is in the table");
            other.arrival < request.arrival && conflicts(request.kind, other.kind)
        })
    }

    /// Whether a resync read gives way to the host for a moment: resync that is faster than
    /// `c-min-rate` leaves the disk to a busy host, unless the target's host waits for it (RS-8).
    fn gives_way(&mut self, at: usize, request: &PeerRequest) -> bool {
        let volume = &mut self.volumes[at];
        let least = u64::from(volume.config.disk.rate.min_rate_kib);
        if request.kind != Kind::SourceRead || least == 0 || volume.state.peer == Role::Primary {
            return false;
        }
        let is_busy = !volume.host_writes.is_empty();
        let rate = volume.resync.as_ref().map_or(0, |resync| resync.rate_kib());
        let until = request.since + GIVE_WAY;
        if !is_busy || rate <= least || until <= self.now {
            return false;
        }
        volume.wake_at = Some(volume.wake_at.map_or(until, |wake| wake.min(until)));
        true
    }

    /// The activity log, when this node holds the only copy of what a peer writes.
    fn acquire_for_peer(&mut self, at: usize, key: Key) -> bool {
        let request = *self.peer_requests.get(key).expect("it is waiting");
        let volume = &mut self.volumes[at];
        let is_only_copy = volume.state.pdsk < Disk::Inconsistent;
        let is_logging = volume.disk.as_ref().is_some_and(|disk| !disk.log_disabled);
        if !is_logging || (!is_only_copy && !request.in_al) {
            return true;
        }
        let disk = volume.disk.as_mut().expect("it is usable");
        let (first, last) = request.range.al_extents();
        if request.in_al {
            return disk.log.is_hot(first, last);
        }
        let result = disk.log.acquire(first, last);
        if result != Acquire::Busy {
            self.peer_requests.get_mut(key).expect("it is waiting").in_al = true;
            self.again = true;
        }
        result == Acquire::Hot
    }

    fn start_peer(&mut self, key: Key, step: Step, op: DiskOp) {
        let request = self.peer_requests.get_mut(key).expect("it is being started");
        request.step = step;
        let volume = request.volume;
        let buf =
            matches!(op, DiskOp::Read | DiskOp::Write { .. }).then_some(request.buf).flatten();
        let range = match op {
            DiskOp::Flush => SectorRange::default(),
            DiskOp::Read | DiskOp::Write { .. } | DiskOp::Discard | DiskOp::Zeroes { .. } => {
                request.range
            }
        };
        let counters = &mut self.volumes[volume.at()].counters;
        counters.lower_pending += 1;
        if matches!(op, DiskOp::Write { .. }) {
            counters.written_sectors += range.sectors();
        }
        let id = self.new_op(Op::Peer(key));
        self.out.push(Action::Disk { id, volume, op, range, buf });
    }

    pub(crate) fn on_peer_done(&mut self, key: Key, result: Result<(), Errno>) {
        let request = *self.peer_requests.get(key).expect("a disk operation keeps its request");
        let at = request.volume.at();
        self.volumes[at].counters.lower_pending -= 1;
        if let Err(errno) = result {
            self.on_peer_error(at, &request, errno);
        }
        match request.kind {
            Kind::Write { op, flags, epoch } => {
                if request.step == Step::Flushing && result.is_ok() {
                    self.start_peer(key, Step::Running, op);
                    return;
                }
                self.finish_peer_write(at, &request, flags, epoch, result.is_ok());
            }
            Kind::Read => self.answer_read(at, key, &request, result.is_ok()),
            Kind::SourceRead => self.answer_resync(at, key, &request, result.is_ok()),
            Kind::TargetWrite => self.finish_target_write(at, &request, result.is_ok()),
            Kind::TargetAsked => unreachable!("nothing was on the disk"),
        }
        self.remove_peer_request(key);
    }

    fn on_peer_error(&mut self, at: usize, request: &PeerRequest, errno: Errno) {
        let range = request.range;
        let what = match request.kind {
            Kind::Read | Kind::SourceRead => "read",
            Kind::Write { .. } | Kind::TargetWrite | Kind::TargetAsked => "write",
        };
        if what == "write" {
            self.volumes[at].set_out_of_sync(range);
        }
        let detach = self.volumes[at].config.disk.on_io_error.detaches();
        if detach || request.step == Step::Flushing {
            let text = format!("Local IO failed in {what} for the peer at {range} ({errno})");
            self.fail_disk(at, &text);
        } else if what == "write" {
            self.distrust_disk(at);
        }
    }

    fn finish_peer_write(
        &mut self,
        at: usize,
        request: &PeerRequest,
        flags: DpFlags,
        epoch: EpochId,
        ok: bool,
    ) {
        let range = request.range;
        if request.orphan {
            return;
        }
        if !ok {
            self.send_ack(at, Packet::NegAck, range, request.block_id);
        } else if flags.contains(DpFlags::MAY_SET_IN_SYNC) && self.volumes[at].is_syncing() {
            self.volumes[at].set_in_sync(range);
            if flags.contains(DpFlags::SEND_WRITE_ACK) {
                self.send_ack(at, Packet::RsWriteAck, range, request.block_id);
            }
        } else if flags.contains(DpFlags::SEND_WRITE_ACK) {
            self.send_ack(at, Packet::WriteAck, range, request.block_id);
        }
        self.epochs.finished(epoch);
    }

    fn answer_read(&mut self, at: usize, key: Key, request: &PeerRequest, ok: bool) {
        if request.orphan {
            return;
        }
        if !ok {
            self.send_ack(at, Packet::NegDReply, request.range, request.block_id);
            return;
        }
        self.send_block(at, key, request, Packet::DataReply);
    }

    fn answer_resync(&mut self, at: usize, key: Key, request: &PeerRequest, ok: bool) {
        if request.orphan {
            return;
        }
        if !ok {
            // RS-5: the bit stays.
            self.resync_failed(at, request.range);
            self.send_ack(at, Packet::NegRsDReply, request.range, BlockId::SYNCER);
            return;
        }
        self.send_block(at, key, request, Packet::RsDataReply);
    }

    fn send_block(
        &mut self,
        at: usize,
        key: Key,
        request: &PeerRequest,
        packet: impl FnOnce(DataHeader) -> Packet,
    ) {
        let len = u32::try_from(request.range.bytes()).expect("bounded by the packet");
        let header = DataHeader {
            sector: Sector(request.range.start),
            block_id: request.block_id,
            len,
            ..DataHeader::default()
        };
        let buf = self.peer_requests.get_mut(key).and_then(|r| r.buf.take());
        let buf = buf.expect("a read has memory");
        if request.kind == Kind::SourceRead && self.mutant.is_on(Mutant::ClearOnSend) {
            self.volumes[at].set_in_sync(request.range);
        }
        let volume = &mut self.volumes[at];
        volume.counters.sent_sectors += request.range.sectors();
        let nr = volume.config.nr;
        self.send_data(nr, packet(header), Some(buf), Some(Hold::Free(buf)));
    }

    fn finish_target_write(&mut self, at: usize, request: &PeerRequest, ok: bool) {
        let range = request.range;
        if !ok {
            self.resync_failed(at, range);
        } else if self.volumes[at].is_syncing() || request.orphan {
            // The block holds the source's data whether or not the source hears of it.
            let is_same_sync = !request.orphan;
            if is_same_sync {
                self.volumes[at].set_in_sync(range);
            }
        }
        if request.orphan {
            return;
        }
        if ok {
            self.send_ack(at, Packet::RsWriteAck, range, BlockId::SYNCER);
        } else {
            self.send_ack(at, Packet::NegAck, range, BlockId::SYNCER);
        }
    }

    /// The disk is gone while a request waited.
    fn fail_peer_request(&mut self, key: Key) {
        let request = *self.peer_requests.get(key).expect("a waiting request is in the table");
        let at = request.volume.at();
        if !request.orphan {
            match request.kind {
                Kind::Write { epoch, .. } => {
                    self.send_ack(at, Packet::NegAck, request.range, request.block_id);
                    self.epochs.finished(epoch);
                }
                Kind::Read => {
                    self.send_ack(at, Packet::NegDReply, request.range, request.block_id);
                }
                Kind::SourceRead => {
                    self.send_ack(at, Packet::NegRsDReply, request.range, BlockId::SYNCER);
                }
                Kind::TargetWrite => {
                    self.send_ack(at, Packet::NegAck, request.range, BlockId::SYNCER);
                }
                Kind::TargetAsked => {}
            }
        }
        self.remove_peer_request(key);
    }

    fn remove_peer_request(&mut self, key: Key) {
        let request = self.peer_requests.remove(key).expect("a request ends once");
        let volume = &mut self.volumes[request.volume.at()];
        volume.counters.unacked -= 1;
        let was_there = volume.peer_ops.remove(request.range, key);
        assert!(was_there, "a request keeps its range until it ends");
        release_log(volume, &request);
        let is_asked = matches!(request.kind, Kind::TargetAsked | Kind::TargetWrite);
        if is_asked
            && !request.orphan
            && let Some(resync) = volume.resync.as_mut()
        {
            resync.ended(request.range.sectors());
        }
        if let Some(buf) = request.buf {
            self.free_buf(buf);
        }
        self.again = true;
    }

    /// Takes the log references of a request that has not started.
    pub(crate) fn release_peer_log(&mut self, key: Key) {
        let request = self.peer_requests.get_mut(key).expect("it is waiting");
        let before = *request;
        request.in_al = false;
        release_log(&mut self.volumes[before.volume.at()], &before);
        self.again = true;
    }

    /// The connection is lost: what has not started is dropped, what runs goes unanswered.
    pub(crate) fn drop_peer_requests(&mut self) {
        let keys: Vec<Key> = self.peer_requests.keys().collect();
        for key in keys {
            let request = self.peer_requests.get_mut(key).expect("it was just seen");
            request.orphan = !self.mutant.is_on(Mutant::AnswerOldConnection);
            match request.step {
                Step::Flushing | Step::Running => {}
                Step::Waiting | Step::Asked => {
                    let at = request.volume.at();
                    self.volumes[at].peer_waiting.retain(|waiting| *waiting != key);
                    self.remove_peer_request(key);
                }
            }
        }
    }

    /// The flush that makes an epoch durable.
    pub(crate) fn flush_epoch(&mut self, volumes: VolumeSet) {
        let epoch = self.epochs.oldest();
        for volume in volumes.iter() {
            if self.volumes[volume.at()].has_usable_disk() {
                let id = self.new_op(Op::EpochFlush(volume, epoch));
                let range = SectorRange::default();
                self.out.push(Action::Disk { id, volume, op: DiskOp::Flush, range, buf: None });
            } else {
                // What the failed disk had in its cache is in nobody's bitmap: without this
                // connection the peer marks all that was not confirmed as stable (DUR-3).
                let text = "the disk of an unfinished write epoch is gone";
                self.lose_link(Conn::NetworkFailure, Then::Reconnect, text);
                return;
            }
        }
    }

    pub(crate) fn on_epoch_flushed(
        &mut self,
        volume: VolumeIx,
        epoch: EpochId,
        result: Result<(), Errno>,
    ) {
        let is_current = epoch == self.epochs.oldest();
        if let Err(errno) = result {
            self.fail_disk(volume.at(), &format!("Local IO failed in flush ({errno})"));
            // What the peer takes for written may be lost here. Without this connection it marks
            // all that was not confirmed as stable (DUR-4).
            let text = "write epoch could not be made durable";
            if is_current {
                self.lose_link(Conn::NetworkFailure, Then::Reconnect, text);
            }
            return;
        }
        if is_current {
            self.epochs.flushed(epoch);
        }
        self.again = true;
    }

    /// The connection's number of a volume, for packets.
    pub(crate) fn number_of(&self, at: usize) -> VolumeNr {
        self.volumes[at].config.nr
    }
}

fn release_log(volume: &mut Volume, request: &PeerRequest) {
    if request.in_al
        && let Some(disk) = volume.disk.as_mut()
        && disk.stage >= Stage::Attached
    {
        let (first, last) = request.range.al_extents();
        disk.log.release(first, last);
    }
}

/// Whether a later request has to wait for an earlier one on the same sectors.
const fn conflicts(later: Kind, earlier: Kind) -> bool {
    match (later, earlier) {
        // RD-1: a read for the peer's host sees every write that came before it.
        (Kind::Read, Kind::Write { .. } | Kind::TargetWrite) => true,
        (Kind::Read, _) | (_, Kind::Read) => false,
        // The peer answers a request in order with its own writes.
        (_, Kind::TargetAsked) => false,
        (Kind::SourceRead, Kind::SourceRead) => false,
        (
            Kind::Write { .. } | Kind::TargetWrite | Kind::SourceRead | Kind::TargetAsked,
            Kind::Write { .. } | Kind::TargetWrite | Kind::SourceRead,
        ) => true,
    }
}
