//! The exchange of bitmaps before a resync.
//!
//! The source sends first; the target adds what it receives to its own map, makes the result
//! durable, and sends it back; the source adds that. From then on both maps are equal (BM-6,
//! BM-9). While a map is being sent, host writes of the volume wait, so no block is marked after
//! its place in the map was sent; between the end of the transfer and the start of the resync,
//! newly marked blocks are announced one by one (BM-4).
//!
//! Source: protocol notes, sections 12.2 to 12.5.

use crate::action::{Level, Scope};
use crate::connect::Then;
use crate::peer_request::Wrong;
use crate::resource::Resource;
use crate::resync::target::Resync;
use crate::state::{Conn, Disk, Role, State};
use crate::units::SectorRange;
use crate::volume::{After, LocalDisk, MetaTask, Stage, Volume};
use crate::wire::{BitmapReceiver, BitmapSender, Packet, Progress, SizesFlags};

/// Bitmap packets given to the driver at a time.
const PACKETS_IN_FLIGHT: u64 = 64;
/// Run-length coding exists from this protocol version on.
const RLE_SINCE: u32 = 90;

impl Resource {
    /// This node's map is to be sent: at once as source, after the merge as target.
    pub(crate) fn begin_bitmap_out(&mut self, at: usize) {
        self.volumes[at].bitmap_out = true;
        if self.volumes[at].state.conn == Conn::WFBitMapS {
            // Ready for the target's answer, which may come at any time after ours.
            self.volumes[at].bitmap_in = Some(self.new_receiver(at));
        }
        self.again = true;
    }

    /// This node's map will be sent when the source's has come.
    pub(crate) fn begin_bitmap_in(&mut self, at: usize) {
        self.volumes[at].bitmap_in = Some(self.new_receiver(at));
    }

    fn new_receiver(&self, at: usize) -> BitmapReceiver {
        let bits = self.volumes[at].disk.as_ref().map_or(0, |disk| disk.bitmap.bits());
        BitmapReceiver::for_kind(bits, self.link.agreed().header_kind())
    }

    /// Sends more of the maps that are to be sent, one volume after the other.
    pub(crate) fn run_bitmap_out(&mut self) {
        if !self.link.is_established() {
            return;
        }
        let at = match self.link.bitmap_volume {
            Some(at) => at,
            None => match self.volumes.iter().position(may_send_bitmap) {
                Some(at) => self.open_transfer(at),
                None => return,
            },
        };
        let use_rle = self.config.net.use_rle && self.link.agreed().version >= RLE_SINCE;
        let kind = self.link.agreed().header_kind();
        let nr = self.number_of(at);
        while self.link.unsent() < PACKETS_IN_FLIGHT {
            let Some(disk) = self.volumes[at].disk.as_ref() else {
                // The disk failed in the middle: the transfer cannot be completed.
                let text = "the disk is gone in the middle of a bitmap transfer";
                self.lose_link(Conn::ProtocolError, Then::Reconnect, text);
                return;
            };
            let sender = self.bitmap_sender.as_mut().expect("a transfer is open");
            match sender.next_packet(disk.bitmap.words(), use_rle, kind) {
                Some(packet) => self.send_bitmap(nr, packet),
                None => {
                    self.volumes[at].bitmap_out = false;
                    self.bitmap_sender = None;
                    self.end_bitmap();
                    self.bitmap_sent(at);
                    self.again = true;
                    return;
                }
            }
        }
    }

    fn open_transfer(&mut self, at: usize) -> usize {
        let bits = self.volumes[at].disk.as_ref().map_or(0, |disk| disk.bitmap.bits());
        self.bitmap_sender = Some(BitmapSender::new(bits));
        self.link.bitmap_volume = Some(at);
        at
    }

    fn bitmap_sent(&mut self, at: usize) {
        if self.volumes[at].state.conn == Conn::WFBitMapT {
            let state = State { conn: Conn::WFSyncUUID, ..self.volumes[at].state };
            self.set_state(at, state, "bitmap sent");
        }
    }

