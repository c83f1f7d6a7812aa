//! The local disk: attach, detach, and the metadata work in between.
//!
//! Metadata work is a queue of tasks per volume, done one after the other, so that what must be
//! durable first is (MD-1, BM-4). The activity log writes beside it, because host writes wait for
//! it: before extents leave the log, the data that was written to them is flushed, then the bitmap
//! pages that cover them are written, then the transaction (AL-3). Any failure of metadata fails
//! the disk (MD-4, AL-4).
//!
//! Bits may go to disk as cleared only after the data they stand for was flushed here: the peer
//! forgets its own bits as soon as we say that a block was written, so after a power cut our
//! durable bits are what is left (BM-1).
//!
//! Source: metadata notes, sections 3 to 6.

mod attach;

use arrayvec::ArrayVec;

use crate::action::{Action, DiskOp, Handler, Level, Scope};
use crate::config::OnIoError;
use crate::event::{OpId, VolumeIx};
use crate::gi::Uuid;
use crate::limits::AL_UPDATES_PER_TRANSACTION;
use crate::meta::al_journal::{
    AlBlock, block_index, decode_block, encode_initialised, encode_transaction,
};
use crate::meta::{Magic, MetaFlags, Page};
use crate::mutant::Mutant;
use crate::resource::{Op, Resource};
use crate::state::{Conn, Disk, Role, State};
use crate::units::{BlockRange, Errno, SectorRange};
use crate::volume::{After, LocalDisk, LogPages, LogWrite, MetaTask, Stage};

/// Pages read at a time.
const READ_PAGES: u32 = 256;
/// Pages written at a time by a metadata task.
const WRITE_PAGES: u32 = 32;
/// Activity-log blocks that an attach reads: 256 MiB, far above any sensible striping.
const MAX_LOG_BLOCKS: u32 = 65_536;

const EMPTY: SectorRange = SectorRange { start: 0, end: 0 };

impl Resource {
    /// The local disk can no longer be trusted (DUR-4, MD-4).
    pub(crate) fn fail_disk(&mut self, at: usize, text: &str) {
        let volume = &self.volumes[at];
        if volume.disk.as_ref().is_none_or(|disk| disk.stage == Stage::Leaving) {
            return;
        }
        let ix = volume.ix;
        if volume.disk.as_ref().is_some_and(|disk| disk.stage < Stage::Attached) {
            self.fail_attach(at, 118, text.to_owned(), true);
            return;
        }
        self.log(Level::Error, Scope::Device(ix), format!("{text}. Detaching..."));
        if self.volumes[at].config.disk.on_io_error == OnIoError::CallLocalIoError {
            let handler = Handler::LocalIoError;
            self.out.push(Action::RunHandler { handler, volume: Some(ix) });
        }
        let mut state: State = self.volumes[at].state;
        state.disk = Disk::Failed;
        self.set_state(at, state, "local I/O error");
    }

    /// Queues metadata work; a superblock that would directly follow another is the same work.
    pub(crate) fn push_meta(&mut self, at: usize, task: MetaTask) {
        let Some(disk) = self.volumes[at].disk.as_mut() else { return };
        let queue = &mut disk.meta;
        let last_is_running = queue.running && queue.tasks.len() == 1;
        if task == MetaTask::Superblock
            && queue.tasks.back() == Some(&MetaTask::Superblock)
            && !last_is_running
        {
            return;
        }
        queue.tasks.push_back(task);
        self.again = true;
    }

    /// Writes what changed in the bitmap of a volume, when the peer is lost or a resync ends.
    pub(crate) fn save_bitmap(&mut self, at: usize) {
        let is_attached = |d: &LocalDisk| d.stage == Stage::Attached && d.bitmap.any_dirty();
        if self.volumes[at].disk.as_ref().is_some_and(is_attached) {
            self.push_meta(at, MetaTask::Bitmap);
        }
    }

