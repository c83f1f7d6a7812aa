//! Our metadata against the stock `drbdmeta`, on sparse files: each reads what the other wrote,
//! both write the same bytes (MD-7).
//!
//! Needs the program `drbdmeta` (package `drbd-utils`), no kernel module and no device. Without
//! it these tests fail and say so. The tool locks a minor number and remembers internal metadata
//! under `/var/lib/drbd`: each image uses a minor of its own and removes those traces.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]
#![allow(clippy::disallowed_types, reason = "the tool works on files")]

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use replication_core::meta::al_journal::{
    self, Replay, block_index, encode_initialised, encode_transaction, mark_extents,
    next_context_start,
};
use replication_core::meta::{Geometry, Magic, MetaFlags, MetaKind, Page, Superblock, Uuids, dump};
use replication_core::units::{AlExtent, Sector};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// The largest file of common file systems, a page short of 16 TiB.
const LARGEST: u64 = 16 * TIB - 4096;

static IMAGES: AtomicU32 = AtomicU32::new(0);

/// A sparse file that plays the metadata device.
struct Image {
    dir: TempDir,
    file: File,
    minor: u32,
    kind: MetaKind,
    geometry: Geometry,
}

impl Image {
    /// A device of `bytes`, and a layout on it. With external metadata the data device, which
    /// the tool never sees, is as large as the metadata allows or 1 TiB.
    fn new(kind: MetaKind, bytes: u64, stripes: u32, stripe_size_4k: u32) -> Self {
        let dir = TempDir::new().unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("disk"))
            .unwrap();
        file.set_len(bytes).unwrap();
        let meta = Sector(bytes / 512);
        let data = match kind {
            MetaKind::Internal => meta,
            MetaKind::Flexible | MetaKind::Indexed(_) => Sector(TIB / 512),
        };
        let geometry = Geometry::new(kind, data, meta, stripes, stripe_size_4k).unwrap();
        // A range of minors for each process, so that test runs side by side do not collide.
        let minor =
            1000 + (std::process::id() % 5000) * 200 + IMAGES.fetch_add(1, Ordering::Relaxed);
        Self { dir, file, minor, kind, geometry }
    }

    fn internal(bytes: u64) -> Self {
        Self::new(MetaKind::Internal, bytes, 1, 8)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Runs the tool on the image and returns what it printed; fails if it fails.
    fn tool(&self, arguments: &[&str]) -> String {
        let kind = match self.kind {
            MetaKind::Internal => "internal".to_owned(),
            MetaKind::Flexible => "flex-external".to_owned(),
            MetaKind::Indexed(index) => index.to_string(),
        };
        let output = Command::new("drbdmeta")
            .args(["--force", &self.minor.to_string(), "v08"])
            .arg(self.path())
            .arg(kind)
            .args(arguments)
            .output()
            .expect("drbdmeta has to be installed for these tests (package drbd-utils)");
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {}\n{text}{errors}", output.status);
        text
    }

    fn tool_create(&self) {
        let stripes = self.geometry.al_stripes.to_string();
        let size_kb = (self.geometry.al_stripe_size_4k * 4).to_string();
        self.tool(&["create-md", "--al-stripes", &stripes, "--al-stripe-size-kB", &size_kb]);
    }

    fn read(&self, sector: Sector, page: &mut Page) {
        self.file.read_exact_at(&mut page.0, sector.byte()).unwrap();
    }

    fn write(&self, sector: Sector, page: &Page) {
        self.file.write_all_at(&page.0, sector.byte()).unwrap();
    }

    /// Creates metadata on the new file, where the bitmap is zero already.
    fn create(&self) {
        self.empty_log();
        self.put_superblock(&Superblock::fresh(&self.geometry));
    }

    fn empty_log(&self) {
        let mut page = Page::zeroed();
        encode_initialised(&mut page);
        for index in 0..self.geometry.al_blocks() {
            self.write(self.geometry.al_block_sector(index), &page);
        }
    }

    fn superblock(&self) -> Superblock {
        let mut page = Page::zeroed();
        self.read(self.geometry.superblock, &mut page);
        let superblock = Superblock::decode(&page).unwrap();
        assert_eq!(superblock.check(&self.geometry, None), Ok(()));
        superblock
    }

    fn put_superblock(&self, superblock: &Superblock) {
        let mut page = Page::zeroed();
        superblock.encode(&mut page);
        self.write(self.geometry.superblock, &page);
    }

    fn put_words(&self, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, self.geometry.bitmap.byte()).unwrap();
    }

    fn apply_al(&self) {
        let log: Vec<Page> = (0..self.geometry.al_blocks())
            .map(|index| {
                let mut page = Page::zeroed();
                self.read(self.geometry.al_block_sector(index), &mut page);
                *page
            })
            .collect();
        let Geometry { al_stripes, al_stripe_size_4k, .. } = self.geometry;
        let Replay { extents, complete, .. } =
            al_journal::replay(&log, al_stripes, al_stripe_size_4k).unwrap();
        assert!(complete);
        let mut superblock = self.superblock();
        if superblock.flags.contains(MetaFlags::PRIMARY_IND) {
            for number in 0..self.geometry.bitmap_sectors / 8 {
                let sector = self.geometry.bitmap_page_sector(number).unwrap();
                let mut page = Page::zeroed();
                self.read(sector, &mut page);
                if mark_extents(&extents, number, &mut page) > 0 {
                    self.write(sector, &page);
                }
            }
        }
        self.empty_log();
        superblock.flags.insert(MetaFlags::AL_CLEAN);
        superblock.magic = Magic::V08Clean;
        self.put_superblock(&superblock);
    }

    fn dump(&self) -> String {
        let mut text = String::new();
        dump::dump(&self.superblock(), &self.geometry, &mut text, |number, page| {
            self.read(self.geometry.bitmap_page_sector(number).unwrap(), page);
            Ok::<(), std::fmt::Error>(())
        })
        .unwrap();
        text
    }

    fn save(&self, text: &str) -> PathBuf {
        let path = self.dir.path().join("dump.txt");
        File::create(&path).unwrap().write_all_at(text.as_bytes(), 0).unwrap();
        path
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        for trace in [
            format!("/var/lib/drbd/drbd-minor-{}.lkbd", self.minor),
            format!("/var/lock/drbd-147-{}", self.minor),
        ] {
            if Path::new(&trace).exists() {
                std::fs::remove_file(&trace).unwrap();
            }
        }
    }
}

