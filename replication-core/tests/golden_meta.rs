//! Metadata that the in-tree driver and the stock tool wrote, byte for byte.
//!
//! The images are the ends of disks: a 12 MiB disk and two 512 MiB disks with internal metadata,
//! in several stages (see `tests/data/traces/README.md`).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

use std::io::Cursor;

use replication_core::meta::al_journal::{
    AlBlock, Replay, Transaction, decode_block, encode_initialised, encode_transaction,
    mark_extents, replay,
};
use replication_core::meta::{Geometry, Magic, MetaFlags, MetaKind, Page, Superblock, Uuids, dump};
use replication_core::units::{AlExtent, Sector};

const MIB_12: Sector = Sector(24_576);
const MIB_512: Sector = Sector(1_048_576);

/// The end of a disk, and the superblock and layout found in it.
struct Tail {
    bytes: Vec<u8>,
    device: Sector,
    superblock: Superblock,
    geometry: Geometry,
}

impl Tail {
    fn new(compressed: &[u8], device: Sector) -> Self {
        let mut bytes = Vec::new();
        lzma_rs::xz_decompress(&mut Cursor::new(compressed), &mut bytes).unwrap();
        let geometry = Geometry::new(MetaKind::Internal, device, device, 0, 0).unwrap();
        let at = offset(&bytes, device, geometry.superblock);
        let superblock = Superblock::decode(&page_at(&bytes, at)).unwrap();
        Self { bytes, device, superblock, geometry }
    }

    fn page(&self, sector: Sector) -> Page {
        page_at(&self.bytes, offset(&self.bytes, self.device, sector))
    }

    fn put(&mut self, sector: Sector, page: &Page) {
        let at = offset(&self.bytes, self.device, sector);
        self.bytes[at..at + 4096].copy_from_slice(&page.0);
    }

    fn al_blocks(&self) -> Vec<Page> {
        (0..self.geometry.al_blocks())
            .map(|index| self.page(self.geometry.al_block_sector(index)))
            .collect()
    }

    fn replay(&self) -> Replay {
        let Geometry { al_stripes, al_stripe_size_4k, .. } = self.geometry;
        replay(&self.al_blocks(), al_stripes, al_stripe_size_4k).unwrap()
    }

    fn transaction(&self, index: u32) -> Box<Transaction> {
        match decode_block(&self.page(self.geometry.al_block_sector(index))) {
            AlBlock::Update(transaction) => transaction,
            other => panic!("block {index}: {other:?}"),
        }
    }

    fn bitmap_pages(&self) -> u64 {
        self.geometry.bitmap_sectors / 8
    }

    /// What has to be done with this disk before it is used: marks the hot extents if the node
    /// was Primary, empties the log, records that it is empty.
    fn apply_al(&mut self) {
        let Replay { extents, updates_found, complete, .. } = self.replay();
        assert!(updates_found && complete);
        if self.superblock.flags.contains(MetaFlags::PRIMARY_IND) {
            for number in 0..self.bitmap_pages() {
                let sector = self.geometry.bitmap_page_sector(number).unwrap();
                let mut page = self.page(sector);
                mark_extents(&extents, number, &mut page);
                self.put(sector, &page);
            }
        }
        let mut page = Page::zeroed();
        encode_initialised(&mut page);
        for index in 0..self.geometry.al_blocks() {
            self.put(self.geometry.al_block_sector(index), &page);
        }
        self.superblock.flags.insert(MetaFlags::AL_CLEAN);
        self.superblock.magic = Magic::V08Clean;
        self.superblock.encode(&mut page);
        self.put(self.geometry.superblock, &page);
    }
}

fn offset(bytes: &[u8], device: Sector, sector: Sector) -> usize {
    let start = device.byte() - u64::try_from(bytes.len()).unwrap();
    usize::try_from(sector.byte() - start).unwrap()
}

fn page_at(bytes: &[u8], at: usize) -> Page {
    let mut page = Page::zeroed();
    page.0.copy_from_slice(&bytes[at..at + 4096]);
    *page
}