    pub(crate) fn save_bitmaps(&mut self) {
        for at in 0..self.volumes.len() {
            self.save_bitmap(at);
        }
    }

    /// Derives the superblock's flags from the state; writes it when they changed.
    pub(crate) fn refresh_flags(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let Some(disk) = volume.disk.as_mut() else { return };
        if disk.stage != Stage::Attached || state.disk < Disk::Inconsistent {
            return;
        }
        let hides_role = self.mutant.is_on(Mutant::ForgetPrimaryFlag);
        let flags = flags_of(&state, disk);
        let flags = flags.with(MetaFlags::PRIMARY_IND, !hides_role && is_role(flags));
        if flags != disk.superblock.flags {
            let becomes_primary = is_role(flags) && !is_role(disk.superblock.flags);
            let loses_trust = !flags.contains(MetaFlags::CONSISTENT)
                && disk.superblock.flags.contains(MetaFlags::CONSISTENT);
            // Once the log no longer counts, the data that it covered and the bits of what was
            // written alone have to be durable (AL-10).
            disk.flush_first |= is_role(disk.superblock.flags) && !is_role(flags);
            disk.superblock.flags = flags;
            if becomes_primary || loses_trust {
                // On disk before the first write that relies on it (AL-10).
                self.save_superblock_gated(at);
            } else {
                self.push_meta(at, MetaTask::Superblock);
            }
        }
    }

    /// Starts and continues the metadata work of a volume.
    pub(crate) fn run_meta_queue(&mut self, at: usize) {
        loop {
            let Some(disk) = self.volumes[at].disk.as_mut() else { return };
            if disk.stage < Stage::Settling
                || (disk.stage == Stage::Leaving && !disk.clean_end && !disk.meta.running)
            {
                return;
            }
            let Some(task) = disk.meta.tasks.front().copied() else { return };
            if disk.meta.running {
                if !self.continue_meta(at, task) {
                    return;
                }
            } else {
                let log_is_busy =
                    disk.stage == Stage::Attached && !matches!(disk.log_write, LogWrite::Idle);
                if task == MetaTask::Bitmap && log_is_busy {
                    // Never two writes of one page at once (AL-3).
                    return;
                }
                let skips_flush = self.mutant.is_on(Mutant::SaveBitmapWithoutFlush);
                if task == MetaTask::Bitmap && disk.cleared_unflushed && !skips_flush {
                    disk.meta.tasks.push_front(MetaTask::FlushData);
                    continue;
                }
                disk.meta.running = true;
                disk.meta.cursor = 0;
                if !self.start_meta(at, task) {
                    return;
                }
            }
            let Some(disk) = self.volumes[at].disk.as_mut() else { return };
            disk.meta.tasks.pop_front();
            disk.meta.running = false;
            self.again = true;
            if let MetaTask::Then(after) = task {
                self.after_meta(at, after, true);
            }
        }
    }

    /// Starts a task; true if it is done already.
    fn start_meta(&mut self, at: usize, task: MetaTask) -> bool {
        match task {
            MetaTask::Then(_) => true,
            MetaTask::FlushData => {
                let volume = self.volumes[at].ix;
                let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
                disk.cleared_unflushed = false;
                disk.meta.in_flight = 1;
                let id = self.new_op(Op::MetaFlush(volume));
                let op = DiskOp::Flush;
                self.out.push(Action::Disk { id, volume, op, range: EMPTY, buf: None });
                false
            }
            MetaTask::Superblock => {
                let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
                if std::mem::take(&mut disk.flush_first) {
                    disk.meta.tasks.push_front(MetaTask::Bitmap);
                    disk.meta.tasks.push_front(MetaTask::FlushData);
                    return self.start_meta(at, MetaTask::FlushData);
                }
                self.write_superblock(at);
                false
            }
            MetaTask::Bitmap | MetaTask::InitLog | MetaTask::CheckLog => {
                self.continue_meta(at, task)
            }
        }
    }

