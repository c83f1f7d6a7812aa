use super::*;

fn connected() -> State {
    State {
        peer: Role::Secondary,
        conn: Conn::Connected,
        disk: Disk::UpToDate,
        pdsk: Disk::UpToDate,
        ..State::initial()
    }
}

fn primary() -> State {
    State { role: Role::Primary, ..connected() }
}

fn verifying() -> Rules {
    Rules { has_verify_alg: true, ..Rules::default() }
}

#[test]
fn every_rule_about_roles_finds_its_violation() {
    let plain = Rules::default();
    let both = Rules { two_primaries: true, ..plain };
    let fenced = Rules { fencing: Fencing::ResourceOnly, ..plain };
    let open = Rules { device_open: true, ..plain };
    let elsewhere = Rules { peer_primary_elsewhere: true, ..plain };
    let alone = State { conn: Conn::StandAlone, pdsk: Disk::DUnknown, ..primary() };
    let two = State { peer: Role::Primary, ..primary() };
    let cases = [
        (two, plain, Err(Refused::TwoPrimaries)),
        (two, both, Ok(())),
        (primary(), elsewhere, Err(Refused::OtherVolumePrimary)),
        (primary(), Rules { two_primaries: true, ..elsewhere }, Ok(())),
        (connected(), elsewhere, Ok(())),
        (connected(), open, Err(Refused::DeviceInUse)),
        (primary(), open, Ok(())),
        (alone, plain, Ok(())),
        (State { disk: Disk::Consistent, ..alone }, plain, Err(Refused::NoUpToDateDisk)),
        (alone, fenced, Err(Refused::PeerNotOutdated)),
        (State { pdsk: Disk::Outdated, ..alone }, fenced, Ok(())),
    ];
    for (state, rules, expected) in cases {
        assert_eq!(validate_state(&state, &rules), expected, "{state}");
    }
}

#[test]
fn every_rule_about_disks_and_connections_finds_its_violation() {
    let plain = Rules::default();
    let old_peer = Rules { agreed_version: 87, ..verifying() };
    let cases = [
        (
            State { disk: Disk::Inconsistent, pdsk: Disk::Inconsistent, ..primary() },
            plain,
            Err(Refused::NoUpToDateDisk),
        ),
        (State { disk: Disk::Diskless, ..primary() }, plain, Ok(())),
        (
            State { conn: Conn::WFBitMapS, disk: Disk::Failed, ..connected() },
            plain,
            Err(Refused::NoLocalDisk),
        ),
        (
            State { conn: Conn::WFBitMapS, pdsk: Disk::Failed, ..connected() },
            plain,
            Err(Refused::NoRemoteDisk),
        ),
        (
            State {
                conn: Conn::SyncSource,
                disk: Disk::Consistent,
                pdsk: Disk::Inconsistent,
                ..connected()
            },
            plain,
            Err(Refused::NoUpToDateDisk),
        ),
        (
            State { disk: Disk::Outdated, ..connected() },
            plain,
            Err(Refused::OutdatedWhileConnected),
        ),
        (State { conn: Conn::VerifyS, ..connected() }, plain, Err(Refused::NoVerifyAlg)),
        (State { conn: Conn::VerifyT, ..connected() }, old_peer, Err(Refused::NotSupported)),
        (State { conn: Conn::VerifyS, ..connected() }, verifying(), Ok(())),
        (
            State { disk: Disk::Consistent, pdsk: Disk::Outdated, ..primary() },
            plain,
            Err(Refused::NoUpToDateDisk),
        ),
        (
            State { conn: Conn::StartingSyncS, pdsk: Disk::DUnknown, ..connected() },
            plain,
            Err(Refused::NeedConnection),
        ),
        (
            State { pdsk: Disk::DUnknown, ..connected() },
            plain,
            Err(Refused::OutdatedWhileConnected),
        ),
        (State::initial(), plain, Ok(())),
    ];
    for (state, rules, expected) in cases {
        assert_eq!(validate_state(&state, &rules), expected, "{state}");
    }
}

