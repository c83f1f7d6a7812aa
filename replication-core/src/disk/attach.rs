//! The beginning and the end of a disk's use: reading the metadata, recovering from a crash,
//! deciding what the data is worth; and putting everything away.

use super::{MAX_LOG_BLOCKS, READ_PAGES, says_good};
use crate::action::{Action, Level, Scope};
use crate::activity_log::ActivityLog;
use crate::bitmap::Bitmap;
use crate::connect::Then;
use crate::event::{DiskInfo, VolumeIx};
use crate::gi::{Uuid, Uuids};
use crate::limits;
use crate::meta::al_journal::replay;
use crate::meta::layout::superblock_sector;
use crate::meta::{Geometry, MetaFlags, Page, Superblock};
use crate::mutant::Mutant;
use crate::resource::{Op, Resource};
use crate::slab::Key;
use crate::state::{Conn, Disk, Fencing, Role};
use crate::units::{Errno, SECTORS_PER_BLOCK, Sector};
use crate::volume::{After, LocalDisk, LogWrite, MetaQueue, MetaTask, Stage};

impl Resource {
    /// Opens the backing device; the rest follows from the answers.
    pub(crate) fn begin_attach(&mut self, at: usize) {
        let volume = &self.volumes[at];
        assert!(volume.disk.is_none(), "one disk at a time");
        let ix = volume.ix;
        let mut state = volume.state;
        state.disk = Disk::Attaching;
        self.set_state(at, state, "attach");
        let id = self.new_op(Op::OpenDisk(ix));
        self.out.push(Action::OpenDisk { id, volume: ix });
    }

    pub(crate) fn on_disk_opened(&mut self, ix: VolumeIx, result: Result<DiskInfo, String>) {
        let at = ix.at();
        match result {
            Err(text) => self.fail_attach(at, 104, text, false),
            Ok(info) => match self.place_metadata(at, info) {
                Err(text) => self.fail_attach(at, 112, text, true),
                Ok(()) => {
                    let disk = self.volumes[at].disk.as_ref().expect("it was just placed");
                    let sector = disk.geometry.superblock;
                    self.read_meta(at, sector, 1);
                }
            },
        }
    }

    pub(super) fn place_metadata(&mut self, at: usize, info: DiskInfo) -> Result<(), String> {
        let config = &self.volumes[at].config;
        let kind = config.meta.expect("only a volume with a disk is attached");
        let meta_size = info.meta_sectors;
        // The place of the superblock does not depend on the log's striping, which it will tell.
        let geometry =
            Geometry::new(kind, info.data_sectors, meta_size, 1, 8).map_err(|e| e.to_string())?;
        assert_eq!(
            Ok(geometry.superblock),
            superblock_sector(kind, info.data_sectors, meta_size).map_err(|_| ()),
            "the superblock's place is fixed by the sizes"
        );
        let slots = config.disk.al_extents;
        let superblock = Superblock::fresh(&geometry);
        self.volumes[at].disk = Some(LocalDisk {
            stage: Stage::Superblock,
            info,
            uuids: Uuids::fresh(),
            superblock,
            geometry,
            bitmap: Bitmap::new(0),
            log: ActivityLog::new(slots),
            log_write: LogWrite::Idle,
            meta: MetaQueue::default(),
            crashed_primary: false,
            was_degraded: false,
            log_disabled: false,
            log_ends: (0, 0),
            cleared_unflushed: false,
            flush_first: false,
            durable_uuid: Uuid::ZERO,
            durable_is_good: false,
            written_is_good: false,
            found: Disk::Inconsistent,
            found_peer: Disk::DUnknown,
            read_cursor: 0,
            log_pages: Vec::new(),
            failed_blocks: 0,
            clean_end: false,
        });
        Ok(())
    }

    pub(super) fn read_meta(&mut self, at: usize, sector: Sector, pages: u32) {
        let volume = self.volumes[at].ix;
        let id = self.new_op(Op::ReadMeta(volume));
        self.out.push(Action::MetaRead { id, volume, sector, pages });
    }

    pub(crate) fn on_meta_read(&mut self, ix: VolumeIx, result: Result<&[Page], Errno>) {
        let at = ix.at();
        let stage = self.volumes[at].disk.as_ref().map(|disk| disk.stage);
        if stage.is_none_or(|stage| stage >= Stage::Settling) {
            self.on_log_read_back(at, result);
            return;
        }
        let pages = match result {
            Ok(pages) => pages,
            Err(errno) => {
                let text = format!("I/O error on meta data ({errno})");
                self.fail_attach(at, 118, text, true);
                return;
            }
        };
        let step = match stage {
            Some(Stage::Superblock) => self.on_superblock(at, &pages[0]),
            Some(Stage::Log) => self.on_log_pages(at, pages),
            Some(Stage::Bitmap) => self.on_bitmap_pages(at, pages),
            Some(Stage::Settling | Stage::Attached | Stage::Leaving) | None => {
                unreachable!("nothing is read in stage {stage:?}")
            }
        };
        if let Err((code, text)) = step {
            self.fail_attach(at, code, text, true);
        }
    }

