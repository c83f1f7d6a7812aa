//! Short seeded runs, each around one moment at which the data could be lost.

use replication_core::config::OnIoError;
use replication_core::control::Command;
use replication_core::event::HostOp;
use replication_core::state::{Conn, Disk};
use replication_core::units::{Errno, SectorRange, Span};
use replication_core::wire::ReplicationProtocol;
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::rng::Rng;
use tests::sim::setup::MIB;
use tests::sim::{A, B, Load, Setup, World};

use crate::common::{Workload, area, heavy, wait_alone};

/// Sectors of an extent of the activity log.
const EXTENT: u64 = 8192;

/// The Primary dies under load; the peer takes over if the protocol allows that, and both become
/// equal.
pub(crate) const PRIMARY_DIES: Workload =
    Workload { name: "primary dies", setup: many_extents, run: primary_dies };
/// The same without the peer.
pub(crate) const LONE_PRIMARY_DIES: Workload =
    Workload { name: "lone primary dies", setup: many_extents, run: lone_primary_dies };
/// The Secondary dies under load.
pub(crate) const SECONDARY_DIES: Workload =
    Workload { name: "secondary dies", setup: any_protocol, run: secondary_dies };
/// Writes one after the other, then the power of the Secondary is cut.
pub(crate) const ONE_AFTER_THE_OTHER: Workload =
    Workload { name: "one after the other", setup: protocol_a, run: one_after_the_other };
/// A resync breaks off in the middle.
pub(crate) const RESYNC_BREAKS: Workload =
    Workload { name: "resync breaks", setup: slow_resync, run: resync_breaks };
/// The connection comes back while the host writes.
pub(crate) const RECONNECT_UNDER_LOAD: Workload =
    Workload { name: "reconnect under load", setup: slow_resync, run: reconnect_under_load };
/// The connection breaks while the target's disk hangs.
pub(crate) const OLD_WRITES_LINGER: Workload =
    Workload { name: "old writes linger", setup: slow_resync, run: old_writes_linger };
/// A flush of the Primary's disk fails, then its power is cut.
pub(crate) const FLUSH_FAILS: Workload =
    Workload { name: "flush fails", setup: any_protocol, run: flush_fails };
/// A write of the Secondary fails, then it dies.
pub(crate) const PEER_WRITE_FAILS: Workload =
    Workload { name: "peer write fails", setup: pass_on, run: peer_write_fails };
/// The Primary is the target of a resync.
pub(crate) const PRIMARY_IS_TARGET: Workload =
    Workload { name: "primary is target", setup: slow_resync, run: primary_is_target };
/// The link is cut under load.
pub(crate) const LINK_IS_CUT: Workload =
    Workload { name: "link is cut", setup: any_protocol, run: link_is_cut };

pub(crate) const ALL: [Workload; 11] = [
    PRIMARY_DIES,
    LONE_PRIMARY_DIES,
    SECONDARY_DIES,
    ONE_AFTER_THE_OTHER,
    RESYNC_BREAKS,
    RECONNECT_UNDER_LOAD,
    OLD_WRITES_LINGER,
    FLUSH_FAILS,
    PEER_WRITE_FAILS,
    PRIMARY_IS_TARGET,
    LINK_IS_CUT,
];

fn draw_protocol(setup: &mut Setup, rng: &mut Rng) {
    setup.protocol(match rng.below(3) {
        0 => ReplicationProtocol::A,
        1 => ReplicationProtocol::B,
        _ => ReplicationProtocol::C,
    });
}

fn any_protocol(setup: &mut Setup, rng: &mut Rng) {
    draw_protocol(setup, rng);
    setup.net(|net| net.timeout = Span::from_secs(1));
    setup.speed.window = 1 << rng.between(15, 18);
    setup.speed.jitter = Span(rng.between(1_000, 2_000_000));
    setup.nodes[B].disk_time = (Span(20_000), Span(rng.between(50_000, 5_000_000)));
}

fn many_extents(setup: &mut Setup, rng: &mut Rng) {
    any_protocol(setup, rng);
    setup.size(80 * MIB);
    setup.external_meta(2048);
    let slots = u16::try_from(rng.between(2, 4)).expect("small");
    setup.disk(|disk| disk.al_extents = slots);
}

