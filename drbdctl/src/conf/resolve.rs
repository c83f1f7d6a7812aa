//! What one node has to know about one resource: inheritance applied, defaults filled in.
//!
//! Layers, from the weakest: `common`, the resource (which includes its template), the
//! connection, the volume of the resource, the volume of the host, the volume of the connection.
//! Rules: the inheritance section of the notes on the user's surface.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::PathBuf;

use super::ast::{
    Address, Connection, Device, End, Host, HostKind, MetaPlace, Resource, Scope, Setting, Value,
    Volume,
};
use super::error::{Fault, Outcome, Problem};
use super::options::{DiskOptions, Layers, NetOptions, ResourceOptions, StartupOptions};
use super::source::Loc;

/// Where the metadata of a volume are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaDisk {
    /// At the end of the backing disk.
    Internal,
    /// On a device of their own.
    Flexible(PathBuf),
    /// In a numbered slot of 128 MiB on a shared device.
    Indexed(PathBuf, u32),
}

/// A volume as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeView {
    /// Volume number.
    pub nr: u16,
    /// Minor number of the device.
    pub minor: u32,
    /// Path of the device.
    pub device: String,
    /// Backing disk; none = diskless.
    pub disk: Option<PathBuf>,
    /// Metadata.
    pub meta_disk: MetaDisk,
    /// Options of disk and resync.
    pub options: DiskOptions,
}

/// A resource as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Name of the resource.
    pub resource: String,
    /// Name in the host section of this node; the address and port of a floating one.
    pub node: String,
    /// Name of the peer; none for a floating one, which is known by its address alone.
    pub peer: Option<String>,
    /// Where this node listens and connects from.
    pub local: SocketAddr,
    /// Interface of `local`, if it is link-local and the interface was given by name. The caller
    /// turns it into a scope id.
    pub local_interface: Option<String>,
    /// Where the peer listens.
    pub remote: SocketAddr,
    /// Node ids of this node and of the peer, where given.
    pub node_ids: (Option<u32>, Option<u32>),
    /// Volumes by number.
    pub volumes: Vec<VolumeView>,
    /// Options of the connection.
    pub net: NetOptions,
    /// Options of the resource.
    pub options: ResourceOptions,
    /// Options of waiting at boot.
    pub startup: StartupOptions,
    /// Command lines by handler name.
    pub handlers: BTreeMap<String, String>,
    /// File of the resource.
    pub file: PathBuf,
    /// Line of the resource, from 1.
    pub line: usize,
}

