//! The kernel's user-space block driver (ublk), driven directly through `io_uring`.
//!
//! Responsible for: the control device (create, configure, start, resize, recover, stop and
//! delete block devices) and the one queue of each device (parked commands, descriptors,
//! answers). Not responsible for: the ring that the queue's commands travel in, the buffers they
//! name, or what a request means; those belong to the engine.
//!
//! One queue per device, data copied by the kernel into and out of our buffers. Nothing here
//! owns a thread, so that one ring can serve all volumes of a resource beside its sockets.
//!
//! Life of a device: [`Control::add_device`], [`Control::set_params`], [`Queue::open`], a
//! [`Queue::fetch`] for every tag pushed into the ring, [`Control::start`] (from another thread,
//! as it returns only after the ring has served the partition scan), then for every wake-up
//! [`Queue::descriptor`] and [`Queue::commit_and_fetch`]; at the end [`Control::stop`] (again
//! from another thread), the queue dropped, [`Control::delete`]. After the death of the process a
//! new one replaces the first two steps by [`Control::start_recovery`] and [`Control::start`] by
//! [`Control::end_recovery`].
//!
//! What a new process may find under its number, by [`Control::get_info`]: nothing (make it);
//! [`DeviceState::Quiesced`] (recover it); [`DeviceState::Dead`], when the old process died before
//! the start or after the stop (delete it, then make it); [`DeviceState::Live`], when another
//! process serves it or is just dying ([`Control::start_recovery`] is [`UblkError::Busy`] until
//! that is over).
//!
//! Invariants: DUR-6 (a volatile cache and FUA are always announced).
//!
//! Source: the kernel's interface header for ublk (numbers and layouts), and the behaviour of
//! Linux 6.12 and 7.2 as seen in guests (`tests/guest/ublk_module.sh`).

mod control;
mod driver;
mod error;
mod params;
mod queue;
mod sys;

pub use control::{AddDevice, Control, DeviceInfo, DeviceState};
pub use driver::{become_io_flusher, load_driver};
pub use error::{Act, UblkError};
pub use params::{Discard, Params};
pub use queue::{IoDesc, Queue, Refused, Wakeup};
pub use sys::{Flags, MAX_IO_BYTES, MAX_QUEUE_DEPTH};

use std::fmt;
use std::path::PathBuf;

/// The number of a ublk device: the N of `/dev/ublkcN` and `/dev/ublkbN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

impl DeviceId {
    /// The character device, through which a process serves the block device.
    #[must_use]
    pub fn char_path(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkc{}", self.0))
    }

    /// The block device.
    #[must_use]
    pub fn block_path(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.0))
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/ublkb{}", self.0)
    }
}
