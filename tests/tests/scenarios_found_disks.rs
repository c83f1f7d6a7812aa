//! Failures that seeds of the simulator have found with disks that are lost, come back, grow, or are
//! of different sizes, each as a scenario.

use replication_core::control::Command;

use tests::sim::setup::{MIB, Setup};
use tests::sim::{A, B, World};

/// The device of a Primary without a disk grows with its peer's: its old disk is too small then, and
/// is not attached (FE-1). The device in use shrank to it.
#[test]
fn a_served_device_does_not_shrink_to_an_old_disk() {
    let mut w = World::new(790, Setup::with(|s| s.nodes[B].devices[0].data = 12 * MIB));
    w.start_synced();
    let old = w.nodes[A].sizes[0];
    w.disk_failed(A, 0);
    w.must(A, Command::Detach { volume: None, force: false });
    w.kill(B);
    w.boot(B);
    w.must(B, Command::Attach(None));
    let resize = Command::Resize {
        volume: None,
        size: None,
        assume_clean: false,
        assume_peer_has_space: true,
    };
    w.must(B, resize);
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_connected();
    w.settle();
    let grown = w.nodes[A].sizes[0];
    assert!(grown > old, "the Primary serves what its peer has");
    w.write(A, 0, grown - 8, 8);
    let refusal = w.must_not(A, Command::Attach(None));
    assert_eq!(refusal.code, 111, "{refusal:?}");
    assert_eq!(w.nodes[A].sizes[0], grown);
    w.read(A, 0, grown - 8, 8);
}
