//! From the configuration as this node sees it to what an engine has to know.
//!
//! The words of the configuration language meet the words of the core here, and nowhere else.
//! What the engine cannot do is refused, never dropped.

use std::net::SocketAddr;
use std::path::Path;

use replication_core::config::{
    Authentication, BackingConfig, DiskConfig, EngineConfig, Frontend, HandlersConfig, NbdAddress,
    NetConfig, OnIoError, RateConfig, ResourceConfig, VolumeConfig,
};
use replication_core::meta::MetaKind;
use replication_core::split_brain;
use replication_core::state::{Fencing, OnNoData};
use replication_core::units::{Sector, Span, VolumeNr};
use replication_core::wire::{HmacAlg, ReplicationProtocol};

use crate::conf::{self, MetaDisk, NodeView, VolumeView, is_same_host};
use crate::exit::{self, Failure};

/// The configuration of the engine for a resource, which was read from the file `main` and those
/// that it includes.
///
/// # Errors
/// If the engine has nothing that corresponds to a setting, or a path is no text.
pub fn engine_config(
    view: &NodeView,
    run_dir: &Path,
    main: &Path,
) -> Result<EngineConfig, Failure> {
    let name = &view.resource;
    let run_dir = text(name, run_dir)?;
    let volumes = view.volumes.iter().map(|volume| volume_config(name, volume));
    let backing = view.volumes.iter().map(|volume| backing_config(name, volume));
    let resource = ResourceConfig {
        name: name.clone(),
        peer: view.peer.clone().unwrap_or_else(|| view.remote.to_string()),
        net: net_config(view)?,
        on_no_data: match view.options.on_no_data_accessible {
            conf::OnNoDataAccessible::IoError => OnNoData::IoError,
            conf::OnNoDataAccessible::SuspendIo => OnNoData::SuspendIo,
        },
        volumes: volumes.collect::<Result<_, _>>()?,
    };
    Ok(EngineConfig {
        resource,
        node: view.node.clone(),
        backing: backing.collect::<Result<_, _>>()?,
        handlers: handlers(view, main)?,
        local: local_address(view)?,
        remote: view.remote,
        frontend: frontend(view, &run_dir)?,
        queue_depth: view.options.queue_depth,
        max_io_size: view.options.max_io_size_bytes,
        run_dir,
    })
}

/// The handlers that the engine runs, and what they find in their environment besides what names
/// the volume: the variables of today and those of 8.x.
fn handlers(view: &NodeView, main: &Path) -> Result<HandlersConfig, Failure> {
    let family = |address: SocketAddr| if address.is_ipv4() { "ipv4" } else { "ipv6" };
    let main = std::path::absolute(main).unwrap_or_else(|_| main.to_owned());
    let peer = view.peer.clone().unwrap_or_else(|| view.remote.to_string());
    let mut environment = vec![
        ("DRBD_CONF".to_owned(), text(&view.resource, &main)?),
        ("DRBD_PEER".to_owned(), peer.clone()),
        ("DRBD_PEERS".to_owned(), peer.clone()),
        ("DRBD_MY_AF".to_owned(), family(view.local).to_owned()),
        ("DRBD_MY_ADDRESS".to_owned(), view.local.ip().to_string()),
        ("DRBD_PEER_AF".to_owned(), family(view.remote).to_owned()),
        ("DRBD_PEER_ADDRESS".to_owned(), view.remote.ip().to_string()),
    ];
    let (own_id, peer_id) = view.node_ids;
    for (id, role, host) in [(own_id, "MY", view.node.clone()), (peer_id, "PEER", peer)] {
        let Some(id) = id else { continue };
        environment.push((format!("DRBD_{role}_NODE_ID"), id.to_string()));
        environment.push((format!("DRBD_NODE_ID_{id}"), host));
    }
    let command = |name: &str| view.handlers.get(name).cloned();
    Ok(HandlersConfig {
        local_io_error: command("local-io-error"),
        initial_split_brain: command("initial-split-brain"),
        split_brain: command("split-brain"),
        pri_on_incon_degr: command("pri-on-incon-degr"),
        after_resync_target: command("after-resync-target"),
        environment,
    })
}

fn refused(resource: &str, what: &str) -> Failure {
    Failure::new(exit::FAILURE, format!("{resource}: {what}"))
}

fn text(resource: &str, path: &Path) -> Result<String, Failure> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| refused(resource, &format!("the path {} is no text", path.display())))
}

