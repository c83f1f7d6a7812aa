//! The NBD server with clients that we did not write. Run with `--ignored` where they are
//! installed: `nbdcopy`, `nbdinfo` (libnbd-bin), `qemu-img`, `qemu-io` (qemu-utils) and `fio`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::process::Command as Process;

use common::{Bed, pattern};

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Process::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{complaint}");
    text
}

/// An image copied in by nbdcopy is on both disks, and comes out as it was for qemu-img.
#[test]
#[ignore = "needs nbdcopy, nbdinfo and qemu-img"]
fn an_image_goes_in_and_comes_out() {
    let mut bed = Bed::synced(96);
    let image = bed.alice.dir.join("image");
    std::fs::write(&image, pattern(1, 64 << 20)).unwrap();
    let (image, uri) = (image.to_str().unwrap(), bed.alice.uri());
    let info = run("nbdinfo", &[&uri]);
    assert!(info.contains("can_multi_conn: true") && info.contains("can_fua: true"), "{info}");
    run("nbdcopy", &["--connections=4", "--requests=32", image, &uri]);
    let copy = bed.alice.dir.join("copy");
    run("nbdcopy", &["--connections=4", &uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap()[..64 << 20] == pattern(1, 64 << 20));
    let (one, two) = (bed.alice.data(), bed.bob.data());
    assert!(one == two, "the disks differ");
    let other = bed.alice.dir.join("other");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, other.to_str().unwrap()]);
    assert!(std::fs::read(&other).unwrap() == one);
}

/// qemu-io's zeroes, discards and FUA writes leave the same on both disks.
#[test]
#[ignore = "needs qemu-io"]
fn zeroes_and_discards_leave_the_disks_equal() {
    let mut bed = Bed::synced(96);
    let commands = [
        "write -P 0x5a 1M 20M",
        "write -z 2M 1M",
        "write -z -u 5M 10M",
        "discard 16M 3M",
        "write -f -P 3 0 4k",
        "read -P 0 2M 1M",
        "read -P 0 5M 10M",
        "read -P 0x5a 19M 2M",
        "flush",
    ];
    let uri = bed.alice.uri();
    let mut arguments = vec!["-f", "raw"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
}

/// fio finds what it wrote, at depth, in all sizes.
#[test]
#[ignore = "needs fio with its nbd engine"]
fn fio_verifies_what_it_wrote() {
    let mut bed = Bed::synced(96);
    let uri = format!("--uri={}", bed.alice.uri());
    let jobs = [
        vec!["--name=small", "--rw=randwrite", "--bs=4k", "--size=32M"],
        vec!["--name=mixed", "--rw=randwrite", "--bsrange=512-128k", "--size=48M"],
    ];
    for mut job in jobs {
        let dir = format!("--aux-path={}", bed.alice.dir.display());
        let common = ["--ioengine=nbd", &uri, "--iodepth=32", "--verify=crc32c", &dir];
        job.extend(common);
        job.extend(["--blockalign=512", "--verify_fatal=1", "--verify_state_save=0"]);
        run("fio", &job);
    }
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
}
