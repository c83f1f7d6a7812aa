//! Which pages of the driver's payload arena are in use.
//!
//! The pool hands out contiguous runs of 4 KiB pages by number, so that one payload is one buffer
//! for disk and socket. It is a buddy allocator: a run has a power of two of pages, at most
//! [`MAX_PAGES`], and starts at a multiple of its length counted from the first page of the pool.
//! A freed run merges with its other half whenever that is free too, hence no fragmentation
//! outlives the buffers that caused it. The bytes belong to the driver; this module never sees
//! them.
//!
//! Invariants kept:
//! - LV-2: a pool has a fixed size; when nothing fits, the caller waits. Nothing allocates after
//!   creation.
//! - A page belongs to at most one buffer. Giving back what was not given out is our own error
//!   and ends the process, before two requests share memory.
//! - Same calls, same page numbers.
//!
//! Source: ours.

use crate::limits::MAX_BIO_SIZE;
use crate::units::Buf;

/// Bytes of a page, the granule of allocation.
pub const PAGE_BYTES: u32 = 4096;
/// Most pages of one buffer: the largest payload of one request.
pub const MAX_PAGES: u32 = MAX_BIO_SIZE / PAGE_BYTES;

/// A run of order `n` has `2^n` pages.
const MAX_ORDER: u32 = MAX_PAGES.ilog2();
const ORDERS: usize = 9;

const _: () = assert!(MAX_PAGES.is_power_of_two());
const _: () = assert!(MAX_PAGES == 1 << (ORDERS - 1));

/// What a page is to the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// Part of a run, but not its first page.
    Inner,
    /// First page of a free run, with its neighbours in the list of its order.
    Free { order: u32, prev: Option<u32>, next: Option<u32> },
    /// First page of a buffer.
    Taken { order: u32 },
}

/// The pages of one arena, free or taken.
#[derive(Debug)]
pub struct BufferPool {
    first_page: u32,
    pages: Vec<Page>,
    /// First free run of each order.
    heads: [Option<u32>; ORDERS],
    free_pages: u32,
}

impl BufferPool {
    /// A pool of the `pages` pages from `first_page` on, all free.
    ///
    /// # Panics
    /// If the page numbers do not fit into 32 bits.
    #[must_use]
    pub fn new(first_page: u32, pages: u32) -> Self {
        assert!(first_page.checked_add(pages).is_some(), "page numbers have 32 bits");
        let mut pool = Self {
            first_page,
            pages: vec![Page::Inner; slot(pages)],
            heads: [None; ORDERS],
            free_pages: pages,
        };
        // The last run becomes the head, so that runs are handed out in ascending order.
        for run in (0..pages / MAX_PAGES).rev() {
            pool.push(run * MAX_PAGES, MAX_ORDER);
        }
        let mut at = pages - pages % MAX_PAGES;
        for order in (0..MAX_ORDER).rev() {
            if pages & (1 << order) != 0 {
                pool.push(at, order);
                at += 1 << order;
            }
        }
        assert!(at == pages, "every page is part of a run");
        pool
    }

    /// A buffer of at least `bytes` bytes, rounded up to a power of two of pages; `None` if no
    /// free run is long enough now (which may be although [`Self::free_pages`] is larger).
    ///
    /// # Panics
    /// If `bytes` is 0 or above [`MAX_BIO_SIZE`]: an empty payload needs no buffer, and a longer
    /// one would wait for ever.
    pub fn alloc(&mut self, bytes: u32) -> Option<Buf> {
        assert!(bytes > 0, "an empty payload needs no buffer");
        assert!(bytes <= MAX_BIO_SIZE, "no request has a payload of {bytes} bytes");
        let order = bytes.div_ceil(PAGE_BYTES).next_power_of_two().ilog2();
        let (mut have, at) =
            (order..=MAX_ORDER).find_map(|o| self.heads[slot(o)].map(|at| (o, at)))?;
        self.unlink(at);
        while have > order {
            have -= 1;
            self.push(at + (1 << have), have);
        }
        self.pages[slot(at)] = Page::Taken { order };
        assert!(self.free_pages >= 1 << order);
        self.free_pages -= 1 << order;
        Some(Buf(self.first_page + at))
    }

    /// Takes a buffer back.
    ///
    /// # Panics
    /// If `buf` is not a buffer of this pool that is in use now.
    pub fn free(&mut self, buf: Buf) {
        let mut order = self.order_of(buf);
        let mut at = buf.0 - self.first_page;
        self.free_pages += 1 << order;
        self.pages[slot(at)] = Page::Inner;
        while order < MAX_ORDER && self.is_free_run(at ^ (1 << order), order) {
            self.unlink(at ^ (1 << order));
            at &= !(1 << order);
            order += 1;
        }
        self.push(at, order);
        assert!(self.free_pages <= self.total_pages());
    }

