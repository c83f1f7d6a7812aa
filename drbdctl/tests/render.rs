//! The displays of a state, word by word. Monitoring tools match these, so they are written out.

use drbdctl::render::{json, text};
use replication_core::control::{ResyncStatus, Status, VolumeStatus};
use text::Show;

const PLAIN: Show = Show { verbose: false, statistics: false, color: false };
const FULL: Show = Show { verbose: true, statistics: true, color: false };

/// A healthy pair, seen from the Primary.
fn healthy() -> Status {
    Status {
        name: "r0".to_owned(),
        node: "alice".to_owned(),
        peer: "bob".to_owned(),
        role: "Primary".to_owned(),
        write_ordering: "flush".to_owned(),
        connection: "Connected".to_owned(),
        peer_role: "Secondary".to_owned(),
        agreed_version: 101,
        local: "10.0.0.1:7789".to_owned(),
        remote: "10.0.0.2:7789".to_owned(),
        pid: 4711,
        volumes: vec![volume(0)],
        ..Status::default()
    }
}

fn volume(nr: u16) -> VolumeStatus {
    VolumeStatus {
        nr,
        minor: nr.into(),
        backing: "/dev/vg0/r0".to_owned(),
        disk: "UpToDate".to_owned(),
        peer_disk: "UpToDate".to_owned(),
        cstate: "Connected".to_owned(),
        replication: "Established".to_owned(),
        open: true,
        size_kib: 10_485_724,
        resync_suspended: "no".to_owned(),
        ..VolumeStatus::default()
    }
}

/// The same while the peer is brought up to date.
fn syncing() -> Status {
    let mut status = healthy();
    status.ap_in_flight = 8;
    let volume = &mut status.volumes[0];
    volume.peer_disk = "Inconsistent".to_owned();
    volume.cstate = "SyncSource".to_owned();
    volume.replication = "SyncSource".to_owned();
    volume.read_kib = 262_144;
    volume.written_kib = 524_288;
    volume.al_writes = 63;
    volume.upper_pending = 2;
    volume.lower_pending = 1;
    volume.sent_kib = 524_288;
    volume.out_of_sync_kib = 3_932_160;
    volume.pending = 1;
    volume.resync = Some(ResyncStatus {
        total_sectors: 20_971_448,
        left_sectors: 7_864_320,
        failed_sectors: 0,
        elapsed_ms: 60_000,
        paused_ms: 0,
        window_ms: 3000,
        window_sectors: 262_144,
        want_kib: 102_400,
    });
    status
}

/// The peer's view of the same moment.
fn target() -> Status {
    let mut status = syncing();
    status.node = "bob".to_owned();
    status.peer = "alice".to_owned();
    status.role = "Secondary".to_owned();
    status.peer_role = "Primary".to_owned();
    let volume = &mut status.volumes[0];
    volume.disk = "Inconsistent".to_owned();
    volume.peer_disk = "UpToDate".to_owned();
    volume.replication = "SyncTarget".to_owned();
    volume.open = false;
    status
}

/// Alone, for want of a peer or because of a split brain.
fn alone(connection: &str) -> Status {
    let mut status = healthy();
    status.role = "Secondary".to_owned();
    status.connection = connection.to_owned();
    status.peer_role = "Unknown".to_owned();
    let volume = &mut status.volumes[0];
    volume.peer_disk = "DUnknown".to_owned();
    volume.replication = "Off".to_owned();
    volume.open = false;
    status
}

fn plain(status: &Status) -> String {
    text::status(status, (0, 1), PLAIN)
}

/// What is as it should be is left out.
#[test]
fn healthy_pair() {
    let expected = "\
r0 role:Primary
  disk:UpToDate open:yes
  bob role:Secondary
    peer-disk:UpToDate

";
    assert_eq!(plain(&healthy()), expected);
}

/// Both ends of a resync.
#[test]
fn resync() {
    let source = "\
r0 role:Primary
  disk:UpToDate open:yes
  bob role:Secondary
    replication:SyncSource peer-disk:Inconsistent done:62.50

";
    assert_eq!(plain(&syncing()), source);
    let expected = "\
r0 role:Secondary
  disk:Inconsistent open:no
  alice role:Primary
    replication:SyncTarget peer-disk:UpToDate done:62.50

";
    assert_eq!(plain(&target()), expected);
    let mut paused = target();
    paused.volumes[0].replication = "PausedSyncT".to_owned();
    paused.volumes[0].resync_suspended = "user,peer".to_owned();
    assert!(plain(&paused).contains(
        "    replication:PausedSyncT peer-disk:UpToDate done:62.50 resync-suspended:user,peer\n"
    ));
}

/// Without a connection there is nothing to say about the peer.
#[test]
fn not_connected() {
    let expected = "\
r0 role:Secondary
  disk:UpToDate open:no
  bob connection:Connecting

";
    assert_eq!(plain(&alone("Connecting")), expected);
    let mut split = alone("StandAlone");
    split.split_brain = true;
    let expected = "\
r0 role:Secondary
  disk:UpToDate open:no
  bob connection:StandAlone

";
    assert_eq!(plain(&split), expected);
}

