//! The memory that payload lives in: one page-aligned mapping for the whole life of the engine.
//!
//! | pages | what |
//! |---|---|
//! | `0 .. first_pool_page` | buffers of the frontends' request slots, volume by volume |
//! | `first_pool_page .. + pool_pages` | the pool, given out by the core |
//! | the last [`ZERO_PAGES`] | zeroes, for disks that cannot write zeroes by themselves |
//!
//! A [`Buf`] names a page; nobody but this module and the ring sees addresses. The kernel reads
//! and writes the pages of operations in flight at any time, so no reference into the mapping is
//! ever formed: bytes are copied in and out.
//!
//! Invariants kept: LV-2 (payload memory is allocated once, before the first request).
//! Not responsible for: who may use which page when (the core for its pool, the frontends for
//! their slots).

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap_anonymous, munlockall, munmap};
use replication_core::event::{HostTag, VolumeIx};
use replication_core::resource::Memory;
use replication_core::units::{BLOCK_SIZE, Buf};

/// Bytes of a page of the arena.
pub const PAGE_SIZE: usize = 4096;
/// Pages of zeroes at the end: one write of a fallback covers 256 KiB.
pub const ZERO_PAGES: u32 = 64;
/// Pages of the pool besides the receive buffers of the peer: resync requests, verify and reads
/// for the peer (8 MiB).
const RESYNC_PAGES: u32 = 2048;
/// Fewest receive pages whatever `max-buffers` says: four of the largest requests (4 MiB).
const RECEIVE_PAGES_MIN: u32 = 1024;

const _: () = assert!(PAGE_SIZE as u64 == BLOCK_SIZE);

/// How the arena is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    volumes: u32,
    queue_depth: u16,
    pages_per_tag: u32,
    pool_pages: u32,
}

impl Layout {
    /// The layout for `volumes` volumes with `queue_depth` slots of `max_io_size` bytes each, and
    /// `max_buffers` pages for what the peer sends.
    ///
    /// # Errors
    /// The page numbers do not fit into 32 bits.
    pub fn new(
        volumes: usize,
        queue_depth: u16,
        max_io_size: u32,
        max_buffers: u32,
    ) -> Result<Self> {
        let volumes = u32::try_from(volumes).context("number of volumes")?;
        let page = u32::try_from(PAGE_SIZE).context("page size")?;
        ensure!(
            max_io_size > 0 && max_io_size.is_multiple_of(page),
            "max_io_size is no multiple of 4096"
        );
        let pages_per_tag = max_io_size / page;
        let pool_pages = max_buffers.max(RECEIVE_PAGES_MIN).saturating_add(RESYNC_PAGES);
        let tags = volumes.checked_mul(u32::from(queue_depth));
        let total = tags
            .and_then(|tags| tags.checked_mul(pages_per_tag))
            .and_then(|pages| pages.checked_add(pool_pages))
            .and_then(|pages| pages.checked_add(ZERO_PAGES));
        ensure!(total.is_some(), "{volumes} volumes x {queue_depth} slots x {max_io_size} bytes");
        Ok(Self { volumes, queue_depth, pages_per_tag, pool_pages })
    }

    /// What the core has to know.
    #[must_use]
    pub fn memory(&self) -> Memory {
        Memory {
            first_pool_page: self.first_pool_page(),
            pool_pages: self.pool_pages,
            queue_depth: self.queue_depth,
        }
    }

    /// The buffer of a request slot.
    ///
    /// # Panics
    /// If there is no such slot.
    #[must_use]
    pub fn tag_buf(&self, volume: VolumeIx, tag: HostTag) -> Buf {
        assert!(u32::from(volume.0) < self.volumes, "volume {} has no slots", volume.0);
        assert!(tag.0 < self.queue_depth, "slot {} of {}", tag.0, self.queue_depth);
        let slot = u32::from(volume.0) * u32::from(self.queue_depth) + u32::from(tag.0);
        Buf(slot * self.pages_per_tag)
    }

    /// The first page of zeroes.
    #[must_use]
    pub fn zero_buf(&self) -> Buf {
        Buf(self.first_pool_page() + self.pool_pages)
    }

    fn first_pool_page(&self) -> u32 {
        self.volumes * u32::from(self.queue_depth) * self.pages_per_tag
    }

    fn pages(&self) -> usize {
        let pages = self.first_pool_page() + self.pool_pages + ZERO_PAGES;
        usize::try_from(pages).expect("page numbers have 32 bits")
    }
}

/// The mapping.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
    layout: Layout,
}

