//! The operator's programs, which run when something happens (`handlers` section).
//!
//! A handler runs beside the engine, and nothing waits for it: a thread of its own starts it and
//! logs its end. It gets back what the engine has taken from itself to serve a block device: it
//! sees the host's mounts, may be chosen by the OOM killer, and reclaims memory like any other
//! process. What it prints goes where the engine's log goes. SIGTERM and SIGINT
//! end one that hangs: the standard library opens for a child what the engine's threads block.
//!
//! Not responsible for: when a handler runs (the core).

use std::fs::File;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};
use replication_core::action::Handler;
use replication_core::config::EngineConfig;
use replication_core::event::VolumeIx;

use crate::worker::STACK_SIZE;

/// What the service manager tells the engine and no other process.
const MANAGER_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// The mounts of the host, for an engine that leaves them.
#[derive(Clone, Debug, Default)]
pub struct HostMounts {
    namespace: Option<Arc<File>>,
}

impl HostMounts {
    /// Remembers them, before the engine leaves.
    ///
    /// # Errors
    /// The system does not show them.
    pub fn remember() -> Result<Self> {
        let path = "/proc/self/ns/mnt";
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        Ok(Self { namespace: Some(Arc::new(file)) })
    }

    /// Goes back to them, with the calling thread alone.
    fn enter(&self) -> Result<()> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        unshare(CloneFlags::CLONE_FS).context("have a working directory of its own")?;
        setns(namespace, CloneFlags::CLONE_NEWNS).context("see the mounts of the host")
    }
}

/// Starts the handler that is configured, if one is.
///
/// # Errors
/// There are no threads left.
pub fn start(
    handler: Handler,
    volume: VolumeIx,
    config: &EngineConfig,
    mounts: &HostMounts,
) -> Result<()> {
    let shape = &config.resource.volumes[volume.at()];
    let about = format!("drbd {}/{} drbd{}", config.resource.name, shape.nr.0, shape.minor);
    let name = handler.name();
    let configured = match handler {
        Handler::LocalIoError => config.handlers.local_io_error.clone(),
    };
    let Some(command) = configured else {
        tracing::warn!("{about}: handler {name} is not configured");
        return Ok(());
    };
    let variables = environment(volume, config);
    let mounts = mounts.clone();
    let work = move || {
        tracing::info!("{about}: helper command: {name}");
        match run(&command, &variables, &mounts) {
            Ok(status) => tracing::info!("{about}: helper command: {name}: {status}"),
            Err(error) => tracing::error!("{about}: helper command: {name}: {error:#}"),
        }
    };
    let builder = std::thread::Builder::new().name("handler".to_owned());
    builder.stack_size(STACK_SIZE).spawn(work).context("start thread handler")?;
    Ok(())
}

/// What a handler finds in its environment: the names of today and those of 8.x.
fn environment(volume: VolumeIx, config: &EngineConfig) -> Vec<(String, String)> {
    let mut variables = config.handlers.environment.clone();
    let mut set = |name: &str, value: String| variables.push((name.to_owned(), value));
    let volumes = config.resource.volumes.iter().zip(&config.backing);
    let has_several = config.resource.volumes.len() > 1;
    for (index, (shape, backing)) in volumes.enumerate() {
        let disk = backing.disk.clone().unwrap_or_else(|| "none".to_owned());
        if index == volume.at() {
            set("DRBD_VOLUME", shape.nr.0.to_string());
            set("DRBD_MINOR", shape.minor.to_string());
            set("DRBD_LL_DISK", disk.clone());
            set("DRBD_BACKING_DEV", disk.clone());
        }
        if has_several {
            set(&format!("DRBD_MINOR_{}", shape.nr.0), shape.minor.to_string());
            set(&format!("DRBD_BACKING_DEV_{}", shape.nr.0), disk);
        }
    }
    set("DRBD_RESOURCE", config.resource.name.clone());
    variables
}

