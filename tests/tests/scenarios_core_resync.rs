//! The speed of a resync: what bounds it, and what does not; and how it ends.

use replication_core::config::{OnIoError, RateConfig};
use replication_core::control::Command;
use replication_core::event::VolumeIx;
use replication_core::state::{Conn, Role};
use replication_core::units::{Errno, SectorRange, Span};
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, Load, World};

/// Both nodes with a fixed rate, and room for `max_buffers` / 2 blocks under way.
fn fixed_rate(resync_rate_kib: u32, max_buffers: u32) -> Setup {
    Setup::with(|s| {
        let rate = RateConfig { plan_ahead: 0, resync_rate_kib, ..RateConfig::default() };
        s.disk(|disk| disk.rate = rate);
        s.net(|net| net.max_buffers = max_buffers);
    })
}

/// Syncs everything from A to B and returns how long it took.
fn full_sync(w: &mut World) -> Span {
    w.must(B, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_until("the resync runs", Span::from_secs(5), |w| w.conn(B) == Conn::SyncTarget);
    let began = w.now;
    let limit = Span::from_secs(120);
    w.run_until("its end", limit, |w| w.conn(B) == Conn::Connected);
    let took = w.now.since(began);
    w.wait_synced();
    took
}

/// With a high rate, memory that becomes free is used again at once: 16 blocks under way at a
/// time do not mean 16 blocks in each tenth of a second (RS-8).
#[test]
fn a_small_window_does_not_bound_the_rate() {
    let mut w = World::new(1001, fixed_rate(100_000, 32));
    w.start_synced();
    let took = full_sync(&mut w);
    assert!(took < Span::from_secs(3), "8 MiB took {} ms", took.as_ms());
}

/// The rate stays a bound, however fast the peer answers: 8 MiB at 2000 KiB/s.
#[test]
fn the_configured_rate_is_not_exceeded() {
    let mut w = World::new(1002, fixed_rate(2_000, 2048));
    w.start_synced();
    let took = full_sync(&mut w);
    assert!(took > Span::from_ms(3_900), "8 MiB took {} ms", took.as_ms());
    assert!(took < Span::from_secs(6), "8 MiB took {} ms", took.as_ms());
}

/// A fast resync and a busy host get on with each other: both make progress (RS-8, RS-2).
#[test]
fn a_fast_resync_leaves_room_for_the_host() {
    let mut w = World::new(1003, fixed_rate(100_000, 64));
    w.start_synced();
    let load = Load::writes(vec![SectorRange { start: 0, end: 4 * MIB }]);
    w.start_load(A, load);
    let before = w.nodes[A].host.successes;
    full_sync_under_load(&mut w);
    let during = w.nodes[A].host.successes - before;
    w.drain(A);
    w.wait_synced();
    assert!(during > 50, "{during} requests during the resync");
    assert_eq!(w.nodes[A].host.errors, 0);
}

fn full_sync_under_load(w: &mut World) {
    w.must(B, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_until("the resync runs", Span::from_secs(5), |w| w.conn(B) == Conn::SyncTarget);
    let limit = Span::from_secs(120);
    w.run_until("its end", limit, |w| w.conn(B) == Conn::Connected);
}

/// The source's first word of a full sync may arrive before its consent, which takes the other
/// socket: that is no broken protocol (ORD-7).
#[test]
fn the_start_of_a_full_sync_may_overtake_the_consent() {
    for seed in 1010..1030 {
        let mut w = World::new(seed, Setup::with(|s| s.speed.jitter = Span::from_ms(5)));
        w.start_synced();
        w.must(B, Command::Invalidate(None));
        w.since_sync[0].troubled = true;
        w.wait_synced();
        assert!(!w.has_logged(B, "P_SYNC_UUID"), "seed {seed}");
    }
}

/// A slow full sync from A to B, and a block at the begin that A cannot read.
fn with_a_bad_block(seed: u64, times: Option<u32>) -> World {
    let setup = Setup::with(|s| {
        s.disk(|disk| {
            disk.rate = RateConfig { plan_ahead: 0, resync_rate_kib: 2_000, ..disk.rate };
            disk.on_io_error = OnIoError::PassOn;
        });
    });
    let mut w = World::new(seed, setup);
    w.start_synced();
    let trouble = Trouble::Fail(Errno::EIO);
    let range = Some(SectorRange { start: 0, end: 8 });
    w.nodes[A].backing[0].data.add_fault(Fault { kind: Kind::Read, range, times, trouble });
    w.must(B, Command::Invalidate(None));
    w.disk_failed(B, 0);
    w.wait_log(B, "resync of");
    w
}

/// A block that could not be copied is overwritten by the host: nothing is missing at the end,
/// and the target is good (RS-1).
#[test]
fn a_failed_block_that_is_overwritten_does_not_count() {
    let mut w = with_a_bad_block(1040, Some(1));
    for start in [0, 128] {
        // The answer to one request covers several blocks.
        w.write(A, 0, start, 128);
    }
    w.write(A, 0, 256, 256);
    w.wait_synced();
    w.read_all(A, 0);
}

/// Besides a block that cannot be copied, another one is marked behind the scan: it is copied, and
/// the resync ends (RS-5, LV-1).
#[test]
fn a_failed_block_does_not_hide_the_others() {
    let mut w = with_a_bad_block(1041, None);
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Write, range: None, times: Some(1), trouble };
    let range = SectorRange { start: 8 * MIB / 4, end: 8 * MIB / 4 + 8 };
    w.run_for(Span::from_secs(2));
    w.nodes[B].backing[0].data.add_fault(Fault { range: Some(range), ..fault });
    w.write(A, 0, range.start, 8);
    let limit = Span::from_secs(60);
    w.run_until("the end", limit, |w| w.conn(B) == Conn::Connected);
    w.settle();
    let blocks = range.blocks_outward();
    let resource = w.nodes[B].resource.as_ref().expect("it runs");
    assert_eq!(resource.out_of_sync_in(VolumeIx(0), blocks), 0, "the other block is copied");
    assert_ne!(w.status(B).volumes[0].out_of_sync_kib, 0, "the bad one stays marked");
}

/// A target that is demoted as soon as its resync has ended: the source, which is still ending it,
/// hears of that, too (ST-3). It took the second report for the first one once more, and went on to
/// know a Primary.
#[test]
fn a_demotion_behind_the_end_of_a_resync_is_heard() {
    let mut w = World::new(890, Setup::default());
    w.start_synced();
    w.disk_failed(A, 0);
    w.must(A, Command::Invalidate(None));
    let limit = Span::from_secs(60);
    w.run_until("a target", limit, |w| w.conn(A) == Conn::SyncTarget);
    w.run_until("its end", limit, |w| w.conn(A) == Conn::Connected);
    assert!(w.conn(B) > Conn::Connected, "the source has not heard of it");
    w.tell(A, Command::Secondary { holder: None });
    w.wait_synced();
    w.settle();
    assert_eq!(w.state(B, 0).peer, Role::Secondary);
}
