//! Is what must always hold still true? Checked against the truth: both disks at once.
//!
//! The truth is kept block by block ([`World::differing`]). Where the blocks that differ must be
//! marked depends on what happened since both disks were last seen equal:
//!
//! * At rest, and whenever a node is dead: marked by one of the two nodes, in memory where it
//!   lives, on disk (bitmap or activity log) where it does not. The two maps are merged by the
//!   next handshake.
//! * If only one node has written since, and the other has lost nothing by a power cut: marked by
//!   the writer alone (BM-1), and on its disk even when it dies (BM-2, AL-1).

use std::collections::BTreeSet;

use replication_core::event::VolumeIx;
use replication_core::meta::al_journal::replay;
use replication_core::meta::relocate::Place;
use replication_core::meta::{MetaFlags, Page, Superblock};
use replication_core::state::{Conn, Disk as DiskState, Role, State};
use replication_core::units::{AlExtent, Block, BlockRange, SECTORS_PER_BLOCK, Sector};

use super::disk::{Disk, PAGE_SECTORS, SECTOR};
use super::world::World;
use super::{A, B};

/// What happened to a volume since both disks were last seen equal.
#[derive(Clone, Debug, Default)]
pub struct SinceSync {
    /// They were seen equal at all.
    pub known: bool,
    /// Nodes whose hosts have written.
    pub writers: BTreeSet<usize>,
    /// Nodes that acknowledged a write which the peer did not get.
    pub alone: BTreeSet<usize>,
    /// Nodes that lost power.
    pub power_cuts: BTreeSet<usize>,
    /// Nodes whose disk has failed an operation.
    pub broken: BTreeSet<usize>,
    /// What was asked for before this moment is in doubt, also if it is answered later: the word
    /// of a disk, or of the driver that has sent something to the peer, does not outlive the disk.
    pub unsure_before: u64,
    /// A disk failed or was taken away: the simple rules do not apply.
    pub troubled: bool,
    /// Marks that a failed disk had kept on each node when both were equal.
    pub leftover_kib: [u64; 2],
}

/// What a node's metadata on disk says about differences.
#[derive(Debug)]
pub struct OnDisk {
    /// Everything may differ.
    pub whole: bool,
    /// Extents of the activity log, if it counts.
    pub extents: BTreeSet<AlExtent>,
    /// Blocks that are marked.
    pub bits: BTreeSet<u64>,
    /// The superblock.
    pub superblock: Superblock,
}

impl OnDisk {
    /// Whether the block is marked, or may differ after a crash.
    #[must_use]
    pub fn covers(&self, block: u64) -> bool {
        let extent = Block(block).sector().al_extent();
        self.whole || self.bits.contains(&block) || self.extents.contains(&extent)
    }
}

fn ix(volume: usize) -> VolumeIx {
    VolumeIx(u8::try_from(volume).expect("few volumes"))
}

impl World {
    /// Compares a block of the two disks and keeps the truth.
    pub(crate) fn compare_block(&mut self, volume: usize, block: u64) {
        let first = block * SECTORS_PER_BLOCK;
        let end = (first + SECTORS_PER_BLOCK).min(self.sizes[volume]);
        let [a, b] = [A, B].map(|n| &self.nodes[n].backing[volume].data);
        let readable = end.min(a.sectors()).min(b.sectors());
        let differs = (first..readable).any(|sector| a.sector(sector) != b.sector(sector));
        if differs {
            self.differing[volume].insert(block);
        } else {
            self.differing[volume].remove(&block);
        }
    }

    /// A node exposes another size.
    pub(crate) fn size_changed(&mut self, volume: usize) {
        let size = self.nodes.iter().map(|node| node.sizes[volume]).max().unwrap_or(0);
        if size == 0 || size == self.sizes[volume] {
            return;
        }
        self.sizes[volume] = size;
        self.compare_all(volume);
    }

