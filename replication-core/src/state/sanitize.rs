//! What follows from a wish: the state that is entered when a given state is wanted.
//!
//! Peers decide on the state they are told, so every implementation must draw the same
//! conclusions. Invariant ST-2: sanitising twice changes nothing more, hence every state that was
//! entered is a fixed point. Rules: protocol notes section 7.1.

use super::{Conn, Disk, Fencing, OnNoData, Role, Rules, State};

/// The state to enter instead of `new`, coming from `old`.
///
/// The order of the steps is that of the protocol notes with two exceptions, both needed for
/// the fixed point: the pause flag of a volume without anything is cleared after an ended attach
/// may have taken its disk, and the limits are applied once more after a resync went on.
#[must_use]
pub fn sanitize(new: State, old: &State, rules: &Rules) -> State {
    let mut state = new;
    forget_peer(&mut state);
    if state.conn > Conn::Connected && (state.disk <= Disk::Failed || state.pdsk <= Disk::Failed) {
        state.conn = Conn::Connected;
        state.disk = abandoned(state.disk);
        state.pdsk = abandoned(state.pdsk);
    }
    end_attach(&mut state, rules);
    if state.conn == Conn::StandAlone
        && state.disk == Disk::Diskless
        && state.role == Role::Secondary
    {
        state.aftr_isp = false;
    }
    if (Conn::Connected..Conn::Ahead).contains(&state.conn) {
        state.disk = settled(state.disk);
        state.pdsk = settled(state.pdsk);
    }
    limit_disks(&mut state);
    suspend_io(&mut state, old, rules);
    state.conn = paused_or_not(&state);
    limit_disks(&mut state);
    state
}

/// Without a connection nothing is known of the peer but that its data is bad.
fn forget_peer(state: &mut State) {
    if state.conn >= Conn::Connected {
        return;
    }
    state.peer_isp = false;
    state.peer = Role::Unknown;
    state.pdsk = match state.pdsk {
        Disk::Inconsistent | Disk::Outdated | Disk::DUnknown => state.pdsk,
        Disk::Diskless
        | Disk::Attaching
        | Disk::Failed
        | Disk::Negotiating
        | Disk::Consistent
        | Disk::UpToDate => Disk::DUnknown,
    };
}

/// A connection lost while the attach waits for the handshake: what the metadata says counts,
/// unless it would exchange the data under a running volume.
fn end_attach(state: &mut State, rules: &Rules) {
    if state.conn >= Conn::Connected || state.disk != Disk::Negotiating {
        return;
    }
    (state.disk, state.pdsk) = rules.negotiating.unwrap_or((Disk::Diskless, Disk::DUnknown));
}

/// A resync that lost its source does not make an old copy good. Ours, and stricter than the
/// in-kernel driver, which takes the old copy for good from then on (DUR-5).
const fn abandoned(disk: Disk) -> Disk {
    match disk {
        Disk::Consistent | Disk::Outdated => Disk::Inconsistent,
        Disk::Diskless
        | Disk::Attaching
        | Disk::Failed
        | Disk::Negotiating
        | Disk::Inconsistent
        | Disk::DUnknown
        | Disk::UpToDate => disk,
    }
}

/// While connected there is no doubt about the age of data.
const fn settled(disk: Disk) -> Disk {
    match disk {
        Disk::Consistent | Disk::Outdated => Disk::UpToDate,
        Disk::Diskless
        | Disk::Attaching
        | Disk::Failed
        | Disk::Negotiating
        | Disk::Inconsistent
        | Disk::DUnknown
        | Disk::UpToDate => disk,
    }
}

/// Least and greatest state of our disk and of the peer's disk in a connection state.
const fn limits(conn: Conn) -> ((Disk, Disk), (Disk, Disk)) {
    const BAD: (Disk, Disk) = (Disk::Inconsistent, Disk::Inconsistent);
    const GOOD: (Disk, Disk) = (Disk::UpToDate, Disk::UpToDate);
    const OLD: (Disk, Disk) = (Disk::Inconsistent, Disk::Outdated);
    const NOT_GOOD: (Disk, Disk) = (Disk::Inconsistent, Disk::Consistent);
    const ANY: (Disk, Disk) = (Disk::Diskless, Disk::UpToDate);
    const LOST: (Disk, Disk) = (Disk::Inconsistent, Disk::DUnknown);
    match conn {
        Conn::WFBitMapT
        | Conn::PausedSyncT
        | Conn::StartingSyncT
        | Conn::WFSyncUUID
        | Conn::Behind => (OLD, GOOD),
        Conn::SyncTarget => (BAD, GOOD),
        Conn::WFBitMapS | Conn::PausedSyncS | Conn::StartingSyncS | Conn::Ahead => (GOOD, NOT_GOOD),
        Conn::SyncSource => (GOOD, BAD),
        Conn::VerifyS | Conn::VerifyT => (GOOD, GOOD),
        Conn::Connected => (ANY, ANY),
        Conn::StandAlone
        | Conn::Disconnecting
        | Conn::Unconnected
        | Conn::Timeout
        | Conn::BrokenPipe
        | Conn::NetworkFailure
        | Conn::ProtocolError
        | Conn::TearDown
        | Conn::WFConnection
        | Conn::WFReportParams => (ANY, LOST),
    }
}

