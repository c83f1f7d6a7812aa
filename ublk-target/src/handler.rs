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

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use replication_core::action::Handler;
use replication_core::config::{EngineConfig, HandlersConfig};
use replication_core::event::VolumeIx;

use crate::worker::STACK_SIZE;

/// What the service manager tells the engine and no other process.
const MANAGER_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// Handlers that run at the same time. One more is not started: something is wrong with those that
/// are under way.
const RUNNING_MAX: usize = 16;

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

/// Starts handlers, and knows how many run.
#[derive(Debug, Default)]
pub struct Handlers {
    mounts: HostMounts,
    /// One more for each that runs.
    running: Arc<()>,
}

impl Handlers {
    /// They see these mounts.
    #[must_use]
    pub fn new(mounts: HostMounts) -> Self {
        Self { mounts, running: Arc::default() }
    }

    /// Starts a handler, if it is configured. It tells of a volume, or of the whole resource.
    ///
    /// # Errors
    /// Too many run, or there are no threads left.
    pub fn start(
        &self,
        handler: Handler,
        volume: Option<VolumeIx>,
        config: &EngineConfig,
    ) -> Result<()> {
        let name = handler.name();
        let resource = &config.resource.name;
        let about = volume.map_or_else(
            || format!("drbd {resource}"),
            |volume| {
                let shape = &config.resource.volumes[volume.at()];
                format!("drbd {resource}/{} drbd{}", shape.nr.0, shape.minor)
            },
        );
        let Some(command) = command_of(handler, &config.handlers).cloned() else {
            // The others have nothing to do with what the engine does.
            if handler == Handler::LocalIoError {
                tracing::warn!("{about}: handler {name} is not configured");
            }
            return Ok(());
        };
        let place = Arc::clone(&self.running);
        // This value, `place`, and one for each that runs.
        ensure!(Arc::strong_count(&place) < RUNNING_MAX + 2, "{RUNNING_MAX} handlers run already");
        let variables = environment(volume, config);
        let mounts = self.mounts.clone();
        let work = move || {
            tracing::info!("{about}: helper command: {name}");
            match run(&command, &variables, &mounts) {
                Ok(status) => tracing::info!("{about}: helper command: {name}: {status}"),
                Err(error) => tracing::error!("{about}: helper command: {name}: {error:#}"),
            }
            drop(place);
        };
        let builder = std::thread::Builder::new().name("handler".to_owned());
        builder.stack_size(STACK_SIZE).spawn(work).context("start thread handler")?;
        Ok(())
    }
}

fn command_of(handler: Handler, config: &HandlersConfig) -> Option<&String> {
    let command = match handler {
        Handler::LocalIoError => &config.local_io_error,
        Handler::InitialSplitBrain => &config.initial_split_brain,
        Handler::SplitBrain => &config.split_brain,
        Handler::PriOnInconDegr => &config.pri_on_incon_degr,
        Handler::AfterResyncTarget => &config.after_resync_target,
    };
    command.as_ref()
}

