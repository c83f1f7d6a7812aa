//! The status as JSON.
//!
//! **Shape**: an array of resources with the keys, in the order, of section 9.3 of the notes on the
//! user's surface; no key is ever left out, apart from the figures of a resync that does not run.
//! Sizes are KiB; `rs-*` are sectors and ms; rates are MiB/s with two decimals.
//!
//! Written by hand: the order of keys and the two decimals are part of the interface, and both
//! would be lost on the way through a tree of values.

use std::fmt::Write;
use std::net::SocketAddr;

use replication_core::control::{ResyncStatus, Status, VolumeStatus};

use super::progress;
use super::text::{NodeIds, is_client, suspended};

/// All resources.
#[must_use]
pub fn resources(all: &[(Status, NodeIds)]) -> String {
    let all: Vec<String> = all.iter().map(|(status, ids)| resource(status, *ids)).collect();
    if all.is_empty() {
        return "[\n]\n".to_owned();
    }
    format!("[\n{}\n]\n", all.join(",\n"))
}

/// The members of an object, one on each line.
struct Members {
    indent: usize,
    lines: Vec<String>,
}

impl Members {
    fn new(indent: usize) -> Self {
        Self { indent, lines: Vec::new() }
    }

    fn raw(&mut self, key: &str, value: impl std::fmt::Display) {
        self.lines.push(format!("{:1$}{key}: {value}", "", self.indent + 2, key = quoted(key)));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.raw(key, quoted(value));
    }

    /// `[ {..}, {..} ]`, the bracket behind the last object.
    fn list(&mut self, key: &str, items: &[String]) {
        if items.is_empty() {
            return self.raw(key, "[]");
        }
        self.raw(key, format_args!("[\n{} ]", items.join(",\n")));
    }

    fn object(self) -> String {
        let pad = " ".repeat(self.indent);
        format!("{pad}{{\n{}\n{pad}}}", self.lines.join(",\n"))
    }
}

/// A string of JSON.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                write!(out, "\\u{:04x}", u32::from(c)).expect("a string takes it");
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn resource(status: &Status, ids: NodeIds) -> String {
    let mut members = Members::new(0);
    members.text("name", &status.name);
    members.raw("node-id", ids.0);
    members.text("role", &status.role);
    members.raw("suspended", suspended(status) != "no");
    members.raw("suspended-user", status.suspended_user);
    members.raw("suspended-no-data", status.suspended_no_data);
    members.raw("suspended-fencing", status.suspended_fencing);
    // There is no quorum and there are no forced failures: these two can only be false.
    members.raw("suspended-quorum", false);
    members.raw("force-io-failures", false);
    members.text("write-ordering", &status.write_ordering);
    let devices: Vec<String> = status.volumes.iter().map(device).collect();
    members.list("devices", &devices);
    members.list("connections", &[connection(status, ids)]);
    members.object()
}

fn device(volume: &VolumeStatus) -> String {
    let mut members = Members::new(4);
    members.raw("volume", volume.nr);
    members.raw("minor", volume.minor);
    members.text("disk-state", &volume.disk);
    members.raw("client", is_client(volume));
    members.raw("open", volume.open);
    // Without a quorum nothing is ever lost to it.
    members.raw("quorum", true);
    members.raw("size", volume.size_kib);
    members.raw("read", volume.read_kib);
    members.raw("written", volume.written_kib);
    members.raw("al-writes", volume.al_writes);
    members.raw("bm-writes", volume.bm_writes);
    members.raw("upper-pending", volume.upper_pending);
    members.raw("lower-pending", volume.lower_pending);
    members.object()
}

fn connection(status: &Status, ids: NodeIds) -> String {
    let mut members = Members::new(4);
    members.raw("peer-node-id", ids.1);
    members.text("name", &status.peer);
    members.text("connection-state", &status.connection);
    // There is no Ahead/Behind mode that would report congestion, and no TLS.
    members.raw("congested", false);
    members.text("peer-role", &status.peer_role);
    members.raw("tls", false);
    members.raw("ap-in-flight", status.ap_in_flight);
    members.raw("rs-in-flight", status.rs_in_flight);
    members.list("paths", &path(status).into_iter().collect::<Vec<_>>());
    let devices: Vec<String> = status.volumes.iter().map(peer_device).collect();
    members.list("peer_devices", &devices);
    members.object()
}

/// The two addresses; none if the engine did not give both.
fn path(status: &Status) -> Option<String> {
    let end = |text: &str| {
        let address: SocketAddr = text.parse().ok()?;
        let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        let ip = quoted(&address.ip().to_string());
        let port = address.port();
        Some(format!("{{ \"address\": {ip}, \"port\": {port}, \"family\": \"{family}\" }}"))
    };
    let mut members = Members::new(8);
    members.raw("this_host", end(&status.local)?);
    members.raw("remote_host", end(&status.remote)?);
    members.raw("established", status.connection == "Connected");
    Some(members.object())
}

fn peer_device(volume: &VolumeStatus) -> String {
    let mut members = Members::new(8);
    members.raw("volume", volume.nr);
    members.text("replication-state", &volume.replication);
    members.text("peer-disk-state", &volume.peer_disk);
    // The protocol does not tell whether a peer without a disk is meant to have none.
    members.raw("peer-client", false);
    members.text("resync-suspended", &volume.resync_suspended);
    members.raw("received", volume.received_kib);
    members.raw("sent", volume.sent_kib);
    members.raw("out-of-sync", volume.out_of_sync_kib);
    members.raw("pending", volume.pending);
    members.raw("unacked", volume.unacked);
    members.raw("has-sync-details", volume.resync.is_some());
    // There is no online verify.
    members.raw("has-online-verify-details", false);
    members.raw("percent-in-sync", progress::in_sync(volume));
    if let Some(resync) = &volume.resync {
        sync_details(resync, &mut members);
    }
    members.object()
}

/// The engine measures one window; it stands for both of the short and the long one.
fn sync_details(resync: &ResyncStatus, members: &mut Members) {
    let rate = progress::window_rate(resync);
    members.raw("rs-total", resync.total_sectors);
    members.raw("rs-dt-start-ms", resync.elapsed_ms);
    members.raw("rs-paused-ms", resync.paused_ms);
    members.raw("rs-dt0-ms", resync.window_ms);
    members.raw("rs-db0-sectors", resync.window_sectors);
    members.raw("rs-dt1-ms", resync.window_ms);
    members.raw("rs-db1-sectors", resync.window_sectors);
    members.raw("rs-failed", resync.failed_sectors);
    // There is no resync by checksums.
    members.raw("rs-same-csum", 0);
    members.raw("want", progress::wanted_rate(resync));
    members.raw("db0/dt0 [MiB/s]", rate);
    members.raw("db1/dt1 [MiB/s]", rate);
    members.raw("estimated-seconds-to-finish", progress::eta_seconds(resync).unwrap_or(0));
    members.raw("db/dt [MiB/s]", progress::average_rate(resync));
    members.raw("percent-resync-done", progress::resync_done(resync));
}
