//! Internal metadata that its device has outgrown: what the driver remembers of the sizes of a
//! device, and what the operator's tool does with it before an attach.

use std::convert::Infallible;

use replication_core::meta::layout::superblock_sector;
use replication_core::meta::relocate::{Place, Relocation, Step, look};
use replication_core::meta::{KnownSizes, MetaKind, Page, Superblock};
use replication_core::units::{Sector, SectorRange};

use super::disk::{Cut, Disk, PAGE_SECTORS};
use super::node::Backing;
use super::world::World;

impl Backing {
    /// The driver has opened the device: its size is remembered if its metadata is in place.
    pub(crate) fn remember_seen(&mut self, configured: Option<Sector>) {
        let size = Sector(self.data.sectors());
        if self.meta.is_some() {
            // Nobody looks for it here; the checks of writes know the size by it.
            self.known.expect(size);
            return;
        }
        let sector = superblock_sector(MetaKind::Internal, size, size);
        let page = sector.ok().map(|at| read_page(&self.data, at));
        let superblock = page.and_then(|page| Superblock::decode(&page).ok());
        let seen = superblock.and_then(|found| KnownSizes::seen(&found, size, configured));
        if let Some(known) = seen {
            self.known = known;
        }
    }

    /// The driver has looked at the device again.
    pub(crate) fn remember_expected(&mut self) {
        self.known.expect(Sector(self.data.sectors()));
    }

    /// One step of a move; gives the sectors that were written.
    fn carry_out(&mut self, step: Step) -> Option<SectorRange> {
        let (at, page) = match step {
            Step::Copy { from, to } => (to, read_page(&self.data, from)),
            Step::Zero(at) => (at, Page::zeroed()),
            Step::Write(at, page) => (at, page),
            Step::Flush => {
                self.data.flush(self.data.flush_point());
                return None;
            }
        };
        self.data.write(at.0, &page.0, false);
        Some(SectorRange { start: at.0, end: at.0 + PAGE_SECTORS })
    }
}

impl World {
    /// What `drbdctl check-resize` does, and `drbdctl up` and `attach` before they have a disk
    /// attached: metadata that is not at the end of its device any more moves there.
    pub fn check_resize(&mut self, n: usize) {
        for volume in 0..self.volumes() {
            let is_internal =
                self.nodes[n].setup.config.volumes[volume].meta == Some(MetaKind::Internal);
            if is_internal && !self.nodes[n].backing[volume].is_open {
                self.settle_metadata(n, volume);
            }
        }
    }

    fn settle_metadata(&mut self, n: usize, volume: usize) {
        if let Place::Behind(relocation) = self.place_of_metadata(n, volume)
            && self.rng.chance(30)
        {
            self.cut_off(n, volume, &relocation);
        }
        let steps: Vec<Step> = match self.place_of_metadata(n, volume) {
            Place::AtEnd { leftover: None } | Place::Nowhere(_) => return,
            Place::AtEnd { leftover: Some(at) } => vec![Step::Zero(at), Step::Flush],
            Place::Behind(relocation) => relocation.steps().collect(),
        };
        self.note(n, &format!("=== the metadata of volume {volume} moves to the end of its disk"));
        self.nodes[n].backing[volume].remember_expected();
        self.carry_out_steps(n, volume, steps);
    }

    /// A power cut in the middle of a move. What the node had in its cache before is durable by
    /// then.
    fn cut_off(&mut self, n: usize, volume: usize, relocation: &Relocation) {
        let steps: Vec<Step> = relocation.steps().collect();
        let done = usize::try_from(self.rng.below(steps.len() as u64 + 1)).expect("few steps");
        self.note(n, &format!("=== a move of metadata is cut off after {done} steps"));
        let backing = &mut self.nodes[n].backing[volume];
        backing.carry_out(Step::Flush);
        backing.remember_expected();
        self.carry_out_steps(n, volume, steps.into_iter().take(done).collect());
        let backing = &mut self.nodes[n].backing[volume];
        let changed = backing.data.power_cut(Cut::Mixed, &mut self.rng);
        for page in changed {
            let start = page * PAGE_SECTORS;
            self.data_changed(volume, SectorRange { start, end: start + PAGE_SECTORS });
        }
    }

    fn carry_out_steps(&mut self, n: usize, volume: usize, steps: Vec<Step>) {
        for step in steps {
            if let Some(written) = self.nodes[n].backing[volume].carry_out(step) {
                self.data_changed(volume, written);
            }
        }
    }

    /// Where the internal metadata of a node's disk is.
    pub(crate) fn place_of_metadata(&self, n: usize, volume: usize) -> Place {
        let node = &self.nodes[n];
        let backing = &node.backing[volume];
        let configured = node.setup.config.volumes[volume].disk.size;
        let read = |at: Sector| Ok::<_, Infallible>(read_page(&backing.data, at));
        match look(Sector(backing.data.sectors()), configured, &backing.known, read) {
            Ok(place) => place,
            Err(never) => match never {},
        }
    }
}

fn read_page(disk: &Disk, at: Sector) -> Box<Page> {
    let mut page = Page::zeroed();
    disk.read(at.0, &mut page.0);
    page
}
