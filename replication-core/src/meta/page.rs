//! The unit of metadata I/O: one aligned 4 KiB block, and numbers inside of it.
//!
//! Multi-byte numbers of superblock and activity log are big endian; the bitmap is not, and does
//! not use these accessors. Offsets are constants of the format modules: one beyond the page is
//! a mistake of ours and panics.

use std::fmt;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// One 4 KiB block of metadata, aligned so that it can be read and written around the page cache.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE_SIZE]);

const _: () = assert!(size_of::<Page>() == PAGE_SIZE && align_of::<Page>() == PAGE_SIZE);

impl Page {
    /// A page of zero bytes on the heap.
    #[must_use]
    pub fn zeroed() -> Box<Self> {
        Box::new(Self([0; PAGE_SIZE]))
    }

    /// Overwrites the page with zero bytes.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[at..at + N]);
        bytes
    }

    pub(crate) fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn i32_at(&self, at: usize) -> i32 {
        i32::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn put_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_i32(&mut self, at: usize, value: i32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
}

impl fmt::Debug for Page {
    /// The bytes up to the last one that is not zero.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.0.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        write!(f, "Page(")?;
        for byte in &self.0[..used] {
            write!(f, "{byte:02x}")?;
        }
        write!(f, ")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers are big endian and keep their sign.
    #[test]
    fn numbers_are_big_endian() {
        let mut page = Page::zeroed();
        page.put_u64(0, 0x0102_0304_0506_0708);
        page.put_i32(8, -64);
        page.put_u32(12, 0x6b);
        page.put_u16(4094, 0xfffe);
        assert_eq!(page.0[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(page.0[8..16], [0xff, 0xff, 0xff, 0xc0, 0, 0, 0, 0x6b]);
        assert_eq!((page.u64_at(0), page.i32_at(8)), (0x0102_0304_0506_0708, -64));
        assert_eq!((page.u32_at(12), page.u16_at(4094)), (0x6b, 0xfffe));
    }

    /// A page of a vector is aligned for direct I/O.
    #[test]
    fn pages_are_aligned() {
        let page = Page::zeroed();
        assert_eq!(std::ptr::from_ref(&*page).addr() % PAGE_SIZE, 0);
    }
}
