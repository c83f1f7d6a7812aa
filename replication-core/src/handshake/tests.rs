use proptest::prelude::*;

use super::*;
use crate::gi::UuidFlags;
use crate::split_brain::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri};

const X: u64 = 0x7785_421d_0355_1318;
const Y: u64 = 0x51b4_d16a_0000_0000;
const W: u64 = 0x6a52_cb25_2550_8b30;

/// One node, from which both views of a handshake are made.
#[derive(Clone, Copy, Debug)]
struct Node {
    uuids: Uuids,
    bits_set: u64,
    crashed: bool,
    role: Role,
    disk: Disk,
    attaching: bool,
    discard: bool,
}

/// What both nodes share; `after_sb` in the view of the first one.
#[derive(Clone, Copy, Debug)]
struct Link {
    policies: Policies,
    always_asbp: bool,
    rr_conflict: RrConflict,
    dry_run: bool,
}

const LINK: Link = Link {
    policies: Policies {
        after_sb_0pri: AfterSb0Pri::Disconnect,
        after_sb_1pri: AfterSb1Pri::Disconnect,
        after_sb_2pri: AfterSb2Pri::Disconnect,
    },
    always_asbp: false,
    rr_conflict: RrConflict::Disconnect,
    dry_run: false,
};

fn node(slots: [u64; 4]) -> Node {
    Node {
        uuids: Uuids::from_slots(slots),
        bits_set: 1,
        crashed: false,
        role: Role::Secondary,
        disk: Disk::UpToDate,
        attaching: false,
        discard: false,
    }
}

fn run(
    own: &Node,
    peer: &Node,
    first: bool,
    link: &Link,
) -> Result<SyncDecision, HandshakeFailure> {
    let flags = UuidFlags {
        discard_my_data: peer.discard,
        crashed_primary: peer.crashed,
        ..UuidFlags::default()
    };
    Handshake {
        own: &own.uuids,
        own_bits_set: own.bits_set,
        own_crashed: own.crashed,
        own_role: own.role,
        own_disk: own.disk,
        own_attaching: own.attaching,
        own_discard: own.discard,
        own_resolver: first,
        peer: &PeerUuids { uuids: peer.uuids, bits_set: peer.bits_set, flags },
        peer_role: peer.role,
        peer_disk: peer.disk,
        agreed_version: 101,
        wsame_feature: true,
        policies: if first { link.policies } else { link.policies.mirrored() },
        always_asbp: link.always_asbp,
        rr_conflict: link.rr_conflict,
        dry_run: link.dry_run,
    }
    .decide()
}

/// The state and the amount on the first node, after checking that the second one mirrors it.
fn both(a: &Node, b: &Node, link: &Link) -> Result<(Conn, bool), HandshakeFailure> {
    let (here, there) = (run(a, b, true, link), run(b, a, false, link));
    let summary = here.map(|decision| (decision.conn, decision.full));
    assert_eq!(summary, there.map(|decision| (mirrored(decision.conn), decision.full)));
    summary
}

fn mirrored(conn: Conn) -> Conn {
    if conn == Conn::WFBitMapS {
        Conn::WFBitMapT
    } else if conn == Conn::WFBitMapT {
        Conn::WFBitMapS
    } else {
        conn
    }
}

