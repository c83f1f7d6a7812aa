//! Scripts of what has to be refused, named after the invariant that says so.

use replication_core::control::Command;
use replication_core::meta::{MetaFlags, Page, Superblock};
use replication_core::split_brain::AfterSb0Pri;
use replication_core::state::{Conn, Disk};
use replication_core::units::Span;
use replication_core::wire::ReplicationProtocol;
use tests::sim::rng::Rng;
use tests::sim::setup::MIB;
use tests::sim::{A, B, Setup, World};

use crate::common::{Workload, runs, wait_alone};

runs! {
    GI_4, plain, gi_4;
    GI_5, plain, gi_5;
    ST_1, plain, st_1;
    ST_5, plain, st_5;
    MD_2, plain, md_2;
    WP_8, other_options, wp_8;
}

fn plain(_: &mut Setup, _: &mut Rng) {}

fn other_options(setup: &mut Setup, rng: &mut Rng) {
    let net = &mut setup.nodes[B].config.net;
    if rng.chance(50) {
        net.protocol = ReplicationProtocol::A;
    } else {
        net.after_sb_0pri = AfterSb0Pri::DiscardYoungerPrimary;
    }
}

/// Rewrites the superblock of a node without a process.
fn edit_superblock(w: &mut World, n: usize, edit: impl FnOnce(&mut Superblock)) {
    let node = &mut w.nodes[n];
    let geometry = node.setup.geometry(0, node.backing[0].data.sectors(), None);
    let geometry = geometry.expect("it has a disk");
    let mut page = Page([0; 4096]);
    node.backing[0].data.read(geometry.superblock.0, &mut page.0);
    let mut superblock = Superblock::decode(&page).expect("our own");
    edit(&mut superblock);
    superblock.encode(&mut page);
    node.backing[0].data.write(geometry.superblock.0, &page.0, true);
}

/// Generations that came about without the other node, with or without a common past.
fn part_generations(w: &mut World, are_related: bool) {
    for n in [A, B] {
        let mut number = || w.rng.next() & !1;
        let (current, bitmap, past) = (number(), number(), number());
        edit_superblock(w, n, |superblock| {
            let common = superblock.uuids.current & !1;
            // Two empty slots would pass for a common past.
            superblock.uuids.history = if are_related { [common, 0] } else { [past, past ^ 2] };
            superblock.uuids.current = current;
            superblock.uuids.bitmap = bitmap;
            superblock.flags.insert(MetaFlags::CONSISTENT);
            superblock.flags.insert(MetaFlags::WAS_UP_TO_DATE);
        });
    }
}

/// Both nodes go down in sync, and one of the disks changes behind everybody's back.
fn down_and_different(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, rng.below(100) * 8, 64);
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    for n in [A, B] {
        w.must(n, Command::Down { holder: None, force: false });
    }
    w.nodes[B].backing[0].data.write(2 * MIB, &[0x77; 4096], true);
    w.since_sync[0].troubled = true;
}

fn both_stand_alone(w: &mut World, why: &str) {
    w.run_until(why, Span::from_secs(60), |w| w.all(|s| s.conn == Conn::StandAlone));
}

/// A split brain found in the histories is resolved by hand: the bitmaps know nothing of it.
fn gi_4(w: &mut World, rng: &mut Rng) {
    down_and_different(w, rng);
    part_generations(w, true);
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    both_stand_alone(w, "the split brain is seen");
    w.must(B, Command::Connect { discard_my_data: true });
    w.must(A, Command::Connect { discard_my_data: false });
    w.run_until("they are in sync", Span::from_secs(60), |w| w.is_synced() && w.is_quiet());
    let status = w.status(B);
    let (copied, size) = (status.volumes[0].received_kib, status.volumes[0].size_kib);
    assert!(copied >= size, "GI-4: {copied} of {size} KiB were copied");
    w.check_synced();
    w.check_equal(0);
}

/// Two full histories that have nothing in common.
fn gi_5(w: &mut World, rng: &mut Rng) {
    down_and_different(w, rng);
    part_generations(w, false);
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    both_stand_alone(w, "GI-5: both refuse the data of the other one");
    for n in [A, B] {
        assert!(w.has_logged(n, "Unrelated data"), "GI-5: node {n} says so");
        assert_eq!(w.state(n, 0).disk, Disk::UpToDate, "GI-5: the disk of node {n}");
        assert_eq!(w.status(n).volumes[0].received_kib, 0, "GI-5: node {n} has taken data");
    }
}

/// A second Primary, by an operator or by a connection.
fn st_1(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    if rng.chance(50) {
        w.must_not(B, Command::Primary { force: false });
        w.must_not(B, Command::Primary { force: true });
        w.settle();
        w.check_synced();
        return;
    }
    w.cut();
    for n in [A, B] {
        wait_alone(w, n);
    }
    w.must(B, Command::Primary { force: false });
    w.heal();
    both_stand_alone(w, "ST-1: two Primaries refuse each other");
}

/// No good copy: new disks, or old ones, alone or together.
fn st_5(w: &mut World, rng: &mut Rng) {
    let is_alone = rng.chance(50);
    w.boot(A);
    w.must(A, Command::Up);
    if !is_alone {
        w.boot(B);
        w.must(B, Command::Up);
        w.wait_connected();
    }
    if rng.chance(50) && !is_alone {
        w.must(A, Command::NewCurrentUuid { volume: None, clear_bitmap: true });
        w.wait_synced();
        w.must(A, Command::Disconnect { force: false });
        w.must(A, Command::Outdate);
    }
    let refusal = w.must_not(A, Command::Primary { force: false });
    assert_eq!(refusal.exit, 17, "ST-5: for the right reason: {refusal:?}");
}

/// Metadata that was made for another layout.
fn md_2(w: &mut World, rng: &mut Rng) {
    down_and_different(w, rng);
    let choice = rng.below(3);
    edit_superblock(w, B, |superblock| match choice {
        0 => superblock.al_offset += 8,
        1 => superblock.bm_offset -= 8,
        _ => superblock.bytes_per_bit *= 2,
    });
    w.boot(B);
    let before = w.metadata_sums(B, 0);
    let result = w.ask(B, Command::Up);
    assert!(result.is_err(), "MD-2: metadata of another layout is taken");
    assert_eq!(w.metadata_sums(B, 0), before, "MD-2: it was written to");
}

/// Options that have to be the same.
fn wp_8(w: &mut World, _: &mut Rng) {
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    both_stand_alone(w, "WP-8: nodes with different options refuse each other");
    for n in [A, B] {
        let names = ["protocol", "after-sb-0pri"];
        let is_named = names.iter().any(|name| w.has_logged(n, &format!("incompatible {name}")));
        assert!(is_named, "WP-8: node {n} names the option");
    }
}
