//! Steps in the life of a block device that block, each run on a helper thread.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replication_core::config::{EngineConfig, VolumeConfig};
use replication_core::event::VolumeIx;
use replication_core::limits::MAX_DISCARD_SIZE_OLD;

use super::Shape;
use super::links::Links;
use crate::holders::{self, Usage, Users};
use crate::patience::patiently;
use crate::ublk::{
    AddDevice, Control, DeviceId, DeviceInfo, DeviceState, Discard, Flags, Params, Queue,
    UblkError, load_driver,
};

/// How often and how long a device of a process that is still ending is tried again.
const RECOVERY_TRIES: u32 = 100;
const RECOVERY_PAUSE: Duration = Duration::from_millis(100);
/// How long the kernel may take to notice that the process of a device has died.
const DEATH_LIMIT: Duration = Duration::from_secs(10);

/// Most sectors of a discard or of zeroes: every peer takes this much at once, and it touches at
/// most two activity-log extents.
const MAX_ZEROES_SECTORS: u32 = MAX_DISCARD_SIZE_OLD / 512;

/// The end of a step.
#[derive(Debug)]
pub enum DeviceNews {
    /// The device exists and its queue is open.
    Added {
        /// Whose.
        volume: VolumeIx,
        /// The device.
        result: Result<Added>,
    },
    /// The block device is there.
    Started {
        /// Whose.
        volume: VolumeIx,
        /// Whether it worked.
        result: Result<()>,
    },
    /// The size was changed, or not.
    Resized {
        /// Whose.
        volume: VolumeIx,
        /// What came of it.
        result: Result<Resize>,
    },
    /// The device was stopped.
    Stopped {
        /// Whose.
        volume: VolumeIx,
        /// Whether it worked.
        result: Result<()>,
    },
    /// The device does not exist any more.
    Deleted {
        /// Whose.
        volume: VolumeIx,
        /// Whether it worked.
        result: Result<()>,
    },
}

/// A device that exists.
#[derive(Debug)]
pub struct Added {
    /// Its queue.
    pub queue: Queue,
    /// What the host sees.
    pub shape: Shape,
    /// It was left by a process that died, and requests wait in it: who waits for them.
    pub recovered: Option<Usage>,
}

/// What came of a resize.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resize {
    /// It has the new size.
    Done,
    /// The kernel cannot do it live, and nobody uses the device: make it anew.
    Recreate,
    /// The kernel cannot do it live, and somebody uses the device.
    InUse(String),
}

/// What all steps of a volume need.
#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) volume: VolumeIx,
    pub(super) minor: u32,
    pub(super) queue_depth: u16,
    pub(super) max_io_size: u32,
    pub(super) links: Links,
    pub(super) users: Arc<Users>,
}

impl Site {
    /// The site of a volume, with its links in `dev`.
    pub(super) fn new(
        config: &EngineConfig,
        volume: (u8, &VolumeConfig),
        users: &Arc<Users>,
        dev: &Path,
    ) -> Self {
        let (index, volume) = volume;
        Self {
            volume: VolumeIx(index),
            minor: volume.minor,
            queue_depth: config.queue_depth,
            max_io_size: config.max_io_size,
            links: Links::new(dev, &config.resource.name, volume.nr.0, volume.minor),
            users: Arc::clone(users),
        }
    }

    /// Makes a device, or takes over the one that an engine which died has left.
    pub(super) fn add(&self, shape: Shape) -> Result<Added> {
        let context = || format!("make block device of minor {}", self.minor);
        load_driver().with_context(context)?;
        let mut control = Control::open().with_context(context)?;
        if let Some(id) = self.links.target()
            && let Some(added) = self.recover(&mut control, id)?
        {
            return Ok(added);
        }
        let info = self.add_new(&mut control).with_context(context)?;
        let params = self.params(shape);
        let opened = control
            .set_params(info.id, &params)
            .and_then(|()| Queue::open(&info))
            .with_context(context);
        match opened {
            Ok(queue) => Ok(Added { queue, shape, recovered: None }),
            Err(error) => {
                control.delete(info.id).with_context(|| format!("remove {}", info.id))?;
                Err(error)
            }
        }
    }

    fn add_new(&self, control: &mut Control) -> Result<DeviceInfo, UblkError> {
        let flags = control.features().and(Flags::UPDATE_SIZE | Flags::NO_AUTO_PART_SCAN);
        let wanted = AddDevice {
            id: Some(DeviceId(self.minor)),
            queue_depth: self.queue_depth,
            max_io_bytes: self.max_io_size,
            flags,
        };
        match control.add_device(wanted) {
            // The number belongs to somebody else; the links show the way to another one.
            Err(UblkError::Exists { .. }) => control.add_device(AddDevice { id: None, ..wanted }),
            result => result,
        }
    }

