//! An engine and those who mean it no good, or know no better: bad clients, bad peers, a second
//! engine, commands that cannot be carried out. Nobody of them disturbs the others.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use common::{Bed, nbd, pattern};
use replication_core::control::{Command, Reply};
use replication_core::units::Span;

const INVALID: u32 = 22;
const NO_SPACE: u32 = 28;

/// Requests that cannot be served are answered, and the connection goes on.
#[test]
fn bad_requests_are_answered_and_the_client_stays() {
    let bed = Bed::synced(32);
    let mut client = bed.alice.nbd();
    let size = client.size;
    assert_eq!(client.read(100, 512), Err(INVALID));
    assert_eq!(client.read(size, 512), Err(INVALID));
    assert_eq!(client.write(size - 512, &[1; 1024]), NO_SPACE);
    assert_eq!(client.write(512, &[1; 700]), INVALID);
    assert_eq!(client.write(0, &vec![1; (1 << 20) + 512]), INVALID);
    assert_eq!(client.write_zeroes(size, 512), NO_SPACE);
    client.send(77, 0, 0, 0, &[]);
    assert_eq!(client.answer().0, INVALID);
    assert_eq!(client.write(size - 512, &[9; 512]), 0);
    assert_eq!(client.read(size - 512, 512).unwrap(), [9; 512]);
}

/// A client that sends garbage loses its connection, and nobody else does.
#[test]
fn garbage_from_a_client_ends_that_client_alone() {
    let bed = Bed::synced(32);
    let mut good = bed.alice.nbd();
    let mut bad = bed.alice.nbd();
    bad.socket.write_all(&[0x55; 28]).unwrap();
    assert_eq!(bad.socket.read(&mut [0; 1]).unwrap(), 0);
    let mut half = bed.alice.nbd();
    half.send(nbd::WRITE, 0, 0, 65536, &[1; 1000]);
    drop(half);
    let mut mute = UnixStream::connect(bed.alice.dir.join("nbd.sock")).unwrap();
    mute.write_all(&[0xff; 4]).unwrap();
    for at in 0..64 {
        assert_eq!(good.write(at * 65536, &pattern(at, 65536)), 0);
    }
    assert_eq!(good.read(0, 65536).unwrap(), pattern(0, 65536));
}

/// A client that does not take its replies holds up nobody; its requests are done or dropped.
#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let bed = Bed::synced(32);
    let mut lazy = bed.alice.nbd();
    lazy.socket.set_nonblocking(true).unwrap();
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend_from_slice(&[0; 4 + 8 + 8]);
    request.extend_from_slice(&(1_u32 << 20).to_be_bytes());
    // As many reads as the engine takes; each reply is a mebibyte that nobody fetches.
    for _ in 0..1000 {
        if lazy.socket.write(&request).is_err() {
            break;
        }
    }
    let mut good = bed.alice.nbd();
    assert_eq!(good.size, lazy.size);
    for at in 0..16 {
        assert_eq!(good.write(at * 65536, &pattern(at, 65536)), 0);
    }
    drop(lazy);
    assert_eq!(good.flush(), 0);
}

/// Strangers at the replication port do not keep the peers apart.
#[test]
fn strangers_at_the_replication_port_do_not_keep_the_peers_apart() {
    let mut bed = Bed::new(32);
    bed.alice.start();
    let address = bed.alice.config.local;
    let mut strangers = Vec::new();
    for number in 0..20_u8 {
        let mut stranger = TcpStream::connect(address).unwrap();
        if number % 2 == 0 {
            // A reset in between is as good as an answer.
            let _ = stranger.write_all(&[number; 100]);
        }
        strangers.push(stranger);
    }
    bed.bob.start();
    bed.alice.wait_for("a connection", |status| status.volumes[0].cstate == "Connected");
}