macro_rules! tail {
    ($name:literal, $device:expr) => {
        Tail::new(include_bytes!(concat!("data/traces/metadata/", $name, ".xz")), $device)
    };
}

fn all() -> Vec<(&'static str, Tail)> {
    vec![
        ("created", tail!("12M-created-a.tail40k", MIB_12)),
        ("attached", tail!("12M-attached-a.tail40k", MIB_12)),
        ("detached", tail!("12M-detached-a.tail40k", MIB_12)),
        ("conn a", tail!("512M-conn-a.tail64k", MIB_512)),
        ("conn b", tail!("512M-conn-b.tail64k", MIB_512)),
        ("prim a", tail!("512M-prim-a.tail64k", MIB_512)),
        ("prim b", tail!("512M-prim-b.tail64k", MIB_512)),
        ("w1 a", tail!("512M-w1-a.tail64k", MIB_512)),
        ("w1 b", tail!("512M-w1-b.tail64k", MIB_512)),
        ("w100 a", tail!("512M-w100-a.tail64k", MIB_512)),
        ("w100 b", tail!("512M-w100-b.tail64k", MIB_512)),
        ("crash a", tail!("512M-crash-a.tail64k", MIB_512)),
        ("crash b", tail!("512M-crash-b.tail64k", MIB_512)),
        ("applied a", tail!("512M-crash-a-after-apply-al.tail64k", MIB_512)),
    ]
}

/// MD-7: every superblock fits its device, and is written back byte for byte.
#[test]
fn superblocks_are_read_and_written_back() {
    for (name, tail) in all() {
        assert_eq!(tail.superblock.check(&tail.geometry, None), Ok(()), "{name}");
        let mut again = Page::zeroed();
        tail.superblock.encode(&mut again);
        assert!(*again == tail.page(tail.geometry.superblock), "{name}: {again:?}");
        let clean = name == "created" || name == "applied a";
        assert_eq!(tail.superblock.is_clean(), clean, "{name}");
    }
}

/// MD-7: every block of every activity log is read, and written back byte for byte.
#[test]
fn log_blocks_are_read_and_written_back() {
    let mut updates = 0;
    for (name, tail) in all() {
        for (index, page) in tail.al_blocks().iter().enumerate() {
            let mut again = Page::zeroed();
            match decode_block(page) {
                AlBlock::Initialised => encode_initialised(&mut again),
                AlBlock::Update(read) => {
                    updates += 1;
                    let mut slots = vec![None; usize::from(read.context_slots)];
                    let start = usize::from(read.context_start);
                    slots[start..start + read.context.len()].copy_from_slice(&read.context);
                    let start = read.context_start;
                    encode_transaction(read.number, &read.updates, &slots, start, &mut again);
                }
                AlBlock::Invalid => panic!("{name}: block {index} is invalid"),
            }
            assert!(*again == *page, "{name}: block {index}: {again:?}");
        }
    }
    assert_eq!(updates, 12 * 8, "all logs but the created and the applied one hold transactions");
}

/// What creating metadata writes.
#[test]
fn created_image_is_ours() {
    let tail = tail!("12M-created-a.tail40k", MIB_12);
    let mut ours = vec![0; tail.bytes.len()];
    let mut page = Page::zeroed();
    encode_initialised(&mut page);
    for index in 0..tail.geometry.al_blocks() {
        let at = offset(&ours, MIB_12, tail.geometry.al_block_sector(index));
        ours[at..at + 4096].copy_from_slice(&page.0);
    }
    Superblock::fresh(&tail.geometry).encode(&mut page);
    let at = offset(&ours, MIB_12, tail.geometry.superblock);
    ours[at..at + 4096].copy_from_slice(&page.0);
    assert!(ours[4096..] == tail.bytes[4096..], "all but the block of data before the metadata");
}