#[test]
fn identifiers_decide_between_good_disks() {
    let equal = node([X, 0, 0, 0]);
    assert_eq!(both(&equal, &equal, &LINK), Ok((Conn::Connected, false)));
    let (newer, older) = (node([X, W, 0, 0]), node([W, 0, 0, 0]));
    assert_eq!(both(&newer, &older, &LINK), Ok((Conn::WFBitMapS, false)));
    assert_eq!(both(&older, &newer, &LINK), Ok((Conn::WFBitMapT, false)));
    let far = node([X, Y, W, 0]);
    assert_eq!(both(&far, &older, &LINK), Ok((Conn::WFBitMapS, true)));
    let fresh = Node { disk: Disk::Inconsistent, ..node([4, 0, 0, 0]) };
    assert_eq!(both(&fresh, &fresh, &LINK), Ok((Conn::Connected, false)));
    assert_eq!(both(&fresh, &newer, &LINK), Ok((Conn::WFBitMapT, true)));
    let stranger = node([Y, 0, 0x70, 0x72]);
    let other = node([X, 0, 0x74, 0x76]);
    assert_eq!(both(&stranger, &other, &LINK), Err(HandshakeFailure::Unrelated));
    let crossed = both(&node([X, Y, 0, 0]), &node([Y, X, 0, 0]), &LINK);
    assert_eq!(crossed, Err(HandshakeFailure::Contradictory));
}

#[test]
fn the_only_usable_disk_wins_over_the_identifiers() {
    let bad = |slots| Node { disk: Disk::Inconsistent, ..node(slots) };
    let source = Ok((Conn::WFBitMapS, false));
    let full = Ok((Conn::WFBitMapS, true));
    assert_eq!(both(&node([X, 0, 0, 0]), &bad([X, 0, 0, 0]), &LINK), source);
    assert_eq!(both(&node([W, 0, 0, 0]), &bad([X, W, 0, 0]), &LINK), source);
    assert_eq!(both(&node([W, 0, 0, 0]), &bad([X, Y, W, 0]), &LINK), full);
    assert_eq!(both(&node([X, W, 0, 0]), &bad([Y, W, 0, 0]), &LINK), source);
    assert_eq!(both(&node([X, 0, W, 0]), &bad([Y, 0, W, 0]), &LINK), full);
    let outdated = Node { disk: Disk::Outdated, ..node([X, 0, 0, 0]) };
    assert_eq!(both(&outdated, &bad([X, 0, 0, 0]), &LINK), source);
    assert_eq!(both(&outdated, &node([X, 0, 0, 0]), &LINK), Ok((Conn::Connected, false)));
    let fate = both(&bad([X, W, 0, 0]), &bad([X, W, 0, 0]), &LINK);
    assert_eq!(fate, Ok((Conn::Connected, false)));
}

#[test]
fn a_split_brain_is_seen_by_both_and_healed_by_the_operator() {
    // The identifiers of the captured split brain.
    let (a, b) = (node([X, W, 0, 0]), node([Y, W, 0, 0]));
    assert_eq!(both(&a, &b, &LINK), Err(HandshakeFailure::SplitBrain));
    let victim = Node { discard: true, ..a };
    assert_eq!(both(&victim, &b, &LINK), Ok((Conn::WFBitMapT, false)));
    let decision = run(&victim, &b, true, &LINK).unwrap();
    assert_eq!(decision.solved, Some(Solved::Manually { from_here: false }));
    assert_eq!(decision.comparison.rule, 90);
    let both_gave_up = both(&victim, &Node { discard: true, ..b }, &LINK);
    assert_eq!(both_gave_up, Err(HandshakeFailure::SplitBrain));
    // Without a common bitmap generation everything is copied, whoever chose the victim.
    let (a, b) = (node([X, 0, W, 0]), node([Y, 0, W, 0]));
    let victim = Node { discard: true, ..b };
    assert_eq!(both(&a, &victim, &LINK), Ok((Conn::WFBitMapS, true)));
    // Giving up one's data means nothing without a split brain.
    let newer = Node { discard: true, ..node([X, W, 0, 0]) };
    assert_eq!(both(&newer, &node([W, 0, 0, 0]), &LINK), Ok((Conn::WFBitMapS, false)));
}

