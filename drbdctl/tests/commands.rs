//! The built program against an engine that answers as it is told: what is sent, what is printed,
//! which exit code comes back.

mod common;

use common::{Bed, refusal, state, status_reply};
use replication_core::control::{Command, Reply, SCHEMA};
use replication_core::units::{Sector, VolumeNr};

/// Each verb sends its command; the historic orders of words send the same.
#[test]
fn verbs_send_their_commands() {
    let nr = VolumeNr(0);
    let primary = Command::Primary { force: true };
    let connect = Command::Connect { discard_my_data: true };
    let table = [
        ("primary r0", Command::Primary { force: false }),
        ("primary --force r0", primary.clone()),
        ("primary --overwrite-data-of-peer r0", primary.clone()),
        ("-- --overwrite-data-of-peer primary all", primary),
        ("secondary r0", Command::Secondary { holder: None }),
        ("attach r0", Command::Attach(None)),
        ("attach r0/0", Command::Attach(Some(nr))),
        ("detach --force r0/0", Command::Detach { volume: Some(nr), force: true }),
        ("connect r0", Command::Connect { discard_my_data: false }),
        ("connect -- --discard-my-data r0", connect.clone()),
        ("connect --discard-my-data r0:bob", connect),
        ("disconnect --force r0", Command::Disconnect { force: true }),
        ("invalidate r0", Command::Invalidate(None)),
        ("invalidate-remote r0/0", Command::InvalidateRemote(Some(nr))),
        ("outdate r0", Command::Outdate),
        ("pause-sync r0", Command::PauseSync(true)),
        ("resume-sync r0", Command::PauseSync(false)),
        (
            "new-current-uuid --clear-bitmap r0/0",
            Command::NewCurrentUuid { volume: Some(nr), clear_bitmap: true },
        ),
        (
            "-- --assume-clean --size=1M resize r0",
            Command::Resize {
                volume: None,
                size: Some(Sector(2048)),
                assume_clean: true,
                assume_peer_has_space: false,
            },
        ),
    ];
    let bed = Bed::new("");
    let commands = bed.engine(|_| Ok(Reply::Done));
    for (line, command) in table {
        assert_eq!(bed.run(line).works(), "", "{line}");
        assert_eq!(commands.recv().unwrap(), command, "{line}");
    }
}

/// A refusal is told with its number, its text and what to do, and gives its exit code.
#[test]
fn refusals() {
    let table = [
        (
            refusal(-2, 17, "Need access to UpToDate data", "connect the peer first"),
            17,
            "r0: State change failed: (-2) Need access to UpToDate data\n  \
             what to do: connect the peer first\n",
        ),
        (
            refusal(-12, 11, "Device is held open by someone", ""),
            11,
            "r0: State change failed: (-12) Device is held open by someone\n",
        ),
        (refusal(-11, 16, "no disk", ""), 16, "r0: State change failed: (-11) no disk\n"),
        (refusal(119, 10, "No valid", ""), 10, "r0: Failure: (119) No valid\n"),
    ];
    for (refusal, exit, text) in table {
        let bed = Bed::new("");
        let _commands = bed.engine(move |_| Err(refusal.clone()));
        let ran = bed.run("primary r0");
        assert_eq!((ran.exit, ran.err.as_str()), (exit, text));
    }
}

