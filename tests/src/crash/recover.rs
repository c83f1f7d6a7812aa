//! What the production attach makes of a disk after a crash, and of two such disks.

use std::fmt::Write as _;

use replication_core::control::{Command, Refusal};
use replication_core::meta::{MetaFlags, Page, Superblock};
use replication_core::state::{Conn, Disk};
use replication_core::units::{Block, SECTORS_PER_BLOCK};

use super::medium::{Device, Image, SECTOR, sector_of};
use super::pair::Pair;
use crate::sim::rng::Rng;
use crate::sim::setup::NodeSetup;

/// Steps within which an attach ends.
const ATTACH_STEPS: usize = 10_000;
/// Steps within which two nodes are in sync again.
const REUNION_STEPS: usize = 400_000;

/// What a recovery found: the part of it that has to be the same for every way there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The disk state.
    pub disk: Disk,
    /// Exposed sectors.
    pub sectors: u64,
    /// Identifiers: current, bitmap, history.
    pub uuids: [u64; 4],
    /// The node was Primary when it went down.
    pub crashed_primary: bool,
    /// The bitmap, a bit for every block.
    pub bits: Vec<u8>,
}

impl Found {
    /// Whether a block is marked as differing.
    #[must_use]
    pub fn is_marked(&self, block: Block) -> bool {
        let byte = usize::try_from(block.0 / 8).ok().and_then(|at| self.bits.get(at));
        byte.is_some_and(|byte| byte >> (block.0 % 8) & 1 == 1)
    }

    /// The fields that differ from another outcome, in words.
    #[must_use]
    pub fn differences(&self, other: &Self) -> String {
        let mut words = String::new();
        let ones = |found: &Self| found.bits.iter().map(|byte| byte.count_ones()).sum::<u32>();
        let summary = |found: &Self| {
            let Self { disk, sectors, uuids, crashed_primary, .. } = found;
            let count = ones(found);
            format!("{disk} {sectors} {uuids:x?} crashed {crashed_primary}, {count} bits")
        };
        write!(words, "{} / {}", summary(self), summary(other)).expect("a string takes it");
        words
    }
}

/// The superblock of an image, if there is one at the place for these devices.
///
/// # Panics
/// If the devices are too small for metadata.
#[must_use]
pub fn superblock_of(setup: &NodeSetup, image: &Image) -> Option<Superblock> {
    let devices = &setup.devices[0];
    let geometry = setup.geometry(0, devices.data, devices.meta).expect("a disk is configured");
    let page = page_of(setup, image, geometry.superblock.0);
    Superblock::decode(&page).ok()
}

fn page_of(setup: &NodeSetup, image: &Image, start: u64) -> Page {
    let device = if setup.devices[0].meta.is_some() { Device::Meta } else { Device::Data };
    let mut page = Page([0; 4096]);
    for (sector, part) in (start..).zip(page.0.chunks_mut(SECTOR)) {
        part.copy_from_slice(&sector_of(image, device, sector));
    }
    page
}

/// The disk and what the attach found; with `crashes`, also pictures of the disk for crashes at
/// every step of the attach, so many at each.
///
/// # Errors
/// The refusal of the attach.
///
/// # Panics
/// If the attach does not end.
pub fn recover(
    setup: &NodeSetup,
    image: &Image,
    seed: u64,
    mut crashes: Option<(usize, &mut Vec<Image>)>,
) -> Result<(Found, Image), Refusal> {
    let mut pair = Pair::new(seed, vec![(setup.clone(), image.clone())]);
    let mut rng = Rng::new(seed);
    let id = pair.tell(0, Command::Attach(None));
    let mut changes = 0;
    for _ in 0..ATTACH_STEPS {
        if !pair.step(false) {
            break;
        }
        let medium = &pair.nodes[0].medium;
        if let Some((each, images)) = crashes.as_mut().filter(|_| medium.changes() > changes) {
            changes = medium.changes();
            images.extend(medium.crash_images(*each, &mut rng));
        }
    }
    let reply = pair.reply(0, id).unwrap_or_else(|| panic!("no end of attach: {:#?}", pair.trace));
    let after = pair.nodes[0].medium.finished_view();
    reply.map(|_| (found(setup, &pair, &after), after))
}

fn found(setup: &NodeSetup, pair: &Pair, after: &Image) -> Found {
    let superblock = superblock_of(setup, after).expect("an attached disk has metadata");
    let devices = &setup.devices[0];
    let geometry = setup.geometry(0, devices.data, devices.meta).expect("a disk is configured");
    let blocks = superblock.la_size.0.div_ceil(SECTORS_PER_BLOCK);
    let mut bits = Vec::new();
    let mut page = 0;
    while (bits.len() as u64) < blocks.div_ceil(8) {
        let sector = geometry.bitmap_page_sector(page).expect("the bitmap covers the device");
        bits.extend_from_slice(&page_of(setup, after, sector.0).0);
        page += 1;
    }
    bits.truncate(usize::try_from(blocks.div_ceil(8)).expect("a small device"));
    let uuids = &superblock.uuids;
    Found {
        disk: pair.nodes[0].state().disk,
        sectors: superblock.la_size.0,
        uuids: [uuids.current, uuids.bitmap, uuids.history[0], uuids.history[1]],
        crashed_primary: superblock.flags.contains(MetaFlags::CRASHED_PRIMARY),
        bits,
    }
}

/// Both nodes start after both have lost power; returns their disks once they say that they are
/// in sync.
///
/// # Errors
/// In which states they stay instead.
pub fn reunite(disks: [(NodeSetup, Image); 2], seed: u64) -> Result<[Image; 2], String> {
    let mut pair = Pair::new(seed, disks.into());
    for n in [0, 1] {
        pair.tell(n, Command::Up);
    }
    let is_synced = |pair: &Pair| {
        pair.nodes.iter().all(|node| {
            let state = node.state();
            let is_good = state.disk == Disk::UpToDate && state.pdsk == Disk::UpToDate;
            is_good && state.conn == Conn::Connected
        })
    };
    for _ in 0..REUNION_STEPS {
        if is_synced(&pair) {
            while pair.step(false) {}
            return Ok([0, 1].map(|n| pair.nodes[n].medium.finished_view()));
        }
        if !pair.step(true) {
            break;
        }
    }
    let states: Vec<String> = pair.nodes.iter().map(|node| node.state().to_string()).collect();
    let last = pair.trace.iter().rev().take(60).rev();
    Err(format!("not in sync: {states:?}\n{}", last.cloned().collect::<Vec<_>>().join("\n")))
}