    /// Puts more of a task in flight; true if it is done.
    fn continue_meta(&mut self, at: usize, task: MetaTask) -> bool {
        loop {
            let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
            if disk.meta.in_flight >= WRITE_PAGES {
                return false;
            }
            let more = match task {
                MetaTask::Bitmap => self.write_next_dirty(at),
                MetaTask::InitLog => self.init_next_log_block(at),
                MetaTask::CheckLog => self.read_log_back(at),
                MetaTask::FlushData | MetaTask::Superblock | MetaTask::Then(_) => false,
            };
            if !more {
                let disk = self.volumes[at].disk.as_ref().expect("the queue is its own");
                return disk.meta.in_flight == 0;
            }
        }
    }

    fn write_next_dirty(&mut self, at: usize) -> bool {
        let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
        let Some(nr) = disk.bitmap.next_dirty(disk.meta.cursor) else { return false };
        disk.meta.cursor = nr + 1;
        self.write_bitmap_page(at, nr, Op::MetaPage(self.volumes[at].ix));
        let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
        disk.meta.in_flight += 1;
        true
    }

    fn write_bitmap_page(&mut self, at: usize, nr: u64, op: Op) {
        let page = self.bitmap_image(at, nr);
        self.write_bitmap_image(at, nr, page, op);
    }

    /// A page of the bitmap as it is now; it counts as clean from here on.
    fn bitmap_image(&mut self, at: usize, nr: u64) -> Box<Page> {
        let mut page = self.page();
        let disk = self.volumes[at].disk.as_mut().expect("it has a bitmap");
        disk.bitmap.store_page(nr, &mut page.0);
        disk.bitmap.mark_clean(nr);
        page
    }

    fn write_bitmap_image(&mut self, at: usize, nr: u64, page: Box<Page>, op: Op) {
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        volume.counters.bm_writes += 1;
        let disk = volume.disk.as_ref().expect("it has a bitmap");
        let sector = disk.geometry.bitmap_page_sector(nr).expect("the bitmap fits its area");
        let id = self.new_op(op);
        self.out.push(Action::MetaWrite { id, volume: ix, sector, page, durable: false });
    }

    /// The first block to go makes the bitmap durable before the others may be forgotten; the last
    /// one goes when the others are durably gone. So a crash in between is recognised, and its
    /// recovery finds what this one found (MD-5).
    fn init_next_log_block(&mut self, at: usize) -> bool {
        let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
        let (first, last) = disk.log_ends;
        let blocks = disk.geometry.al_blocks();
        let is_end = |block: u32| block == first || block == last;
        let mut step = u32::try_from(disk.meta.cursor).expect("bounded by MAX_LOG_BLOCKS");
        while (1..=blocks).contains(&step) && is_end(step - 1) {
            step += 1;
        }
        let (block, durable) = match step {
            0 => (first, true),
            step if step <= blocks => (step - 1, false),
            step if step == blocks + 1 && last != first => (last, true),
            _ => return false,
        };
        let follows_first = disk.meta.cursor == 1;
        if disk.meta.in_flight > 0 && (durable || follows_first) {
            return false;
        }
        disk.meta.cursor = u64::from(step) + 1;
        disk.meta.in_flight += 1;
        let sector = disk.geometry.al_block_sector(block);
        let mut page = self.page();
        encode_initialised(&mut page);
        let volume = self.volumes[at].ix;
        let id = self.new_op(Op::MetaPage(volume));
        self.out.push(Action::MetaWrite { id, volume, sector, page, durable });
        true
    }

