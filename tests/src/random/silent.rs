//! Disks that do something else than they say.
//!
//! The product promises to notice that where there is a checksum: in the activity log. There a
//! write that lands elsewhere must not cost a difference: all checks of the log stay as they are
//! (BM-2, AL-6). Data has no checksum. What is promised for it is that the harm stays where it is:
//! the other node's data is right, nothing is copied from the harmed disk, and a new copy mends it.

use replication_core::control::Command;
use replication_core::state::Role;
use replication_core::units::{SECTORS_PER_BLOCK, Span};

use super::operate::MOST_COPIED;
use super::{Kind, Run};
use crate::sim::disk::{Fault, Kind as Access, PAGE_SECTORS, Trouble};
use crate::sim::{A, B};

/// The longest that copying a small device may take.
const COPYING: Span = Span::from_secs(600);

impl Run {
    /// The next write of the activity log lands on another of its blocks.
    pub(super) fn misdirect_log(&mut self) {
        let n = self.any_node();
        let volume = self.any_volume();
        self.count(Kind::MisdirectLog);
        let log = self.w.log_area(n, volume);
        let to = log.start + self.rng.below(log.sectors() / PAGE_SECTORS) * PAGE_SECTORS;
        let trouble = Trouble::Misdirect(to);
        let fault = Fault { kind: Access::MetaWrite, range: Some(log), times: Some(1), trouble };
        self.w.note(n, &format!("=== a write of the log of volume {volume} will land at {to}s"));
        self.w.nodes[n].backing[volume].meta_disk_mut().add_fault(fault);
    }

    /// Whether both nodes are in sync and at rest, and nothing is planned that disturbs them.
    fn comes_to_peace(&mut self, primary: usize) -> bool {
        self.heal_disks();
        for node in &mut self.w.nodes {
            node.damages_header = false;
            node.flips = None;
        }
        let is_held = |run: &Self| {
            (0..run.w.volumes())
                .any(|volume| [A, B].iter().any(|n| run.w.state(*n, volume).is_resync_paused()))
        };
        self.comes_to_rest(primary)
            && [A, B].iter().all(|n| self.is_ready(*n))
            && !self.w.net.is_cut()
            && self.w.is_synced()
            && self.w.is_quiet()
            && !is_held(self)
            && !self.w.stale.iter().flatten().any(|stale| *stale)
    }

    /// Data of the Secondary is harmed in silence, the host goes on, and the operator, who has
    /// learned of it, has everything copied anew.
    pub(super) fn spoil(&mut self, kind: Kind) {
        let Some(primary) = self.primary() else { return };
        if self.size > MOST_COPIED || !self.comes_to_peace(primary) {
            return;
        }
        self.w.check_quiet();
        self.count(kind);
        let victim = 1 - primary;
        let volume = self.any_volume();
        self.w.since_sync[volume].troubled = true;
        self.w.stale[victim][volume] = true;
        let blocks = self.w.nodes[primary].sizes[volume] / SECTORS_PER_BLOCK;
        let [from, to] = [self.rng.below(blocks), self.rng.below(blocks)];
        if kind == Kind::Rot {
            self.w.note(victim, &format!("=== a bit of block {from} turns over"));
            let sector = from * SECTORS_PER_BLOCK + self.rng.below(SECTORS_PER_BLOCK);
            let bit = usize::try_from(self.rng.below(4096)).expect("small");
            self.w.rot(victim, volume, sector, bit);
        } else {
            self.w.note(victim, &format!("=== a write of block {from} lands on block {to}"));
            let trouble = Trouble::Misdirect(to * SECTORS_PER_BLOCK);
            let fault = Fault { kind: Access::Write, range: None, times: Some(1), trouble };
            self.w.nodes[victim].backing[volume].data.add_fault(fault);
            self.w.write(primary, volume, from * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK);
        }
        self.use_beside(primary);
        let spread: Vec<u64> = self.w.differing[volume]
            .iter()
            .copied()
            .filter(|block| ![from, to].contains(block))
            .collect();
        assert!(spread.is_empty(), "blocks {from} and {to} were harmed, and {spread:?} differ");
        self.w.check_contents(primary, volume);
        let nr = self.w.nodes[victim].setup.config.volumes[volume].nr;
        self.w.threw_away(victim, volume);
        self.w.must(victim, Command::Invalidate(Some(nr)));
        self.w.run_until("the new copy", COPYING, |w| w.is_synced() && w.is_quiet());
        assert!(self.w.state(primary, volume).role == Role::Primary, "its data was the good one");
        self.w.check_quiet();
    }

