//! Is what a node has on its disk a history that the host could have had? (ORD-1, ORD-2, ORD-4)
//! And do both nodes agree on the name of their data? (GI-8)

use replication_core::units::SectorRange;

use super::world::World;
use super::{A, B};

impl World {
    /// ORD-4: of writes that were submitted one after the other, each when the one before was
    /// acknowledged, a node has the first ones in full, and at most one more in part. They went to
    /// ranges that do not overlap and held zeroes before.
    ///
    /// # Panics
    /// If not.
    pub fn check_prefix(&self, n: usize, volume: usize, writes: &[SectorRange]) {
        let disk = &self.nodes[n].backing[volume].data;
        let is_written = |sector: &u64| disk.sector(*sector).iter().any(|byte| *byte != 0);
        let is_whole = |range: &SectorRange| (range.start..range.end).all(|s| is_written(&s));
        let is_touched = |range: &SectorRange| (range.start..range.end).any(|s| is_written(&s));
        let whole = writes.iter().take_while(|range| is_whole(range)).count();
        let late = writes.iter().enumerate().skip(whole + 1).find(|(_, range)| is_touched(range));
        assert!(
            late.is_none(),
            "ORD-4: volume {volume}: node {n} has write {late:?}, but not write {whole} {:?}, \
             which the host had seen finish before",
            writes[whole]
        );
    }

    /// GI-8: nodes that call themselves equal carry the same current identifier.
    ///
    /// # Panics
    /// If not.
    pub fn check_same_generation(&self, volume: usize) {
        let [a, b] = [A, B].map(|n| self.status(n).volumes[volume].uuids[0]);
        assert!(a | 1 == b | 1, "GI-8: volume {volume}: in sync, but of {a:#x} and {b:#x}");
    }
}
