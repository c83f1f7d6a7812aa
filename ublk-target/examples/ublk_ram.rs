//! Block devices in memory, all served by one ring thread: shows the ublk frontend at work on a
//! real kernel, and is the program that `tests/guest/ublk_module.sh` runs.
//!
//! ```text
//! ublk_ram [--recover] [--halfway] DIRECTORY ID:MIB...
//! ```
//!
//! The contents lie in a file per device in DIRECTORY (a tmpfs), so that a new process with
//! `--recover` can go on with the devices of one that was killed. With `--halfway` it dies after
//! fetching all tags, before the devices are in service.
//!
//! Commands on standard input: `resize ID SECTORS`, `info ID`, `delete ID`, `stats`, `stop`; the
//! end of the input is a `stop` too. Each command is answered with one line for each device
//! concerned, or with `error: ...`.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use io_uring::{IoUring, squeue};
use nix::fcntl::{FallocateFlags, fallocate};
use replication_core::event::HostOp;
use replication_core::units::{Errno, SECTOR_SIZE, Sector, SectorRange};
use ublk_target::ublk::{
    AddDevice, Control, DeviceId, DeviceInfo, Discard, Flags, IoDesc, Params, Queue, Wakeup,
    become_io_flusher, load_driver,
};

type AnyError = Box<dyn Error + Send + Sync>;

const QUEUE_DEPTH: u16 = 32;
const MAX_IO_BYTES: u32 = 1 << 20;
/// The length of every backing file: more than any device here ever has.
const STORE_BYTES: u64 = 1 << 32;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &(dyn Error + 'static)) {
    let mut text = format!("error: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    // Without a standard error there is nobody to tell.
    let _: io::Result<()> = writeln!(io::stderr(), "{text}");
}

struct Arguments {
    recover: bool,
    halfway: bool,
    directory: String,
    devices: Vec<(DeviceId, Sector)>,
}

fn arguments() -> Result<Arguments, AnyError> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let mut option = |name: &str| {
        let given = words.first().is_some_and(|word| word == name);
        words.drain(..usize::from(given));
        given
    };
    let (recover, halfway) = (option("--recover"), option("--halfway"));
    let Some((directory, devices)) = words.split_first() else {
        return Err("usage: ublk_ram [--recover] [--halfway] DIRECTORY ID:MIB...".into());
    };
    let mut parsed = Vec::new();
    for device in devices {
        let (id, mib) = device.split_once(':').ok_or("a device is ID:MIB")?;
        parsed.push((DeviceId(id.parse()?), Sector(mib.parse::<u64>()? * 2048)));
    }
    Ok(Arguments { recover, halfway, directory: directory.clone(), devices: parsed })
}

fn run() -> Result<(), AnyError> {
    let arguments = arguments()?;
    load_driver()?;
    let mut control = Control::open()?;
    say(&format!("kernel {} features {}", control.kernel(), control.features()))?;
    let mut infos = Vec::new();
    for &(id, sectors) in &arguments.devices {
        infos.push(match arguments.recover {
            true => recover(&mut control, id)?,
            false => create(&mut control, id, sectors)?,
        });
    }
    let mut devices = Vec::new();
    let mut counters = Vec::new();
    for info in &infos {
        let counter = Arc::new(Counters::default());
        devices.push(Device::open(info, Path::new(&arguments.directory), Arc::clone(&counter))?);
        counters.push((info.id, counter));
    }
    let (fetched, all_fetched) = mpsc::channel();
    let ring = thread::spawn(move || {
        if let Err(error) = serve(devices, &fetched) {
            complain(&*error);
            // The main thread may be waiting for this one inside of a control command.
            std::process::abort();
        }
    });
    all_fetched.recv()?;
    if arguments.halfway {
        return Err("died half-way, as told".into());
    }
    for &(id, _) in &arguments.devices {
        match arguments.recover {
            true => control.end_recovery(id, std::process::id())?,
            false => control.start(id, std::process::id())?,
        }
    }
    say("live")?;
    obey(&mut control, &counters)?;
    for &(id, _) in &arguments.devices {
        control.stop(id)?;
    }
    ring.join().map_err(|_| "the ring thread panicked")?;
    for &(id, _) in &arguments.devices {
        control.delete(id)?;
    }
    say("gone")
}

