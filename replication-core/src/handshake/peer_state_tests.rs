use super::*;
use crate::gi::{Comparison, Outcome};

fn connected() -> State {
    State {
        peer: Role::Secondary,
        conn: Conn::Connected,
        disk: Disk::UpToDate,
        pdsk: Disk::UpToDate,
        ..State::initial()
    }
}

fn report(old: State, packet: State) -> PeerReport {
    PeerReport {
        old,
        packet,
        peer_flags: Some(UuidFlags::default()),
        bits_set: 0,
        negotiating: None,
        peer_forced: false,
        new_uuid_pending: false,
    }
}

fn pending(report: PeerReport) -> Pending {
    match report.judge() {
        Verdict::Pending(pending) => pending,
        other @ (Verdict::Dropped | Verdict::ResyncEnd { .. } | Verdict::VerifyEnd) => {
            panic!("expected a pending change, got {other:?}")
        }
    }
}

fn decision(conn: Conn) -> SyncDecision {
    let comparison = Comparison {
        outcome: Outcome::NoSync,
        rule: 40,
        own_correction: None,
        peer_correction: None,
    };
    SyncDecision {
        conn,
        full: false,
        comparison,
        solved: None,
        demote_first: false,
        overwrites_primary: false,
    }
}

fn entered(conclusion: Conclusion) -> (State, bool, bool) {
    match conclusion {
        Conclusion::Enter { state, establishes, answer, attach_refused: None } => {
            (state, establishes, answer)
        }
        other @ (Conclusion::Enter { .. }
        | Conclusion::Failed(_)
        | Conclusion::Refused(_)
        | Conclusion::PeerRestarted) => panic!("expected a state, got {other:?}"),
    }
}

/// The first packet of a connection, as the peer sends it.
fn hello(role: Role, disk: Disk) -> State {
    State { role, conn: Conn::WFConnection, disk, ..State::initial() }
}

fn reporting(disk: Disk) -> State {
    State { conn: Conn::WFReportParams, disk, ..State::initial() }
}

#[test]
fn the_first_report_establishes_the_connection() {
    let old = reporting(Disk::Inconsistent);
    let step = pending(report(old, State::from_word(0xc882).unwrap()));
    assert!(step.needs_handshake() && !step.peer_is_primary());
    assert_eq!((step.own_disk(), step.peer_disk()), (Disk::Inconsistent, Disk::Inconsistent));
    let rules = Rules { handshaking: true, ..Rules::default() };
    let (state, establishes, answer) =
        entered(step.conclude(Some(Ok(decision(Conn::Connected))), &rules));
    assert_eq!(state.word(), 0x88aa);
    assert!(establishes && !answer);
}

#[test]
fn without_a_disk_on_one_side_there_is_nothing_to_decide() {
    let good = hello(Role::Secondary, Disk::UpToDate);
    let step = pending(report(reporting(Disk::Diskless), good));
    assert!(!step.needs_handshake());
    let (state, ..) = entered(step.conclude(None, &Rules::default()));
    assert_eq!((state.conn, state.pdsk), (Conn::Connected, Disk::UpToDate));
    let empty = hello(Role::Primary, Disk::Diskless);
    assert!(!pending(report(reporting(Disk::UpToDate), empty)).needs_handshake());
    let silent = PeerReport { peer_flags: None, ..report(reporting(Disk::UpToDate), good) };
    assert!(!pending(silent).needs_handshake());
}

#[test]
fn a_new_connection_obeys_the_rules_for_soft_changes() {
    let old = State { role: Role::Primary, ..reporting(Disk::UpToDate) };
    let step = pending(report(old, hello(Role::Primary, Disk::UpToDate)));
    let agreed = Some(Ok(decision(Conn::Connected)));
    let refused = step.conclude(agreed, &Rules::default());
    assert_eq!(refused, Conclusion::Refused(Refused::TwoPrimaries));
    let both = Rules { two_primaries: true, ..Rules::default() };
    let (state, ..) = entered(step.conclude(agreed, &both));
    assert_eq!(state.peer, Role::Primary);
    let failure = HandshakeFailure::SplitBrain;
    assert_eq!(step.conclude(Some(Err(failure)), &both), Conclusion::Failed(failure));
    // Once connected, what the peer has become is a fact.
    let step = pending(report(
        State { role: Role::Primary, ..connected() },
        State { role: Role::Primary, ..connected() },
    ));
    let (state, establishes, _) = entered(step.conclude(None, &Rules::default()));
    assert!(state.peer == Role::Primary && !establishes);
    let early = State { conn: Conn::WFConnection, ..reporting(Disk::UpToDate) };
    let step = pending(report(early, hello(Role::Secondary, Disk::UpToDate)));
    let refused = step.conclude(agreed, &both);
    assert_eq!(refused, Conclusion::Refused(Refused::NeedConnection));
}