    pub(crate) fn on_bitmap_packet(&mut self, at: usize, packet: &Packet) -> Result<(), Wrong> {
        let volume = &mut self.volumes[at];
        let is_awaited = matches!(volume.state.conn, Conn::WFBitMapS | Conn::WFBitMapT);
        let (Some(receiver), Some(disk), true) =
            (volume.bitmap_in.as_mut(), volume.disk.as_mut(), is_awaited)
        else {
            let ix = volume.ix;
            let conn = volume.state.conn;
            let text = format!("unexpected bitmap in state {conn}, ignored");
            self.log(Level::Warn, Scope::PeerDevice(ix), text);
            return Ok(());
        };
        let bitmap = &mut disk.bitmap;
        let progress = receiver
            .receive(packet, |run| {
                bitmap.set(run);
            })
            .map_err(|e| e.to_string())?;
        if progress == Progress::Done {
            volume.bitmap_in = None;
            match volume.state.conn {
                Conn::WFBitMapT => {
                    self.push_meta(at, MetaTask::Bitmap);
                    self.push_meta(at, MetaTask::Superblock);
                    self.push_meta(at, MetaTask::Then(After::SendBitmap));
                }
                Conn::WFBitMapS => self.prepare_source(at),
                _ => unreachable!("only these two states await a bitmap"),
            }
        }
        Ok(())
    }

