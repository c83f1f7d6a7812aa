//! Scripted runs in which something breaks in the middle of a device's growth. The new part, where
//! the metadata was among other things, is synced in the end, or the nodes know that it is not
//! (BM-8, RS-1).

use replication_core::control::Command;
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::{Errno, Span};
use tests::sim::control::RESIZE;
use tests::sim::disk::{Fault, Kind, Trouble};
use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, World};

/// What breaks.
#[derive(Clone, Copy, Debug)]
enum Breaks {
    /// A node is killed.
    Node(usize),
    /// Both nodes are.
    Nodes,
    /// The link is cut.
    Link,
    /// Both nodes are killed when the Primary has become Secondary.
    Secondaries,
}

const BREAKS: [Breaks; 5] =
    [Breaks::Node(A), Breaks::Node(B), Breaks::Nodes, Breaks::Link, Breaks::Secondaries];

fn grow_disk(w: &mut World, n: usize) {
    let disk = &mut w.nodes[n].backing[0].data;
    let sectors = disk.sectors() + 4 * MIB;
    disk.grow(sectors);
}

/// Breaks it, mends it, and waits until both devices have grown and are equal.
fn break_and_mend(w: &mut World, what: Breaks) {
    let before = w.nodes[A].sizes[0].min(w.nodes[B].sizes[0]);
    if matches!(what, Breaks::Link) {
        w.cut();
        w.run_for(Span::from_secs(5));
    }
    if matches!(what, Breaks::Secondaries) {
        [A, B].into_iter().for_each(|n| w.must(n, Command::Secondary { holder: None }));
    }
    let killed: &[usize] = match what {
        Breaks::Node(A) => &[A],
        Breaks::Node(_) => &[B],
        Breaks::Nodes | Breaks::Secondaries => &[A, B],
        Breaks::Link => &[],
    };
    killed.iter().for_each(|n| w.kill(*n));
    w.heal();
    killed.iter().for_each(|n| w.restart(*n));
    w.run_for(Span::from_secs(5));
    for n in [A, B] {
        if w.state(n, 0).disk == Disk::Diskless {
            w.check_resize(n);
            w.must(n, Command::Attach(None));
        }
    }
    if w.all(|state| state.conn == Conn::StandAlone) {
        // The Primary went on with its own disk, without the generation that its peer had begun.
        for n in [A, B] {
            let discard_my_data = w.state(n, 0).role == Role::Secondary;
            w.must(n, Command::Connect { discard_my_data });
        }
    }
    w.wait_synced();
    w.check_equal(0);
    if w.all(|state| state.role == Role::Secondary) {
        w.must(A, Command::Primary { force: false });
    }
    w.must(A, RESIZE);
    w.wait_synced();
    w.settle();
    w.wait_synced();
    w.check_equal(0);
    assert_eq!(w.nodes[A].sizes, w.nodes[B].sizes);
    assert!(w.nodes[A].sizes[0] >= before);
}

/// Two connected nodes in sync, of which this one is Primary; B has the larger disk.
fn start(seed: u64, primary: usize) -> World {
    start_with(seed, with_larger_disk(B), primary)
}

fn with_larger_disk(n: usize) -> Setup {
    Setup::with(|s| {
        s.speed.latency = Span::from_ms(10);
        s.nodes[n].devices[0].data = 20 * MIB;
    })
}

fn start_with(seed: u64, setup: Setup, primary: usize) -> World {
    let mut w = World::new(seed, setup);
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    if primary == B {
        w.must(A, Command::Secondary { holder: None });
        w.must(B, Command::Primary { force: false });
    }
    w
}

/// One node is told to grow, or both are, or one is told twice.
#[test]
fn a_resize_that_is_interrupted() {
    let tellings: [&[usize]; 3] = [&[A], &[A, B], &[A, A]];
    for told in tellings {
        for primary in [A, B] {
            for what in BREAKS {
                for moment in 0..8 {
                    eprintln!("{told:?} of {primary}: {what:?} after {moment}");
                    let mut w = start(1300 + moment, primary);
                    grow_disk(&mut w, A);
                    for n in told {
                        w.tell(*n, RESIZE);
                    }
                    w.run_for(Span(4_000_000 * moment));
                    break_and_mend(&mut w, what);
                }
            }
        }
    }
}

/// The device grows as a disk is attached.
#[test]
fn a_growth_with_an_attach_that_is_interrupted() {
    for who in [A, B] {
        for primary in [A, B] {
            for what in BREAKS {
                for moment in 0..8 {
                    eprintln!("{who} of {primary}: {what:?} after {moment}");
                    let mut w = start(1400 + moment, primary);
                    w.must(who, Command::Detach { volume: None, force: false });
                    w.settle();
                    grow_disk(&mut w, A);
                    if who == A {
                        w.check_resize(A);
                    } else {
                        w.must(A, RESIZE);
                    }
                    w.tell(who, Command::Attach(None));
                    w.run_for(Span(5_000_000 * moment));
                    break_and_mend(&mut w, what);
                }
            }
        }
    }
}

