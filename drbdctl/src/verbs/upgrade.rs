//! `upgrade`: another program takes the place of the running engine, under devices in use.
//!
//! 1. The new program checks the configuration that the old one runs with; that stays as it is.
//! 2. The old engine is asked to leave. It lets end what is under way, at most ten seconds, and
//!    ends without taking its devices away: requests wait in them. An engine that does not
//!    understand the question or does not answer is killed, which costs a resync of what its
//!    activity log covers.
//! 3. The new program is started, attaches and connects, and takes the devices over. The verb ends
//!    when they take requests again, and says how long they did not.
//!
//! With block devices the engine itself becomes Primary again before the requests that wait are
//! carried out. Clients of an NBD server have lost their connection: they have to come again, and
//! the role is given back here.
//!
//! The engine of a systemd service is replaced by that service (`systemctl reload`): started from
//! anywhere else, the new one would not be its process, and the end of the old one would be the end
//! of the service, which takes the resource down.
//!
//! When the new program fails, requests go on waiting for an engine, so nothing is cleaned up; the
//! message names the old program.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use replication_core::config::{EngineConfig, Frontend};
use replication_core::control::{Command, FrameError, Refusal, Reply, Status};

use super::{Idle, Session, metadata};
use crate::client::{AskError, Client, Contact, contact};
use crate::context::Paths;
use crate::engine;
use crate::exit::{self, Failure};
use crate::object::Named;
use crate::settings::engine_config;

/// Time for the old engine to leave: its own limit, and as much again.
const LEAVE_LIMIT: Duration = Duration::from_secs(20);
/// Time from its answer to its end.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Time for the devices to take requests again once the new engine is up.
const SERVE_LIMIT: Duration = Duration::from_secs(60);

/// How the old engine has gone.
enum Gone {
    /// By itself.
    Left,
    /// Killed, and why.
    Killed(String),
}

impl Session<'_> {
    /// Replaces the engine of a resource.
    pub(super) fn upgrade(&mut self, on: &Named) -> Result<(), Failure> {
        let resource = &on.resource;
        let paths = self.context.paths(resource)?;
        if self.context.dry_run {
            let words = engine::command_line(&paths);
            let words: Vec<String> =
                words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
            writeln!(self.out, "{on}: would send {:?}", Command::Upgrade)?;
            writeln!(self.out, "{on}: would start {}", words.join(" "))?;
            writeln!(self.out, "{on}: would send {:?}", Command::Up)?;
            return Ok(());
        }
        let client = self.engine(on, Idle::Needed)?;
        let client = client.ok_or_else(|| super::not_running(resource))?;
        let old_pid = engine::seen(&paths);
        check_service(resource, old_pid)?;
        let before = running_state(client)?;
        if let Some(before) = &before {
            check_served(before)?;
        }
        let config = self.running_config(on, &paths)?;
        engine::check(resource, &paths)?;
        let old_program =
            old_pid.and_then(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).ok());
        let began = Instant::now();
        let gone = leave(resource, &paths)?;
        // From here on requests wait for the new engine: it is started even if nobody can be told
        // anything any more, and needs no configuration from here.
        match gone {
            Gone::Left => {}
            Gone::Killed(why) => {
                let _ = writeln!(
                    self.err,
                    "{resource}: the old engine was killed: {why}; what its activity log covers \
                     is synced again"
                );
            }
        }
        let was_primary = before.as_ref().is_some_and(|status| status.role == "Primary");
        // The disk may have grown under the old engine, which had no reason to move its metadata.
        if let Err(failure) = self.check_before_attach(on, metadata::Engine::Gone) {
            let _ = writeln!(self.err, "{failure}");
        }
        self.follow(&config, &paths, was_primary)
            .map_err(|failure| stranded(failure, resource, old_program))?;
        let pause = began.elapsed().as_millis();
        let pid = |pid: Option<i32>| pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
        let (old, new) = (pid(old_pid), pid(engine::seen(&paths)));
        writeln!(
            self.out,
            "{resource}: engine replaced (pid {old} -> {new}); requests waited for {}.{:03} s",
            pause / 1000,
            pause % 1000
        )?;
        if matches!(config.frontend, Frontend::Nbd(_)) {
            writeln!(self.out, "{resource}: NBD clients have to connect again")?;
            if before.is_none() {
                writeln!(
                    self.err,
                    "{resource}: the old engine did not tell its role; if it was Primary: drbdctl \
                     primary {resource}"
                )?;
            }
        }
        Ok(())
    }

    /// The configuration that the engine runs with: a changed file is the matter of `adjust`. One
    /// that another version has written may be unreadable; then it is made anew.
    fn running_config(&self, on: &Named, paths: &Paths) -> Result<EngineConfig, Failure> {
        if let Some(config) = engine::read_config(paths) {
            return Ok(config);
        }
        let view = self.context.view(&on.resource)?;
        let config = engine_config(&view, &self.context.run_dir, self.context.config()?.main())?;
        engine::write_config(paths, &config)?;
        Ok(config)
    }

    /// Starts the new engine and waits until it serves.
    fn follow(
        &mut self,
        config: &EngineConfig,
        paths: &Paths,
        was_primary: bool,
    ) -> Result<(), Failure> {
        let resource = &config.resource.name;
        let mut started = engine::start(resource, paths)?;
        let client = engine::wait_for_engine(resource, paths, &mut started)?;
        accepted(resource, client.ask(&Command::Up)?)?;
        let gives_role = was_primary && matches!(config.frontend, Frontend::Nbd(_));
        let mut refusal = None;
        let serves = engine::poll_until(SERVE_LIMIT, || {
            let status = reach(resource, paths)?.status()?;
            if gives_role && status.role != "Primary" {
                let answer = reach(resource, paths)?.ask(&Command::Primary { force: false })?;
                refusal = answer.err();
                return Ok(None);
            }
            let is_back = !was_primary || status.role == "Primary";
            let is_served = |status: &Status| status.volumes.iter().all(|v| v.is_serving);
            Ok((is_back && is_served(&status)).then_some(()))
        })?;
        if serves.is_some() {
            return Ok(());
        }
        let seconds = SERVE_LIMIT.as_secs();
        let mut text =
            format!("{resource}: the new engine runs but does not serve after {seconds} s");
        if let Some(Refusal { text: why, .. }) = refusal {
            text.push_str(": ");
            text.push_str(&why);
        }
        Err(Failure::new(exit::SYSTEM, text))
    }
}

