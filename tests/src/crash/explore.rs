//! The checks: at every step of a history, every crash, every recovery.
//!
//! | what is checked | ids |
//! |---|---|
//! | what differs from the peer is marked after the recovery | AL-1, AL-2, AL-3, AL-5, AL-9, BM-2 |
//! | no sector is older than the last flush of it | DUR-1, DUR-2 |
//! | a Primary that wrote is found as one | AL-10, GI-10 |
//! | what the peer lacks was acknowledged under a new generation | GI-1 |
//! | metadata is there, old or new, and the disk attaches | MD-1, AL-6 |
//! | a crash of the recovery, and another size of the log, change nothing | MD-5, AL-9 |
//! | two nodes that lost power get in sync, equal, with everything flushed | RS-3, DUR-5 |

use std::collections::BTreeSet;

use replication_core::event::VolumeIx;
use replication_core::meta::MetaFlags;
use replication_core::state::{Disk, Role};
use replication_core::units::{Block, BlockRange, SECTORS_PER_BLOCK, Sector, SectorRange};

use super::medium::{Device, Image, sector_of};
use super::pair::Pair;
use super::recover::{Found, recover, reunite, superblock_of};
use crate::sim::rng::Rng;
use crate::sim::setup::NodeSetup;

/// What a node is in a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It alone has written since both disks were equal: it knows every difference by itself.
    Writer,
    /// It takes what the other one writes: the two together know every difference.
    Follower,
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Crash states of each node at each step, besides as many torn ones by half.
    pub states: usize,
    /// One of so many states is recovered with a crash in between.
    pub twice_every: u64,
    /// Both nodes lose power at one of so many steps.
    pub both_every: u64,
}

impl Effort {
    /// The ordinary effort, times the number in the environment variable `CRASH_EFFORT`.
    ///
    /// # Panics
    /// If the variable is set and no number from 1 to 1000.
    #[must_use]
    pub fn from_environment() -> Self {
        let factor = match std::env::var("CRASH_EFFORT") {
            Err(_) => 1,
            Ok(text) => match text.parse::<u64>() {
                Ok(factor @ 1..=1000) => factor,
                Ok(_) | Err(_) => panic!("CRASH_EFFORT is {text}: a number from 1 to 1000"),
            },
        };
        let states = usize::try_from(8 * factor).expect("a small number");
        Self { states, twice_every: (96 / factor).max(2), both_every: (64 / factor).max(1) }
    }
}

/// How much was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Steps at which a disk changed.
    pub steps: u64,
    /// Crash states that were recovered.
    pub states: u64,
    /// Crash states of recoveries that were recovered.
    pub of_recoveries: u64,
    /// Crash states of both nodes at once that were brought in sync.
    pub of_both: u64,
    /// Crash states of a grown device with the metadata still at its old end.
    pub at_old_end: u64,
    /// Crash states in which something differed.
    pub differing: u64,
}

/// Looks at every step of a history.
#[derive(Debug)]
pub struct Explorer {
    /// The nodes that crash.
    pub watched: Vec<(usize, Part)>,
    /// What was tried so far.
    pub counts: Counts,
    /// The data device has grown from this size: as long as metadata is not found at its new
    /// end, it has to be whole at the old one.
    pub grown_from: Option<u64>,
    /// From this sector on nothing is known to be equal: every block has to be marked.
    pub marked_from: Option<u64>,
    effort: Effort,
    changes: [u64; 2],
    rng: Rng,
}

impl Explorer {
    /// An explorer for these nodes.
    #[must_use]
    pub fn new(seed: u64, watched: Vec<(usize, Part)>) -> Self {
        Self {
            watched,
            counts: Counts::default(),
            grown_from: None,
            marked_from: None,
            effort: Effort::from_environment(),
            changes: [0; 2],
            rng: Rng::new(seed),
        }
    }

    /// Tries the crashes at this moment of a history.
    ///
    /// # Panics
    /// If one of them breaks an invariant.
    pub fn look(&mut self, pair: &Pair) {
        let mut changed = false;
        for (n, part) in self.watched.clone() {
            let medium = &pair.nodes[n].medium;
            if medium.changes() == self.changes[n] {
                continue;
            }
            self.changes[n] = medium.changes();
            self.counts.steps += 1;
            changed = true;
            for image in medium.crash_images(self.effort.states, &mut self.rng) {
                if let Err(why) = self.check(pair, n, part, &image) {
                    let last = pair.trace.iter().rev().take(80).rev();
                    let trace = last.cloned().collect::<Vec<_>>().join("\n");
                    panic!("{trace}\ncrash of node {n} ({part:?}): {why}");
                }
            }
        }
        let both = changed && pair.nodes.len() == 2 && self.marked_from.is_none();
        if both && self.rng.below(self.effort.both_every) == 0 {
            self.crash_both(pair);
        }
    }

