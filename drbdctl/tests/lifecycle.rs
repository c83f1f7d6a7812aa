//! `up`, `down` and `adjust` with real processes: this test program plays the engine.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use common::{Bed, receive, refusal, state, status_reply};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use replication_core::config::EngineConfig;
use replication_core::control::{Command, Reply, encode_frame};
use replication_core::units::Span;

/// The engine's part; run by the tests below through a script.
#[test]
#[ignore = "plays an engine for the other tests"]
fn plays_an_engine() {
    let mode = std::env::var("FAKE_MODE").expect("started by a script of these tests");
    let config = std::fs::read(std::env::var("FAKE_CONFIG").unwrap()).unwrap();
    let config: EngineConfig = serde_json::from_slice(&config).unwrap();
    assert_eq!(std::env::var("FAKE_WORDS").unwrap(), "run --config");
    let file = |suffix: &str| format!("{}/{}.{suffix}", config.run_dir, config.resource.name);
    while mode == "slow" && !std::path::Path::new(&file("go")).exists() {
        std::thread::park_timeout(std::time::Duration::from_millis(10));
    }
    let lock = File::create(file("lock")).unwrap();
    let mut lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    writeln!(lock, "{}", std::process::id()).unwrap();
    if mode == "dies" {
        eprintln!("drbd r0: cannot lock memory");
        nix::sys::signal::raise(Signal::SIGKILL).unwrap();
    }
    // A session of its own, so that the end of a terminal does not end it.
    assert_eq!(nix::unistd::getsid(None).unwrap(), nix::unistd::getpid());
    let mut role = "Secondary";
    // One that was killed has left its socket.
    let _ = std::fs::remove_file(file("sock"));
    let listener = UnixListener::bind(file("sock")).unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let Some(command) = receive(&mut stream) else { continue };
        eprintln!("got {command:?}");
        if mode == "mute" && command == Command::Upgrade {
            continue;
        }
        let answer = match &command {
            Command::Up if mode == "refuses" => Err(refusal(119, 10, "No valid meta-data", "x")),
            Command::Status => {
                let mut status = state("Connected", "UpToDate", "UpToDate");
                status.role = role.to_owned();
                status.volumes[0].is_serving = true;
                status_reply(status)
            }
            Command::Primary { .. } => {
                role = "Primary";
                Ok(Reply::Done)
            }
            Command::Upgrade if mode == "stays" => Err(refusal(0, 10, "without its disk", "x")),
            Command::Down { .. } if mode == "busy" => Err(refusal(-12, 11, "held open", "")),
            _ => Ok(Reply::Done),
        };
        let ends = matches!(command, Command::Down { .. } | Command::Upgrade);
        let is_down = ends && answer.is_ok();
        // A client that has given up is not there for its answer.
        let _ = stream.write_all(&encode_frame(&answer).unwrap());
        if is_down && mode != "clings" {
            std::fs::remove_file(file("sock")).unwrap();
            return;
        }
    }
}

fn log(bed: &Bed) -> String {
    std::fs::read_to_string(bed.run_file("r0.log")).unwrap()
}