/// Refuses where the service manager has to do it.
fn check_service(resource: &str, pid: Option<i32>) -> Result<(), Failure> {
    let unit_of = |process: &str| {
        let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
        unit_in(&groups).map(str::to_owned)
    };
    let Some(unit) = pid.and_then(|pid| unit_of(&pid.to_string())) else {
        return Ok(());
    };
    if unit_of("self").as_ref() == Some(&unit) {
        return Ok(());
    }
    let text = format!(
        "{resource}: its engine belongs to the service {unit}\n  \
         what to do: systemctl reload {unit}"
    );
    Err(Failure::new(exit::FAILURE, text))
}

/// The service of a resource (`drbd@RES.service`) that a process belongs to, by its control groups.
fn unit_in(groups: &str) -> Option<&str> {
    let mut names = groups.lines().filter_map(|line| line.rsplit_once('/')).map(|(_, name)| name);
    names.find(|name| name.starts_with("drbd@") && name.ends_with(".service"))
}

/// The state before; none if the engine is of another version, which is no reason to keep it.
fn running_state(client: Client) -> Result<Option<Status>, Failure> {
    match client.with_limit(LEAVE_LIMIT).try_ask(&Command::Status) {
        Ok(Ok(Reply::Status(status))) => Ok(Some(*status)),
        Ok(Ok(Reply::Done | Reply::NothingToDo) | Err(_)) | Err(_) => Ok(None),
    }
}

/// Refuses while requests of an earlier engine wait for the role: until it is back, the disk does
/// not say that this node was Primary, and the next engine would fail them.
fn check_served(before: &Status) -> Result<(), Failure> {
    let Some(volume) = before.volumes.iter().find(|volume| volume.open && !volume.is_serving)
    else {
        return Ok(());
    };
    let text = format!(
        "{0}/{1}: the device is in use and waits until this node is Primary again\n  \
         what to do: drbdctl primary {0}, then try again",
        before.name, volume.nr
    );
    Err(Failure::new(exit::FAILURE, text))
}

/// Lets the old engine go; its files stay.
fn leave(resource: &str, paths: &Paths) -> Result<Gone, Failure> {
    let client = reach(resource, paths)?.with_limit(LEAVE_LIMIT);
    let why = match client.try_ask(&Command::Upgrade) {
        Ok(Ok(Reply::Done | Reply::NothingToDo | Reply::Status(_))) => {
            if engine::wait_for_end(paths, END_LIMIT)? {
                return Ok(Gone::Left);
            }
            format!("it did not end within {} s", END_LIMIT.as_secs())
        }
        Ok(Err(refusal)) => return Err(Failure::refused(resource, &refusal)),
        Err(AskError::Frame(error @ FrameError::Schema { .. })) => error.to_string(),
        Err(error @ (AskError::Frame(_) | AskError::Io(_) | AskError::Silent(_))) => {
            error.to_string()
        }
    };
    engine::end_by_force(resource, paths)?;
    Ok(Gone::Killed(why))
}

fn reach(resource: &str, paths: &Paths) -> Result<Client, Failure> {
    match contact(resource, paths)? {
        Contact::Engine(client) => Ok(client),
        Contact::Absent | Contact::Stale => {
            let text = format!("{resource}: its engine has ended meanwhile");
            Err(Failure::new(exit::SYSTEM, text))
        }
    }
}

fn accepted(resource: &str, answer: Result<Reply, Refusal>) -> Result<(), Failure> {
    match answer {
        Ok(Reply::Done | Reply::NothingToDo | Reply::Status(_)) => Ok(()),
        Err(refusal) => Err(Failure::refused(resource, &refusal)),
    }
}

/// Requests wait and nobody serves them: what to do about it.
fn stranded(mut failure: Failure, resource: &str, old_program: Option<PathBuf>) -> Failure {
    let old = old_program.map_or_else(
        || format!("drbdctl up {resource}"),
        |old| format!("DRBD_ENGINE={} drbdctl up {resource}", old.display()),
    );
    failure
        .text
        .push_str("\n  what to do: requests wait for an engine; back to the old one with: ");
    failure.text.push_str(&old);
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_of_a_process_is_that_of_its_groups() {
        let table = [
            ("0::/system.slice/system-drbd.slice/drbd@r0.service\n", Some("drbd@r0.service")),
            (
                "4:cpu:/\n1:name=systemd:/system.slice/drbd@r\\x2d0.service\n0::/\n",
                Some("drbd@r\\x2d0.service"),
            ),
            ("0::/user.slice/user-0.slice/session-3.scope\n", None),
            ("0::/system.slice/pacemaker.service\n", None),
            ("0::/\n", None),
            ("", None),
        ];
        for (groups, unit) in table {
            assert_eq!(unit_in(groups), unit, "{groups}");
        }
    }
}