fn protocol_a(setup: &mut Setup, rng: &mut Rng) {
    setup.protocol(ReplicationProtocol::A);
    setup.nodes[B].disk_time = (Span(20_000), Span(rng.between(1_000_000, 8_000_000)));
}

fn slow_resync(setup: &mut Setup, rng: &mut Rng) {
    let rate = u32::try_from(rng.between(400, 4_000)).expect("small");
    setup.disk(|disk| disk.rate.max_rate_kib = rate);
    if rng.chance(50) {
        // A durable write of metadata does not make data durable there.
        setup.external_meta(2048);
    }
    setup.speed.jitter = Span(rng.between(1_000, 2_000_000));
    setup.nodes[A].disk_time = (Span(20_000), Span(rng.between(50_000, 3_000_000)));
}

fn pass_on(setup: &mut Setup, rng: &mut Rng) {
    draw_protocol(setup, rng);
    setup.disk(|disk| disk.on_io_error = OnIoError::PassOn);
}

fn any_cut(rng: &mut Rng) -> Cut {
    match rng.below(3) {
        0 => Cut::LoseAll,
        1 => Cut::KeepAll,
        _ => Cut::Mixed,
    }
}

/// Ends a node in one way or another.
fn end(w: &mut World, rng: &mut Rng, n: usize) {
    if rng.chance(30) {
        w.kill(n);
    } else {
        let cut = any_cut(rng);
        w.power_cut(n, cut);
    }
}

fn hot_areas() -> Vec<SectorRange> {
    vec![area(0, 400), area(3 * MIB, 400)]
}

fn wide_areas() -> Vec<SectorRange> {
    (0..19).map(|extent| area(extent * EXTENT, 64)).collect()
}

fn primary_dies(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(wide_areas()));
    w.run_for(Span(rng.between(1_000_000, 200_000_000)));
    end(w, rng, A);
    wait_alone(w, B);
    if w.nodes[A].setup.config.net.protocol == ReplicationProtocol::C {
        w.stale[A][0] = true;
        w.must(B, Command::Primary { force: false });
        w.read_all(B, 0);
        w.write(B, 0, 0, 8);
    }
    w.restart(A);
    w.wait_synced();
}

fn lone_primary_dies(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.kill(B);
    let is_early = rng.chance(50);
    let load = heavy(wide_areas());
    if is_early {
        w.start_load(A, load.clone());
    }
    wait_alone(w, A);
    w.start_load(A, load);
    w.run_for(Span(rng.between(0, if is_early { 2_000_000 } else { 100_000_000 })));
    end(w, rng, A);
    w.restart(A);
    w.restart(B);
    w.wait_synced();
}

fn secondary_dies(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(hot_areas()));
    w.run_for(Span(rng.between(1_000_000, 50_000_000)));
    end(w, rng, B);
    w.drain(A);
    wait_alone(w, A);
    w.settle();
    w.check_quiet();
    w.restart(B);
    w.wait_synced();
    w.check_same_generation(0);
    w.read_all(A, 0);
}

fn one_after_the_other(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let writes: Vec<SectorRange> = (0..rng.between(2, 40)).map(|nr| area(nr * 16, 8)).collect();
    for range in &writes {
        w.write(A, 0, range.start, range.sectors());
    }
    w.run_for(Span(rng.below(10_000_000)));
    let cut = any_cut(rng);
    w.power_cut(B, cut);
    w.check_prefix(B, 0, &writes);
    wait_alone(w, A);
    w.settle();
    w.check_quiet();
    w.restart(B);
    w.wait_synced();
}

/// The peer is away while something is written; returns when a resync of it runs.
fn begin_resync(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.cut();
    wait_alone(w, A);
    wait_alone(w, B);
    for _ in 0..rng.between(4, 30) {
        w.write(A, 0, rng.below(400) * 8, 64);
    }
    w.settle();
    w.heal();
    let limit = Span::from_secs(60);
    w.run_until("the resync runs", limit, |w| {
        w.conn(B) == Conn::SyncTarget && w.conn(A) == Conn::SyncSource
    });
}

