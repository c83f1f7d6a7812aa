//! What the operator configured, with units converted and ranges checked.
//!
//! These types are plain data. The language of the configuration files, its spellings and its
//! defaults' texts belong to the operator's tool; here live the values that the core and the
//! engine work with. Defaults are those of the in-tree driver unless said otherwise.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::meta::MetaKind;
use crate::split_brain::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, RrConflict};
use crate::state::{Fencing, OnNoData};
use crate::units::{Sector, Span, VolumeNr};
use crate::wire::{HmacAlg, ReplicationProtocol};

/// Mutual authentication at connect time.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authentication {
    /// The keyed hash.
    pub alg: HmacAlg,
    /// The shared secret, without a terminating NUL; at most 63 bytes.
    pub secret: String,
}

impl std::fmt::Debug for Authentication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authentication({:?}, secret not shown)", self.alg)
    }
}

/// The connection to the peer (`net` section).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// When a write is acknowledged.
    pub protocol: ReplicationProtocol,
    /// The peer must answer a request within this time; the unit of `ko_count`.
    pub timeout: Span,
    /// Idle time before a keep-alive.
    pub ping_int: Span,
    /// Time for the answer to a keep-alive.
    pub ping_timeout: Span,
    /// Time between attempts to connect.
    pub connect_int: Span,
    /// Pause before the check of a fresh pair of sockets; zero stands for `ping_timeout`.
    pub socket_check_timeout: Span,
    /// After this many `timeout`s without progress the peer is given up; zero: never.
    pub ko_count: u32,
    /// Writes between two barriers.
    pub max_epoch_size: u32,
    /// Receive buffers in 4 KiB pages.
    pub max_buffers: u32,
    /// Socket send buffer in bytes; zero: the system's choice.
    pub sndbuf_size: u32,
    /// Socket receive buffer in bytes; zero: the system's choice.
    pub rcvbuf_size: u32,
    /// Authentication, if configured.
    pub auth: Option<Authentication>,
    /// Split-brain policy without a Primary.
    pub after_sb_0pri: AfterSb0Pri,
    /// Split-brain policy with one Primary.
    pub after_sb_1pri: AfterSb1Pri,
    /// Split-brain policy with two Primaries.
    pub after_sb_2pri: AfterSb2Pri,
    /// What to do when the resync would overwrite a Primary.
    pub rr_conflict: RrConflict,
    /// Apply the policies also to ambiguous histories.
    pub always_asbp: bool,
    /// Compress the bitmap exchange.
    pub use_rle: bool,
    /// Cork the data socket while there is more to send.
    pub tcp_cork: bool,
    /// A host flush waits until the peer is durable too. `None`: yes for protocol C, else no.
    pub flush_wait_peer: Option<bool>,
    /// Digest of online verify, announced to the peer; empty: none.
    pub verify_alg: String,
    /// Fencing policy.
    pub fencing: Fencing,
    /// When both nodes dial at once, this one keeps its own attempt. The two nodes must differ:
    /// the edge compares their addresses (WP-7).
    pub keeps_own_dial: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            protocol: ReplicationProtocol::C,
            timeout: Span::from_tenths(60),
            ping_int: Span::from_secs(10),
            ping_timeout: Span::from_tenths(5),
            connect_int: Span::from_secs(10),
            socket_check_timeout: Span::ZERO,
            ko_count: 7,
            max_epoch_size: 2048,
            max_buffers: 2048,
            sndbuf_size: 0,
            rcvbuf_size: 0,
            auth: None,
            after_sb_0pri: AfterSb0Pri::Disconnect,
            after_sb_1pri: AfterSb1Pri::Disconnect,
            after_sb_2pri: AfterSb2Pri::Disconnect,
            rr_conflict: RrConflict::Disconnect,
            always_asbp: false,
            use_rle: true,
            tcp_cork: true,
            flush_wait_peer: None,
            verify_alg: String::new(),
            fencing: Fencing::DontCare,
            keeps_own_dial: false,
        }
    }
}

impl NetConfig {
    /// Whether a host flush waits for the peer (design decision 6).
    #[must_use]
    pub fn flush_waits_for_peer(&self) -> bool {
        self.flush_wait_peer.unwrap_or(self.protocol == ReplicationProtocol::C)
    }
}

/// What a local I/O error leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnIoError {
    /// Mark the blocks out of sync, report the error if the peer cannot help.
    PassOn,
    /// Give up the disk and go on with the peer's.
    Detach,
    /// The same, and the operator's handler `local-io-error` runs.
    CallLocalIoError,
}

impl OnIoError {
    /// Whether the disk is given up.
    #[must_use]
    pub const fn detaches(self) -> bool {
        match self {
            Self::PassOn => false,
            Self::Detach | Self::CallLocalIoError => true,
        }
    }
}

/// The resync controller (`resync-rate`, `c-*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateConfig {
    /// Fixed rate, or first value of the controller, KiB/s.
    pub resync_rate_kib: u32,
    /// Length of the plan in tenths of a second; zero: fixed rate.
    pub plan_ahead: u32,
    /// Wanted delay in tenths of a second, used when `fill_target_sectors` is zero.
    pub delay_target: u32,
    /// Wanted amount in flight, sectors.
    pub fill_target_sectors: u32,
    /// Upper bound, KiB/s; zero: none.
    pub max_rate_kib: u32,
    /// Below this rate, KiB/s, resync does not give way to the host; zero: it never gives way.
    pub min_rate_kib: u32,
}