/// A volume of a host, with what it inherits from the resource.
#[derive(Debug)]
pub(crate) struct Merged<'a> {
    pub(crate) nr: u16,
    pub(crate) device: &'a Device,
    /// Path and place, if there is a disk.
    pub(crate) disk: Option<(&'a str, Loc)>,
    /// Whether a statement said so, or nothing was said.
    pub(crate) is_disk_given: bool,
    /// Place and statement; none = internal by default.
    pub(crate) meta: Option<(&'a MetaPlace, Loc)>,
    pub(crate) at: Loc,
    of_resource: Option<&'a Volume>,
    of_host: Option<&'a Volume>,
}

/// Whether two names mean the same host: equal in either case, or equal in the first part if at
/// least one is not fully qualified.
#[must_use]
pub fn is_same_host(a: &str, b: &str) -> bool {
    let first = |name: &str| name.split('.').next().unwrap_or("").to_owned();
    match a.contains('.') && b.contains('.') {
        true => a.eq_ignore_ascii_case(b),
        false => first(a).eq_ignore_ascii_case(&first(b)),
    }
}

/// The name of a host section: its first name, or the address of a floating one.
pub(crate) fn label(host: &Host) -> String {
    match (host.names.first(), &host.address) {
        (Some(name), _) => name.text.clone(),
        (None, Some(address)) => socket(address).to_string(),
        (None, None) => "?".to_owned(),
    }
}

/// The keyword and name of a host section, for messages.
pub(crate) fn scope_name(host: &Host) -> String {
    match &host.kind {
        HostKind::On => format!("on {}", label(host)),
        HostKind::Floating => format!("floating {}", label(host)),
        HostKind::Stacked(lower) => format!("stacked-on-top-of {lower}"),
    }
}

/// The address for the system. A scope that is no number is left to the caller.
pub(crate) fn socket(address: &Address) -> SocketAddr {
    match address.ip {
        IpAddr::V4(ip) => SocketAddr::V4(SocketAddrV4::new(ip, address.port)),
        IpAddr::V6(ip) => {
            let scope = address.scope.as_ref().and_then(|scope| scope.parse().ok()).unwrap_or(0);
            SocketAddr::V6(SocketAddrV6::new(ip, address.port, 0, scope))
        }
    }
}

/// Whether the section is for the host of that name.
pub(crate) fn is_named(host: &Host, name: &str) -> bool {
    host.names.iter().any(|own| is_same_host(&own.text, name))
        || (host.kind == HostKind::Floating && label(host) == name)
}

/// The volumes of a host by number.
///
/// # Errors
/// If one has no device, or there is none.
pub(crate) fn volumes<'a>(resource: &'a Resource, host: &'a Host) -> Outcome<Vec<Merged<'a>>> {
    let missing = |at: Loc| {
        let scope = scope_name(host);
        let name = resource.name.text.clone();
        Fault::new(at, Problem::Missing { resource: name, scope, keyword: "device" })
    };
    let mut pairs: BTreeMap<u16, (Option<&Volume>, Option<&Volume>)> = BTreeMap::new();
    for volume in &resource.volumes {
        pairs.entry(volume.nr).or_default().0 = Some(volume);
    }
    for volume in &host.volumes {
        pairs.entry(volume.nr).or_default().1 = Some(volume);
    }
    if pairs.is_empty() {
        return Err(missing(host.at));
    }
    let mut merged = Vec::new();
    for (nr, (of_resource, of_host)) in pairs {
        let layers = || [of_host, of_resource].into_iter().flatten();
        let at = layers().next().map_or(host.at, |volume| volume.at);
        let device = layers().find_map(|volume| volume.device.as_ref());
        let device = device.ok_or_else(|| missing(at))?;
        let disk = layers().find_map(|volume| volume.disk.as_ref());
        let meta = layers().find_map(|volume| volume.meta.as_ref());
        merged.push(Merged {
            nr,
            device,
            disk: disk.and_then(|disk| Some((disk.path.as_deref()?, disk.at))),
            is_disk_given: disk.is_some(),
            meta: meta.map(|meta| (&meta.place, meta.at)),
            at,
            of_resource,
            of_host,
        });
    }
    Ok(merged)
}

/// The connection between two hosts, if one was written.
pub(crate) fn connection<'a>(
    resource: &'a Resource,
    one: &Host,
    other: &Host,
) -> Option<&'a Connection> {
    resource.connections.iter().find(|connection| {
        let ends = ends_of(connection);
        ends.iter().any(|end| is_named(one, &end.host.text))
            && ends.iter().any(|end| is_named(other, &end.host.text))
    })
}

/// The two ends of a connection: its own, or those of its first path.
pub(crate) fn ends_of(connection: &Connection) -> &[End] {
    match (connection.ends.is_empty(), connection.paths.first()) {
        (true, Some((ends, _))) => ends,
        (true, None) | (false, _) => &connection.ends,
    }
}