fn resync_breaks(w: &mut World, rng: &mut Rng) {
    begin_resync(w, rng);
    w.run_for(Span(rng.between(0, 800_000_000)));
    w.cut();
    wait_alone(w, A);
    wait_alone(w, B);
    w.settle();
    w.check_quiet();
    if rng.chance(50) {
        end(w, rng, B);
        w.check_quiet();
        w.restart(B);
    }
    w.heal();
    w.wait_synced();
    w.check_same_generation(0);
    w.read_all(A, 0);
}

fn reconnect_under_load(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.cut();
    wait_alone(w, A);
    wait_alone(w, B);
    w.start_load(A, heavy(hot_areas()));
    w.run_for(Span(rng.between(1_000_000, 50_000_000)));
    w.drain(A);
    w.heal();
    let limit = Span::from_secs(60);
    w.run_until("they meet", limit, |w| w.conn(A) >= Conn::WFReportParams);
    // Some blocks that the resync will copy anyway, and some that only a notice can tell of.
    w.start_load(A, heavy(vec![area(0, 400), area(0, 2 * MIB)]));
    w.run_until("the resync runs", limit, |w| w.conn(B) == Conn::SyncTarget);
    w.run_for(Span(rng.between(0, 100_000_000)));
    w.drain(A);
    w.check_end_of_resync(B, 0);
    w.wait_synced();
    w.check_same_generation(0);
    w.read_all(A, 0);
}

fn old_writes_linger(w: &mut World, rng: &mut Rng) {
    begin_resync(w, rng);
    let fault = Fault { kind: Kind::Write, range: None, times: Some(4), trouble: Trouble::Stick };
    w.nodes[B].backing[0].data.add_fault(fault);
    w.run_for(Span(rng.between(100_000_000, 400_000_000)));
    w.cut();
    wait_alone(w, A);
    wait_alone(w, B);
    for at in 0..60 {
        w.write(A, 0, at * 64, 64);
    }
    w.heal();
    w.run_for(Span::from_ms(rng.between(0, 8_000)));
    w.heal_disks(B);
    w.wait_synced();
    w.check_same_generation(0);
    w.read_all(A, 0);
}

fn flush_fails(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(hot_areas()));
    w.run_for(Span(rng.between(1_000_000, 20_000_000)));
    w.drain(A);
    w.settle();
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Flush, range: None, times: Some(1), trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
    w.flush(A, 0);
    let cut = any_cut(rng);
    w.power_cut(A, cut);
    w.restart(A);
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
}

fn peer_write_fails(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
    w.nodes[B].backing[0].data.add_fault(fault);
    let write = HostOp::Write { fua: false };
    assert!(w.submit(A, 0, write, area(40, 16)).is_some(), "a slot is free");
    let limit = Span::from_secs(5);
    w.run_until("A knows", limit, |w| w.state(A, 0).pdsk != Disk::UpToDate);
    w.run_for(Span(rng.below(2_000_000)));
    end(w, rng, B);
    wait_alone(w, A);
    w.drain(A);
    w.restart(B);
    w.wait_synced();
    w.read_all(A, 0);
}

fn primary_is_target(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(hot_areas()));
    w.run_for(Span::from_ms(20));
    w.drain(A);
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.start_load(A, heavy(hot_areas()));
    w.run_for(Span(rng.between(1_000_000, 50_000_000)));
    w.drain(A);
    w.must(A, Command::Attach(None));
    let limit = Span::from_secs(60);
    w.run_until("the resync runs", limit, |w| w.conn(A) == Conn::SyncTarget);
    w.start_load(A, Load { reads: 100, flushes: 0, zeroes: 0, ..heavy(hot_areas()) });
    w.run_for(Span(rng.between(1_000_000, 200_000_000)));
    w.drain(A);
    w.wait_synced();
    w.read_all(A, 0);
}

fn link_is_cut(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let load = Load { most_sectors: 256, ..heavy(vec![area(0, 4 * MIB)]) };
    w.start_load(A, load);
    w.run_for(Span(rng.between(1_000_000, 20_000_000)));
    if rng.chance(50) {
        w.net.reset_all(w.now);
    } else {
        w.cut();
    }
    wait_alone(w, A);
    w.drain(A);
    w.heal();
    w.wait_synced();
    w.check_same_generation(0);
    w.read_all(A, 0);
}
