//! Steps in the life of a block device that block, each run on a helper thread.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use replication_core::event::VolumeIx;
use replication_core::limits::MAX_DISCARD_SIZE_OLD;
use replication_core::units::SECTOR_SIZE;

use super::Shape;
use super::links::Links;
use crate::holders::Users;
use crate::ublk::{
    AddDevice, Control, DeviceId, DeviceInfo, DeviceState, Discard, Flags, Params, Queue,
    UblkError, load_driver,
};

/// How often and how long a device of a process that is still ending is tried again.
const RECOVERY_TRIES: u32 = 100;
const RECOVERY_PAUSE: Duration = Duration::from_millis(100);

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
    /// It was left by a process that died; requests wait in it.
    pub recovered: bool,
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
            Ok(queue) => Ok(Added { queue, shape, recovered: false }),
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
        let info = match control.get_info(id) {
            Ok(info) => info,
            Err(UblkError::NoDevice { .. }) => return Ok(None),
            Err(error) => return Err(error).with_context(context),
        };
        match info.state {
            DeviceState::Dead => {
                control.delete(id).with_context(|| format!("remove {id}, left unfinished"))?;
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
        start_recovery(control, id).with_context(context)?;
        let params = control.get_params(id).with_context(context)?;
        let queue = Queue::open(&info).with_context(context)?;
        // It may be mounted, and its requests wait: nobody may take it away as a device that is
        // not in use, also while it waits for this node to become Primary.
        self.users.set_device(self.volume.at(), Some(id.block_path()));
        let shape = Shape {
            sectors: params.sectors,
            logical_block: params.logical_block,
            physical_block: params.physical_block,
            discard: params.discard.is_some(),
        };
        Ok(Some(Added { queue, shape, recovered: true }))
    }

    fn params(&self, shape: Shape) -> Params {
        let sector = u32::try_from(SECTOR_SIZE).expect("512");
        // Every peer takes this much at once, and it touches at most two activity-log extents.
        let max_sectors = MAX_DISCARD_SIZE_OLD / sector;
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
        if recovered {
            control.end_recovery(id, pid).with_context(|| format!("take over {id}"))?;
        } else {
            control.start(id, pid).with_context(|| format!("start {id}"))?;
        }
        self.users.set_device(self.volume.at(), Some(id.block_path()));
        if let Err(error) = self.links.set(id) {
            tracing::warn!("{id}: {error:#}");
        }
        Ok(())
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
        self.links.remove(id);
        self.users.set_device(self.volume.at(), None);
        let mut control = Control::open().with_context(|| format!("stop {id}"))?;
        control.stop(id).with_context(|| format!("stop {id}"))
    }

    /// Removes the device.
    pub(super) fn delete(id: DeviceId) -> Result<()> {
        let mut control = Control::open().with_context(|| format!("remove {id}"))?;
        control.delete(id).with_context(|| format!("remove {id}"))
    }
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
