//! The host's side of the volumes: block devices through ublk, or an NBD server.
//!
//! Both hand requests of the host to the core and answers back, and both own the buffers of their
//! request slots. What differs is how a volume becomes visible to the host.

mod device;
mod links;
mod steps;

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use replication_core::config::{EngineConfig, Frontend as Choice};
use replication_core::control::Command;
use replication_core::event::{HostTag, VolumeIx};
use replication_core::units::{Errno, Sector};

use self::device::Devices;
pub use self::steps::DeviceNews;
use self::steps::Site;
use crate::engine::Shared;
use crate::holders::Users;
use crate::nbd::Server;
use crate::ring::{Completion, Ring};
use crate::worker::Mailbox;

/// What the host should see of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its size; zero: nothing.
    pub sectors: Sector,
    /// Smallest request in bytes.
    pub logical_block: u32,
    /// Bytes that the disk writes at once.
    pub physical_block: u32,
    /// Discards have an effect.
    pub discard: bool,
}

/// Removes the block devices that an engine which died has left. The caller knows that no engine
/// lives.
///
/// # Errors
/// One of them is in use, or the kernel does not let it go.
pub fn clear(config: &EngineConfig) -> Result<()> {
    if let Choice::Nbd(_) = config.frontend {
        return Ok(());
    }
    let users = Arc::default();
    for volume in (0_u8..).zip(&config.resource.volumes) {
        Site::new(config, volume, &users, Path::new("/dev")).clear()?;
    }
    Ok(())
}

/// One of the two ways to serve the host.
#[derive(Debug)]
pub enum Frontend {
    /// Block devices.
    Ublk(Devices),
    /// An NBD server.
    Nbd(Server),
}

impl Frontend {
    /// The frontend that was configured. The NBD server listens at once; block devices appear with
    /// their size.
    ///
    /// # Errors
    /// The NBD server cannot listen.
    pub fn new(
        config: &EngineConfig,
        users: Arc<Users>,
        mailbox: &Mailbox,
        ring: &mut Ring,
    ) -> Result<Self> {
        match &config.frontend {
            Choice::Ublk => {
                Ok(Self::Ublk(Devices::new(config, users, mailbox.clone(), Path::new("/dev"))))
            }
            Choice::Nbd(address) => {
                let (depth, size) = (config.queue_depth, config.max_io_size);
                let server = Server::new(address, &config.resource, depth, size, users, ring)?;
                Ok(Self::Nbd(server))
            }
        }
    }

    /// Makes a volume visible, changes its size, or takes it away.
    pub fn set_shape(&mut self, volume: VolumeIx, shape: Shape) {
        match self {
            Self::Ublk(devices) => devices.set_shape(volume, shape),
            Self::Nbd(server) => server.set_size(volume, shape.sectors, shape.logical_block),
        }
    }

    /// Takes note of what the metadata of a volume says about the time of the last engine.
    pub fn set_was_primary(&mut self, volume: VolumeIx, was_primary: bool) {
        match self {
            Self::Ublk(devices) => devices.set_was_primary(volume, was_primary),
            // Clients have to come again in any case, and find out what this node is now.
            Self::Nbd(_) => {}
        }
    }

    /// Whether a disk can serve what the host was promised.
    ///
    /// # Errors
    /// The host was told of smaller blocks than the disk has; the text says so.
    pub fn check_block_size(&self, volume: VolumeIx, logical_block: u32) -> Result<(), String> {
        match self {
            Self::Ublk(devices) => devices.check_block_size(volume, logical_block),
            // Requests are checked against the disk that is there when they come.
            Self::Nbd(_) => Ok(()),
        }
    }

    /// Why the process has to end, so that another one can take the devices over.
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        match self {
            Self::Ublk(devices) => devices.failure(),
            Self::Nbd(_) => None,
        }
    }

    /// A request was carried out, or failed.
    pub fn complete(
        &mut self,
        shared: &mut Shared,
        volume: VolumeIx,
        tag: HostTag,
        result: Result<(), Errno>,
    ) {
        match self {
            Self::Ublk(devices) => devices.complete(shared, volume, tag, result),
            Self::Nbd(server) => server.complete(shared, volume, tag, result),
        }
    }

    /// Does what can be done without waiting. Whether there was anything.
    pub fn pump(&mut self, shared: &mut Shared) -> bool {
        match self {
            Self::Ublk(devices) => devices.pump(shared),
            Self::Nbd(server) => server.pump(shared),
        }
    }

    /// Sends what was queued.
    pub fn flush(&mut self, shared: &mut Shared) {
        match self {
            Self::Ublk(_) => {}
            Self::Nbd(server) => {
                let now = shared.now();
                server.flush(&mut shared.ring, now);
            }
        }
    }

    /// A request of a block device has come, or its device stops.
    pub fn on_command(
        &mut self,
        shared: &mut Shared,
        volume: VolumeIx,
        tag: HostTag,
        completion: &Completion,
    ) {
        match self {
            Self::Ublk(devices) => devices.on_command(shared, volume, tag, completion),
            Self::Nbd(_) => panic!("the NBD server has no block devices"),
        }
    }

    /// A helper thread has news about a block device.
    pub fn on_news(&mut self, shared: &mut Shared, news: DeviceNews) {
        match self {
            Self::Ublk(devices) => devices.on_news(shared, news),
            Self::Nbd(_) => panic!("the NBD server has no block devices"),
        }
    }

    /// A command that the frontend wants carried out: a device that outlived an engine of a
    /// Primary needs this node to be Primary again.
    pub fn next_command(&mut self, shared: &Shared) -> Option<Command> {
        match self {
            Self::Ublk(devices) => devices.next_command(shared),
            Self::Nbd(_) => None,
        }
    }

    /// The answer to it, in words if it was refused.
    pub fn on_reply(&mut self, shared: &mut Shared, result: Result<(), String>) {
        match self {
            Self::Ublk(devices) => devices.on_reply(shared, result),
            Self::Nbd(_) => panic!("the NBD server has no wishes"),
        }
    }

    /// When [`Frontend::pump`] or [`Frontend::next_command`] may find something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<replication_core::units::Time> {
        match self {
            Self::Ublk(devices) => devices.next_deadline(),
            Self::Nbd(server) => server.next_deadline(),
        }
    }

    /// Whether the host's requests for a volume are taken.
    #[must_use]
    pub fn is_serving(&self, volume: VolumeIx) -> bool {
        match self {
            Self::Ublk(devices) => devices.is_live(volume),
            // It listens from its first moment on.
            Self::Nbd(_) => true,
        }
    }

    /// Takes everything away from the host.
    pub fn stop(&mut self, ring: &mut Ring) {
        match self {
            Self::Ublk(devices) => devices.stop(),
            Self::Nbd(server) => server.stop(ring),
        }
    }

    /// Whether nothing is left after [`Frontend::stop`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        match self {
            Self::Ublk(devices) => devices.is_stopped(),
            Self::Nbd(server) => server.is_stopped(),
        }
    }
}
