//! With which options the nodes run. Sizes are small, so that limits are reached at once.

use replication_core::config::{DiskConfig, NetConfig, ResourceConfig, VolumeConfig};
use replication_core::meta::{Geometry, MetaKind};
use replication_core::state::OnNoData;
use replication_core::units::{Sector, Span, VolumeNr};
use replication_core::wire::ReplicationProtocol;

use super::net::Speed;

/// Sectors of a MiB.
pub const MIB: u64 = 2048;

/// The devices of one volume on one node.
#[derive(Clone, Debug)]
pub struct Devices {
    /// Sectors of the data device.
    pub data: u64,
    /// Sectors of the metadata device, if it is another one.
    pub meta: Option<u64>,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeSetup {
    /// The configuration of the core.
    pub config: ResourceConfig,
    /// Devices in the order of the volumes.
    pub devices: Vec<Devices>,
    /// Request slots for each volume.
    pub queue_depth: u16,
    /// Pages of each slot: bounds the largest request.
    pub slot_pages: u32,
    /// Pages of the core's pool.
    pub pool_pages: u32,
    /// Least and most time of a disk operation.
    pub disk_time: (Span, Span),
    /// The rule that its core breaks.
    #[cfg(feature = "mutants")]
    pub mutant: Option<replication_core::mutant::Mutant>,
}

/// Both nodes and the network.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The nodes.
    pub nodes: [NodeSetup; 2],
    /// The network.
    pub speed: Speed,
}

impl Default for Setup {
    /// One volume of 8 MiB with internal metadata, protocol C, 64 slots of activity log.
    fn default() -> Self {
        Self {
            nodes: [node("alpha", "beta", true), node("beta", "alpha", false)],
            speed: Speed::default(),
        }
    }
}

fn node(_own: &str, peer: &str, keeps_own_dial: bool) -> NodeSetup {
    let net = NetConfig {
        ping_int: Span::from_secs(2),
        ping_timeout: Span::from_ms(500),
        connect_int: Span::from_secs(3),
        keeps_own_dial,
        ..NetConfig::default()
    };
    let config = ResourceConfig {
        name: String::from("r0"),
        peer: String::from(peer),
        net,
        on_no_data: OnNoData::IoError,
        volumes: vec![volume(0)],
    };
    NodeSetup {
        config,
        devices: vec![Devices { data: 8 * MIB, meta: None }],
        queue_depth: 8,
        slot_pages: 32,
        pool_pages: 1024,
        disk_time: (Span(20_000), Span(800_000)),
        #[cfg(feature = "mutants")]
        mutant: None,
    }
}

fn volume(nr: u16) -> VolumeConfig {
    let disk = DiskConfig { al_extents: 64, ..DiskConfig::default() };
    VolumeConfig { nr: VolumeNr(nr), minor: u32::from(nr), meta: Some(MetaKind::Internal), disk }
}

impl Setup {
    /// The default setup, changed.
    #[must_use]
    pub fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut setup = Self::default();
        change(&mut setup);
        setup
    }

    /// Data devices of this many sectors on both nodes, for every volume.
    pub fn size(&mut self, sectors: u64) {
        for node in &mut self.nodes {
            for devices in &mut node.devices {
                devices.data = sectors;
            }
        }
    }

    /// The replication protocol of both nodes.
    pub fn protocol(&mut self, protocol: ReplicationProtocol) {
        self.net(|net| net.protocol = protocol);
    }

    /// Changes the connection options of both nodes.
    pub fn net(&mut self, change: impl Fn(&mut NetConfig)) {
        for node in &mut self.nodes {
            change(&mut node.config.net);
        }
    }

    /// Changes the disk options of every volume of both nodes.
    pub fn disk(&mut self, change: impl Fn(&mut DiskConfig)) {
        for node in &mut self.nodes {
            for volume in &mut node.config.volumes {
                change(&mut volume.disk);
            }
        }
    }

    /// A second volume like the first on both nodes.
    pub fn second_volume(&mut self) {
        for node in &mut self.nodes {
            let mut second = node.config.volumes[0].clone();
            second.nr = VolumeNr(1);
            second.minor = 1;
            node.config.volumes.push(second);
            node.devices.push(node.devices[0].clone());
        }
    }

    /// Metadata on a device of its own, on both nodes.
    pub fn external_meta(&mut self, sectors: u64) {
        for node in &mut self.nodes {
            for volume in &mut node.config.volumes {
                volume.meta = Some(MetaKind::Flexible);
            }
            for devices in &mut node.devices {
                devices.meta = Some(sectors);
            }
        }
    }

    /// This node has no disks.
    pub fn diskless(&mut self, node: usize) {
        for volume in &mut self.nodes[node].config.volumes {
            volume.meta = None;
        }
    }
}

impl NodeSetup {
    /// Pages of the arena that belong to request slots.
    #[must_use]
    pub fn first_pool_page(&self) -> u32 {
        let volumes = u32::try_from(self.config.volumes.len()).expect("few volumes");
        volumes * u32::from(self.queue_depth) * self.slot_pages
    }

    /// The layout of a volume's metadata; `None` without a disk.
    ///
    /// # Panics
    /// If the devices of the setup are too small for metadata.
    #[must_use]
    pub fn geometry(&self, volume: usize, data: u64, meta: Option<u64>) -> Option<Geometry> {
        let kind = self.config.volumes[volume].meta?;
        let meta = Sector(meta.unwrap_or(data));
        Some(Geometry::new(kind, Sector(data), meta, 0, 0).expect("the setup's devices are usable"))
    }
}