/// Without an engine some verbs have nothing to do and others cannot be carried out; a socket
/// that a dead engine left behind makes no difference, one that lives and is mute does.
#[test]
fn no_engine() {
    let bed = Bed::new("");
    let look = |bed: &Bed| {
        for verb in ["down", "secondary", "disconnect", "detach"] {
            assert_eq!(bed.run(&format!("{verb} r0")).works(), "", "{verb}");
        }
        let hint = "r0: not running; start it with: drbdctl up r0\n";
        for verb in ["primary", "attach", "connect", "invalidate", "role", "cstate", "wait-sync"] {
            bed.run(&format!("{verb} r0")).fails(20, hint);
        }
        for verb in ["down", "secondary", "primary", "up", "adjust", "dstate", "sh-dev"] {
            bed.run(&format!("{verb} r9")).fails(1, "'r9' not defined in your config");
        }
    };
    look(&bed);
    std::fs::create_dir_all(bed.path("run/alice")).unwrap();
    let stale = || std::os::unix::net::UnixListener::bind(bed.run_file("r0.sock")).unwrap();
    drop(stale());
    bed.run("status").fails(20, "r0: its engine has died");
    look(&bed);
    // The first verb of the list was `down`, which clears away what a dead engine left.
    assert!(!bed.run_file("r0.sock").exists());
    std::fs::write(bed.run_file("r0.lock"), format!("{}\n", std::process::id())).unwrap();
    let own = std::fs::File::open(bed.run_file("r0.lock")).unwrap();
    let arg = nix::fcntl::FlockArg::LockExclusive;
    let held = nix::fcntl::Flock::lock(own, arg).unwrap();
    for verb in ["down", "secondary", "primary", "up", "create-md"] {
        let ran = bed.run(&format!("{verb} r0"));
        assert_eq!(ran.exit, 20, "{ran:?}");
    }
    // Nobody is killed who is not known for sure.
    std::fs::write(bed.run_file("r0.lock"), "").unwrap();
    bed.run("down --force r0").fails(20, "killed nobody");
    drop(held);
    assert_eq!(bed.run("secondary r0").works(), "");
}

/// Several objects: each is tried, the worst exit code is returned.
#[test]
fn several_objects() {
    let bed = Bed::new("");
    let commands = bed.engine(|_| Err(refusal(-2, 17, "Need access to UpToDate data", "")));
    let ran = bed.run("primary r9 r0 r8");
    assert_eq!(ran.exit, 17);
    for part in ["'r9' not defined", "r0: State change failed", "'r8' not defined"] {
        assert!(ran.err.contains(part), "{part} in {}", ran.err);
    }
    assert_eq!(commands.recv().unwrap(), Command::Primary { force: false });
    assert_eq!(commands.try_iter().next(), None);
}

/// Objects that mean nothing to a verb.
#[test]
fn wrong_objects() {
    let bed = Bed::new("");
    let _commands = bed.engine(|_| status_reply(state("Connected", "UpToDate", "UpToDate")));
    bed.run("primary r0/0")
        .fails(1, "primary operates on whole resources, but you specified a specific volume!");
    bed.run("cstate r0/7").fails(1, "r0/7: r0 has no such volume");
    bed.run("sh-dev r0/7").fails(1, "r0/7: r0 has no such volume");
    bed.run("connect r0:carol").fails(1, "r0 has no peer of that name");
    bed.run("up ../r0").fails(1, "is not RES");
    bed.run("frobnicate r0").fails(1, "drbdctl: Unknown command 'frobnicate'");
    bed.run("up").fails(1, "required");
    bed.run("up --what r0").fails(2, "--what");
    bed.run("").fails(1, "which verb?");
    bed.run("resize --size 7 r0").fails(1, "multiple of 4 KiB");
}

/// The single values, in the form of 8.4.
#[test]
fn single_values() {
    let bed = Bed::new("");
    let _commands = bed.engine(|_| {
        let mut status = state("Connected", "Inconsistent", "UpToDate");
        status.volumes[0].cstate = "SyncTarget".to_owned();
        let mut second = status.volumes[0].clone();
        second.nr = 1;
        second.cstate = "Connected".to_owned();
        second.disk = "UpToDate".to_owned();
        status.volumes.push(second);
        status_reply(status)
    });
    assert_eq!(bed.run("role r0").works(), "Secondary/Primary\nSecondary/Primary\n");
    assert_eq!(bed.run("state r0/1").works(), "Secondary/Primary\n");
    assert_eq!(bed.run("peer-role r0").works(), "Primary\nPrimary\n");
    assert_eq!(bed.run("cstate r0").works(), "SyncTarget\nConnected\n");
    assert_eq!(bed.run("cstate r0/1").works(), "Connected\n");
    assert_eq!(bed.run("dstate all").works(), "Inconsistent/UpToDate\nUpToDate/UpToDate\n");
}

