//! `create-md`, `wipe-md`, `dump-md` of the built program on plain files: what they refuse, and
//! that they write what the stock tool writes.
//!
//! The comparison needs the program `drbdmeta` (package `drbd-utils`), the real file systems need
//! `mkfs.ext4` and `mkfs.xfs`. Without `drbdmeta` its test fails and says so; file systems are
//! also made by hand, so the real ones are skipped where their tools are missing.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command as Process;
use std::sync::atomic::{AtomicU32, Ordering};

use common::Bed;
use nix::fcntl::{Flock, FlockArg};

const MIB: u64 = 1 << 20;

fn write(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn sparse(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

/// The superblock of an ext4 file system of that many blocks of 4 KiB.
fn put_ext4(path: &Path, blocks: u32) {
    write(path, 1024 + 4, &blocks.to_le_bytes());
    write(path, 1024 + 24, &2_u32.to_le_bytes());
    write(path, 1024 + 56, &0xef53_u16.to_le_bytes());
    write(path, 1024 + 96, &0x42_u32.to_le_bytes());
}

/// A disk with nothing on it gets metadata and says what the stock tool says.
#[test]
fn creation() {
    let bed = Bed::new("");
    let lines = "initializing bitmap (4 KB) to all zero\ninitializing activity log\n\
                 Writing meta data...\nNew drbd meta data block successfully created.\n";
    assert_eq!(bed.run("create-md r0").works(), lines);
    let again = bed.run("create-md r0");
    again.fails(1, "carries DRBD metadata of format v08");
    again.fails(1, "Operation cancelled.");
    let forced = bed.run("create-md --force r0/0");
    assert_eq!((forced.exit, forced.out.as_str()), (0, lines));
    assert!(forced.err.contains("going on (--force)"));
    assert_eq!(bed.run("-- --force create-md r0").exit, 0);
}

/// A dry run asks the same questions and writes nothing.
#[test]
fn dry_creation() {
    let bed = Bed::new("");
    assert_eq!(bed.run("-d create-md r0").works(), "r0/0: would create metadata\n");
    bed.run("dump-md r0").fails(255, "No valid meta data found");
}

/// A file system is refused; where it would be cut off, `--force` makes no difference.
#[test]
fn file_systems_by_hand() {
    let bed = Bed::new("");
    let disk = bed.path("disk");
    // 64 MiB less 4 KiB of superblock, 32 KiB of log and 4 KiB of bitmap.
    let usable = 64 * MIB - 40960;
    put_ext4(&disk, u32::try_from(usable / 4096).unwrap());
    let fits = bed.run("create-md r0");
    fits.fails(1, "carries a ext4 file system (mark at byte 1080) that ends before byte 67067904");
    fits.fails(1, "Operation cancelled.");
    assert_eq!(bed.run("create-md --force r0").exit, 0);

    put_ext4(&disk, u32::try_from(usable / 4096 + 1).unwrap());
    for line in ["create-md r0", "create-md --force r0"] {
        let cut = bed.run(line);
        cut.fails(40, "ext4 file system (mark at byte 1080) of 65500 KiB, but 65496 KiB");
        cut.fails(40, "shrink it to 65496 KiB, or grow the device by 4 KiB");
    }
}

/// Bytes and where they go.
type Bytes = (u64, &'static [u8]);

/// What has no size of its own needs `--force`; what ends with the device is refused.
#[test]
fn other_contents() {
    let table: &[(&[Bytes], &str, i32, i32)] = &[
        (&[(0, b"LUKS\xba\xbe")], "LUKS encrypted volume", 40, 0),
        (&[(512 + 24, b"LVM2 001")], "LVM physical volume", 40, 0),
        (&[(4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0")], "md array member (1.2)", 40, 0),
        (&[(512, b"EFI PART")], "GPT partition table", 40, 0),
        (&[(450, b"\x83"), (510, b"\x55\xaa")], "MBR partition table", 40, 0),
        (&[(1028, &[0xff, 0x0f, 0, 0]), (4086, b"SWAPSPACE2")], "swap space", 1, 0),
        (&[(64 * MIB - 8192, b"\xfc\x4e\x2b\xa9")], "md array member (1.0)", 40, 40),
        (&[(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x40\0")], "XFS file system", 40, 40),
        (&[(0x1_0040, b"_BHRfS_M"), (0x1_00d1, &[0, 0, 0, 1])], "btrfs file system", 1, 0),
    ];
    for (writes, name, plain, forced) in table {
        let bed = Bed::new("");
        for (at, bytes) in *writes {
            write(&bed.path("disk"), *at, bytes);
        }
        bed.run("create-md r0").fails(*plain, name);
        let forced_run = bed.run("create-md --force r0");
        assert_eq!(forced_run.exit, *forced, "{name}: {forced_run:?}");
    }
}

/// Metadata of other formats is metadata, too.
#[test]
fn other_formats() {
    let size = 200 * MIB;
    let table = [
        (size - 4096 + 60, 0x8374_026d_u32, "format v09", 0),
        (size - 128 * MIB + 28, 0x8374_026a, "format v07", 10),
        (size - 4096 + 60, 0x8374_026c, "format v08, damaged", 0),
    ];
    for (at, magic, name, wiped) in table {
        let bed = Bed::new("");
        sparse(&bed.path("disk"), size);
        write(&bed.path("disk"), at, &magic.to_be_bytes());
        if name.ends_with("damaged") {
            // A v08 mark, and a field behind the used part that is not zero.
            write(&bed.path("disk"), size - 4096 + 64, &[0xff; 32]);
        }
        let short = name.split(',').next().unwrap();
        bed.run("create-md r0").fails(1, short);
        bed.run("wipe-md r0").fails(if wiped == 0 { 1 } else { wiped }, short);
        assert_eq!(bed.run("create-md --force r0").exit, 0, "{name}");
    }
}

/// External metadata: the metadata device must be empty, the data device may carry anything that
/// the metadata can describe.
#[test]
fn external() {
    let bed = Bed::new("");
    let (disk, meta) = (bed.path("disk"), bed.path("meta"));
    let text = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
    let flexible = format!("meta-disk {};", meta.display());
    let conf = text.replace("meta-disk internal;", &flexible);
    std::fs::write(bed.path("drbd.conf"), &conf).unwrap();
    sparse(&meta, 4 * MIB);
    put_ext4(&disk, 16384);
    assert_eq!(bed.run("create-md r0").exit, 0);
    assert_eq!(bed.run("dstate r0").works(), "Inconsistent\n");

    sparse(&meta, 4 * MIB);
    write(&meta, 0, b"LUKS\xba\xbe");
    bed.run("create-md r0").fails(40, "LUKS encrypted volume");
    assert_eq!(bed.run("create-md --force r0").exit, 0);

    // 40 KiB have room for one page of bitmap, 128 MiB; the file system says it has more.
    sparse(&disk, 256 * MIB);
    put_ext4(&disk, 65536);
    sparse(&meta, 40 << 10);
    for line in ["create-md r0", "create-md --force r0"] {
        bed.run(line).fails(40, "can describe 262144 KiB of data");
    }

    std::fs::write(bed.path("drbd.conf"), conf.replace(&flexible, "meta-disk /dev/null;")).unwrap();
    bed.run("create-md r0").fails(20, "'/dev/null' is not a block device!");
}

/// Sizes that metadata does not fit into, and disks that are not there.
#[test]
fn impossible_disks() {
    let bed = Bed::new("");
    sparse(&bed.path("disk"), 8192);
    bed.run("create-md r0").fails(10, "too small");
    sparse(&bed.path("disk"), MIB / 2);
    let small = bed.run("create-md r0");
    assert!(small.exit == 0 && small.err.contains("in-tree driver"), "{small:?}");
    std::fs::remove_file(bed.path("disk")).unwrap();
    bed.run("create-md r0").fails(20, "No such file");
}

/// A plain file that an engine has locked is in use like a mounted device, also when it is another
/// resource's engine; a metadata file that is shared by an index may be written beside it.
#[test]
fn locked_files() {
    let bed = Bed::new("");
    let (disk, meta) = (bed.path("disk"), bed.path("meta"));
    sparse(&meta, 300 * MIB);
    assert_eq!(bed.run("create-md r0").exit, 0);
    let lock = |path: &Path, arg| Flock::lock(File::open(path).unwrap(), arg).unwrap();
    let held = lock(&disk, FlockArg::LockExclusive);
    for line in ["create-md --force r0", "wipe-md --force r0"] {
        let ran = bed.run(line);
        ran.fails(20, "r0/0: open ");
        ran.fails(20, "Device or resource busy (os error 16)");
    }
    // Looking is no writing.
    assert_eq!(bed.run("dstate r0").works(), "Inconsistent\n");
    drop(held);
    assert_eq!(bed.run("wipe-md --force r0").exit, 0);

    let text = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
    for (place, is_shared) in [("", false), (" [1]", true)] {
        let place = format!("meta-disk {}{place};", meta.display());
        let text = text.replace("meta-disk internal;", &place);
        std::fs::write(bed.path("drbd.conf"), text).unwrap();
        let held = lock(&meta, FlockArg::LockShared);
        let ran = bed.run("create-md --force r0");
        if is_shared {
            assert_eq!(ran.exit, 0, "{ran:?}");
        } else {
            ran.fails(20, "Device or resource busy");
        }
        drop(held);
        let held = lock(&meta, FlockArg::LockExclusive);
        bed.run("create-md --force r0").fails(20, "Device or resource busy");
        drop(held);
        assert_eq!(bed.run("create-md --force r0").exit, 0);
    }
}

/// Erasing needs consent, leaves no metadata, and is no error when there is none.
#[test]
fn wiping() {
    let bed = Bed::new("");
    assert_eq!(bed.run("create-md r0").exit, 0);
    bed.run("wipe-md r0").fails(1, "Operation cancelled.");
    let out = "Wiping meta data...\nDRBD meta data block successfully wiped out.\n";
    assert_eq!(bed.run("wipe-md --force r0").works(), out);
    let nothing = bed.run("wipe-md --force r0");
    assert_eq!((nothing.exit, nothing.out.as_str()), (0, ""));
    bed.run("get-gi r0").fails(255, "No valid meta data found");
}

/// A dump is text with a header; an unclean one is shown only on demand, and is then no dump.
#[test]
fn dumping() {
    let bed = Bed::new("");
    assert_eq!(bed.run("create-md r0").exit, 0);
    let dump = bed.run("dump-md r0");
    let lines: Vec<&str> = dump.works().lines().collect();
    assert_eq!(lines[0], "# DRBD meta data dump");
    assert!(lines[1].ends_with(']') && lines[1].contains(" +0000 ["), "{}", lines[1]);
    assert_eq!(lines[2..5], ["# alice> drbdctl dump-md r0/0", "#", ""]);
    assert_eq!(lines[5], "version \"v08\";");
    replication_core::meta::dump::parse(&dump.out).unwrap();
    write(&bed.path("disk"), 64 * MIB - 4096 + 60, &0x8374_026c_u32.to_be_bytes());
    bed.run("dump-md r0").fails(20, "unclean");
    let unclean = bed.run("dump-md --force r0");
    replication_core::meta::dump::parse(unclean.works()).unwrap_err();
}

/// A minor for the stock tool that no other run of it uses.
fn minor() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Another range than that of the tests of the core, which may run at the same time.
    1_010_000 + std::process::id() % 3000 * 10 + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Both tools write the same bytes, internal and on a device of their own.
#[test]
fn same_bytes_as_the_stock_tool() {
    for (index, sizes) in [
        ("internal", &[4 * MIB, 64 * MIB, 64 * MIB + 4096 + 512, 200 * MIB][..]),
        ("flex-external", &[4 * MIB, 5 * MIB + 12_288][..]),
    ] {
        for size in sizes {
            let bed = Bed::new("");
            let ours = match index {
                "internal" => bed.path("disk"),
                _ => bed.path("meta"),
            };
            if index != "internal" {
                let text = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
                let meta = format!("meta-disk {};", ours.display());
                let text = text.replace("meta-disk internal;", &meta);
                std::fs::write(bed.path("drbd.conf"), text).unwrap();
            }
            let theirs = bed.path("theirs");
            sparse(&ours, *size);
            sparse(&theirs, *size);
            assert_eq!(bed.run("create-md r0").exit, 0);
            let minor = minor();
            let output = Process::new("drbdmeta")
                .args(["--force", &minor.to_string(), "v08"])
                .arg(&theirs)
                .args([index, "create-md"])
                .output()
                .expect("this test needs drbdmeta, of the package drbd-utils");
            // The tool remembers the device; there may be nothing to remove.
            let _ = std::fs::remove_file(format!("/var/lib/drbd/drbd-minor-{minor}.lkbd"));
            assert!(output.status.success(), "{output:?}");
            let same = std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap();
            assert!(same, "{index} of {size} bytes differs");
        }
    }
}

/// File systems as their own tools make them.
#[test]
fn real_file_systems() {
    for (tool, option, name) in
        [("mkfs.ext4", "-q", "ext4 file system"), ("mkfs.xfs", "-q", "XFS file system")]
    {
        let bed = Bed::new("");
        let disk = bed.path("disk");
        sparse(&disk, 512 * MIB);
        let made = match Process::new(tool).arg(option).arg(&disk).output() {
            Ok(made) => made,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => panic!("{tool}: {error}"),
        };
        assert!(made.status.success(), "{made:?}");
        bed.run("create-md r0").fails(40, &format!("{name} (mark at byte"));
        bed.run("create-md r0").fails(40, "of 524288 KiB");
        // Room for the metadata behind it.
        OpenOptions::new().write(true).open(&disk).unwrap().set_len(513 * MIB).unwrap();
        bed.run("create-md r0").fails(1, name);
        assert_eq!(bed.run("create-md --force r0").exit, 0, "{name}");
    }
}