/// The values of a device through its first stages.
#[test]
fn fields_of_the_first_attach_and_detach() {
    let attached = tail!("12M-attached-a.tail40k", MIB_12);
    let block = attached.superblock;
    assert_eq!((block.la_size, block.uuids.current), (Sector(256), 4));
    assert_eq!((block.flags, block.magic), (MetaFlags::EMPTY, Magic::V08Unclean));
    assert_eq!((block.al_extents, block.la_peer_max_bio_size), (1237, 4096));
    let numbers: Vec<u32> = (0..8).map(|index| attached.transaction(index).number).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
    let read = attached.replay();
    assert_eq!((read.extents.as_slice(), read.complete), ([].as_slice(), true));

    let detached = tail!("12M-detached-a.tail40k", MIB_12);
    let block = detached.superblock;
    let uuids =
        Uuids { current: 0x2e38_4fe1_7f17_4b74, bitmap: 0, history: [0x0272_7684_cfc1_5386, 4] };
    assert_eq!(block.uuids, uuids);
    assert_eq!(block.flags, MetaFlags::CONSISTENT.with(MetaFlags::WAS_UP_TO_DATE, true));
    assert_eq!(detached.transaction(0).updates.as_slice(), [(1236, AlExtent(0))]);
    assert_eq!(detached.replay().extents, [AlExtent(0)]);
}

/// One write on a Primary: one extent, in the last slot.
#[test]
fn first_write_heats_one_extent() {
    let tail = tail!("512M-w1-a.tail64k", MIB_512);
    assert_eq!(tail.superblock.flags, MetaFlags(0x17));
    let newest = tail.transaction(0);
    assert_eq!((newest.number, newest.context_slots, newest.context_start), (8, 67, 0));
    assert_eq!(newest.updates.as_slice(), [(66, AlExtent(0))]);
    assert!(newest.context.len() == 67 && newest.context.iter().all(Option::is_none));
    assert_eq!(tail.replay().extents, [AlExtent(0)]);
}

/// More extents than slots: those that are left, and the bits that the stock tool sets for them.
/// The whole end of the disk is compared, so bitmap, log and superblock are.
#[test]
fn replay_after_a_power_cut_is_the_stock_tools() {
    let mut tail = tail!("512M-crash-a.tail64k", MIB_512);
    assert_eq!(tail.superblock.flags, MetaFlags(0x13));
    assert_eq!(tail.transaction(4).number, 108);
    assert_eq!(tail.transaction(4).updates.as_slice(), [(33, AlExtent(0))]);
    let hot: Vec<AlExtent> = std::iter::once(0).chain(34..=99).map(AlExtent).collect();
    assert_eq!(tail.replay().extents, hot);

    tail.apply_al();
    assert_eq!(tail.superblock.flags, MetaFlags(0x93));
    let applied = tail!("512M-crash-a-after-apply-al.tail64k", MIB_512);
    assert_eq!(tail.bytes.len(), applied.bytes.len());
    let differs = tail.bytes.iter().zip(&applied.bytes).position(|(ours, theirs)| ours != theirs);
    assert_eq!(differs, None, "first differing byte");
}

/// The peer of the crashed node was Secondary: its log is not its own business.
#[test]
fn secondary_has_nothing_to_apply() {
    let mut tail = tail!("512M-crash-b.tail64k", MIB_512);
    assert!(!tail.superblock.flags.contains(MetaFlags::PRIMARY_IND));
    let bitmap = |tail: &Tail| {
        let sector = tail.geometry.bitmap_page_sector(0).unwrap();
        tail.page(sector)
    };
    let before = bitmap(&tail);
    tail.apply_al();
    assert_eq!(bitmap(&tail), before);
    assert!(tail.superblock.is_clean());
}

/// The summary line of the crashed disk, as the stock tool prints it.
#[test]
fn summary_of_the_crashed_disk() {
    let tail = tail!("512M-crash-a.tail64k", MIB_512);
    let expected = "DACBEA78DA42866D:9EB2F4B3B6705997:\
                    0000000000000000:0000000000000000:1:1:1:0:0:0:0";
    assert_eq!(dump::gi_line(&tail.superblock), expected);
}
