//! What each verb does.
//!
//! A verb is tried on each of its objects in turn; a failure is told and the next object is
//! tried. The worst exit code is returned.

mod config;
mod lifecycle;
mod metadata;
mod show;
mod state;
mod upgrade;
mod wait;

use std::ffi::OsString;
use std::io::Write;

use replication_core::control::{Command, Reply};
use replication_core::units::VolumeNr;

use crate::cli::{self, Cli, Verb};
use crate::client::{Contact, contact};
use crate::context::Context;
use crate::engine::{self, Mute};
use crate::exit::{self, Failure};
use crate::guard::{self, Manner};
use crate::object::Named;

/// The command line tool: arguments with the program's name first, and the two streams. Returns
/// the exit code.
#[must_use]
pub fn run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let exit = match cli::parse(arguments) {
        Ok(cli) => run_cli(&cli, out, err),
        Err(said) => {
            let told = match said.exit {
                exit::DONE => write!(out, "{}", said.text),
                _ => write!(err, "{}", said.text),
            };
            told.map(|()| said.exit).map_err(Failure::from)
        }
    };
    let flushed = out.flush().map_err(Failure::from);
    match exit.and_then(|exit| flushed.map(|()| exit)) {
        Ok(exit) => exit,
        Err(failure) => {
            // If this cannot be told either, the exit code has to do.
            let _ = writeln!(err, "{failure}");
            failure.exit
        }
    }
}

fn run_cli(cli: &Cli, out: &mut dyn Write, err: &mut dyn Write) -> Result<u8, Failure> {
    if cli.global.version {
        write!(out, "{}", version())?;
        return Ok(exit::DONE);
    }
    match &cli.verb {
        None => Err(Failure::usage("drbdctl: which verb? 'drbdctl --help' lists them")),
        Some(Verb::ShDetached { command }) => Err(engine::become_engine(command)),
        Some(verb) => {
            let context = Context::new(&cli.global)?;
            Session { context, out, err, has_warned: false }.dispatch(verb)
        }
    }
}

/// Versions, as assignments of a shell. Agents decide by them what may be asked of the tool: the
/// level is that of 8.4.11, whose protocol, metadata and forms of output are offered.
fn version() -> String {
    let own = env!("CARGO_PKG_VERSION");
    format!(
        "DRBDADM_BUILDTAG=drbdctl\\ {own}\n\
         DRBDADM_API_VERSION=1\n\
         DRBD_KERNEL_VERSION_CODE=0x08040b\n\
         DRBD_KERNEL_VERSION=8.4.11\n\
         DRBDADM_VERSION_CODE=0x08040b\n\
         DRBDADM_VERSION=8.4.11\n\
         DRBDCTL_VERSION={own}\n"
    )
}

/// What it means for a verb that no engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Idle {
    /// There is nothing to do.
    Fine,
    /// It cannot be done.
    Needed,
}

/// One run of the tool.
struct Session<'a> {
    context: Context,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    has_warned: bool,
}