/// A link-local address gets the number of its interface.
fn local_address(view: &NodeView) -> Result<SocketAddr, Failure> {
    match (view.local, &view.local_interface) {
        (SocketAddr::V6(mut address), Some(interface)) => {
            let index = nix::net::if_::if_nametoindex(interface.as_str()).map_err(|errno| {
                Failure::system(format!("{}: interface {interface}", view.resource), &errno)
            })?;
            address.set_scope_id(index);
            Ok(SocketAddr::V6(address))
        }
        (address, None) | (address @ SocketAddr::V4(_), Some(_)) => Ok(address),
    }
}

fn frontend(view: &NodeView, run_dir: &str) -> Result<Frontend, Failure> {
    match (view.options.frontend, &view.options.nbd_address) {
        (conf::Frontend::Ublk, _) => Ok(Frontend::Ublk),
        (conf::Frontend::Nbd, Some(conf::NbdAddress::Unix(path))) => {
            Ok(Frontend::Nbd(NbdAddress::Unix(text(&view.resource, path)?)))
        }
        (conf::Frontend::Nbd, Some(conf::NbdAddress::Tcp(address))) => {
            Ok(Frontend::Nbd(NbdAddress::Tcp(*address)))
        }
        (conf::Frontend::Nbd, None) => {
            Ok(Frontend::Nbd(NbdAddress::Unix(format!("{run_dir}/{}.nbd", view.resource))))
        }
    }
}

fn net_config(view: &NodeView) -> Result<NetConfig, Failure> {
    let net = &view.net;
    let unknown = |error: split_brain::UnknownPolicy| refused(&view.resource, &error.to_string());
    Ok(NetConfig {
        protocol: match net.protocol {
            conf::Protocol::A => ReplicationProtocol::A,
            conf::Protocol::B => ReplicationProtocol::B,
            conf::Protocol::C => ReplicationProtocol::C,
        },
        timeout: Span::from_tenths(net.timeout_tenths.into()),
        ping_int: Span::from_secs(net.ping_int_s.into()),
        ping_timeout: Span::from_tenths(net.ping_timeout_tenths.into()),
        connect_int: Span::from_secs(net.connect_int_s.into()),
        socket_check_timeout: Span::from_tenths(net.socket_check_timeout_tenths.into()),
        ko_count: net.ko_count,
        max_epoch_size: net.max_epoch_size,
        max_buffers: net.max_buffers_pages,
        sndbuf_size: net.sndbuf_size_bytes,
        rcvbuf_size: net.rcvbuf_size_bytes,
        auth: authentication(view)?,
        after_sb_0pri: after_sb_0pri(view)?,
        after_sb_1pri: net.after_sb_1pri.name().parse().map_err(unknown)?,
        after_sb_2pri: net.after_sb_2pri.name().parse().map_err(unknown)?,
        rr_conflict: net.rr_conflict.name().parse().map_err(unknown)?,
        always_asbp: net.always_asbp,
        use_rle: net.use_rle,
        tcp_cork: net.tcp_cork,
        flush_wait_peer: Some(net.flush_wait_peer),
        verify_alg: net.verify_alg.clone().unwrap_or_default(),
        // The language knows other values; the parser refuses them.
        fencing: Fencing::DontCare,
        keeps_own_dial: (view.local.ip(), view.local.port())
            < (view.remote.ip(), view.remote.port()),
    })
}

fn authentication(view: &NodeView) -> Result<Option<Authentication>, Failure> {
    let Some(alg) = view.net.cram_hmac_alg else {
        return Ok(None);
    };
    let Some(secret) = &view.net.shared_secret else {
        return Err(refused(&view.resource, "cram-hmac-alg needs a shared-secret"));
    };
    let alg = match alg {
        conf::CramHmacAlg::Md5 => HmacAlg::Md5,
        conf::CramHmacAlg::Sha1 => HmacAlg::Sha1,
        conf::CramHmacAlg::Sha256 => HmacAlg::Sha256,
        conf::CramHmacAlg::Sha512 => HmacAlg::Sha512,
    };
    Ok(Some(Authentication { alg, secret: secret.reveal().to_owned() }))
}

