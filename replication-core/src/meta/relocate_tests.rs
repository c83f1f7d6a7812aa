use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use proptest::prelude::*;

use super::super::layout::MAX_DATA_SECTORS;
use super::super::page::PAGE_SIZE;
use super::super::{Magic, Uuids};
use super::*;

/// A device whose pages are durable, with writes that may not be.
#[derive(Clone, Default)]
struct Medium {
    durable: BTreeMap<u64, Box<Page>>,
    cached: Vec<(u64, Box<Page>)>,
}

impl Medium {
    fn read(&self, at: Sector) -> Box<Page> {
        let cached = self.cached.iter().rev().find(|(sector, _)| *sector == at.0);
        let page = cached.map(|(_, page)| page).or_else(|| self.durable.get(&at.0));
        page.map_or_else(Page::zeroed, Clone::clone)
    }

    fn carry_out(&mut self, step: Step) {
        match step {
            Step::Copy { from, to } => self.cached.push((to.0, self.read(from))),
            Step::Zero(at) => self.cached.push((at.0, Page::zeroed())),
            Step::Write(at, page) => self.cached.push((at.0, page)),
            Step::Flush => self.durable.extend(self.cached.drain(..)),
        }
    }

    /// What a power cut leaves, if the cached writes in `lost` did not arrive.
    fn after_crash(&self, lost: &BTreeSet<usize>) -> Self {
        let mut left = Self { durable: self.durable.clone(), cached: Vec::new() };
        for (index, (sector, page)) in self.cached.iter().enumerate() {
            if !lost.contains(&index) {
                left.durable.insert(*sector, page.clone());
            }
        }
        left
    }

    fn look(&self, device: u64, known: &[u64]) -> Place {
        let known = KnownSizes(known.iter().copied().map(Sector).collect());
        let read = |at: Sector| Ok::<_, Infallible>(self.read(at));
        look(Sector(device), None, &known, read).unwrap_or_else(|never| match never {})
    }

    /// Looks, moves and erases as the callers do.
    fn settle(&mut self, device: u64, known: &[u64]) {
        match self.look(device, known) {
            Place::AtEnd { leftover: None } => {}
            Place::AtEnd { leftover: Some(at) } => {
                [Step::Zero(at), Step::Flush].into_iter().for_each(|step| self.carry_out(step));
            }
            Place::Behind(relocation) => {
                relocation.steps().for_each(|step| self.carry_out(step));
            }
            Place::Nowhere(nowhere) => panic!("{nowhere}"),
        }
    }
}

fn layout(device: u64) -> Geometry {
    Geometry::new(MetaKind::Internal, Sector(device), Sector(device), 0, 0).unwrap()
}

fn numbered(number: u64) -> Box<Page> {
    let mut page = Page::zeroed();
    page.0.chunks_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
    page
}

/// A device in use until its node died, every page of its metadata and its last data told apart.
fn used(device: u64) -> (Medium, Superblock) {
    let geometry = layout(device);
    let mut superblock = Superblock::fresh(&geometry);
    superblock.la_size = geometry.capacity;
    superblock.uuids = Uuids { current: 0x11, bitmap: 0x22, history: [0x33, 0x44] };
    superblock.flags = MetaFlags::CONSISTENT.with(MetaFlags::PRIMARY_IND, true);
    superblock.magic = Magic::V08Unclean;
    let mut medium = Medium::default();
    let data =
        SectorRange { start: geometry.capacity.0.saturating_sub(80), end: geometry.capacity.0 };
    for area in [data, geometry.areas()[1], geometry.areas()[2]] {
        for sector in (area.start..area.end).step_by(8) {
            medium.durable.insert(sector, numbered(sector + 1));
        }
    }
    let mut page = Page::zeroed();
    superblock.encode(&mut page);
    medium.durable.insert(geometry.superblock.0, page);
    (medium, superblock)
}