    /// Compares both disks in full.
    pub fn compare_all(&mut self, volume: usize) {
        self.differing[volume].clear();
        let used = |n: usize| self.nodes[n].backing[volume].data.used_pages();
        let pages: BTreeSet<u64> = used(A).union(&used(B)).copied().collect();
        for page in pages {
            self.compare_block(volume, page);
        }
    }

    pub(crate) fn wrote(&mut self, n: usize, volume: usize) {
        self.since_sync[volume].writers.insert(n);
    }

    /// A disk failed, or was taken away by the operator: from now on the other node's copy is the
    /// good one. If that one has lost something already, two faults have met.
    pub fn disk_failed(&mut self, n: usize, volume: usize) {
        self.since_sync[volume].troubled = true;
        self.stale[n][volume] = true;
        let nr = u8::try_from(volume).expect("few volumes");
        if self.ledger.keeps_unsettled() {
            // The other node need not have got what was acknowledged here.
            self.since_sync[volume].unsure_before = self.moment();
            self.ledger.doubt_unsettled(nr);
        }
        if self.stale[1 - n][volume] {
            // Also what both were seen to hold, if the other one has lost it with its power.
            self.ledger.doubt_unflushed(nr);
        }
    }

    /// An operation on a disk fails or does not end. If both disks have done so since they were
    /// last equal, which is more than can be stood (T5), then only what both held is certain: the
    /// one that failed first may be the one that is taken into use again.
    pub(crate) fn disk_broke(&mut self, n: usize, volume: usize) {
        self.disk_failed(n, volume);
        let moment = self.moment();
        let since = &mut self.since_sync[volume];
        since.broken.insert(n);
        if since.broken.len() == 2 {
            since.unsure_before = moment;
            self.ledger.doubt_unsettled(u8::try_from(volume).expect("few volumes"));
        }
    }

    /// A node lost power: what of its data can be relied upon?
    pub(crate) fn power_was_lost(&mut self, n: usize) {
        self.lost_power_at[n] = self.moment();
        for volume in 0..self.volumes() {
            self.since_sync[volume].power_cuts.insert(n);
            if self.stale[1 - n][volume] {
                let volume = u8::try_from(volume).expect("few volumes");
                self.ledger.doubt_unflushed(volume);
            } else {
                self.stale[n][volume] = true;
            }
        }
    }

    /// A Primary that had lost power is started again. Unless the other node became Primary
    /// meanwhile, the rules make it the source of a resync (GI-10), without what it had not
    /// flushed.
    pub(crate) fn crashed_primary_returns(&mut self, n: usize) {
        for volume in 0..self.volumes() {
            let was_primary = self
                .on_disk(n, volume)
                .is_some_and(|on_disk| on_disk.superblock.flags.contains(MetaFlags::PRIMARY_IND));
            let replaced = self.is_alive(1 - n) && self.state(1 - n, volume).role == Role::Primary;
            if was_primary && !replaced && self.since_sync[volume].power_cuts.contains(&n) {
                self.ledger.doubt_unflushed(u8::try_from(volume).expect("few volumes"));
            }
        }
    }

    /// A node has no process any more: what it knew is what is on its disk.
    pub(crate) fn crashed(&mut self, n: usize) {
        for volume in 0..self.volumes() {
            self.check_marked_on_disk(n, volume);
            self.check_generation(n, volume);
        }
    }

    /// GI-1: before a write that the peer will not have is acknowledged, a new generation is on
    /// disk, which begins at the one they had in common.
    fn check_generation(&self, n: usize, volume: usize) {
        let since = &self.since_sync[volume];
        if !since.known || since.troubled || !since.alone.contains(&n) {
            return;
        }
        let [own, peer] = [n, 1 - n].map(|n| self.on_disk(n, volume).map(|d| d.superblock.uuids));
        let (Some(own), Some(peer)) = (own, peer) else { return };
        assert!(
            own.current | 1 != peer.current | 1,
            "GI-1: volume {volume}: node {n} acknowledged writes alone, but died in the generation \
             {:#x} that its peer has, too",
            own.current
        );
    }

