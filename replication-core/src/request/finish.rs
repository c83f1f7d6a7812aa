//! How requests of the host end: parts that come back, acknowledgements, and the loss of the peer.

use super::{AckKind, Local, Net, Progress, Request};
use crate::connect::Then;
use crate::event::HostOp;
use crate::gi::Uuid;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::slab::Key;
use crate::state::{Conn, Disk, OnNoData, Role};
use crate::units::{Buf, Errno, SectorRange};
use crate::volume::Stage;
use crate::wire::{BlockAck, DataHeader, ReplicationProtocol};

impl Resource {
    /// The packet of a request was accepted by the system, or given up.
    pub(crate) fn on_request_sent(&mut self, key: Key) {
        let Some(request) = self.requests.get_mut(key) else { return };
        request.sending = false;
        let is_a = request.protocol == ReplicationProtocol::A
            || self.mutant.is_on(Mutant::AcknowledgeEarly);
        if is_a && request.net == Net::Pending && request.is_write() {
            request.net = Net::Ok;
        }
        self.try_finish(key);
    }

    pub(crate) fn on_host_local_done(&mut self, key: Key, result: Result<(), Errno>) {
        let request = self.requests.get_mut(key).expect("a disk operation keeps its request");
        let at = request.volume.at();
        let op = request.op;
        let range = request.range;
        let ignores = op == HostOp::Flush && self.mutant.is_on(Mutant::IgnoreFailedFlush);
        let result = if ignores { Ok(()) } else { result };
        request.local = if result.is_ok() { Local::Ok } else { Local::Failed };
        self.volumes[at].counters.lower_pending -= 1;
        if request.local == Local::Failed && request.in_transfer_log && request.is_write() {
            self.rely_on_peer(key);
        }
        if let Err(errno) = result {
            self.on_local_error(at, op, range, errno);
        }
        let is_final = self.mutant.is_on(Mutant::KeepReadError);
        if op == HostOp::Read && result.is_err() && !is_final {
            // RD-3: the peer may have it.
            let request = self.requests.get_mut(key).expect("it was just here");
            request.progress = Progress::Waiting;
            self.volumes[at].waiting.push_back(key);
            return;
        }
        self.try_finish(key);
    }

    /// The local write failed: in protocols A and B, too, the data now has to be on the peer's
    /// disk (ACK-2). The word on its epoch will tell.
    fn rely_on_peer(&mut self, key: Key) {
        let request = self.requests.get_mut(key).expect("a disk operation keeps its request");
        if request.protocol != ReplicationProtocol::C && request.net != Net::Failed {
            request.protocol = ReplicationProtocol::C;
            request.net = Net::Pending;
            self.close_epoch();
        }
    }

    pub(super) fn on_local_error(
        &mut self,
        at: usize,
        op: HostOp,
        range: SectorRange,
        errno: Errno,
    ) {
        let (what, changes) = match op {
            HostOp::Read => ("read", false),
            HostOp::Flush => ("flush", false),
            HostOp::Write { .. } | HostOp::Discard | HostOp::WriteZeroes { .. } => ("write", true),
        };
        // Not what could not be read: a mark there would copy from it, not to it (RD-5).
        if changes {
            self.volumes[at].set_out_of_sync(range);
        }
        let policy = self.volumes[at].config.disk.on_io_error;
        // DUR-4: a failed flush always fails the disk.
        if policy.detaches() || op == HostOp::Flush {
            self.fail_disk(at, &format!("Local IO failed in {what} at {range} ({errno})"));
        } else if op != HostOp::Read {
            self.distrust_disk(at);
        }
    }

    /// The memory for the peer's answer to a read; the driver writes into it from here on.
    pub(crate) fn begin_remote_read(&mut self, header: &DataHeader) -> Option<Buf> {
        let buf = self.remote_read_buffer(header)?;
        let request = self.requests.get_mut(Key(header.block_id.0)).expect("it was just found");
        request.receiving = true;
        Some(buf)
    }

    fn remote_read_buffer(&self, header: &DataHeader) -> Option<Buf> {
        let request = self.requests.get(Key(header.block_id.0))?;
        let is_it = request.op == HostOp::Read
            && request.net == Net::Pending
            && request.range.start == header.sector.0
            && request.range.bytes() == u64::from(header.len);
        is_it.then_some(request.buf)
    }

    /// The peer's answer to a read.
    pub(crate) fn on_data_reply(&mut self, header: &DataHeader, payload: Option<Buf>) -> bool {
        let expected = self.remote_read_buffer(header);
        if expected.is_none() || expected != payload {
            return false;
        }
        let key = Key(header.block_id.0);
        let request = self.requests.get_mut(key).expect("its buffer was just found");
        request.net = Net::Ok;
        let (at, sectors) = (request.volume.at(), request.range.sectors());
        self.volumes[at].counters.received_sectors += sectors;
        self.try_finish(key);
        true
    }