    pub(super) fn on_superblock(&mut self, at: usize, page: &Page) -> Result<(), (i32, String)> {
        let invalid = |e: crate::meta::FormatError| (119, format!("no valid meta-data: {e}"));
        let found = Superblock::decode(page).map_err(invalid)?;
        let volume = &mut self.volumes[at];
        let kind = volume.config.meta.expect("only a volume with a disk is attached");
        let configured = volume.config.disk.size;
        let disk = volume.disk.as_mut().expect("an attach is under way");
        let (data, meta) = (disk.info.data_sectors, disk.info.meta_sectors);
        let geometry = found.geometry(kind, data, meta).map_err(invalid)?;
        if !self.mutant.is_on(Mutant::AcceptForeignMetadata) {
            found.check(&geometry, configured).map_err(invalid)?;
        }
        if geometry.al_blocks() > MAX_LOG_BLOCKS {
            let text = format!("activity log of {} blocks is too large", geometry.al_blocks());
            return Err((119, text));
        }
        if found.la_size.0 > limits::MAX_DEVICE_SECTORS {
            return Err((111, format!("size {} is above 16 TiB", found.la_size)));
        }
        let most =
            u16::try_from((geometry.al_blocks() - 1).saturating_mul(919)).unwrap_or(u16::MAX);
        let slots = volume.config.disk.al_extents.min(most);
        disk.log = ActivityLog::new(slots);
        disk.geometry = geometry;
        disk.uuids = Uuids::from_slots([
            found.uuids.current,
            found.uuids.bitmap,
            found.uuids.history[0],
            found.uuids.history[1],
        ]);
        if let Some(begun) = volume.begun.filter(|begun| begun.current.same(disk.uuids.current)) {
            disk.uuids = begun.before;
        }
        disk.durable_uuid = disk.uuids.current;
        disk.durable_is_good = says_good(found.flags);
        disk.superblock = found;
        disk.stage = Stage::Log;
        disk.read_cursor = 0;
        self.read_more_log(at);
        Ok(())
    }

    pub(super) fn read_more_log(&mut self, at: usize) {
        let disk = self.volumes[at].disk.as_ref().expect("an attach is under way");
        let done = u32::try_from(disk.read_cursor).expect("bounded by MAX_LOG_BLOCKS");
        let pages = (disk.geometry.al_blocks() - done).min(READ_PAGES);
        let sector = disk.geometry.al_block_sector(done);
        self.read_meta(at, sector, pages);
    }

    pub(super) fn on_log_pages(&mut self, at: usize, pages: &[Page]) -> Result<(), (i32, String)> {
        let disk = self.volumes[at].disk.as_mut().expect("an attach is under way");
        disk.log_pages.extend_from_slice(pages);
        disk.read_cursor += pages.len() as u64;
        if disk.read_cursor < u64::from(disk.geometry.al_blocks()) {
            self.read_more_log(at);
            return Ok(());
        }
        let la_size = disk.superblock.la_size;
        disk.bitmap = Bitmap::new(la_size.0.div_ceil(SECTORS_PER_BLOCK));
        disk.stage = Stage::Bitmap;
        disk.read_cursor = 0;
        self.read_more_bitmap(at)
    }

    pub(super) fn read_more_bitmap(&mut self, at: usize) -> Result<(), (i32, String)> {
        let disk = self.volumes[at].disk.as_ref().expect("an attach is under way");
        let left = disk.bitmap.pages() - disk.read_cursor;
        if left == 0 {
            return self.settle_attach(at);
        }
        let Some(sector) = disk.geometry.bitmap_page_sector(disk.read_cursor) else {
            return Err((119, String::from("the bitmap area does not cover the device")));
        };
        let pages = u32::try_from(left.min(u64::from(READ_PAGES))).expect("bounded");
        self.read_meta(at, sector, pages);
        Ok(())
    }

    pub(super) fn on_bitmap_pages(
        &mut self,
        at: usize,
        pages: &[Page],
    ) -> Result<(), (i32, String)> {
        let disk = self.volumes[at].disk.as_mut().expect("an attach is under way");
        for page in pages {
            disk.bitmap.load_page(disk.read_cursor, &page.0);
            disk.read_cursor += 1;
        }
        self.read_more_bitmap(at)
    }

