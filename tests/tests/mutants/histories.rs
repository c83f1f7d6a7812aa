//! A history of crash points that the tests of crash points and those of mutants share.

use replication_core::event::VolumeIx;
use replication_core::units::BlockRange;
use tests::crash::explore::{Counts, Part};
use tests::crash::history::{History, extents, setup};
use tests::crash::pair::Pair;
use tests::sim::{A, B, Setup};

/// Sectors of an extent of the activity log.
const EXTENT: u64 = 8192;

/// A slow resync is broken off when a part of it is done: what the target has cleared goes to its
/// disk, and what it stands for has to be there already (BM-1).
pub(crate) fn broken_resync(seed: u64, change: impl FnOnce(&mut Setup)) -> Counts {
    let mut setup = setup(extents(3));
    setup.disk(|disk| disk.rate.resync_rate_kib = 400);
    if seed % 2 == 1 {
        setup.external_meta(2048);
    }
    change(&mut setup);
    let mut h = History::synced(seed, &setup);
    h.link(false);
    for round in 0..24 {
        h.write(A, (round % 3) * EXTENT + round * 80, 24, false);
        h.settle();
    }
    h.watch(&[(A, Part::Writer), (B, Part::Follower)]);
    for share in [3, 2, 1] {
        h.link(true);
        h.until("a part of the resync", |pair| marked(pair, A) <= 24 * 3 * share / 4);
        h.link(false);
        h.settle();
    }
    h.link(true);
    h.wait_synced();
    h.counts()
}

/// Blocks that a node takes for different.
fn marked(pair: &Pair, n: usize) -> u64 {
    let all = BlockRange { start: 0, end: 3 * EXTENT / 8 };
    pair.nodes[n].resource.out_of_sync_in(VolumeIx(0), all)
}