    fn read_log_back(&mut self, at: usize) -> bool {
        let disk = self.volumes[at].disk.as_mut().expect("the queue is its own");
        let done = u32::try_from(disk.meta.cursor).expect("bounded by MAX_LOG_BLOCKS");
        let pages = (disk.geometry.al_blocks() - done).min(READ_PAGES);
        if pages == 0 || disk.meta.in_flight > 0 {
            return false;
        }
        disk.meta.in_flight = 1;
        disk.meta.cursor = u64::from(done + pages);
        let sector = disk.geometry.al_block_sector(done);
        self.read_meta(at, sector, pages);
        true
    }

    pub(super) fn on_log_read_back(&mut self, at: usize, result: Result<&[Page], Errno>) {
        let Some(disk) = self.volumes[at].disk.as_mut() else { return };
        disk.meta.in_flight -= 1;
        let is_empty = |page: &Page| matches!(decode_block(page), AlBlock::Initialised);
        match result {
            Ok(pages) if pages.iter().all(is_empty) => {}
            Ok(_) => self.fail_disk(at, "The activity log was emptied, but reads back otherwise"),
            Err(errno) => {
                self.fail_disk(at, &format!("Local IO failed in meta data read ({errno})"));
            }
        }
    }

    fn write_superblock(&mut self, at: usize) {
        let mut page = self.page();
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        let disk = volume.disk.as_mut().expect("the queue is its own");
        disk.meta.in_flight = 1;
        let slots = disk.uuids.slots();
        disk.superblock.uuids.current = slots[0];
        disk.superblock.uuids.bitmap = slots[1];
        disk.superblock.uuids.history = [slots[2], slots[3]];
        disk.superblock.set_geometry(&disk.geometry);
        disk.superblock.al_extents = u32::from(disk.log.slots());
        let is_off = disk.log_disabled && !self.mutant.is_on(Mutant::ForgetLogIsOff);
        let mut image = disk.superblock;
        image.flags = image
            .flags
            .with(MetaFlags::FULL_SYNC, disk.counts_all_set())
            .with(MetaFlags::AL_DISABLED, is_off)
            .with(MetaFlags::AL_CLEAN, disk.clean_end);
        disk.written_is_good = says_good(image.flags);
        image.magic = if disk.clean_end { Magic::V08Clean } else { Magic::V08Unclean };
        image.encode(&mut page);
        let sector = disk.geometry.superblock;
        let id = self.new_op(Op::MetaPage(ix));
        self.out.push(Action::MetaWrite { id, volume: ix, sector, page, durable: true });
    }

    pub(crate) fn on_meta_page(&mut self, ix: VolumeIx, result: Result<(), Errno>) {
        let at = ix.at();
        let volume = &mut self.volumes[at];
        if let Some(disk) = volume.disk.as_mut() {
            assert!(disk.meta.in_flight > 0, "every page is answered once");
            disk.meta.in_flight -= 1;
            let is_superblock = disk.meta.tasks.front() == Some(&MetaTask::Superblock);
            // Once the disk leaves, the data in use is that of the generation before (GI-1).
            if is_superblock && result.is_ok() && disk.stage == Stage::Attached {
                disk.durable_uuid = Uuid(disk.superblock.uuids.current);
                disk.durable_is_good = disk.written_is_good;
                if disk.durable_is_good && volume.state.disk == Disk::UpToDate {
                    volume.source_uuid = Uuid::ZERO;
                }
                if disk.durable_uuid.same(disk.uuids.current) {
                    // It is on the disk, or what was taken back is not there any more.
                    volume.begun = None;
                }
                if std::mem::take(&mut volume.uuids_due) {
                    self.send_uuids(at, false);
                }
            }
        }
        let is_ignored = self.mutant.is_on(Mutant::IgnoreFailedMetadata);
        if let Err(errno) = result
            && !is_ignored
        {
            self.fail_disk(at, &format!("Local IO failed in meta data write ({errno})"));
        }
    }

    pub(crate) fn on_meta_flushed(&mut self, ix: VolumeIx, result: Result<(), Errno>) {
        let at = ix.at();
        if let Some(disk) = self.volumes[at].disk.as_mut() {
            disk.meta.in_flight -= 1;
        }
        if let Err(errno) = result {
            self.fail_disk(at, &format!("Local IO failed in flush ({errno})"));
        }
    }