/// The metadata of `old` is at the end of `new`, or says that all of it counts as out of sync; and
/// no data was touched.
fn check_moved(medium: &Medium, superblock: &Superblock, old: u64, new: u64) -> bool {
    let (from, to) = (layout(old), layout(new));
    assert_eq!(medium.look(new, &[old]), Place::AtEnd { leftover: None });
    let found = Superblock::decode(&medium.read(to.superblock)).unwrap();
    let is_certain = !found.flags.contains(MetaFlags::FULL_SYNC);
    let mut expected = *superblock;
    expected.set_geometry(&to);
    if !is_certain {
        expected.flags.insert(MetaFlags::FULL_SYNC);
        expected.flags.insert(MetaFlags::AL_DISABLED);
    }
    assert_eq!(found, expected);
    for sector in (from.capacity.0.saturating_sub(80)..from.capacity.0).step_by(8) {
        assert!(*medium.read(Sector(sector)) == *numbered(sector + 1), "data of {sector}");
    }
    let page = |area: Sector, page: u64| medium.read(Sector(area.0 + page * 8));
    for number in (0..to.bitmap_sectors / 8).filter(|_| is_certain) {
        let sector = from.bitmap.0 + number * 8;
        let old =
            if sector < from.activity_log.0 { *numbered(sector + 1) } else { *Page::zeroed() };
        assert!(*page(to.bitmap, number) == old, "page {number} of the bitmap");
    }
    for number in (0..u64::from(to.al_blocks())).filter(|_| is_certain) {
        let old = numbered(from.activity_log.0 + number * 8 + 1);
        assert!(*page(to.activity_log, number) == *old, "block {number} of the log");
    }
    // The device as small as it was has no metadata any more, at the latest when its bitmap and its
    // log are written.
    let is_gone = Superblock::decode(&medium.read(from.superblock)).is_err();
    assert!(is_gone || !is_certain && touches(&to, from.superblock));
    is_certain
}

/// A device of 64 MiB that has become 80 MiB: every step by its number.
#[test]
fn the_steps_of_a_move() {
    let (medium, _) = used(131_072);
    let Place::Behind(relocation) = medium.look(163_840, &[131_072]) else { panic!("it moves") };
    assert_eq!((relocation.old_size(), relocation.new_size()), (Sector(131_072), Sector(163_840)));
    assert!(!relocation.overlaps());
    let steps: Vec<Step> = relocation.steps().collect();
    assert_eq!(steps.len(), 8 + 1 + 1 + 2 + 2);
    let copy = |from, to| Step::Copy { from: Sector(from), to: Sector(to) };
    assert_eq!(steps[0], copy(131_056, 163_824));
    assert_eq!(steps[7], copy(131_000, 163_768));
    assert_eq!(steps[8], copy(130_992, 163_760));
    assert_eq!(steps[9], Step::Flush);
    assert!(matches!(steps[10], Step::Write(Sector(163_832), _)));
    assert_eq!(steps[11..], [Step::Flush, Step::Zero(Sector(131_064)), Step::Flush]);
}

/// Where nothing is found, and why.
#[test]
fn nowhere() {
    let (medium, _) = used(131_072);
    let nowhere = |device, known: &[u64]| match medium.look(device, known) {
        Place::Nowhere(nowhere) => nowhere,
        place => panic!("{place:?}"),
    };
    assert_eq!(nowhere(163_840, &[]), Nowhere::NotFound);
    assert_eq!(nowhere(163_840, &[131_064, 163_840]), Nowhere::NotFound);
    let (was, now) = (Sector(131_072), Sector(131_000));
    assert_eq!(nowhere(131_000, &[131_072]), Nowhere::Shrunk { was, now });
    // An older size says nothing: since then the metadata may have moved on.
    let (was, now) = (Sector(170_000), Sector(163_840));
    assert_eq!(nowhere(163_840, &[170_000, 131_072]), Nowhere::Shrunk { was, now });
    assert!(matches!(
        nowhere(7, &[]),
        Nowhere::Unfit(
            FormatError::DataDeviceTooSmall { .. } | FormatError::MetaDeviceTooSmall { .. }
        )
    ));
    let too_large = MAX_DATA_SECTORS * 2;
    assert!(matches!(
        nowhere(too_large, &[131_072]),
        Nowhere::Unfit(FormatError::DeviceTooLarge { .. })
    ));
    // A device at the edge of another page of bitmap grows by one sector.
    let (medium, _) = used(262_144);
    let Place::Nowhere(nowhere) = medium.look(262_145, &[262_144]) else { panic!("it stays") };
    let (was, now) = (Sector(262_144), Sector(262_145));
    assert_eq!(nowhere, Nowhere::GrownTooLittle { was, now, needed: Sector(262_152) });
    assert!(matches!(medium.look(262_152, &[262_144]), Place::Behind(_)));
    assert!(matches!(medium.look(262_145, &[]), Place::Nowhere(Nowhere::Unfit(_))));
}