/// Fails unless both files hold the same bytes; holes are read as the zero bytes they are.
fn assert_same(ours: &Image, theirs: &Image, what: &str) {
    let size = ours.file.metadata().unwrap().len();
    assert_eq!(size, theirs.file.metadata().unwrap().len(), "{what}");
    // All of a small file; of a large one the metadata alone, which may take a while as it is.
    let areas = ours.geometry.areas();
    let start = areas.iter().map(|area| area.start * 512).min().unwrap();
    let mut at = if size <= 64 * MIB { 0 } else { start };
    let (mut left, mut right) = (vec![0_u8; 1 << 20], vec![0_u8; 1 << 20]);
    while at < size {
        let len = usize::try_from((size - at).min(1 << 20)).unwrap();
        ours.file.read_exact_at(&mut left[..len], at).unwrap();
        theirs.file.read_exact_at(&mut right[..len], at).unwrap();
        if left[..len] != right[..len] {
            let first = left.iter().zip(&right).position(|(ours, theirs)| ours != theirs).unwrap();
            let byte = at + u64::try_from(first).unwrap();
            panic!("{what}: byte {byte} differs, layout {:?}", ours.geometry);
        }
        at += 1 << 20;
    }
}

/// Numbers that look random and are the same in every run.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Created images are the same, byte for byte, for every kind and many sizes.
#[test]
fn created_images_are_identical() {
    let internal = [
        68 << 10,
        70_144,
        73_216,
        MIB,
        12 * MIB,
        128 * MIB,
        128 * MIB + 512,
        128 * MIB + 4096,
        144 * MIB - 512,
        3 * GIB + 1536,
        TIB,
        TIB + 4096 + 512,
    ];
    let flexible = [68 << 10, 70_144, 2 * MIB, 2 * MIB + 1536, 32 * MIB + 3584];
    let cases = internal
        .map(|bytes| (MetaKind::Internal, bytes))
        .into_iter()
        .chain(flexible.map(|bytes| (MetaKind::Flexible, bytes)))
        .chain([
            (MetaKind::Indexed(0), 128 * MIB),
            (MetaKind::Indexed(0), 300 * MIB),
            (MetaKind::Indexed(1), 256 * MIB),
        ]);
    for (kind, bytes) in cases {
        let (ours, theirs) = (Image::new(kind, bytes, 1, 8), Image::new(kind, bytes, 1, 8));
        ours.create();
        theirs.tool_create();
        assert_same(&ours, &theirs, &format!("{kind:?} {bytes}"));
        assert_eq!(theirs.superblock(), Superblock::fresh(&theirs.geometry));
    }
}

