//! Replays the handshakes that were captured between two kernel drivers: from what both nodes
//! announced we must draw the conclusions that they drew.

use std::collections::BTreeMap;

use super::*;
use crate::gi::UuidFlags;
use crate::state::{Rules, State};

const TRACES: [(&str, &str); 16] = [
    ("01", include_str!("../../tests/data/traces/01-initial-sync-and-writes/packets.txt")),
    ("02", include_str!("../../tests/data/traces/02-skip-sync-bitmap-resync/packets.txt")),
    ("03", include_str!("../../tests/data/traces/03-trim-zeroes/packets.txt")),
    ("04", include_str!("../../tests/data/traces/04-auth-integrity-protoB/packets.txt")),
    ("05", include_str!("../../tests/data/traces/05-protoA-protocol-update/packets.txt")),
    ("06", include_str!("../../tests/data/traces/06-verify-csums/packets.txt")),
    ("07", include_str!("../../tests/data/traces/07-dual-primary-conflicts/packets.txt")),
    ("08", include_str!("../../tests/data/traces/08-diskless-reads-reattach/packets.txt")),
    ("09", include_str!("../../tests/data/traces/09-ahead-behind/packets.txt")),
    ("10", include_str!("../../tests/data/traces/10-two-volumes/packets.txt")),
    ("11", include_str!("../../tests/data/traces/11-pause-invalidate-resize/packets.txt")),
    ("12", include_str!("../../tests/data/traces/12-link-loss-crossing/packets.txt")),
    ("13", include_str!("../../tests/data/traces/13-simultaneous-connect/packets.txt")),
    ("14", include_str!("../../tests/data/traces/14-split-brain/packets.txt")),
    ("16", include_str!("../../tests/data/traces/16-zeroes-with-integrity/packets.txt")),
    ("17", include_str!("../../tests/data/traces/17-thin-and-equal-checksums/packets.txt")),
];

/// The one with a crashed Primary, compressed.
const CRASHED: &[u8] = include_bytes!("../../tests/data/traces/15-crashed-primary/packets.txt.xz");

/// What one node sent for one volume of one connection.
#[derive(Clone, Debug, Default)]
struct Said {
    uuids: Option<PeerUuids>,
    states: Vec<State>,
}

/// What was said on a connection about a volume, by node A and by node B.
type Talk = BTreeMap<(String, String), [Said; 2]>;

fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let start = line.find(name).expect("the packet has the field") + name.len();
    line[start..].split_whitespace().next().expect("the field has a value")
}

fn uuids(line: &str) -> PeerUuids {
    let hex = |name| u64::from_str_radix(field(line, name), 16).unwrap();
    let flags = field(line, "flags=0x");
    PeerUuids {
        uuids: Uuids::from_slots([hex("cur="), hex(" bm="), hex("h0="), hex("h1=")]),
        bits_set: field(line, "bits=").parse().unwrap(),
        flags: UuidFlags::from_word(u64::from_str_radix(flags, 16).unwrap()),
    }
}

fn state(line: &str) -> State {
    let word = u32::from_str_radix(field(line, "| 0x"), 16).unwrap();
    let state = State::from_word(word).unwrap();
    assert_eq!(state.word(), word);
    for (name, value) in [
        (" role=", state.role.name()),
        (" disk=", state.disk.name()),
        (" pdsk=", state.pdsk.name()),
    ] {
        assert_eq!(field(line, name), value, "{line}");
    }
    assert!(field(line, " conn=").starts_with(state.conn.name()), "{line}");
    state
}

fn listen(text: &str) -> Talk {
    let mut talk = Talk::new();
    for line in text.lines() {
        let is_uuids = line.contains(" P_UUIDS ");
        if !is_uuids && !line.contains(" P_STATE ") {
            continue;
        }
        let connection = line.split_whitespace().nth(1).unwrap().to_string();
        let key = (connection, field(line, "vol=").to_string());
        let said = &mut talk.entry(key).or_default()[usize::from(line.contains(" B->A "))];
        if !is_uuids {
            said.states.push(state(line));
        } else if said.states.is_empty() {
            said.uuids = Some(uuids(line));
        }
    }
    talk
}

/// The state that `own` enters on the first report of `peer`.
fn meet(own: &Said, peer: &Said) -> Conclusion {
    let (hello, packet) = (own.states[0], peer.states[0]);
    let old = State { conn: Conn::WFReportParams, ..hello };
    let report = PeerReport {
        old,
        packet,
        peer_flags: peer.uuids.map(|uuids| uuids.flags),
        bits_set: own.uuids.map_or(0, |uuids| uuids.bits_set),
        negotiating: None,
        peer_forced: false,
        new_uuid_pending: false,
    };
    let Verdict::Pending(pending) = report.judge() else {
        panic!("a first report is always pending: {report:?}");
    };
    let result = pending.needs_handshake().then(|| {
        let (ours, theirs) = (own.uuids.unwrap(), peer.uuids.unwrap());
        Handshake {
            own: &ours.uuids,
            own_bits_set: ours.bits_set,
            own_crashed: ours.flags.crashed_primary,
            own_role: old.role,
            own_disk: pending.own_disk(),
            own_attaching: pending.own_attaching(),
            own_discard: ours.flags.discard_my_data,
            own_resolver: false,
            peer: &theirs,
            peer_role: packet.role,
            peer_disk: pending.peer_disk(),
            agreed_version: 101,
            wsame_feature: true,
            policies: Policies::default(),
            always_asbp: false,
            rr_conflict: RrConflict::Disconnect,
            dry_run: false,
        }
        .decide()
    });
    let rules = Rules { handshaking: true, two_primaries: true, ..Rules::default() };
    pending.conclude(result, &rules)
}

#[test]
fn captured_handshakes_are_decided_as_the_kernel_driver_did() {
    let mut crashed = Vec::new();
    lzma_rs::xz_decompress(&mut &CRASHED[..], &mut crashed).unwrap();
    let crashed = String::from_utf8(crashed).unwrap();
    let (mut agreed, mut split) = (0, 0);
    for (trace, text) in TRACES.into_iter().chain([("15", crashed.as_str())]) {
        for (key, [a, b]) in listen(text) {
            if a.states.is_empty() || b.states.is_empty() {
                continue;
            }
            for (own, peer) in [(&a, &b), (&b, &a)] {
                match (meet(own, peer), own.states.get(1)) {
                    (Conclusion::Enter { state, establishes: true, .. }, Some(expected)) => {
                        assert_eq!(state, *expected, "trace {trace} {key:?}");
                        agreed += 1;
                    }
                    (Conclusion::Failed(HandshakeFailure::SplitBrain), None) => split += 1,
                    (got, expected) => panic!("trace {trace} {key:?}: {got:?}, not {expected:?}"),
                }
            }
        }
    }
    assert!(agreed > 30, "only {agreed} handshakes were found");
    assert_eq!(split, 2);
}