fn create(control: &mut Control, id: DeviceId, sectors: Sector) -> Result<DeviceInfo, AnyError> {
    let flags = control.features().and(Flags::UPDATE_SIZE);
    let info = control.add_device(AddDevice {
        id: Some(id),
        queue_depth: QUEUE_DEPTH,
        max_io_bytes: MAX_IO_BYTES,
        flags,
    })?;
    let params = Params {
        sectors,
        logical_block: 512,
        physical_block: 4096,
        max_io_bytes: MAX_IO_BYTES,
        discard: Some(Discard { granularity: 4096, max_sectors: 16384 }),
        max_zeroes_sectors: 8192,
        rotational: false,
    };
    control.set_params(id, &params)?;
    if control.get_params(id)? != params {
        return Err(format!("{id}: the kernel has other parameters").into());
    }
    Ok(info)
}

fn recover(control: &mut Control, id: DeviceId) -> Result<DeviceInfo, AnyError> {
    control.start_recovery(id)?;
    let params = control.get_params(id)?;
    say(&format!("recover {} sectors {}", id.0, params.sectors.0))?;
    Ok(control.get_info(id)?)
}

fn obey(control: &mut Control, counters: &[(DeviceId, Arc<Counters>)]) -> Result<(), AnyError> {
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["stop"] => return Ok(()),
            ["stats"] => {
                let lines: Vec<String> =
                    counters.iter().map(|(id, counter)| counter.text(*id)).collect();
                Ok(lines.join("\n"))
            }
            ["resize", id, sectors] => control
                .update_size(DeviceId(id.parse()?), Sector(sectors.parse()?))
                .map(|()| "resized".to_owned()),
            ["delete", id] => control.delete(DeviceId(id.parse()?)).map(|()| "deleted".to_owned()),
            ["info", id] => control.get_info(DeviceId(id.parse()?)).map(|i| format!("{i:?}")),
            _ => Ok(format!("error: unknown command {line:?}")),
        };
        say(&answer.unwrap_or_else(|error| format!("error: {error}")))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<(), AnyError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// How many requests of each kind were served.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    fua: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    zeroes: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    fn count(&self, op: HostOp) {
        let counter = match op {
            HostOp::Read => &self.reads,
            HostOp::Write { fua: false } => &self.writes,
            HostOp::Write { fua: true } => &self.fua,
            HostOp::Flush => &self.flushes,
            HostOp::Discard => &self.discards,
            HostOp::WriteZeroes { .. } => &self.zeroes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn text(&self, id: DeviceId) -> String {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            "stats {} reads={} writes={} fua={} flushes={} discards={} zeroes={} refused={}",
            id.0,
            get(&self.reads),
            get(&self.writes),
            get(&self.fua),
            get(&self.flushes),
            get(&self.discards),
            get(&self.zeroes),
            get(&self.refused),
        )
    }
}

struct Device {
    queue: Queue,
    store: File,
    /// One for each tag. The kernel uses a tag's buffer while its command is parked.
    buffers: Vec<Vec<u8>>,
    parked: u16,
    counters: Arc<Counters>,
}

