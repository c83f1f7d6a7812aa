//! The target of a resync: it asks for the marked blocks, at the pace of the controller, and ends
//! the resync when none is left. It asks at every tick, and between the ticks whenever enough of
//! what it asked for is written.
//!
//! The scan runs upwards once; what is marked behind it later is reached by starting again. A
//! range is asked for only while no write of this node touches it (RS-2). At the end the data is
//! made durable before the disk counts as UpToDate (GI-8, RS-4).
//!
//! Source: protocol notes, sections 12.6, 12.8 and 12.9.

use crate::action::{Action, DiskOp, Handler};
use crate::config::RateConfig;
use crate::limits;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::resync::rate::{RateController, TICK};
use crate::state::{Conn, Disk, Role, State};
use crate::units::{BLOCK_SIZE, SECTORS_PER_BLOCK, Sector, SectorRange, Span, Time};
use crate::volume::MetaTask;
use crate::wire::{BlockId, BlockRequest, Packet};

/// Blocks of a resync extent (16 MiB): no request crosses its boundary.
const BLOCKS_PER_RESYNC_EXTENT: u64 = 4096;
/// Time between two writes of the bitmap during a resync: each of them costs a flush.
const SAVE_INTERVAL: Span = Span::from_secs(5);
/// Length of the window for the current speed.
const WINDOW: Span = Span::from_secs(3);

/// How far the end of a resync is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Blocks are left.
    No,
    /// The target makes its data durable.
    Flushing,
    /// All is done here; the peer's acknowledgements are awaited.
    Pinging {
        /// Reached when so many pings of this connection were answered.
        pongs: u64,
    },
}

/// A resync under way, on either side.
#[derive(Debug)]
pub(crate) struct Resync {
    pub(crate) total_blocks: u64,
    pub(crate) ending: Ending,
    /// On the target: the pace.
    pub(crate) rate: Option<RateController>,
    /// On the target: requests may be sent.
    pub(crate) started: bool,
    /// The next block to look at.
    scan: u64,
    /// Blocks were left out because of a write; the scan has to start again.
    skipped: bool,
    next_tick: Time,
    /// When the bitmap was last written.
    saved_at: Time,
    began: Time,
    paused_since: Option<Time>,
    paused: Span,
    window_began: Time,
    window_left: u64,
    /// Speed of the last full window: its length and the blocks synced in it.
    pub(crate) last_window: (Span, u64),
}

impl Resync {
    pub(crate) fn new(now: Time, bits: u64, rate: Option<&RateConfig>) -> Self {
        Self {
            total_blocks: bits,
            ending: Ending::No,
            rate: rate.map(RateController::new),
            started: false,
            scan: 0,
            skipped: false,
            next_tick: now,
            saved_at: now,
            began: now,
            paused_since: None,
            paused: Span::ZERO,
            window_began: now,
            window_left: bits,
            last_window: (Span::ZERO, 0),
        }
    }

    /// When the target wants to be woken.
    pub(crate) fn next_tick(&self, conn: Conn) -> Option<Time> {
        self.asks(conn).then_some(self.next_tick)
    }

    fn asks(&self, conn: Conn) -> bool {
        let is_active = self.started && self.ending == Ending::No && self.rate.is_some();
        is_active && conn == Conn::SyncTarget
    }