/// The same for other shapes of the activity log.
#[test]
fn striped_images_are_identical() {
    for (stripes, size) in [(3, 4), (8, 1), (2, 8), (64, 1), (5, 1024)] {
        for (kind, bytes) in [(MetaKind::Internal, 64 * MIB), (MetaKind::Flexible, 48 * MIB + 512)]
        {
            let ours = Image::new(kind, bytes, stripes, size);
            let theirs = Image::new(kind, bytes, stripes, size);
            ours.create();
            theirs.tool_create();
            assert_same(&ours, &theirs, &format!("{kind:?} {bytes}, log {stripes} x {size}"));
        }
    }
}

/// On the largest devices the tool finds our metadata where it looks for its own. (Creating it
/// there with the tool would write half a gigabyte of zero bytes.)
#[test]
fn largest_images_are_found() {
    for bytes in [2 * TIB + 512, 8 * TIB - 1024, LARGEST, LARGEST - 512] {
        let image = Image::internal(bytes);
        image.create();
        let text = image.tool(&["dump-md"]);
        assert_eq!(without_invocation(&text), without_flags(&image.dump()), "{bytes} bytes");
        assert_eq!(image.tool(&["dstate"]), "Inconsistent\n");
    }
}

/// The text of a dump from its first line of content on, with the flags that the tool hides.
fn without_invocation(text: &str) -> String {
    let start = text.find("version").unwrap();
    without_flags(&text[start..])
}

fn without_flags(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = if line.trim_start().starts_with("flags 0x") { "flags" } else { line };
        writeln!(out, "{line}").unwrap();
    }
    out
}

/// Runs of words of all kinds and lengths around those that matter for the text form.
fn words(seed: u64, count: u64) -> Vec<u64> {
    let mut random = Lcg(seed);
    let mut words = Vec::new();
    while words.len() < usize::try_from(count).unwrap() {
        let word =
            [0, u64::MAX, 5, random.below(u64::MAX)][usize::try_from(random.below(4)).unwrap()];
        let limit = [3, 12, 70, 700][usize::try_from(random.below(4)).unwrap()];
        let run = 1 + random.below(limit);
        words.extend((0..run).map(|_| word));
    }
    words.truncate(usize::try_from(count).unwrap());
    words
}

fn used(geometry: &Geometry, la_size: u64, flags: u32) -> Superblock {
    Superblock {
        la_size: Sector(la_size),
        uuids: Uuids {
            current: 0x1234_5678_9abc_def1,
            bitmap: 0xf000_0000_0000_0002,
            history: [0x33, 0x44],
        },
        flags: MetaFlags(flags),
        la_peer_max_bio_size: 1 << 20,
        ..Superblock::fresh(geometry)
    }
}

