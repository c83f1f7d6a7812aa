//! What a node is told about a resource, and how files are found.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use drbdctl::conf::{
    self, AfterSb0Choice, AfterSb0Pri, AfterSb1Pri, BecomePrimaryOn, Config, CramHmacAlg, Frontend,
    Inputs, Main, MemoryFiles, MetaDisk, NbdAddress, OnIoError, Problem, Protocol, RealFiles,
    RrConflict, Warning,
};

/// Reads text as if it came from standard input.
fn parse(text: &str) -> (Config, Vec<Warning>) {
    let main = Main::Text { name: "STDIN".into(), bytes: text.into(), dir: "/etc".into() };
    let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
    conf::load_inputs(inputs, &MemoryFiles::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Reads one of the samples.
fn sample(name: &str) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/conf").join(name);
    conf::load(&path, &RealFiles).unwrap_or_else(|error| panic!("{error}")).0
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A resource of two hosts with these statements beside.
fn pair(more: &str) -> String {
    format!(
        "resource r0 {{ device minor 0; disk /dev/a; {more}\n\
         on alice {{ address 10.0.0.1:7788; }}\n on bob {{ address 10.0.0.2:7788; }} }}\n"
    )
}

/// Nothing set: every default, in the unit of its name.
#[test]
fn defaults() {
    let (config, warnings) = parse(&pair(""));
    assert_eq!(warnings, []);
    let view = config.for_node("r0", "alice").expect("defined");
    assert_eq!((view.node.as_str(), view.peer.as_deref()), ("alice", Some("bob")));
    assert_eq!(view.local, "10.0.0.1:7788".parse().expect("address"));
    assert_eq!(view.remote, "10.0.0.2:7788".parse().expect("address"));
    assert_eq!((view.file.as_path(), view.line), (Path::new("STDIN"), 1));
    let net = &view.net;
    assert_eq!((net.protocol, net.flush_wait_peer), (Protocol::C, true));
    assert_eq!((net.timeout_tenths, net.ping_int_s, net.ping_timeout_tenths), (60, 10, 5));
    assert_eq!((net.connect_int_s, net.socket_check_timeout_tenths, net.ko_count), (10, 0, 7));
    assert_eq!((net.max_epoch_size, net.max_buffers_pages), (2048, 2048));
    assert_eq!((net.sndbuf_size_bytes, net.rcvbuf_size_bytes), (0, 0));
    assert_eq!((net.cram_hmac_alg, &net.shared_secret, &net.verify_alg), (None, &None, &None));
    assert_eq!(net.after_sb_0pri, AfterSb0Pri::Choice(AfterSb0Choice::Disconnect));
    assert_eq!(net.rr_conflict, RrConflict::Disconnect);
    assert!(!net.always_asbp && net.use_rle && net.tcp_cork);
    let [volume] = view.volumes.as_slice() else { panic!("one volume") };
    assert_eq!((volume.nr, volume.minor, volume.device.as_str()), (0, 0, "/dev/drbd0"));
    assert_eq!(volume.disk, Some(PathBuf::from("/dev/a")));
    assert_eq!(volume.meta_disk, MetaDisk::Internal);
    let disk = &volume.options;
    assert_eq!((disk.size_sectors, disk.on_io_error), (0, OnIoError::Detach));
    assert!(disk.disk_flushes && disk.disk_drain && disk.md_flushes && disk.al_updates);
    assert_eq!((disk.al_extents, disk.resync_rate_kib), (1237, 250));
    assert_eq!((disk.c_plan_ahead_tenths, disk.c_delay_target_tenths), (20, 10));
    assert_eq!((disk.c_fill_target_sectors, disk.c_max_rate_kib), (100, 102_400));
    assert_eq!(disk.c_min_rate_kib, 250);
    assert_eq!((view.options.frontend, view.options.queue_depth), (Frontend::Ublk, 64));
    assert_eq!((view.options.max_io_size_bytes, &view.options.nbd_address), (512 << 10, &None));
    assert_eq!(view.startup.become_primary_on, BecomePrimaryOn::Nobody);
    assert_eq!((view.startup.wfc_timeout_s, view.startup.wait_after_sb), (0, false));
    assert!(view.handlers.is_empty());
}

/// Each layer wins over the ones below it.
#[test]
fn inheritance() {
    let config = sample("v9.conf");
    let view = config.for_node("r0", "ALICE.example.org").expect("defined");
    assert_eq!((view.node.as_str(), view.node_ids), ("alice", (Some(0), Some(1))));
    assert_eq!(view.local, "10.0.0.1:7790".parse().expect("address"));
    assert_eq!(view.remote, "192.168.1.2:7791".parse().expect("address"));
    assert_eq!((view.net.ping_int_s, view.net.timeout_tenths), (5, 40));
    let [first, second] = view.volumes.as_slice() else { panic!("two volumes") };
    assert_eq!((first.options.resync_rate_kib, second.options.resync_rate_kib), (10_240, 1024));
    assert_eq!(first.options.c_max_rate_kib, 700 * 1024);
    assert_eq!(second.options.on_io_error, OnIoError::PassOn);
    assert_eq!((first.options.size_sectors, second.options.size_sectors), (0, 20_971_520));
    assert_eq!(second.meta_disk, MetaDisk::Indexed("/dev/meta".into(), 3));
    assert_eq!((second.nr, second.minor, second.device.as_str()), (1, 1, "/dev/drbd_logs"));
    assert_eq!(view.options.nbd_address, Some(NbdAddress::Unix("/run/r0.nbd".into())));
    assert_eq!((view.options.queue_depth, view.options.max_io_size_bytes), (128, 1 << 20));

    let view = config.for_node("disk", "bob").expect("defined");
    assert_eq!(view.local, "[fd00::2]:7800".parse().expect("address"));
    assert_eq!(view.net.cram_hmac_alg, Some(CramHmacAlg::Sha256));
    let secret = view.net.shared_secret.as_ref().expect("set");
    assert_eq!(secret.reveal(), "it \"is\" one");
    assert!(!format!("{view:?}").contains("it \\\"is"), "secrets are not shown");
    assert_eq!(view.volumes[0].meta_disk, MetaDisk::Flexible("/dev/vg0/r2meta".into()));
    let view = config.for_node("disk", "alice").expect("defined");
    assert_eq!(view.volumes[0].disk, None);
}

/// The same with the forms of version 8.4; an empty handler takes the inherited one away.
#[test]
fn inheritance_without_connection() {
    let config = sample("v84.conf");
    let view = config.for_node("home", "web2").expect("defined");
    assert_eq!((view.node.as_str(), view.peer.as_deref()), ("WEB2", Some("web1")));
    assert_eq!(config.for_node("home", "web2-old").expect("defined").node, "web2-old");
    assert_eq!((view.net.protocol, view.net.flush_wait_peer), (Protocol::B, false));
    assert_eq!((view.net.sndbuf_size_bytes, view.net.tcp_cork), (512 << 10, false));
    assert_eq!(view.net.after_sb_0pri, AfterSb0Pri::DiscardNode("web2".to_owned()));
    assert_eq!(view.net.after_sb_1pri, AfterSb1Pri::DiscardSecondary);
    assert_eq!(view.net.rr_conflict, RrConflict::Disconnect);
    let disk = &view.volumes[0].options;
    assert!(!disk.disk_flushes && disk.disk_drain && !disk.md_flushes);
    assert_eq!((disk.resync_rate_kib, disk.al_extents), (33 << 10, 3389));
    assert_eq!(view.volumes[0].meta_disk, MetaDisk::Indexed("/dev/sdb1".into(), 0));
    assert_eq!(view.startup.degr_wfc_timeout_s, 120);
    assert_eq!(view.startup.become_primary_on, BecomePrimaryOn::Both);
    let handlers: Vec<_> = view.handlers.iter().collect();
    assert_eq!(handlers.len(), 1, "{handlers:?}");
    assert_eq!(view.handlers["fence-peer"], "/usr/lib/drbd/outdate.sh \\ \"x\"");
    assert!(config.global().disable_ip_verification);
    assert_eq!(config.global().dialog_refresh_s, 5);
}

/// Floating hosts are found by address; stacked and three-node resources are refused on use.
#[test]
fn floating_stacked_and_mesh() {
    let config = sample("v83.conf");
    assert_eq!(config.resources(), ["drbd0", "upper", "mesh"]);
    let view = config.for_host("drbd0", "any", &[ip("10.1.0.2")]).expect("defined");
    assert_eq!((view.node.as_str(), view.peer.as_deref()), ("10.1.0.2:7788", None));
    assert_eq!(view.remote, "10.1.0.1:7788".parse().expect("address"));
    assert_eq!(view.volumes[0].options.size_sectors, 8_388_608);
    assert_eq!(view.volumes[0].options.al_extents, 67);
    assert_eq!(view.handlers["fence-peer"], "/sbin/kill-other-node.sh");
    assert_eq!(view.handlers["pri-on-incon-degr"], "halt -f");
    assert_eq!(config.resources_on("any", &[ip("10.1.0.1")]), ["drbd0"]);
    assert_eq!(config.resources_on("far", &[]), ["upper"]);

    let error = config.for_node("drbd0", "any").expect_err("no address known");
    assert_eq!(error.exit_code(), conf::EXIT_NOT_DEFINED);
    assert_eq!(error.to_string(), "'drbd0' not defined in your config (for this host).");
    let error = config.for_host("drbd0", "carol", &[ip("10.1.0.2")]).expect_err("ignored");
    assert!(matches!(error.problem(), Problem::NotDefined { .. }));
    let error = config.for_node("upper", "far").expect_err("stacked");
    assert_eq!(error.exit_code(), conf::EXIT_CONFIG);
    assert!(error.to_string().contains("stacked-on-top-of is not available yet"), "{error}");
    let error = config.for_node("mesh", "a").expect_err("three nodes");
    assert!(
        error
            .to_string()
            .contains("in resource mesh: 3 host sections, exactly two nodes can share a resource"),
        "{error}"
    );
    let error = config.for_node("mehs", "a").expect_err("no such resource");
    assert!(error.to_string().ends_with("did you mean 'mesh'?"), "{error}");
}

/// The exact spelling of a host wins over a short name that fits too.
#[test]
fn exact_host_name_first() {
    let (config, _) = parse(
        "resource r0 { device minor 0; disk /dev/a;\n\
         on node.b.org { address 10.0.0.1:1; } on node { address 10.0.0.2:1; } }",
    );
    assert_eq!(config.for_node("r0", "node").expect("defined").local.ip(), ip("10.0.0.2"));
    assert_eq!(config.for_node("r0", "NODE.b.org").expect("defined").local.ip(), ip("10.0.0.1"));
}

/// The interface of a link-local address is handed on by name, or taken as a number.
#[test]
fn link_local_addresses() {
    let (config, _) = parse(
        "resource r0 { device minor 0; disk /dev/a;\n\
         on a { address ipv6 [fe80::1%eth0]:1; } on b { address ipv6 [fe80::2%3]:1; } }",
    );
    let view = config.for_node("r0", "a").expect("defined");
    assert_eq!(view.local_interface.as_deref(), Some("eth0"));
    let view = config.for_node("r0", "b").expect("defined");
    assert_eq!(view.local_interface, None);
    assert_eq!(view.local, "[fe80::2%3]:1".parse().expect("address"));
}

/// The address of a node has to be one of its own, unless that check is off.
#[test]
fn local_address_is_checked() {
    let (config, _) = parse(&pair(""));
    config.check_local_address("r0", "alice", &[ip("10.0.0.1")]).expect("is there");
    let error = config.check_local_address("r0", "alice", &[ip("10.0.0.2")]).expect_err("is not");
    assert_eq!(
        error.to_string(),
        "STDIN:2:20: in resource r0, on alice:\n\tIP 10.0.0.1 not found on this host.\n\
         on alice { address 10.0.0.1:7788; }\n                   ^^^^^^^^"
    );
    let text = format!("global {{ disable-ip-verification; }}\n{}", pair(""));
    parse(&text).0.check_local_address("r0", "alice", &[]).expect("check is off");
}

/// Options that contradict each other, and a dangling name.
#[test]
fn warnings_between_options() {
    let table = [
        (
            "net { ping-int 5; }",
            "in resource r0: timeout 60 (tenths) is not below ping-int 5 (seconds)",
        ),
        (
            "net { cram-hmac-alg sha1; }",
            "in resource r0: cram-hmac-alg without shared-secret authenticates nobody",
        ),
        (
            "net { shared-secret x; }",
            "in resource r0: shared-secret has no effect without cram-hmac-alg",
        ),
        (
            "net { timeout 50; timeout 40; }",
            "option timeout of net is given twice, this one counts",
        ),
        ("disk { resync-after r9; }", "resync-after names 'r9', which is no resource"),
        ("connection foo { host alice; host bob; }", "the name 'foo' of the connection is ignored"),
    ];
    for (text, expected) in table {
        let (_, warnings) = parse(&pair(text));
        assert!(
            warnings.iter().any(|w| w.to_string() == format!("STDIN:1: {expected}")),
            "{warnings:?}"
        );
    }
    let (_, warnings) = parse("resource r0 { device minor 0; on a { address 10.0.0.1:1; } }");
    assert_eq!(warnings[0].text, "volume 0 on a has no disk, it is diskless");
}

/// Files are found relative to the file that names them, each is read once, some are left out.
#[test]
fn includes() {
    let files = MemoryFiles::default()
        .with("/etc/drbd.conf", "include \"drbd.d/*.res\"; include \"none/*.res\";")
        .with(
            "/etc/drbd.d/b.res",
            format!("include \"a.res\"; include \"sub/c.res\"; {}", pair("")),
        )
        .with("/etc/drbd.d/a.res", "include \"b.res\"; common { net { timeout 50; } }")
        .with("/etc/drbd.d/sub/c.res", "include \"../d\";")
        .with("/etc/drbd.d/sub/../d", "common { disk { al-extents 500; } }")
        .with(
            "/extra",
            "resource r1 { device minor 1; disk /dev/b; on alice { address 10.0.0.1:1; } }",
        );
    let (config, warnings) = conf::load(Path::new("/etc/drbd.conf"), &files).expect("correct");
    assert_eq!(warnings, [], "nothing was read twice");
    let view = config.for_node("r0", "bob").expect("defined");
    assert_eq!((view.net.timeout_tenths, view.volumes[0].options.al_extents), (50, 500));
    assert_eq!((view.file.as_path(), view.line), (Path::new("/etc/drbd.d/b.res"), 1));

    let main = Main::File("/etc/drbd.conf".into());
    let exclude = vec!["/etc/drbd.d/b.res".into()];
    let inputs = Inputs { main, also: vec!["/extra".into()], exclude };
    let (config, _) = conf::load_inputs(inputs, &files).expect("correct");
    assert_eq!(config.resources(), ["r1"]);
}

/// Files that include each other ever deeper come to an end.
#[test]
fn include_depth_is_limited() {
    let mut files = MemoryFiles::default();
    for n in 0..20 {
        files = files.with(format!("/{n}"), format!("include \"/{}\";", n + 1));
    }
    let error = conf::load(Path::new("/0"), &files).expect_err("too deep");
    assert!(matches!(error.problem(), Problem::TooMany { limit: 16, .. }), "{error}");
    let error = conf::load(Path::new("/none"), &files).expect_err("absent");
    assert_eq!(error.to_string(), "cannot read '/none': entity not found");
    assert_eq!(error.exit_code(), conf::EXIT_CONFIG);
}

/// The real file system: a main file, a pattern, a link to a file that was read, a directory.
#[test]
fn real_files() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("d")).expect("created");
    std::fs::write(at("drbd.conf"), "include \"d/*.res\";").expect("written");
    std::fs::write(at("d/r0.res"), pair("")).expect("written");
    std::os::unix::fs::symlink(at("d/r0.res"), at("d/z.res")).expect("linked");
    let (config, _) = conf::load(&at("drbd.conf"), &RealFiles).expect("correct");
    assert_eq!(config.resources(), ["r0"]);
    assert!(matches!(
        conf::load(&at("d"), &RealFiles).expect_err("a directory").problem(),
        Problem::Unreadable { .. }
    ));
}