#[test]
fn policies_apply_to_usable_bitmaps_and_to_all_if_the_operator_says_so() {
    let policies = Policies { after_sb_0pri: AfterSb0Pri::DiscardZeroChanges, ..LINK.policies };
    let link = Link { policies, ..LINK };
    let a = Node { bits_set: 0, ..node([X, W, 0, 0]) };
    let b = node([Y, W, 0, 0]);
    assert_eq!(both(&a, &b, &link), Ok((Conn::WFBitMapT, false)));
    let solved = run(&a, &b, true, &link).unwrap().solved;
    assert_eq!(solved, Some(Solved::Automatic { primaries: 0, from_here: false }));
    // Both have changes: no decision, but the operator may still choose.
    let changed = node([X, W, 0, 0]);
    assert_eq!(both(&changed, &b, &link), Err(HandshakeFailure::SplitBrain));
    let victim = Node { discard: true, ..changed };
    assert_eq!(both(&victim, &b, &link), Ok((Conn::WFBitMapT, false)));
    let (a, b) = (Node { bits_set: 0, ..node([X, 0, W, 0]) }, node([Y, 0, W, 0]));
    assert_eq!(both(&a, &b, &link), Err(HandshakeFailure::SplitBrain));
    let always = Link { always_asbp: true, ..link };
    assert_eq!(both(&a, &b, &always), Ok((Conn::WFBitMapT, true)));
}

#[test]
fn a_primary_is_not_overwritten_unless_it_may_be() {
    let primary = Node { role: Role::Primary, ..node([W, 0, 0, 0]) };
    let newer = node([X, W, 0, 0]);
    let refused = run(&primary, &newer, true, &LINK);
    let policy = RrConflict::Disconnect;
    assert_eq!(refused, Err(HandshakeFailure::RoleConflict { policy }));
    let call = Link { rr_conflict: RrConflict::CallPriLost, ..LINK };
    let refused = run(&primary, &newer, true, &call);
    let policy = RrConflict::CallPriLost;
    assert_eq!(refused, Err(HandshakeFailure::RoleConflict { policy }));
    let violent = Link { rr_conflict: RrConflict::Violently, ..LINK };
    let decision = run(&primary, &newer, true, &violent).unwrap();
    assert!(decision.overwrites_primary && decision.conn == Conn::WFBitMapT);
    assert!(!run(&newer, &primary, false, &violent).unwrap().overwrites_primary);
    // As captured: a Primary without a disk attaches an old one again.
    let attaching = Node { attaching: true, ..primary };
    let decision = run(&attaching, &newer, true, &LINK).unwrap();
    assert!(!decision.overwrites_primary && decision.conn == Conn::WFBitMapT);
    let outdated = Node { disk: Disk::Outdated, ..primary };
    let decision = run(&outdated, &newer, true, &LINK).unwrap();
    assert!(!decision.overwrites_primary && decision.conn == Conn::WFBitMapT);
}

#[test]
fn a_primary_that_loses_by_policy_is_demoted_first() {
    let policies = Policies {
        after_sb_0pri: AfterSb0Pri::DiscardLocal,
        after_sb_1pri: AfterSb1Pri::CallPriLost,
        ..LINK.policies
    };
    let link = Link { policies, ..LINK };
    let a = Node { role: Role::Primary, ..node([X, W, 0, 0]) };
    let b = node([Y, W, 0, 0]);
    assert_eq!(both(&a, &b, &link), Ok((Conn::WFBitMapT, false)));
    let decision = run(&a, &b, true, &link).unwrap();
    assert!(decision.demote_first && !decision.overwrites_primary);
    let solved = Some(Solved::Automatic { primaries: 1, from_here: false });
    assert_eq!(decision.solved, solved);
    assert!(!run(&b, &a, false, &link).unwrap().demote_first);
}

#[test]
fn a_source_needs_good_data() {
    let worse = Node { disk: Disk::Failed, ..node([X, W, 0, 0]) };
    let refused = run(&worse, &node([W, 0, 0, 0]), true, &LINK);
    assert_eq!(refused, Err(HandshakeFailure::NotGoodEnough { disk: Disk::Failed }));
    let bad = |slots| Node { disk: Disk::Inconsistent, ..node(slots) };
    let refused = run(&bad([X, W, 0, 0]), &bad([W, 0, 0, 0]), true, &LINK);
    assert_eq!(refused, Err(HandshakeFailure::NotGoodEnough { disk: Disk::Inconsistent }));
}

