//! Two engines over loopback, served through NBD.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Bed, pattern};
use nix::sys::signal::Signal;
use replication_core::control::{Command, Reply};

const MIB: u64 = 1 << 20;

/// What a client writes to the Primary is on both disks, and both engines end when told to.
#[test]
fn writes_of_a_client_are_on_both_disks() {
    let mut bed = Bed::synced(64);
    let mut client = bed.alice.nbd();
    assert_eq!(client.size, bed.alice.status().volumes[0].size_kib << 10);
    for at in 0..16 {
        assert_eq!(client.write(at * MIB, &pattern(at, 1 << 20)), 0);
    }
    assert_eq!(client.write(20 * MIB + 512, &pattern(99, 1536)), 0);
    assert_eq!(client.write_fua(21 * MIB, &pattern(98, 4096)), 0);
    assert_eq!(client.write_zeroes(3 * MIB, 65536), 0);
    assert_eq!(client.trim(5 * MIB, 1 << 20), 0);
    assert_eq!(client.flush(), 0);
    assert_eq!(client.read(7 * MIB, 1 << 20).unwrap(), pattern(7, 1 << 20));
    assert!(client.read(3 * MIB, 65536).unwrap().iter().all(|byte| *byte == 0));
    let (one, two) = (bed.alice.data(), bed.bob.data());
    assert!(one == two, "the disks differ");
    assert_eq!(one[7 << 20..8 << 20], pattern(7, 1 << 20));
    let status = bed.alice.status();
    assert!(status.volumes[0].open && status.pid == bed.alice.pid());
    drop(client);
    bed.alice.wait_for("free device", |status| !status.volumes[0].open);
    for node in [&mut bed.alice, &mut bed.bob] {
        assert_eq!(node.ask(Command::Down { holder: None, force: false }), Ok(Reply::Done));
        assert!(node.wait().success());
    }
}

/// A Primary whose device is used is not demoted; a Secondary answers with errors.
#[test]
fn a_device_in_use_is_not_demoted_and_a_secondary_refuses() {
    let mut bed = Bed::synced(32);
    let client = bed.alice.nbd();
    let refused = bed.alice.ask(Command::Secondary { holder: None }).unwrap_err();
    assert!(refused.text.contains("NBD client pid"), "{refused}");
    drop(client);
    bed.alice.wait_for("free device", |status| !status.volumes[0].open);
    bed.alice.ask(Command::Secondary { holder: None }).unwrap();
    let mut client = bed.alice.nbd();
    assert_eq!(client.read(0, 4096), Err(5));
    assert_eq!(client.write(0, &[1; 4096]), 5);
}

/// A killed peer comes back and gets what it missed.
#[test]
fn a_peer_that_was_killed_is_brought_up_to_date() {
    let mut bed = Bed::synced(64);
    let mut client = bed.alice.nbd();
    assert_eq!(client.write(0, &pattern(1, 1 << 20)), 0);
    bed.bob.kill();
    for at in 1..20 {
        assert_eq!(client.write(at * MIB, &pattern(at, 1 << 20)), 0);
    }
    bed.bob.start();
    bed.wait_for_sync();
    assert_eq!(client.write(30 * MIB, &pattern(30, 1 << 20)), 0);
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
}

/// A Primary that was killed takes its data up again and goes on.
#[test]
fn a_primary_that_was_killed_goes_on() {
    let mut bed = Bed::synced(64);
    let mut client = bed.alice.nbd();
    for at in 0..8 {
        assert_eq!(client.write(at * MIB, &pattern(at, 1 << 20)), 0);
    }
    bed.alice.kill();
    drop(client);
    bed.alice.start();
    bed.wait_for_sync();
    bed.alice.ask(Command::Primary { force: false }).unwrap();
    let mut client = bed.alice.nbd();
    for at in 0..8 {
        assert_eq!(client.read(at * MIB, 1 << 20).unwrap(), pattern(at, 1 << 20));
    }
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
}

/// Many requests at once, of several clients, through every slot.
#[test]
fn requests_of_several_clients_are_served_at_once() {
    let mut bed = Bed::synced(64);
    let mut clients: Vec<_> = (0..4).map(|_| bed.alice.nbd()).collect();
    for round in 0..8 {
        for (number, client) in (0_u64..).zip(&mut clients) {
            for at in 0..24 {
                let offset = number * 12 * MIB + at * 65536;
                let data = pattern(number * 1000 + round * 100 + at, 65536);
                client.send(common::nbd::WRITE, 0, offset, 65536, &data);
            }
        }
        for client in &mut clients {
            for _ in 0..24 {
                assert_eq!(client.answer().0, 0);
            }
        }
    }
    for (number, client) in (0_u64..).zip(&mut clients) {
        for at in 0..24 {
            let data = client.read(number * 12 * MIB + at * 65536, 65536).unwrap();
            assert!(data == pattern(number * 1000 + 700 + at, 65536));
        }
    }
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
}

/// Two volumes, one with its metadata elsewhere, over IPv6.
#[test]
fn volumes_with_metadata_elsewhere_are_mirrored_over_ipv6() {
    let free = || std::net::TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap();
    let (one, two) = (free(), free());
    let mut bed = Bed::with(32, |config| {
        let dir = std::path::PathBuf::from(&config.run_dir);
        common::Node::add_volume(&dir, config);
        let is_alice = config.node == "alice";
        (config.local, config.remote) = if is_alice { (one, two) } else { (two, one) };
    });
    bed.sync();
    let mut clients = [bed.alice.nbd_of("0"), bed.alice.nbd_of("5")];
    // Without metadata on it, all of the second disk is exposed.
    assert!(clients[0].size < 32 << 20 && clients[1].size == 32 << 20);
    for at in 0..8 {
        for (number, client) in (0_u64..).zip(&mut clients) {
            assert_eq!(client.write(at * MIB, &pattern(at + 100 * number, 1 << 20)), 0);
        }
    }
    for (number, client) in (0_u64..).zip(&mut clients) {
        assert_eq!(client.flush(), 0);
        let data = client.read(3 * MIB, 1 << 20).unwrap();
        assert!(data == pattern(3 + 100 * number, 1 << 20));
    }
    assert!(bed.alice.data() == bed.bob.data(), "the disks differ");
    let disk = |node: &common::Node| std::fs::read(node.dir.join("disk5")).unwrap();
    assert!(disk(&bed.alice) == disk(&bed.bob), "the second disks differ");
}

/// SIGTERM puts everything away.
#[test]
fn a_signal_ends_the_engine_in_order() {
    let mut bed = Bed::synced(32);
    let mut client = bed.alice.nbd();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    bed.alice.signal(Signal::SIGTERM);
    assert!(bed.alice.wait().success());
    assert!(!bed.alice.dir.join("r0.sock").exists());
    bed.bob.wait_for("lost peer", |status| status.volumes[0].cstate == "WFConnection");
}
