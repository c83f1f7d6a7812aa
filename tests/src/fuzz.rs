//! Bytes from outside, of any kind: each entry point takes some and must not panic, hang or
//! break what it promises (Z).
//!
//! The entry points are ordinary functions, so that a fuzzer drives them (`tests/fuzz`), and the
//! small corpora beside it are replayed by `cargo test` on any compiler.
//!
//! | room | bytes from |
//! |---|---|
//! | [`wire`] | the peer: packets, bitmaps |
//! | [`peer`] | the peer: whole conversations with a core |
//! | [`medium`] | a disk: superblock, activity log, a text dump |
//! | [`local`] | the operator and the host: configuration, control socket, NBD |

pub mod local;
pub mod medium;
pub mod peer;
pub mod wire;

/// An entry point.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is that of its corpus and of its program for the fuzzer.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
}

/// All entry points.
pub const TARGETS: [Target; 10] = [
    Target { name: "packets", run: wire::packets },
    Target { name: "bitmap", run: wire::bitmap },
    Target { name: "connection", run: peer::connection },
    Target { name: "session", run: peer::session },
    Target { name: "metadata", run: medium::metadata },
    Target { name: "log", run: medium::log },
    Target { name: "dump", run: medium::dump_text },
    Target { name: "config", run: local::config },
    Target { name: "control", run: local::control },
    Target { name: "nbd", run: local::nbd },
];

/// Reads numbers from the front of bytes; zeroes follow the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let there = self.take(N);
        bytes[..there.len()].copy_from_slice(there);
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.number())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }
}