#[test]
fn a_dry_run_tells_what_would_happen() {
    let link = Link { dry_run: true, ..LINK };
    let told = run(&node([X, Y, W, 0]), &node([W, 0, 0, 0]), true, &link).unwrap_err();
    assert_eq!(told, HandshakeFailure::DryRun { conn: Conn::WFBitMapS, full: true });
    assert!(told.may_retry());
}

#[test]
fn old_peers_cannot_decide_everything() {
    let own = node([X, W, 0, 0]);
    let crashed = UuidFlags { crashed_primary: true, ..UuidFlags::default() };
    let peer = PeerUuids { uuids: Uuids::from_slots([X, 0, 0, 0]), bits_set: 0, flags: crashed };
    let handshake = Handshake {
        own: &own.uuids,
        own_bits_set: 0,
        own_crashed: false,
        own_role: Role::Primary,
        own_disk: Disk::UpToDate,
        own_attaching: false,
        own_discard: false,
        own_resolver: true,
        peer: &peer,
        peer_role: Role::Secondary,
        peer_disk: Disk::Consistent,
        agreed_version: 90,
        wsame_feature: false,
        policies: Policies::default(),
        always_asbp: false,
        rr_conflict: RrConflict::Disconnect,
        dry_run: false,
    };
    let needs = HandshakeFailure::NeedsProtocol { expected: 91 };
    assert_eq!(handshake.decide(), Err(needs));
    let equal = Uuids::from_slots([X, 0, 0, 0]);
    let handshake = Handshake { own: &equal, ..handshake };
    assert_eq!(handshake.decide(), Err(HandshakeFailure::NeedsFeature));
}

#[test]
fn failures_and_solutions_are_written_as_operators_know_them() {
    let policy = RrConflict::CallPriLost;
    let failures = [
        HandshakeFailure::SplitBrain,
        HandshakeFailure::Unrelated,
        HandshakeFailure::NotGoodEnough { disk: Disk::Inconsistent },
        HandshakeFailure::RoleConflict { policy },
        HandshakeFailure::NeedsProtocol { expected: 91 },
        HandshakeFailure::NeedsFeature,
        HandshakeFailure::Contradictory,
        HandshakeFailure::DryRun { conn: Conn::WFBitMapT, full: false },
    ];
    let solutions = [
        Solved::Automatic { primaries: 1, from_here: true },
        Solved::Automatic { primaries: 0, from_here: false },
        Solved::Manually { from_here: true },
        Solved::Manually { from_here: false },
    ];
    let mut text = String::new();
    for failure in failures {
        text.push_str(&format!("{failure} [retry: {}]\n", failure.may_retry()));
    }
    for solved in solutions {
        text.push_str(&format!("{solved}\n"));
    }
    insta::assert_snapshot!("handshake_texts", text);
}

#[test]
fn a_diskless_primary_goes_on_only_with_the_data_it_used() {
    let peer = |slots| PeerUuids { uuids: Uuids::from_slots(slots), ..PeerUuids::default() };
    let check = |role, disk, slots| check_exposed_data(role, disk, Uuid(X | 1), &peer(slots));
    assert_eq!(check(Role::Primary, Disk::Diskless, [X, 0, 0, 0]), Ok(()));
    let wrong = WrongData { expected: Uuid(X | 1), found: Uuid(Y) };
    assert_eq!(check(Role::Primary, Disk::Diskless, [Y, X, 0, 0]), Err(wrong));
    assert_eq!(check(Role::Primary, Disk::Inconsistent, [Y, X, 0, 0]), Ok(()));
    assert_eq!(check(Role::Secondary, Disk::Diskless, [Y, X, 0, 0]), Ok(()));
    assert_eq!(
        wrong.to_string(),
        "this node is Primary without a disk and was using generation 7785421D03551319, \
         but the peer has 51B4D16A00000000"
    );
}

