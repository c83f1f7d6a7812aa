//! Has something changed that should not have? Before and after a period without writes (RD-5), at
//! a refused command (ST-7), and at the end of a resync, when nothing may be left (RS-4).

use replication_core::state::{Conn, Disk as DiskState, State};
use replication_core::units::Span;

use super::world::World;

/// What a node knows of a volume besides its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knowledge {
    /// A number that stands for all metadata on the disk.
    pub on_disk: u64,
    /// State, generations and blocks marked, of a node that runs.
    pub in_memory: Option<(State, [u64; 4], u64)>,
}

impl World {
    /// Bitmap, activity log, generations and states of a node.
    #[must_use]
    pub fn knowledge(&self, n: usize, volume: usize) -> Knowledge {
        let in_memory = self.is_alive(n).then(|| {
            let status = &self.status(n).volumes[volume];
            (self.state(n, volume), status.uuids, status.out_of_sync_kib)
        });
        Knowledge { on_disk: self.metadata_sums(n, volume), in_memory }
    }

    /// Waits for the end of a resync. RS-4: a target that calls itself UpToDate has everything.
    /// Nobody writes.
    ///
    /// # Panics
    /// If it lacks something, or if the resync does not end.
    pub fn check_end_of_resync(&mut self, n: usize, volume: usize) {
        let is_target = |w: &Self| {
            let conn = w.state(n, volume).conn;
            matches!(conn, Conn::SyncTarget | Conn::PausedSyncT)
        };
        let was_target = is_target(self);
        self.run_until("the end of the resync", Span::from_secs(600), |w| !is_target(w));
        let state = self.state(n, volume);
        let is_end = was_target && state.conn == Conn::Connected;
        assert!(
            !is_end || state.disk != DiskState::UpToDate || self.differing[volume].is_empty(),
            "RS-4: volume {volume}: the resync of node {n} has ended, it is UpToDate, and blocks \
             {:?} differ",
            self.differing[volume]
        );
    }
}