/// A disk that was lost, one that was never there, and I/O that waits for data.
#[test]
fn diskless() {
    let mut status = healthy();
    status.volumes[0].disk = "Diskless".to_owned();
    let expected = "\
r0 role:Primary
  disk:Diskless client:no open:yes
  bob role:Secondary
    peer-disk:UpToDate

";
    assert_eq!(plain(&status), expected);
    status.volumes[0].backing.clear();
    assert!(plain(&status).contains("\n  disk:Diskless client:yes open:yes\n"));
    status.connection = "Connecting".to_owned();
    status.suspended_no_data = true;
    assert!(plain(&status).starts_with("r0 role:Primary suspended:no-data\n"));
    status.suspended_user = true;
    assert!(plain(&status).starts_with("r0 role:Primary suspended:user,no-data\n"));
}

/// Volumes are told apart when there are several, or when the only one is not number 0.
#[test]
fn volumes() {
    let mut status = healthy();
    status.volumes.push(VolumeStatus { disk: "Failed".to_owned(), ..volume(1) });
    let expected = "\
r0 role:Primary
  volume:0 disk:UpToDate open:yes
  volume:1 disk:Failed open:yes
  bob role:Secondary
    volume:0 peer-disk:UpToDate
    volume:1 peer-disk:UpToDate

";
    assert_eq!(plain(&status), expected);
    status.volumes = vec![volume(3)];
    assert!(plain(&status).contains("\n  volume:3 disk:UpToDate"));
}

/// Everything: lines continue below, counters begin a line of their own.
#[test]
fn verbose_with_statistics() {
    let expected = "\
r0 node-id:0 role:Primary suspended:no force-io-failures:no
    write-ordering:flush
  volume:0 minor:0 disk:UpToDate backing_dev:/dev/vg0/r0 quorum:yes open:yes
      size:10485724 read:262144 written:524288 al-writes:63 bm-writes:0 upper-pending:2
      lower-pending:1 al-suspended:no blocked:no
  bob node-id:1 connection:Connected role:Secondary tls:no congested:no
      ap-in-flight:8 rs-in-flight:0
    volume:0 replication:SyncSource peer-disk:Inconsistent done:62.50
        resync-suspended:no
        received:0 sent:524288 out-of-sync:3932160 pending:1 unacked:0 dbdt1:42.67 eta:90

";
    assert_eq!(text::status(&syncing(), (0, 1), FULL), expected);
    let verbose = Show { verbose: true, ..PLAIN };
    let expected = "\
r0 node-id:1 role:Secondary suspended:no force-io-failures:no
  volume:0 minor:0 disk:UpToDate backing_dev:/dev/vg0/r0 quorum:yes open:no
  bob node-id:0 connection:Connecting role:Unknown tls:no congested:no
    volume:0 replication:Off peer-disk:DUnknown resync-suspended:no

";
    assert_eq!(text::status(&alone("Connecting"), (1, 0), verbose), expected);
}

/// Colours mark the words alone and do not change where lines break.
#[test]
fn colors() {
    let show = Show { color: true, ..FULL };
    let colored = text::status(&syncing(), (0, 1), show);
    for word in [
        "role:\x1b[1;36mPrimary\x1b[0m",
        "disk:\x1b[1;32mUpToDate\x1b[0m",
        "peer-disk:\x1b[1;31mInconsistent\x1b[0m",
        "role:Secondary",
    ] {
        assert!(colored.contains(word), "{word:?} in {colored:?}");
    }
    let mut stripped = colored;
    for code in ["\x1b[1;36m", "\x1b[1;32m", "\x1b[1;31m", "\x1b[32m", "\x1b[0m"] {
        stripped = stripped.replace(code, "");
    }
    assert_eq!(stripped, text::status(&syncing(), (0, 1), FULL));
}

/// The example of the reference, key by key. The engine has one window of measurement, so the
/// short and the long one show the same figures.
#[test]
fn json_of_a_resync() {
    let expected = include_str!("data/status_resync.json");
    assert_eq!(json::resources(&[(syncing(), (0, 1))]), expected);
}

/// Nothing, several resources, several volumes: always an array that a parser reads.
#[test]
fn json_is_json() {
    assert_eq!(json::resources(&[]), "[\n]\n");
    let mut odd = alone("StandAlone");
    odd.name = "quote\" back\\ tab\t".to_owned();
    odd.local.clear();
    odd.volumes.push(volume(1));
    odd.volumes[0].resync = Some(ResyncStatus::default());
    let mut empty = healthy();
    empty.volumes.clear();
    let all = json::resources(&[(odd, (1, 0)), (empty, (0, 1)), (target(), (1, 0))]);
    let read: serde_json::Value = serde_json::from_str(&all).unwrap();
    let at = |path: &str| read.pointer(path).unwrap_or_else(|| panic!("{path} in {all}"));
    assert_eq!(read.as_array().unwrap().len(), 3);
    assert_eq!(at("/0/name"), "quote\" back\\ tab\t");
    assert_eq!(at("/0/devices/1/volume"), 1);
    assert_eq!(at("/0/connections/0/connection-state"), "StandAlone");
    assert_eq!(at("/0/connections/0/paths"), &serde_json::json!([]));
    assert_eq!(at("/0/connections/0/peer_devices/0/percent-resync-done"), 100.0);
    assert_eq!(at("/0/connections/0/peer_devices/1/has-sync-details"), false);
    assert!(read.pointer("/0/connections/0/peer_devices/1/rs-total").is_none());
    assert_eq!(at("/1/devices"), &serde_json::json!([]));
    assert_eq!(at("/2/connections/0/peer_devices/0/replication-state"), "SyncTarget");
    assert_eq!(at("/2/connections/0/paths/0/this_host/port"), 7789);
}