impl Default for RateConfig {
    fn default() -> Self {
        Self {
            resync_rate_kib: 250,
            plan_ahead: 20,
            delay_target: 10,
            fill_target_sectors: 100,
            max_rate_kib: 102_400,
            min_rate_kib: 250,
        }
    }
}

/// The local disk (`disk` section).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Use only this much of the device; `None`: all of it.
    pub size: Option<Sector>,
    /// What a local I/O error leads to.
    pub on_io_error: OnIoError,
    /// Flush the disk between write epochs of the peer.
    pub disk_flushes: bool,
    /// Wait for the writes of an epoch before those of the next. Only with this off and
    /// `disk_flushes` off epochs are not kept apart on the disk.
    pub disk_drain: bool,
    /// Flush the disk with metadata writes.
    pub md_flushes: bool,
    /// Slots of the activity log.
    pub al_extents: u16,
    /// Write the activity log.
    pub al_updates: bool,
    /// Resync speed.
    pub rate: RateConfig,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            size: None,
            on_io_error: OnIoError::Detach,
            disk_flushes: true,
            disk_drain: true,
            md_flushes: true,
            al_extents: limits::AL_EXTENTS_DEFAULT,
            al_updates: true,
            rate: RateConfig::default(),
        }
    }
}

/// One volume, as far as the core is concerned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// Its number, unique in the resource.
    pub nr: VolumeNr,
    /// Device minor number, for log lines.
    pub minor: u32,
    /// Where the metadata lies; `None`: this node has no disk for the volume.
    pub meta: Option<MetaKind>,
    /// Disk options.
    pub disk: DiskConfig,
}

/// A resource with one peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceConfig {
    /// The resource's name.
    pub name: String,
    /// The peer's host name, for log lines and status.
    pub peer: String,
    /// Connection options.
    pub net: NetConfig,
    /// What to do when no good copy is left.
    pub on_no_data: OnNoData,
    /// The volumes in ascending order of their number.
    pub volumes: Vec<VolumeConfig>,
}

/// How the host reaches the volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frontend {
    /// `/dev/ublkbMINOR`.
    Ublk,
    /// An NBD server; one export per volume, named by the volume number.
    Nbd(NbdAddress),
}

/// Where the NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NbdAddress {
    /// A unix socket.
    Unix(String),
    /// A loopback TCP address.
    Tcp(SocketAddr),
}

/// Files of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingConfig {
    /// The data device or file; `None`: this node has no disk for the volume.
    pub disk: Option<String>,
    /// The metadata device or file, if it is another one than `disk`.
    pub meta_disk: Option<String>,
}

/// The operator's programs (`handlers` section): what the engine runs when something happens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandlersConfig {
    /// Command line for the shell, after a local I/O error with
    /// [`OnIoError::CallLocalIoError`]. `None`: nothing runs, here and below.
    pub local_io_error: Option<String>,
    /// Whenever a split brain is found, even if a policy or the operator has solved it already.
    pub initial_split_brain: Option<String>,
    /// When a split brain is found that nothing solves.
    pub split_brain: Option<String>,
    /// When a Primary is left with an Inconsistent disk and no peer.
    pub pri_on_incon_degr: Option<String>,
    /// When a resync to this node is done.
    pub after_resync_target: Option<String>,
    /// Names and values that every handler finds in its environment.
    pub environment: Vec<(String, String)>,
}

/// Everything an engine process needs to run one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineConfig {
    /// The part for the core.
    pub resource: ResourceConfig,
    /// This node's name: the host section that was chosen.
    pub node: String,
    /// Files, in the order of `resource.volumes`.
    pub backing: Vec<BackingConfig>,
    /// The operator's programs.
    #[serde(default)]
    pub handlers: HandlersConfig,
    /// Address to listen on and to connect from.
    pub local: SocketAddr,
    /// The peer's address.
    pub remote: SocketAddr,
    /// How the host reaches the volumes.
    pub frontend: Frontend,
    /// Requests in flight per volume, 1..=4096.
    pub queue_depth: u16,
    /// Largest host request in bytes, a multiple of 4096, 4096..=1048576.
    pub max_io_size: u32,
    /// Directory for the control socket and the lock of this resource.
    pub run_dir: String,
}

/// The file that remembers the sizes of a volume's data device ([`KnownSizes`]), so that internal
/// metadata is found when the device has grown while no engine ran. It has to survive a restart of
/// the host: it is below `/var/lib/drbd` where run-time files are below `/run/drbd`, else beside
/// them.
///
/// [`KnownSizes`]: crate::meta::KnownSizes
#[must_use]
pub fn known_sizes_path(run_dir: &Path, resource: &str, volume: VolumeNr) -> PathBuf {
    let dir = match run_dir.strip_prefix("/run/drbd") {
        Ok(node) => Path::new("/var/lib/drbd").join(node),
        Err(_) => run_dir.to_owned(),
    };
    dir.join(format!("{resource}-{volume}.sizes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What survives is kept apart from what need not, for each node of a host.
    #[test]
    fn sizes_are_kept_where_they_survive() {
        let path = |dir: &str| known_sizes_path(Path::new(dir), "r0", VolumeNr(1));
        assert_eq!(path("/run/drbd"), Path::new("/var/lib/drbd/r0-1.sizes"));
        assert_eq!(path("/run/drbd/bob"), Path::new("/var/lib/drbd/bob/r0-1.sizes"));
        assert_eq!(path("/tmp/x/run"), Path::new("/tmp/x/run/r0-1.sizes"));
    }
}
