//! The request slots of one volume.

use replication_core::event::{HostOp, HostRequest, HostTag, VolumeIx};
use replication_core::units::{SECTOR_SIZE, SectorRange};

use super::proto::RANGE_PIECE;
use crate::engine::Shared;

/// A request with the core.
#[derive(Clone, Copy, Debug)]
pub(super) struct Busy {
    pub(super) client: u64,
    pub(super) cookie: u64,
    pub(super) structured: bool,
    pub(super) op: HostOp,
    /// The request's range.
    pub(super) whole: SectorRange,
    next: Next,
    then_flush: bool,
}

/// What the core gets next.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The operation, from this sector on; for a flush, the flush.
    Piece(u64),
    /// A flush, because the request wants to be durable.
    Flush,
    /// Nothing more.
    Nothing,
}

impl Busy {
    pub(super) fn new(
        client: u64,
        cookie: u64,
        structured: bool,
        op: HostOp,
        whole: SectorRange,
        then_flush: bool,
    ) -> Self {
        let next = Next::Piece(whole.start);
        Self { client, cookie, structured, op, whole, next, then_flush }
    }

    /// The next thing for the core to do; `None` when the request is done.
    pub(super) fn next_piece(
        &mut self,
        shared: &Shared,
        volume: VolumeIx,
        tag: HostTag,
    ) -> Option<HostRequest> {
        let (op, range) = self.next_range()?;
        let buf = shared.ring.arena().layout().tag_buf(volume, tag);
        Some(HostRequest { volume, tag, op, range, buf })
    }

    fn next_range(&mut self) -> Option<(HostOp, SectorRange)> {
        match self.next {
            Next::Piece(start) => {
                let limit = match self.op {
                    HostOp::Discard | HostOp::WriteZeroes { .. } => RANGE_PIECE / SECTOR_SIZE,
                    HostOp::Read | HostOp::Write { .. } | HostOp::Flush => u64::MAX,
                };
                let end = start.saturating_add(limit).min(self.whole.end);
                self.next = match (end < self.whole.end, self.then_flush) {
                    (true, _) => Next::Piece(end),
                    (false, true) => Next::Flush,
                    (false, false) => Next::Nothing,
                };
                Some((self.op, SectorRange { start, end }))
            }
            Next::Flush => {
                self.next = Next::Nothing;
                Some((HostOp::Flush, SectorRange::default()))
            }
            Next::Nothing => None,
        }
    }
}

/// What a slot is used for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tag {
    /// Nothing.
    Free,
    /// The payload of a write is coming in.
    Filling { client: u64 },
    /// Its request is with the core.
    Busy(Busy),
    /// The reply is being sent from its buffer.
    Replying { client: u64 },
}

/// The slots.
#[derive(Debug)]
pub(super) struct Tags {
    tags: Vec<Tag>,
    free: Vec<HostTag>,
}

impl Tags {
    pub(super) fn new(queue_depth: u16) -> Self {
        let free = (0..queue_depth).rev().map(HostTag).collect();
        Self { tags: vec![Tag::Free; usize::from(queue_depth)], free }
    }

    /// A free slot for a request of `client`, which has `held` already. Nobody gets more than three
    /// times what he leaves to the others, so the last ones are never with one client alone.
    pub(super) fn take(&mut self, client: u64, held: usize) -> Option<HostTag> {
        if held >= 3 * self.free.len() {
            return None;
        }
        let tag = self.free.pop()?;
        self.tags[usize::from(tag.0)] = Tag::Filling { client };
        Some(tag)
    }

    pub(super) fn set(&mut self, tag: HostTag, state: Tag) {
        let place = &mut self.tags[usize::from(tag.0)];
        assert!(!matches!(place, Tag::Free), "slot {} is free", tag.0);
        *place = state;
    }

    /// The request of a slot that the core has completed.
    pub(super) fn busy(&self, tag: HostTag) -> Busy {
        match self.tags[usize::from(tag.0)] {
            Tag::Busy(busy) => busy,
            state @ (Tag::Free | Tag::Filling { .. } | Tag::Replying { .. }) => {
                panic!("slot {} was completed but is {state:?}", tag.0)
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_busy(&self, tag: HostTag) -> bool {
        matches!(self.tags[usize::from(tag.0)], Tag::Busy(_))
    }

    pub(super) fn release(&mut self, tag: HostTag) {
        self.set(tag, Tag::Free);
        self.free.push(tag);
    }

    /// Frees the slots of a client that is gone, except for requests that the core has.
    pub(super) fn forget(&mut self, gone: u64) {
        for number in 0..self.tags.len() {
            let tag = HostTag(u16::try_from(number).expect("queue depths have 16 bits"));
            match self.tags[number] {
                Tag::Filling { client } | Tag::Replying { client } if client == gone => {
                    self.release(tag);
                }
                Tag::Filling { .. } | Tag::Replying { .. } | Tag::Busy(_) | Tag::Free => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_discards_come_in_pieces_and_end_with_the_flush_they_want() {
        let whole = SectorRange { start: 100, end: 100 + 8192 * 2 + 8 };
        let mut busy = Busy::new(1, 2, false, HostOp::Discard, whole, true);
        let mut pieces = Vec::new();
        while let Some((op, range)) = busy.next_range() {
            pieces.push((op, range.start, range.end));
        }
        let expected = [
            (HostOp::Discard, 100, 8292),
            (HostOp::Discard, 8292, 16484),
            (HostOp::Discard, 16484, 16492),
            (HostOp::Flush, 0, 0),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn reads_and_flushes_are_one_piece() {
        for op in [HostOp::Read, HostOp::Flush] {
            let mut busy = Busy::new(1, 2, false, op, SectorRange { start: 0, end: 8 }, false);
            assert_eq!(busy.next_range(), Some((op, SectorRange { start: 0, end: 8 })));
            assert_eq!(busy.next_range(), None);
        }
    }

    #[test]
    fn slots_of_a_gone_client_come_back_unless_the_core_has_them() {
        let mut tags = Tags::new(3);
        let (one, two, other) =
            (tags.take(7, 0).unwrap(), tags.take(7, 1).unwrap(), tags.take(8, 0));
        assert!(tags.take(7, 2).is_none() && other.is_some());
        let busy = Busy::new(7, 0, false, HostOp::Flush, SectorRange::default(), false);
        tags.set(one, Tag::Busy(busy));
        tags.forget(7);
        assert_eq!(tags.take(9, 0), Some(two));
        assert!(tags.take(9, 1).is_none());
        assert_eq!(tags.busy(one).client, 7);
        tags.release(one);
        assert_eq!(tags.take(9, 0), Some(one));
    }

    #[test]
    fn one_client_leaves_slots_to_the_others() {
        for (depth, most) in [(1_u16, 1), (2, 2), (4, 3), (32, 24), (128, 96)] {
            let mut tags = Tags::new(depth);
            let mut held = 0;
            while tags.take(7, held).is_some() {
                held += 1;
            }
            assert_eq!(held, most, "of {depth}");
            assert_eq!(tags.take(8, 0).is_some(), held < usize::from(depth));
        }
    }
}