#[test]
fn an_ending_connection_takes_no_news() {
    for conn in [Conn::Disconnecting, Conn::ProtocolError, Conn::TearDown] {
        let old = State { conn, ..connected() };
        assert_eq!(report(old, connected()).judge(), Verdict::Dropped);
    }
}

#[test]
fn the_target_tells_the_source_that_the_resync_has_ended() {
    let source = State { conn: Conn::SyncSource, pdsk: Disk::Inconsistent, ..connected() };
    let done = report(source, connected());
    assert_eq!(done.judge(), Verdict::ResyncEnd { finish: true });
    let missing = PeerReport { bits_set: 3, ..done };
    assert_eq!(missing.judge(), Verdict::ResyncEnd { finish: false });
    // A target that still prepares reports good data, which it is about to give up.
    let preparing = State { conn: Conn::WFBitMapT, ..connected() };
    let source = State { conn: Conn::WFBitMapS, pdsk: Disk::Consistent, ..connected() };
    let step = pending(report(source, preparing));
    assert_eq!(step.peer_disk(), Disk::Inconsistent);
    let (state, _, answer) = entered(step.conclude(None, &Rules::default()));
    assert_eq!((state.conn, state.pdsk), (Conn::WFBitMapS, Disk::Inconsistent));
    assert!(!answer);
    // The bitmaps are still being exchanged: an end would be too early.
    let step = pending(report(source, connected()));
    let (state, _, answer) = entered(step.conclude(None, &Rules::default()));
    assert!(state.conn == Conn::WFBitMapS && answer);
}

#[test]
fn the_initiator_tells_the_other_side_that_the_verify_has_ended() {
    let verifying = State { conn: Conn::VerifyT, ..connected() };
    assert_eq!(report(verifying, connected()).judge(), Verdict::VerifyEnd);
    let started = State { conn: Conn::VerifyS, ..connected() };
    assert!(!pending(report(verifying, started)).needs_handshake());
}

#[test]
fn a_late_report_from_an_ended_resync_changes_nothing() {
    let late = State { conn: Conn::PausedSyncT, disk: Disk::Inconsistent, ..connected() };
    let step = pending(report(connected(), late));
    let (state, ..) = entered(step.conclude(None, &Rules::default()));
    assert_eq!(state, connected());
    let true_news = State { disk: Disk::Inconsistent, ..connected() };
    let step = pending(report(connected(), true_news));
    let (state, ..) = entered(step.conclude(None, &Rules::default()));
    assert_eq!(state.pdsk, Disk::Inconsistent);
}

#[test]
fn a_congested_peer_puts_us_behind() {
    let ahead = State { role: Role::Primary, conn: Conn::Ahead, ..connected() };
    let step = pending(report(connected(), ahead));
    let (state, ..) = entered(step.conclude(None, &Rules::default()));
    assert_eq!((state.conn, state.disk), (Conn::Behind, Disk::Outdated));
}

#[test]
fn pauses_of_the_peer_are_one_pause_here() {
    let target = State { conn: Conn::SyncTarget, disk: Disk::Inconsistent, ..connected() };
    for packet in [
        State { conn: Conn::SyncSource, user_isp: true, ..connected() },
        State { conn: Conn::SyncSource, aftr_isp: true, ..connected() },
    ] {
        let step = pending(report(target, packet));
        let (paused, ..) = entered(step.conclude(None, &Rules::default()));
        assert_eq!(paused, State { conn: Conn::PausedSyncT, peer_isp: true, ..target });
        let resumed = State { conn: Conn::SyncSource, ..connected() };
        let step = pending(report(paused, resumed));
        let (state, ..) = entered(step.conclude(None, &Rules::default()));
        assert_eq!(state, target);
    }
}

