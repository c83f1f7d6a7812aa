//! What a run has met, counted: did the generator reach everything?
//!
//! Counts are kept by family (packet, state, rule, action, fault, ...). For every family the names
//! that could occur are known, so that a table shows what never happened. What the core does not
//! speak (because it refuses or does not offer it) is listed apart with its reason.

use std::collections::BTreeMap;

use replication_core::action::{Action, DiskOp, Handler};
use replication_core::event::{Event, HostOp};
use replication_core::state::{Conn, Disk, Role};
use replication_core::wire::Command as PacketType;

/// What is counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Packets sent.
    Packet,
    /// Connection and replication states entered by a volume.
    Connection,
    /// Disk states entered.
    Disk,
    /// Roles entered.
    Role,
    /// Rules of the comparison of generation identifiers that decided.
    Rule,
    /// Actions of the core.
    Action,
    /// Events that the core was told.
    Event,
    /// Requests of hosts.
    Request,
    /// Commands of operators, and how they ended.
    Command,
    /// Faults.
    Fault,
    /// Checks that were held.
    Check,
}

impl Family {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Packet,
        Self::Connection,
        Self::Disk,
        Self::Role,
        Self::Rule,
        Self::Action,
        Self::Event,
        Self::Request,
        Self::Command,
        Self::Fault,
        Self::Check,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Connection => "connection",
            Self::Disk => "disk",
            Self::Role => "role",
            Self::Rule => "rule",
            Self::Action => "action",
            Self::Event => "event",
            Self::Request => "request",
            Self::Command => "command",
            Self::Fault => "fault",
            Self::Check => "check",
        }
    }

    /// The family with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }
}

/// Rules that can decide a comparison (section 9.4 of the protocol notes).
const RULES: [&str; 21] = [
    "10", "20", "30", "34", "35", "36", "37", "40", "41", "50", "51", "52", "53", "60", "70", "71",
    "72", "73", "80", "90", "100",
];

/// Actions of the core, one name each.
const ACTIONS: [&str; 25] = [
    "OpenDisk",
    "ProbeDisk",
    "CloseDisk",
    "Disk read",
    "Disk write",
    "Disk write FUA",
    "Disk flush",
    "Disk discard",
    "Disk zeroes",
    "MetaRead",
    "MetaWrite",
    "MetaWrite durable",
    "Listen",
    "Dial",
    "Close",
    "Complete",
    "SetSize",
    "Reply",
    "Handler local-io-error",
    "Handler initial-split-brain",
    "Handler split-brain",
    "Handler pri-on-incon-degr",
    "Handler after-resync-target",
    "Stop",
    "Leave",
];

/// Events for the core, one name each.
const EVENTS: [&str; 14] = [
    "Tick",
    "Host",
    "DiskDone",
    "DiskDone error",
    "DiskOpened",
    "MetaRead",
    "MetaRead error",
    "MetaWritten",
    "MetaWritten error",
    "DialDone",
    "Accepted",
    "Packet",
    "Sent",
    "SockGone",
];

/// Requests of hosts, one name each.
const REQUESTS: [&str; 6] = ["Read", "Write", "Write FUA", "Flush", "Discard", "WriteZeroes"];

/// Counters by family and name.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<(Family, String), u64>,
}

impl Coverage {
    /// One more of these.
    pub fn add(&mut self, family: Family, name: &str) {
        self.add_many(family, name, 1);
    }

    /// Some more of these.
    pub fn add_many(&mut self, family: Family, name: &str, count: u64) {
        // Most names are there already: no string is made for them.
        let key = (family, String::from(name));
        *self.counts.entry(key).or_default() += count;
    }

    /// How often.
    #[must_use]
    pub fn count(&self, family: Family, name: &str) -> u64 {
        self.counts.get(&(family, String::from(name))).copied().unwrap_or(0)
    }

    /// Every counter.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &str, u64)> {
        self.counts.iter().map(|((family, name), count)| (*family, name.as_str(), *count))
    }

    /// Adds the counters of another run.
    pub fn merge(&mut self, other: &Self) {
        for (family, name, count) in other.iter() {
            self.add_many(family, name, count);
        }
    }

    /// Names of the family that could have occurred and did not.
    #[must_use]
    pub fn missing(&self, family: Family) -> Vec<String> {
        let never = |name: &String| self.count(family, name) == 0;
        expected(family).into_iter().filter(never).collect()
    }
}

