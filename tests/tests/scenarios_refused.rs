//! Peers that do not fit together: refused by name on both sides, with both nodes alive.

use replication_core::config::Authentication;
use replication_core::control::Command;
use replication_core::meta::{MetaFlags, Page, Superblock};
use replication_core::split_brain::AfterSb0Pri;
use replication_core::state::{Conn, Disk};
use replication_core::units::Span;
use replication_core::wire::{HmacAlg, ReplicationProtocol};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, World};

/// Both nodes start, refuse each other with these words in their logs, and stay usable.
fn refused(seed: u64, setup: Setup, words: [&str; 2]) -> World {
    let mut w = World::new(seed, setup);
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    w.run_until("both stand alone", Span::from_secs(60), |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, words[n]), "node {n} does not say {:?}", words[n]);
        assert!(w.is_alive(n));
        assert_eq!(w.state(n, 0).disk, Disk::Inconsistent, "nothing has changed (WP-2)");
    }
    w
}

fn authentication(secret: &str) -> Option<Authentication> {
    Some(Authentication { alg: HmacAlg::Sha1, secret: String::from(secret) })
}

/// The same secret on both sides connects.
#[test]
fn the_same_secret_connects() {
    let setup = Setup::with(|s| s.net(|net| net.auth = authentication("mellon")));
    let mut w = World::new(401, setup);
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.settle();
    w.check_synced();
    assert_eq!(w.packets_sent("P_AUTH_RESPONSE"), 2);
}

/// Another secret does not.
#[test]
fn another_secret_is_refused() {
    let setup = Setup::with(|s| {
        s.nodes[A].config.net.auth = authentication("mellon");
        s.nodes[B].config.net.auth = authentication("speak friend");
    });
    refused(402, setup, ["Authentication of peer failed", "Authentication of peer failed"]);
}

/// A secret on one side only does not connect, and both sides say that it is about this.
#[test]
fn a_secret_on_one_side_is_refused() {
    let setup = Setup::with(|s| s.nodes[A].config.net.auth = authentication("mellon"));
    refused(403, setup, ["cram-hmac-alg", "cram-hmac-alg"]);
}

/// Different protocols.
#[test]
fn another_protocol_is_refused() {
    let setup = Setup::with(|s| s.nodes[B].config.net.protocol = ReplicationProtocol::A);
    refused(404, setup, ["protocol", "protocol"]);
}

/// Different split-brain policies.
#[test]
fn another_policy_is_refused() {
    let policy = AfterSb0Pri::DiscardYoungerPrimary;
    let setup = Setup::with(|s| s.nodes[B].config.net.after_sb_0pri = policy);
    refused(405, setup, ["after-sb-0pri", "after-sb-0pri"]);
}

/// Different verify algorithms.
#[test]
fn another_verify_algorithm_is_refused() {
    let setup = Setup::with(|s| s.nodes[B].config.net.verify_alg = String::from("sha1"));
    refused(406, setup, ["verify-alg", "verify-alg"]);
}

/// After the operator has changed the option both connect.
#[test]
fn a_changed_option_connects() {
    let setup = Setup::with(|s| s.nodes[B].config.net.protocol = ReplicationProtocol::A);
    let mut w = refused(407, setup, ["protocol", "protocol"]);
    w.must(B, Command::Down { holder: None, force: false });
    w.nodes[B].setup.config.net.protocol = ReplicationProtocol::C;
    w.boot(B);
    w.must(B, Command::Up);
    w.must(A, Command::Connect { discard_my_data: false });
    w.wait_connected();
}

/// Devices of different size: fresh nodes agree on the smaller one.
#[test]
fn fresh_nodes_agree_on_the_smaller_size() {
    let setup = Setup::with(|s| s.nodes[B].devices[0].data = 6 * MIB);
    let mut w = World::new(408, setup);
    w.start_synced();
    let size = w.nodes[A].sizes[0];
    assert_eq!(size, w.nodes[B].sizes[0]);
    assert!(size < 6 * MIB);
    w.write(A, 0, size - 8, 8);
    w.settle();
    w.check_synced();
}

/// A node in use does not shrink to a smaller peer (FE-1): refused, and both say that it is about
/// the size.
#[test]
fn a_smaller_peer_is_refused_by_a_node_in_use() {
    let setup = Setup::with(|s| s.nodes[B].devices[0].data = 6 * MIB);
    let mut w = World::new(409, setup);
    w.boot(A);
    w.must(A, Command::Up);
    w.must(A, Command::Primary { force: true });
    let size = w.nodes[A].sizes[0];
    w.write(A, 0, size - 8, 8);
    w.boot(B);
    w.must(B, Command::Up);
    w.run_until("both stand alone", Span::from_secs(60), |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, "too small") || w.has_logged(n, "size"), "node {n}");
    }
    assert_eq!(w.nodes[A].sizes[0], size);
    w.read(A, 0, size - 8, 8);
}

/// Two nodes with full histories that have nothing in common: refused, nothing is written (GI-5).
#[test]
fn unrelated_data_is_refused() {
    let mut w = World::new(410, Setup::default());
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Attach(None));
        w.must(n, Command::Down { holder: None, force: false });
        let geometry = w.nodes[n].setup.geometry(0, 8 * MIB, None).unwrap();
        let mut page = Page([0; 4096]);
        w.nodes[n].backing[0].data.read(geometry.superblock.0, &mut page.0);
        let mut superblock = Superblock::decode(&page).unwrap();
        let mut number = || w.rng.next() & !1;
        superblock.uuids.current = number();
        superblock.uuids.bitmap = number();
        superblock.uuids.history = [number(), number()];
        superblock.flags.insert(MetaFlags::CONSISTENT);
        superblock.flags.insert(MetaFlags::WAS_UP_TO_DATE);
        superblock.encode(&mut page);
        w.nodes[n].backing[0].data.write(geometry.superblock.0, &page.0, true);
        w.boot(n);
        w.must(n, Command::Up);
    }
    w.run_until("both stand alone", Span::from_secs(60), |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, "Unrelated data"), "node {n} says so");
        assert_eq!(w.state(n, 0).disk, Disk::UpToDate);
    }
}

/// Both nodes dial at once, again and again: one connection comes of it, and nothing leaks (WP-7,
/// WP-9).
#[test]
fn many_reconnects_leave_nothing_behind() {
    let mut w = World::new(411, Setup::default());
    w.start_synced();
    for round in 0..60 {
        w.net.reset_all(w.now);
        w.run_until("lost", Span::from_secs(10), |w| {
            w.conn(A) < Conn::Connected || w.conn(B) < Conn::Connected
        });
        w.wait_connected();
        w.write(A, 0, (round % 20) * 8, 8);
    }
    w.wait_synced();
    assert_eq!(w.net.open_socks(A).len(), 2, "one pair of sockets is left");
    assert_eq!(w.net.open_socks(B).len(), 2);
}