impl Session<'_> {
    fn dispatch(&mut self, verb: &Verb) -> Result<u8, Failure> {
        match verb {
            Verb::CreateMd(args) => {
                self.warn()?;
                let force = args.force;
                self.each_part(&args.on.objects, |me, on| {
                    me.guarded(on, Manner::Change, |me| me.create_md(on, force))
                })
            }
            Verb::WipeMd(args) => {
                let force = args.force;
                self.each_part(&args.on.objects, |me, on| {
                    me.guarded(on, Manner::Change, |me| me.wipe_md(on, force))
                })
            }
            Verb::DumpMd(args) => {
                let force = args.force;
                self.each_part(&args.on.objects, |me, on| me.dump_md(on, force))
            }
            Verb::CheckResize(on) => self.each_part(&on.objects, |me, on| {
                me.guarded(on, Manner::Change, |me| me.check_resize(on))
            }),
            Verb::GetGi(on) => self.each_part(&on.objects, |me, on| me.get_gi(on, false)),
            Verb::ShowGi(on) => self.each_part(&on.objects, |me, on| me.get_gi(on, true)),
            Verb::Up(on) => self.each_whole("up", &on.objects, |me, on| {
                me.guarded(on, Manner::Begin, |me| me.up(on))
            }),
            Verb::Upgrade(on) => self.each_whole("upgrade", &on.objects, |me, on| {
                me.guarded(on, Manner::Change, |me| me.upgrade(on))
            }),
            Verb::Adjust(on) => self.each_whole("adjust", &on.objects, |me, on| {
                me.guarded(on, Manner::Begin, |me| me.adjust(on))
            }),
            Verb::Down(args) => {
                let force = args.force;
                self.each_whole("down", &args.on.objects, |me, on| {
                    me.guarded(on, change(force), |me| me.down(on, force))
                })
            }
            Verb::Status(args) => self.status(args),
            Verb::Role(on) => self.each_part(&on.objects, Self::role),
            Verb::PeerRole(on) => self.each_part(&on.objects, Self::peer_role),
            Verb::Cstate(on) => self.each_part(&on.objects, Self::cstate),
            Verb::Dstate(on) => self.each_part(&on.objects, Self::dstate),
            Verb::WaitConnect(args) => self.wait(args, wait::Goal::Connect),
            Verb::WaitSync(args) => self.wait(args, wait::Goal::Sync),
            Verb::Dump { objects } => self.dump(objects),
            Verb::ShNop => self.sh_nop(),
            Verb::ShResources => self.sh_resources(),
            Verb::ShDev(on) => self.each_part(&on.objects, Self::sh_dev),
            Verb::ShLlDev(on) => self.each_part(&on.objects, Self::sh_ll_dev),
            Verb::ShMinor(on) => self.each_part(&on.objects, Self::sh_minor),
            Verb::ShMdDev(on) => self.each_part(&on.objects, Self::sh_md_dev),
            Verb::ShMdIdx(on) => self.each_part(&on.objects, Self::sh_md_idx),
            Verb::ShIp(on) => self.each_part(&on.objects, Self::sh_ip),
            Verb::ShResource(on) => self.each_part(&on.objects, Self::sh_resource),
            Verb::ShModParms => self.sh_mod_parms(),
            Verb::ShDetached { .. } => Err(Failure::usage("sh-detached runs without a context")),
            Verb::Attach(_)
            | Verb::Detach(_)
            | Verb::Connect { .. }
            | Verb::Disconnect(_)
            | Verb::Primary { .. }
            | Verb::Secondary(_)
            | Verb::Invalidate(_)
            | Verb::InvalidateRemote(_)
            | Verb::Resize(_)
            | Verb::Outdate(_)
            | Verb::PauseSync(_)
            | Verb::ResumeSync(_)
            | Verb::NewCurrentUuid { .. } => self.change(verb),
        }
    }

    /// Tries `act` on each object, which may name a volume.
    fn each_part(
        &mut self,
        words: &[String],
        mut act: impl FnMut(&mut Self, &Named) -> Result<(), Failure>,
    ) -> Result<u8, Failure> {
        let mut worst = exit::DONE;
        for object in self.context.objects(words)? {
            if let Err(failure) = self.check_peer(&object).and_then(|()| act(self, &object)) {
                writeln!(self.err, "{failure}")?;
                worst = worst.max(failure.exit);
            }
        }
        Ok(worst)
    }

    /// Tries `act` on each object, none of which may name a volume.
    fn each_whole(
        &mut self,
        verb: &str,
        words: &[String],
        mut act: impl FnMut(&mut Self, &Named) -> Result<(), Failure>,
    ) -> Result<u8, Failure> {
        self.each_part(words, |me, object| {
            if object.volume.is_some() {
                return Err(Failure::usage(format!(
                    "{object}: {verb} operates on whole resources, \
                     but you specified a specific volume!"
                )));
            }
            act(me, object)
        })
    }

    /// Does something to a resource while no other run of the tool does.
    fn guarded(
        &mut self,
        on: &Named,
        manner: Manner,
        act: impl FnOnce(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.context.dry_run {
            return act(self);
        }
        if manner == Manner::Begin {
            // A name that nobody knows leaves no file behind.
            self.context.view(&on.resource)?;
        }
        let paths = self.context.paths(&on.resource)?;
        let guard = guard::take(&on.resource, &paths, manner)?;
        let result = act(self);
        drop(guard);
        result
    }

    /// A peer that is named must be the one there is.
    fn check_peer(&self, object: &Named) -> Result<(), Failure> {
        let Some(named) = &object.peer else {
            return Ok(());
        };
        let view = self.context.view(&object.resource)?;
        let is_peer = match &view.peer {
            Some(peer) => crate::conf::is_same_host(peer, named),
            None => view.remote.to_string() == *named,
        };
        if is_peer {
            return Ok(());
        }
        let text = format!("{object}: {} has no peer of that name", object.resource);
        Err(Failure::usage(text))
    }

    /// Tells, once, what is accepted in the configuration and has no effect.
    fn warn(&mut self) -> Result<(), Failure> {
        if std::mem::replace(&mut self.has_warned, true) {
            return Ok(());
        }
        for warning in self.context.warnings() {
            writeln!(self.err, "{warning}")?;
        }
        Ok(())
    }

    /// Reaches the engine of a resource. `None`: there is none, and that is fine.
    fn engine(&self, object: &Named, idle: Idle) -> Result<Option<crate::client::Client>, Failure> {
        let resource = &object.resource;
        let paths = self.context.paths(resource)?;
        match contact(resource, &paths)? {
            Contact::Engine(client) => return Ok(Some(client)),
            Contact::Absent | Contact::Stale => {}
        }
        if let Some(pid) = engine::seen(&paths) {
            return Err(engine::mute(resource, Some(pid), Mute::Deaf));
        }
        // A name that nobody knows is another matter than one that is not in use.
        self.context.view(resource)?;
        match idle {
            Idle::Fine => Ok(None),
            Idle::Needed => Err(not_running(resource)),
        }
    }

    /// Has a command carried out by the engine of an object.
    fn send(&mut self, object: &Named, command: &Command, idle: Idle) -> Result<(), Failure> {
        if self.context.dry_run {
            writeln!(self.out, "{object}: would send {command:?}")?;
            return Ok(());
        }
        let Some(client) = self.engine(object, idle)? else {
            return Ok(());
        };
        match client.ask(command)? {
            Ok(Reply::Done | Reply::NothingToDo | Reply::Status(_)) => Ok(()),
            Err(refusal) => Err(Failure::refused(&object.to_string(), &refusal)),
        }
    }
}

/// How a verb that changes what is there goes about other runs of the tool.
fn change(force: bool) -> Manner {
    if force { Manner::Force } else { Manner::Change }
}

fn volume_of(object: &Named) -> Option<VolumeNr> {
    object.volume.map(VolumeNr)
}

/// Nobody serves the resource.
fn not_running(resource: &str) -> Failure {
    let text = format!("{resource}: not running; start it with: drbdctl up {resource}");
    Failure::new(exit::SYSTEM, text)
}

/// Who refuses a verb for a volume that the resource does not have.
fn no_volume(object: &Named) -> Failure {
    Failure::usage(format!("{object}: {} has no such volume", object.resource))
}