/// The status: of all, of one, of none; node ids follow the order of the host sections.
#[test]
fn status() {
    let bed = Bed::new("");
    assert_eq!(bed.run("status").works(), "# No currently configured DRBD found.\n");
    assert_eq!(bed.run("status --json").works(), "[\n]\n");
    bed.run("status r0").fails(10, "r0: No such resource");
    bed.run("status r9").fails(10, "r9: No such resource");
    let _commands = bed.engine(|_| {
        let mut status = state("StandAlone", "UpToDate", "DUnknown");
        status.split_brain = true;
        status_reply(status)
    });
    let ran = bed.run("status");
    let text = "r0 role:Secondary\n  disk:UpToDate open:no\n  bob connection:StandAlone\n\n";
    assert_eq!((ran.exit, ran.out.as_str()), (0, text));
    assert!(ran.err.contains("drbdctl connect --discard-my-data r0"), "{}", ran.err);
    let ran = bed.run("status r0 --verbose --color=always");
    assert!(ran.out.starts_with("r0 node-id:0 role:Secondary suspended:no"), "{}", ran.out);
    assert!(ran.out.contains("\n  bob node-id:1 connection:\x1b[1;31mStandAlone\x1b[0m"));
    let json = bed.run("status --json r0");
    assert!(json.works().contains("\"connection-state\": \"StandAlone\""));
}

/// A wait ends when the peer is there and the resync is over, tells each change, and gives up
/// at its limit or when nothing will come.
#[test]
fn waits() {
    let bed = Bed::new("startup { wfc-timeout 1; }");
    let mut asked = 0;
    let _commands = bed.engine(move |_| {
        asked += 1;
        let mut status = state("Connected", "Inconsistent", "UpToDate");
        match asked {
            1 => status = state("Connecting", "Inconsistent", "DUnknown"),
            2 => {
                status.volumes[0].replication = "SyncTarget".to_owned();
                status.volumes[0].cstate = "SyncTarget".to_owned();
            }
            3.. => status.volumes[0].disk = "UpToDate".to_owned(),
            _ => unreachable!("it counts from one"),
        }
        status_reply(status)
    });
    let out = "r0: Connecting\nr0: SyncTarget\nr0: Connected\n";
    assert_eq!(bed.run("wait-sync -t 60 r0").works(), out);
    assert_eq!(bed.run("wait-connect r0").works(), "r0: Connected\n");

    let bed = Bed::new("startup { wfc-timeout 1; }");
    let _commands = bed.engine(|_| status_reply(state("Connecting", "UpToDate", "DUnknown")));
    bed.run("wait-connect r0").fails(5, "r0: not there after 1 s: Connecting");
    bed.run("wait-sync --wfc-timeout=1 r0").fails(5, "r0: not there after 1 s");

    // A node that was alone before it went down has a limit of its own, and says so.
    let bed = Bed::new("startup { degr-wfc-timeout 1; outdated-wfc-timeout 2; }");
    let _commands = bed.engine(|_| {
        let mut status = state("Connecting", "UpToDate", "DUnknown");
        status.volumes[0].was_degraded = true;
        status_reply(status)
    });
    let ran = bed.run("wait-connect r0");
    ran.fails(5, "r0: not there after 1 s: Connecting (degr-wfc-timeout: this node was Primary");
    assert!(ran.out.contains("r0: waiting up to 1 s (degr-wfc-timeout"), "{}", ran.out);
    bed.run("wait-connect --degr-wfc-timeout 2 r0").fails(5, "r0: not there after 2 s");

    // No node's data count yet: nothing is in sync, and it is said what is missing.
    let bed = Bed::new("");
    let _commands =
        bed.engine(|_| status_reply(state("Connected", "Inconsistent", "Inconsistent")));
    assert_eq!(bed.run("wait-connect r0").works(), "r0: Connected\n");
    let ran = bed.run("wait-sync -t 1 r0");
    ran.fails(5, "r0: not there after 1 s: Connected");
    assert!(ran.out.contains("drbdctl primary --force r0"), "{}", ran.out);

    let bed = Bed::new("");
    let _commands = bed.engine(|_| status_reply(state("StandAlone", "UpToDate", "DUnknown")));
    bed.run("wait-connect r0").fails(5, "r0: StandAlone");
    bed.run("wait-connect --wait-after-sb -t 1 r0").fails(5, "after 1 s");
}

