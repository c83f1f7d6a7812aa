//! Engines as processes: their files, their control sockets, and a small NBD client.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

pub mod nbd;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use replication_core::config::{
    BackingConfig, DiskConfig, EngineConfig, Frontend, HandlersConfig, NbdAddress, NetConfig,
    RateConfig, ResourceConfig, VolumeConfig,
};
use replication_core::control::{
    Command, Refusal, Reply, Status, decode_frame, encode_frame, frame_length,
};
use replication_core::meta::{Geometry, MetaKind, Page, Superblock};
use replication_core::state::OnNoData;
use replication_core::units::{SECTOR_SIZE, Sector, Span, VolumeNr};

/// Longest wait for anything: far above what a loaded machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Addresses that no other test uses: 127.x.y.z by process and count.
fn own_network() -> String {
    static COUNT: AtomicU16 = AtomicU16::new(1);
    let pid = std::process::id();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{}", 1 + (pid + u32::from(count) * 101) % 250, (pid / 250) % 256)
}

/// One node's files and its engine, if that runs.
pub struct Node {
    pub dir: PathBuf,
    pub config: EngineConfig,
    /// Variables for its process.
    pub environment: Vec<(String, String)>,
    child: Option<Child>,
}

/// Two nodes and their directory, which goes with them.
pub struct Bed {
    pub alice: Node,
    pub bob: Node,
    _dir: tempfile::TempDir,
}

impl Bed {
    /// Two nodes with one volume of `mib` MiB each, on files with fresh metadata. Nothing runs.
    pub fn new(mib: u64) -> Self {
        Self::with(mib, |_| {})
    }

    /// The same, with changed settings.
    pub fn with(mib: u64, change: impl Fn(&mut EngineConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let network = own_network();
        let node = |name: &str, peer: &str, local: u8, remote: u8| {
            let dir = dir.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            let mut config = config(&dir, name, peer, &network, (local, remote));
            change(&mut config);
            let node = Node { dir, config, environment: Vec::new(), child: None };
            node.create_disks(mib << 20);
            node
        };
        let (alice, bob) = (node("alice", "bob", 1, 2), node("bob", "alice", 2, 1));
        Self { alice, bob, _dir: dir }
    }

    /// Both engines run, are connected, and alice is Primary with both disks up to date.
    pub fn synced(mib: u64) -> Self {
        let mut bed = Self::new(mib);
        bed.sync();
        bed
    }

    /// Starts both engines and makes alice Primary; waits until both disks are up to date.
    pub fn sync(&mut self) {
        self.alice.start();
        self.bob.start();
        self.alice.wait_for("a connection", |status| {
            status.volumes.iter().all(|volume| volume.cstate == "Connected")
        });
        self.alice.ask(Command::Primary { force: true }).unwrap();
        self.wait_for_sync();
    }

    /// Waits until both disks are up to date.
    pub fn wait_for_sync(&mut self) {
        for node in [&mut self.alice, &mut self.bob] {
            node.wait_for("two good disks", |status| {
                let is_good = |state: &str| state == "UpToDate";
                status.volumes.iter().all(|v| is_good(&v.disk) && is_good(&v.peer_disk))
            });
        }
    }
}

fn config(
    dir: &Path,
    node: &str,
    peer: &str,
    network: &str,
    (local, remote): (u8, u8),
) -> EngineConfig {
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let rate = RateConfig {
        resync_rate_kib: 1_000_000,
        max_rate_kib: 4_000_000,
        min_rate_kib: 0,
        ..RateConfig::default()
    };
    EngineConfig {
        resource: ResourceConfig {
            name: "r0".to_owned(),
            peer: peer.to_owned(),
            net: NetConfig { connect_int: Span::from_secs(1), ..NetConfig::default() },
            on_no_data: OnNoData::IoError,
            volumes: vec![VolumeConfig {
                nr: VolumeNr(0),
                minor: 0,
                meta: Some(MetaKind::Internal),
                disk: DiskConfig { rate, ..DiskConfig::default() },
            }],
        },
        node: node.to_owned(),
        backing: vec![BackingConfig { disk: Some(text(dir.join("disk"))), meta_disk: None }],
        handlers: HandlersConfig::default(),
        local: format!("{network}.{local}:7788").parse().unwrap(),
        remote: format!("{network}.{remote}:7788").parse().unwrap(),
        frontend: Frontend::Nbd(NbdAddress::Unix(text(dir.join("nbd.sock")))),
        queue_depth: 32,
        max_io_size: 1 << 20,
        run_dir: text(dir.to_owned()),
    }
}

impl Node {
    /// Makes the backing files with fresh metadata.
    fn create_disks(&self, bytes: u64) {
        for (volume, backing) in self.config.resource.volumes.iter().zip(&self.config.backing) {
            let Some(disk) = &backing.disk else { continue };
            let data = File::create(disk).unwrap();
            data.set_len(bytes).unwrap();
            let meta = backing.meta_disk.as_ref().map(|path| {
                let meta = File::create(path).unwrap();
                meta.set_len(1 << 20).unwrap();
                meta
            });
            create_metadata(volume.meta.unwrap(), bytes, meta.as_ref().unwrap_or(&data));
        }
    }

