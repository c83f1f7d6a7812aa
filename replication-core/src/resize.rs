//! A changed size of the backing device, taken up while the volume is in use.
//!
//! Internal metadata lies at the end of the device and moves with it. Nothing is in flight while
//! it moves. The new areas may overlap the old ones, but the new superblock lies behind all of
//! them or in place of the old one: it goes first, and says that every bit counts as set. A crash
//! before it is durable leaves all of the old metadata at the old end, one after it a full sync,
//! until the superblock is written once more at the end (BM-8). Source: metadata notes, section 8.

use crate::action::Action;
use crate::event::{DiskInfo, VolumeIx};
use crate::handshake::{Sizes, agree_size};
use crate::limits;
use crate::resource::{Op, Resource};
use crate::state::{Conn, Disk};
use crate::units::{SECTORS_PER_BLOCK, Sector};
use crate::volume::{After, MetaTask};

impl Resource {
    /// Asks for the size of an open backing device.
    pub(crate) fn probe_disk(&mut self, at: usize) {
        let volume = self.volumes[at].ix;
        self.volumes[at].probed = None;
        let id = self.new_op(Op::ProbeDisk(volume));
        self.out.push(Action::ProbeDisk { id, volume });
    }

    pub(crate) fn on_disk_probed(&mut self, ix: VolumeIx, result: Result<DiskInfo, String>) {
        self.volumes[ix.at()].probed = Some(result);
        self.again = true;
    }

    /// The result of a probe, once.
    pub(crate) fn take_probe(&mut self, at: usize) -> Option<Result<DiskInfo, String>> {
        self.volumes[at].probed.take()
    }

    /// Takes up the size that the backing device has now. With `is_asked` by the operator the peer
    /// is to do so, too.
    ///
    /// # Errors
    /// Why not, for the operator; nothing was changed.
    pub(crate) fn apply_resize(
        &mut self,
        at: usize,
        info: DiskInfo,
        size: Option<Sector>,
        clean: bool,
        alone: bool,
        is_asked: bool,
    ) -> Result<(), String> {
        let volume = &self.volumes[at];
        let state = volume.state;
        let disk = volume.disk.as_ref().ok_or_else(|| String::from("the disk is gone"))?;
        let kind = volume.config.meta.ok_or_else(|| String::from("no metadata is configured"))?;
        let old = disk.geometry;
        let (stripes, stripe_size) = (old.al_stripes, old.al_stripe_size_4k);
        let geometry = crate::meta::Geometry::new(
            kind,
            info.data_sectors,
            info.meta_sectors,
            stripes,
            stripe_size,
        )
        .map_err(|e| e.to_string())?;
        let capacity = Sector(geometry.capacity.0.min(limits::MAX_DEVICE_SECTORS));
        let peer = volume.peer_sizes.unwrap_or_default();
        let peer_capacity = if alone && state.conn < Conn::Connected {
            capacity
        } else {
            Sector(peer.disk.min(limits::MAX_DEVICE_SECTORS))
        };
        let agreed = agree_size(&Sizes {
            own_capacity: capacity,
            peer_capacity,
            last_agreed: disk.superblock.la_size,
            own_user: size.or(volume.config.disk.size).unwrap_or(Sector(0)),
            peer_user: None,
            current: volume.size,
            disk: state.disk,
            handshaking: false,
            peer_was_diskless: false,
        })
        .map_err(|e| e.to_string())?;
        if agreed.user_is_too_large {
            return Err(format!(
                "requested size {} is too large, {} fit",
                agreed.user, agreed.size
            ));
        }
        let shrinks = agreed.size < volume.size;
        if shrinks && state.disk >= Disk::Outdated && size.is_none() {
            return Err(format!(
                "the device would shrink from {} to {}: name the size with --size",
                volume.size, agreed.size
            ));
        }
        if info.data_sectors < volume.size {
            return Err(format!(
                "the backing device has {} left, {} are in use",
                info.data_sectors, volume.size
            ));
        }
        self.move_metadata(at, info, geometry);
        self.volumes[at].unseen_size = None;
        if size.is_some() {
            self.volumes[at].config.disk.size = size;
        }
        let was = self.volumes[at].size;
        if agreed.size != was {
            self.resize_to(at, agreed.size, clean);
        }
        // The peer looks at its disk in turn: without anything new that would go on for ever.
        let is_news = agreed.size != was || geometry.capacity != old.capacity;
        if state.conn == Conn::Connected && (is_asked || is_news) {
            if agreed.size > was && !clean {
                self.grow_before_peer(at);
            }
            self.announce_size(at, clean);
        }
        Ok(())
    }

    /// Writes all metadata anew at the place that the new device size demands.
    fn move_metadata(&mut self, at: usize, info: DiskInfo, geometry: crate::meta::Geometry) {
        let Some(disk) = self.volumes[at].disk.as_mut() else { return };
        disk.info = info;
        let moves = disk.geometry.superblock != geometry.superblock
            || disk.geometry.bitmap != geometry.bitmap;
        disk.geometry = geometry;
        if !moves {
            return;
        }
        assert!(disk.log.is_quiet(), "nothing is in flight while metadata moves");
        disk.log.reset();
        disk.bitmap.mark_all_dirty();
        assert!(
            disk.bitmap.bits().div_ceil(SECTORS_PER_BLOCK * 4096)
                <= geometry.bitmap_sectors.div_ceil(SECTORS_PER_BLOCK).max(1),
            "the bitmap fits its new area"
        );
        assert!(disk.meta.tasks.is_empty(), "no metadata is written while its place changes");
        self.volumes[at].gate += 1;
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Bitmap);
        self.push_meta(at, MetaTask::InitLog);
        self.push_meta(at, MetaTask::CheckLog);
        self.push_meta(at, MetaTask::Then(After::Resized));
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Then(After::OpenGate));
    }
}