    /// Both maps are equal: the sync identifier is made durable, then told.
    pub(crate) fn prepare_source(&mut self, at: usize) {
        if self.volumes[at].uuids().is_some_and(|uuids| uuids.bitmap.is_zero()) {
            // The peer's disk is of this generation until the resync has really begun there. If
            // it is lost before, what is written here alone must not be taken for the same (GI-1).
            self.new_current_uuid(at);
            self.send_uuids(at, false);
        }
        let random = self.random();
        let volume = &mut self.volumes[at];
        let disk = volume.disk.as_mut().expect("a source has a disk");
        if let Some(peer) = volume.peer_uuids.map(|peer| peer.uuids.current) {
            if disk.uuids.is_start_unheard(peer) {
                disk.uuids.undo_sync_start();
            }
            disk.uuids.start_from(peer);
        }
        let sync = disk.uuids.sync_uuid(random);
        disk.uuids.sync_start_source(sync);
        self.push_meta(at, MetaTask::Bitmap);
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Then(After::BeginSource));
    }

    /// The sync identifier is durable: the resync begins.
    pub(crate) fn begin_source(&mut self, at: usize) {
        let state = self.volumes[at].state;
        let is_expected =
            matches!(state.conn, Conn::WFBitMapS | Conn::StartingSyncS | Conn::Connected);
        // A peer whose disk is gone has no use for it; the next handshake begins it anew.
        if !is_expected || state.pdsk < Disk::Inconsistent || !self.link.is_established() {
            return;
        }
        let Some(disk) = self.volumes[at].disk.as_ref() else { return };
        let (bits, uuid) = (disk.bitmap.count(), disk.uuids.bitmap.0);
        self.volumes[at].resync = Some(Resync::new(self.now, bits, None));
        let nr = self.number_of(at);
        // Before anything that the new state lets through (GI-7).
        self.send_data(nr, Packet::SyncUuid(uuid), None, None);
        let ix = self.volumes[at].ix;
        let text =
            format!("Began resync as SyncSource (will sync {} KB [{bits} bits set]).", bits * 4);
        let state = State { conn: Conn::SyncSource, pdsk: Disk::Inconsistent, ..state };
        self.set_state(at, state, "resync");
        self.log(Level::Info, Scope::PeerDevice(ix), text);
    }

    /// The source's start of the resync.
    pub(crate) fn on_sync_uuid(&mut self, at: usize, uuid: u64) -> Result<(), Wrong> {
        let asks_for_it = self.asks_to_be_target(at);
        let volume = &mut self.volumes[at];
        let state = volume.state;
        if state.disk <= Disk::Negotiating {
            // The one that was meant is lost, and the source is about to hear of that.
            return Ok(());
        }
        match state.conn {
            Conn::WFSyncUUID | Conn::Behind => self.start_target(at, uuid),
            Conn::StartingSyncT | Conn::WFBitMapT => volume.early_sync_uuid = Some(uuid),
            // It has overtaken the peer's consent, which comes through the other socket (ORD-7).
            Conn::Connected if asks_for_it => volume.early_sync_uuid = Some(uuid),
            Conn::Connected if volume.resync_after_grow && state.disk == Disk::UpToDate => {
                volume.resync_after_grow = false;
                self.start_target(at, uuid);
            }
            other => return Err(format!("in state {other}")),
        }
        Ok(())
    }

    fn start_target(&mut self, at: usize, uuid: u64) {
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let uuid = crate::gi::Uuid(uuid);
        let Some(disk) = volume.disk.as_mut() else { return };
        let is_primary = state.role == Role::Primary;
        disk.uuids.sync_start_target(uuid, is_primary);
        if let Some(peer) = volume.peer_uuids.as_mut().filter(|peer| peer.uuids.bitmap.same(uuid)) {
            // The source began this resync before, and has taken that back.
            peer.uuids.undo_sync_start();
        }
        disk.failed_blocks = 0;
        let bits = disk.bitmap.count();
        let rate = volume.config.disk.rate;
        volume.resync = Some(Resync::new(self.now, bits, Some(&rate)));
        let ix = volume.ix;
        let state = State { conn: Conn::SyncTarget, disk: Disk::Inconsistent, ..state };
        self.set_state(at, state, "resync");
        let text =
            format!("Began resync as SyncTarget (will sync {} KB [{bits} bits set]).", bits * 4);
        self.log(Level::Info, Scope::PeerDevice(ix), text);
        // Late notices are on the disk before the first copy is confirmed: the source forgets it
        // then (BM-1). And no block is overwritten before the disk says that it is Inconsistent.
        self.push_meta(at, MetaTask::Bitmap);
        self.save_superblock_gated(at);
        self.push_meta(at, MetaTask::Then(After::BeginTarget));
    }

    /// The operator wants everything synced: all bits are set and made durable on both nodes.
    pub(crate) fn begin_full_sync(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let Some(disk) = volume.disk.as_mut() else { return };
        disk.bitmap.set_all();
        disk.failed_blocks = 0;
        let state = volume.state;
        if state.conn == Conn::StartingSyncT {
            // Its data is given up. It may be of the peer's generation: should the resync not
            // begin, Outdated would count as equal after the next handshake (BM-1, RS-1).
            let state = State { disk: Disk::Inconsistent, ..state };
            self.set_state(at, state, "full sync");
        }
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Bitmap);
        self.push_meta(at, MetaTask::Then(After::FullSyncSet));
    }

    pub(crate) fn full_sync_set(&mut self, at: usize) {
        let state = self.volumes[at].state;
        let is_last =
            |disk: &LocalDisk| !disk.meta.tasks.contains(&MetaTask::Then(After::FullSyncSet));
        if !self.volumes[at].disk.as_ref().is_some_and(is_last) {
            // The full sync was begun anew meanwhile: its bits are not yet durable.
            return;
        }
        self.push_meta(at, MetaTask::Superblock);
        match state.conn {
            Conn::StartingSyncT => {
                let state = State { conn: Conn::WFSyncUUID, ..state };
                self.set_state(at, state, "full sync");
                self.take_early_sync_uuid(at);
            }
            Conn::StartingSyncS => self.prepare_source(at),
            _ => {}
        }
    }

    /// The source may have started before this node was ready.
    fn take_early_sync_uuid(&mut self, at: usize) {
        if let Some(uuid) = self.volumes[at].early_sync_uuid.take() {
            self.start_target(at, uuid);
        }
    }

    /// Whether the new part of a grown device is copied from here. Who has grown first, and is
    /// elected, says so with a generation; a role may change since. Two nodes may both be none: the
    /// next word of a role elects one.
    fn is_grow_source(&self, at: usize) -> bool {
        let volume = &self.volumes[at];
        let state = volume.state;
        let attached = volume.disk.as_ref().filter(|disk| disk.stage == Stage::Attached);
        let Some(disk) = attached.filter(|_| state.conn == Conn::Connected) else { return false };
        let own = disk.uuids.current;
        let follows = volume
            .peer_uuids
            .is_some_and(|peer| peer.uuids.bitmap.same(own) && !peer.uuids.current.same(own));
        let is_first = !disk.uuids.bitmap.is_zero();
        let have_disks = state.disk == Disk::UpToDate && state.pdsk == Disk::UpToDate;
        have_disks && (is_first || (self.is_elected(at) && !follows))
    }

    /// Of two equal disks, the one that counts where it does not matter which one does.
    fn is_elected(&self, at: usize) -> bool {
        let State { role, peer, .. } = self.volumes[at].state;
        if role == peer { self.link.is_resolver } else { role == Role::Primary }
    }

    /// Both disks are good and of one generation, yet there are marks: a growth was interrupted
    /// before anyone had begun to sync the new part, or what made the other disk old did not get
    /// to it. Who counts begins a generation and a resync of it (BM-1, BM-8, RS-1). Ours: the
    /// in-kernel driver only warns.
    pub(crate) fn sync_marks_of_equals(&mut self, at: usize) {
        let volume = &self.volumes[at];
        let state = volume.state;
        let (Some(disk), Some(peer)) = (volume.disk.as_ref(), volume.peer_uuids.as_ref()) else {
            return;
        };
        let is_connected = state.conn == Conn::Connected;
        let are_good = state.disk == Disk::UpToDate && state.pdsk == Disk::UpToDate;
        let are_equal = disk.uuids.current.same(peer.uuids.current)
            && disk.uuids.bitmap.is_zero()
            && peer.uuids.bitmap.is_zero();
        let (own, theirs) = (disk.bitmap.count(), peer.bits_set);
        let is_planned = volume.resync_after_grow || volume.grows_to.is_some();
        if !is_connected || !are_good || !are_equal || is_planned || own.max(theirs) == 0 {
            return;
        }
        // A mark is set by who has what the other one lacks.
        let one_knows = state.role == state.peer && (own == 0) != (theirs == 0);
        let is_source = if one_knows { own > 0 } else { self.is_elected(at) };
        if !is_source {
            return;
        }
        let ix = volume.ix;
        let text = format!(
            "both disks are of one generation, but {} blocks are marked: they are synced from here",
            own.max(theirs)
        );
        self.log(Level::Warn, Scope::PeerDevice(ix), text);
        self.new_current_uuid(at);
        self.send_uuids(at, false);
        self.set_state(at, State { conn: Conn::WFBitMapS, ..state }, "marked blocks");
        // It finds the same from the identifiers.
        let state = self.volumes[at].state;
        self.send_state(at, state);
    }

    /// This node grows by itself, and its peer is to follow: from now on they differ. If the new
    /// part is copied from here, the superblock with the new size is that of a new generation:
    /// whoever dies before the resync, the next handshake finds its direction (BM-8, RS-1). A peer
    /// that does not hear of it, and takes over, makes a split brain.
    pub(crate) fn grow_before_peer(&mut self, at: usize) {
        self.volumes[at].resync_after_grow = true;
        let is_shared = self.volumes[at].uuids().is_some_and(|uuids| uuids.bitmap.is_zero());
        if is_shared && self.is_grow_source(at) {
            self.new_current_uuid(at);
        }
    }

    /// Both nodes have grown: the new part is synced. Its target waits for the word of the source,
    /// whose superblock with the new size says that it is one (RS-1).
    pub(crate) fn start_grow_sync(&mut self, at: usize) {
        if self.volumes[at].resync_after_grow && self.is_grow_source(at) {
            self.volumes[at].resync_after_grow = false;
            self.prepare_source(at);
        }
    }

    /// Blocks whose resync failed stay marked (RS-5).
    pub(crate) fn resync_failed(&mut self, at: usize, range: SectorRange) {
        let volume = &mut self.volumes[at];
        volume.set_out_of_sync(range);
        if let Some(disk) = volume.disk.as_mut() {
            disk.failed_blocks += range.blocks_outward().len();
        }
        let ix = volume.ix;
        let text = format!("resync of {range} failed, the blocks stay marked");
        self.log(Level::Error, Scope::PeerDevice(ix), text);
        self.again = true;
    }

    /// Announces a changed size: asks a peer with a disk what becomes of it there, and tells one
    /// without how large the device is, or it took what our disk holds for that.
    pub(crate) fn announce_size(&mut self, at: usize, clean: bool) {
        let flags = if clean { SizesFlags::NO_RESYNC } else { SizesFlags::NONE };
        let asks = self.volumes[at].state.pdsk >= Disk::Negotiating;
        self.send_uuids(at, false);
        self.send_sizes(at, asks, flags);
    }
}

/// A map is told only when the generation in which it counts is on the disk: the peer adds the
/// marks to its own, and after a crash here nothing else would tell whose they are (GI-1). One that
/// failed and may have got there all the same has to be gone from it, too.
fn may_send_bitmap(volume: &Volume) -> bool {
    let is_on_disk = |disk: &LocalDisk| disk.durable_uuid.same(disk.uuids.current);
    let is_settled = volume.begun.is_none();
    volume.bitmap_out && is_settled && volume.disk.as_ref().is_some_and(is_on_disk)
}