    fn recover(&self, control: &mut Control, id: DeviceId) -> Result<Option<Added>> {
        let context = || format!("take over {id}");
        let Some(info) = self.find(control, id).with_context(context)? else {
            return Ok(None);
        };
        match info.state {
            DeviceState::Dead => {
                control.delete(id).with_context(|| format!("remove {id}, left unfinished"))?;
                self.forget(id);
                return Ok(None);
            }
            DeviceState::Live | DeviceState::Quiesced | DeviceState::FailIo => {}
        }
        ensure!(
            info.queue_depth <= self.queue_depth && info.max_io_bytes <= self.max_io_size,
            "take over {id}: it was made with queue depth {} and requests of {} bytes; \
             configure at least as much",
            info.queue_depth,
            info.max_io_bytes
        );
        // It may be mounted, and its requests wait: nobody may take it away as a device that is
        // not in use, also while it waits for this node to become Primary.
        self.users.set_device(self.volume.at(), Some(id.block_path()));
        start_recovery(control, id).with_context(context)?;
        let params = control.get_params(id).with_context(context)?;
        let queue = Queue::open(&info).with_context(context)?;
        let usage = holders::usage_of_block_path(&id.block_path());
        let shape = Shape {
            sectors: params.sectors,
            logical_block: params.logical_block,
            physical_block: params.physical_block,
            discard: params.discard.is_some(),
        };
        Ok(Some(Added { queue, shape, recovered: Some(usage) }))
    }