    /// The host of a node goes on for a while, and ends.
    fn use_beside(&mut self, primary: usize) {
        let load = self.random_load();
        self.w.start_load(primary, load);
        let time = self.rng.below(500);
        self.w.run_for(Span::from_ms(time));
        self.w.stop_load(primary);
        // The end of a connection may have been on its way.
        self.w.run_until("both in sync", COPYING, |w| w.is_synced() && w.is_quiet());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::World;
    use crate::sim::setup::{MIB, Setup};

    /// Two nodes in sync, with room in the log for a few of many extents.
    fn with_small_log() -> World {
        let mut w = World::new(
            1,
            Setup::with(|s| {
                s.size(100 * MIB);
                s.disk(|disk| disk.al_extents = 4);
            }),
        );
        w.start_synced();
        w
    }

    /// The next write of A's log lands on this block of it.
    fn misdirect(w: &mut World, block: u64) {
        let log = w.log_area(A, 0);
        let trouble = Trouble::Misdirect(log.start + block * PAGE_SECTORS);
        let fault = Fault { kind: Access::MetaWrite, range: Some(log), times: Some(1), trouble };
        w.nodes[A].backing[0].data.add_fault(fault);
    }

    /// Writes the first block of an extent of its own: each costs a transaction of the log.
    fn write(w: &mut World, extent: u64) {
        w.write(A, 0, extent % 24 * 4 * MIB, 8);
    }

    /// A transaction that lands on another block of the log, with none or some behind it, costs no
    /// difference when the node dies (BM-2). From the second lap on, what is left is seen to be
    /// incomplete, and everything is copied (AL-6).
    #[test]
    fn a_transaction_in_the_wrong_place_hides_nothing() {
        let mut noticed = 0;
        for (before, behind) in
            [(0, 0), (0, 1), (0, 3), (2, 0), (2, 1), (5, 2), (9, 0), (9, 1), (9, 4)]
        {
            for block in 0..8 {
                let mut w = with_small_log();
                w.cut();
                w.run_for(Span::from_secs(20));
                (0..before).for_each(|extent| write(&mut w, extent));
                misdirect(&mut w, block);
                (before..=before + behind).for_each(|extent| write(&mut w, extent));
                // What is not known is found by the check of every crash.
                w.kill(A);
                noticed += u32::from(w.on_disk(A, 0).expect("a disk").whole);
                assert!(w.differing[0].len() > usize::try_from(behind).expect("few"));
            }
        }
        // In the first lap a log with a gap looks like one that is being emptied; what is written
        // behind a gap repeats what was lost there.
        assert!(noticed > 20, "{noticed} of 24");
    }

    /// An attach empties the log, and a block that it did not reach would count as a transaction
    /// after the next crash, newer than those of the new log (AL-2, AL-6): that is noticed, the
    /// disk is refused, and another attach goes well.
    #[test]
    fn a_log_that_was_not_emptied_is_not_used() {
        for block in 0..8 {
            let mut w = with_small_log();
            (0..11).for_each(|extent| write(&mut w, extent));
            w.kill(A);
            misdirect(&mut w, block);
            w.boot(A);
            // The first block to go is the oldest one: number 3 is in the place of number 11.
            let is_refused = w.ask(A, Command::Up).is_err();
            assert_eq!(is_refused, block != 3, "block {block}");
            if is_refused {
                w.must(A, Command::Attach(None));
                w.must(A, Command::Connect { discard_my_data: false });
            }
            w.wait_synced();
            w.must(A, Command::Primary { force: false });
            (11..17).for_each(|extent| write(&mut w, extent));
            w.kill(A);
            w.restart(A);
            w.wait_synced();
        }
    }
}
