//! `up`, `down`, `adjust`: engines come, go, and take up changed options.

use std::io::ErrorKind;
use std::time::Duration;

use replication_core::config::EngineConfig;
use replication_core::control::{Command, Reply, Status};

use super::{Session, metadata};
use crate::client::{AskError, Client, Contact, contact};
use crate::context::Paths;
use crate::engine::{self, Lock, Mute, Started};
use crate::exit::{self, Failure};
use crate::object::Named;
use crate::settings::engine_config;

/// Time for the answer to `down --force` before the engine is killed.
const FORCE_LIMIT: Duration = Duration::from_secs(15);
/// Time for an engine to end by itself before it is killed.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Time that a process needs to go after it was killed: its memory is given back first, and until
/// then its sockets take connections and its lock is held.
const DEATH_LIMIT: Duration = Duration::from_secs(5);

impl Session<'_> {
    /// Starts the engine of a resource, attaches and connects.
    pub(super) fn up(&mut self, on: &Named) -> Result<(), Failure> {
        let (config, paths) = self.wanted(on)?;
        self.warn()?;
        if self.context.dry_run {
            return self.say_start(&config, &paths);
        }
        if let Contact::Engine(client) = contact(&on.resource, &paths)?
            && !is_dying(&on.resource, client, &paths)?
        {
            let text = format!(
                "{on}: Failure: (161) the resource is already up\n  \
                 what to do: use adjust to apply changes: drbdctl adjust {on}"
            );
            return Err(Failure::new(exit::FAILURE, text));
        }
        self.check_before_attach(on, metadata::Engine::Gone)?;
        start(&on.resource, &config, &paths)
    }

    /// Makes what runs as it is configured; says nothing if it is.
    pub(super) fn adjust(&mut self, on: &Named) -> Result<(), Failure> {
        let (config, paths) = self.wanted(on)?;
        let client = match contact(&on.resource, &paths)? {
            Contact::Engine(client) => client,
            Contact::Absent | Contact::Stale => return self.up(on),
        };
        let status = client.status()?;
        let mut commands = missing(&config, &status);
        let is_changed = engine::read_config(&paths).as_ref() != Some(&config);
        if is_changed {
            commands.insert(0, Command::Adjust(Box::new(config.clone())));
        }
        if !commands.is_empty() {
            self.warn()?;
        }
        for command in &commands {
            if let Command::Attach(Some(nr)) = command {
                let volume = Named { volume: Some(nr.0), ..on.clone() };
                self.check_before_attach(&volume, metadata::Engine::MayRun)?;
            }
            self.send(on, command, super::Idle::Needed)?;
            if matches!(command, Command::Adjust(_)) && !self.context.dry_run {
                engine::write_config(&paths, &config)?;
            }
        }
        Ok(())
    }

    /// What the engine of a resource has to be given, and its files.
    fn wanted(&self, on: &Named) -> Result<(EngineConfig, Paths), Failure> {
        let view = self.context.view(&on.resource)?;
        if !self.context.dry_run {
            self.context.check_address(&view)?;
        }
        let config = engine_config(&view, &self.context.run_dir, self.context.config()?.main())?;
        Ok((config, self.context.paths(&on.resource)?))
    }

    /// The dry run of a start.
    fn say_start(&mut self, config: &EngineConfig, paths: &Paths) -> Result<(), Failure> {
        let name = &config.resource.name;
        writeln!(self.out, "{name}: would write {}", paths.json.display())?;
        if self.context.verbose > 0 {
            // The debug form keeps the shared secret to itself.
            writeln!(self.out, "{config:#?}")?;
        }
        let words = engine::command_line(paths);
        let words: Vec<String> =
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        writeln!(self.out, "{name}: would start {}", words.join(" "))?;
        writeln!(self.out, "{name}: would send {:?}", Command::Up)?;
        Ok(())
    }

    /// Ends the engine of a resource.
    pub(super) fn down(&mut self, on: &Named, force: bool) -> Result<(), Failure> {
        let command = Command::Down { holder: None, force };
        if self.context.dry_run {
            writeln!(self.out, "{on}: would send {command:?}")?;
            return Ok(());
        }
        let resource = &on.resource;
        let paths = self.context.paths(resource)?;
        match contact(resource, &paths)? {
            Contact::Engine(client) if force => force_down(resource, &paths, client, &command),
            Contact::Engine(client) => match client.ask(&command)? {
                Ok(Reply::Done | Reply::NothingToDo | Reply::Status(_)) => {
                    engine::finish(resource, &paths)
                }
                Err(refusal) => Err(Failure::refused(resource, &refusal)),
            },
            Contact::Absent | Contact::Stale => match engine::lock_state(&paths)? {
                Lock::Held(_) if force => engine::kill_engine(resource, &paths),
                Lock::Held(pid) => Err(engine::mute(resource, pid, Mute::Deaf)),
                Lock::Free if paths.json.exists() || paths.socket.exists() => {
                    engine::clear_away(resource, &paths)
                }
                // Nothing was there; a name that nobody knows is still a mistake.
                Lock::Free => self.context.view(resource).map(|_| ()),
            },
        }
    }
}

