//! The host of the Primary: clients of its NBD server that know what every sector must hold.
//!
//! The device is divided among a few clients. Each has one request under way at a time, so that
//! for its part there is no doubt: a sector holds what was acknowledged last (RD-1, DUR-5). Every
//! sector says where it belongs and which version it is, so that torn, misplaced and old data is
//! recognised. With a good local disk no request of a Primary may fail, and none may wait for
//! longer than it takes to give up a peer (WP-6, LV-1).

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sim::rng::{Rng, mix};

/// Longest that any request may take: far above `ping-int`, `ping-timeout` and `ko-count` times
/// `timeout` of the test, on any machine.
const LONGEST: Duration = Duration::from_secs(40);
/// Bytes of a sector.
pub const SECTOR: usize = 512;
const CLIENTS: u64 = 4;
/// Sectors of the longest request.
const MOST: u64 = 128;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;

/// A connection to an NBD server: one request at a time.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    /// Bytes of the device.
    pub size: u64,
    cookie: u64,
}

impl Client {
    /// Connects to volume 0.
    ///
    /// # Errors
    /// No server, or none that speaks NBD.
    pub fn connect(path: &Path) -> Result<Self> {
        let mut socket =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        socket.set_read_timeout(Some(LONGEST))?;
        socket.set_write_timeout(Some(LONGEST))?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "no NBD server: {greeting:?}");
        let mut hello = vec![0, 0, 0, 3];
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
        hello.push(b'0');
        socket.write_all(&hello)?;
        let mut info = [0; 10];
        socket.read_exact(&mut info)?;
        let size = u64::from_be_bytes(info[..8].try_into().expect("eight bytes"));
        Ok(Self { socket, size, cookie: 0 })
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        at: u64,
        length: u64,
        data: &[u8],
    ) -> Result<()> {
        self.cookie += 1;
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&at.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
        bytes.extend_from_slice(data);
        let what = || format!("NBD command {command} at byte {at}, {length} bytes");
        self.socket.write_all(&bytes).with_context(what)?;
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply).with_context(|| format!("no answer to {}", what()))?;
        ensure!(reply[..4] == 0x6744_6698_u32.to_be_bytes(), "no NBD reply: {reply:?}");
        ensure!(reply[8..] == self.cookie.to_be_bytes(), "an answer to something else");
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
        ensure!(error == 0, "error {error}: {}", what());
        Ok(())
    }

    fn read(&mut self, at: u64, length: u64) -> Result<Vec<u8>> {
        self.request(READ, 0, at, length, &[])?;
        let mut data = vec![0; usize::try_from(length)?];
        self.socket.read_exact(&mut data).context("the rest of a read")?;
        Ok(data)
    }

    /// Writes.
    ///
    /// # Errors
    /// The request failed, or was not answered in time.
    pub fn write(&mut self, at: u64, data: &[u8], fua: bool) -> Result<()> {
        let length = u64::try_from(data.len())?;
        self.request(WRITE, if fua { FUA } else { 0 }, at, length, data)
    }
}

/// The bytes of a version of a sector; version 0 is zeroes.
fn contents(seed: u64, sector: u64, version: u32, out: &mut [u8]) {
    if version == 0 {
        out.fill(0);
        return;
    }
    let mut word = mix(seed ^ mix(sector << 32 | u64::from(version)));
    for part in out.chunks_exact_mut(8) {
        part.copy_from_slice(&word.to_le_bytes());
        word = mix(word);
    }
    // To be read in a dump.
    out[..8].copy_from_slice(&sector.to_be_bytes());
    out[8..12].copy_from_slice(&version.to_be_bytes());
}

/// A part of the device and what it must hold.
#[derive(Clone, Debug)]
struct Part {
    seed: u64,
    first: u64,
    versions: Vec<u32>,
    rng: Rng,
    serial: u32,
}

impl Part {
    fn sectors(&self) -> u64 {
        u64::try_from(self.versions.len()).expect("it fits")
    }