fn expected(family: Family) -> Vec<String> {
    let own = |names: &[&str]| names.iter().map(|name| String::from(*name)).collect();
    match family {
        Family::Packet => PacketType::ALL.iter().map(|kind| String::from(kind.name())).collect(),
        Family::Connection => Conn::ALL.iter().map(|conn| String::from(conn.name())).collect(),
        Family::Disk => Disk::ALL.iter().map(|disk| String::from(disk.name())).collect(),
        Family::Role => Role::ALL.iter().map(|role| String::from(role.name())).collect(),
        Family::Rule => own(&RULES),
        Family::Action => own(&ACTIONS),
        Family::Event => own(&EVENTS),
        Family::Request => own(&REQUESTS),
        Family::Fault => crate::random::fault_names(),
        Family::Command | Family::Check => Vec::new(),
    }
}

/// The name of an action; sends are counted as packets, log lines not at all.
#[must_use]
pub const fn action_name(action: &Action) -> Option<&'static str> {
    Some(match action {
        Action::OpenDisk { .. } => "OpenDisk",
        Action::ProbeDisk { .. } => "ProbeDisk",
        Action::CloseDisk { .. } => "CloseDisk",
        Action::Disk { op, .. } => match op {
            DiskOp::Read => "Disk read",
            DiskOp::Write { fua: false } => "Disk write",
            DiskOp::Write { fua: true } => "Disk write FUA",
            DiskOp::Flush => "Disk flush",
            DiskOp::Discard => "Disk discard",
            DiskOp::Zeroes { .. } => "Disk zeroes",
        },
        Action::MetaRead { .. } => "MetaRead",
        Action::MetaWrite { durable: false, .. } => "MetaWrite",
        Action::MetaWrite { durable: true, .. } => "MetaWrite durable",
        Action::Listen(_) => "Listen",
        Action::Dial { .. } => "Dial",
        Action::Close { .. } => "Close",
        Action::Complete { .. } => "Complete",
        Action::SetSize { .. } => "SetSize",
        Action::Reply { .. } => "Reply",
        Action::RunHandler { handler, .. } => match handler {
            Handler::LocalIoError => "Handler local-io-error",
            Handler::InitialSplitBrain => "Handler initial-split-brain",
            Handler::SplitBrain => "Handler split-brain",
            Handler::PriOnInconDegr => "Handler pri-on-incon-degr",
            Handler::AfterResyncTarget => "Handler after-resync-target",
        },
        Action::Stop => "Stop",
        Action::Leave => "Leave",
        Action::Send { .. } | Action::Log { .. } => return None,
    })
}

/// The name of an event; commands are counted with their answers.
#[must_use]
pub const fn event_name(event: &Event<'_>) -> Option<&'static str> {
    Some(match event {
        Event::Tick => "Tick",
        Event::Host(_) => "Host",
        Event::DiskDone { result: Ok(()), .. } => "DiskDone",
        Event::DiskDone { result: Err(_), .. } => "DiskDone error",
        Event::DiskOpened { .. } => "DiskOpened",
        Event::MetaRead { result: Ok(_), .. } => "MetaRead",
        Event::MetaRead { result: Err(_), .. } => "MetaRead error",
        Event::MetaWritten { result: Ok(()), .. } => "MetaWritten",
        Event::MetaWritten { result: Err(_), .. } => "MetaWritten error",
        Event::DialDone { .. } => "DialDone",
        Event::Accepted { .. } => "Accepted",
        Event::Packet { .. } => "Packet",
        Event::Sent { .. } => "Sent",
        Event::SockGone { .. } => "SockGone",
        Event::Command { .. } => return None,
    })
}

/// The name of a host's request.
#[must_use]
pub const fn request_name(op: HostOp) -> &'static str {
    match op {
        HostOp::Read => "Read",
        HostOp::Write { fua: false } => "Write",
        HostOp::Write { fua: true } => "Write FUA",
        HostOp::Flush => "Flush",
        HostOp::Discard => "Discard",
        HostOp::WriteZeroes { .. } => "WriteZeroes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What occurred is not missing, what could occur and did not is.
    #[test]
    fn missing_names_are_listed() {
        let mut coverage = Coverage::default();
        let all = coverage.missing(Family::Role).len();
        coverage.add(Family::Role, Role::Primary.name());
        let missing = coverage.missing(Family::Role);
        assert_eq!(missing.len() + 1, all);
        assert!(!missing.iter().any(|name| name == Role::Primary.name()));
    }
}