/// Only metadata that was written for the size of its device replaces what is known: at 128 MiB the
/// superblock stays where it is when the device grows by less than a page, and the bitmap does not.
#[test]
fn metadata_is_seen_at_its_own_size() {
    let (medium, superblock) = used(262_144);
    let seen = |size| KnownSizes::seen(&superblock, Sector(size), None);
    assert_eq!(layout(262_144).superblock, layout(262_145).superblock);
    assert_eq!(seen(262_144), Some(KnownSizes(vec![Sector(262_144)])));
    for size in [7, 262_145, 262_152] {
        assert_eq!(seen(size), None, "{size} sectors");
    }
    // What the operator has set counts, as it does when the metadata is looked for.
    let mut shrunk = superblock;
    shrunk.la_size = Sector(layout(262_144).capacity.0 + 8);
    assert_eq!(KnownSizes::seen(&shrunk, Sector(262_144), None), None);
    assert!(KnownSizes::seen(&shrunk, Sector(262_144), Some(Sector(1000))).is_some());
    assert_eq!(medium.look(262_144, &[]), Place::AtEnd { leftover: None });
    assert!(matches!(medium.look(262_145, &[]), Place::Nowhere(Nowhere::Unfit(_))));
}

/// The newest of several sizes that has metadata counts: older metadata is outdated.
#[test]
fn the_newest_metadata_counts() {
    let (mut medium, _) = used(131_072);
    let (newer, _) = used(163_840);
    medium.durable.extend(newer.durable);
    let Place::Behind(found) = medium.look(200_000, &[180_000, 163_840, 131_072]) else {
        panic!("it moves")
    };
    assert_eq!(found.old_size(), Sector(163_840));
}

/// A page of the data is never taken for what a move has left behind.
#[test]
fn data_is_no_leftover() {
    let (mut medium, mut superblock) = used(131_072);
    medium.settle(163_840, &[131_072]);
    let (older, _) = used(131_072);
    let sector = layout(131_072).superblock;
    medium.durable.insert(sector.0, older.read(sector));
    let found = Place::AtEnd { leftover: Some(sector) };
    assert_eq!(medium.look(163_840, &[163_840, 131_072]), found);
    superblock.set_geometry(&layout(163_840));
    for la_size in [0, sector.0 + 1, sector.0 + 8] {
        superblock.la_size = Sector(la_size);
        let mut page = Page::zeroed();
        superblock.encode(&mut page);
        medium.durable.insert(layout(163_840).superblock.0, page);
        let place = medium.look(163_840, &[163_840, 131_072]);
        assert_eq!(place, Place::AtEnd { leftover: None }, "data up to {la_size}");
    }
}

/// Only the superblock that was moved is erased where it was: one of another generation may be the
/// better one, as may one that nobody has announced to move. A device that was larger before has an
/// outdated superblock at its end again.
#[test]
fn other_metadata_is_no_leftover() {
    let (medium, superblock) = used(131_072);
    let at_end = |change: fn(&mut Superblock)| {
        let mut end = superblock;
        end.set_geometry(&layout(163_840));
        change(&mut end);
        let mut page = Page::zeroed();
        end.encode(&mut page);
        let mut medium = medium.clone();
        medium.durable.insert(layout(163_840).superblock.0, page);
        medium
    };
    let moved = at_end(|_| {});
    let sector = layout(131_072).superblock;
    let found = |medium: &Medium, known: &[u64]| match medium.look(163_840, known) {
        Place::AtEnd { leftover } => leftover,
        place => panic!("{place:?}"),
    };
    assert_eq!(found(&moved, &[163_840, 131_072]), Some(sector));
    for known in [&[131_072][..], &[200_000, 163_840, 131_072]] {
        assert_eq!(found(&moved, known), None, "{known:?}");
    }
    let others: [fn(&mut Superblock); 5] = [
        |end| end.uuids.current += 2,
        |end| end.uuids.bitmap += 2,
        |end| end.uuids.history[0] += 2,
        |end| end.uuids.history[1] += 2,
        |end| end.device_uuid = 1,
    ];
    for change in others {
        assert_eq!(found(&at_end(change), &[163_840, 131_072]), None);
    }
}