    pub(crate) fn on_neg_data_reply(&mut self, ack: &BlockAck) -> bool {
        let key = Key(ack.block_id.0);
        match self.requests.get_mut(key) {
            // With data on its way this is no answer: the host would have its memory back while
            // it is being written (ORD-6, WP-1).
            Some(request)
                if request.op == HostOp::Read
                    && request.net == Net::Pending
                    && !request.receiving =>
            {
                let is_naive = self.mutant.is_on(Mutant::BelieveFailedRead);
                request.net = if is_naive { Net::Ok } else { Net::Failed };
                self.try_finish(key);
                true
            }
            Some(_) | None => false,
        }
    }

    /// An acknowledgement of a write. False: it fits none.
    pub(crate) fn on_write_ack(&mut self, at: usize, ack: &BlockAck, kind: AckKind) -> bool {
        let key = Key(ack.block_id.0);
        let found = self.requests.get_mut(key).filter(|request| {
            request.in_transfer_log
                && request.volume.at() == at
                && request.range.start == ack.sector.0
        });
        let Some(request) = found else { return false };
        let range = request.range;
        match kind {
            AckKind::Received => {
                if request.protocol == ReplicationProtocol::B && request.net == Net::Pending {
                    request.net = Net::Ok;
                }
            }
            AckKind::Written { in_sync } => {
                if request.net == Net::Pending {
                    request.net = Net::Ok;
                }
                // BM-3: both copies are written; while the local write runs it still counts
                // as in flight, and its failure marks the block again. That mark may have been
                // cleared meanwhile, by the answer to a resync read from before the write.
                if request.local == Local::Failed {
                    self.volumes[at].set_out_of_sync(range);
                } else if in_sync {
                    self.volumes[at].set_in_sync(range);
                }
            }
            AckKind::Failed => {
                // BM-5: in every protocol.
                if request.net == Net::Pending {
                    request.net = Net::Failed;
                }
                if !self.mutant.is_on(Mutant::IgnoreNegAck) {
                    self.volumes[at].set_out_of_sync(range);
                    self.go_on_without_peer(at);
                }
            }
        }
        self.try_finish(key);
        true
    }

    /// The peer lacks a write, and the word that its disk is bad may get lost, here and there: the
    /// answer to the host waits for a generation that the peer does not have (GI-1).
    fn go_on_without_peer(&mut self, at: usize) {
        let volume = &self.volumes[at];
        let is_shared = volume.uuids().is_some_and(|uuids| uuids.bitmap.is_zero());
        if volume.state.disk == Disk::UpToDate && is_shared {
            self.new_current_uuid(at);
            self.send_uuids(at, false);
        }
    }

    pub(crate) fn on_barrier_ack(&mut self, epoch: u32, writes: u32) {
        let mut released = std::mem::take(&mut self.scratch);
        match self.transfer_log.acknowledge(epoch, writes, &mut released) {
            Ok(()) => {
                for key in released.drain(..) {
                    let request = self.requests.get_mut(key).expect("it is in the log");
                    if request.net == Net::Pending {
                        // Stable there, whatever acknowledgement was agreed when it was sent.
                        request.net = Net::Ok;
                    }
                    self.leave_transfer_log(key);
                }
            }
            Err(e) => {
                let text = e.to_string();
                self.lose_link(Conn::ProtocolError, Then::Reconnect, &text);
            }
        }
        self.scratch = released;
        self.recheck_flushes();
    }

    pub(super) fn leave_transfer_log(&mut self, key: Key) {
        let request = self.requests.get_mut(key).expect("the log's requests are in the table");
        request.in_transfer_log = false;
        self.try_finish(key);
    }

    pub(super) fn recheck_flushes(&mut self) {
        let mut index = 0;
        while let Some(key) = self.flushes.get(index).copied() {
            let request = self.requests.get_mut(key).expect("a flush waits here");
            if self.transfer_log.holds_up_to(request.epoch) {
                index += 1;
                continue;
            }
            request.net = Net::Ok;
            self.flushes.swap_remove(index);
            self.try_finish(key);
        }
    }

