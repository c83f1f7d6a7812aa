use std::os::unix::fs::OpenOptionsExt;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

fn ring() -> Ring {
    Ring::new(Layout::new(1, 4, 4096, 0).unwrap()).unwrap()
}

fn finish(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    while done.len() < count {
        ring.wait(Some(Duration::from_secs(10))).unwrap();
        ring.completions(&mut done);
    }
    done
}

#[test]
fn bytes_written_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).mode(0o600);
    let fd: Fd = Rc::new(file.open(dir.path().join("disk")).unwrap().into());
    let mut ring = ring();
    ring.arena().copy_in(Buf(0), 0, b"something to keep");
    let memory = Memory::Arena { buf: Buf(0), offset: 0, len: 17 };
    ring.push(&fd, Op::Write { memory, offset: 100, durable: true }, Owner::Wake);
    assert_eq!(finish(&mut ring, 1)[0].outcome(), Ok(17));
    let memory = Memory::Arena { buf: Buf(1), offset: 3, len: 4096 - 3 };
    ring.push(&fd, Op::Read { memory, offset: 100 }, Owner::Signal);
    let done = finish(&mut ring, 1);
    assert!(matches!(done[0].owner, Owner::Signal));
    assert_eq!(done[0].outcome(), Ok(17));
    let mut back = [0; 17];
    ring.arena().copy_out(Buf(1), 3, &mut back);
    assert_eq!(&back, b"something to keep");
}

#[test]
fn a_full_submission_queue_loses_nothing() {
    let event: EventFd = EventFd::from_value_and_flags(1, EfdFlags::empty()).unwrap();
    let fd: Fd = Rc::new(rustix::io::dup(&event).unwrap());
    let mut ring = ring();
    let count = usize::try_from(SQ_ENTRIES).unwrap() * 3;
    for _ in 0..count {
        ring.push(&fd, Op::Readable, Owner::Wake);
    }
    assert_eq!(ring.in_flight(), count);
    assert_eq!(finish(&mut ring, count).len(), count);
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_cancelled_operation_ends_with_its_error() {
    let event: EventFd = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
    let fd: Fd = Rc::new(rustix::io::dup(&event).unwrap());
    let mut ring = ring();
    let key = ring.push(&fd, Op::Readable, Owner::Wake);
    ring.cancel(key);
    let done = finish(&mut ring, 1);
    assert_eq!(done[0].outcome(), Err(Errno(libc::ECANCELED)));
}

#[test]
fn a_ring_that_goes_with_operations_in_flight_leaks_their_memory() {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd: Fd = Rc::new(near.into());
    let mut ring = ring();
    let direct = Direct { buf: Buf(0), have: 0, need: 4096 };
    let op = Op::Receive { receive: Box::new(Receive::new()), direct: Some(direct) };
    ring.push(&fd, op, Owner::Wake);
    ring.wait(Some(Duration::ZERO)).unwrap();
    let address = ring.arena().address(Buf(0), 0, 4096);
    drop(ring);
    drop(far);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().any(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let parse = |text| usize::from_str_radix(text, 16).unwrap();
        (parse(start)..parse(end)).contains(&address.addr())
    });
    assert!(mapped);
}

/// An address at which connections are neither taken nor refused: its queue is full.
fn full_listener() -> (OwnedFd, std::net::SocketAddr, Vec<std::net::TcpStream>) {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockProtocol, SockType};
    let flags = SockFlag::SOCK_CLOEXEC;
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let fd = nix::sys::socket::socket(family, kind, flags, SockProtocol::Tcp).unwrap();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    nix::sys::socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(any)).unwrap();
    nix::sys::socket::listen(&fd, Backlog::new(0).unwrap()).unwrap();
    let name: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd()).unwrap();
    let port = name.as_sockaddr_in().unwrap().port();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let mut queued = Vec::new();
    let limit = Duration::from_millis(300);
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, limit) {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue does not fill");
    }
    (fd, address, queued)
}

/// A connect that had to wait for room still has its limit.
#[test]
fn a_connect_from_the_backlog_keeps_its_limit() {
    let (_listener, address, _queued) = full_listener();
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        nix::sys::socket::SockProtocol::Tcp,
    );
    let fd: Fd = Rc::new(socket.unwrap());
    let mut ring = ring();
    // One entry of the pair would be the last of a full queue.
    for _ in 1..SQ_ENTRIES {
        let nothing = opcode::Nop::new().build().user_data(NOBODY);
        ring.backlog.push_back((nothing, None));
    }
    let limit = Duration::from_millis(200);
    let op = Op::Connect { address: SockaddrStorage::from(address), limit };
    ring.push(&fd, op, Owner::Wake);
    let began = std::time::Instant::now();
    let done = finish(&mut ring, 1);
    assert_eq!(done[0].outcome(), Err(Errno(libc::ECANCELED)));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}