/// The list forgets neither the newest size nor the one that metadata was seen at; its text is
/// read back, and nothing else is.
#[test]
fn known_sizes() {
    let mut known = KnownSizes(vec![Sector(1)]);
    (2..50).for_each(|size| known.expect(Sector(size)));
    known.expect(Sector(48));
    let sizes: Vec<u64> = known.iter().map(|size| size.0).collect();
    assert_eq!(sizes.len(), MAX_KNOWN_SIZES);
    assert_eq!((sizes[..2].to_vec(), sizes[MAX_KNOWN_SIZES - 1]), (vec![48, 49], 1));
    assert_eq!(KnownSizes::parse(&format!("# a disk\n{known}")), Ok(known.clone()));
    let text = KnownSizes(vec![Sector(16), Sector(8)]).to_string();
    assert_eq!(text, "# sectors of the disk, newest size first\n16\n8\n");
    assert_eq!(KnownSizes::parse(""), Ok(KnownSizes::default()));
    let found = String::from("8 s\\u{1b}");
    assert_eq!(
        KnownSizes::parse("8\n8 s\u{1b}\n"),
        Err(KnownSizesError::NoNumber { line: 2, found })
    );
    let limit = MAX_KNOWN_SIZES;
    assert_eq!(KnownSizes::parse(&format!("{known}7\n")), Err(KnownSizesError::TooMany { limit }));
}

/// Pairs of sizes of which the second is larger: by pages, by pages of bitmap, by a lot.
fn growth() -> impl Strategy<Value = (u64, u64)> {
    let old = prop_oneof![200_u64..5000, 261_900_u64..262_400, 1_000_000_u64..9_000_000];
    let more = prop_oneof![8_u64..200, 200_u64..2000, 261_900_u64..262_400, 2000_u64..9_000_000];
    (old, more).prop_map(|(old, more)| (old, old + more))
}

proptest! {
    /// MD-1, MD-5: cut off after any step, with any of the writes lost that are not durable, and
    /// done again, a move comes to the same end; at the worst with a full sync, and only where the
    /// two places overlap.
    #[test]
    fn a_move_that_is_cut_off_is_done_again(
        (old, new) in growth(),
        cut in any::<prop::sample::Index>(),
        lost in prop::collection::vec(any::<bool>(), 64),
    ) {
        let (mut medium, superblock) = used(old);
        // The new part of the device holds something.
        for area in layout(new).areas() {
            for sector in (area.start..area.end).step_by(8).filter(|sector| *sector >= old) {
                medium.durable.insert(sector, numbered(!sector));
            }
        }
        let fresh = medium.clone();
        let Place::Behind(relocation) = medium.look(new, &[new, old]) else {
            panic!("{:?}", medium.look(new, &[new, old]))
        };
        let steps: Vec<Step> = relocation.steps().collect();
        for step in &steps[..cut.index(steps.len() + 1)] {
            medium.carry_out(step.clone());
        }
        let lost = (0..medium.cached.len()).filter(|index| lost[index % 64]).collect();
        let mut left = medium.after_crash(&lost);
        left.settle(new, &[new, old]);
        let is_certain = check_moved(&left, &superblock, old, new);
        prop_assert!(is_certain || relocation.overlaps());
        // Nobody has cut this one off.
        medium = fresh;
        medium.settle(new, &[new, old]);
        prop_assert!(check_moved(&medium, &superblock, old, new));
    }

    /// Whatever is on the device and in the list, looking ends in an answer, and a move stays
    /// inside of the device.
    #[test]
    fn any_bytes_are_judged(
        device in 0_u64..300_000,
        known in prop::collection::vec(0_u64..300_000, 0..5),
        la_size in 0_u64..300_000,
        flags in any::<u32>(),
        written_for in 200_u64..300_000,
    ) {
        let (mut medium, mut superblock) = used(written_for);
        superblock.la_size = Sector(la_size);
        superblock.flags = MetaFlags(flags);
        let mut page = Page::zeroed();
        superblock.encode(&mut page);
        medium.durable.insert(layout(written_for).superblock.0, page);
        let known: Vec<u64> = known.into_iter().chain([written_for]).collect();
        if let Place::Behind(relocation) = medium.look(device, &known) {
            let end = device * 512 / PAGE_SIZE as u64 * 8;
            for step in relocation.steps() {
                match step {
                    Step::Copy { to: at, .. } | Step::Zero(at) | Step::Write(at, _) => {
                        prop_assert!(at.0 + 8 <= end && at >= layout(written_for).bitmap);
                    }
                    Step::Flush => {}
                }
            }
        }
    }
}