fn limit_disks(state: &mut State) {
    let (disk, pdsk) = limits(state.conn);
    state.disk = state.disk.clamp(disk.0, disk.1);
    state.pdsk = state.pdsk.clamp(pdsk.0, pdsk.1);
}

/// A Primary that lost a peer of which it does not know that its data is old.
fn has_lost_peer(state: &State) -> bool {
    state.role == Role::Primary && state.conn < Conn::Connected && state.pdsk > Disk::Outdated
}

/// A Primary that reaches no good data, here or there.
pub(crate) fn has_no_data(state: &State) -> bool {
    state.role == Role::Primary && state.disk < Disk::UpToDate && state.pdsk < Disk::UpToDate
}

/// I/O freezes on the way into such a situation, not while being in it: otherwise the operator
/// could not resume it there.
fn suspend_io(state: &mut State, old: &State, rules: &Rules) {
    if rules.fencing == Fencing::ResourceAndStonith && has_lost_peer(state) && !has_lost_peer(old) {
        state.susp_fen = true;
    }
    if rules.on_no_data == OnNoData::SuspendIo && has_no_data(state) && !has_no_data(old) {
        state.susp_nod = true;
    }
}

fn paused_or_not(state: &State) -> Conn {
    match (state.conn, state.is_resync_paused()) {
        (Conn::SyncSource, true) => Conn::PausedSyncS,
        (Conn::SyncTarget, true) => Conn::PausedSyncT,
        (Conn::PausedSyncS, false) => Conn::SyncSource,
        (Conn::PausedSyncT, false) => Conn::SyncTarget,
        (conn, _) => conn,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    /// Short names for the table: one character a disk state.
    fn letter(disk: Disk) -> char {
        match disk {
            Disk::Diskless => 'D',
            Disk::Attaching => 'A',
            Disk::Failed => 'F',
            Disk::Negotiating => 'N',
            Disk::Inconsistent => 'I',
            Disk::Outdated => 'O',
            Disk::DUnknown => '?',
            Disk::Consistent => 'C',
            Disk::UpToDate => 'U',
        }
    }

    fn peer_of(conn: Conn) -> Role {
        if conn < Conn::Connected { Role::Unknown } else { Role::Secondary }
    }

    /// One block per connection state: rows are our disk, columns the peer's disk, and each cell
    /// shows both after sanitising. A cell that left the connection state names the new one.
    fn table() -> String {
        let mut text = String::from("rows: disk, columns: pdsk, cells: disk pdsk after\n");
        for conn in Conn::ALL.iter().copied() {
            write!(text, "\n{conn}\n  ").unwrap();
            for pdsk in Disk::ALL {
                write!(text, " {:<6}", letter(*pdsk)).unwrap();
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
            for disk in Disk::ALL.iter().copied() {
                write!(text, "{} ", letter(disk)).unwrap();
                for pdsk in Disk::ALL.iter().copied() {
                    let user_isp = matches!(conn, Conn::PausedSyncS | Conn::PausedSyncT);
                    let peer = peer_of(conn);
                    let new = State { conn, disk, pdsk, peer, user_isp, ..State::initial() };
                    let got = sanitize(new, &new, &Rules::default());
                    let left = if got.conn == conn { "" } else { "=Con" };
                    let cell = format!("{}{}{left}", letter(got.disk), letter(got.pdsk));
                    assert!(left.is_empty() || got.conn == Conn::Connected);
                    write!(text, " {cell:<6}").unwrap();
                }
                text.truncate(text.trim_end().len());
                text.push('\n');
            }
        }
        text
    }

    #[test]
    fn the_complete_table_of_connection_and_disk_states() {
        insta::assert_snapshot!("sanitize_conn_disk_pdsk", table());
    }

    fn all_states() -> impl Iterator<Item = State> {
        (0u32..1 << 23).filter_map(|word| State::from_word(word).ok())
    }

    #[test]
    fn every_result_is_a_fixed_point() {
        let plain = Rules::default();
        let strict = Rules {
            fencing: Fencing::ResourceAndStonith,
            on_no_data: OnNoData::SuspendIo,
            negotiating: Some((Disk::Consistent, Disk::UpToDate)),
            ..plain
        };
        let calm = State { role: Role::Secondary, ..State::initial() };
        let mut count = 0u32;
        for state in all_states() {
            for rules in [&plain, &strict] {
                let once = sanitize(state, &calm, rules);
                assert_eq!(sanitize(once, &calm, rules), once, "{state}");
                assert_eq!(sanitize(once, &once, rules), once, "{state}");
            }
            count += 1;
        }
        assert_eq!(count, 3 * 3 * 24 * 9 * 9 * 64);
    }

    #[test]
    fn the_sides_of_a_resync_get_the_disks_their_peer_expects() {
        let good = State {
            peer: Role::Secondary,
            conn: Conn::WFReportParams,
            disk: Disk::UpToDate,
            pdsk: Disk::UpToDate,
            ..State::initial()
        };
        let target = State { conn: Conn::WFBitMapT, ..good };
        let target = sanitize(target, &good, &Rules::default());
        assert_eq!((target.disk, target.pdsk), (Disk::Outdated, Disk::UpToDate));
        let source = State { conn: Conn::WFBitMapS, ..good };
        let source = sanitize(source, &good, &Rules::default());
        assert_eq!((source.disk, source.pdsk), (Disk::UpToDate, Disk::Consistent));
    }

    #[test]
    fn a_lost_connection_forgets_the_peer_but_not_that_it_is_bad() {
        let old = State {
            peer: Role::Primary,
            conn: Conn::Connected,
            disk: Disk::UpToDate,
            pdsk: Disk::UpToDate,
            peer_isp: true,
            ..State::initial()
        };
        for (before, after) in [
            (Disk::UpToDate, Disk::DUnknown),
            (Disk::Diskless, Disk::DUnknown),
            (Disk::Outdated, Disk::Outdated),
            (Disk::Inconsistent, Disk::Inconsistent),
        ] {
            let new = State { conn: Conn::NetworkFailure, pdsk: before, ..old };
            let got = sanitize(new, &old, &Rules::default());
            assert_eq!((got.pdsk, got.peer, got.peer_isp), (after, Role::Unknown, false));
        }
    }

    #[test]
    fn an_attach_without_a_connection_ends_with_what_the_metadata_said() {
        let old = State { conn: Conn::Connected, disk: Disk::Negotiating, ..State::initial() };
        let new = State { conn: Conn::BrokenPipe, ..old };
        let known =
            Rules { negotiating: Some((Disk::Consistent, Disk::Outdated)), ..Rules::default() };
        let got = sanitize(new, &old, &known);
        assert_eq!((got.disk, got.pdsk), (Disk::Consistent, Disk::Outdated));
        let got = sanitize(new, &old, &Rules::default());
        assert_eq!((got.disk, got.pdsk), (Disk::Diskless, Disk::DUnknown));
        let alone = State { conn: Conn::StandAlone, aftr_isp: true, ..old };
        assert!(!sanitize(alone, &old, &Rules::default()).aftr_isp);
        assert!(sanitize(alone, &old, &known).aftr_isp);
    }

    #[test]
    fn io_freezes_on_the_way_into_trouble_and_may_be_resumed_there() {
        let good = State {
            role: Role::Primary,
            peer: Role::Secondary,
            conn: Conn::Connected,
            disk: Disk::UpToDate,
            pdsk: Disk::UpToDate,
            ..State::initial()
        };
        let stonith = Rules { fencing: Fencing::ResourceAndStonith, ..Rules::default() };
        let lost = State { conn: Conn::Timeout, ..good };
        let frozen = sanitize(lost, &good, &stonith);
        assert!(frozen.susp_fen);
        assert!(!sanitize(lost, &good, &Rules::default()).susp_fen);
        let only = Rules { fencing: Fencing::ResourceOnly, ..Rules::default() };
        assert!(!sanitize(lost, &good, &only).susp_fen);
        let secondary = State { role: Role::Secondary, ..lost };
        assert!(!sanitize(secondary, &good, &stonith).susp_fen);
        let outdated = State { pdsk: Disk::Outdated, ..lost };
        assert!(!sanitize(outdated, &good, &stonith).susp_fen);
        let resumed = State { susp_fen: false, ..frozen };
        assert!(!sanitize(resumed, &frozen, &stonith).susp_fen);

        let freeze = Rules { on_no_data: OnNoData::SuspendIo, ..Rules::default() };
        let empty = State { disk: Disk::Failed, ..lost };
        let frozen = sanitize(empty, &good, &freeze);
        assert!(frozen.susp_nod);
        assert!(!sanitize(empty, &good, &Rules::default()).susp_nod);
        let resumed = State { susp_nod: false, ..frozen };
        assert!(!sanitize(resumed, &frozen, &freeze).susp_nod);
    }

    #[test]
    fn pauses_stop_a_resync_and_their_end_continues_it() {
        let running = State {
            peer: Role::Primary,
            conn: Conn::SyncTarget,
            disk: Disk::Inconsistent,
            pdsk: Disk::UpToDate,
            ..State::initial()
        };
        for paused in [
            State { aftr_isp: true, ..running },
            State { peer_isp: true, ..running },
            State { user_isp: true, ..running },
        ] {
            let got = sanitize(paused, &running, &Rules::default());
            assert_eq!(got, State { conn: Conn::PausedSyncT, ..paused });
            let on = State { aftr_isp: false, peer_isp: false, user_isp: false, ..got };
            assert_eq!(sanitize(on, &got, &Rules::default()), running);
        }
        let source = State { conn: Conn::SyncSource, user_isp: true, ..running };
        let got = sanitize(source, &running, &Rules::default());
        assert_eq!(got.conn, Conn::PausedSyncS);
    }
}