    /// Everything is read: recover from a crash, agree on the size, bring the metadata into its
    /// new form.
    pub(super) fn settle_attach(&mut self, at: usize) -> Result<(), (i32, String)> {
        self.apply_activity_log(at)?;
        self.check_known_data(at)?;
        let peer = self.volumes[at].peer_sizes.map_or(0, |sizes| sizes.disk);
        let agreed = self.agreed_size(at, peer).map_err(|e| (170, e))?;
        let volume = &self.volumes[at];
        let disk = volume.disk.as_ref().expect("an attach is under way");
        let old = disk.superblock.la_size;
        let is_serving = volume.state.role == Role::Primary;
        // Whatever more there is room for comes with the handshake, which also tells whose data the
        // new part gets.
        let most = if is_serving { old.max(volume.size) } else { old };
        let size = if old == Sector(0) { agreed } else { agreed.min(most) };
        self.check_served_size(at, size)?;
        let disk = self.volumes[at].disk.as_mut().expect("an attach is under way");
        disk.stage = Stage::Settling;
        if size != old {
            disk.bitmap.resize(size.0.div_ceil(SECTORS_PER_BLOCK), true);
            disk.bitmap.mark_all_dirty();
            disk.superblock.la_size = size;
        }
        let moved = size != old;
        if moved {
            // A crash before the end of this leads to a full sync.
            disk.log_disabled = true;
        }
        self.decide_found_state(at);
        if moved {
            self.push_meta(at, MetaTask::Superblock);
        }
        self.push_meta(at, MetaTask::Bitmap);
        self.push_meta(at, MetaTask::InitLog);
        self.push_meta(at, MetaTask::CheckLog);
        self.push_meta(at, MetaTask::Then(After::FinishAttach));
        Ok(())
    }

    pub(super) fn apply_activity_log(&mut self, at: usize) -> Result<(), (i32, String)> {
        let ix = self.volumes[at].ix;
        let disk = self.volumes[at].disk.as_mut().expect("an attach is under way");
        let flags = disk.superblock.flags;
        let pages = std::mem::take(&mut disk.log_pages);
        let (stripes, size) = (disk.geometry.al_stripes, disk.geometry.al_stripe_size_4k);
        let was_primary = flags.contains(MetaFlags::PRIMARY_IND);
        disk.crashed_primary = (was_primary || flags.contains(MetaFlags::CRASHED_PRIMARY))
            && !self.mutant.is_on(Mutant::ForgetCrash);
        disk.was_degraded = was_primary && !flags.contains(MetaFlags::CONNECTED_IND);
        let whole = flags.contains(MetaFlags::FULL_SYNC)
            || (disk.crashed_primary && flags.contains(MetaFlags::AL_DISABLED));
        if whole {
            disk.bitmap.set_all();
            disk.bitmap.mark_all_dirty();
            return Ok(());
        }
        if !was_primary || self.mutant.is_on(Mutant::SkipLogReplay) {
            return Ok(());
        }
        let found = match replay(pages.iter(), stripes, size) {
            Ok(found) => found,
            Err(e) => {
                // Nothing is known about the last writes: everything may differ (AL-5).
                disk.bitmap.set_all();
                disk.bitmap.mark_all_dirty();
                let text = format!("activity log unusable ({e}): full sync needed");
                self.log(Level::Error, Scope::Device(ix), text);
                return Ok(());
            }
        };
        if !found.complete {
            // Blocks of the log are missing that no crash explains.
            disk.bitmap.set_all();
            disk.bitmap.mark_all_dirty();
            let text = "activity log damaged: full sync needed";
            self.log(Level::Error, Scope::Device(ix), text);
            return Ok(());
        }
        disk.log_ends = found.ends;
        let marked: u64 = found.extents.iter().map(|extent| disk.bitmap.set(extent.blocks())).sum();
        if !found.extents.is_empty() {
            let text = format!(
                "Marked additional {} KB as out-of-sync based on AL ({} extents).",
                marked * 4,
                found.extents.len()
            );
            self.log(Level::Info, Scope::Device(ix), text);
        }
        Ok(())
    }

    /// A node that already serves data without a disk may attach only that data, unless the peer
    /// brings it up to date.
    pub(super) fn check_known_data(&mut self, at: usize) -> Result<(), (i32, String)> {
        if self.volumes[at].state.pdsk == Disk::UpToDate {
            return Ok(());
        }
        self.check_data_in_use(at)
    }