    fn after_meta(&mut self, at: usize, after: After, ok: bool) {
        match after {
            After::OpenGate => {
                let volume = &mut self.volumes[at];
                assert!(volume.gate > 0, "every reason ends once");
                volume.gate -= 1;
            }
            After::FinishAttach if ok => self.finish_attach(at),
            After::FinishAttach => {}
            After::BeginSource if ok => self.begin_source(at),
            After::BeginTarget if ok => self.begin_target(at),
            After::FullSyncSet if ok => self.full_sync_set(at),
            After::SendBitmap if ok && self.volumes[at].state.conn == Conn::WFBitMapT => {
                self.begin_bitmap_out(at);
            }
            After::BeginSource | After::BeginTarget | After::FullSyncSet | After::SendBitmap => {}
            After::Detached => {
                let mut state = self.volumes[at].state;
                if state.disk > Disk::Failed {
                    state.disk = Disk::Failed;
                    self.set_state(at, state, "detach");
                }
                self.begin_leaving(at, true);
            }
            After::MarkClean => {
                if let Some(disk) = self.volumes[at].disk.as_mut() {
                    let is_primary = disk.superblock.flags.contains(MetaFlags::PRIMARY_IND);
                    disk.clean_end = !is_primary;
                }
            }
            After::Resized => self.again = true,
        }
    }

    /// Starts and continues activity-log transactions.
    pub(crate) fn run_activity_log(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        let Some(disk) = volume.disk.as_mut() else { return };
        if disk.stage != Stage::Attached || !matches!(disk.log_write, LogWrite::Idle) {
            return;
        }
        if disk.meta.running && disk.meta.tasks.front() == Some(&MetaTask::Bitmap) {
            // A page in flight is neither dirty nor durable: wait for it (AL-3).
            return;
        }
        let Some(transaction) = disk.log.begin_transaction() else { return };
        self.again = true;
        let without_bitmap = self.mutant.is_on(Mutant::EvictWithoutBitmap);
        let without_flush = self.mutant.is_on(Mutant::EvictWithoutFlush);
        let evicts = !transaction.evicted.is_empty() && !without_bitmap;
        let of = |extent| disk.bitmap.page_of_extent(extent);
        let mut numbers: ArrayVec<u64, AL_UPDATES_PER_TRANSACTION> =
            transaction.evicted.iter().copied().map(of).collect();
        numbers.retain(|nr| disk.bitmap.is_dirty(*nr) && !without_bitmap);
        numbers.sort_unstable();
        let mut pages = LogPages::new();
        for nr in numbers {
            if pages.last().is_none_or(|(last, _)| *last != nr) {
                pages.push((nr, self.bitmap_image(at, nr)));
            }
        }
        let disk = self.volumes[at].disk.as_mut().expect("its log is being written");
        disk.log_write = LogWrite::Evicting { transaction, in_flight: u32::from(evicts), pages };
        if evicts && without_flush {
            self.on_log_part_done(ix, Ok(()));
        } else if evicts {
            let id = self.new_op(Op::LogFlush(ix));
            let op = DiskOp::Flush;
            self.out.push(Action::Disk { id, volume: ix, op, range: EMPTY, buf: None });
        } else {
            self.write_log_block(at);
        }
    }

    pub(crate) fn on_log_part_done(&mut self, ix: VolumeIx, result: Result<(), Errno>) {
        let at = ix.at();
        if let Err(errno) = result {
            self.fail_disk(at, &format!("Local IO failed before an AL transaction ({errno})"));
        }
        let Some(disk) = self.volumes[at].disk.as_mut() else { return };
        let LogWrite::Evicting { in_flight, pages, .. } = &mut disk.log_write else { return };
        *in_flight -= 1;
        if disk.stage != Stage::Attached {
            return;
        }
        let pages = std::mem::take(pages);
        *in_flight += u32::try_from(pages.len()).expect("at most one page an extent");
        let is_ready = *in_flight == 0;
        for (nr, page) in pages {
            self.write_bitmap_image(at, nr, page, Op::LogBitmap(ix));
        }
        if is_ready {
            self.write_log_block(at);
        }
    }