/// `adjust` brings back what the configuration asks for and the state lacks; a split brain it
/// leaves to the operator.
#[test]
fn adjust_brings_back() {
    for is_split in [false, true] {
        let bed = Bed::new("");
        let commands = bed.engine(move |command| match command {
            Command::Status => {
                let mut status = state("StandAlone", "Diskless", "DUnknown");
                status.split_brain = is_split;
                status_reply(status)
            }
            _ => Ok(Reply::Done),
        });
        for is_changed in [true, false] {
            assert_eq!(bed.run("adjust r0").works(), "");
            assert_eq!(commands.recv().unwrap(), Command::Status);
            if is_changed {
                assert!(matches!(commands.recv().unwrap(), Command::Adjust(_)));
            }
            assert_eq!(commands.recv().unwrap(), Command::Attach(Some(VolumeNr(0))));
            if !is_split {
                let connect = Command::Connect { discard_my_data: false };
                assert_eq!(commands.recv().unwrap(), connect);
            }
            assert_eq!(commands.try_iter().next(), None);
        }
    }
    // Options that the engine refuses are not written down as taken over.
    let bed = Bed::new("");
    let _commands = bed.engine(|command| match command {
        Command::Status => status_reply(state("Connected", "UpToDate", "UpToDate")),
        _ => Err(refusal(0, 10, "an address cannot change", "")),
    });
    for _ in 0..2 {
        bed.run("adjust r0").fails(10, "r0: an address cannot change");
    }
    assert!(!bed.run_file("r0.json").exists());
}

/// A dry run says what would be sent and sends nothing.
#[test]
fn dry_run() {
    let bed = Bed::new("net { cram-hmac-alg sha1; shared-secret verysecret; }");
    let commands = bed.engine(|_| Ok(Reply::Done));
    assert_eq!(
        bed.run("-d primary --force r0").works(),
        "r0: would send Primary { force: true }\n"
    );
    let out = bed.run("down r0 -d");
    assert_eq!(out.works(), "r0: would send Down { holder: None, force: false }\n");
    let up = bed.run("-dv up r0");
    assert!(up.works().contains("r0: would start "), "{}", up.out);
    assert!(up.out.contains("secret not shown") && !up.out.contains("verysecret"), "{}", up.out);
    assert_eq!(commands.try_iter().next(), None);
    assert!(!bed.run_file("r0.json").exists());
}

