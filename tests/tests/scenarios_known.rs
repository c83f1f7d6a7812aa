//! Moments at which replication drivers have lost data: a new generation, writes beside a resync.

use replication_core::control::Command;
use replication_core::state::Conn;
use replication_core::units::{SectorRange, Span};
use tests::sim::disk::Cut;
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

fn area(start: u64, sectors: u64) -> SectorRange {
    SectorRange { start, end: start + sectors }
}

fn wait_alone(w: &mut World, n: usize) {
    let limit = Span::from_secs(30);
    w.run_until("the loss is noticed", limit, |w| w.conn(n) < Conn::Connected);
}

fn slow() -> Setup {
    Setup::with(|s| s.disk(|disk| disk.rate.max_rate_kib = 400))
}

/// A Primary loses its peer under load and then its power: no write was acknowledged before the
/// new generation was on disk (GI-1), or both nodes would take themselves for equal.
#[test]
fn a_new_generation_is_durable_before_lone_writes_are_acknowledged() {
    for step in 0..16 {
        let mut w = World::new(530 + step, Setup::default());
        w.start_synced();
        w.start_load(A, Load { think: Span(50_000), ..Load::writes(vec![area(0, 2048)]) });
        w.run_for(Span::from_ms(50));
        w.kill(B);
        wait_alone(&mut w, A);
        w.run_for(Span(step * 50_000));
        // The check of the crash holds this down.
        w.power_cut(A, Cut::LoseAll);
        w.restart(A);
        w.restart(B);
        w.wait_synced();
    }
}

/// Writes overtake a running resync in both directions of time: the newer data stays (RS-2).
#[test]
fn writes_during_resync_stay() {
    for seed in 510..512 {
        let mut w = World::new(seed, slow());
        w.start_synced();
        w.kill(B);
        wait_alone(&mut w, A);
        for at in 0..32 {
            w.write(A, 0, at * 64, 64);
        }
        w.restart(B);
        w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(A) == Conn::SyncSource);
        let load = Load { think: Span(1_000_000), depth: 8, ..Load::mixed(vec![area(0, 2048)]) };
        w.start_load(A, load);
        w.run_for(Span::from_secs(2));
        w.drain(A);
        w.wait_synced();
        w.read_all(A, 0);
    }
}

/// A resync that is paused by hand tracks what is written meanwhile (BM-1, RS-4).
#[test]
fn a_paused_resync_tracks_writes() {
    let mut w = World::new(520, slow());
    w.start_synced();
    w.kill(B);
    wait_alone(&mut w, A);
    for at in 0..32 {
        w.write(A, 0, at * 64, 64);
    }
    w.restart(B);
    w.run_until("the resync runs", Span::from_secs(60), |w| w.conn(B) == Conn::SyncTarget);
    w.must(B, Command::PauseSync(true));
    w.run_until("the pause", Span::from_secs(5), |w| w.conn(A) == Conn::PausedSyncS);
    w.write(A, 0, 0, 128);
    w.write(A, 0, 5 * MIB, 128);
    w.run_for(Span::from_secs(5));
    assert_eq!(w.conn(B), Conn::PausedSyncT);
    w.must(B, Command::PauseSync(false));
    w.wait_synced();
    w.read_all(A, 0);
}