#[test]
fn every_rule_about_transitions_finds_its_violation() {
    let plain = Rules::default();
    let busy = Rules { handshaking: true, ..verifying() };
    let up = connected();
    let conn = |conn| State { conn, ..connected() };
    let down = |conn| State { conn, pdsk: Disk::Outdated, peer: Role::Unknown, ..connected() };
    let empty = State { disk: Disk::Diskless, ..down(Conn::WFConnection) };
    let inconsistent = State { disk: Disk::Inconsistent, ..up };
    let params = conn(Conn::WFReportParams);
    let report = down(Conn::WFReportParams);
    let cases = [
        (conn(Conn::SyncSource), conn(Conn::StartingSyncS), plain, Err(Refused::ResyncRunning)),
        (up, conn(Conn::StartingSyncT), plain, Ok(())),
        (down(Conn::StandAlone), down(Conn::Disconnecting), plain, Err(Refused::AlreadyStandAlone)),
        (empty, State { disk: Disk::UpToDate, ..empty }, plain, Err(Refused::Diskless)),
        (empty, State { disk: Disk::Attaching, ..empty }, plain, Ok(())),
        (down(Conn::Disconnecting), down(Conn::WFConnection), plain, Err(Refused::NoNetConfig)),
        (
            State { disk: Disk::Inconsistent, ..down(Conn::WFConnection) },
            State { disk: Disk::Outdated, ..down(Conn::WFConnection) },
            plain,
            Err(Refused::LowerThanOutdated),
        ),
        (
            State { disk: Disk::Attaching, ..down(Conn::WFConnection) },
            State { disk: Disk::Outdated, ..down(Conn::WFConnection) },
            plain,
            Ok(()),
        ),
        (down(Conn::Unconnected), down(Conn::Disconnecting), plain, Err(Refused::TransientState)),
        (up, State { user_isp: true, ..up }, busy, Err(Refused::TransientState)),
        (params, up, busy, Ok(())),
        (down(Conn::WFConnection), report, busy, Ok(())),
        (report, State { role: Role::Primary, ..report }, busy, Err(Refused::TransientState)),
        (
            inconsistent,
            State { role: Role::Primary, ..inconsistent },
            plain,
            Err(Refused::TransientState),
        ),
        (
            State { conn: Conn::SyncTarget, ..inconsistent },
            State { conn: Conn::SyncTarget, role: Role::Primary, ..inconsistent },
            plain,
            Ok(()),
        ),
        (params, conn(Conn::VerifyS), verifying(), Err(Refused::NeedConnection)),
        (conn(Conn::VerifyT), conn(Conn::VerifyS), verifying(), Err(Refused::ResyncRunning)),
        (conn(Conn::VerifyS), State { user_isp: true, ..conn(Conn::VerifyS) }, verifying(), Ok(())),
        (params, conn(Conn::StartingSyncS), plain, Err(Refused::NeedConnection)),
        (
            down(Conn::WFConnection),
            State { pdsk: Disk::Inconsistent, ..conn(Conn::SyncSource) },
            plain,
            Err(Refused::NeedConnection),
        ),
        (
            State { pdsk: Disk::DUnknown, ..down(Conn::WFConnection) },
            down(Conn::Disconnecting),
            plain,
            Err(Refused::OutdateNeedsConnection),
        ),
        (up, down(Conn::Disconnecting), plain, Ok(())),
    ];
    for (old, new, rules, expected) in cases {
        assert_eq!(validate_change(&old, &new, &rules), expected, "{old} -> {new}");
    }
}

#[test]
fn of_several_transition_rules_the_last_one_speaks() {
    // Both "already StandAlone" and "handshake in progress" match.
    let old = State { conn: Conn::StandAlone, pdsk: Disk::DUnknown, ..State::initial() };
    let new = State { conn: Conn::Disconnecting, ..old };
    let rules = Rules { handshaking: true, ..Rules::default() };
    assert_eq!(validate_change(&old, &new, &rules), Err(Refused::TransientState));
}

#[test]
fn a_violation_that_was_there_before_is_tolerated() {
    let bad = State { disk: Disk::Inconsistent, pdsk: Disk::Diskless, ..primary() };
    let worse = State { user_isp: true, ..bad };
    assert_eq!(validate_state(&worse, &Rules::default()), Err(Refused::NoUpToDateDisk));
    assert_eq!(validate_change(&bad, &worse, &Rules::default()), Ok(()));
    let good = connected();
    let refused = validate_change(&good, &worse, &Rules::default());
    assert_eq!(refused, Err(Refused::NoUpToDateDisk));
    let other = State { peer: Role::Primary, ..worse };
    let refused = validate_change(&bad, &other, &Rules::default());
    assert_eq!(refused, Err(Refused::TwoPrimaries));
}

#[test]
fn promotion_needs_good_data_within_reach() {
    // ST-5: every promotion of a Secondary, over all disk states, connected and not.
    let rules = Rules::default();
    for conn in [Conn::StandAlone, Conn::WFConnection, Conn::Connected] {
        for disk in Disk::ALL.iter().copied() {
            for pdsk in Disk::ALL.iter().copied() {
                let old = State { conn, disk, pdsk, ..State::initial() };
                let old = super::super::sanitize(old, &old, &rules);
                let new = State { role: Role::Primary, ..old };
                if validate_change(&old, &new, &rules).is_ok() {
                    let here = new.disk == Disk::UpToDate;
                    let there = conn == Conn::Connected && new.pdsk == Disk::UpToDate;
                    assert!(here || there, "promoted in {new}");
                }
            }
        }
    }
}

#[test]
fn hard_limits_hold_for_every_pair_of_connection_states() {
    let mut text = String::from("rows: from, columns: to; . allowed, else the code\n");
    text.push_str(&format!("{:<17}", ""));
    for to in 0..Conn::ALL.len() {
        text.push_str(&format!("{to:>4}"));
    }
    text.push('\n');
    for from in Conn::ALL.iter().copied() {
        text.push_str(&format!("{:<2} {from:<14}", from.number()));
        for to in Conn::ALL.iter().copied() {
            let old = State { conn: from, ..connected() };
            let cell = match hard_limits(&old, &State { conn: to, ..old }) {
                Ok(()) => String::from("."),
                Err(refused) => refused.code().to_string(),
            };
            text.push_str(&format!("{cell:>4}"));
        }
        text.push('\n');
    }
    insta::assert_snapshot!("hard_limits", text);
    let empty = State { disk: Disk::Diskless, ..connected() };
    let failed = State { disk: Disk::Failed, conn: Conn::StandAlone, ..empty };
    assert_eq!(hard_limits(&empty, &failed), Err(Refused::Diskless));
    assert_eq!(hard_limits(&connected(), &failed), Ok(()));
}

#[test]
fn every_reason_has_a_code_a_text_and_a_way_out() {
    let mut text = String::new();
    for refused in Refused::ALL {
        assert_eq!(Refused::from_code(refused.code()), Some(refused));
        let (code, exit) = (refused.code(), refused.exit_code());
        text.push_str(&format!("({code}) {refused} [exit {exit}] {}\n", refused.advice()));
    }
    insta::assert_snapshot!("refused", text);
    for code in [-22, -3, 0, 1, 2, i32::MIN] {
        assert_eq!(Refused::from_code(code), None);
    }
}