/// A template lies below the resource that names it and above `common`.
#[test]
fn templates() {
    let files = MemoryFiles::default()
        .with(
            "/c",
            format!(
                "common {{ net {{ timeout 30; ping-int 30; connect-int 30; }} }}\n{}",
                pair("net { ping-int 20; } template-file \"t\";")
            ),
        )
        .with("/t", "net { ping-int 15; connect-int 15; } disk { resync-rate 1M; }");
    let (config, _) = conf::load(Path::new("/c"), &files).expect("correct");
    let view = config.for_node("r0", "alice").expect("defined");
    let net = &view.net;
    assert_eq!((net.timeout_tenths, net.connect_int_s, net.ping_int_s), (30, 15, 20));
    assert_eq!(view.volumes[0].options.resync_rate_kib, 1024);
    assert_eq!(parse(&config.dump()).0.dump(), config.dump());
}

/// The newest main file is preferred; without any, the last name is what a message will say.
#[test]
fn search_order() {
    let none = MemoryFiles::default();
    assert_eq!(conf::default_config_path(&none), Path::new("/etc/drbd.conf"));
    let some = none.with("/etc/drbd.conf", "").with("/etc/drbd-84.conf", "");
    assert_eq!(conf::default_config_path(&some), Path::new("/etc/drbd-84.conf"));
}

/// A version requirement that holds is passed over.
#[test]
fn version_requirements() {
    for statement in ["ge 8.4", "lt 9.0.0", "eq 8.4.11", "ne 9", "le 8.4.11", "gt 8.3.99"] {
        let (config, _) = parse(&format!("require-drbd-module-version-{statement};"));
        assert_eq!(config.resources(), [""; 0]);
    }
}

/// Skipped things are as if they were not there.
#[test]
fn skipped_sections() {
    let (config, _) = parse(&format!(
        "skip resource r9 {{ $%& }} skip {{ \"}}\" }} {}",
        pair("skip on carol { address nowhere; } skip device minor 9; options { queue-depth 1; }")
    ));
    assert_eq!(config.resources(), ["r0"]);
    assert_eq!(config.for_node("r0", "bob").expect("defined").options.queue_depth, 1);
}