    /// What a node's metadata says; `None` if it has no disk for the volume.
    #[must_use]
    pub fn on_disk(&self, n: usize, volume: usize) -> Option<OnDisk> {
        let node = &self.nodes[n];
        let backing = &node.backing[volume];
        let meta = backing.meta.as_ref().map(Disk::sectors);
        let data = match self.place_of_metadata(n, volume) {
            Place::Behind(relocation) if meta.is_none() => relocation.old_size().0,
            _ => backing.data.sectors(),
        };
        let geometry = node.setup.geometry(volume, data, meta)?;
        let disk = backing.meta_disk();
        let page = |sector: Sector| {
            let mut page = Page([0; 4096]);
            disk.read(sector.0, &mut page.0);
            page
        };
        let superblock = Superblock::decode(&page(geometry.superblock)).ok()?;
        let log: Vec<Page> =
            (0..geometry.al_blocks()).map(|at| page(geometry.al_block_sector(at))).collect();
        let flags = superblock.flags;
        let mut whole = flags.contains(MetaFlags::FULL_SYNC);
        let mut extents = BTreeSet::new();
        if flags.contains(MetaFlags::PRIMARY_IND) {
            whole |= flags.contains(MetaFlags::AL_DISABLED);
            match replay(log.iter(), geometry.al_stripes, geometry.al_stripe_size_4k) {
                Ok(found) if found.complete => extents.extend(found.extents),
                Ok(_) | Err(_) => whole = true,
            }
        }
        let mut bits = BTreeSet::new();
        let blocks = superblock.la_size.0.div_ceil(SECTORS_PER_BLOCK);
        for number in 0..blocks.div_ceil(8 * 4096) {
            let Some(sector) = geometry.bitmap_page_sector(number) else { break };
            let page = page(sector);
            for (at, byte) in page.0.iter().enumerate().filter(|(_, byte)| **byte != 0) {
                let set = (0..8).filter(|bit| byte & (1 << bit) != 0);
                bits.extend(set.map(|bit| number * 8 * 4096 + at as u64 * 8 + bit));
            }
        }
        Some(OnDisk { whole, extents, bits, superblock })
    }

    /// Whether a living node has the block marked.
    #[must_use]
    pub fn is_marked(&self, n: usize, volume: usize, block: u64) -> bool {
        let range = BlockRange { start: block, end: block + 1 };
        let resource = self.nodes[n].resource.as_ref();
        resource.is_some_and(|resource| resource.out_of_sync_in(ix(volume), range) > 0)
    }

    /// Whether this node alone has to know every difference.
    fn is_sole_writer(&self, n: usize, volume: usize) -> bool {
        let since = &self.since_sync[volume];
        since.known
            && !since.troubled
            && since.writers.iter().all(|writer| *writer == n)
            && !since.power_cuts.contains(&(1 - n))
    }

    /// BM-2: at a crash of the only writer, its disk knows every difference.
    fn check_marked_on_disk(&self, n: usize, volume: usize) {
        if !self.is_sole_writer(n, volume) || !self.since_sync[volume].writers.contains(&n) {
            return;
        }
        let Some(on_disk) = self.on_disk(n, volume) else { return };
        // A device that was about to grow comes back as small as it was.
        let size = on_disk.superblock.la_size.0.div_ceil(SECTORS_PER_BLOCK);
        let differing = self.differing[volume].range(..size).copied();
        let missing: Vec<u64> = differing.filter(|b| !on_disk.covers(*b)).collect();
        assert!(
            missing.is_empty(),
            "BM-2: volume {volume}, blocks {missing:?} differ, but after the crash of node {n} \
             neither its bitmap nor its activity log {:?} knows them",
            on_disk.extents
        );
    }