impl Device {
    fn open(info: &DeviceInfo, dir: &Path, counters: Arc<Counters>) -> Result<Self, AnyError> {
        let store = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(format!("ublk{}.ram", info.id.0)))?;
        store.set_len(STORE_BYTES)?;
        let bytes = usize::try_from(info.max_io_bytes)?;
        let buffers = vec![vec![0; bytes]; usize::from(info.queue_depth)];
        Ok(Self { queue: Queue::open(info)?, store, buffers, parked: 0, counters })
    }

    fn fetch(&mut self, tag: u16) -> squeue::Entry {
        self.parked += 1;
        let buffer = self.buffers[usize::from(tag)].as_mut_ptr();
        self.queue.fetch(tag, buffer)
    }

    /// Does what a tag's request wants; the entry answers it and parks the tag again.
    fn on_request(&mut self, tag: u16) -> squeue::Entry {
        let answer = match self.queue.descriptor(tag) {
            Ok(request) => {
                self.counters.count(request.op);
                self.perform(tag, request)
            }
            Err(refused) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                Err(refused.errno())
            }
        };
        let buffer = self.buffers[usize::from(tag)].as_mut_ptr();
        self.queue.commit_and_fetch(tag, answer, buffer)
    }

    fn perform(&mut self, tag: u16, request: IoDesc) -> Result<u32, Errno> {
        let range = request.range;
        let bytes = u32::try_from(range.bytes()).map_err(|_| Errno::EINVAL)?;
        let length = usize::try_from(bytes).map_err(|_| Errno::EINVAL)?;
        let offset = range.start * SECTOR_SIZE;
        let buffer = &mut self.buffers[usize::from(tag)];
        let result = match request.op {
            HostOp::Read => self.store.read_exact_at(&mut buffer[..length], offset),
            HostOp::Write { .. } => self.store.write_all_at(&buffer[..length], offset),
            // Memory is as durable as it will ever be.
            HostOp::Flush => Ok(()),
            HostOp::Discard => punch(&self.store, range),
            HostOp::WriteZeroes { unmap: true } => punch(&self.store, range),
            HostOp::WriteZeroes { unmap: false } => {
                self.store.write_all_at(&vec![0; length], offset)
            }
        };
        result.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno))?;
        Ok(bytes)
    }
}

fn punch(store: &File, range: SectorRange) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let number = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let (offset, length) = (number(range.start * SECTOR_SIZE)?, number(range.bytes())?);
    Ok(fallocate(store, flags, offset, length)?)
}

/// The ring thread: all tags of all devices in one ring, until every device has stopped.
fn serve(mut devices: Vec<Device>, fetched: &mpsc::Sender<()>) -> Result<(), AnyError> {
    become_io_flusher()?;
    let tags: u32 = devices.iter().map(|device| u32::from(device.queue.depth())).sum();
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(tags.next_power_of_two().max(1))?;
    let mut next: Vec<squeue::Entry> = Vec::new();
    for (index, device) in devices.iter_mut().enumerate() {
        for tag in 0..device.queue.depth() {
            next.push(device.fetch(tag).user_data(name(index, tag)?));
        }
    }
    // All tags in one go, so that there is hardly a moment with some of them fetched.
    push(&mut ring, &mut next)?;
    ring.submit()?;
    fetched.send(())?;
    while devices.iter().any(|device| device.parked > 0) {
        push(&mut ring, &mut next)?;
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        for done in ring.completion() {
            let index = usize::try_from(done.user_data() >> 16)?;
            let tag = u16::try_from(done.user_data() & 0xffff)?;
            match Wakeup::from_result(done.result()) {
                Wakeup::Request => {
                    let entry = devices[index].on_request(tag);
                    next.push(entry.user_data(done.user_data()));
                }
                Wakeup::Stopping => devices[index].parked -= 1,
                Wakeup::Failed { result } => {
                    return Err(format!("device {index}, tag {tag}: result {result}").into());
                }
            }
        }
    }
    Ok(())
}

fn push(ring: &mut IoUring, entries: &mut Vec<squeue::Entry>) -> Result<(), AnyError> {
    for entry in entries.drain(..) {
        // SAFETY: every entry names a buffer of its own tag, long enough for any request, and
        // the queue's open file. `serve` keeps both until no tag is parked any more, or ends the
        // process. The buffer is not looked at before the completion.
        unsafe { ring.submission().push(&entry)? };
    }
    Ok(())
}

fn name(index: usize, tag: u16) -> Result<u64, AnyError> {
    Ok(u64::try_from(index)? << 16 | u64::from(tag))
}
