//! What happened, in words: the last events of a run, and a hash over all of them.

use std::collections::VecDeque;

use replication_core::action::Action;
use replication_core::event::Event;
use replication_core::units::Time;
use replication_core::wire::Packet;

/// Lines that a failure report shows.
const KEPT: usize = 150;
/// Longest line.
const WIDTH: usize = 240;

/// The trace of a run.
#[derive(Debug)]
pub struct Trace {
    lines: VecDeque<String>,
    hash: u64,
    count: u64,
    kept: usize,
    print: bool,
}

impl Default for Trace {
    fn default() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
        Self {
            lines: VecDeque::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            count: 0,
            kept: number("SIM_LINES").unwrap_or(KEPT),
            print: std::env::var_os("SIM_PRINT").is_some(),
        }
    }
}

impl Trace {
    /// Adds a line.
    pub fn add(&mut self, now: Time, who: &str, what: &str) {
        let mut line = format!("{:>14} {who} {what}", nanoseconds(now));
        if line.len() > WIDTH {
            line.truncate(WIDTH);
            line.push_str("...");
        }
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.count += 1;
        if super::replay::on_line(self.count) || self.print {
            eprintln!("{line}");
        }
        if self.lines.len() >= self.kept {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The hash over every line so far: the same for the same seed (LV-4).
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }

    /// Number of lines so far.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The last lines.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

fn nanoseconds(now: Time) -> String {
    format!("{}.{:06}ms", now.0 / 1_000_000, now.0 % 1_000_000)
}

/// A packet in a few words.
#[must_use]
pub fn packet_words(packet: &Packet) -> String {
    let name = packet.name();
    match packet {
        Packet::Data(h) | Packet::DataReply(h) | Packet::RsDataReply(h) => {
            format!(
                "{name} {}s +{} id={:#x} seq={} flags={:#x}",
                h.sector.0,
                h.len / 512,
                h.block_id.0,
                h.seq,
                h.flags.0
            )
        }
        Packet::Trim(h) | Packet::Zeroes(h) => {
            format!("{name} {}s +{} id={:#x} seq={}", h.sector.0, h.size / 512, h.block_id.0, h.seq)
        }
        Packet::DataRequest(r) | Packet::RsDataRequest(r) => {
            format!("{name} {}s +{} id={:#x}", r.sector.0, r.size / 512, r.block_id.0)
        }
        Packet::RecvAck(a)
        | Packet::WriteAck(a)
        | Packet::RsWriteAck(a)
        | Packet::NegAck(a)
        | Packet::NegDReply(a)
        | Packet::NegRsDReply(a) => {
            format!("{name} {}s +{} id={:#x} seq={}", a.sector.0, a.size / 512, a.block_id.0, a.seq)
        }
        Packet::Bitmap(bytes) => format!("{name} {} bytes", bytes.len()),
        Packet::CompressedBitmap(bitmap) => format!("{name} {} bytes", bitmap.code.len()),
        Packet::State(word) => {
            format!("{name} {}", state_words(*word))
        }
        other => format!("{name} {other:?}"),
    }
}

fn state_words(word: u32) -> String {
    match replication_core::state::State::from_word(word) {
        Ok(state) => format!("[{state}]"),
        Err(e) => format!("{word:#x} ({e})"),
    }
}

/// An event in a few words.
#[must_use]
pub fn event_words(event: &Event<'_>) -> String {
    match event {
        Event::Packet { sock, volume, packet, .. } => {
            format!("< {} vol {volume} on {}", packet_words(packet), sock.0)
        }
        Event::MetaRead { id, result } => match result {
            Ok(pages) => format!("< MetaRead {:?} {} pages", id.0, pages.len()),
            Err(e) => format!("< MetaRead {:?} {e}", id.0),
        },
        Event::MetaWritten { id, result, .. } => format!("< MetaWritten {:?} {result:?}", id.0),
        Event::Host(request) => format!(
            "< Host vol {} tag {} {:?} {}",
            request.volume.0, request.tag.0, request.op, request.range
        ),
        other => format!("< {other:?}"),
    }
}

/// An action in a few words.
#[must_use]
pub fn action_words(action: &Action) -> String {
    match action {
        Action::Send { sock, volume, packet, .. } => {
            format!("  > {} vol {volume} on {}", packet_words(packet), sock.0)
        }
        Action::MetaWrite { id, volume, sector, durable, .. } => {
            format!("  > MetaWrite {:?} vol {} {sector} durable={durable}", id.0, volume.0)
        }
        Action::Disk { id, volume, op, range, buf } => {
            format!("  > Disk {:?} vol {} {op:?} {range} {buf:?}", id.0, volume.0)
        }
        Action::Log { level, scope, text } => format!("  * {level:?} {scope:?}: {text}"),
        Action::Reply { id, result } => match result {
            Ok(replication_core::control::Reply::Status(_)) => format!("  > Reply {} status", id.0),
            other => format!("  > Reply {} {other:?}", id.0),
        },
        other => format!("  > {other:?}"),
    }
}