    /// Whether the disk that is being attached holds the data that this node already serves (RD-1).
    pub(crate) fn check_data_in_use(&self, at: usize) -> Result<(), (i32, String)> {
        let volume = &self.volumes[at];
        let served = volume.exposed_uuid;
        let disk = volume.disk.as_ref().expect("an attach is under way");
        let is_serving = volume.state.role == Role::Primary && !served.is_zero();
        if is_serving && !volume.is_in_use(disk.uuids.current) {
            let text = format!(
                "can only attach to the data we lost last: current UUID is {}, in use is {served}",
                disk.uuids.current
            );
            return Err((150, text));
        }
        Ok(())
    }

    /// A device that is served without a disk does not shrink to one (FE-1).
    fn check_served_size(&self, at: usize, found: Sector) -> Result<(), (i32, String)> {
        let volume = &self.volumes[at];
        let served = volume.size;
        if volume.state.role == Role::Primary && found < served {
            let text = format!("the device in use has {served}, this disk only {found}");
            return Err((111, text));
        }
        Ok(())
    }

    pub(super) fn decide_found_state(&mut self, at: usize) {
        let fencing = self.config.net.fencing;
        let disk = self.volumes[at].disk.as_mut().expect("an attach is under way");
        let flags = disk.superblock.flags;
        let peer_outdated = flags.contains(MetaFlags::PEER_OUT_DATED);
        disk.found = if !flags.contains(MetaFlags::CONSISTENT) {
            Disk::Inconsistent
        } else if !flags.contains(MetaFlags::WAS_UP_TO_DATE) {
            Disk::Outdated
        } else if fencing == Fencing::DontCare || peer_outdated {
            Disk::UpToDate
        } else {
            Disk::Consistent
        };
        disk.found_peer = if peer_outdated { Disk::Outdated } else { Disk::DUnknown };
    }

    pub(super) fn finish_attach(&mut self, at: usize) {
        if self.volumes[at].state.conn == Conn::WFReportParams {
            // The peer was told that there is no disk.
            let text = "a disk was attached in the middle of the handshake";
            self.lose_link(Conn::NetworkFailure, Then::Reconnect, text);
        }
        if let Err((code, text)) = self.check_known_data(at) {
            // The peer, which would have brought it up to date, was lost meanwhile (RD-1).
            self.fail_attach(at, code, text, true);
            return;
        }
        let volume = &mut self.volumes[at];
        let disk = volume.disk.as_mut().expect("an attach is under way");
        disk.stage = Stage::Attached;
        disk.log_disabled = !volume.config.disk.al_updates;
        disk.log.reset();
        disk.log_ends = (0, 0);
        let size = disk.superblock.la_size;
        let (found, found_peer) = (disk.found, disk.found_peer);
        let count = disk.bitmap.count();
        let bits = disk.bitmap.bits();
        let ix = volume.ix;
        let mut state = volume.state;
        let is_connected = state.conn >= Conn::Connected;
        if is_connected {
            volume.peer_uuids = None;
            state.disk = Disk::Negotiating;
        } else {
            state.disk = found;
            if found_peer == Disk::Outdated {
                state.pdsk = found_peer;
            }
        }
        let text = format!("bitmap: {bits} bits, {count} set ({} KB out of sync)", count * 4);
        self.log(Level::Info, Scope::Device(ix), text);
        self.set_size(at, size);
        self.set_state(at, state, "attached");
        self.push_meta(at, MetaTask::Superblock);
        self.admin_attached(at, Ok(()));
    }

    pub(super) fn fail_attach(&mut self, at: usize, code: i32, text: String, is_open: bool) {
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        volume.disk = None;
        let mut state = volume.state;
        state.disk = Disk::Diskless;
        self.log(Level::Error, Scope::Device(ix), format!("attach failed: {text}"));
        if is_open {
            self.out.push(Action::CloseDisk { volume: ix });
        }
        self.set_state(at, state, "attach failed");
        self.admin_attached(at, Err((code, text)));
    }