    fn write_log_block(&mut self, at: usize) {
        let mut page = self.page();
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        volume.counters.al_writes += 1;
        let disk = volume.disk.as_mut().expect("its log is being written");
        let written = std::mem::replace(&mut disk.log_write, LogWrite::Writing);
        let LogWrite::Evicting { transaction: t, .. } = written else {
            unreachable!("a block follows its evictions")
        };
        let (slots, start) = (disk.log.slots_before(), t.context_start);
        encode_transaction(t.number, &t.updates, slots, start, &mut page);
        let (stripes, size) = (disk.geometry.al_stripes, disk.geometry.al_stripe_size_4k);
        let sector = disk.geometry.al_block_sector(block_index(t.number, stripes, size));
        let id = self.new_op(Op::LogBlock(ix));
        self.out.push(Action::MetaWrite { id, volume: ix, sector, page, durable: true });
    }

    pub(crate) fn on_log_written(&mut self, ix: VolumeIx, result: Result<(), Errno>) {
        let at = ix.at();
        let Some(disk) = self.volumes[at].disk.as_mut() else { return };
        disk.log_write = LogWrite::Idle;
        match result {
            Err(_) if self.mutant.is_on(Mutant::WriteAfterFailedLog) => {
                disk.log.commit_transaction();
            }
            Ok(()) => disk.log.commit_transaction(),
            // AL-4: no data write follows a failed transaction.
            Err(errno) => {
                self.fail_disk(at, &format!("Local IO failed in AL transaction ({errno})"));
            }
        }
    }

    /// Whether an operation id is known, for tests.
    #[must_use]
    pub fn knows_operation(&self, id: OpId) -> bool {
        self.ops.get(id.0).is_some()
    }

    /// The blocks of a volume that differ, as a count over a range, for checkers.
    #[must_use]
    pub fn out_of_sync_in(&self, volume: VolumeIx, range: BlockRange) -> u64 {
        let disk = self.volumes.get(volume.at()).and_then(|v| v.disk.as_ref());
        disk.map_or(0, |disk| disk.bitmap.count_in(range))
    }
}

/// Whether the activity log counts after a crash.
fn is_role(flags: MetaFlags) -> bool {
    flags.contains(MetaFlags::PRIMARY_IND)
}

/// The superblock flags that follow from a state (metadata notes 2.1).
fn flags_of(state: &State, disk: &LocalDisk) -> MetaFlags {
    let peer_writes_here = state.peer == Role::Primary && state.pdsk < Disk::Inconsistent;
    let is_primary = state.role == Role::Primary || peer_writes_here;
    let peer_bad = matches!(state.pdsk, Disk::Inconsistent | Disk::Outdated);
    MetaFlags::EMPTY
        .with(MetaFlags::CONSISTENT, state.disk > Disk::Inconsistent)
        .with(MetaFlags::PRIMARY_IND, is_primary)
        .with(MetaFlags::CONNECTED_IND, state.conn > Conn::WFReportParams)
        .with(MetaFlags::WAS_UP_TO_DATE, state.disk > Disk::Outdated)
        .with(MetaFlags::PEER_OUT_DATED, peer_bad)
        .with(MetaFlags::CRASHED_PRIMARY, disk.crashed_primary)
}

/// Whether a superblock with these flags says that the data is good.
const fn says_good(flags: MetaFlags) -> bool {
    flags.contains(MetaFlags::CONSISTENT) && flags.contains(MetaFlags::WAS_UP_TO_DATE)
}
