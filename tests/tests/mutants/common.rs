//! What runs of mutants and scenarios of invariants have in common.

use replication_core::event::HostOp;
use replication_core::state::Conn;
use replication_core::units::{Errno, SectorRange, Span};
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::rng::Rng;
use tests::sim::{A, Load, Setup, World};

/// Names runs, and lists all of them.
macro_rules! runs {
    ($($id:ident, $setup:ident, $run:ident;)*) => {
        $(
            pub(crate) const $id: Workload =
                Workload { name: stringify!($id), setup: $setup, run: $run };
        )*

        /// All of them.
        pub(crate) const ALL: [Workload; [$(stringify!($id)),*].len()] = [$($id),*];
    };
}
pub(crate) use runs;

/// A run that the seed decides.
#[derive(Clone, Copy)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) setup: fn(&mut Setup, &mut Rng),
    pub(crate) run: fn(&mut World, &mut Rng),
}

impl Workload {
    /// The world of a seed before anything has happened in it, and the chance of its script.
    pub(crate) fn world(self, seed: u64, change: impl FnOnce(&mut Setup)) -> (World, Rng) {
        let mut rng = Rng::new(seed ^ 0x5eed_0000);
        let mut setup = Setup::default();
        (self.setup)(&mut setup, &mut rng);
        change(&mut setup);
        (World::new(seed, setup), rng)
    }
}

pub(crate) fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

pub(crate) fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

pub(crate) fn heavy(areas: Vec<SectorRange>) -> Load {
    Load { think: Span(200_000), depth: 8, ..Load::writes(areas) }
}

/// A write that is under way when this returns.
pub(crate) fn ask_for_write(w: &mut World, range: SectorRange) -> u64 {
    w.submit(A, 0, HostOp::Write { fua: false }, range).expect("a free slot")
}

/// The next operations of this kind on the disk of a node fail, or stick.
pub(crate) fn trouble(w: &mut World, n: usize, kind: Kind, times: Option<u32>, stick: bool) {
    let trouble = if stick { Trouble::Stick } else { Trouble::Fail(Errno::EIO) };
    let fault = Fault { kind, range: None, times, trouble };
    let backing = &mut w.nodes[n].backing[0];
    match kind {
        Kind::Read | Kind::Write | Kind::Flush => backing.data.add_fault(fault),
        Kind::MetaRead | Kind::MetaWrite => backing.meta_disk_mut().add_fault(fault),
    }
}
