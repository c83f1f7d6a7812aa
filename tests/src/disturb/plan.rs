//! Which fault comes next, and where: drawn from a seed, independent of any socket.

use std::fmt;
use std::time::Duration;

use replication_core::wire::Stream;

use super::frames::{Span, is_checked};
use crate::sim::rng::Rng;

/// Longer than a silent peer is waited for: `ping-int` and `ping-timeout` of the test, and some.
const STALL_MS: (u64, u64) = (1800, 3000);
/// Shorter than `ping-timeout`.
const PAUSE_MS: (u64, u64) = (10, 350);

/// Which side of a connection hears of a reset; the other one sees an orderly end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Whoever dialed.
    Caller,
    /// Whoever was dialed.
    Callee,
    /// Both.
    Both,
}

/// Which bits may be flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Those whose change is noticed or has no meaning; see [`super::frames`].
    Checked,
    /// Bulk data.
    Payload,
    /// All.
    Any,
}

/// What can happen to one direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends without a word.
    Reset(Ends),
    /// This direction ends, the other one stays.
    HalfClose {
        /// What still comes is thrown away; else it is left in the socket.
        drain: bool,
    },
    /// Bytes come one by one for a while.
    Trickle {
        /// How many.
        bytes: u32,
    },
    /// Nothing passes for a while.
    Stall {
        /// For how long.
        time: Duration,
        /// In both directions of this connection; else only in this one.
        both: bool,
    },
    /// A bit changes.
    Flip(Class),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(ends) => write!(f, "reset of {ends:?}"),
            Self::HalfClose { drain } => write!(f, "half close, drain {drain}"),
            Self::Trickle { bytes } => write!(f, "trickle of {bytes} bytes"),
            Self::Stall { time, both } => write!(f, "stall of {time:?}, both {both}"),
            Self::Flip(class) => write!(f, "flip of {class:?}"),
        }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Resets.
    Reset,
    /// Half closes.
    HalfClose,
    /// Trickles.
    Trickle,
    /// Stalls shorter than the ping timeout.
    Pause,
    /// Stalls longer than it.
    Stall,
    /// Flipped bits that are noticed.
    FlipChecked,
    /// Flipped bits of any kind.
    FlipAny,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Reset,
        Self::HalfClose,
        Self::Trickle,
        Self::Pause,
        Self::Stall,
        Self::FlipChecked,
        Self::FlipAny,
    ];

    fn fault(self, rng: &mut Rng) -> Fault {
        let time = |rng: &mut Rng, (low, high)| Duration::from_millis(rng.between(low, high));
        match self {
            Self::Reset => Fault::Reset(match rng.below(4) {
                0 => Ends::Caller,
                1 => Ends::Callee,
                _ => Ends::Both,
            }),
            Self::HalfClose => Fault::HalfClose { drain: rng.chance(50) },
            Self::Trickle => {
                let bytes = u32::try_from(rng.between(1, 400)).expect("a small number");
                Fault::Trickle { bytes }
            }
            Self::Pause => Fault::Stall { time: time(rng, PAUSE_MS), both: rng.chance(50) },
            Self::Stall => Fault::Stall { time: time(rng, STALL_MS), both: rng.chance(70) },
            Self::FlipChecked => Fault::Flip(Class::Checked),
            Self::FlipAny => Fault::Flip(Class::Any),
        }
    }
}

/// A fault and its place.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// Which.
    pub kind: Kind,
    /// What happens.
    pub fault: Fault,
    /// After this many bytes of the direction.
    pub at: u64,
    /// At the latest after this time; a flip waits for its byte.
    pub within: Duration,
}

/// The kinds of faults at work, which take turns.
#[derive(Clone, Debug, Default)]
pub struct Mix {
    kinds: Vec<Kind>,
    turn: usize,
}

impl Mix {
    /// These kinds.
    #[must_use]
    pub fn of(kinds: &[Kind]) -> Self {
        Self { kinds: kinds.to_vec(), turn: 0 }
    }

    /// The next fault of a direction that has passed `passed` bytes.
    pub fn draw(&mut self, rng: &mut Rng, passed: u64) -> Option<Due> {
        if self.kinds.is_empty() {
            return None;
        }
        let kind = self.kinds[self.turn % self.kinds.len()];
        self.turn += 1;
        // As many places in the first hundred bytes as in the next hundred thousand: the packets
        // of a handshake are few and small.
        let reach = 1 << rng.between(2, 20);
        let at = passed + rng.between(1, reach);
        let within = Duration::from_millis(rng.between(50, 2500));
        Some(Due { kind, fault: kind.fault(rng), at, within })
    }
}

/// A bit of a chunk that a flip of `class` may change: the byte's index, and the bit.
pub fn pick_bit(
    class: Class,
    stream: Stream,
    spans: &[Span],
    rng: &mut Rng,
) -> Option<(usize, u8)> {
    const TRIES: u32 = 200;
    let count = u64::try_from(spans.len()).ok().filter(|count| *count > 0)?;
    for _ in 0..TRIES {
        let span = &spans[usize::try_from(rng.below(count)).ok()?];
        let length = u64::try_from(span.at.len()).ok()?;
        // The heads of packets are small and interesting.
        let within = if class == Class::Payload { length } else { length.min(40) };
        let into = if rng.chance(90) { rng.below(within) } else { rng.below(length) };
        let bit = u8::try_from(rng.below(8)).expect("eight bits");
        let offset = span.offset + into;
        let fits = match class {
            Class::Checked => is_checked(stream, &span.head, offset, bit),
            Class::Payload => span.head.is_payload(offset),
            Class::Any => true,
        };
        if fits {
            return Some((span.at.start + usize::try_from(into).ok()?, bit));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disturb::frames::Frames;

    /// Flips go where their class says, and nowhere if there is no such place.
    #[test]
    fn bits_are_picked_by_class() {
        let mut bytes = vec![0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0, 0, 0, 2, 24, 0, 0, 0, 0];
        bytes.resize(16 + 24 + 512, 1);
        let spans = Frames::default().take(&bytes);
        let mut rng = Rng::new(1);
        for _ in 0..1000 {
            let (at, _) = pick_bit(Class::Payload, Stream::Data, &spans, &mut rng).unwrap();
            assert!((40..bytes.len()).contains(&at));
            let (at, bit) = pick_bit(Class::Checked, Stream::Data, &spans, &mut rng).unwrap();
            assert!(at < 40 && !(8..12).contains(&at) && !(16..24).contains(&at), "{at}.{bit}");
        }
        assert_eq!(pick_bit(Class::Payload, Stream::Data, &spans[..1], &mut rng), None);
    }

    /// A seed says everything.
    #[test]
    fn a_seed_draws_the_same_faults() {
        let draw = |seed| {
            let mut mix = Mix::of(&Kind::ALL);
            let mut rng = Rng::new(seed);
            (0..50).map(|_| format!("{:?}", mix.draw(&mut rng, 0))).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