    /// Whether nothing is under way that could explain a difference.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let busy = |n: usize| {
            let node = &self.nodes[n];
            if node.frozen_until.is_some() {
                return true;
            }
            let now = self.local(n);
            let status = node.resource.as_ref().map(|resource| resource.status(now));
            let in_core = status.is_some_and(|status| {
                status.ap_in_flight > 0
                    || status.volumes.iter().any(|volume| {
                        volume.upper_pending + volume.lower_pending + volume.pending > 0
                            || volume.unacked > 0
                    })
            });
            in_core || node.jobs() > 0 || node.host.outstanding() > 0
        };
        if busy(A) || busy(B) {
            return false;
        }
        let is_up = |n: usize| self.is_alive(n) && self.conn(n) >= Conn::Connected;
        // A connection that only one side believes in explains everything.
        let agreed = is_up(A) == is_up(B) && !(is_up(A) && self.net.is_cut());
        agreed && (!is_up(A) || self.net.bytes_on_the_way() == 0)
    }

    /// Holds every check that applies at rest.
    pub fn check_quiet(&mut self) {
        if !self.is_quiet() {
            return;
        }
        for volume in 0..self.volumes() {
            self.check_marked(volume);
        }
        if self.is_synced() {
            self.check_synced();
        }
    }

    /// BM-1: what differs is marked.
    fn check_marked(&self, volume: usize) {
        if !self.since_sync[volume].known || self.since_sync[volume].troubled {
            return;
        }
        let on_disk = [A, B].map(|n| self.on_disk(n, volume));
        let knows = |n: usize, block: u64| {
            if self.has_disk(n, volume) {
                self.is_marked(n, volume, block)
            } else {
                on_disk[n].as_ref().is_some_and(|on_disk| on_disk.covers(block))
            }
        };
        for &block in &self.differing[volume] {
            assert!(
                knows(A, block) || knows(B, block),
                "BM-1: volume {volume} block {block} differs and is marked nowhere"
            );
            for n in [A, B] {
                if self.is_sole_writer(n, volume) {
                    assert!(
                        knows(n, block),
                        "BM-1: volume {volume} block {block} differs, only node {n} has written \
                         since the disks were equal, and has not marked it"
                    );
                    let safe = on_disk[n].as_ref().is_none_or(|on_disk| on_disk.covers(block));
                    assert!(
                        safe,
                        "BM-2: volume {volume} block {block} differs and would be forgotten by \
                         node {n} if it died now"
                    );
                }
            }
        }
    }

    fn has_disk(&self, n: usize, volume: usize) -> bool {
        self.is_alive(n) && self.state(n, volume).disk >= DiskState::Inconsistent
    }

    /// RS-1, ST-3 and DUR-5: both nodes say that they are equal; so they are, and hold what was
    /// acknowledged. From here on differences are counted anew.
    ///
    /// # Panics
    /// If not, or if the nodes are not connected, up to date and at rest.
    pub fn check_synced(&mut self) {
        assert!(self.is_synced() && self.is_quiet(), "only for nodes in sync and at rest");
        for volume in 0..self.volumes() {
            let [a, b] = [A, B].map(|n| self.state(n, volume));
            assert!(mirrored(a, b), "ST-3: volume {volume}: {a} does not mirror {b}");
            assert!(
                self.differing[volume].is_empty(),
                "RS-1: volume {volume} is UpToDate on both nodes, but blocks {:?} differ",
                self.differing[volume]
            );
            let leftover_kib = [A, B].map(|n| self.status(n).volumes[volume].out_of_sync_kib);
            for n in [A, B] {
                let marked = leftover_kib[n];
                let since = &self.since_sync[volume];
                let is_right = marked <= since.leftover_kib[n] || since.troubled;
                assert!(is_right, "RS-1: volume {volume} node {n}: {marked} KiB are marked");
            }
            self.check_contents(A, volume);
            self.settle_ledger(volume);
            self.stale[A][volume] = false;
            self.stale[B][volume] = false;
            self.since_sync[volume] =
                SinceSync { known: true, leftover_kib, ..SinceSync::default() };
        }
    }

    /// DUR-5: the disk of a node holds, for every sector, something that may be there.
    ///
    /// # Panics
    /// If not.
    pub fn check_contents(&mut self, n: usize, volume: usize) {
        if let Err(why) = self.try_contents(n, volume) {
            panic!("DUR-5: disk of node {n}: {why}");
        }
    }

    /// Whether the disk of a node holds everything that was acknowledged.
    pub fn holds_everything(&mut self, n: usize, volume: usize) -> bool {
        self.try_contents(n, volume).is_ok()
    }

    fn try_contents(&mut self, n: usize, volume: usize) -> Result<(), String> {
        let moment = self.moment();
        let nr = u8::try_from(volume).expect("few volumes");
        let disk = &self.nodes[n].backing[volume].data;
        for sector in self.ledger.sectors_of(volume) {
            self.ledger.check(nr, sector, disk.sector(sector), moment)?;
        }
        Ok(())
    }

    fn settle_ledger(&mut self, volume: usize) {
        let nr = u8::try_from(volume).expect("few volumes");
        let sectors: Vec<u64> = self.ledger.sectors_of(volume).collect();
        let moment = self.moment();
        for sector in sectors {
            let mut bytes = [0; SECTOR];
            self.nodes[A].backing[volume].data.read(sector, &mut bytes);
            self.ledger.settle(nr, sector, &bytes, moment);
        }
    }

    /// Both disks hold the same data below the exposed size.
    ///
    /// # Panics
    /// If not.
    pub fn check_equal(&mut self, volume: usize) {
        self.compare_all(volume);
        assert!(
            self.differing[volume].is_empty(),
            "RS-1: volume {volume}: blocks {:?} differ",
            self.differing[volume]
        );
    }

    /// Bytes of metadata of a node, for tests that compare or damage them.
    #[must_use]
    pub fn metadata_sectors(&self, n: usize, volume: usize) -> Vec<u64> {
        let node = &self.nodes[n];
        let backing = &node.backing[volume];
        let meta = backing.meta.as_ref().map(Disk::sectors);
        let geometry = node.setup.geometry(volume, backing.data.sectors(), meta);
        let areas = geometry.expect("a node with a disk").areas();
        areas
            .iter()
            .flat_map(|area| {
                (area.start..area.end).step_by(usize::try_from(PAGE_SECTORS).expect("small"))
            })
            .collect()
    }
}

