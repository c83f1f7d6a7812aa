//! `check-resize` of the built program on plain files: internal metadata follows a device that has
//! grown, whatever cuts it off, and to the same bytes as the stock tool's.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command as Process;

use common::{Bed, state, status_reply};
use nix::fcntl::{Flock, FlockArg};
use replication_core::control::{Command, Reply};

const MIB: u64 = 1 << 20;

fn resize(path: &Path, bytes: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn magic_at(path: &Path, superblock: u64) -> [u8; 4] {
    let mut magic = [0; 4];
    File::open(path).unwrap().read_exact_at(&mut magic, superblock + 60).unwrap();
    magic
}

/// A bed with metadata on its disk of 64 MiB, and an engine that has remembered its size.
fn used() -> Bed {
    let bed = Bed::new("");
    assert_eq!(bed.run("create-md r0").exit, 0);
    std::fs::create_dir_all(bed.path("run/alice")).unwrap();
    remember(&bed, &[64 * MIB]);
    bed
}

fn remember(bed: &Bed, bytes: &[u64]) {
    let lines: String = bytes.iter().map(|bytes| format!("{}\n", bytes / 512)).collect();
    std::fs::write(bed.run_file("r0-0.sizes"), lines).unwrap();
}

fn remembered(bed: &Bed) -> String {
    std::fs::read_to_string(bed.run_file("r0-0.sizes")).unwrap()
}

/// What is in place stays; what is not moves, once, and is remembered there.
#[test]
fn metadata_follows_its_device() {
    let bed = used();
    let disk = bed.path("disk");
    assert_eq!(bed.run("check-resize r0").works(), "");
    resize(&disk, 80 * MIB);
    bed.run("get-gi r0").fails(255, "No valid meta data found");
    let would = "r0/0: would move the internal metadata\n";
    assert_eq!(bed.run("-d check-resize r0").works(), would);
    bed.run("get-gi r0").fails(255, "No valid meta data found");
    let line = format!(
        "r0/0: {} has grown from 131072 to 163840 sectors: internal metadata moved to its end\n",
        disk.display()
    );
    assert_eq!(bed.run("check-resize r0").works(), line);
    assert_eq!(bed.run("check-resize all").works(), "");
    assert!(bed.run("get-gi r0").works().starts_with("0000000000000004:"));
    assert_eq!(remembered(&bed), "# sectors of the disk, newest size first\n163840\n131072\n");
    // A superblock at the former end would come to life if the device became small again.
    assert_eq!(magic_at(&disk, 64 * MIB - 4096), [0; 4]);
    assert_eq!(magic_at(&disk, 80 * MIB - 4096), [0x83, 0x74, 0x02, 0x6b]);
    resize(&disk, 96 * MIB);
    assert_eq!(bed.run("check-resize r0/0").exit, 0);
    assert!(bed.run("get-gi r0").works().starts_with("0000000000000004:"));
}

/// What cannot be found or moved is told, and nothing is written.
#[test]
fn refusals() {
    let table: &[(u64, &[u64], i32, &str)] = &[
        (80 * MIB, &[], 255, "No valid meta data found"),
        (80 * MIB, &[72 * MIB], 255, "nor where its end is known to have been"),
        (48 * MIB, &[64 * MIB], 10, "has shrunk from 131072 sectors to 98304"),
        (48 * MIB, &[64 * MIB], 10, "give the device its 131072 sectors back"),
        (72 * MIB, &[80 * MIB, 64 * MIB], 10, "its metadata may have been in what is gone"),
    ];
    for (bytes, known, exit, part) in table {
        let bed = used();
        let disk = bed.path("disk");
        remember(&bed, known);
        resize(&disk, *bytes);
        let before = std::fs::read(&disk).unwrap();
        bed.run("check-resize r0").fails(*exit, part);
        assert!(std::fs::read(&disk).unwrap() == before, "{part}");
    }
    let bed = Bed::new("");
    resize(&bed.path("disk"), 128 * MIB);
    assert_eq!(bed.run("create-md r0").exit, 0);
    std::fs::create_dir_all(bed.path("run/alice")).unwrap();
    remember(&bed, &[128 * MIB]);
    resize(&bed.path("disk"), 128 * MIB + 512);
    bed.run("check-resize r0").fails(10, "let the device grow to 262152 sectors");
    std::fs::write(bed.run_file("r0-0.sizes"), "1 TiB\n").unwrap();
    bed.run("check-resize r0").fails(20, "line 1: expected a number of sectors, found '1 TiB'");
    bed.run("check-resize r0/7").fails(1, "no such volume");
}

/// Metadata that was replaced or given up is not looked for where it once was. Questions forget
/// nothing.
#[test]
fn sizes_are_forgotten_with_the_metadata() {
    let table = [
        ("-d create-md r0", true),
        ("create-md r0", false),
        ("-d wipe-md --force r0", true),
        ("wipe-md r0", true),
        ("wipe-md --force r0", false),
    ];
    for (line, is_remembered) in table {
        let bed = used();
        let disk = bed.path("disk");
        resize(&disk, 80 * MIB);
        assert_eq!(bed.run(line).exit, 0, "{line}");
        assert_eq!(bed.run_file("r0-0.sizes").exists(), is_remembered, "{line}");
        // What was created is not at this end, either.
        resize(&disk, 96 * MIB);
        let before = std::fs::read(&disk).unwrap();
        let ran = bed.run("check-resize r0");
        if is_remembered {
            assert!(ran.works().contains("has grown from 131072 to 196608 sectors"), "{line}");
        } else {
            ran.fails(255, "No valid meta data found");
            assert!(std::fs::read(&disk).unwrap() == before, "{line}");
        }
    }
}

/// A disk that somebody uses is left alone.
#[test]
fn a_disk_in_use() {
    let bed = used();
    let disk = bed.path("disk");
    let held = Flock::lock(File::open(&disk).unwrap(), FlockArg::LockExclusive).unwrap();
    assert_eq!(bed.run("check-resize r0").works(), "");
    resize(&disk, 80 * MIB);
    bed.run("check-resize r0").fails(20, "r0/0: open ");
    drop(held);
    let attached = state("Connected", "UpToDate", "UpToDate");
    let commands = bed.engine(move |_| status_reply(attached.clone()));
    assert_eq!(bed.run("check-resize r0").works(), "");
    assert_eq!(commands.recv().unwrap(), Command::Status);
    assert_eq!(magic_at(&disk, 64 * MIB - 4096), [0x83, 0x74, 0x02, 0x6b]);
}

/// Metadata on a device of its own stays where it is.
#[test]
fn external_metadata_stays() {
    let bed = Bed::new("");
    let meta = bed.path("meta");
    File::create(&meta).unwrap().set_len(4 * MIB).unwrap();
    let text = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
    let place = format!("meta-disk {};", meta.display());
    std::fs::write(bed.path("drbd.conf"), text.replace("meta-disk internal;", &place)).unwrap();
    assert_eq!(bed.run("create-md r0").exit, 0);
    resize(&bed.path("disk"), 80 * MIB);
    assert_eq!(bed.run("check-resize r0").works(), "");
}

/// `attach` and `adjust` move the metadata before they let the engine attach the disk.
#[test]
fn metadata_is_moved_before_an_attach() {
    for line in ["attach r0", "attach r0/0", "adjust r0"] {
        let bed = used();
        let disk = bed.path("disk");
        resize(&disk, 80 * MIB);
        let seen = disk.clone();
        let commands = bed.engine(move |command| match command {
            Command::Status => status_reply(state("Connected", "Diskless", "UpToDate")),
            Command::Attach(_) => {
                assert_eq!(magic_at(&seen, 80 * MIB - 4096), [0x83, 0x74, 0x02, 0x6b]);
                Ok(Reply::Done)
            }
            _ => Ok(Reply::Done),
        });
        let ran = bed.run(line);
        assert_eq!(ran.exit, 0, "{line}: {ran:?}");
        assert!(ran.out.contains("internal metadata moved to its end"), "{line}: {ran:?}");
        assert!(commands.try_iter().any(|command| matches!(command, Command::Attach(_))), "{line}");
    }
}

/// A minor for the stock tool that no other run of it uses.
fn minor() -> u32 {
    1_050_000 + std::process::id() % 30_000
}

/// The stock tool's `check-resize` writes the same bytes: a bitmap with marks, another superblock
/// than that of creation. Only where the bitmap does not become longer: the stock tool (9.22) then
/// puts the old pages at the end of the new area, where they stand for other data.
#[test]
fn same_bytes_as_the_stock_tool() {
    let minor = minor();
    let drbdmeta = |disk: &Path, verb: &[&str]| {
        let mut stock = Process::new("drbdmeta");
        stock.args(["--force", &minor.to_string(), "v08"]).arg(disk).arg("internal").args(verb);
        let output = stock.output().expect("this test needs drbdmeta, of the package drbd-utils");
        assert!(output.status.success(), "{output:?}");
    };
    for (old, new) in [(64 * MIB, 80 * MIB), (130 * MIB, 250 * MIB), (64 * MIB, 65 * MIB + 512)] {
        let bed = used();
        let (ours, theirs) = (bed.path("disk"), bed.path("theirs"));
        File::create(&theirs).unwrap().set_len(old).unwrap();
        drbdmeta(&theirs, &["create-md"]);
        let superblock = old - 4096;
        write(&theirs, superblock, &(old / 512 - 4096).to_be_bytes());
        write(&theirs, superblock + 8, &[0x5a; 16]);
        write(&theirs, superblock + 59, &[0x81]);
        // In the last page of the bitmap.
        write(&theirs, superblock - 32_768 - 4096, &[0xff; 32]);
        write(&theirs, 0, b"data");
        std::fs::copy(&theirs, &ours).unwrap();
        remember(&bed, &[old]);
        resize(&ours, new);
        resize(&theirs, new);
        drbdmeta(&theirs, &["check-resize"]);
        assert_eq!(bed.run("check-resize r0").exit, 0);
        let same = std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap();
        // The tool remembers the device; there may be nothing to remove.
        let _ = std::fs::remove_file(format!("/var/lib/drbd/drbd-minor-{minor}.lkbd"));
        assert!(same, "from {old} to {new} bytes");
    }
}