    fn check(&mut self, pair: &Pair, n: usize, part: Part, image: &Image) -> Result<(), String> {
        self.counts.states += 1;
        let mut setup = setup_now(pair, n);
        if let Some(old) = self.grown_from.filter(|_| superblock_of(&setup, image).is_none()) {
            self.counts.at_old_end += 1;
            setup.devices[0].data = old;
        }
        let seed = self.rng.next();
        let twice = self.rng.below(self.effort.twice_every) == 0;
        let mut crashes = Vec::new();
        let watch = twice.then_some((2, &mut crashes));
        let (found, _) = recover(&setup, image, seed, watch)
            .map_err(|refusal| format!("MD-1: the attach is refused: {refusal:?}"))?;
        if let Some(first) = self.marked_from {
            let blocks = found.sectors.div_ceil(SECTORS_PER_BLOCK);
            let mut rest = first / SECTORS_PER_BLOCK..blocks;
            if let Some(block) = rest.find(|block| !found.is_marked(Block(*block))) {
                return Err(format!("BM-8: block {block} of {blocks} is not marked"));
            }
        }
        self.counts.differing += u64::from(check_marked(pair, n, part, image, &found)?);
        if found.disk == Disk::UpToDate {
            pair.ledger.check_safe(n, image)?;
        }
        check_role(pair, n, &setup, image, &found)?;
        check_generation(pair, n, &setup, image)?;
        if twice {
            let mut other_log = setup.clone();
            other_log.config.volumes[0].disk.al_extents = 3;
            crashes.push(image.clone());
            for crash in crashes {
                self.counts.of_recoveries += 1;
                let again = recover(&other_log, &crash, seed, None);
                let (again, _) = again.map_err(|e| format!("MD-5: refused: {e:?}"))?;
                if again != found {
                    return Err(format!("MD-5: {}", found.differences(&again)));
                }
            }
        }
        Ok(())
    }

    fn crash_both(&mut self, pair: &Pair) {
        self.counts.of_both += 1;
        let seed = self.rng.next();
        let disks = [0, 1].map(|n| {
            let mut images = pair.nodes[n].medium.crash_images(1, &mut self.rng);
            let chosen = self.rng.below(images.len() as u64);
            let chosen = usize::try_from(chosen).expect("an index");
            (setup_now(pair, n), images.swap_remove(chosen))
        });
        let result: Result<(), String> = reunite(disks, seed).and_then(|after| {
            for sector in pair.ledger.sectors() {
                let [a, b] = [0, 1].map(|n| sector_of(&after[n], Device::Data, sector));
                if a != b {
                    return Err(format!("RS-1: sector {sector} differs"));
                }
            }
            let mut writers = self.watched.iter().filter(|(_, part)| *part == Part::Writer);
            writers.try_for_each(|(n, _)| pair.ledger.check_safe(*n, &after[*n]))
        });
        if let Err(why) = result {
            let last = pair.trace.iter().rev().take(80).rev();
            let trace = last.cloned().collect::<Vec<_>>().join("\n");
            panic!("{trace}\ncrash of both nodes: {why}");
        }
    }
}

/// The options of a node with the devices as large as they are now.
fn setup_now(pair: &Pair, n: usize) -> NodeSetup {
    let mut setup = pair.nodes[n].setup.clone();
    setup.devices[0].data = pair.nodes[n].data_sectors;
    setup
}

/// Blocks that differ are marked; returns whether there are any.
fn check_marked(
    pair: &Pair,
    n: usize,
    part: Part,
    image: &Image,
    found: &Found,
) -> Result<bool, String> {
    let Some(peer) = pair.nodes.get(1 - n) else { return Ok(false) };
    let views = [peer.medium.finished_view(), peer.medium.submitted_view()];
    let differing: BTreeSet<Block> = pair
        .ledger
        .sectors()
        .filter(|sector| {
            let own = sector_of(image, Device::Data, *sector);
            views.iter().any(|view| sector_of(view, Device::Data, *sector) != own)
        })
        .map(|sector| Sector(sector).block())
        .collect();
    let in_flight = peer.unconfirmed();
    let peer_knows = |block: Block| {
        let one = BlockRange { start: block.0, end: block.0 + 1 };
        let start = block.sector().0;
        let sectors = SectorRange { start, end: start + 8 };
        peer.resource.out_of_sync_in(VolumeIx(0), one) > 0
            || in_flight.iter().any(|range| range.overlaps(sectors))
    };
    for block in &differing {
        let known = found.is_marked(*block) || (part == Part::Follower && peer_knows(*block));
        if !known {
            return Err(format!(
                "BM-2: block {block:?} differs and is not marked (found {})",
                found.differences(found)
            ));
        }
    }
    Ok(!differing.is_empty())
}

/// AL-10, GI-10: a Primary that may have written is found as a crashed Primary.
fn check_role(
    pair: &Pair,
    n: usize,
    setup: &NodeSetup,
    image: &Image,
    found: &Found,
) -> Result<(), String> {
    let node = &pair.nodes[n];
    if node.state().role != Role::Primary || !node.host_wrote {
        return Ok(());
    }
    let superblock = superblock_of(setup, image).ok_or("MD-1: no superblock")?;
    if !superblock.flags.contains(MetaFlags::PRIMARY_IND) {
        return Err(format!("AL-10: flags of a writing Primary are {:?}", superblock.flags));
    }
    if !found.crashed_primary {
        return Err(String::from("GI-10: the crash of a Primary is forgotten"));
    }
    Ok(())
}

/// GI-1: something acknowledged is missing on the peer, so the generation is another one.
fn check_generation(pair: &Pair, n: usize, setup: &NodeSetup, image: &Image) -> Result<(), String> {
    let Some(peer) = pair.nodes.get(1 - n) else { return Ok(()) };
    if pair.nodes[n].state().role != Role::Primary {
        return Ok(());
    }
    let view = peer.medium.finished_view();
    let Some(lacking) = pair.ledger.lacking(&view).next() else { return Ok(()) };
    let superblock = superblock_of(setup, image).ok_or("MD-1: no superblock")?;
    let Some(theirs) = superblock_of(&setup_now(pair, 1 - n), &view) else { return Ok(()) };
    if superblock.uuids.current | 1 == theirs.uuids.current | 1 {
        return Err(format!("GI-1: the peer lacks sector {lacking}, but not the generation"));
    }
    Ok(())
}