    /// The disk is given up: wait for what is in flight, then close it. One that was not `in_use`
    /// yet leaves the data in use what it was.
    pub(crate) fn begin_leaving(&mut self, at: usize, in_use: bool) {
        let volume = &mut self.volumes[at];
        let Some(disk) = volume.disk.as_mut() else { return };
        if disk.stage != Stage::Attached {
            return;
        }
        disk.stage = Stage::Leaving;
        volume.unseen_size = None;
        volume.uuids_due = false;
        volume.resync_after_grow = false;
        self.again = true;
        if !in_use {
            return;
        }
        // From here on the peer may name a newer generation, if it has not done so already.
        // Nothing was acknowledged under one that did not get to the disk (GI-1).
        // What a target lacks was read from its source.
        let source = std::mem::replace(&mut volume.source_uuid, Uuid::ZERO);
        let own = if source.is_zero() { disk.durable_uuid } else { source };
        let is_older = |peer: &Uuids| {
            [peer.bitmap, peer.history[0], peer.history[1]].iter().any(|uuid| uuid.same(own))
        };
        let followed = volume.peer_uuids.map(|peer| peer.uuids).filter(is_older);
        volume.exposed_uuid = followed.map_or(own, |uuids| uuids.current);
        volume.exposed_before = Uuid::ZERO;
        // A superblock that is under way may get there.
        let durable = disk.durable_is_good.then_some(disk.durable_uuid);
        let written = disk.written_is_good.then_some(Uuid(disk.superblock.uuids.current));
        let claims = [durable, written];
        let is_newest = claims.iter().flatten().any(|uuid| uuid.same(volume.exposed_uuid));
        let is_trusted = self.mutant.is_on(Mutant::TrustUnawarePeer);
        volume.awaits_generation = is_newest && volume.state.role == Role::Primary && !is_trusted;
    }

    /// Ends a detach once nothing is in flight on the disk.
    pub(crate) fn run_detach(&mut self, at: usize) {
        let volume = &self.volumes[at];
        let ix = volume.ix;
        let is_leaving = volume.disk.as_ref().is_some_and(|disk| disk.stage == Stage::Leaving);
        if !is_leaving || volume.state.disk > Disk::Failed {
            return;
        }
        let busy = self.ops.iter().any(|(_, op)| self.op_uses_disk(*op, ix));
        if busy {
            return;
        }
        self.forget_log_references(ix);
        let volume = &mut self.volumes[at];
        let gone = volume.disk.take().expect("it was just seen");
        let failed = gone.meta.tasks;
        let mut state = volume.state;
        state.disk = Disk::Diskless;
        self.out.push(Action::CloseDisk { volume: ix });
        for task in failed {
            if let MetaTask::Then(after) = task {
                self.after_meta(at, after, false);
            }
        }
        self.set_state(at, state, "disk put away");
        self.admin_detached(at);
    }

    /// Whether operations of a disk that was given up are still under way.
    pub(crate) fn disk_is_busy(&self, at: usize) -> bool {
        let ix = self.volumes[at].ix;
        self.volumes[at].disk.is_none() && self.ops.iter().any(|(_, op)| self.op_uses_disk(*op, ix))
    }

    /// The activity log is gone, and the references into it: another disk starts with its own.
    fn forget_log_references(&mut self, ix: VolumeIx) {
        let keys: Vec<Key> = self.requests.keys().collect();
        for key in keys {
            if let Some(request) = self.requests.get_mut(key).filter(|r| r.volume == ix) {
                request.in_al = false;
            }
        }
        let keys: Vec<Key> = self.peer_requests.keys().collect();
        for key in keys {
            if let Some(request) = self.peer_requests.get_mut(key).filter(|r| r.volume == ix) {
                request.in_al = false;
            }
        }
    }

    pub(super) fn op_uses_disk(&self, op: Op, ix: VolumeIx) -> bool {
        match op {
            Op::OpenDisk(v)
            | Op::ReadMeta(v)
            | Op::MetaPage(v)
            | Op::MetaFlush(v)
            | Op::LogFlush(v)
            | Op::LogBitmap(v)
            | Op::LogBlock(v)
            | Op::SyncFlush(v)
            | Op::ProbeDisk(v)
            | Op::EpochFlush(v, _) => v == ix,
            Op::Host(key) => self.requests.get(key).is_some_and(|r| r.volume == ix),
            Op::Peer(key) => self.peer_requests.get(key).is_some_and(|r| r.volume == ix),
        }
    }

    /// Ends the use of a disk in an orderly way: bitmap and superblock say exactly what is known,
    /// the activity log is empty.
    pub(crate) fn put_disk_away(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let Some(disk) = volume.disk.as_mut() else { return };
        if disk.stage != Stage::Attached {
            return;
        }
        // A disk that may have been written without exact bits keeps its log.
        let is_exact = volume.state.role != Role::Primary && volume.state.peer != Role::Primary;
        self.push_meta(at, MetaTask::FlushData);
        self.push_meta(at, MetaTask::Bitmap);
        if is_exact {
            self.push_meta(at, MetaTask::InitLog);
            self.push_meta(at, MetaTask::Then(After::MarkClean));
        }
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Then(After::Detached));
    }
}