/// Whether the two nodes see each other rightly.
fn mirrored(a: State, b: State) -> bool {
    a.role == b.peer && a.peer == b.role && a.disk == b.pdsk && a.pdsk == b.disk && a.conn == b.conn
}

#[cfg(test)]
mod tests {
    use replication_core::control::Command;
    use replication_core::event::HostOp;
    use replication_core::units::{Errno, SectorRange, Span};
    use replication_core::wire::ReplicationProtocol;

    use super::super::disk::{Cut, Fault, Kind, Trouble};
    use super::super::ledger::{Content, recognise};
    use super::super::setup::Setup;
    use super::*;

    fn breaks(w: &mut World, n: usize, kind: Kind) {
        let trouble = Trouble::Fail(Errno::EIO);
        let fault = Fault { kind, range: None, times: Some(1), trouble };
        w.nodes[n].backing[0].data.add_fault(fault);
    }

    /// The disk of a Primary fails a write, which its peer takes, and then the disk of the peer
    /// fails the metadata of the generation that has the write: it is not done (DUR-5).
    #[test]
    fn a_disk_that_fails_over_a_generation_gives_no_word() {
        for seed in 0..20 {
            let mut w = World::new(seed, Setup::with(|s| s.speed.jitter = Span::from_ms(3)));
            w.start_synced();
            w.write(A, 0, 0, 8);
            w.settle();
            breaks(&mut w, A, Kind::Write);
            breaks(&mut w, B, Kind::MetaWrite);
            let range = SectorRange { start: 0, end: 8 };
            let write = w.submit(A, 0, HostOp::Write { fua: true }, range).unwrap();
            w.run_until("the second fault", Span::from_secs(10), |w| {
                w.since_sync[0].broken.len() == 2
            });
            let is_early = w.answer(A, write).is_none();
            w.drain(A);
            assert!(is_early && w.answer(A, write) != Some(Ok(())), "seed {seed}");
            w.kill(A);
            w.restart(A);
            w.run_until("the peer's disk is gone", Span::from_secs(60), |w| {
                w.state(B, 0).disk == DiskState::Diskless
            });
            w.must(B, Command::Attach(None));
            w.wait_synced();
        }
    }

