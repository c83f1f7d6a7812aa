//! Where configuration text comes from, and how a place in it is named.
//!
//! [`Sources`] keeps the bytes of every file read, so that an error found long after parsing can
//! still quote the line it is about. [`Files`] is the small view of a file system the parser
//! needs; it is implemented by the real one and by a table in memory (standard input, tests).
//! Rules: ours.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest configuration file read, in bytes. Real ones have a few KiB; the limit keeps a
/// mistaken path (a device, a log) from filling the memory.
pub const MAX_FILE_BYTES: usize = 4 << 20;

/// The part of a file system that the parser needs.
pub trait Files {
    /// The content of a file, up to one byte more than [`MAX_FILE_BYTES`].
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// The names in a directory, in any order.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn names(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// The path that identifies the file, with links resolved.
    ///
    /// # Errors
    /// Whatever the file system reports.
    fn real_path(&self, path: &Path) -> io::Result<PathBuf>;
}

/// The file system of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealFiles;

impl Files for RealFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let limit = u64::try_from(MAX_FILE_BYTES + 1).map_err(io::Error::other)?;
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            // A name that is no UTF-8 cannot match a pattern, which is.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }
}

/// A table of files in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryFiles {
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl MemoryFiles {
    /// Adds a file, replacing one of the same path.
    #[must_use]
    pub fn with(mut self, path: impl Into<PathBuf>, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.into(), content.into());
        self
    }
}

impl Files for MemoryFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<String>> {
        let below = self.files.keys().filter_map(|path| path.strip_prefix(dir).ok());
        let firsts = below.filter_map(|rest| rest.components().next());
        Ok(firsts.filter_map(|name| name.as_os_str().to_str().map(str::to_owned)).collect())
    }

    fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        match self.files.contains_key(path) {
            true => Ok(path.to_path_buf()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// A stretch of bytes in one of the files of a [`Sources`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Loc {
    /// Index of the file.
    pub(crate) file: usize,
    /// First byte.
    pub(crate) start: usize,
    /// Number of bytes; zero at the end of the file.
    pub(crate) len: usize,
}

/// One file that was read.
#[derive(Clone, Debug)]
struct Source {
    name: PathBuf,
    bytes: Arc<[u8]>,
}

/// All files read so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    files: Vec<Source>,
}

/// A place in a file, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file as it was named.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Number of characters meant, at least 1.
    pub width: usize,
    /// The text of the line, without its end.
    pub text: String,
}

impl Sources {
    /// Keeps a file; gives its index.
    pub(crate) fn add(&mut self, name: &Path, bytes: Vec<u8>) -> (usize, Arc<[u8]>) {
        let bytes: Arc<[u8]> = bytes.into();
        self.files.push(Source { name: name.to_path_buf(), bytes: Arc::clone(&bytes) });
        (self.files.len() - 1, bytes)
    }

    /// The name of the file of `at`.
    pub(crate) fn file(&self, at: Loc) -> &Path {
        &self.files[at.file].name
    }

    /// The line number of `at`, from 1.
    pub(crate) fn line(&self, at: Loc) -> usize {
        let before = &self.files[at.file].bytes[..at.start];
        1 + before.iter().filter(|&&byte| byte == b'\n').count()
    }

    /// Everything needed to show `at` to the operator.
    pub(crate) fn place(&self, at: Loc) -> Place {
        let bytes = &self.files[at.file].bytes;
        assert!(at.start + at.len <= bytes.len(), "a place lies inside of its file");
        let begin = bytes[..at.start].iter().rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
        let rest = &bytes[begin..];
        let end = begin + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
        let token = &bytes[at.start..(at.start + at.len).min(end).max(at.start)];
        let text = String::from_utf8_lossy(&bytes[begin..end]);
        Place {
            file: self.file(at).to_path_buf(),
            line: self.line(at),
            column: 1 + String::from_utf8_lossy(&bytes[begin..at.start]).chars().count(),
            width: String::from_utf8_lossy(token).chars().count().max(1),
            text: text.trim_end_matches('\r').to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Line, column and width of a token, also at the very end and beside bytes that are no text.
    #[test]
    fn places_are_counted_in_characters() {
        let mut sources = Sources::default();
        let (file, bytes) = sources.add(Path::new("f"), b"a\n\"\xc3\xa4\xff\" bc\r\nd".to_vec());
        let place = sources.place(Loc { file, start: 8, len: 2 });
        assert_eq!((place.line, place.column, place.width), (2, 6, 2));
        assert_eq!(place.text, "\"\u{e4}\u{fffd}\" bc");
        let place = sources.place(Loc { file, start: bytes.len(), len: 0 });
        assert_eq!((place.line, place.column, place.width), (3, 2, 1));
        assert_eq!(place.text, "d");
    }
}
