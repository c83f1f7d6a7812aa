//! The second phase: everything is repaired, and both nodes become equal (RS-1, LV-1), or the run
//! says why not.

use replication_core::control::Command;
use replication_core::gi::{Compare, Outcome, PeerUuids, Uuids, compare};
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::{BlockRange, Span};

use super::Run;
use crate::sim::{A, B, World};

/// The longest that healing may take.
const HEALING: Span = Span::from_secs(900);

impl Run {
    /// The second phase: everything is repaired, and both nodes become equal.
    pub(super) fn heal(&mut self) {
        self.w.note(A, "=== healing begins");
        self.w.heal();
        for n in [A, B] {
            self.w.heal_disks(n);
            self.w.stop_load(n);
            self.w.nodes[n].damages_header = false;
            self.w.nodes[n].flips = None;
            if let Some(until) = self.w.nodes[n].frozen_until {
                self.w.run_for(Span(until.since(self.w.now).0 + 1_000));
            }
        }
        // What the cut link had held back, resets among it, arrives first.
        self.w.run_for(Span::from_secs(1));
        self.heard = [A, B].map(|n| self.w.nodes[n].log.len());
        let begin = self.w.now;
        let end = begin + HEALING;
        while !(self.w.is_synced() && self.w.is_quiet()) {
            let why = if self.w.now < end { String::new() } else { self.why_not() };
            assert!(why.is_empty(), "RS-1: the nodes do not become equal:{why}");
            self.help();
            if self.w.now.since(begin) > Span(HEALING.0 / 2)
                && self.w.is_alive(A)
                && self.w.is_alive(B)
            {
                self.take_what_is_left();
                self.separate();
            }
            self.w.run_for(Span::from_secs(1));
        }
        self.w.check_synced();
        // They may have become equal without a resync that was paused.
        for n in [A, B] {
            self.insist(n, Command::PauseSync(false));
        }
        self.use_once_more();
    }

    /// What a careful operator does to bring the nodes together.
    fn help(&mut self) {
        for n in [A, B] {
            if !self.w.is_alive(n) {
                self.w.boot(n);
                self.insist(n, Command::Up);
            }
            // An adjustment that met a dead node, or a refusal.
            self.take_options_over(n);
            self.insist(n, Command::PauseSync(false));
            for volume in 0..self.w.volumes() {
                if self.w.is_alive(n) && self.w.state(n, volume).disk == Disk::Diskless {
                    let nr = self.w.nodes[n].setup.config.volumes[volume].nr;
                    self.insist(n, Command::Attach(Some(nr)));
                }
            }
        }
        if ![A, B].iter().all(|n| self.w.is_alive(*n)) {
            return;
        }
        let split = [A, B].iter().any(|n| self.w.status(*n).split_brain);
        for n in [A, B] {
            // A Primary that lost its disk accepts only the data it has lost.
            let is_bare = self.w.state(n, 0).disk == Disk::Diskless;
            if is_bare && self.w.conn(n) < Conn::Connected && self.is_primary(n) {
                self.demote(n);
            }
        }
        let alone = [A, B].map(|n| self.w.is_alive(n) && self.w.conn(n) == Conn::StandAlone);
        if split && alone == [true, true] {
            self.choose_victim();
            return;
        }
        if alone == [true, true] {
            // No split brain, but a Primary refuses the peer, or its data.
            for n in [A, B] {
                self.demote(n);
            }
        }
        for n in [A, B] {
            if alone[n] && self.w.is_alive(n) {
                if self.asks_to_be_secondary(n) {
                    self.demote(n);
                }
                self.insist(n, Command::Connect { discard_my_data: false });
            }
        }
    }

    /// Whether a node has said, since it was listened to last, that only its role keeps it from
    /// taking the data of its peer. The peer may be waiting for it, not stand alone like it.
    fn asks_to_be_secondary(&mut self, n: usize) -> bool {
        let log = &self.w.nodes[n].log;
        let asks = log[self.heard[n]..].iter().any(|l| l.contains("make it Secondary first"));
        self.heard[n] = log.len();
        asks
    }

    /// A disk that the connected nodes refuse to attach has other data than the ones in use: what
    /// is to be done shows when both are apart. A resync that left blocks out begins again.
    fn separate(&mut self) {
        for n in [A, B] {
            if !self.w.is_alive(n) {
                continue;
            }
            let lacks = |w: &World, volume| {
                let state = w.state(n, volume);
                let has_ended = state.conn <= Conn::Connected && state.disk < Disk::UpToDate;
                state.disk < Disk::Inconsistent || has_ended
            };
            if (0..self.w.volumes()).any(|volume| lacks(&self.w, volume)) {
                self.w.note(n, "=== taken apart");
                self.demote(n);
            }
            let any_lacks = |w: &World| (0..w.volumes()).any(|volume| lacks(w, volume));
            if self.w.is_alive(n) && any_lacks(&self.w) {
                self.insist(n, Command::Disconnect { force: true });
            }
        }
    }

    /// No node has a good copy of a volume: disks of both have failed, which is more than can be
    /// stood. The operator takes what is left by force, and only that it is data of this place,
    /// equal on both nodes, can be asked for.
    fn take_what_is_left(&mut self) {
        let is_bad = |w: &World, volume| {
            [A, B].iter().all(|n| {
                let disk = w.state(*n, volume).disk;
                disk == Disk::Inconsistent || disk == Disk::Outdated
            })
        };
        if !(0..self.w.volumes()).any(|volume| is_bad(&self.w, volume)) {
            return;
        }
        let n = usize::from(self.w.stale[A].contains(&true));
        self.w.note(n, "=== no good copy is left: this one is taken by force");
        self.w.ledger.be_lenient();
        for volume in 0..self.w.volumes() {
            self.w.since_sync[volume].troubled = true;
            self.w.threw_away(1 - n, volume);
        }
        if self.is_primary(1 - n) {
            self.demote(1 - n);
        }
        self.w.must(n, Command::Primary { force: true });
        self.w.run_for(Span::from_secs(20));
    }

