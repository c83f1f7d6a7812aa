//! The engine's configuration file: JSON, written by the operator's tool.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use replication_core::config::EngineConfig;
use replication_core::limits::{
    AL_EXTENTS_MAX, AL_EXTENTS_MIN, MAX_BIO_SIZE, MAX_QUEUE_DEPTH, MAX_VOLUMES,
};

/// Largest configuration that is read.
const SIZE_MAX: u64 = 1 << 20;

/// Reads and checks a configuration.
///
/// # Errors
/// The file cannot be read, is no configuration, or breaks a rule.
pub fn load(path: &Path) -> Result<EngineConfig> {
    let name = path.display();
    let size = std::fs::metadata(path).with_context(|| format!("read {name}"))?.len();
    ensure!(size <= SIZE_MAX, "read {name}: {size} bytes are more than a configuration has");
    let text = std::fs::read(path).with_context(|| format!("read {name}"))?;
    let mut config = serde_json::from_slice(&text).with_context(|| format!("understand {name}"))?;
    check(&config).with_context(|| format!("configuration {name}"))?;
    complete(&mut config);
    Ok(config)
}

/// Fills in what follows from the rest: which of two attempts to connect at the same time is kept.
/// The answer differs between the nodes whatever their configuration files say (WP-7).
pub fn complete(config: &mut EngineConfig) {
    config.resource.net.keeps_own_dial = config.local < config.remote;
}

/// Checks what the types do not say.
///
/// # Errors
/// A rule is broken; the text says which.
pub fn check(config: &EngineConfig) -> Result<()> {
    let name = &config.resource.name;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        !name.is_empty() && name.len() <= 128 && name.chars().all(is_plain),
        "resource name {name:?} has other characters than letters, digits, '-', '_' and '.'"
    );
    ensure!(!name.starts_with('.'), "resource name {name:?} starts with a dot");
    let volumes = config.resource.volumes.len();
    ensure!((1..=MAX_VOLUMES).contains(&volumes), "{volumes} volumes: 1 to {MAX_VOLUMES}");
    ensure!(config.backing.len() == volumes, "each volume needs its entry in `backing`");
    let depth = config.queue_depth;
    ensure!((1..=MAX_QUEUE_DEPTH).contains(&depth), "queue_depth {depth}: 1 to {MAX_QUEUE_DEPTH}");
    let size = config.max_io_size;
    ensure!(
        size.is_multiple_of(4096) && (4096..=MAX_BIO_SIZE).contains(&size),
        "max_io_size {size}: a multiple of 4096 up to {MAX_BIO_SIZE}"
    );
    ensure!(
        config.local.is_ipv4() == config.remote.is_ipv4(),
        "{} and {} are of different families",
        config.local,
        config.remote
    );
    let backing = config.backing.iter().flat_map(|b| [b.disk.as_deref(), b.meta_disk.as_deref()]);
    for path in backing.flatten().chain([config.run_dir.as_str()]) {
        ensure!(Path::new(path).is_absolute(), "{path:?} is no absolute path");
    }
    for (volume, backing) in config.resource.volumes.iter().zip(&config.backing) {
        ensure!(
            volume.meta.is_some() == backing.disk.is_some(),
            "volume {}: `meta` and `disk` belong together",
            volume.nr
        );
    }
    for volume in &config.resource.volumes {
        let slots = volume.disk.al_extents;
        ensure!(
            (AL_EXTENTS_MIN..=AL_EXTENTS_MAX).contains(&slots),
            "volume {}: al_extents {slots}: {AL_EXTENTS_MIN} to {AL_EXTENTS_MAX}",
            volume.nr
        );
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use replication_core::config::{
        BackingConfig, DiskConfig, Frontend, HandlersConfig, NbdAddress, NetConfig, ResourceConfig,
        VolumeConfig,
    };
    use replication_core::meta::MetaKind;
    use replication_core::state::OnNoData;
    use replication_core::units::VolumeNr;

    /// A configuration with one volume on files in `dir`.
    pub(crate) fn config(dir: &Path) -> EngineConfig {
        let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        EngineConfig {
            resource: ResourceConfig {
                name: "r0".to_owned(),
                peer: "bob".to_owned(),
                net: NetConfig::default(),
                on_no_data: OnNoData::IoError,
                volumes: vec![VolumeConfig {
                    nr: VolumeNr(0),
                    minor: 0,
                    meta: Some(MetaKind::Internal),
                    disk: DiskConfig::default(),
                }],
            },
            node: "alice".to_owned(),
            backing: vec![BackingConfig { disk: Some(file("disk")), meta_disk: None }],
            handlers: HandlersConfig::default(),
            local: "127.0.0.1:7788".parse().unwrap(),
            remote: "127.0.0.1:7789".parse().unwrap(),
            frontend: Frontend::Nbd(NbdAddress::Unix(file("nbd.sock"))),
            queue_depth: 32,
            max_io_size: 1 << 20,
            run_dir: dir.to_str().unwrap().to_owned(),
        }
    }

    #[test]
    fn a_configuration_comes_back_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        let path = dir.path().join("r0.json");
        std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        config.resource.net.keeps_own_dial = true;
        assert_eq!(load(&path).unwrap(), config);
        std::fs::write(&path, "{").unwrap();
        let error = load(&path).unwrap_err();
        assert!(format!("{error:#}").contains("r0.json"), "{error:#}");
        load(&dir.path().join("missing")).unwrap_err();
    }

    #[test]
    fn each_rule_is_named_when_broken() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |change: fn(&mut EngineConfig)| {
            let mut config = config(dir.path());
            change(&mut config);
            format!("{:#}", check(&config).unwrap_err())
        };
        check(&config(dir.path())).unwrap();
        assert!(broken(|c| c.resource.name = "a/b".to_owned()).contains("resource name"));
        assert!(broken(|c| c.resource.name = "..".to_owned()).contains("dot"));
        assert!(broken(|c| c.resource.volumes.clear()).contains("0 volumes"));
        assert!(broken(|c| c.backing.clear()).contains("backing"));
        assert!(broken(|c| c.queue_depth = 0).contains("queue_depth"));
        let few = broken(|c| c.resource.volumes[0].disk.al_extents = 66);
        assert!(few.contains("al_extents"));
        assert!(broken(|c| c.max_io_size = 5000).contains("max_io_size"));
        assert!(broken(|c| c.max_io_size = 2 << 20).contains("max_io_size"));
        assert!(broken(|c| c.remote = "[::1]:1".parse().unwrap()).contains("families"));
        assert!(broken(|c| c.run_dir = "run".to_owned()).contains("absolute"));
        assert!(broken(|c| c.backing[0].meta_disk = Some("m".to_owned())).contains("absolute"));
        assert!(broken(|c| c.backing[0].disk = None).contains("belong together"));
    }
}