    /// The connection is lost: what the peer has not confirmed as stable is marked (10.4).
    pub(crate) fn lose_transfer_log(&mut self) {
        let mut lost = std::mem::take(&mut self.scratch);
        self.transfer_log.drain(&mut lost);
        for key in lost.drain(..) {
            let request = self.requests.get_mut(key).expect("the log's requests are in the table");
            let (at, range) = (request.volume.at(), request.range);
            // What protocols A and B call done is on nobody's disk yet: it does not make up for a
            // failed local write (ACK-2).
            let is_unwritten = request.protocol != ReplicationProtocol::C;
            if request.net == Net::Pending || (request.net == Net::Ok && is_unwritten) {
                request.net = Net::Failed;
            }
            if !self.mutant.is_on(Mutant::ForgetUnconfirmed) {
                self.volumes[at].set_out_of_sync(range);
            }
            self.leave_transfer_log(key);
        }
        self.scratch = lost;
        for key in std::mem::take(&mut self.flushes) {
            self.requests.get_mut(key).expect("a flush waits here").net = Net::Failed;
            self.try_finish(key);
        }
    }

    /// Reads that the lost peer was asked for; only now nothing writes into their memory any more
    /// (ORD-6, RD-4).
    pub(crate) fn fail_remote_reads(&mut self) {
        let reads: Vec<Key> = self
            .requests
            .iter()
            .filter(|(_, r)| r.op == HostOp::Read && r.net == Net::Pending)
            .map(|(key, _)| key)
            .collect();
        for key in reads {
            self.requests.get_mut(key).expect("it was just seen").net = Net::Failed;
            self.try_finish(key);
        }
    }

    /// The peer's disk is gone while it is connected: what it had not made stable is marked.
    pub(crate) fn peer_lost_its_disk(&mut self, at: usize) {
        let keys: Vec<Key> = self.transfer_log.iter().collect();
        for key in keys {
            let request = self.requests.get(key).expect("the log's requests are in the table");
            if request.volume.at() == at {
                let range = request.range;
                self.volumes[at].set_out_of_sync(range);
            }
        }
    }

    /// Answers a request when all its conditions hold, and forgets it when nothing needs it.
    pub(crate) fn try_finish(&mut self, key: Key) {
        let Some(request) = self.requests.get(key).copied() else { return };
        let at = request.volume.at();
        if request.progress == Progress::Answered {
            if !request.in_transfer_log && !request.sending {
                self.forget(key, &request);
            }
            return;
        }
        let is_hasty = request.protocol == ReplicationProtocol::A
            && request.in_transfer_log
            && self.mutant.is_on(Mutant::AnswerUnsent);
        let busy = request.progress != Progress::Running
            || request.local == Local::Busy
            || (request.net == Net::Pending && !is_hasty)
            || (request.sending && !is_hasty && !self.mutant.is_on(Mutant::ReturnMemoryEarly));
        if busy {
            return;
        }
        if request.op != HostOp::Read && self.holds_answers(at) {
            self.requests.get_mut(key).expect("it was just seen").progress = Progress::Held;
            self.volumes[at].held.push_back(key);
            return;
        }
        let succeeded = self.has_succeeded(at, &request);
        if !succeeded && self.may_try_again(at, key, &request) {
            return;
        }
        if succeeded && request.is_write() {
            self.volumes[at].exposed_before = Uuid::ZERO;
        }
        let result = if succeeded { Ok(()) } else { Err(Errno::EIO) };
        self.finish_with(key, result);
    }

    /// Nothing that changes data is told done while a generation is on its way to the own disk
    /// (GI-1), or while only the peer has it and may not know that (DUR-5).
    fn holds_answers(&self, at: usize) -> bool {
        let volume = &self.volumes[at];
        let is_peer_good = volume.state.pdsk == Disk::UpToDate;
        let is_connected = volume.state.conn >= Conn::Connected;
        let awaits = volume.awaits_generation && is_connected && is_peer_good;
        volume.gate > 0 || awaits
    }

    /// ACK-2: what was written to a disk that is no good copy counts only if the peer has it.
    fn has_succeeded(&self, at: usize, request: &Request) -> bool {
        let state = &self.volumes[at].state;
        let here = request.local == Local::Ok;
        let is_counted = self.mutant.is_on(Mutant::CountBadCopy);
        let good_here = here && (state.disk == Disk::UpToDate || is_counted);
        match request.op {
            HostOp::Read => here || request.net == Net::Ok,
            HostOp::Write { .. } | HostOp::Discard | HostOp::WriteZeroes { .. } => {
                let to_good_copy = request.to_good_copy || state.pdsk == Disk::UpToDate;
                let is_known = !self.volumes[at].awaits_generation;
                good_here || (to_good_copy && request.net == Net::Ok && is_known)
            }
            HostOp::Flush => {
                let is_peer_good = state.pdsk == Disk::UpToDate && state.conn >= Conn::Connected;
                good_here || (is_peer_good && request.local != Local::Failed)
            }
        }
    }