/// What scripts read from the configuration, and what a broken one does.
#[test]
fn configuration() {
    let bed = Bed::new("");
    assert_eq!(bed.run("sh-nop").works(), "");
    assert_eq!(bed.run("sh-resources").works(), "r0\n");
    assert_eq!(bed.run("sh-dev r0").works(), "/dev/drbd5\n");
    assert_eq!(bed.run("sh-minor r0/0").works(), "5\n");
    assert_eq!(bed.run("sh-ll-dev all").works(), format!("{}\n", bed.path("disk").display()));
    assert_eq!(bed.run("sh-md-dev r0").works(), format!("{}\n", bed.path("disk").display()));
    assert_eq!(bed.run("sh-md-idx all").works(), "internal\n");
    assert_eq!(bed.run("sh-ip r0").works(), "127.0.0.1\n");
    assert_eq!(bed.run("sh-resource r0").works(), "r0\n");
    assert_eq!(bed.run("sh-mod-parms").works(), "minor_count=32\n");
    bed.run("verify r0").fails(10, "drbdctl: 'verify' is not built yet");
    bed.run("-- --start 8 verify r0").fails(10, "drbdctl: 'verify' is not built yet");
    bed.run("proxy-up r0").fails(10, "'proxy-up' is not supported: there is no proxy");
    let dump = bed.run("dump");
    assert!(dump.works().contains("resource r0 {"), "{}", dump.out);
    bed.run("--node carol sh-dev r0").fails(1, "'r0' not defined");
    bed.run("--node carol up all").fails(1, "no resources defined!");
    std::fs::write(bed.path("drbd.conf"), "resource r0 { foo; }").unwrap();
    for line in ["sh-nop", "dump", "up r0", "status r0", "primary r0"] {
        let ran = bed.run(line);
        assert_eq!(ran.exit, 10, "{line}: {ran:?}");
    }
    // What runs can be looked at and ended with a broken configuration.
    let commands = bed.engine(|_| status_reply(state("Connected", "UpToDate", "UpToDate")));
    assert_eq!(bed.run("dstate r0").works(), "UpToDate/UpToDate\n");
    assert_eq!(bed.run("secondary r0").works(), "");
    drop(commands);
}

/// `dump` of a resource shows it alone, with the section that it inherits from; what comes out
/// means the same when it is read back.
#[test]
fn dump_of_one_resource() {
    let bed = Bed::new("");
    let text = |name: &str, minor: u32, options: &str| {
        format!(
            "resource {name} {{ {options} device minor {minor}; disk /dev/d{minor};
               on alice {{ address 127.0.0.1:{}; }} on bob {{ address 127.0.0.2:{}; }} }}\n",
            7800 + minor,
            7800 + minor
        )
    };
    let (r0, r1) = (text("r0", 0, ""), text("r1", 1, "net { ping-int 8; }"));
    let far = text("far", 2, "").replace("alice", "carol");
    let common = "global { usage-count no; } common { net { ping-int 7; } }\n";
    std::fs::write(bed.path("drbd.conf"), format!("{common}{r0}{r1}{far}")).unwrap();
    let all = bed.run("dump all");
    for part in ["usage-count", "resource r0 {", "resource r1 {", "resource far {"] {
        assert!(all.works().contains(part), "{part} in {}", all.out);
    }
    assert_eq!(bed.run("dump").works(), all.out);
    let one = bed.run("dump r1");
    let start = "common {\n    net {\n        ping-int         7;\n    }\n}\n\n\
                 # resource r1 on alice: not ignored, not stacked\n# defined at ";
    assert!(one.works().starts_with(start), "{}", one.out);
    assert_eq!(one.out.matches("resource r1 {").count(), 1);
    for other in ["usage-count", "resource r0", "resource far"] {
        assert!(!one.out.contains(other), "{other} in {}", one.out);
    }
    assert_eq!(bed.run("dump r1/0 r1").works(), one.out);
    let both = bed.run("dump r1 r9 r0 far");
    both.fails(1, "'r9' not defined in your config");
    both.fails(1, "'far' not defined in your config");
    let place = |part: &str| both.out.find(part).unwrap();
    assert!(place("resource r1 {") < place("resource r0 {"), "{}", both.out);
    std::fs::write(bed.path("drbd.conf"), &one.out).unwrap();
    let plain = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.collect::<Vec<_>>().join("\n")
    };
    assert_eq!(plain(bed.run("dump r1").works()), plain(&one.out));
}