    pub(crate) fn set_paused(&mut self, now: Time, paused: bool) {
        match (self.paused_since, paused) {
            (None, true) => self.paused_since = Some(now),
            (Some(since), false) => {
                self.paused = Span(self.paused.0 + now.since(since).0);
                self.paused_since = None;
                self.next_tick = now;
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    /// Time since the start, and time of it in pause.
    pub(crate) fn times(&self, now: Time) -> (Span, Span) {
        let pausing = self.paused_since.map_or(0, |since| now.since(since).0);
        (now.since(self.began), Span(self.paused.0 + pausing))
    }

    pub(crate) fn received(&mut self, sectors: u64) {
        if let Some(rate) = self.rate.as_mut() {
            rate.received(sectors);
        }
    }

    /// A request is over, with its memory.
    pub(crate) fn ended(&mut self, sectors: u64) {
        if let Some(rate) = self.rate.as_mut() {
            rate.ended(sectors);
        }
    }

    /// Speed of the last full window, KiB/s.
    pub(crate) fn rate_kib(&self) -> u64 {
        let (span, blocks) = self.last_window;
        blocks * 4 * 1000 / span.as_ms().max(1)
    }

    fn measure(&mut self, now: Time, left: u64) {
        let span = now.since(self.window_began);
        if span >= WINDOW {
            self.last_window = (span, self.window_left.saturating_sub(left));
            self.window_began = now;
            self.window_left = left;
        }
    }
}

impl Resource {
    /// The start of the resync is durable here: requests may be sent.
    pub(crate) fn begin_target(&mut self, at: usize) {
        let now = self.now;
        if let Some(resync) = self.volumes[at].resync.as_mut() {
            resync.started = true;
            resync.next_tick = now;
        }
        self.again = true;
        self.resync_timer(at);
    }

    pub(crate) fn resync_timer(&mut self, at: usize) {
        let now = self.now;
        let volume = &mut self.volumes[at];
        let left = volume.disk.as_ref().map_or(0, |disk| disk.bitmap.count());
        let conn = volume.state.conn;
        let Some(resync) = volume.resync.as_mut() else { return };
        resync.measure(now, left);
        let due = resync.next_tick(conn).is_some_and(|tick| tick <= now);
        if !due {
            return;
        }
        resync.next_tick = now + TICK;
        if let Some(rate) = resync.rate.as_mut() {
            rate.tick(&volume.config.disk.rate);
        }
        self.ask_for_blocks(at);
        self.save_progress(at);
        self.check_target_end(at);
    }

    /// Writes the bitmap now and then, so that a crash does not begin the resync anew (RS-3).
    fn save_progress(&mut self, at: usize) {
        let now = self.now;
        let Some(resync) = self.volumes[at].resync.as_mut() else { return };
        if now.since(resync.saved_at) >= SAVE_INTERVAL {
            resync.saved_at = now;
            self.save_bitmap(at);
        }
    }

    /// Asks for more between two ticks, as soon as enough of what was asked for is written.
    pub(crate) fn refill_resync(&mut self, at: usize) {
        let buffers = u64::from(self.config.net.max_buffers);
        let volume = &self.volumes[at];
        let may_refill = volume.resync.as_ref().is_some_and(|resync| {
            resync.asks(volume.state.conn)
                && resync.rate.as_ref().is_some_and(|rate| rate.may_refill(buffers))
        });
        if may_refill {
            self.ask_for_blocks(at);
        }
    }

    fn rate_of(&mut self, at: usize) -> Option<&mut RateController> {
        self.volumes[at].resync.as_mut()?.rate.as_mut()
    }

    fn ask_for_blocks(&mut self, at: usize) {
        let buffers = u64::from(self.config.net.max_buffers);
        let Some(rate) = self.rate_of(at) else { return };
        let mut blocks = rate.allowance(buffers);
        while blocks > 0 && self.may_ask() {
            let Some(range) = self.next_resync_range(at, blocks) else {
                // What is left is asked for already: look again at the next tick.
                if let Some(rate) = self.rate_of(at) {
                    rate.forfeit();
                }
                return;
            };
            let busy = self.volumes[at].host_writes.first_overlap(range).is_some()
                || self.volumes[at].peer_ops.first_overlap(range).is_some();
            if busy {
                // A write is under way there: come back when the scan starts again.
                if let Some(resync) = self.volumes[at].resync.as_mut() {
                    resync.scan = range.end.div_ceil(SECTORS_PER_BLOCK);
                    resync.skipped = true;
                }
                continue;
            }
            let count = range.blocks_outward().len();
            blocks -= count.min(blocks);
            self.ask_for(at, range);
        }
    }

    fn ask_for(&mut self, at: usize, range: SectorRange) {
        let volume = &mut self.volumes[at];
        let resync = volume.resync.as_mut().expect("it is under way");
        resync.scan = range.end.div_ceil(SECTORS_PER_BLOCK);
        let rate = resync.rate.as_mut().expect("a target has a pace");
        rate.requested(range.sectors());
        let size = u32::try_from(range.bytes()).expect("bounded by the largest request");
        let block = BlockRequest { sector: Sector(range.start), block_id: BlockId::SYNCER, size };
        let nr = volume.config.nr;
        self.enter_target_request(at, range);
        self.send_data(nr, Packet::RsDataRequest(block), None, None);
    }

    /// The next run of marked blocks, of a size and alignment that the source likes.
    fn next_resync_range(&mut self, at: usize, most: u64) -> Option<SectorRange> {
        let largest = u64::from(self.link.agreed().max_payload().min(limits::MAX_BIO_SIZE));
        let volume = &mut self.volumes[at];
        let device_end = volume.size.0;
        let disk = volume.disk.as_ref()?;
        let resync = volume.resync.as_mut()?;
        let Some(first) = disk.bitmap.next_set(resync.scan) else {
            // Behind the scan, blocks may have been marked again; those that failed stay.
            let has_others = disk.bitmap.count() > disk.failed_blocks;
            if std::mem::take(&mut resync.skipped) || has_others {
                resync.scan = 0;
            }
            return None;
        };
        let boundary = (first / BLOCKS_PER_RESYNC_EXTENT + 1) * BLOCKS_PER_RESYNC_EXTENT;
        let mut end = first + 1;
        let mut step = 1_u32;
        while end < boundary
            && end - first < most
            && (end - first + 1) * BLOCK_SIZE <= largest
            && disk.bitmap.is_set(end)
            && first % (1 << step) == 0
        {
            end += 1;
            if end - first == 1 << step {
                step += 1;
            }
        }
        let start = first * SECTORS_PER_BLOCK;
        let end = (end * SECTORS_PER_BLOCK).min(device_end);
        (start < end).then_some(SectorRange { start, end })
    }

    /// Begins the end of the resync when nothing is left to do.
    fn check_target_end(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let Some(disk) = volume.disk.as_ref() else { return };
        let is_hasty = self.mutant.is_on(Mutant::FinishBeforeLastBlock);
        let is_done = disk.bitmap.count() <= disk.failed_blocks + u64::from(is_hasty) * 16;
        let Some(resync) = volume.resync.as_mut() else { return };
        let in_flight = resync.rate.as_ref().is_some_and(|rate| rate.in_flight() > 0);
        if !is_done || (in_flight && !is_hasty) || resync.ending != Ending::No {
            return;
        }
        resync.ending = Ending::Flushing;
        let volume_ix = volume.ix;
        let id = self.new_op(crate::resource::Op::SyncFlush(volume_ix));
        let range = SectorRange::default();
        let op = DiskOp::Flush;
        self.out.push(Action::Disk { id, volume: volume_ix, op, range, buf: None });
    }

    /// The target's data is durable.
    pub(crate) fn on_sync_flushed(
        &mut self,
        ix: crate::event::VolumeIx,
        result: Result<(), crate::units::Errno>,
    ) {
        let at = ix.at();
        if let Err(errno) = result {
            self.fail_disk(at, &format!("Local IO failed in flush ({errno})"));
            return;
        }
        let Some(resync) = self.volumes[at].resync.as_mut() else { return };
        if resync.ending == Ending::Flushing {
            resync.ending = Ending::Pinging { pongs: self.link.pings + 1 };
            self.send_ping();
        }
    }

    /// The peer has processed everything that was sent before the ping.
    pub(crate) fn on_pinged(&mut self) {
        for at in 0..self.volumes.len() {
            let volume = &self.volumes[at];
            let pongs = self.link.pongs;
            let is_ended = volume.resync.as_ref().is_some_and(
                |resync| matches!(resync.ending, Ending::Pinging { pongs: n } if n <= pongs),
            );
            if !is_ended {
                continue;
            }
            match volume.state.conn {
                Conn::SyncTarget | Conn::PausedSyncT => self.finish_target(at),
                Conn::SyncSource | Conn::PausedSyncS => self.finish_source(at),
                _ => {}
            }
        }
    }

    fn finish_target(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let is_primary = state.role == Role::Primary;
        let Some(disk) = volume.disk.as_mut() else { return };
        let failed = disk.failures_left();
        let is_hasty = self.mutant.is_on(Mutant::FinishBeforeLastBlock);
        if disk.bitmap.count() > failed && !is_hasty {
            // Something was marked meanwhile: go on.
            if let Some(resync) = volume.resync.as_mut() {
                resync.ending = Ending::No;
                resync.scan = 0;
            }
            return;
        }
        let Some(peer) = volume.peer_uuids.as_mut() else { return };
        if failed == 0 && !self.mutant.is_on(Mutant::KeepOldGeneration) {
            disk.uuids.sync_finish_target(&peer.uuids, is_primary);
            peer.uuids = disk.uuids;
        }
        // As on the source: the marks go first.
        self.save_bitmap(at);
        self.log_resync_end(at, failed);
        let state = if failed == 0 {
            let volume = Some(self.volumes[at].ix);
            self.out.push(Action::RunHandler { handler: Handler::AfterResyncTarget, volume });
            State { conn: Conn::Connected, disk: Disk::UpToDate, pdsk: Disk::UpToDate, ..state }
        } else {
            State { conn: Conn::Connected, ..state }
        };
        self.set_state(at, state, "resync done");
        self.push_meta(at, MetaTask::Superblock);
        self.start_grow_sync(at);
    }
}