#[test]
fn a_forced_promotion_of_the_peer_starts_a_resync() {
    let old = State { disk: Disk::Inconsistent, peer: Role::Primary, ..connected() };
    let packet = State { role: Role::Primary, ..connected() };
    assert!(!pending(report(old, packet)).needs_handshake());
    let forced = PeerReport { peer_forced: true, ..report(old, packet) };
    let step = pending(forced);
    assert!(step.needs_handshake() && step.peer_is_primary());
    let target = Some(Ok(decision(Conn::WFBitMapT)));
    let (state, establishes, answer) = entered(step.conclude(target, &Rules::default()));
    assert_eq!((state.conn, state.disk), (Conn::WFBitMapT, Disk::Inconsistent));
    assert!(!establishes && answer);
    // The peer in turn learns from our state that a resync is wanted.
    let primary = State { role: Role::Primary, pdsk: Disk::Inconsistent, ..connected() };
    let wants = State { conn: Conn::WFBitMapT, disk: Disk::Inconsistent, ..connected() };
    let step = pending(report(primary, wants));
    assert!(step.needs_handshake());
    let source = Some(Ok(decision(Conn::WFBitMapS)));
    let (state, _, answer) = entered(step.conclude(source, &Rules::default()));
    assert_eq!((state.conn, state.pdsk), (Conn::WFBitMapS, Disk::Inconsistent));
    assert!(!answer);
}

#[test]
fn an_attach_while_connected_is_decided_by_the_handshake() {
    // Our attach: the peer's answer decides.
    let old = State { disk: Disk::Negotiating, ..connected() };
    let packet = State { conn: Conn::Connected, ..connected() };
    let ours = PeerReport { negotiating: Some(Disk::Consistent), ..report(old, packet) };
    let step = pending(ours);
    assert!(step.needs_handshake());
    assert_eq!(step.own_disk(), Disk::Consistent);
    let agreed = Some(Ok(decision(Conn::Connected)));
    let (state, ..) = entered(step.conclude(agreed, &Rules::default()));
    assert_eq!(state, connected());
    let failure = HandshakeFailure::Unrelated;
    let got = step.conclude(Some(Err(failure)), &Rules::default());
    let state = State { disk: Disk::Failed, ..connected() };
    let attach_refused = Some(failure);
    let expected = Conclusion::Enter { state, establishes: false, answer: false, attach_refused };
    assert_eq!(got, expected);
    // The peer's attach.
    let old = State { pdsk: Disk::Diskless, ..connected() };
    let packet = State { disk: Disk::Negotiating, ..connected() };
    let theirs = report(old, packet);
    assert_eq!(theirs.peer_disk(), Disk::Consistent);
    let bad = UuidFlags { inconsistent: true, ..UuidFlags::default() };
    let worse = PeerReport { peer_flags: Some(bad), ..theirs };
    assert_eq!(worse.peer_disk(), Disk::Inconsistent);
    let step = pending(worse);
    let source = Some(Ok(decision(Conn::WFBitMapS)));
    let (state, _, answer) = entered(step.conclude(source, &Rules::default()));
    assert_eq!((state.conn, state.pdsk), (Conn::WFBitMapS, Disk::Inconsistent));
    assert!(!answer);
    let got = pending(theirs).conclude(Some(Err(failure)), &Rules::default());
    let expected =
        Conclusion::Enter { state: old, establishes: false, answer: false, attach_refused };
    assert_eq!(got, expected);
}

#[test]
fn a_peer_that_lost_frozen_writes_is_not_taken_back_in_silence() {
    let old = State { role: Role::Primary, susp_fen: true, ..reporting(Disk::UpToDate) };
    let packet = hello(Role::Secondary, Disk::Consistent);
    let frozen = PeerReport { new_uuid_pending: true, ..report(old, packet) };
    let agreed = Some(Ok(decision(Conn::Connected)));
    let got = pending(frozen).conclude(agreed, &Rules::default());
    assert_eq!(got, Conclusion::PeerRestarted);
    let nothing_owed = PeerReport { new_uuid_pending: false, ..frozen };
    entered(pending(nothing_owed).conclude(agreed, &Rules::default()));
    let source = Some(Ok(decision(Conn::WFBitMapS)));
    entered(pending(frozen).conclude(source, &Rules::default()));
}