    /// Pages that the buffer `buf` takes.
    ///
    /// # Panics
    /// If `buf` is not a buffer of this pool that is in use now.
    #[must_use]
    pub fn pages_of(&self, buf: Buf) -> u32 {
        1 << self.order_of(buf)
    }

    /// Pages that belong to no buffer.
    #[must_use]
    pub fn free_pages(&self) -> u32 {
        self.free_pages
    }

    /// Pages of the pool.
    #[must_use]
    pub fn total_pages(&self) -> u32 {
        u32::try_from(self.pages.len()).expect("created with a 32-bit number of pages")
    }

    /// Walks over all runs and lists and compares what is kept twice.
    ///
    /// # Panics
    /// If the pool contradicts itself or two halves of a run lie free side by side.
    pub fn self_check(&self) {
        let (mut at, mut free_runs, mut free_pages) = (0, 0, 0);
        while at < self.total_pages() {
            let order = match self.pages[slot(at)] {
                Page::Inner => panic!("page {at} belongs to no run"),
                Page::Taken { order } => order,
                Page::Free { order, .. } => {
                    let buddy = at ^ (1 << order);
                    let halves = order < MAX_ORDER && self.is_free_run(buddy, order);
                    assert!(!halves, "runs {at} and {buddy} should be one");
                    free_runs += 1;
                    free_pages += 1 << order;
                    order
                }
            };
            assert!(at % (1 << order) == 0, "run {at} of order {order} is not aligned");
            let inner = &self.pages[slot(at) + 1..slot(at + (1 << order))];
            assert!(inner.iter().all(|page| *page == Page::Inner), "run {at} overlaps another");
            at += 1 << order;
        }
        assert_eq!(at, self.total_pages(), "the last run ends with the pool");
        assert_eq!(free_pages, self.free_pages, "counted free pages");
        assert_eq!(self.listed_runs(), free_runs, "every free run is listed once");
    }

    /// Walks over the lists of free runs, checks their links and counts the runs.
    fn listed_runs(&self) -> u32 {
        let mut listed = 0;
        for (order, head) in (0u32..).zip(self.heads) {
            let (mut before, mut at) = (None, head);
            while let Some(index) = at {
                let Page::Free { order: of_run, prev, next } = self.pages[slot(index)] else {
                    panic!("page {index} is listed as free");
                };
                assert_eq!((of_run, prev), (order, before), "links of run {index}");
                listed += 1;
                assert!(listed <= self.total_pages(), "a list of free runs has a loop");
                (before, at) = (at, next);
            }
        }
        listed
    }

    fn order_of(&self, buf: Buf) -> u32 {
        let at = buf.0.checked_sub(self.first_page).expect("the buffer is of another pool");
        assert!(at < self.total_pages(), "the buffer is of another pool");
        match self.pages[slot(at)] {
            Page::Taken { order } => order,
            Page::Inner | Page::Free { .. } => panic!("page {} is no buffer in use", buf.0),
        }
    }

    fn is_free_run(&self, at: u32, order: u32) -> bool {
        match self.pages.get(slot(at)) {
            Some(Page::Free { order: of_run, .. }) => *of_run == order,
            Some(Page::Inner | Page::Taken { .. }) | None => false,
        }
    }

    fn push(&mut self, at: u32, order: u32) {
        let next = self.heads[slot(order)].replace(at);
        if let Some(next) = next {
            self.relink(next, |_, after| (Some(at), after));
        }
        self.pages[slot(at)] = Page::Free { order, prev: None, next };
    }

    /// Takes a free run out of its list; its first page becomes an inner one for the moment.
    fn unlink(&mut self, at: u32) {
        let Page::Free { order, prev, next } = self.pages[slot(at)] else {
            panic!("run {at} is not free");
        };
        if let Some(next) = next {
            self.relink(next, |_, after| (prev, after));
        }
        match prev {
            Some(prev) => self.relink(prev, |before, _| (before, next)),
            None => self.heads[slot(order)] = next,
        }
        self.pages[slot(at)] = Page::Inner;
    }

    /// Replaces the neighbours of a free run.
    fn relink(
        &mut self,
        at: u32,
        change: impl FnOnce(Option<u32>, Option<u32>) -> (Option<u32>, Option<u32>),
    ) {
        let Page::Free { prev, next, .. } = &mut self.pages[slot(at)] else {
            panic!("run {at} is linked but not free");
        };
        (*prev, *next) = change(*prev, *next);
    }
}