/// The text form of many bitmaps is the tool's, character for character but for the flags.
#[test]
fn dumps_are_identical() {
    for seed in 0..12 {
        let image = Image::internal(600 * MIB);
        let la_size =
            [1, 1000, 262_144, 262_145, 600_009, 1_200_000][usize::try_from(seed % 6).unwrap()];
        image.create();
        image.put_superblock(&used(&image.geometry, la_size, 0x91));
        image.put_words(&words(seed, la_size.div_ceil(512)));
        let theirs = without_invocation(&image.tool(&["dump-md"]));
        assert_eq!(without_flags(&image.dump()), theirs, "seed {seed}");
    }
}

/// Our text is restored by the tool, the tool's by us, to the same bytes.
#[test]
fn dumps_are_restored_by_the_other() {
    for seed in 20..24 {
        let source = Image::internal(300 * MIB);
        source.create();
        source.put_superblock(&used(&source.geometry, 600_009, 0xb5));
        source.put_words(&words(seed, 1172));

        let by_tool = Image::internal(300 * MIB);
        by_tool.tool_create();
        let path = by_tool.save(&source.dump());
        by_tool.tool(&["restore-md", path.to_str().unwrap()]);
        assert_same(&source, &by_tool, &format!("restored by the tool, seed {seed}"));

        let by_us = Image::internal(300 * MIB);
        let restored = dump::parse(&source.tool(&["dump-md"])).unwrap();
        by_us.empty_log();
        by_us.put_superblock(&Superblock {
            // The tool does not say the flags.
            flags: MetaFlags(0xb5),
            ..restored.superblock(&by_us.geometry)
        });
        for number in 0..by_us.geometry.bitmap_sectors / 8 {
            let mut page = Page::zeroed();
            restored.read_page(number, &mut page);
            by_us.write(by_us.geometry.bitmap_page_sector(number).unwrap(), &page);
        }
        assert_same(&source, &by_us, &format!("restored by us, seed {seed}"));
    }
}

/// Every combination of the flags that the summary shows, both ways.
#[test]
fn summaries_are_identical() {
    let image = Image::internal(12 * MIB);
    image.create();
    for flags in 0..0x80 {
        image.put_superblock(&used(&image.geometry, 24_000, flags | 0x80));
        let ours = dump::gi_line(&image.superblock());
        assert_eq!(image.tool(&["get-gi"]).trim_end(), ours, "flags {flags:#x}");
    }
    image.tool(&["set-gi", "00000000000000AA:00000000000000BB:CC:DD:1:1:0:1:0:1:0"]);
    let superblock = image.superblock();
    assert_eq!(superblock.uuids, Uuids { current: 0xaa, bitmap: 0xbb, history: [0xcc, 0xdd] });
    assert_eq!(superblock.flags, MetaFlags(0x80 | 0x01 | 0x10 | 0x04 | 0x20));
    assert_eq!(image.tool(&["dstate"]), "UpToDate\n");
}

/// One crash: the shape of the log, its slots, how many transactions from which number on, the
/// flags, and whether the newest block is torn.
struct Crash {
    kind: MetaKind,
    shape: (u32, u32),
    slots: u16,
    transactions: u32,
    first: u32,
    flags: u32,
    torn: bool,
}

fn leave_dirty(image: &Image, crash: &Crash, seed: u64) {
    let mut random = Lcg(seed);
    image.create();
    let la_size = image.geometry.capacity.0.min(600 * MIB / 512);
    image.put_words(&words(seed, 40));
    let mut table = vec![None; usize::from(crash.slots)];
    let (mut start, mut page) = (0, Page::zeroed());
    let mut sector = image.geometry.activity_log;
    for step in 0..crash.transactions {
        let mut updates: Vec<(u16, AlExtent)> = (0..1 + random.below(64))
            .map(|_| {
                let slot = u16::try_from(random.below(u64::from(crash.slots))).unwrap();
                let extent = u32::try_from(random.below(la_size.div_ceil(8192))).unwrap();
                (slot, AlExtent(extent))
            })
            .collect();
        updates.sort_unstable();
        updates.dedup_by_key(|(slot, _)| *slot);
        let number = crash.first.wrapping_add(step);
        let (stripes, size) = crash.shape;
        sector = image.geometry.al_block_sector(block_index(number, stripes, size));
        encode_transaction(number, &updates, &table, start, &mut page);
        image.write(sector, &page);
        for (slot, extent) in updates {
            table[usize::from(slot)] = Some(extent);
        }
        start = next_context_start(start, crash.slots);
    }
    if crash.torn {
        page.0[1024..].fill(0x77);
        image.write(sector, &page);
    }
    image.put_superblock(&Superblock {
        magic: Magic::V08Unclean,
        al_extents: u32::from(crash.slots),
        ..used(&image.geometry, la_size, crash.flags)
    });
}