/// Asks the engine to end, and ends it; one that does not answer is killed at once. A refusal
/// stands: what uses the device would hang.
fn force_down(
    resource: &str,
    paths: &Paths,
    client: Client,
    command: &Command,
) -> Result<(), Failure> {
    let client = client.with_limit(FORCE_LIMIT);
    match client.try_ask(command) {
        Ok(Err(refusal)) => return Err(Failure::refused(resource, &refusal)),
        Err(AskError::Silent(_)) => return engine::kill_engine(resource, paths),
        Ok(Ok(_)) | Err(AskError::Io(_) | AskError::Frame(_)) => {}
    }
    if engine::wait_for_end(paths, END_LIMIT)? {
        return engine::clear_away(resource, paths);
    }
    engine::kill_engine(resource, paths)
}

/// Whether the engine behind `client` was killed a moment ago: it hangs up without an answer, and
/// its lock becomes free.
///
/// # Errors
/// It lives and does not answer.
fn is_dying(resource: &str, client: Client, paths: &Paths) -> Result<bool, Failure> {
    match client.try_ask(&Command::Status) {
        Err(AskError::Silent(limit)) => {
            Err(engine::mute(resource, engine::seen(paths), Mute::Silent(limit)))
        }
        Err(AskError::Io(error)) => match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                engine::wait_for_end(paths, DEATH_LIMIT)
            }
            // The kinds are the system's; whatever else went wrong, nobody has hung up.
            _ => Ok(false),
        },
        Ok(_) | Err(AskError::Frame(_)) => Ok(false),
    }
}

/// Starts an engine, and takes everything down again if it cannot come up.
fn start(resource: &str, config: &EngineConfig, paths: &Paths) -> Result<(), Failure> {
    if !engine::wait_for_end(paths, DEATH_LIMIT)?
        && let Lock::Held(pid) = engine::lock_state(paths)?
    {
        return Err(engine::mute(resource, pid, Mute::Deaf));
    }
    engine::write_config(paths, config)?;
    let mut started = match engine::start(resource, paths) {
        Ok(started) => started,
        Err(failure) => {
            clean_up_if_free(paths)?;
            return Err(failure);
        }
    };
    let up = engine::wait_for_engine(resource, paths, &mut started)
        .and_then(|client| client.ask(&Command::Up))
        .and_then(|answer| match answer {
            Ok(Reply::Done | Reply::NothingToDo | Reply::Status(_)) => Ok(()),
            Err(refusal) => Err(Failure::refused(resource, &refusal)),
        });
    let Err(mut failure) = up else {
        return Ok(());
    };
    if let Err(second) = take_back(resource, paths, started) {
        failure.text.push_str("\nand the engine could not be taken down: ");
        failure.text.push_str(&second.text);
    }
    Err(failure)
}

