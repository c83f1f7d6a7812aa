//! Rules that hold between statements: uniqueness on a host, both ends of a connection, options
//! that contradict each other.
//!
//! Everything here runs once, after all files are read, so that an error in the section of the
//! other node is found on this one. Resources that cannot be used (stacked, more than two nodes)
//! are checked as far as they can be, and refused when they are used.
//! Rules: the list of checks in the notes on the user's surface.

use std::collections::BTreeMap;

use super::ast::{Address, Host, HostKind, MetaPlace, Resource, Scope, Setting, Value};
use super::error::{Fault, Outcome, Problem, Warning};
use super::options::NetOptions;
use super::resolve;
use super::source::{Loc, Sources};
use super::table::DISCARD_NODE;

/// What has been used and where first.
#[derive(Debug, Default)]
struct Used {
    places: BTreeMap<(&'static str, String), Loc>,
}

impl Used {
    /// Notes a use.
    ///
    /// # Errors
    /// If it is the second.
    fn claim(&mut self, what: &'static str, key: String, at: Loc) -> Outcome<()> {
        match self.places.insert((what, key.clone()), at) {
            None => Ok(()),
            Some(first) => Err(Fault::new(at, Problem::Conflict { what, key }).first(first)),
        }
    }

    /// The place of an earlier use.
    fn first(&self, what: &'static str, key: &str) -> Option<Loc> {
        self.places.get(&(what, key.to_owned())).copied()
    }
}

/// Checks the whole configuration; adds warnings.
pub(crate) fn check(
    common: &Scope,
    resources: &[Resource],
    sources: &Sources,
    warnings: &mut Vec<Warning>,
) -> Outcome<()> {
    let mut used = Used::default();
    for resource in resources {
        let name = &resource.name;
        used.claim("resource name", name.text.clone(), name.at)?;
    }
    for resource in resources {
        check_hosts(resource)?;
        check_connections(resource)?;
        check_volumes(resource, sources, warnings)?;
        claim_addresses(resource, &mut used)?;
        for host in &resource.hosts {
            claim_devices(resource, host, &mut used)?;
        }
        check_net(common, resource, sources, warnings)?;
        warn_resync_after(resource, resources, sources, warnings);
    }
    for resource in resources {
        for host in &resource.hosts {
            check_meta_apart(resource, host, &used)?;
        }
    }
    Ok(())
}

/// The names under which things of a host are unique.
fn keys(host: &Host) -> Vec<String> {
    match &host.kind {
        HostKind::On => host.names.iter().map(|name| name.text.to_ascii_lowercase()).collect(),
        HostKind::Floating => host.address.iter().map(|address| address.ip.to_string()).collect(),
        // It runs wherever the lower resource is Primary.
        HostKind::Stacked(_) => Vec::new(),
    }
}

/// A host has one section in a resource.
fn check_hosts(resource: &Resource) -> Outcome<()> {
    let mut used = Used::default();
    for host in &resource.hosts {
        for name in &host.names {
            let key = format!("{}:{}", resource.name.text, name.text.to_ascii_lowercase());
            used.claim("host section", key, name.at)?;
        }
    }
    Ok(())
}

/// The hosts of a connection have sections; a pair has one connection; its ends differ.
fn check_connections(resource: &Resource) -> Outcome<()> {
    let name = &resource.name.text;
    let mut used = Used::default();
    for connection in &resource.connections {
        let paths = connection.paths.iter().flat_map(|(ends, _)| ends);
        for end in connection.ends.iter().chain(paths) {
            if !resource.hosts.iter().any(|host| resolve::is_named(host, &end.host.text)) {
                let what = format!("no 'on' section for host '{}'", end.host.text);
                let problem = Problem::Inconsistent { resource: name.clone(), what };
                return Err(Fault::new(end.host.at, problem));
            }
        }
        let mut pair: Vec<String> =
            resolve::ends_of(connection).iter().map(|end| end.host.text.clone()).collect();
        pair.sort();
        used.claim("connection", format!("{name}:{}", pair.join(":")), connection.at)?;
    }
    if let [one, other] = resource.hosts.as_slice() {
        let is_plain = |host: &Host| !matches!(host.kind, HostKind::Stacked(_));
        if is_plain(one) && is_plain(other) {
            let connection = resolve::connection(resource, one, other);
            let one = resolve::address(resource, connection, one)?;
            let other = resolve::address(resource, connection, other)?;
            if (one.ip, one.port) == (other.ip, other.port) {
                let what = format!("both nodes have the address {}", resolve::socket(&other));
                let problem = Problem::Inconsistent { resource: name.clone(), what };
                return Err(Fault::new(other.at, problem));
            }
            if one.ip.is_ipv4() != other.ip.is_ipv4() {
                let what = "one node has an IPv4 and the other an IPv6 address".to_owned();
                let problem = Problem::Inconsistent { resource: name.clone(), what };
                return Err(Fault::new(other.at, problem));
            }
        }
    }
    Ok(())
}

/// Every volume is on every host and has a device. A missing disk is told.
fn check_volumes(
    resource: &Resource,
    sources: &Sources,
    warnings: &mut Vec<Warning>,
) -> Outcome<()> {
    let mut all: BTreeMap<u16, Loc> = BTreeMap::new();
    let mut of_hosts = Vec::new();
    for host in &resource.hosts {
        if matches!(host.kind, HostKind::Stacked(_)) {
            continue;
        }
        let volumes = resolve::volumes(resource, host)?;
        for volume in &volumes {
            all.entry(volume.nr).or_insert(volume.at);
            if !volume.is_disk_given {
                let label = resolve::label(host);
                let text = format!("volume {} on {label} has no disk, it is diskless", volume.nr);
                warnings.push(Warning::new(sources, volume.at, text));
            }
        }
        of_hosts.push((host, volumes));
    }
    for (host, volumes) in &of_hosts {
        for (nr, at) in &all {
            if !volumes.iter().any(|volume| volume.nr == *nr) {
                let what = format!("volume {nr} not defined on {}", resolve::label(host));
                let name = resource.name.text.clone();
                return Err(Fault::new(*at, Problem::Inconsistent { resource: name, what }));
            }
        }
    }
    Ok(())
}

/// The addresses of a resource, each once.
fn addresses(resource: &Resource) -> Outcome<Vec<Address>> {
    let mut found: Vec<Address> = Vec::new();
    for (n, host) in resource.hosts.iter().enumerate() {
        if matches!(host.kind, HostKind::Stacked(_)) {
            continue;
        }
        let others = resource.hosts.iter().enumerate().filter(|(m, _)| *m != n);
        let connections = others.filter_map(|(_, peer)| resolve::connection(resource, host, peer));
        let mut of_host = Vec::new();
        for connection in connections {
            of_host.push(resolve::address(resource, Some(connection), host)?);
        }
        if of_host.is_empty() {
            of_host.push(resolve::address(resource, None, host)?);
        }
        found.extend(of_host);
    }
    found.sort_by_key(resolve::socket);
    found.dedup_by_key(|address| resolve::socket(address));
    found.sort_by_key(|address| address.at);
    Ok(found)
}

/// An address and port belong to one resource.
fn claim_addresses(resource: &Resource, used: &mut Used) -> Outcome<()> {
    for address in addresses(resource)? {
        let mut key = resolve::socket(&address).to_string();
        if let Some(scope) = &address.scope {
            key = format!("{key}%{scope}");
        }
        used.claim("IP", key, address.at)?;
    }
    Ok(())
}

/// Minor numbers, device paths, disks and metadata slots belong to one volume of a host.
fn claim_devices(resource: &Resource, host: &Host, used: &mut Used) -> Outcome<()> {
    let keys = keys(host);
    if keys.is_empty() {
        return Ok(());
    }
    for volume in resolve::volumes(resource, host)? {
        let device = volume.device;
        for key in &keys {
            let minor = format!("device-minor:{key}:{}", device.minor);
            used.claim("device-minor", minor, device.at)?;
            used.claim("device", format!("device:{key}:{}", device.path), device.at)?;
            if let Some((path, at)) = volume.disk {
                used.claim("disk", format!("disk:{key}:{path}"), at)?;
            }
            let meta = match volume.meta {
                Some((MetaPlace::Flexible(path), at)) => Some((path.clone(), at)),
                Some((MetaPlace::Indexed(path, index), at)) => {
                    Some((format!("{path}[{index}]"), at))
                }
                Some((MetaPlace::Internal, _)) | None => None,
            };
            if let Some((slot, at)) = meta {
                used.claim("meta-disk", format!("meta-disk:{key}:{slot}"), at)?;
            }
        }
    }
    Ok(())
}

/// Metadata of one volume are never written over the data of another, nor a whole device of
/// metadata over a slot.
fn check_meta_apart(resource: &Resource, host: &Host, used: &Used) -> Outcome<()> {
    let keys = keys(host);
    if keys.is_empty() {
        return Ok(());
    }
    for volume in resolve::volumes(resource, host)? {
        let (path, at) = match volume.meta {
            Some((MetaPlace::Flexible(path) | MetaPlace::Indexed(path, _), at)) => (path, at),
            Some((MetaPlace::Internal, _)) | None => continue,
        };
        for key in &keys {
            let disk = format!("disk:{key}:{path}");
            if let Some(first) = used.first("disk", &disk) {
                let problem = Problem::Conflict { what: "disk", key: disk };
                return Err(Fault::new(at, problem)
                    .first(first)
                    .help("metadata here would be written over the data of that disk"));
            }
            let whole = format!("meta-disk:{key}:{path}");
            let is_slot = matches!(volume.meta, Some((MetaPlace::Indexed(..), _)));
            if let (true, Some(first)) = (is_slot, used.first("meta-disk", &whole)) {
                let problem = Problem::Conflict { what: "meta-disk", key: whole };
                return Err(Fault::new(at, problem)
                    .first(first)
                    .help("the other volume uses the whole device for its metadata"));
            }
        }
    }
    Ok(())
}

/// Options of a connection that need each other.
fn check_net(
    common: &Scope,
    resource: &Resource,
    sources: &Sources,
    warnings: &mut Vec<Warning>,
) -> Outcome<()> {
    let connections: Vec<_> = match resource.connections.as_slice() {
        [] => vec![None],
        some => some.iter().map(Some).collect(),
    };
    let name = &resource.name;
    for connection in connections {
        let layers = resolve::net_layers(common, resource, connection);
        if let Some(Setting { value: Value::Text(text), at, .. }) = layers.get("after-sb-0pri") {
            let host = text.strip_prefix(DISCARD_NODE);
            let is_known = |host: &str| resource.hosts.iter().any(|h| resolve::is_named(h, host));
            let is_policy = super::options::AfterSb0Choice::from_name(text).is_some();
            if let (false, Some(host)) = (is_policy, host.filter(|host| !is_known(host))) {
                let what = format!("after-sb-0pri names the host '{host}', which has no section");
                let problem = Problem::Inconsistent { resource: name.text.clone(), what };
                return Err(Fault::new(*at, problem));
            }
        }
        let net = NetOptions::new(&layers);
        let mut tell = |text: String| {
            warnings.push(Warning::new(
                sources,
                name.at,
                format!("in resource {}: {text}", name.text),
            ));
        };
        for (option, seconds) in [("ping-int", net.ping_int_s), ("connect-int", net.connect_int_s)]
        {
            if net.timeout_tenths >= seconds * 10 {
                let tenths = net.timeout_tenths;
                tell(format!(
                    "timeout {tenths} (tenths) is not below {option} {seconds} (seconds)"
                ));
            }
        }
        match (&net.cram_hmac_alg, &net.shared_secret) {
            (Some(_), None) => {
                tell("cram-hmac-alg without shared-secret authenticates nobody".into())
            }
            (None, Some(_)) => tell("shared-secret has no effect without cram-hmac-alg".into()),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
    Ok(())
}

/// A `resync-after` that names nothing is told.
fn warn_resync_after(
    resource: &Resource,
    all: &[Resource],
    sources: &Sources,
    warnings: &mut Vec<Warning>,
) {
    let of_hosts = resource.hosts.iter().flat_map(|host| &host.volumes);
    let volumes = resource.volumes.iter().chain(of_hosts);
    let settings = volumes.flat_map(|volume| &volume.disk_options).chain(&resource.scope.disk);
    for setting in settings.filter(|setting| setting.spec.name == "resync-after") {
        let Value::Text(text) = &setting.value else { continue };
        let target = text.split('/').next().unwrap_or("");
        if target != "-1" && !all.iter().any(|other| other.name.text == target) {
            let text = format!("resync-after names '{target}', which is no resource");
            warnings.push(Warning::new(sources, setting.at, text));
        }
    }
}
