use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;

const MIB: u32 = 1 << 20;

/// A server with one volume, and a client of it.
struct Bed {
    server: Server,
    shared: Shared,
    client: UnixStream,
    _dir: tempfile::TempDir,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::settings::tests::config(dir.path());
    let mut shared = Shared::new(&config).unwrap();
    let path = dir.path().join("nbd.sock");
    let address = NbdAddress::Unix(path.to_str().unwrap().to_owned());
    let (users, ring) = (Arc::default(), &mut shared.ring);
    let server = Server::new(&address, &config.resource, 4, MIB, users, ring).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bed = Bed { server, shared, client: client.try_clone().unwrap(), _dir: dir };
    bed.server.set_size(VolumeIx(0), Sector(1 << 20), 512);
    // No zeroes wanted; the export of the name "0" in the old form.
    client.write_all(&[0, 0, 0, 3]).unwrap();
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x010").unwrap();
    bed.turn_until(|server| {
        matches!(server.clients[..], [Client { phase: Phase::Requests { .. }, .. }])
    });
    client.read_exact(&mut [0; 18 + 10]).unwrap();
    bed
}

impl Bed {
    /// One turn of an engine without a core that answers.
    fn turn(&mut self) {
        let mut done = Vec::new();
        self.shared.ring.completions(&mut done);
        for completion in done {
            let shared = &mut self.shared;
            match completion.owner {
                Owner::NbdAccept => self.server.on_accepted(shared, completion),
                Owner::Received(StreamId::Client(id)) => {
                    self.server.on_received(shared, id, completion);
                }
                Owner::Sent(StreamId::Client(id)) => self.server.on_sent(shared, id, completion),
                other => panic!("{other:?}"),
            }
        }
        self.server.pump(&mut self.shared);
        let now = self.shared.now();
        self.server.flush(&mut self.shared.ring, now);
        self.shared.ring.wait(Some(Duration::from_millis(10))).unwrap();
    }

    fn turn_until(&mut self, is_so: impl Fn(&Server) -> bool) {
        for _ in 0..1000 {
            self.turn();
            if is_so(&self.server) {
                return;
            }
        }
        panic!("it does not come to that: {:?}", self.server);
    }

    fn request(&mut self, command: u8) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0, 0, command]);
        bytes.extend_from_slice(&[0; 8 + 8]);
        bytes.extend_from_slice(&MIB.to_be_bytes());
        self.client.write_all(&bytes).unwrap();
    }

    /// The one request that is with the core.
    fn has_request(server: &Server) -> bool {
        server.tags[0].is_busy(HostTag(0))
    }
}

/// Whoever takes a part of a reply now and then is slow, and stays; who takes nothing goes.
#[test]
fn a_client_that_takes_nothing_of_a_reply_is_sent_away() {
    let mut bed = bed();
    bed.request(0);
    bed.turn_until(Bed::has_request);
    bed.server.complete(&mut bed.shared, VolumeIx(0), HostTag(0), Ok(()));
    let limit = Duration::from_nanos(STALL_LIMIT.0);
    for _ in 0..3 {
        // The kernel has taken something, or the client makes room for more.
        bed.turn_until(|server| server.clients[0].sending_since.is_some());
        bed.client.read_exact(&mut [0; 65536]).unwrap();
        bed.shared.pass(limit);
        for _ in 0..10 {
            bed.turn();
        }
        assert!(!bed.server.clients.is_empty() && !bed.server.clients[0].closed);
    }
    for _ in 0..2 {
        assert!(bed.server.next_deadline().is_some());
        bed.shared.pass(limit);
        for _ in 0..10 {
            bed.turn();
        }
    }
    assert!(bed.server.clients.is_empty(), "{:?}", bed.server.clients);
    assert!(bed.server.tags[0].take(9, 0) == Some(HostTag(0)), "its slot is free again");
}

/// It holds a slot that others wait for.
#[test]
fn a_client_that_does_not_finish_a_write_is_sent_away() {
    let mut bed = bed();
    bed.request(1);
    bed.client.write_all(&[7; 1000]).unwrap();
    bed.turn_until(|server| server.clients[0].payload_since.is_some());
    bed.shared.pass(Duration::from_nanos(STALL_LIMIT.0));
    bed.turn_until(|server| server.clients.is_empty());
    assert!(bed.server.tags[0].take(9, 0) == Some(HostTag(0)), "its slot is free again");
}