/// The whole life: up, a second up that is refused, adjust with and without a change, down.
#[test]
fn life() {
    let bed = Bed::new("net { cram-hmac-alg sha1; shared-secret s3; }");
    let program = bed.engine_program("good");
    let env = [("DRBD_ENGINE", program.as_str())];
    assert_eq!(bed.run_with("up r0", &env).works(), "");
    let json = bed.run_file("r0.json");
    assert_eq!(json.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(log(&bed).contains("got Up"));
    assert_eq!(bed.run("dstate r0").works(), "UpToDate/UpToDate\n");

    let before = std::fs::read(&json).unwrap();
    bed.run_with("up r0", &env).fails(10, "r0: Failure: (161)");
    bed.run_with("up r0", &env).fails(10, "use adjust to apply changes");
    assert_eq!(std::fs::read(&json).unwrap(), before);

    assert_eq!(bed.run_with("adjust all", &env).works(), "");
    assert!(!log(&bed).contains("Adjust"));
    bed.configure("net { ping-int 7; }");
    assert_eq!(bed.run_with("adjust r0", &env).works(), "");
    assert!(log(&bed).contains("got Adjust"));
    let after: EngineConfig = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(after.resource.net.ping_int, Span::from_secs(7));
    let said = log(&bed).matches("got Adjust").count();
    assert_eq!(bed.run_with("adjust r0", &env).works(), "");
    assert_eq!(log(&bed).matches("got Adjust").count(), said);

    bed.run("create-md r0").fails(20, "in use by the running resource");
    bed.run("dump-md r0").fails(20, "in use by the running resource");
    assert_eq!(bed.run("down r0").works(), "");
    assert!(!json.exists() && !bed.run_file("r0.sock").exists());
    assert_eq!(bed.run("down r0").works(), "");
}

/// `adjust` of a resource that does not run starts it.
#[test]
fn adjust_starts() {
    let bed = Bed::new("");
    let program = bed.engine_program("good");
    let env = [("DRBD_ENGINE", program.as_str())];
    assert_eq!(bed.run_with("adjust all", &env).works(), "");
    assert!(log(&bed).contains("got Up"));
    assert_eq!(bed.run_with("adjust all", &env).works(), "");
    assert_eq!(log(&bed).matches("got Up").count(), 1);
    assert_eq!(bed.run("down all").works(), "");
}

/// An engine that ends at once: its words are shown, nothing is left.
#[test]
fn early_end() {
    let bed = Bed::new("");
    let program = bed.engine_program("dies");
    let ran = bed.run_with("up r0", &[("DRBD_ENGINE", &program)]);
    ran.fails(20, "r0: the engine ended at once");
    ran.fails(20, "drbd r0: cannot lock memory");
    assert!(!bed.run_file("r0.json").exists() && !bed.run_file("r0.sock").exists());
    let nothing = bed.path("no-such-engine");
    let ran = bed.run_with("up r0", &[("DRBD_ENGINE", nothing.to_str().unwrap())]);
    ran.fails(20, "no-such-engine");
}

/// An engine that cannot come up is taken down again, and the refusal is what is told.
#[test]
fn refused_up() {
    let bed = Bed::new("");
    let program = bed.engine_program("refuses");
    let ran = bed.run_with("up r0", &[("DRBD_ENGINE", &program)]);
    ran.fails(10, "r0: Failure: (119) No valid meta-data\n  what to do: x\n");
    assert!(log(&bed).contains("got Down { holder: None, force: false }"));
    assert!(!bed.run_file("r0.json").exists() && !bed.run_file("r0.sock").exists());
    assert_eq!(bed.run("secondary r0").works(), "");
}

/// A refused `down` changes nothing, not even with `--force`; the device is in use.
#[test]
fn refused_down() {
    let bed = Bed::new("");
    let program = bed.engine_program("busy");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    bed.run("down r0").fails(11, "r0: State change failed: (-12) held open");
    bed.run("down --force r0").fails(11, "held open");
    assert_eq!(bed.run("dstate r0").works(), "UpToDate/UpToDate\n");
    kill(&bed);
    bed.run("status").fails(20, "r0: its engine has died");
    assert_eq!(bed.run("down r0").works(), "");
    assert_eq!(bed.run("status").works(), "# No currently configured DRBD found.\n");
}

/// A `down` that is typed while an `up` is at work waits for it: it must not take the files away
/// that the `up` has just written, and leave the engine that it starts.
#[test]
fn down_beside_up() {
    let bed = Bed::new("");
    let program = bed.engine_program("slow");
    let start = |verb: &str| {
        let mut tool = bed.program();
        tool.args([verb, "r0"]).env("DRBD_ENGINE", &program);
        tool.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        tool.spawn().unwrap()
    };
    let up = start("up");
    wait_until(|| bed.run_file("r0.json").exists());
    let mut down = start("down");
    let guard = bed.run_file("r0.tool");
    let fds = format!("/proc/{}/fd", down.id());
    let is_at_guard = || {
        let open = std::fs::read_dir(&fds).into_iter().flatten().flatten();
        open.map(|fd| fd.path()).any(|fd| std::fs::read_link(fd).is_ok_and(|to| to == guard))
    };
    wait_until(|| down.try_wait().unwrap().is_some() || is_at_guard());
    assert!(bed.run_file("r0.json").exists(), "it waits for as long as the engine is starting");
    File::create(bed.run_file("r0.go")).unwrap();
    for tool in [up, down] {
        let output = tool.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert!(log(&bed).contains("got Up") && log(&bed).contains("got Down"), "{}", log(&bed));
    assert!(!bed.run_file("r0.json").exists() && !bed.run_file("r0.sock").exists());
}

/// Whoever insists does not wait long for a tool that hangs, and names it if that does not help.
#[test]
fn the_lock_of_a_tool_that_hangs() {
    let bed = Bed::new("");
    let program = bed.engine_program("good");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    let tool = File::options().append(true).open(bed.run_file("r0.tool")).unwrap();
    let held = Flock::lock(tool, FlockArg::LockExclusive).unwrap();
    let start = std::time::Instant::now();
    assert_eq!(bed.run("down --force r0").works(), "");
    assert!(start.elapsed() < std::time::Duration::from_secs(30));
    drop(held);
}

fn wait_until(mut is_true: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !is_true() {
        assert!(std::time::Instant::now() < end, "it did not come true");
        std::thread::park_timeout(std::time::Duration::from_millis(10));
    }
}

/// An engine that promised to end and does not is killed by `--force`.
#[test]
fn clinging_engine() {
    let bed = Bed::new("");
    let program = bed.engine_program("clings");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    assert_eq!(bed.run("down --force r0").works(), "");
    assert!(!bed.run_file("r0.json").exists() && !bed.run_file("r0.sock").exists());
    let lock = File::open(bed.run_file("r0.lock")).unwrap();
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
}

/// Block devices outlive an engine that is killed: the program removes them, unless they are in
/// use; then the files stay as well, for the next engine and for another try.
#[test]
fn devices_of_a_dead_engine() {
    let bed = Bed::new("");
    let conf = std::fs::read_to_string(bed.path("drbd.conf")).unwrap();
    std::fs::write(bed.path("drbd.conf"), conf.replace("frontend nbd", "frontend ublk")).unwrap();
    let json = bed.run_file("r0.json");
    let cleared = || std::fs::read_to_string(bed.path("cleared")).unwrap_or_default();

    let used = bed.engine_program("used");
    let env = [("DRBD_ENGINE", used.as_str())];
    assert_eq!(bed.run_with("up r0", &env).works(), "");
    kill(&bed);
    let ran = bed.run_with("down r0", &env);
    ran.fails(20, "clear: exit status: 1: /dev/ublkb5 is in use\n  what to do: drbdctl up r0");
    assert!(json.exists());

    let clings = bed.engine_program("clings");
    let env = [("DRBD_ENGINE", clings.as_str())];
    assert_eq!(bed.run_with("up r0", &env).works(), "");
    let before = cleared();
    assert_eq!(bed.run_with("down --force r0", &env).works(), "");
    assert_eq!(cleared(), format!("{before}clear {}\n", json.display()));
    assert!(!json.exists());
}

/// A disk that has grown while no engine had it, or under one that did not take it up, has its
/// metadata at its end before the next engine looks for it there.
#[test]
fn outgrown_metadata() {
    let bed = Bed::new("");
    assert_eq!(bed.run("create-md r0").exit, 0);
    let program = bed.engine_program("good");
    let env = [("DRBD_ENGINE", program.as_str())];
    let grow = |from: u64, to: u64| {
        std::fs::write(bed.run_file("r0-0.sizes"), format!("{}\n", from * 2048)).unwrap();
        let disk = File::options().write(true).open(bed.path("disk")).unwrap();
        disk.set_len(to << 20).unwrap();
    };
    std::fs::create_dir_all(bed.path("run/alice")).unwrap();
    grow(64, 80);
    let up = bed.run_with("up r0", &env);
    assert!(up.works().contains("has grown from 131072 to 163840 sectors"), "{up:?}");
    grow(80, 96);
    // The engine has the disk, and moves the metadata itself when it is told to.
    assert_eq!(bed.run("check-resize r0").works(), "");
    let upgrade = bed.run_with("upgrade r0", &env);
    assert!(upgrade.works().contains("has grown from 163840 to 196608 sectors"), "{upgrade:?}");
    assert_eq!(bed.run("down r0").works(), "");
    assert!(bed.run("get-gi r0").works().starts_with("0000000000000004:"));
    grow(96, 80);
    // Told, and left to the attach.
    let up = bed.run_with("up r0", &env);
    assert!(up.exit == 0 && up.err.contains("has shrunk from 196608 sectors to 163840"), "{up:?}");
    assert_eq!(bed.run("down r0").works(), "");
}

/// Another program takes over: the configuration stays as it was, the role is given back to a node
/// whose NBD clients come again, and the pause is told.
#[test]
fn upgrade() {
    let bed = Bed::new("");
    bed.run("upgrade r0").fails(20, "r0: not running");
    let program = bed.engine_program("good");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    assert_eq!(bed.run("primary r0").works(), "");
    bed.configure("net { ping-int 7; }");
    let before = std::fs::read(bed.run_file("r0.json")).unwrap();
    let pid = std::fs::read_to_string(bed.run_file("r0.lock")).unwrap();

    // A program that cannot run this configuration does not get the chance.
    let broken = bed.engine_program("broken");
    let ran = bed.run_with("upgrade r0", &[("DRBD_ENGINE", &broken)]);
    ran.fails(20, "check: exit status: 1: broken");
    assert_eq!(std::fs::read_to_string(bed.run_file("r0.lock")).unwrap(), pid);

    let next = bed.engine_program("next");
    let ran = bed.run_with("upgrade all", &[("DRBD_ENGINE", &next)]);
    assert!(ran.works().starts_with(&format!("r0: engine replaced (pid {} -> ", pid.trim())));
    assert!(ran.out.contains("; requests waited for "), "{}", ran.out);
    assert!(ran.out.contains("r0: NBD clients have to connect again\n"), "{}", ran.out);
    assert_ne!(std::fs::read_to_string(bed.run_file("r0.lock")).unwrap(), pid);
    assert_eq!(std::fs::read(bed.run_file("r0.json")).unwrap(), before);
    assert_eq!(bed.run("role r0").works(), "Primary/Primary\n");
    let said = log(&bed);
    let place = |part: &str| said.find(part).unwrap_or_else(|| panic!("{part} in {said}"));
    assert!(place("got Upgrade") < said.rfind("got Up\n").unwrap());
    assert!(!said.contains("got Down") && !said.contains("got Adjust"));
    assert_eq!(bed.run("down r0").works(), "");
}

/// A refusal keeps the old engine; one that promises to go and stays is killed, and so is one that
/// speaks another language. A new one that dies leaves everything for the old one.
#[test]
fn upgrades_that_go_wrong() {
    let bed = Bed::new("");
    let program = bed.engine_program("stays");
    let good = bed.engine_program("good");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    bed.run_with("upgrade r0", &[("DRBD_ENGINE", &good)]).fails(10, "r0: without its disk");
    assert_eq!(bed.run("down r0").works(), "");

    let program = bed.engine_program("clings");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    let ran = bed.run_with("upgrade r0", &[("DRBD_ENGINE", &good)]);
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.err.contains("r0: the old engine was killed: it did not end within"), "{ran:?}");

    let dies = bed.engine_program("dies");
    let ran = bed.run_with("upgrade r0", &[("DRBD_ENGINE", &dies)]);
    ran.fails(20, "r0: the engine ended at once");
    ran.fails(
        20,
        "what to do: requests wait for an engine; back to the old one with: DRBD_ENGINE=",
    );
    assert!(bed.run_file("r0.json").exists(), "nothing was cleaned up");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &good)]).works(), "");
    assert_eq!(bed.run("down r0").works(), "");
}