/// `discard-node-HOST` becomes a policy relative to this node; the peer gets the mirrored one.
fn after_sb_0pri(view: &NodeView) -> Result<split_brain::AfterSb0Pri, Failure> {
    match &view.net.after_sb_0pri {
        conf::AfterSb0Pri::Choice(choice) => {
            let parsed = choice.name().parse();
            parsed.map_err(|error: split_brain::UnknownPolicy| {
                refused(&view.resource, &error.to_string())
            })
        }
        conf::AfterSb0Pri::DiscardNode(host) if is_same_host(host, &view.node) => {
            Ok(split_brain::AfterSb0Pri::DiscardLocal)
        }
        conf::AfterSb0Pri::DiscardNode(host) => {
            if view.peer.as_deref().is_some_and(|peer| is_same_host(host, peer)) {
                return Ok(split_brain::AfterSb0Pri::DiscardRemote);
            }
            let what = format!("after-sb-0pri discard-node-{host}: no such node");
            Err(refused(&view.resource, &what))
        }
    }
}

/// Where the metadata of a volume are; `None` without a disk.
#[must_use]
pub fn meta_kind(volume: &VolumeView) -> Option<MetaKind> {
    volume.disk.as_ref()?;
    Some(match &volume.meta_disk {
        MetaDisk::Internal => MetaKind::Internal,
        MetaDisk::Flexible(_) => MetaKind::Flexible,
        MetaDisk::Indexed(_, index) => MetaKind::Indexed(*index),
    })
}

/// The device that carries the metadata, if it is another one than the disk.
#[must_use]
pub fn meta_path(volume: &VolumeView) -> Option<&Path> {
    match &volume.meta_disk {
        MetaDisk::Internal => None,
        MetaDisk::Flexible(path) | MetaDisk::Indexed(path, _) => Some(path),
    }
}

fn volume_config(resource: &str, volume: &VolumeView) -> Result<VolumeConfig, Failure> {
    let options = &volume.options;
    let object = format!("{resource}/{}", volume.nr);
    let al_extents = u16::try_from(options.al_extents).map_err(|error| {
        refused(&object, &format!("al-extents {}: {error}", options.al_extents))
    })?;
    let on_io_error = match options.on_io_error {
        conf::OnIoError::PassOn => OnIoError::PassOn,
        conf::OnIoError::Detach => OnIoError::Detach,
        conf::OnIoError::CallLocalIoError => OnIoError::CallLocalIoError,
    };
    Ok(VolumeConfig {
        nr: VolumeNr(volume.nr),
        minor: volume.minor,
        meta: meta_kind(volume),
        disk: DiskConfig {
            size: (options.size_sectors > 0).then_some(Sector(options.size_sectors)),
            on_io_error,
            disk_flushes: options.disk_flushes,
            disk_drain: options.disk_drain,
            md_flushes: options.md_flushes,
            al_extents,
            al_updates: options.al_updates,
            rate: RateConfig {
                resync_rate_kib: options.resync_rate_kib,
                plan_ahead: options.c_plan_ahead_tenths,
                delay_target: options.c_delay_target_tenths,
                fill_target_sectors: options.c_fill_target_sectors,
                max_rate_kib: options.c_max_rate_kib,
                min_rate_kib: options.c_min_rate_kib,
            },
        },
    })
}