/// Ends an engine that did not come up: by command, so that it removes its devices, else by force.
/// If it has ended by itself, whoever answers now is another one, started at the same time: that
/// one stays, with its files. A device that is in use is not taken away: it may be one that an
/// earlier engine has left, and waits for the next.
fn take_back(resource: &str, paths: &Paths, mut started: Started) -> Result<(), Failure> {
    if started.is_running(resource)?
        && let Contact::Engine(client) = contact(resource, paths)?
    {
        let command = Command::Down { holder: None, force: false };
        let client = client.with_limit(FORCE_LIMIT);
        // Whatever the answer is, the end of the process is what counts.
        if matches!(client.try_ask(&command), Ok(Ok(_))) {
            engine::wait_for_end(paths, END_LIMIT)?;
        }
    }
    engine::discard(started);
    clean_up_if_free(paths)
}

/// Removes the files of a resource unless another engine lives.
fn clean_up_if_free(paths: &Paths) -> Result<(), Failure> {
    match engine::lock_state(paths)? {
        Lock::Free => engine::clean_up(paths),
        Lock::Held(_) => Ok(()),
    }
}

/// What the configuration asks for and the state lacks: a connection that was given up, disks
/// that were detached. A split brain needs a decision, not another attempt.
fn missing(config: &EngineConfig, status: &Status) -> Vec<Command> {
    let mut commands = Vec::new();
    for (volume, backing) in config.resource.volumes.iter().zip(&config.backing) {
        let shown = status.volumes.iter().find(|shown| shown.nr == volume.nr.0);
        if backing.disk.is_some() && shown.is_some_and(|shown| shown.disk == "Diskless") {
            commands.push(Command::Attach(Some(volume.nr)));
        }
    }
    if status.connection == "StandAlone" && !status.split_brain {
        commands.push(Command::Connect { discard_my_data: false });
    }
    commands
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    /// An engine that lost a race against another one for the same resource takes nothing of the
    /// other one away: no command is sent to it, and its files stay.
    #[test]
    fn the_loser_of_a_race_leaves_the_winner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        let winner = UnixListener::bind(&paths.socket).unwrap();
        winner.set_nonblocking(true).unwrap();
        std::fs::write(&paths.json, "{}").unwrap();
        let file = std::fs::File::create(&paths.lock).unwrap();
        let held = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        let mut loser = std::process::Command::new("false").spawn().unwrap();
        loser.wait().unwrap();
        take_back("r0", &paths, Started::for_test(loser)).unwrap();
        assert!(winner.accept().is_err(), "nobody has asked the winner for anything");
        assert!(paths.socket.exists() && paths.json.exists());
        drop(held);
        let mut loser = std::process::Command::new("false").spawn().unwrap();
        loser.wait().unwrap();
        take_back("r0", &paths, Started::for_test(loser)).unwrap();
        assert!(!paths.socket.exists() && !paths.json.exists());
    }

    /// An engine that was just killed still takes the connection; it hangs up, then its lock goes.
    #[test]
    fn a_killed_engine_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        let listener = UnixListener::bind(&paths.socket).unwrap();
        let file = std::fs::File::create(&paths.lock).unwrap();
        let held = Flock::lock(file, FlockArg::LockExclusive).unwrap();
        let Contact::Engine(client) = contact("r0", &paths).unwrap() else {
            panic!("it takes connections")
        };
        let end = std::thread::spawn(move || {
            drop(listener);
            drop(held);
        });
        assert!(is_dying("r0", client, &paths).unwrap());
        end.join().unwrap();
    }

    /// An engine that is stopped takes connections for as long as there is room for them.
    #[test]
    fn an_engine_that_does_not_answer_is_no_running_one() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        let _silent = UnixListener::bind(&paths.socket).unwrap();
        let Contact::Engine(client) = contact("r0", &paths).unwrap() else {
            panic!("it takes connections")
        };
        let client = client.with_limit(Duration::from_millis(1));
        let failure = is_dying("r0", client, &paths).unwrap_err();
        assert!(failure.text.contains("lives but does not answer"), "{failure}");
    }
}
