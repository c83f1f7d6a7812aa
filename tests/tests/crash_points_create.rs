//! Crash points of the creation of metadata (MD-1, MD-2).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

use drbdctl::md::create::{Step, creation};
use replication_core::units::SECTORS_PER_BLOCK;
use tests::crash::explore::Effort;
use tests::crash::history::{History, extents, setup};
use tests::crash::medium::{Device, Image, Medium, SECTOR};
use tests::crash::recover::{recover, superblock_of};
use tests::sim::rng::Rng;
use tests::sim::setup::NodeSetup;

/// After a crash there is the old metadata, none, or the new one, all of each.
fn create_over(name: &str, setup: &NodeSetup, old: &Image) {
    let before = recover(setup, old, 1, None).ok().map(|(found, _)| found);
    let devices = &setup.devices[0];
    let geometry = setup.geometry(0, devices.data, devices.meta).unwrap();
    let device = if devices.meta.is_some() { Device::Meta } else { Device::Data };
    let mut medium = Medium::new(old.clone());
    let mut rng = Rng::new(9);
    let (mut states, mut none, mut olds, mut news) = (0, 0, 0, 0);
    let effort = Effort::from_environment();
    for step in creation(&geometry) {
        match step {
            Step::Say(_) => {}
            Step::Write(sector, page) => {
                let number = medium.submit(device, sector.0, &page.0, false);
                medium.finish(number);
            }
            Step::Zero(area) => {
                let zeroes = vec![0; usize::try_from(area.sectors()).unwrap() * SECTOR];
                let number = medium.submit(device, area.start, &zeroes, false);
                medium.finish(number);
            }
            Step::Flush => {
                let covered = medium.covered_now(device);
                medium.flushed(&covered);
            }
        }
        for image in medium.crash_images(effort.states, &mut rng) {
            states += 1;
            let Ok((found, _)) = recover(setup, &image, 1, None) else {
                assert_eq!(superblock_of(setup, &image), None, "metadata that is refused");
                none += 1;
                continue;
            };
            if before.as_ref() == Some(&found) {
                olds += 1;
                continue;
            }
            news += 1;
            let marked = found.bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
            assert_eq!(marked, found.sectors.div_ceil(SECTORS_PER_BLOCK), "new: all differs");
            assert!(!found.crashed_primary);
        }
    }
    eprintln!("create-md {name}: {states} states, {none} without metadata, {olds} old, {news} new");
    assert!(states > 50 && none > 10 && news > 0 && (before.is_none() || olds > 0));
}

#[test]
fn creation_on_an_empty_disk() {
    for external in [None, Some(2048)] {
        let mut setup = setup(extents(3));
        if let Some(sectors) = external {
            setup.external_meta(sectors);
        }
        create_over("empty", &setup.nodes[0], &Image::new());
    }
}

/// The old metadata has bits and a used activity log: nothing of it gets into the new.
#[test]
fn creation_over_metadata_in_use() {
    let setup = setup(extents(5));
    let mut h = History::synced(1, &setup);
    h.link(false);
    for round in 0..8 {
        h.write_and_wait(0, (round % 5) * 8192, 16);
    }
    create_over("in use", &setup.nodes[0], &h.pair.nodes[0].medium.finished_view());
}