/// Hundredths of a second that a process has worked.
fn work(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

/// Without descriptors nobody can be accepted: the engine tries again after a while, not at once,
/// and serves whoever waited.
#[test]
fn an_engine_without_descriptors_does_not_spin() {
    use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
    let mut bed = Bed::new(32);
    bed.alice.start();
    let pid = rustix::process::Pid::from_raw(i32::try_from(bed.alice.pid()).unwrap());
    let normal = getrlimit(Resource::Nofile);
    let nothing = Rlimit { current: Some(3), maximum: normal.maximum };
    prlimit(pid, Resource::Nofile, nothing).unwrap();
    let waiting = UnixStream::connect(bed.alice.dir.join("nbd.sock")).unwrap();
    let stranger = TcpStream::connect(bed.alice.config.local).unwrap();
    let before = work(bed.alice.pid());
    std::thread::park_timeout(std::time::Duration::from_secs(2));
    let tries = bed.alice.log().matches("NBD server: accept").count();
    assert!((1..=5).contains(&tries), "{tries} tries");
    let worked = work(bed.alice.pid()) - before;
    assert!(worked <= 10, "{worked} hundredths of a second of work");
    prlimit(pid, Resource::Nofile, normal).unwrap();
    let mut greeting = [0; 18];
    waiting.set_read_timeout(Some(common::PATIENCE)).unwrap();
    (&waiting).read_exact(&mut greeting).unwrap();
    drop(stranger);
    bed.bob.start();
    bed.alice.wait_for("a connection", |status| status.volumes[0].cstate == "Connected");
}

/// A service manager that does not listen holds up nobody.
#[test]
fn a_service_manager_that_does_not_listen_holds_up_nobody() {
    use std::os::unix::net::UnixDatagram;
    let mut bed = Bed::new(32);
    let path = bed.alice.dir.join("notify");
    let _manager = UnixDatagram::bind(&path).unwrap();
    let crowd = UnixDatagram::unbound().unwrap();
    crowd.set_nonblocking(true).unwrap();
    while crowd.send_to(b"x", &path).is_ok() {}
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    bed.alice.environment =
        vec![variable("NOTIFY_SOCKET", path.to_str().unwrap()), variable("WATCHDOG_USEC", "20000")];
    bed.alice.start();
    bed.alice.status();
    bed.alice.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(bed.alice.wait().success());
}

/// A second engine for the same resource, or for the same disk, is refused and says why.
#[test]
fn a_second_engine_is_refused() {
    let mut bed = Bed::new(32);
    bed.alice.start();
    let mut second = Bed::new(32);
    second.alice.config.run_dir.clone_from(&bed.alice.config.run_dir);
    second.alice.spawn();
    assert!(!second.alice.wait().success());
    let said = second.alice.log();
    let text = format!("is served by another engine (pid {})", bed.alice.pid());
    assert!(said.contains(&text), "{said}");
    let mut third = Bed::new(32);
    third.alice.config.backing.clone_from(&bed.alice.config.backing);
    third.alice.start_without_up();
    let refusal = third.alice.ask(Command::Up).unwrap_err();
    let text = format!("in use by pid {} (", bed.alice.pid());
    assert!(refusal.text.contains(&text), "{refusal:?}");
    bed.alice.status();
}

/// Options change while the engine runs; what cannot change is refused by name.
#[test]
fn options_are_adjusted_and_addresses_are_not() {
    let mut bed = Bed::synced(32);
    let mut config = bed.alice.config.clone();
    config.resource.net.ping_int = Span::from_secs(3);
    let answer = bed.alice.ask(Command::Adjust(Box::new(config.clone())));
    assert_eq!(answer, Ok(Reply::Done));
    config.local.set_port(1);
    let refusal = bed.alice.ask(Command::Adjust(Box::new(config))).unwrap_err();
    assert!(refusal.text.contains("an address cannot change"), "{refusal:?}");
    let mut client = bed.alice.nbd();
    assert_eq!(client.write(0, &[1; 4096]), 0);
}

/// Clients of the control socket that are slow, silent or mad hold up nobody.
#[test]
fn bad_control_clients_hold_up_nobody() {
    let mut bed = Bed::new(32);
    bed.alice.start();
    let connect = || UnixStream::connect(bed.alice.dir.join("r0.sock")).unwrap();
    let mut crowd: Vec<UnixStream> = (0..10).map(|_| connect()).collect();
    for (number, client) in crowd.iter_mut().enumerate() {
        let bytes: &[u8] = match number % 3 {
            0 => &[],
            1 => &[0, 0],
            _ => &[0xff; 64],
        };
        client.write_all(bytes).unwrap();
    }
    assert_eq!(bed.alice.status().name, "r0");
}