impl Arena {
    /// Maps the memory. It is zeroed; locking it is tried, and a failure is reported as a warning
    /// because the engine works without, only not safely under memory pressure.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(layout: Layout) -> Result<Self> {
        let bytes = layout.pages().checked_mul(PAGE_SIZE).and_then(NonZeroUsize::new);
        let bytes = bytes.context("size of the payload memory")?;
        let mapped = map(bytes).or_else(|errno| {
            // All future memory was to be locked, but not as much as this may be.
            let unlocked = if errno == Errno::EAGAIN { munlockall() } else { Err(errno) };
            unlocked.and_then(|()| map(bytes))
        });
        let base = mapped.with_context(|| format!("map {bytes} bytes of payload memory"))?;
        let arena = Self { base, bytes, layout };
        // SAFETY: the range was mapped above and stays so until `drop`.
        let locked = unsafe { mlock(arena.base.cast(), bytes.get()) };
        if let Err(errno) = locked {
            tracing::warn!(
                "payload memory of {bytes} bytes is not locked: {errno}; raise RLIMIT_MEMLOCK \
                 (LimitMEMLOCK=infinity) or memory reclaim may wait for this process"
            );
        }
        Ok(arena)
    }

    /// How it is divided.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Copies `bytes` to byte `offset` behind the start of `buf`.
    ///
    /// # Panics
    /// If the end lies outside of the arena.
    pub fn copy_in(&self, buf: Buf, offset: usize, bytes: &[u8]) {
        let target = self.address(buf, offset, bytes.len());
        // SAFETY: `address` checked that the target range lies inside of the mapping; the source
        // is a slice outside of it, as no references into the mapping exist.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Fills `bytes` from byte `offset` behind the start of `buf`.
    ///
    /// # Panics
    /// If the end lies outside of the arena.
    pub fn copy_out(&self, buf: Buf, offset: usize, bytes: &mut [u8]) {
        let source = self.address(buf, offset, bytes.len());
        // SAFETY: `address` checked that the source range lies inside of the mapping; the target
        // is a slice outside of it, as no references into the mapping exist.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The address of byte `offset` behind the start of `buf`, from which `len` bytes lie inside
    /// of the arena.
    ///
    /// # Panics
    /// If they do not.
    pub(crate) fn address(&self, buf: Buf, offset: usize, len: usize) -> *mut u8 {
        let page = usize::try_from(buf.0).expect("page numbers have 32 bits");
        let start = page.checked_mul(PAGE_SIZE).and_then(|start| start.checked_add(offset));
        let start = start.expect("an address of the arena fits into usize");
        let end = start.checked_add(len).expect("an address of the arena fits into usize");
        assert!(end <= self.bytes.get(), "{buf:?} + {offset}: {len} bytes reach out of the arena");
        self.base.as_ptr().wrapping_add(start)
    }
}

fn map(bytes: NonZeroUsize) -> nix::Result<NonNull<u8>> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no other memory of
    // this process.
    unsafe { mmap_anonymous(None, bytes, access, flags) }.map(NonNull::cast)
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone; the ring, which alone hands its addresses to the
        // kernel, keeps the arena for ever when operations are still in flight.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes.get()) };
        assert!(unmapped.is_ok(), "the arena's own mapping can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(2, 4, 8192, 0).unwrap()
    }

    #[test]
    fn slots_pool_and_zeroes_do_not_overlap() {
        let layout = layout();
        assert_eq!(layout.tag_buf(VolumeIx(0), HostTag(0)), Buf(0));
        assert_eq!(layout.tag_buf(VolumeIx(0), HostTag(3)), Buf(6));
        assert_eq!(layout.tag_buf(VolumeIx(1), HostTag(0)), Buf(8));
        let memory = layout.memory();
        assert_eq!((memory.first_pool_page, memory.queue_depth), (16, 4));
        assert_eq!(memory.pool_pages, RECEIVE_PAGES_MIN + RESYNC_PAGES);
        assert_eq!(layout.zero_buf(), Buf(16 + memory.pool_pages));
    }

    #[test]
    fn a_layout_that_does_not_fit_is_refused() {
        Layout::new(64, 4096, 1 << 30, 0).unwrap_err();
        Layout::new(1, 1, 1000, 0).unwrap_err();
    }

    #[test]
    fn bytes_come_back_and_the_end_is_guarded() {
        let arena = Arena::new(layout()).unwrap();
        arena.copy_in(Buf(3), 100, b"payload");
        let mut back = [0; 7];
        arena.copy_out(Buf(3), 100, &mut back);
        assert_eq!(&back, b"payload");
        let last = arena.layout().zero_buf();
        let zeroes = usize::try_from(ZERO_PAGES).unwrap() * PAGE_SIZE;
        arena.address(last, 0, zeroes);
        let outside = std::panic::catch_unwind(|| arena.address(last, 1, zeroes));
        outside.unwrap_err();
    }
}
