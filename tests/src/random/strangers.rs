//! Somebody who is not the peer connects: noise, crowds, half packets, versions that nobody has,
//! a wrong secret.
//!
//! Without a secret whoever speaks the protocol is the peer, so a stranger who does has to fail at
//! something: there he offers versions that do not exist. What he is told is watched by
//! [`crate::sim::stranger`]; here it is seen that nothing of the node changes by him (WP-2), that
//! it still answers, and that it does not keep what is silent for ever (WP-1): one that stands
//! where the peer's would be waits, as the protocol has it, until the peer takes its place.
//!
//! The protocol authenticates the data socket alone. Who connects from the peer's address while the
//! peer does so as well, and is first with `P_INITIAL_META`, has the other socket, and nothing can
//! be promised then. So strangers try that only while the peer's process is dead.

use replication_core::units::{Span, VolumeNr};
use replication_core::wire::{
    Agreed, Command, Features, FeaturesPacket, HeaderKind, HmacAlg, Packet, auth, encode, features,
};

use super::{Kind, Run};
use crate::fuzz::Bytes;
use crate::fuzz::peer::{framed, packet};
use crate::sim::A;
use crate::sim::disk::Disk;
use crate::sim::node::Backing;
use crate::sim::stranger::Call;

/// Connections of a crowd.
const CROWD: u64 = 40;
/// A node has given up on a silent connection after this time.
const LONG: Span = Span::from_secs(60);

fn early(packet: &Packet) -> Vec<u8> {
    let mut out = Vec::new();
    encode(packet, VolumeNr(0), &Agreed::NOTHING, HeaderKind::H80, &mut out);
    out
}

/// The body of the packet of this type in what was heard.
fn body_of(heard: &[u8], command: Command) -> Option<&[u8]> {
    let mut rest = heard;
    while !rest.is_empty() {
        let head = crate::disturb::frames::Head::parse(rest)?;
        let end = head.size + usize::try_from(head.length).ok()?;
        let body = rest.get(head.size..end)?;
        if head.kind() == Some(command) {
            return Some(body);
        }
        rest = &rest[end..];
    }
    None
}

impl Run {
    pub(super) fn meet_stranger(&mut self) {
        let n = self.any_node();
        if self.rng.chance(50) {
            // Whoever is connected does not listen.
            self.w.note(A, "=== every stream is reset");
            self.w.net.reset_all(self.w.now);
        }
        for _ in 0..self.rng.below(100) {
            self.w.step();
        }
        if !self.is_ready(n) || !self.w.nodes[n].is_listening || self.w.net.is_cut() {
            return;
        }
        self.count(Kind::Stranger);
        self.w.note(n, "=== a stranger connects to this node");
        let before = self.untouched(n);
        let has_secret = self.w.nodes[n].setup.config.net.auth.is_some();
        let calls = match self.rng.below(6) {
            0 => self.noise(n),
            1 => self.crowd(n),
            2 => self.half_packets(n),
            3 | 4 if has_secret => self.wrong_secret(n),
            _ => self.wrong_version(n),
        };
        let is_silent_for_long = self.rng.chance(20);
        let time = if is_silent_for_long { LONG } else { Span(self.rng.below(3_000_000_000)) };
        self.w.run_for(time);
        if let (Some(before), Some(after)) = (before, self.untouched(n)) {
            assert!(before == after, "WP-2: {before:?} became {after:?} by a stranger");
        }
        if self.is_ready(n) {
            assert!(self.w.status(n).volumes.len() == self.w.volumes(), "it answers");
            let kept = calls.iter().filter(|call| self.w.is_kept(call)).count();
            assert!(!is_silent_for_long || kept <= 1, "WP-1: {kept} strangers are kept for ever");
        }
        calls.iter().for_each(|call| self.w.hang_up(call));
    }

    /// What no stranger changes, if nobody else is there to change it.
    fn untouched(&self, n: usize) -> Option<String> {
        let has_load = self.w.nodes[n].host.load.is_some();
        // What is still to be written when a connection ends may meet it.
        let has_faults = |backing: &Backing| {
            backing.data.has_faults() || backing.meta.as_ref().is_some_and(Disk::has_faults)
        };
        let is_alone = self.is_ready(n)
            && !self.w.is_alive(1 - n)
            && !has_load
            && self.w.is_quiet()
            && !self.w.nodes[n].backing.iter().any(has_faults);
        is_alone.then(|| {
            let volumes = self.w.status(n).volumes;
            let volumes = volumes.iter().enumerate().map(|(volume, status)| {
                let state = self.w.state(n, volume);
                (state.role, state.disk, status.uuids, status.out_of_sync_kib)
            });
            format!("{:?}", volumes.collect::<Vec<_>>())
        })
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let length = self.rng.between(1, most);
        (0..length).map(|_| self.rng.next().to_le_bytes()[0]).collect()
    }