    /// With protocol A a write may be answered before the peer has it. When the local disk is
    /// detached before the answer, and the peer dies before it has written, nobody has the write
    /// any more, and that is no finding (DUR-5).
    #[test]
    fn what_was_under_way_at_a_detach_is_in_doubt() {
        let mut lost = 0;
        for seed in 0..8 {
            let setup = Setup::with(|s| s.protocol(ReplicationProtocol::A));
            let mut w = World::new(seed, setup);
            w.start_synced();
            w.write(A, 0, 0, 8);
            w.wait_synced();
            w.nodes[B].slowness = 1000;
            let range = SectorRange { start: 0, end: 8 };
            let write = w.submit(A, 0, HostOp::Write { fua: true }, range).unwrap();
            w.disk_failed(A, 0);
            w.tell(A, Command::Detach { volume: None, force: true });
            w.run_until("the new generation", Span::from_secs(60), |w| {
                let durable = w.on_disk(B, 0).expect("a disk").superblock.uuids.current | 1;
                let known = w.status(B).volumes[0].uuids[0] | 1;
                durable == known && w.has_logged(B, "new current UUID:")
            });
            w.run_until("the answer", Span::from_secs(60), |w| w.answer(A, write).is_some());
            assert_eq!(w.answer(A, write), Some(Ok(())));
            w.kill(B);
            lost += u32::from(w.differing[0].contains(&0));
            w.heal_disks(B);
            w.restart(B);
            w.wait_connected();
            w.must(A, Command::Attach(None));
            w.wait_synced();
        }
        assert!(lost > 0, "the write was lost at least once");
    }

    /// A Primary that is the target of a resync reads what both nodes have written, after its
    /// source has lost power and before it knows: the only good copy comes back without it, as a
    /// single disk would, and that is no finding. What was flushed is there.
    #[test]
    fn what_a_target_reads_does_not_outlive_the_power_of_its_source() {
        let slow = |s: &mut Setup| s.disk(|disk| disk.rate.max_rate_kib = 400);
        let mut w = World::new(21, Setup::with(slow));
        w.start_synced();
        w.disk_failed(A, 0);
        w.must(A, Command::Invalidate(None));
        let limit = Span::from_secs(10);
        w.run_until("a target", limit, |w| w.conn(A) == Conn::SyncTarget);
        let (flushed, cached) = (8000, 8008);
        w.write(A, 0, flushed, 8);
        w.flush(A, 0);
        w.write(A, 0, cached, 8);
        w.power_cut(B, Cut::LoseAll);
        w.read(A, 0, flushed, 16);
        w.run_until("the loss", limit, |w| w.conn(A) < Conn::Connected);
        let range = SectorRange { start: cached, end: cached + 8 };
        let again = w.request(A, 0, HostOp::Read, range);
        assert!(again.is_err(), "nobody has it for certain (RD-2): {again:?}");
        w.restart(B);
        w.wait_synced();
        w.read_all(A, 0);
        let disk = &w.nodes[A].backing[0].data;
        assert_eq!(recognise(disk.sector(flushed), 0, flushed), Content::Version(1));
        assert_eq!(recognise(disk.sector(cached), 0, cached), Content::Zeroes);
    }
}