/// Requests wait for the new engine: it is started even if nothing can be told any more, neither
/// that metadata was moved nor that the old engine had to be killed.
#[test]
fn an_upgrade_that_nobody_listens_to() {
    for mode in ["good", "mute"] {
        let bed = Bed::new("");
        assert_eq!(bed.run("create-md r0").exit, 0);
        let (old, new) = (bed.engine_program(mode), bed.engine_program("good"));
        assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &old)]).works(), "");
        std::fs::write(bed.run_file("r0-0.sizes"), "131072\n").unwrap();
        File::options().write(true).open(bed.path("disk")).unwrap().set_len(80 << 20).unwrap();
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut tool = bed.program();
        tool.args(["upgrade", "r0"]).env("DRBD_ENGINE", &new).stdout(full()).stderr(full());
        assert!(!tool.status().unwrap().success(), "{mode}: nobody knows how long it took");
        assert_eq!(bed.run("role r0").works(), "Secondary/Primary\n", "{mode}");
        assert_eq!(bed.run("down r0").works(), "");
        assert!(bed.run("get-gi r0").works().starts_with("0000000000000004:"), "{mode}");
    }
}

/// An engine has nothing open that whoever called the tool had: a caller that reads from a pipe
/// to its end would wait for the end of the engine.
#[test]
fn nothing_open_is_handed_over() {
    let bed = Bed::new("");
    let program = bed.engine_program("good");
    let (held, other) = (bed.path("held"), bed.path("other"));
    let tool = bed.program();
    let words = tool.get_args().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ");
    let line = format!(
        "exec {} {words} up r0 7>{} 200>{}",
        tool.get_program().to_str().unwrap(),
        held.display(),
        other.display()
    );
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &line]);
    for (name, value) in tool.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    assert!(shell.env("DRBD_ENGINE", &program).status().unwrap().success());
    let open = |fd: &str| std::fs::read_link(format!("/proc/{}/fd/{fd}", engine_pid(&bed)));
    let fds = std::fs::read_dir(format!("/proc/{}/fd", engine_pid(&bed))).unwrap();
    let open_files: Vec<_> = fds.map(|fd| fd.unwrap().path().read_link().unwrap()).collect();
    assert!(!open_files.contains(&held) && !open_files.contains(&other), "{open_files:?}");
    assert_eq!(open("0").unwrap(), std::path::Path::new("/dev/null"));
    for fd in ["1", "2"] {
        assert_eq!(open(fd).unwrap(), bed.run_file("r0.log"));
    }
    assert_eq!(bed.run("down r0").works(), "");
}