    /// Adds volume 5 with its metadata on a file of its own.
    pub fn add_volume(dir: &Path, config: &mut EngineConfig) {
        let mut volume = config.resource.volumes[0].clone();
        volume.nr = VolumeNr(5);
        volume.minor = 5;
        volume.meta = Some(MetaKind::Flexible);
        config.resource.volumes.push(volume);
        let file = |name: &str| Some(dir.join(name).to_str().unwrap().to_owned());
        config.backing.push(BackingConfig { disk: file("disk5"), meta_disk: file("meta5") });
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// The URI of the NBD server.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///0?socket={}", self.dir.join("nbd.sock").display())
    }

    /// A connection to the NBD server.
    pub fn nbd(&self) -> nbd::Client {
        self.nbd_of("0")
    }

    /// A connection to a volume.
    pub fn nbd_of(&self, volume: &str) -> nbd::Client {
        nbd::Client::connect(&self.dir.join("nbd.sock"), volume)
    }

    /// Starts the engine and waits until it has answered `up`.
    pub fn start(&mut self) {
        self.start_without_up();
        let answer = self.ask(Command::Up);
        assert!(answer.is_ok(), "{answer:?}\n{}", self.log());
    }

    /// Starts the engine and waits until it takes commands.
    pub fn start_without_up(&mut self) {
        self.spawn();
        self.wait_for_socket();
    }

    /// Waits until the engine takes commands.
    pub fn wait_for_socket(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        // A killed engine leaves its socket behind, at which nobody answers.
        while UnixStream::connect(self.socket_path()).is_err() {
            self.must_run();
            assert!(Instant::now() < deadline, "no control socket:\n{}", self.log());
            pause();
        }
    }

    /// Starts the process alone.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the engine runs");
        let path = self.dir.join("r0.json");
        std::fs::write(&path, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut process = Process::new(env!("CARGO_BIN_EXE_ublk-target"));
        process.arg("run").arg("--config").arg(path).stdin(Stdio::null()).stderr(log);
        process.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.child = Some(process.spawn().unwrap());
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the engine runs").id()
    }

    /// Ends the engine without any warning.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the engine runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let child = self.child.as_mut().expect("the engine was started");
            if let Some(status) = child.try_wait().unwrap() {
                self.child = None;
                return status;
            }
            assert!(Instant::now() < deadline, "the engine does not end:\n{}", self.log());
            pause();
        }
    }

    fn must_run(&mut self) {
        // Without a process, the engine is a thread of this one.
        let ended = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
        assert!(ended.is_none(), "the engine ended: {ended:?}\n{}", self.log());
    }

    fn socket_path(&self) -> PathBuf {
        self.dir.join("r0.sock")
    }

    /// Gives a command and waits for its answer.
    pub fn ask(&mut self, command: Command) -> Result<Reply, Refusal> {
        self.must_run();
        let mut client = UnixStream::connect(self.socket_path()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(&encode_frame(&command).unwrap()).unwrap();
        let mut length = [0; 4];
        if let Err(error) = client.read_exact(&mut length) {
            panic!("no answer to {command:?}: {error}\n{}", self.log());
        }
        let mut frame = vec![0; frame_length(length).unwrap()];
        client.read_exact(&mut frame).unwrap();
        decode_frame(&frame).unwrap()
    }

    pub fn status(&mut self) -> Status {
        match self.ask(Command::Status) {
            Ok(Reply::Status(status)) => *status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// Waits until the status is as wanted.
    pub fn wait_for(&mut self, what: &str, is_so: impl Fn(&Status) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if is_so(&status) {
                return;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "no {what} on {}:\n{status:#?}\n{}", self.config.node, self.log());
            pause();
        }
    }

    /// The bytes of the volume on the backing file.
    pub fn data(&mut self) -> Vec<u8> {
        let bytes = self.status().volumes[0].size_kib << 10;
        let mut data = vec![0; usize::try_from(bytes).unwrap()];
        File::open(self.disk()).unwrap().read_exact_at(&mut data, 0).unwrap();
        data
    }
}

fn create_metadata(kind: MetaKind, data_bytes: u64, file: &File) {
    let data = Sector(data_bytes / SECTOR_SIZE);
    let meta = Sector(file.metadata().unwrap().len() / SECTOR_SIZE);
    let geometry = Geometry::new(kind, data, meta, 0, 0).unwrap();
    let mut page = Page::zeroed();
    replication_core::meta::al_journal::encode_initialised(&mut page);
    for index in 0..geometry.al_blocks() {
        file.write_all_at(&page.0, geometry.al_block_sector(index).byte()).unwrap();
    }
    Superblock::fresh(&geometry).encode(&mut page);
    file.write_all_at(&page.0, geometry.superblock.byte()).unwrap();
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.config.node, self.log());
        }
    }
}

/// Between two looks at another process.
pub fn pause() {
    std::thread::park_timeout(Duration::from_millis(20));
}

/// Bytes that differ everywhere and between seeds.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}