/// The device grows as the nodes meet again.
#[test]
fn a_growth_with_a_handshake_that_is_interrupted() {
    for what in BREAKS {
        for moment in 0..16 {
            eprintln!("{what:?} after {moment}");
            let mut w = start(1500 + moment, A);
            w.kill(A);
            w.kill(B);
            grow_disk(&mut w, A);
            w.restart(A);
            w.restart(B);
            w.run_for(Span(500_000_000 + 5_000_000 * moment));
            break_and_mend(&mut w, what);
        }
    }
}

/// A role changes in the middle of a growth: who has grown first has decided whose data the new
/// part gets. Each took itself for the target, for ever.
#[test]
fn a_growth_with_a_change_of_roles() {
    let demote = Command::Secondary { holder: None };
    let promote = Command::Primary { force: false };
    let mut grown = 0;
    for larger in [A, B] {
        for told in [A, B] {
            for (primary, moment) in (0..10).flat_map(|moment| [(A, moment), (B, moment)]) {
                for is_demoted in [true, false] {
                    eprintln!("{larger} {told} {primary} after {moment}: {is_demoted}");
                    let mut w = start_with(1600 + moment, with_larger_disk(larger), primary);
                    let before = w.nodes[A].sizes[0];
                    grow_disk(&mut w, 1 - larger);
                    if is_demoted {
                        w.tell(told, RESIZE);
                        w.run_for(Span(4_000_000 * moment));
                        w.tell(primary, demote.clone());
                    } else {
                        w.must(primary, demote.clone());
                        w.tell(told, RESIZE);
                        w.run_for(Span(2_000_000 * moment));
                        w.tell(1 - primary, promote.clone());
                    }
                    w.run_for(Span::from_secs(1));
                    w.wait_synced();
                    w.check_equal(0);
                    assert_eq!(w.nodes[A].sizes, w.nodes[B].sizes);
                    grown += u32::from(w.nodes[A].sizes[0] > before);
                }
            }
        }
    }
    assert!(grown > 80, "{grown} of 160");
}

/// Both disks have grown and both nodes are told, so that neither grows first, and the Primary
/// becomes Secondary: one of them is elected in the end, and no disk is given up for it.
#[test]
fn a_growth_that_nobody_began() {
    let mut grown = 0;
    for (seed, primary) in (1700..1720).flat_map(|seed| [(seed, A), (seed, B)]) {
        let mut w = start_with(seed, Setup::with(|s| s.speed.latency = Span::from_ms(10)), primary);
        let before = w.nodes[A].sizes[0];
        for n in [A, B] {
            grow_disk(&mut w, n);
            w.tell(n, RESIZE);
        }
        w.run_for(Span(500_000 * (seed % 20)));
        w.tell(primary, Command::Secondary { holder: None });
        w.run_for(Span::from_secs(1));
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
        w.wait_synced();
        w.check_equal(0);
        assert_eq!(w.nodes[A].sizes, w.nodes[B].sizes);
        grown += u32::from(w.nodes[A].sizes[0] > before);
    }
    assert!(grown > 20, "{grown} of 40");
}

/// The same, and the link is cut or both nodes are killed before one is elected: nothing but the
/// marks says that the new part differs.
#[test]
fn a_growth_that_nobody_began_and_that_is_interrupted() {
    for what in [Breaks::Link, Breaks::Nodes] {
        for (seed, moment) in (1720..1740).flat_map(|seed| (0..12).map(move |at| (seed, at))) {
            for primary in [A, B] {
                eprintln!("{seed} {primary}: {what:?} after {moment}");
                let setup = Setup::with(|s| s.speed.latency = Span::from_ms(10));
                let mut w = start_with(seed, setup, primary);
                for n in [A, B] {
                    grow_disk(&mut w, n);
                    w.tell(n, RESIZE);
                }
                w.run_for(Span(500_000 * (seed % 20)));
                w.tell(primary, Command::Secondary { holder: None });
                w.run_for(Span(3_000_000 * moment));
                break_and_mend(&mut w, what);
            }
        }
    }
}

/// The disk that is to get the new part fails, or goes and comes back, before it hears that the
/// resync begins: it is given up or gets all that it misses. It was taken for a target again, and
/// neither could be put away nor be synced.
#[test]
fn a_growth_whose_target_loses_its_disk() {
    for (is_failure, steps) in (0..160).flat_map(|steps| [(true, steps), (false, steps)]) {
        eprintln!("{is_failure} after {steps}");
        let mut w = start(1800, A);
        grow_disk(&mut w, A);
        w.tell(A, RESIZE);
        for _ in 0..steps {
            w.step();
        }
        w.disk_failed(B, 0);
        if is_failure {
            let trouble = Trouble::Fail(Errno::EIO);
            let fault = Fault { kind: Kind::MetaWrite, range: None, times: Some(1), trouble };
            w.nodes[B].backing[0].data.add_fault(fault);
        } else {
            w.must(B, Command::Detach { volume: None, force: true });
            w.tell(B, Command::Attach(None));
        }
        w.write(A, 0, 64, 64);
        w.run_for(Span::from_secs(1));
        w.nodes[B].backing[0].data.heal();
        if w.state(B, 0).disk == Disk::Diskless {
            w.must(B, Command::Attach(None));
        }
        w.wait_synced();
        w.check_equal(0);
        w.read_all(A, 0);
    }
}