/// The address of a host in a connection.
///
/// # Errors
/// If there is none.
pub(crate) fn address(
    resource: &Resource,
    connection: Option<&Connection>,
    host: &Host,
) -> Outcome<Address> {
    let paths = connection.iter().flat_map(|connection| &connection.paths).take(1);
    let ends = connection.iter().flat_map(|connection| &connection.ends);
    let mut ends = ends.chain(paths.flat_map(|(ends, _)| ends));
    let given = ends.find(|end| {
        is_named(host, &end.host.text) && (end.address.is_some() || end.port.is_some())
    });
    let found = match given {
        None => host.address.clone(),
        Some(End { address: Some(address), .. }) => Some(address.clone()),
        Some(End { address: None, port, .. }) => host
            .address
            .clone()
            .map(|address| Address { port: port.unwrap_or(address.port), ..address }),
    };
    found.ok_or_else(|| {
        let name = resource.name.text.clone();
        let scope = scope_name(host);
        Fault::new(host.at, Problem::Missing { resource: name, scope, keyword: "address" })
    })
}

/// The options of the connection between two hosts.
pub(crate) fn net_layers<'a>(
    common: &'a Scope,
    resource: &'a Resource,
    connection: Option<&'a Connection>,
) -> Layers<'a> {
    let layers = Layers::default().over(&common.net).over(&resource.scope.net);
    match connection {
        Some(connection) => layers.over(&connection.net),
        None => layers,
    }
}

/// The options of a volume.
fn disk_layers<'a>(
    common: &'a Scope,
    resource: &'a Resource,
    connection: Option<&'a Connection>,
    merged: &Merged<'a>,
) -> Layers<'a> {
    const NONE: &[Setting] = &[];
    let of_volume = |volume: Option<&'a Volume>| volume.map_or(NONE, |v| v.disk_options.as_slice());
    let of_connection = connection.map_or(NONE, |connection| connection.disk.as_slice());
    let layers = Layers::default().over(&common.disk).over(&resource.scope.disk);
    let layers = layers.over(of_connection);
    let layers = layers.over(of_volume(merged.of_resource)).over(of_volume(merged.of_host));
    let volumes = connection.iter().flat_map(|connection| &connection.volumes);
    let own = volumes.filter(|(nr, _)| *nr == merged.nr);
    own.fold(layers, |layers, (_, settings)| layers.over(settings))
}

/// The host section of this node: by name, exact spelling first; a floating one by address.
pub(crate) fn local_host<'a>(
    resource: &'a Resource,
    node: &str,
    addresses: &[IpAddr],
) -> Option<&'a Host> {
    if resource.ignored_on.iter().any(|name| is_same_host(&name.text, node)) {
        return None;
    }
    let hosts = &resource.hosts;
    let exact = |host: &&Host| host.names.iter().any(|n| n.text.eq_ignore_ascii_case(node));
    let floats = |host: &&Host| {
        let ip = host.address.as_ref().map(|address| address.ip);
        host.kind == HostKind::Floating && ip.is_some_and(|ip| addresses.contains(&ip))
    };
    let by_name = hosts.iter().find(exact);
    let by_name = by_name.or_else(|| hosts.iter().find(|host| is_named(host, node)));
    by_name.or_else(|| hosts.iter().find(floats))
}

/// Refuses what two nodes cannot be.
fn check_two_nodes(resource: &Resource) -> Outcome<()> {
    for host in &resource.hosts {
        match host.kind {
            HostKind::On | HostKind::Floating => {}
            HostKind::Stacked(_) => {
                let what = "stacked-on-top-of".to_owned();
                return Err(Fault::new(host.at, Problem::NotAvailable { what }).help(format!(
                    "resource {} is stacked; only resources on two plain nodes can be used",
                    resource.name.text
                )));
            }
        }
    }
    let count = resource.hosts.len();
    if count == 2 {
        return Ok(());
    }
    let what = format!("{count} host sections, exactly two nodes can share a resource");
    let name = resource.name.text.clone();
    let fault = Fault::new(resource.name.at, Problem::Inconsistent { resource: name, what });
    Err(match count {
        0 | 1 => fault.help("add an 'on HOST { ... }' section for each node"),
        _ => fault.help("three and more nodes are not available yet"),
    })
}

