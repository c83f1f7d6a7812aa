//! A bed for tests of the built program: a directory with a configuration, disks and run-time
//! files, and engines that are none.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command as Process;
use std::sync::mpsc::{Receiver, channel};

use replication_core::control::{
    Command, Refusal, Reply, Status, VolumeStatus, decode_frame, encode_frame, frame_length,
};
use tempfile::TempDir;

/// What one run of the program has given.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// Fails unless the exit code is this and standard error contains the part.
    #[track_caller]
    pub(crate) fn fails(&self, exit: i32, part: &str) {
        assert_eq!(self.exit, exit, "{self:?}");
        assert!(self.err.contains(part), "{part:?} in {self:?}");
    }

    /// Fails unless everything went well; gives what was printed.
    #[track_caller]
    pub(crate) fn works(&self) -> &str {
        assert_eq!((self.exit, self.err.as_str()), (0, ""), "{self:?}");
        &self.out
    }
}

pub(crate) struct Bed {
    pub(crate) dir: TempDir,
}

impl Bed {
    /// Two nodes, one resource of one volume on a file; `extra` goes into the resource.
    pub(crate) fn new(extra: &str) -> Self {
        let bed = Self { dir: TempDir::new().unwrap() };
        File::create(bed.path("disk")).unwrap().set_len(64 << 20).unwrap();
        bed.configure(extra);
        bed
    }

    pub(crate) fn configure(&self, extra: &str) {
        let disk = self.path("disk");
        let text = format!(
            "resource r0 {{ {extra}
               options {{ frontend nbd; }}
               device /dev/drbd5; disk {}; meta-disk internal;
               on alice {{ address 127.0.0.1:7788; }}
               on bob {{ address 127.0.0.2:7788; }} }}\n",
            disk.display()
        );
        std::fs::write(self.path("drbd.conf"), text).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A run-time file of node alice.
    pub(crate) fn run_file(&self, name: &str) -> PathBuf {
        self.path("run").join("alice").join(name)
    }

    /// The program as node alice, ready to be given arguments.
    pub(crate) fn program(&self) -> Process {
        let mut program = Process::new(env!("CARGO_BIN_EXE_drbdctl"));
        program
            .arg("-c")
            .arg(self.path("drbd.conf"))
            .env("DRBD_RUN_DIR", self.path("run"))
            .env("__DRBD_NODE__", "alice")
            .env_remove("DRBD_ENGINE")
            .env_remove("COLUMNS");
        program
    }

    pub(crate) fn run(&self, line: &str) -> Ran {
        self.run_with(line, &[])
    }

    pub(crate) fn run_with(&self, line: &str, env: &[(&str, &str)]) -> Ran {
        let mut program = self.program();
        program.args(line.split_whitespace()).envs(env.iter().copied());
        let output = program.output().unwrap();
        Ran {
            exit: output.status.code().expect("ends by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// An engine of r0 on node alice that answers by `answer`, one command for each connection.
    /// The commands it got come out of the channel.
    pub(crate) fn engine(
        &self,
        mut answer: impl FnMut(&Command) -> Result<Reply, Refusal> + Send + 'static,
    ) -> Receiver<Command> {
        std::fs::create_dir_all(self.path("run/alice")).unwrap();
        let listener = UnixListener::bind(self.run_file("r0.sock")).unwrap();
        let (sender, commands) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(command) = receive(&mut stream) else { continue };
                stream.write_all(&encode_frame(&answer(&command)).unwrap()).unwrap();
                if sender.send(command).is_err() {
                    return;
                }
            }
        });
        commands
    }

    /// A program that passes for an engine: this test program, run for its ignored test
    /// `plays_an_engine`.
    pub(crate) fn engine_program(&self, mode: &str) -> String {
        let path = self.path(&format!("engine-{mode}"));
        let own = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = check ]; then [ {mode} != broken ] && exit; \
             echo broken >&2; exit 1; fi\n\
             if [ \"$1\" = clear ]; then echo clear $3 >>{}; [ {mode} != used ] && exit; \
             echo /dev/ublkb5 is in use >&2; exit 1; fi\n\
             FAKE_MODE={mode} FAKE_CONFIG=\"$3\" FAKE_WORDS=\"$1 $2\" \
             exec {} --exact plays_an_engine --ignored --nocapture\n",
            self.path("cleared").display(),
            own.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// The command of a connection; `None` if it only looked whether somebody listens.
pub(crate) fn receive(stream: &mut UnixStream) -> Option<Command> {
    let mut field = [0; 4];
    stream.read_exact(&mut field).ok()?;
    let mut body = vec![0; frame_length(field).unwrap()];
    stream.read_exact(&mut body).unwrap();
    Some(decode_frame(&body).unwrap())
}

/// A state of r0 as seen by alice.
pub(crate) fn state(connection: &str, disk: &str, peer_disk: &str) -> Status {
    let volume = VolumeStatus {
        nr: 0,
        minor: 5,
        backing: "/disk".to_owned(),
        disk: disk.to_owned(),
        peer_disk: peer_disk.to_owned(),
        cstate: connection.to_owned(),
        replication: if connection == "Connected" { "Established" } else { "Off" }.to_owned(),
        resync_suspended: "no".to_owned(),
        uuids: [0x10, 0x20, 0x30, 0x40],
        ..VolumeStatus::default()
    };
    Status {
        name: "r0".to_owned(),
        node: "alice".to_owned(),
        peer: "bob".to_owned(),
        role: "Secondary".to_owned(),
        peer_role: "Primary".to_owned(),
        connection: connection.to_owned(),
        write_ordering: "flush".to_owned(),
        volumes: vec![volume],
        ..Status::default()
    }
}

pub(crate) fn status_reply(status: Status) -> Result<Reply, Refusal> {
    Ok(Reply::Status(Box::new(status)))
}

pub(crate) fn refusal(code: i32, exit: u8, text: &str, advice: &str) -> Refusal {
    Refusal { code, exit, text: text.to_owned(), advice: advice.to_owned() }
}