    fn noise(&mut self, n: usize) -> Vec<Call> {
        let mut calls = Vec::new();
        for _ in 0..self.rng.between(1, 8) {
            let Some(mut call) = self.w.call(n) else { break };
            if self.rng.chance(50) {
                let as_meta = self.rng.chance(50) && !self.w.is_alive(1 - n);
                let first = if as_meta { Packet::InitialMeta } else { Packet::InitialData };
                self.w.say(&mut call, early(&first));
            }
            let bytes = self.bytes(5000);
            self.w.say(&mut call, bytes);
            calls.push(call);
            let time = self.rng.below(2_000_000);
            self.w.run_for(Span(time));
        }
        calls
    }

    /// Many connections that say nothing, or the same.
    fn crowd(&mut self, n: usize) -> Vec<Call> {
        let mut calls = Vec::new();
        for _ in 0..self.rng.between(2, CROWD) {
            let Some(mut call) = self.w.call(n) else { break };
            if self.rng.chance(30) {
                self.w.say(&mut call, early(&Packet::InitialData));
            }
            calls.push(call);
            if self.rng.chance(20) {
                self.w.run_for(Span(300_000));
            }
        }
        calls
    }

    /// Two connections that begin as the peer's would, or one of them and one that is silent; what
    /// was heard on the first one.
    fn pair(&mut self, n: usize) -> Option<([Call; 2], Vec<u8>)> {
        let mut calls = [self.w.call(n)?, self.w.call(n)?];
        self.w.say(&mut calls[0], early(&Packet::InitialData));
        if !self.w.is_alive(1 - n) {
            self.w.say(&mut calls[1], early(&Packet::InitialMeta));
        }
        self.w.run_for(Span::from_ms(20));
        let heard = self.w.hear(&calls[0]);
        Some((calls, heard))
    }

    /// Beginnings of packets, and packets that announce a lot.
    fn half_packets(&mut self, n: usize) -> Vec<Call> {
        let Some((mut calls, _)) = self.pair(n) else { return Vec::new() };
        let command = usize::try_from(self.rng.next() % Command::ALL.len() as u64).expect("few");
        let mut half = framed(Command::ALL[command], 0, &[]);
        half[8..12].fill(0xff);
        half.truncate(usize::try_from(self.rng.between(1, 16)).expect("small"));
        let on = usize::from(self.rng.chance(50));
        self.w.say(&mut calls[on], half);
        if self.rng.chance(50) {
            let more = self.bytes(3000);
            self.w.say(&mut calls[on], more);
        }
        calls.to_vec()
    }

    /// Versions that nobody has, and packets that come too early.
    fn wrong_version(&mut self, n: usize) -> Vec<Call> {
        let Some((mut calls, _)) = self.pair(n) else { return Vec::new() };
        let (low, high) = if self.rng.chance(50) { (1, 85) } else { (110, 121) };
        let offers =
            FeaturesPacket { protocol_min: low, features: Features::OURS, protocol_max: high };
        let first = match self.rng.below(3) {
            0 => framed(Command::Data, 0, &[0; 64]),
            1 => self.bytes(500),
            _ => early(&Packet::ConnectionFeatures(offers)),
        };
        self.w.say(&mut calls[0], first);
        self.babble(&mut calls[0]);
        calls.to_vec()
    }

    /// A wrong answer, the node's own challenge, and everything that comes behind the secret.
    fn wrong_secret(&mut self, n: usize) -> Vec<Call> {
        let Some((mut calls, _)) = self.pair(n) else { return Vec::new() };
        self.w.say(&mut calls[0], early(&Packet::ConnectionFeatures(features::ours())));
        self.w.run_for(Span::from_ms(20));
        let heard = self.w.hear(&calls[0]);
        let theirs = body_of(&heard, Command::AuthChallenge).unwrap_or(&[]).to_vec();
        let own: Vec<u8> = (0..64).map(|_| self.rng.next().to_le_bytes()[0]).collect();
        let reflects = self.rng.chance(30);
        let challenge = if reflects { &theirs } else { &own };
        self.w.say(&mut calls[0], framed(Command::AuthChallenge, 0, challenge));
        self.w.run_for(Span::from_ms(20));
        let heard = self.w.hear(&calls[0]);
        let guess = match self.rng.below(3) {
            0 => auth::respond(HmacAlg::Sha256, b"another secret", &theirs).to_vec(),
            // What the node answers to the stranger's challenge, said back to it.
            1 => body_of(&heard, Command::AuthResponse).unwrap_or(&own).to_vec(),
            _ => self.bytes(64),
        };
        self.w.say(&mut calls[0], framed(Command::AuthResponse, 0, &guess));
        self.babble(&mut calls[0]);
        calls.to_vec()
    }

    /// Goes on as if everything had been right.
    fn babble(&mut self, call: &mut Call) {
        for _ in 0..20 {
            let bytes = self.bytes(300);
            self.w.say(call, packet(&mut Bytes(&bytes)));
        }
    }
}