/// The resource as the node sees it. `defined_at` is its file and line.
pub(crate) fn node_view(
    common: &Scope,
    resource: &Resource,
    node: &str,
    addresses: &[IpAddr],
    (file, line): (PathBuf, usize),
) -> Outcome<NodeView> {
    let name = resource.name.text.clone();
    // A stacked resource has no names of hosts at all; say so rather than "not defined".
    if resource.hosts.iter().any(|host| matches!(host.kind, HostKind::Stacked(_))) {
        check_two_nodes(resource)?;
    }
    let Some(host) = local_host(resource, node, addresses) else {
        return Err(Fault::nowhere(Problem::NotDefined { resource: name }));
    };
    check_two_nodes(resource)?;
    let peer = resource.hosts.iter().find(|other| other.at != host.at);
    let peer = peer.expect("two host sections stand at two places");
    let connection = connection(resource, host, peer);
    let own = host.names.iter().find(|own| is_same_host(&own.text, node));
    let local = address(resource, connection, host)?;
    let remote = address(resource, connection, peer)?;
    let mut views = Vec::new();
    for merged in volumes(resource, host)? {
        let layers = disk_layers(common, resource, connection, &merged);
        views.push(volume_view(&merged, &layers));
    }
    let options = Layers::default().over(&common.options).over(&resource.scope.options);
    let startup = Layers::default().over(&common.startup).over(&resource.scope.startup);
    Ok(NodeView {
        resource: name,
        node: own.map_or_else(|| label(host), |own| own.text.clone()),
        peer: peer.names.first().map(|name| name.text.clone()),
        local: socket(&local),
        local_interface: local.scope.filter(|scope| scope.parse::<u32>().is_err()),
        remote: socket(&remote),
        node_ids: (host.node_id.map(|(id, _)| id), peer.node_id.map(|(id, _)| id)),
        volumes: views,
        net: NetOptions::new(&net_layers(common, resource, connection)),
        options: ResourceOptions::new(&options.over(&host.options)),
        startup: StartupOptions::new(&startup),
        handlers: handlers(common, resource),
        file,
        line,
    })
}

/// The volume as the node sees it.
fn volume_view(merged: &Merged<'_>, layers: &Layers<'_>) -> VolumeView {
    VolumeView {
        nr: merged.nr,
        minor: merged.device.minor,
        device: merged.device.path.clone(),
        disk: merged.disk.map(|(path, _)| PathBuf::from(path)),
        meta_disk: match merged.meta {
            None | Some((MetaPlace::Internal, _)) => MetaDisk::Internal,
            Some((MetaPlace::Flexible(path), _)) => MetaDisk::Flexible(PathBuf::from(path)),
            Some((MetaPlace::Indexed(path, index), _)) => {
                MetaDisk::Indexed(PathBuf::from(path), *index)
            }
        },
        options: DiskOptions::new(layers),
    }
}

/// The handlers of a resource; an empty command line takes an inherited one away.
fn handlers(common: &Scope, resource: &Resource) -> BTreeMap<String, String> {
    let mut handlers = BTreeMap::new();
    for setting in common.handlers.iter().chain(&resource.scope.handlers) {
        match &setting.value {
            Value::Text(command) if command.is_empty() => {
                handlers.remove(setting.spec.name);
            }
            Value::Text(command) => {
                handlers.insert(setting.spec.name.to_owned(), command.clone());
            }
            Value::Flag(_) | Value::Number(_) | Value::List(_) => {
                unreachable!("the table says that handlers are text")
            }
        }
    }
    handlers
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Short and full names, in either case.
    #[test]
    fn host_names() {
        let table = [
            ("alice", "alice", true),
            ("Alice", "aLICE", true),
            ("alice", "alice.example.org", true),
            ("ALICE.example.org", "alice", true),
            ("alice.example.org", "Alice.Example.Org", true),
            ("alice.example.org", "alice.example.com", false),
            ("alice", "bob", false),
            ("alice", "", false),
        ];
        for (a, b, expected) in table {
            assert_eq!(is_same_host(a, b), expected, "{a} and {b}");
        }
    }
}