    /// A request that found no good copy waits for one if so configured; a flush whose disk
    /// failed is satisfied by the peer's copy; a remote read goes back to the local disk.
    pub(super) fn may_try_again(&mut self, at: usize, key: Key, request: &Request) -> bool {
        let suspend = self.config.on_no_data == OnNoData::SuspendIo && !self.has_good_copy(at);
        if request.in_transfer_log {
            // It is looked at again when it leaves the log, for which its epoch has to end.
            if suspend && request.epoch == self.transfer_log.current() {
                self.close_epoch();
            }
            return suspend;
        }
        let local_now = self.volumes[at].state.disk == Disk::UpToDate
            && self.volumes[at].has_usable_disk()
            && request.local == Local::None;
        let peer_now = request.op == HostOp::Flush
            && self.volumes[at].state.pdsk == Disk::UpToDate
            && self.volumes[at].state.conn >= Conn::Connected;
        let reads_here = local_now && !request.is_write();
        if !suspend && !reads_here && !peer_now {
            return false;
        }
        self.leave_intervals(at, key, request);
        let request = self.requests.get_mut(key).expect("it was just seen");
        request.progress = Progress::Waiting;
        request.local = Local::None;
        request.net = Net::None;
        self.volumes[at].waiting.push_back(key);
        self.again = true;
        true
    }

    /// A block could not be written here and the error was passed on: only what is not marked is
    /// good, if the peer has the rest (RD-2). The only copy that a Primary uses, here or from the
    /// peer, stays what it is: the write has failed, and nobody has a better one (DUR-5).
    pub(crate) fn distrust_disk(&mut self, at: usize) {
        let state = self.volumes[at].state;
        let is_peer_good = state.pdsk == Disk::UpToDate && state.conn >= Conn::Connected;
        let serves_peer = state.peer == Role::Primary && state.pdsk < Disk::Inconsistent;
        let is_only_copy = state.role == Role::Primary || serves_peer;
        let may_lose_trust = is_peer_good || !is_only_copy;
        if state.disk > Disk::Inconsistent && may_lose_trust {
            let state = crate::state::State { disk: Disk::Inconsistent, ..state };
            self.set_state(at, state, "local I/O error");
        }
    }

    pub(super) fn leave_intervals(&mut self, at: usize, key: Key, request: &Request) {
        if request.is_write() {
            self.volumes[at].host_writes.remove(request.range, key);
        }
        if request.in_al && !request.in_transfer_log {
            self.release_log(at, key, request);
        }
    }

    pub(super) fn release_log(&mut self, at: usize, key: Key, request: &Request) {
        let (first, last) = request.range.al_extents();
        if let Some(disk) = self.volumes[at].disk.as_mut()
            && disk.stage >= Stage::Attached
        {
            disk.log.release(first, last);
        }
        self.requests.get_mut(key).expect("it holds references").in_al = false;
        self.again = true;
    }

    /// Takes the log references of requests that have not started: they take them anew.
    pub(crate) fn release_waiting(&mut self, at: usize) {
        for index in 0..self.volumes[at].waiting.len() {
            let key = self.volumes[at].waiting[index];
            let request = *self.requests.get(key).expect("a waiting request is in the table");
            if request.in_al {
                self.release_log(at, key, &request);
            }
        }
        for index in 0..self.volumes[at].peer_waiting.len() {
            let key = self.volumes[at].peer_waiting[index];
            let request = self.peer_requests.get(key).expect("a waiting request is in the table");
            if request.in_al {
                self.release_peer_log(key);
            }
        }
    }

    /// Completions that waited.
    pub(crate) fn run_held(&mut self, at: usize) {
        while !self.holds_answers(at)
            && let Some(key) = self.volumes[at].held.pop_front()
        {
            let request = self.requests.get_mut(key).expect("a held request is in the table");
            request.progress = Progress::Running;
            self.try_finish(key);
            self.again = true;
        }
    }

    pub(super) fn finish_with(&mut self, key: Key, result: Result<(), Errno>) {
        let request = *self.requests.get(key).expect("it is being finished");
        let at = request.volume.at();
        if request.is_write() {
            self.volumes[at].host_writes.remove(request.range, key);
            let is_open = request.in_transfer_log && request.epoch == self.transfer_log.current();
            if is_open && !self.mutant.is_on(Mutant::DropBarrier) {
                // ORD-1: what the host submits after this belongs to a later epoch.
                self.close_epoch();
            }
        }
        self.answer(request.volume, request.tag, result);
        self.requests.get_mut(key).expect("it is being finished").progress = Progress::Answered;
        self.again = true;
        if !request.in_transfer_log {
            self.forget(key, &request);
        } else if request.in_al && self.mutant.is_on(Mutant::ReleaseLogAtAnswer) {
            self.release_log(at, key, &request);
        }
    }

    pub(super) fn forget(&mut self, key: Key, request: &Request) {
        if request.in_al {
            self.release_log(request.volume.at(), key, request);
        }
        self.requests.remove(key);
        self.again = true;
    }
}
