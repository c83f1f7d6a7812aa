//! The status as plain text.
//!
//! **Shape**: two blanks of indent for each level, words `key:value`, an empty line behind each
//! resource. What is as it should be is left out unless the operator wants everything. Long
//! lines continue with four blanks more than their object has (sections 9.1 and 9.2 of the
//! notes on the user's surface).
//!
//! Words about things that this implementation does not have (quorum, TLS, forced I/O failures)
//! appear with the value that says so, because tools expect them.

use std::fmt::Write;

use replication_core::control::{Status, VolumeStatus};

use super::progress;

/// Columns behind the indent after which a line continues below.
const LINE_MAX: usize = 81;

/// What to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Show {
    /// Also what is as it should be.
    pub verbose: bool,
    /// Counters.
    pub statistics: bool,
    /// Colours.
    pub color: bool,
}

/// Node ids of this node and of the peer.
pub type NodeIds = (u32, u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    None,
    Primary,
    Good,
    PeerGood,
    Bad,
}

impl Paint {
    const fn code(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Primary => Some("1;36"),
            Self::Good => Some("1;32"),
            Self::PeerGood => Some("32"),
            Self::Bad => Some("1;31"),
        }
    }
}

/// Collects the words of one object and breaks its lines.
struct Line<'a> {
    out: &'a mut String,
    color: bool,
    indent: usize,
    /// Columns used behind the indent; zero at the start of a line.
    used: usize,
}

impl<'a> Line<'a> {
    fn new(out: &'a mut String, show: Show, indent: usize) -> Self {
        out.extend(std::iter::repeat_n(' ', indent));
        Self { out, color: show.color, indent, used: 0 }
    }

    fn word(&mut self, word: &str) {
        self.pair("", word, Paint::None);
    }

    fn pair(&mut self, key: &str, value: &str, paint: Paint) {
        let colon = usize::from(!key.is_empty());
        let len = key.chars().count() + colon + value.chars().count();
        if self.used > 0 && self.used + 1 + len > LINE_MAX {
            self.next();
        }
        if self.used > 0 {
            self.out.push(' ');
            self.used += 1;
        }
        self.used += len;
        self.out.push_str(key);
        if colon > 0 {
            self.out.push(':');
        }
        match paint.code().filter(|_| self.color) {
            Some(code) => {
                write!(self.out, "\x1b[{code}m{value}\x1b[0m").expect("a string takes it");
            }
            None => self.out.push_str(value),
        }
    }

    fn plain(&mut self, key: &str, value: &str) {
        self.pair(key, value, Paint::None);
    }

    fn number(&mut self, key: &str, value: u64) {
        self.pair(key, &value.to_string(), Paint::None);
    }

    /// Continues below.
    fn next(&mut self) {
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(' ', self.indent + 4));
        self.used = 0;
    }

    fn end(self) {
        self.out.push('\n');
    }
}

/// The status of a resource.
#[must_use]
pub fn status(status: &Status, ids: NodeIds, show: Show) -> String {
    let mut out = String::new();
    resource_line(status, ids, show, &mut out);
    for volume in &status.volumes {
        device_line(status, volume, show, &mut out);
    }
    connection_line(status, ids, show, &mut out);
    if is_connected(status) || show.verbose {
        for volume in &status.volumes {
            peer_device_line(status, volume, show, &mut out);
        }
    }
    out.push('\n');
    out
}

fn is_connected(status: &Status) -> bool {
    status.connection == "Connected"
}

/// Whether volumes have to be told apart.
fn has_volumes(status: &Status) -> bool {
    !matches!(status.volumes.as_slice(), [only] if only.nr == 0)
}

/// Why I/O is suspended, `no` if it is not.
#[must_use]
pub fn suspended(status: &Status) -> String {
    let reasons = [
        (status.suspended_user, "user"),
        (status.suspended_no_data, "no-data"),
        (status.suspended_fencing, "fencing"),
    ];
    let reasons: Vec<&str> = reasons.iter().filter(|(is, _)| *is).map(|(_, why)| *why).collect();
    if reasons.is_empty() { "no".to_owned() } else { reasons.join(",") }
}

/// Whether a volume has no disk because none is configured.
#[must_use]
pub fn is_client(volume: &VolumeStatus) -> bool {
    volume.disk == "Diskless" && volume.backing.is_empty()
}

fn role_paint(role: &str) -> Paint {
    if role == "Primary" { Paint::Primary } else { Paint::None }
}