    /// Gives a command; a node that does not answer, because an earlier command waits for frozen
    /// requests that nobody will ever serve, is started anew.
    fn insist(&mut self, n: usize, command: Command) {
        let Some(id) = self.tell(n, command) else { return };
        for _ in 0..300 {
            if !self.w.is_alive(n) || self.w.reply(n, id).is_some() {
                return;
            }
            self.w.run_for(Span::from_ms(100));
        }
        self.w.note(n, "=== does not answer any more");
        self.w.kill(n);
    }

    /// Makes a node Secondary; one whose frozen requests nobody will ever serve is started anew.
    fn demote(&mut self, n: usize) {
        let id = self.w.tell(n, Command::Secondary { holder: None });
        self.w.run_for(Span::from_secs(5));
        let is_stuck = match self.w.reply(n, id) {
            None => true,
            Some(Ok(_)) => false,
            Some(Err(refusal)) => refusal.text.starts_with("requests wait"),
        };
        if is_stuck {
            self.w.kill(n);
        }
    }

    /// Split brain: the node without the acknowledged data gives its own up. What becomes of
    /// volumes whose histories have not parted does not depend on it.
    fn choose_victim(&mut self) {
        let parted: Vec<usize> =
            (0..self.w.volumes()).filter(|volume| has_parted(&self.w, *volume)).collect();
        let lacks =
            |w: &mut World, n: usize| parted.iter().any(|volume| !w.holds_everything(n, *volume));
        let victim = if lacks(&mut self.w, A) {
            A
        } else if lacks(&mut self.w, B) || parted.iter().any(|volume| self.w.stale[B][*volume]) {
            B
        } else {
            A
        };
        self.w.note(victim, "=== chosen as victim of the split brain");
        self.demote(victim);
        if !self.w.is_alive(victim) {
            return;
        }
        self.w.must(victim, Command::Connect { discard_my_data: true });
        self.w.must(1 - victim, Command::Connect { discard_my_data: false });
    }

    /// Everything still works.
    fn use_once_more(&mut self) {
        let primary = [A, B].into_iter().find(|n| self.is_primary(*n));
        let n = primary.unwrap_or(A);
        if primary.is_none() {
            self.w.must(n, Command::Primary { force: false });
        }
        for volume in 0..self.w.volumes() {
            self.w.read_all(n, volume);
            self.w.write(n, volume, 8, 8);
        }
        self.w.wait_synced();
    }

    /// What is missing, in words.
    fn why_not(&self) -> String {
        let mut why = String::new();
        let mut add = |words: String| {
            why.push_str("\n  - ");
            why.push_str(&words);
        };
        for n in [A, B] {
            let name = ["A", "B"][n];
            if !self.w.is_alive(n) {
                add(format!("node {name} has no process"));
                continue;
            }
            for volume in 0..self.w.volumes() {
                let state = self.w.state(n, volume);
                if state.conn != Conn::Connected || state.disk != Disk::UpToDate {
                    add(format!("node {name} volume {volume} is {state}"));
                }
                let status = &self.w.status(n).volumes[volume];
                let counts = [
                    ("requests of the host", status.upper_pending),
                    ("local operations", status.lower_pending),
                    ("requests waiting for the peer", status.pending),
                    ("requests of the peer", status.unacked),
                    ("KiB marked", status.out_of_sync_kib),
                ];
                for (what, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
                    add(format!("node {name} volume {volume}: {count} {what}"));
                }
            }
            let node = &self.w.nodes[n];
            for words in node.host.words(self.w.now) {
                add(format!("the host of node {name} waits for {words}"));
            }
            if node.jobs() > 0 {
                add(format!("node {name}: {} disk operations under way", node.jobs()));
            }
        }
        for (volume, blocks) in self.w.differing.iter().enumerate() {
            for block in blocks.iter().take(5) {
                let marked = [A, B].map(|n| is_marked(&self.w, n, volume, *block));
                add(format!("volume {volume} block {block} differs; marked by A, B: {marked:?}"));
            }
        }
        add(format!("{} bytes are on the way", self.w.net.bytes_on_the_way()));
        why
    }
}

/// Whether the generations of both nodes say that each has written what the other one lacks.
fn has_parted(w: &World, volume: usize) -> bool {
    let [own, peer] = [A, B].map(|n| Uuids::from_slots(w.status(n).volumes[volume].uuids));
    let peer = PeerUuids { uuids: peer, ..PeerUuids::default() };
    let comparison = compare(&Compare {
        own: &own,
        own_crashed: false,
        own_role: Role::Secondary,
        own_resolver: true,
        peer: &peer,
        peer_crashed: false,
        peer_role: Role::Secondary,
        agreed_version: 101,
        wsame_feature: true,
    });
    matches!(comparison.outcome, Outcome::SplitBrain { .. })
}

fn is_marked(w: &World, n: usize, volume: usize, block: u64) -> bool {
    let range = BlockRange { start: block, end: block + 1 };
    let volume = replication_core::event::VolumeIx(u8::try_from(volume).expect("few volumes"));
    let resource = w.nodes[n].resource.as_ref();
    resource.is_some_and(|resource| resource.out_of_sync_in(volume, range) > 0)
}