/// AL-5: after the same crash the tool and we leave the same bytes. Applying again changes
/// nothing, whoever does it.
#[test]
fn applied_logs_are_identical() {
    let crash = |kind, shape, slots, transactions, first, flags, torn| Crash {
        kind,
        shape,
        slots,
        transactions,
        first,
        flags,
        torn,
    };
    let (internal, flexible) = (MetaKind::Internal, MetaKind::Flexible);
    let table = [
        crash(internal, (1, 8), 67, 1, 0, 0x13, false),
        crash(internal, (1, 8), 67, 5, 0, 0x13, true),
        crash(internal, (1, 8), 67, 300, 0, 0x17, true),
        crash(internal, (1, 8), 1237, 300, 0, 0x13, true),
        crash(internal, (1, 8), 6433, 90, 0, 0x17, false),
        crash(internal, (1, 8), 1237, 40, u32::MAX - 20, 0x13, true),
        crash(internal, (1, 8), 1237, 40, 0, 0x11, false),
        crash(internal, (3, 4), 2000, 50, 0, 0x13, true),
        crash(internal, (2, 8), 67, 17, 0, 0x53, true),
        crash(flexible, (1, 8), 1237, 33, 0, 0x13, true),
        crash(flexible, (8, 2), 3000, 70, 0, 0x03, false),
        crash(MetaKind::Indexed(1), (1, 8), 1237, 33, 0, 0x13, true),
        crash(internal, (1, 8), 67, 0, 0, 0x13, false),
    ];
    for (seed, crash) in (100..).zip(table) {
        let bytes = match crash.kind {
            MetaKind::Internal => 700 * MIB,
            MetaKind::Flexible => 2 * MIB,
            MetaKind::Indexed(_) => 256 * MIB,
        };
        let (stripes, size) = crash.shape;
        let new = || Image::new(crash.kind, bytes, stripes, size);
        let (ours, theirs) = (new(), new());
        leave_dirty(&ours, &crash, seed);
        leave_dirty(&theirs, &crash, seed);
        ours.apply_al();
        theirs.tool(&["apply-al"]);
        assert_same(&ours, &theirs, &format!("crash {seed}"));
        assert!(ours.superblock().is_clean());

        let words = ours.dump();
        ours.apply_al();
        ours.tool(&["apply-al"]);
        assert_same(&ours, &theirs, &format!("crash {seed}, applied again"));
        assert_eq!(ours.dump(), words);
    }
}

/// What the tool does to metadata that we created, we read.
#[test]
fn tool_commands_on_our_image_are_read() {
    let image = Image::internal(12 * MIB);
    image.create();
    image.put_superblock(&used(&image.geometry, 24_000, 0x91));
    assert_eq!(image.tool(&["dstate"]), "Consistent\n", "the peer may be newer");
    image.tool(&["outdate"]);
    assert_eq!(image.superblock().flags, MetaFlags(0x81));
    image.tool(&["invalidate"]);
    let flags = image.superblock().flags;
    assert!(!flags.contains(MetaFlags::CONSISTENT), "{flags:?}");
    image.tool(&["wipe-md"]);
    let mut page = Page::zeroed();
    image.read(image.geometry.superblock, &mut page);
    let found = Magic::Unknown(0);
    let refused = replication_core::meta::FormatError::ForeignMagic { found };
    assert_eq!(Superblock::decode(&page), Err(refused));
}