/// An engine whose device waits for the role is not replaced: the next one would not know.
#[test]
fn no_upgrade_while_requests_wait() {
    let bed = Bed::new("");
    let commands = bed.engine(|_| {
        let mut status = state("Connecting", "UpToDate", "DUnknown");
        status.volumes[0].open = true;
        status_reply(status)
    });
    bed.run("upgrade r0")
        .fails(10, "r0/0: the device is in use and waits until this node is Primary");
    assert_eq!(commands.recv().unwrap(), Command::Status);
    assert_eq!(commands.try_iter().next(), None);
}

/// Where metadata are, in the words of the stock tool.
#[test]
fn places_of_metadata() {
    let bed = Bed::new("");
    let text = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
    for (place, device, index) in [
        ("meta-disk /dev/m;", "/dev/m\n", "flexible\n"),
        ("meta-disk /dev/m [7];", "/dev/m\n", "7\n"),
        ("disk none;", "none\n", "none\n"),
    ] {
        let mut text = text.replace("meta-disk internal;", place);
        if place == "disk none;" {
            text = text.replace(&format!("disk {};", bed.path("disk").display()), "");
        }
        std::fs::write(bed.path("drbd.conf"), text).unwrap();
        assert_eq!(bed.run("sh-md-dev r0").works(), device, "{place}");
        assert_eq!(bed.run("sh-md-idx r0").works(), index, "{place}");
    }
}

/// A shell can evaluate the versions, and the agents' keys are there.
#[test]
fn version() {
    let bed = Bed::new("");
    let version = bed.run("--version");
    let mut shell = std::process::Command::new("sh");
    shell.arg("-euc").arg(format!(
        "{}\necho $DRBDADM_API_VERSION $((DRBD_KERNEL_VERSION_CODE)) \
         $DRBD_KERNEL_VERSION $((DRBDADM_VERSION_CODE)) $DRBDADM_VERSION; \
         : \"$DRBDADM_BUILDTAG\"",
        version.works()
    ));
    let output = shell.output().unwrap();
    let code = 0x08_04_0b;
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("1 {code} 8.4.11 {code} 8.4.11\n")
    );
}

/// Generation identifiers: the engine's own numbers, the disk's flags.
#[test]
fn generation_identifiers() {
    let bed = Bed::new("");
    bed.run("get-gi r0").fails(255, "No valid meta data");
    bed.run("dstate r0").fails(255, "No valid meta data");
    assert_eq!(bed.run("create-md r0").exit, 0);
    let fresh =
        "0000000000000004:0000000000000000:0000000000000000:0000000000000000:0:0:0:0:0:0:0\n";
    assert_eq!(bed.run("get-gi r0").works(), fresh);
    assert_eq!(bed.run("dstate r0").works(), "Inconsistent\n");
    let shown = bed.run("show-gi r0");
    assert!(shown.works().starts_with(fresh) && shown.out.contains("data are consistent"));
    let _commands = bed.engine(|_| status_reply(state("Connected", "UpToDate", "UpToDate")));
    let live =
        "0000000000000010:0000000000000020:0000000000000030:0000000000000040:0:0:0:0:0:0:0\n";
    assert_eq!(bed.run("get-gi r0/0").works(), live);
}

/// An engine of another version, or one that talks nonsense, is told apart from a refusal.
#[test]
fn strange_engines() {
    use std::io::Write;
    for (bytes, part) in [
        (&[0, 0, 0, 2, 99, 0][..], "different versions"),
        (&[0, 0, 0, 2, SCHEMA, 77][..], "malformed"),
        (&[0xff; 4][..], "control frame"),
        (&[][..], "closed the connection without an answer"),
    ] {
        let bed = Bed::new("");
        std::fs::create_dir_all(bed.path("run/alice")).unwrap();
        let path = bed.run_file("r0.sock");
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(common::receive(&mut stream), Some(Command::Primary { force: false }));
            stream.write_all(bytes).unwrap();
        });
        bed.run("primary r0").fails(20, part);
        server.join().unwrap();
    }
}