#[test]
fn only_unused_metadata_skips_the_initial_resync() {
    let flags = UuidFlags { skip_initial_sync: true, ..UuidFlags::default() };
    let peer = PeerUuids { uuids: Uuids::from_slots([X, 4, 0, 0]), bits_set: 0, flags };
    let silent = PeerUuids { flags: UuidFlags::default(), ..peer };
    let fresh = Uuids::fresh();
    assert!(is_skip_initial_sync(Conn::Connected, &fresh, &peer));
    assert!(!is_skip_initial_sync(Conn::WFReportParams, &fresh, &peer));
    assert!(!is_skip_initial_sync(Conn::Connected, &fresh, &silent));
    let used = Uuids::from_slots([5, 0, 0, 0]);
    assert!(!is_skip_initial_sync(Conn::Connected, &used, &peer));
}

fn any_node() -> impl Strategy<Value = Node> {
    let pool = vec![0, 0, 4, X, Y, W, W | 1, X | 1, W + (1 << 48)];
    let slot = move || prop::sample::select(pool.clone());
    let disks = vec![Disk::Inconsistent, Disk::Outdated, Disk::Consistent, Disk::UpToDate];
    let slots = [slot(), slot(), slot(), slot()];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let rest = (flags, prop::sample::select(disks), prop::sample::select(vec![0u64, 3, 8]));
    (slots, rest).prop_map(|(slots, ((crashed, primary, discard), disk, bits_set))| Node {
        uuids: Uuids::from_slots(slots),
        bits_set,
        crashed,
        role: if primary { Role::Primary } else { Role::Secondary },
        disk,
        attaching: false,
        discard,
    })
}

fn any_link() -> impl Strategy<Value = Link> {
    let zero = prop::sample::select(AfterSb0Pri::ALL);
    let one = prop::sample::select(AfterSb1Pri::ALL);
    let two = prop::sample::select(AfterSb2Pri::ALL);
    (zero, one, two, any::<bool>()).prop_map(|(zero, one, two, always_asbp)| Link {
        policies: Policies { after_sb_0pri: zero, after_sb_1pri: one, after_sb_2pri: two },
        always_asbp,
        rr_conflict: RrConflict::Violently,
        dry_run: false,
    })
}

/// Reasons that only the node itself knows; the peer then sees the connection end.
fn is_one_sided(failure: HandshakeFailure) -> bool {
    matches!(
        failure,
        HandshakeFailure::NotGoodEnough { .. } | HandshakeFailure::RoleConflict { .. }
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8_000, ..ProptestConfig::default() })]

    #[test]
    fn both_nodes_reach_mirrored_decisions(a in any_node(), b in any_node(), link in any_link()) {
        let (here, there) = (run(&a, &b, true, &link), run(&b, &a, false, &link));
        match (here, there) {
            (Ok(here), Ok(there)) => {
                prop_assert_eq!(here.conn, mirrored(there.conn));
                prop_assert_eq!(here.full, there.full);
                prop_assert_eq!(here.solved.is_some(), there.solved.is_some());
                prop_assert!(!(here.demote_first && there.demote_first));
                // GI-4: nothing but bitmaps of one generation, or a verdict over equal
                // generations, leads to less than a full copy after a split brain.
                if here.solved.is_some() && here.comparison.rule != 90 {
                    prop_assert!(here.full);
                }
            }
            (Err(here), Err(there)) => {
                prop_assert!(here == there || is_one_sided(here) || is_one_sided(there));
            }
            (Ok(_), Err(failure)) | (Err(failure), Ok(_)) => prop_assert!(is_one_sided(failure)),
        }
    }
}