/// Runs a handler to its end. Changes the calling thread for good.
fn run(command: &str, variables: &[(String, String)], mounts: &HostMounts) -> Result<ExitStatus> {
    mounts.enter()?;
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(false) {
        // Without the right for it, the engine has not set it either.
        tracing::debug!("PR_SET_IO_FLUSHER: {errno}");
    }
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).current_dir("/").stdin(Stdio::null());
    for name in MANAGER_VARIABLES {
        shell.env_remove(name);
    }
    shell.envs(variables.iter().map(|(name, value)| (name, value)));
    let mut child = shell.spawn().context("start /bin/sh")?;
    // The shell takes longer to read its command than this does.
    if let Err(error) = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0") {
        tracing::debug!("oom_score_adj of a handler: {error}");
    }
    child.wait().context("wait for it")
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use nix::sys::signal::Signal;

    use super::*;

    /// What a file holds once it ends with a line `end`.
    fn awaited(path: &Path) -> String {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.ends_with("end\n") {
                return text;
            }
            assert!(Instant::now() < limit, "the handler wrote {text:?}");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_handler_runs_with_its_environment_and_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let (go, out) = (dir.path().join("go"), dir.path().join("out"));
        assert!(Command::new("mkfifo").arg(&go).status().unwrap().success());
        let mut config = crate::settings::tests::config(dir.path());
        let mut second = config.resource.volumes[0].clone();
        (second.nr.0, second.minor) = (7, 9);
        config.resource.volumes.push(second);
        config.backing.push(replication_core::config::BackingConfig {
            disk: Some("/dev/vg/r0 7".to_owned()),
            meta_disk: None,
        });
        config.handlers.environment = vec![("DRBD_PEER".to_owned(), "bob".to_owned())];
        let script = "read x <GO; env | grep ^DRBD_ | sort >OUT; \
                      cat /proc/self/oom_score_adj >>OUT; echo end >>OUT";
        let script = script.replace("GO", go.to_str().unwrap());
        config.handlers.local_io_error = Some(script.replace("OUT", out.to_str().unwrap()));
        start(Handler::LocalIoError, VolumeIx(1), &config, &HostMounts::default()).unwrap();
        assert!(!out.exists(), "it waits for a word from here");
        std::fs::write(&go, "go\n").unwrap();
        let first = config.backing[0].disk.clone().unwrap();
        let expected = format!(
            "DRBD_BACKING_DEV=/dev/vg/r0 7\nDRBD_BACKING_DEV_0={first}\n\
             DRBD_BACKING_DEV_7=/dev/vg/r0 7\nDRBD_LL_DISK=/dev/vg/r0 7\nDRBD_MINOR=9\n\
             DRBD_MINOR_0=0\nDRBD_MINOR_7=9\nDRBD_PEER=bob\nDRBD_RESOURCE=r0\nDRBD_VOLUME=7\n\
             0\nend\n"
        );
        assert_eq!(awaited(&out), expected);
    }

    /// The engine's threads block SIGTERM and SIGINT, and its runtime ignores SIGPIPE; a handler
    /// inherits none of it.
    #[test]
    fn a_handler_can_be_ended_by_signals() {
        let _signals = crate::engine::block_signals().unwrap();
        let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(own.contains("SigBlk:\t0000000000004002"), "{own}");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut config = crate::settings::tests::config(dir.path());
        let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status >OUT; echo end >>OUT";
        let script = script.replace("OUT", out.to_str().unwrap());
        config.handlers.local_io_error = Some(script);
        start(Handler::LocalIoError, VolumeIx(0), &config, &HostMounts::default()).unwrap();
        let text = awaited(&out);
        let masks = text.lines().filter_map(|line| line.split_once('\t'));
        let masks: Vec<u64> = masks.map(|(_, hex)| u64::from_str_radix(hex, 16).unwrap()).collect();
        let bit = |signal: Signal| 1 << (signal as u32 - 1);
        let asking = bit(Signal::SIGTERM) | bit(Signal::SIGINT) | bit(Signal::SIGPIPE);
        let [blocked, ignored] = masks[..] else { panic!("{text}") };
        assert_eq!((blocked, ignored & asking), (0, 0), "{text}");
    }

    #[test]
    fn the_end_of_a_handler_is_known() {
        let run = |command| run(command, &[], &HostMounts::default()).unwrap();
        assert_eq!(run("exit 3").code(), Some(3));
        assert_eq!(run("kill -9 $$").code(), None);
        let dir = tempfile::tempdir().unwrap();
        let config = crate::settings::tests::config(dir.path());
        start(Handler::LocalIoError, VolumeIx(0), &config, &HostMounts::default()).unwrap();
    }
}