/// An engine that is stopped is told from one that answers, soon, and with what can be done.
#[test]
fn a_stopped_engine_is_not_waited_for() {
    let bed = Bed::new("");
    let program = bed.engine_program("good");
    assert_eq!(bed.run_with("up r0", &[("DRBD_ENGINE", &program)]).works(), "");
    signal(&bed, Signal::SIGSTOP);
    let pid = engine_pid(&bed);
    let start = std::time::Instant::now();
    for line in ["status", "role r0", "up r0", "wait-connect r0"] {
        let ran = bed.run(line);
        ran.fails(20, &format!("r0: engine process {pid} lives but does not answer"));
        ran.fails(20, "its state is T (stopped)\n");
        ran.fails(20, &format!("kill -CONT {pid}"));
        ran.fails(20, "drbdctl down --force r0");
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(60), "{:?}", start.elapsed());
    signal(&bed, Signal::SIGCONT);
    assert_eq!(bed.run("dstate r0").works(), "UpToDate/UpToDate\n");
    assert_eq!(bed.run("down r0").works(), "");
}

/// The engine of this bed, by the process id in its lock.
fn engine_pid(bed: &Bed) -> i32 {
    let pid = std::fs::read_to_string(bed.run_file("r0.lock")).unwrap();
    pid.trim().parse().unwrap()
}

fn signal(bed: &Bed, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(engine_pid(bed)), signal).unwrap();
}

/// Kills the engine of this bed.
fn kill(bed: &Bed) {
    signal(bed, Signal::SIGKILL);
    // It ends when its lock is free, which is what the tool looks at, too.
    let lock = File::open(bed.run_file("r0.lock")).unwrap();
    Flock::lock(lock, FlockArg::LockExclusive).unwrap();
}
