//! A small NBD client: old-style export name, simple replies, one request at a time or several.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::PATIENCE;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const FUA: u16 = 1;

pub struct Client {
    pub socket: UnixStream,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
}

impl Client {
    pub fn connect(path: &Path, export: &str) -> Self {
        let mut socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = vec![0, 0, 0, 3];
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&u32::try_from(export.len()).unwrap().to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        socket.write_all(&hello).unwrap();
        let mut info = [0; 10];
        socket.read_exact(&mut info).unwrap();
        let size = u64::from_be_bytes(info[..8].try_into().unwrap());
        let flags = u16::from_be_bytes(info[8..].try_into().unwrap());
        Self { socket, size, flags, cookie: 0 }
    }

    /// Sends a request without waiting for the answer.
    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) {
        self.cookie += 1;
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.socket.write_all(&bytes).unwrap();
    }

    /// The error of the next answer (0: none) and its cookie.
    pub fn answer(&mut self) -> (u32, u64) {
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }

    fn run(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> u32 {
        self.send(command, flags, offset, len, payload);
        let (error, cookie) = self.answer();
        assert_eq!(cookie, self.cookie);
        error
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.run(WRITE, 0, offset, u32::try_from(data.len()).unwrap(), data)
    }

    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.run(WRITE, FUA, offset, u32::try_from(data.len()).unwrap(), data)
    }

    pub fn flush(&mut self) -> u32 {
        self.run(FLUSH, 0, 0, 0, &[])
    }

    pub fn trim(&mut self, offset: u64, length: u32) -> u32 {
        self.run(TRIM, 0, offset, length, &[])
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> u32 {
        self.run(WRITE_ZEROES, 0, offset, length, &[])
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.run(READ, 0, offset, length, &[]) {
            0 => {
                let mut data = vec![0; usize::try_from(length).unwrap()];
                self.socket.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }
}