    /// The device that our links point to. Links that show the way to no device, or to one that
    /// is not ours, are removed.
    fn find(&self, control: &mut Control, id: DeviceId) -> Result<Option<DeviceInfo>, UblkError> {
        let info = match control.get_info(id) {
            Ok(info) => info,
            Err(UblkError::NoDevice { .. }) => {
                self.forget(id);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let is_ours = match info.state {
            // It may have no parameters yet; but then its maker is about to open it.
            DeviceState::Dead => has_our_form(&info) && holders::of_path(&id.char_path()).is_none(),
            DeviceState::Live | DeviceState::Quiesced | DeviceState::FailIo => {
                has_our_form(&info) && has_our_limits(&control.get_params(id)?)
            }
        };
        if is_ours {
            return Ok(Some(info));
        }
        tracing::warn!("{id} is not a device of ours, though our links point to it");
        self.forget(id);
        Ok(None)
    }

    /// Removes a device that no engine has taken over since the last one died. It is not in use,
    /// as those know who want the resource to end.
    pub(super) fn remove_left(&self, id: DeviceId) -> Result<()> {
        let context = || format!("remove {id}, which an engine that died has left");
        let mut control = Control::open().with_context(context)?;
        let Some(info) = self.find(&mut control, id).with_context(context)? else {
            return Ok(());
        };
        if info.state != DeviceState::Dead {
            control.stop(id).with_context(context)?;
        }
        control.delete(id).with_context(context)?;
        self.forget(id);
        Ok(())
    }

    /// Removes the device that an engine which died has left, if nobody uses it. No engine lives.
    pub(super) fn clear(&self) -> Result<()> {
        let Some(id) = self.links.target() else {
            return Ok(());
        };
        self.users.set_device(self.volume.at(), Some(id.block_path()));
        if let Some(holder) = self.users.certainly_of_volume(self.volume.at()) {
            bail!("{id} is in use ({holder}): its requests wait for the next engine");
        }
        let mut control = Control::open().with_context(|| format!("look at {id}"))?;
        // A process that was killed is gone before the kernel has taken its requests back.
        let look = || match control.get_info(id) {
            Ok(info) if info.state == DeviceState::Live => Err(()),
            Ok(_) | Err(_) => Ok(()),
        };
        if patiently(Instant::now() + DEATH_LIMIT, look, |()| true).is_err() {
            bail!("{id} is still served by a process");
        }
        self.remove_left(id)
    }

    fn forget(&self, id: DeviceId) {
        self.links.remove(id);
        self.users.set_device(self.volume.at(), None);
    }

    fn params(&self, shape: Shape) -> Params {
        let max_sectors = MAX_ZEROES_SECTORS;
        let granularity = shape.physical_block.max(4096);
        Params {
            sectors: shape.sectors,
            logical_block: shape.logical_block,
            physical_block: shape.physical_block.max(shape.logical_block),
            max_io_bytes: self.max_io_size,
            discard: shape.discard.then_some(Discard { granularity, max_sectors }),
            max_zeroes_sectors: max_sectors,
            rotational: false,
        }
    }

    /// Lets the block device appear, with its links.
    pub(super) fn start(&self, id: DeviceId, recovered: bool) -> Result<()> {
        let mut control = Control::open().with_context(|| format!("start {id}"))?;
        let pid = std::process::id();
        self.users.set_device(self.volume.at(), Some(id.block_path()));
        if !recovered {
            self.links.disown(id);
        }
        // Before anybody can use it: by its links the next engine finds it if this one dies.
        if let Err(error) = self.links.set(id) {
            tracing::warn!("{id}: {error:#}");
        }
        if recovered {
            control.end_recovery(id, pid).with_context(|| format!("take over {id}"))
        } else {
            control.start(id, pid).with_context(|| format!("start {id}"))
        }
    }

    /// Changes the size.
    pub(super) fn resize(&self, id: DeviceId, shape: Shape) -> Result<Resize> {
        let mut control = Control::open().with_context(|| format!("resize {id}"))?;
        match control.update_size(id, shape.sectors) {
            Ok(()) => Ok(Resize::Done),
            Err(UblkError::Unsupported { .. }) => {
                match self.users.certainly_of_volume(self.volume.at()) {
                    Some(holder) => Ok(Resize::InUse(holder)),
                    None => Ok(Resize::Recreate),
                }
            }
            Err(error) => Err(error).with_context(|| format!("resize {id}")),
        }
    }

    /// Lets the block device vanish, with its links.
    pub(super) fn stop(&self, id: DeviceId) -> Result<()> {
        let mut control = Control::open().with_context(|| format!("stop {id}"))?;
        control.stop(id).with_context(|| format!("stop {id}"))?;
        self.forget(id);
        Ok(())
    }

    /// Removes the device.
    pub(super) fn delete(id: DeviceId) -> Result<()> {
        let mut control = Control::open().with_context(|| format!("remove {id}"))?;
        control.delete(id).with_context(|| format!("remove {id}"))
    }
}

/// Whether a device could have been made by [`Site::add_new`].
fn has_our_form(info: &DeviceInfo) -> bool {
    info.queues == 1 && info.flags.contains(Flags::RECOVERY)
}

/// Whether the limits of a device are those of [`Site::params`], which no other server of block
/// devices has any reason to choose. The size is no evidence: the peer may have changed it.
fn has_our_limits(params: &Params) -> bool {
    let ours = MAX_ZEROES_SECTORS;
    params.max_zeroes_sectors == ours
        && params.discard.is_none_or(|discard| discard.max_sectors == ours)
}

/// The kernel refuses while it has not yet noticed that the old process is gone.
fn start_recovery(control: &mut Control, id: DeviceId) -> Result<(), UblkError> {
    for _ in 1..RECOVERY_TRIES {
        match control.start_recovery(id) {
            Err(UblkError::Busy { .. }) => std::thread::sleep(RECOVERY_PAUSE),
            result => return result,
        }
    }
    control.start_recovery(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_core::units::Sector;

    #[test]
    fn a_device_of_another_server_is_not_taken_for_ours() {
        let ours = DeviceInfo {
            id: DeviceId(0),
            queues: 1,
            queue_depth: 128,
            max_io_bytes: 1 << 20,
            state: DeviceState::Quiesced,
            pid: -1,
            flags: Flags::RECOVERY | Flags::UPDATE_SIZE,
        };
        assert!(has_our_form(&ours));
        assert!(!has_our_form(&DeviceInfo { queues: 2, ..ours }));
        assert!(!has_our_form(&DeviceInfo { flags: Flags::USER_RECOVERY, ..ours }));
        let site = Site {
            volume: VolumeIx(0),
            minor: 0,
            queue_depth: 128,
            max_io_size: 1 << 20,
            links: Links::new(Path::new("/nowhere"), "r0", 0, 0),
            users: Arc::default(),
        };
        for discard in [false, true] {
            let (logical_block, physical_block) = (512, 4096);
            let shape = Shape { sectors: Sector(8), logical_block, physical_block, discard };
            let params = site.params(shape);
            assert!(has_our_limits(&params));
            assert!(!has_our_limits(&Params { max_zeroes_sectors: 0, ..params }));
        }
    }
}