/// What a handler finds in its environment: the names of today and those of 8.x. Of the whole
/// resource it is told in lists with blanks between.
fn environment(volume: Option<VolumeIx>, config: &EngineConfig) -> Vec<(String, String)> {
    let mut variables = config.handlers.environment.clone();
    let mut set = |name: &str, value: String| variables.push((name.to_owned(), value));
    let volumes = config.resource.volumes.iter().zip(&config.backing);
    let has_several = config.resource.volumes.len() > 1;
    let (mut numbers, mut minors, mut disks) = (Vec::new(), Vec::new(), Vec::new());
    for (index, (shape, backing)) in volumes.enumerate() {
        let disk = backing.disk.clone().unwrap_or_else(|| "none".to_owned());
        if volume.is_none_or(|volume| index == volume.at()) {
            numbers.push(shape.nr.0.to_string());
            minors.push(shape.minor.to_string());
            disks.push(disk.clone());
        }
        if has_several {
            set(&format!("DRBD_MINOR_{}", shape.nr.0), shape.minor.to_string());
            set(&format!("DRBD_BACKING_DEV_{}", shape.nr.0), disk);
        }
    }
    set("DRBD_VOLUME", numbers.join(" "));
    set("DRBD_MINOR", minors.join(" "));
    set("DRBD_LL_DISK", disks.join(" "));
    set("DRBD_BACKING_DEV", disks.join(" "));
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

    fn start(handler: Handler, volume: Option<VolumeIx>, config: &EngineConfig) {
        Handlers::default().start(handler, volume, config).unwrap();
    }

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
        start(Handler::LocalIoError, Some(VolumeIx(1)), &config);
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

    #[test]
    fn of_the_whole_resource_a_handler_is_told_in_lists() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = crate::settings::tests::config(dir.path());
        let mut second = config.resource.volumes[0].clone();
        (second.nr.0, second.minor) = (7, 9);
        config.resource.volumes.push(second);
        config.backing = vec![config.backing[0].clone(); 2];
        config.backing[0].disk = Some("/dev/a".to_owned());
        config.backing[1].disk = None;
        let told = environment(None, &config);
        for (name, value) in [
            ("DRBD_VOLUME", "0 7"),
            ("DRBD_MINOR", "0 9"),
            ("DRBD_LL_DISK", "/dev/a none"),
            ("DRBD_MINOR_7", "9"),
        ] {
            assert!(told.contains(&(name.to_owned(), value.to_owned())), "{name} in {told:?}");
        }
    }

    /// Each runs its own command line; one that is not configured is no error.
    #[test]
    fn programs_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let write = |name: &str| Some(format!("echo end >{}", file(name).display()));
        let mut config = crate::settings::tests::config(dir.path());
        config.handlers.initial_split_brain = write("initial-split-brain");
        config.handlers.split_brain = write("split-brain");
        config.handlers.pri_on_incon_degr = write("pri-on-incon-degr");
        config.handlers.after_resync_target = write("after-resync-target");
        let programs = [
            Handler::InitialSplitBrain,
            Handler::SplitBrain,
            Handler::PriOnInconDegr,
            Handler::AfterResyncTarget,
        ];
        start(Handler::LocalIoError, None, &config);
        for program in programs {
            assert!(!file(program.name()).exists());
            start(program, None, &config);
            awaited(&file(program.name()));
        }
    }

    #[test]
    fn handlers_that_hang_are_not_heaped_up() {
        let dir = tempfile::tempdir().unwrap();
        let stay = dir.path().join("stay");
        File::create(&stay).unwrap();
        let mut config = crate::settings::tests::config(dir.path());
        // They end with the directory at the latest.
        let script = format!("while [ -e {} ]; do sleep 0.1; done", stay.display());
        config.handlers.split_brain = Some(script);
        let handlers = Handlers::default();
        let start = || handlers.start(Handler::SplitBrain, None, &config);
        for _ in 0..RUNNING_MAX {
            start().unwrap();
        }
        assert_eq!(start().unwrap_err().to_string(), "16 handlers run already");
        std::fs::remove_file(&stay).unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        while start().is_err() {
            assert!(Instant::now() < limit, "none has ended");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// The engine's threads block SIGTERM and SIGINT, and its runtime ignores SIGPIPE; a handler
    /// inherits none of it. (What a shell ignores for its background jobs stays ignored.)
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
        start(Handler::LocalIoError, Some(VolumeIx(0)), &config);
        let text = awaited(&out);
        let masks = text.lines().filter_map(|line| line.split_once('\t'));
        let masks: Vec<u64> = masks.map(|(_, hex)| u64::from_str_radix(hex, 16).unwrap()).collect();
        let bit = |signal: Signal| 1 << (signal as u32 - 1);
        let asking = bit(Signal::SIGTERM) | bit(Signal::SIGPIPE);
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
        start(Handler::LocalIoError, Some(VolumeIx(0)), &config);
    }
}