fn disk_paint(disk: &str, good: Paint, is_client: bool) -> Paint {
    match disk {
        "UpToDate" => good,
        "Consistent" | "Attaching" | "Negotiating" | "Detaching" => Paint::None,
        "Diskless" if is_client => Paint::None,
        _ => Paint::Bad,
    }
}

fn resource_line(status: &Status, ids: NodeIds, show: Show, out: &mut String) {
    let mut line = Line::new(out, show, 0);
    line.word(&status.name);
    if show.verbose {
        line.number("node-id", ids.0.into());
    }
    line.pair("role", &status.role, role_paint(&status.role));
    let suspended = suspended(status);
    if suspended != "no" {
        line.pair("suspended", &suspended, Paint::Bad);
    } else if show.verbose {
        line.plain("suspended", "no");
    }
    if show.verbose {
        line.plain("force-io-failures", "no");
    }
    if show.statistics {
        line.next();
        line.plain("write-ordering", &status.write_ordering);
    }
    line.end();
}

fn device_line(status: &Status, volume: &VolumeStatus, show: Show, out: &mut String) {
    let mut line = Line::new(out, show, 2);
    if show.verbose || has_volumes(status) {
        line.number("volume", volume.nr.into());
    }
    if show.verbose {
        line.number("minor", volume.minor.into());
    }
    let is_client = is_client(volume);
    line.pair("disk", &volume.disk, disk_paint(&volume.disk, Paint::Good, is_client));
    if volume.disk == "Diskless" {
        line.plain("client", yes_no(is_client));
    }
    if show.verbose {
        let backing = if volume.backing.is_empty() { "none" } else { &volume.backing };
        line.plain("backing_dev", backing);
        line.plain("quorum", "yes");
    }
    line.plain("open", yes_no(volume.open));
    if show.statistics {
        line.next();
        line.number("size", volume.size_kib);
        line.number("read", volume.read_kib);
        line.number("written", volume.written_kib);
        line.number("al-writes", volume.al_writes);
        line.number("bm-writes", volume.bm_writes);
        line.number("upper-pending", volume.upper_pending);
        line.number("lower-pending", volume.lower_pending);
        line.plain("al-suspended", "no");
        line.plain("blocked", "no");
    }
    line.end();
}

fn connection_line(status: &Status, ids: NodeIds, show: Show, out: &mut String) {
    let mut line = Line::new(out, show, 2);
    line.word(&status.peer);
    if show.verbose {
        line.number("node-id", ids.1.into());
    }
    if !is_connected(status) {
        line.pair("connection", &status.connection, Paint::Bad);
    } else if show.verbose {
        line.plain("connection", &status.connection);
    }
    if is_connected(status) || show.verbose {
        line.pair("role", &status.peer_role, role_paint(&status.peer_role));
    }
    if show.verbose {
        line.plain("tls", "no");
        line.plain("congested", "no");
    }
    if show.statistics {
        line.next();
        line.number("ap-in-flight", status.ap_in_flight);
        line.number("rs-in-flight", status.rs_in_flight);
    }
    line.end();
}

fn peer_device_line(status: &Status, volume: &VolumeStatus, show: Show, out: &mut String) {
    let mut line = Line::new(out, show, 4);
    if show.verbose || has_volumes(status) {
        line.number("volume", volume.nr.into());
    }
    if show.verbose || volume.replication != "Established" {
        line.plain("replication", &volume.replication);
    }
    let paint = disk_paint(&volume.peer_disk, Paint::PeerGood, false);
    line.pair("peer-disk", &volume.peer_disk, paint);
    if let Some(resync) = &volume.resync {
        line.plain("done", &progress::resync_done(resync).to_string());
    }
    if volume.resync_suspended != "no" {
        line.pair("resync-suspended", &volume.resync_suspended, Paint::Bad);
    } else if show.verbose {
        line.plain("resync-suspended", "no");
    }
    if show.statistics {
        line.next();
        line.number("received", volume.received_kib);
        line.number("sent", volume.sent_kib);
        line.number("out-of-sync", volume.out_of_sync_kib);
        line.number("pending", volume.pending);
        line.number("unacked", volume.unacked);
        if let Some(resync) = &volume.resync {
            line.plain("dbdt1", &progress::window_rate(resync).to_string());
            if let Some(eta) = progress::eta_seconds(resync) {
                line.number("eta", eta);
            }
        }
    }
    line.end();
}

const fn yes_no(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}