fn slot(index: u32) -> usize {
    usize::try_from(index).expect("an address has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn sizes_are_rounded_to_a_power_of_two_of_pages() {
        for (bytes, pages) in
            [(1, 1), (512, 1), (4096, 1), (4097, 2), (12288, 4), (20480, 8), (1 << 20, 256)]
        {
            let mut pool = BufferPool::new(0, 256);
            let buf = pool.alloc(bytes).unwrap();
            assert_eq!((pool.pages_of(buf), pool.free_pages()), (pages, 256 - pages), "{bytes}");
            pool.self_check();
        }
    }

    #[test]
    fn a_full_pool_refuses_and_merges_again() {
        let mut pool = BufferPool::new(1000, 512);
        let bufs: Vec<_> = (0..512).map(|_| pool.alloc(4096).unwrap()).collect();
        assert_eq!(bufs, (1000..1512).map(Buf).collect::<Vec<_>>());
        assert_eq!((pool.alloc(1), pool.free_pages()), (None, 0));
        // Every other page: half of the pool is free, but no two pages side by side.
        for buf in bufs.iter().step_by(2) {
            pool.free(*buf);
        }
        assert_eq!((pool.free_pages(), pool.alloc(8192)), (256, None));
        for buf in bufs.iter().skip(1).step_by(2) {
            pool.free(*buf);
        }
        pool.self_check();
        assert!(pool.alloc(1 << 20).is_some());
        assert!(pool.alloc(1 << 20).is_some());
        assert_eq!(pool.free_pages(), 0);
    }

    #[test]
    fn an_empty_pool_gives_nothing() {
        let mut pool = BufferPool::new(7, 0);
        assert_eq!((pool.alloc(1), pool.total_pages()), (None, 0));
        pool.self_check();
    }

    #[test]
    #[should_panic(expected = "no buffer in use")]
    fn a_double_free_is_found() {
        let mut pool = BufferPool::new(0, 4);
        let buf = pool.alloc(4096).unwrap();
        pool.free(buf);
        pool.free(buf);
    }

    #[test]
    #[should_panic(expected = "no buffer in use")]
    fn a_page_inside_of_a_buffer_is_no_buffer() {
        let mut pool = BufferPool::new(0, 4);
        let buf = pool.alloc(8192).unwrap();
        pool.free(Buf(buf.0 + 1));
    }

    #[test]
    #[should_panic(expected = "another pool")]
    fn a_buffer_before_the_pool_is_found() {
        BufferPool::new(10, 4).free(Buf(9));
    }

    #[test]
    #[should_panic(expected = "another pool")]
    fn a_buffer_behind_the_pool_is_found() {
        BufferPool::new(10, 4).free(Buf(14));
    }

    #[test]
    #[should_panic(expected = "an empty payload")]
    fn no_bytes_are_no_buffer() {
        let _ = BufferPool::new(0, 4).alloc(0);
    }

    #[test]
    #[should_panic(expected = "no request has a payload")]
    fn more_than_the_largest_payload_is_no_buffer() {
        let _ = BufferPool::new(0, 1024).alloc(MAX_BIO_SIZE + 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Alloc(u32),
        Free(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = prop_oneof![3 => 1u32..40_000, 1 => 1..=MAX_BIO_SIZE];
        prop_oneof![bytes.prop_map(Step::Alloc), any::<usize>().prop_map(Step::Free)]
    }

    /// Whether an aligned run of `len` pages is untouched: what a buddy allocator must find.
    fn has_run(free: &[bool], len: usize) -> bool {
        free.chunks_exact(len).any(|run| run.iter().all(|page| *page))
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(
            first in prop_oneof![Just(0u32), Just(77), 0u32..10_000],
            pages in 0u32..1200,
            steps in prop::collection::vec(step(), 0..150),
        ) {
            let mut pool = BufferPool::new(first, pages);
            let fresh = pool.heads.map(|head| head.is_some());
            let mut free = vec![true; slot(pages)];
            let mut bufs: BTreeMap<u32, u32> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Alloc(bytes) => {
                        let len = bytes.div_ceil(PAGE_BYTES).next_power_of_two();
                        let buf = pool.alloc(bytes);
                        prop_assert_eq!(buf.is_some(), has_run(&free, slot(len)));
                        let Some(buf) = buf else { continue };
                        let at = slot(buf.0 - first);
                        prop_assert!(free[at..at + slot(len)].iter().all(|page| *page));
                        free[at..at + slot(len)].fill(false);
                        bufs.insert(buf.0, len);
                    }
                    Step::Free(at) if !bufs.is_empty() => {
                        let (&buf, &len) = bufs.iter().nth(at % bufs.len()).unwrap();
                        bufs.remove(&buf);
                        prop_assert_eq!(pool.pages_of(Buf(buf)), len);
                        pool.free(Buf(buf));
                        let at = slot(buf - first);
                        free[at..at + slot(len)].fill(true);
                    }
                    Step::Free(_) => {}
                }
                pool.self_check();
                prop_assert_eq!(
                    slot(pool.free_pages()),
                    free.iter().filter(|page| **page).count()
                );
            }
            for buf in bufs.into_keys() {
                pool.free(Buf(buf));
            }
            pool.self_check();
            prop_assert_eq!(pool.free_pages(), pages);
            prop_assert_eq!(pool.heads.map(|head| head.is_some()), fresh);
        }
    }
}