    fn expected(&self, range: &Range<u64>) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(range.end - range.start).expect("small") * SECTOR];
        for (sector, out) in range.clone().zip(data.chunks_exact_mut(SECTOR)) {
            contents(self.seed, self.first + sector, self.version(sector), out);
        }
        data
    }

    fn version(&self, sector: u64) -> u32 {
        self.versions[usize::try_from(sector).expect("within the part")]
    }

    fn set(&mut self, range: &Range<u64>, version: u32) {
        for sector in range.clone() {
            self.versions[usize::try_from(sector).expect("within the part")] = version;
        }
    }

    fn compare(&self, range: &Range<u64>, found: &[u8]) -> Result<()> {
        let expected = self.expected(range);
        if expected == found {
            return Ok(());
        }
        let pairs = expected.chunks_exact(SECTOR).zip(found.chunks_exact(SECTOR));
        let (sector, (_, bad)) =
            range.clone().zip(pairs).find(|(_, (one, other))| one != other).expect("they differ");
        let head: Vec<String> = bad[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        bail!(
            "sector {} must hold version {}, but begins with {}",
            self.first + sector,
            self.version(sector),
            head.join(" ")
        )
    }

    fn check(&self, client: &mut Client, range: &Range<u64>) -> Result<()> {
        let at = (self.first + range.start) * 512;
        let found = client.read(at, (range.end - range.start) * 512)?;
        self.compare(range, &found)
    }

    fn place(&mut self) -> Range<u64> {
        let sectors = match self.rng.below(10) {
            0..3 => self.rng.between(1, 9),
            3..8 => 8,
            _ => 8 * self.rng.between(1, MOST / 8),
        };
        let mut start = self.rng.below(self.sectors() - sectors);
        if self.rng.chance(80) {
            start -= start % 8;
        }
        start..start + sectors
    }

    /// One request. The ledger is changed when it is answered; if it fails, so does the test.
    fn step(&mut self, client: &mut Client) -> Result<()> {
        let range = self.place();
        let (at, bytes) = ((self.first + range.start) * 512, (range.end - range.start) * 512);
        match self.rng.below(100) {
            0..30 => return self.check(client, &range),
            30..33 => return client.request(FLUSH, 0, 0, 0, &[]),
            33..38 => {
                client.request(WRITE_ZEROES, 0, at, bytes, &[])?;
                self.set(&range, 0);
            }
            choice => {
                self.serial += 1;
                let mut new = self.clone_of(&range);
                new.set(&(0..range.end - range.start), self.serial);
                let data = new.expected(&(0..range.end - range.start));
                client.write(at, &data, choice > 90)?;
                self.set(&range, self.serial);
            }
        }
        Ok(())
    }

    /// A part of the part, without its chance.
    fn clone_of(&self, range: &Range<u64>) -> Self {
        let length = usize::try_from(range.end - range.start).expect("small");
        Self {
            seed: self.seed,
            first: self.first + range.start,
            versions: vec![0; length],
            rng: Rng::new(0),
            serial: 0,
        }
    }
}

/// What the whole device must hold.
#[derive(Debug)]
pub struct Ledger {
    parts: Vec<Part>,
}

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<Part>>>,
}

impl Ledger {
    /// A device of zeroes.
    ///
    /// # Panics
    /// If it is too small to be divided.
    #[must_use]
    pub fn new(seed: u64, bytes: u64) -> Self {
        let each = bytes / 512 / CLIENTS;
        assert!(each > 2 * MOST, "a device of {bytes} bytes is too small");
        let part = |number| Part {
            seed,
            first: number * each,
            versions: vec![0; usize::try_from(each).expect("it fits")],
            rng: Rng::new(mix(seed ^ number)),
            serial: 0,
        };
        Self { parts: (0..CLIENTS).map(part).collect() }
    }

    /// Starts clients of the server at `path`.
    ///
    /// # Errors
    /// No server there.
    pub fn load(self, path: &Path) -> Result<Load> {
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = Vec::new();
        for part in self.parts {
            let client = Client::connect(path)?;
            let (stop, requests) = (Arc::clone(&stop), Arc::clone(&requests));
            clients.push(std::thread::spawn(move || work(part, client, &stop, &requests)));
        }
        Ok(Load { stop, requests, clients })
    }

    /// Reads everything and compares.
    ///
    /// # Errors
    /// The first sector that holds something else, or a request that failed.
    pub fn check(&self, path: &Path) -> Result<()> {
        const AT_ONCE: u64 = 1024;
        let mut client = Client::connect(path)?;
        for part in &self.parts {
            for start in (0..part.sectors()).step_by(usize::try_from(AT_ONCE)?) {
                let range = start..(start + AT_ONCE).min(part.sectors());
                part.check(&mut client, &range)?;
            }
        }
        Ok(())
    }

    /// Writes a block once more, with a new version.
    ///
    /// # Errors
    /// The request failed.
    pub fn write_once(&mut self, path: &Path) -> Result<()> {
        let part = &mut self.parts[0];
        part.serial += 1;
        part.set(&(0..8), part.serial);
        let data = part.expected(&(0..8));
        Client::connect(path)?.write(part.first * 512, &data, false)
    }
}

fn work(
    mut part: Part,
    mut client: Client,
    stop: &AtomicBool,
    requests: &AtomicU64,
) -> Result<Part> {
    while !stop.load(Ordering::SeqCst) {
        let begun = Instant::now();
        part.step(&mut client)?;
        ensure!(begun.elapsed() < LONGEST, "a request took {:?}", begun.elapsed());
        requests.fetch_add(1, Ordering::SeqCst);
    }
    Ok(part)
}

impl Load {
    /// Requests answered so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Whether a client has found something wrong.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.clients.iter().any(JoinHandle::is_finished)
    }

    /// Ends the clients when their requests are answered.
    ///
    /// # Errors
    /// What a client has found.
    pub fn stop(self) -> Result<Ledger> {
        self.stop.store(true, Ordering::SeqCst);
        let mut parts = Vec::new();
        for client in self.clients {
            let part = client.join().ok().context("a client panicked")?;
            parts.push(part.context("a client of the Primary")?);
        }
        Ok(Ledger { parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contents tell sectors and versions apart, and a wrong sector is named.
    #[test]
    fn a_wrong_sector_is_found() {
        let mut ledger = Ledger::new(5, 4 << 20);
        let part = &mut ledger.parts[1];
        part.set(&(3..6), 7);
        let mut data = part.expected(&(0..8));
        part.compare(&(0..8), &data).unwrap();
        part.compare(&(1..9), &data).unwrap_err();
        data[4 * SECTOR + 100] ^= 4;
        let error = part.compare(&(0..8), &data).unwrap_err().to_string();
        assert!(error.contains(&format!("sector {} must hold version 7", part.first + 4)));
    }
}