fn backing_config(resource: &str, volume: &VolumeView) -> Result<BackingConfig, Failure> {
    let Some(disk) = &volume.disk else {
        return Ok(BackingConfig { disk: None, meta_disk: None });
    };
    let meta_disk = meta_path(volume).map(|path| text(resource, path)).transpose()?;
    Ok(BackingConfig { disk: Some(text(resource, disk)?), meta_disk })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::{MemoryFiles, load};

    fn config(options: &str, node: &str) -> Result<EngineConfig, Failure> {
        let file = format!(
            "resource r0 {{ {options}
               device /dev/drbd3; disk /dev/vg/r0; meta-disk internal;
               on alice {{ address 10.0.0.1:7789; }}
               on bob {{ address 10.0.0.2:7788; }} }}"
        );
        let files = MemoryFiles::default().with("/drbd.conf", file);
        let (config, _) = load(Path::new("/drbd.conf"), &files).unwrap();
        let view = config.for_node("r0", node).unwrap();
        engine_config(&view, Path::new("/run/drbd"), config.main())
    }

    /// What is not configured is as in the core's own defaults, apart from what the edge decides.
    #[test]
    fn defaults() {
        let config = config("", "alice").unwrap();
        let own =
            NetConfig { keeps_own_dial: true, flush_wait_peer: Some(true), ..NetConfig::default() };
        assert_eq!(config.resource.net, own);
        assert_eq!(config.resource.volumes[0].disk, DiskConfig::default());
        assert_eq!(config.resource.volumes[0].meta, Some(MetaKind::Internal));
        assert_eq!(config.resource.volumes[0].minor, 3);
        assert_eq!((config.node.as_str(), config.resource.peer.as_str()), ("alice", "bob"));
        assert_eq!(config.backing[0].disk.as_deref(), Some("/dev/vg/r0"));
        assert_eq!(config.backing[0].meta_disk, None);
        assert_eq!(config.frontend, Frontend::Ublk);
    }

    /// Exactly one of the two nodes keeps its own attempt to connect (WP-7).
    #[test]
    fn one_node_keeps_its_dial() {
        let keeps = |node| config("", node).unwrap().resource.net.keeps_own_dial;
        assert!(keeps("alice"));
        assert!(!keeps("bob"));
    }

    /// Units, words and policies that are relative to a node.
    #[test]
    fn options() {
        let options = "net { protocol A; timeout 40; ping-int 7; cram-hmac-alg sha1;
                             shared-secret x; after-sb-0pri discard-node-bob;
                             after-sb-1pri consensus; }
                       disk { size 1M; on-io-error pass_on; resync-rate 40M; al-extents 127; }
                       options { on-no-data-accessible suspend-io; frontend nbd; }";
        let alice = config(options, "alice").unwrap();
        let net = &alice.resource.net;
        assert_eq!(net.protocol, ReplicationProtocol::A);
        assert_eq!((net.timeout, net.ping_int), (Span::from_secs(4), Span::from_secs(7)));
        assert_eq!(net.after_sb_0pri, split_brain::AfterSb0Pri::DiscardRemote);
        assert_eq!(net.after_sb_1pri, split_brain::AfterSb1Pri::Consensus);
        assert_eq!(net.flush_wait_peer, Some(false));
        let auth = Authentication { alg: HmacAlg::Sha1, secret: "x".to_owned() };
        assert_eq!(net.auth, Some(auth));
        let disk = &alice.resource.volumes[0].disk;
        assert_eq!((disk.size, disk.al_extents), (Some(Sector(2048)), 127));
        assert_eq!((disk.on_io_error, disk.rate.resync_rate_kib), (OnIoError::PassOn, 40960));
        assert_eq!(alice.resource.on_no_data, OnNoData::SuspendIo);
        let nbd = NbdAddress::Unix("/run/drbd/r0.nbd".to_owned());
        assert_eq!(alice.frontend, Frontend::Nbd(nbd));
        let bob = config(options, "bob").unwrap();
        assert_eq!(bob.resource.net.after_sb_0pri, split_brain::AfterSb0Pri::DiscardLocal);
    }

    /// The command line goes to the engine as it is, with what handlers want to know.
    #[test]
    fn handlers_are_handed_over() {
        let options = "disk { on-io-error call-local-io-error; }
                       handlers { local-io-error \"notify $DRBD_RESOURCE; halt -f\";
                                  initial-split-brain initial; split-brain split;
                                  pri-on-incon-degr degr; after-resync-target after; }";
        let config = config(options, "alice").unwrap();
        assert_eq!(config.resource.volumes[0].disk.on_io_error, OnIoError::CallLocalIoError);
        let command = config.handlers.local_io_error.as_deref();
        assert_eq!(command, Some("notify $DRBD_RESOURCE; halt -f"));
        let others = [
            &config.handlers.initial_split_brain,
            &config.handlers.split_brain,
            &config.handlers.pri_on_incon_degr,
            &config.handlers.after_resync_target,
        ];
        assert_eq!(others.map(|x| x.as_deref().unwrap()), ["initial", "split", "degr", "after"]);
        let environment = config.handlers.environment.iter();
        let environment: Vec<String> =
            environment.map(|(name, value)| format!("{name}={value}")).collect();
        let expected = [
            "DRBD_CONF=/drbd.conf",
            "DRBD_PEER=bob",
            "DRBD_PEERS=bob",
            "DRBD_MY_AF=ipv4",
            "DRBD_MY_ADDRESS=10.0.0.1",
            "DRBD_PEER_AF=ipv4",
            "DRBD_PEER_ADDRESS=10.0.0.2",
        ];
        assert_eq!(environment, expected);
    }
}
