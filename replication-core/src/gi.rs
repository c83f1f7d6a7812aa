//! Data generation identifiers: which generations a node has seen, and whose data is newer.
//!
//! Responsible for the four identifiers of a volume, for every way in which they change, and
//! (in [`compare()`]) for the verdict over two nodes. When they change, and that they are durable
//! before anything relies on them, is the volume's business.
//!
//! Invariants: GI-2 (rotation loses nothing but the oldest), GI-3 (two nodes reach mirrored
//! verdicts), GI-4, GI-7, GI-8, GI-9, GI-10. Rules: protocol notes sections 9.1 to 9.4, 9.6, 12.5
//! and 12.9.

mod compare;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use compare::{Compare, Comparison, Outcome, compare};

/// One data generation. Bit 0 says that the node was Primary in it and is no part of its
/// identity; see [`Uuid::same`].
///
/// The derived equality is that of all 64 bits, as needed for storing and sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Uuid(pub u64);

/// Added to the identifier of a generation to make the one of a resync towards it.
const SYNC_OFFSET: u64 = 1 << 48;

impl Uuid {
    /// An empty slot.
    pub const ZERO: Self = Self(0);
    /// Metadata that was just created: the data was never synchronised with anything.
    pub const FRESH: Self = Self(4);

    /// Whether the slot is empty. The one question in which bit 0 counts.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The identity, without the role.
    const fn identity(self) -> u64 {
        self.0 & !1
    }

    /// Whether both name the same generation; bit 0 does not count.
    #[must_use]
    pub const fn same(self, other: Self) -> bool {
        self.identity() == other.identity()
    }

    /// The same generation with bit 0 set for a Primary and cleared otherwise.
    #[must_use]
    pub const fn with_role_bit(self, primary: bool) -> Self {
        if primary { Self(self.0 | 1) } else { Self(self.0 & !1) }
    }

    /// Bit 0.
    #[must_use]
    pub const fn role_bit(self) -> bool {
        self.0 & 1 == 1
    }

    /// Whether `sync` is the identifier of a resync towards this generation.
    const fn is_base_of(self, sync: Self) -> bool {
        self.identity().wrapping_add(SYNC_OFFSET) == sync.identity()
    }

    /// An identifier out of random bits that never is one of the two special values (GI-9).
    #[must_use]
    pub const fn from_random(random: u64) -> Self {
        let candidate = Self(random);
        if candidate.same(Self::ZERO) || candidate.same(Self::FRESH) {
            return Self(random | 1 << 63);
        }
        candidate
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", self.0)
    }
}

/// The identifiers of a volume on one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Uuids {
    /// The generation of the data.
    pub current: Uuid,
    /// The generation since which the bitmap counts; zero if both nodes have the same data.
    /// During a resync the source keeps the sync UUID here.
    pub bitmap: Uuid,
    /// Former values of `bitmap`, the youngest first.
    pub history: [Uuid; 2],
}

impl Uuids {
    /// The identifiers of metadata that was just created.
    #[must_use]
    pub const fn fresh() -> Self {
        Self { current: Uuid::FRESH, bitmap: Uuid::ZERO, history: [Uuid::ZERO; 2] }
    }

    /// The identifiers in the order of the packet and of the metadata.
    #[must_use]
    pub const fn from_slots(slots: [u64; 4]) -> Self {
        let [current, bitmap, younger, older] = slots;
        Self { current: Uuid(current), bitmap: Uuid(bitmap), history: [Uuid(younger), Uuid(older)] }
    }

    /// The four numbers in the order of the packet and of the metadata.
    #[must_use]
    pub const fn slots(&self) -> [u64; 4] {
        [self.current.0, self.bitmap.0, self.history[0].0, self.history[1].0]
    }

    /// Puts `uuid` into the history; the oldest one is lost.
    pub fn push(&mut self, uuid: Uuid) {
        self.history = [uuid, self.history[0]];
    }

    /// Stores `uuid` in the bitmap slot; what was there goes into the history.
    pub fn set_bitmap_rotating(&mut self, uuid: Uuid) {
        if !self.bitmap.is_zero() {
            self.push(self.bitmap);
        }
        self.bitmap = uuid;
    }

    /// Whether a resync from here was begun in this generation. Its target is of this generation,
    /// too, once it has ended it, of which nobody here need have heard.
    #[must_use]
    pub const fn has_begun_resync(&self) -> bool {
        let base = self.history[0];
        !self.bitmap.is_zero() && (base.same(Uuid::FRESH) || base.is_base_of(self.bitmap))
    }

    /// Whether the peer may be of this generation: what it will not have is written in another
    /// one (GI-1).
    #[must_use]
    pub const fn may_be_shared(&self) -> bool {
        self.bitmap.is_zero() || self.has_begun_resync()
    }

    /// Starts a new generation: the bitmap counts from the one that ends here. What the bitmap
    /// slot held goes into the history, so that a peer with that generation is still recognised
    /// as older, at the price of a full resync (GI-2).
    ///
    /// The identifier of a resync stays in the bitmap slot: its target most likely did not end it,
    /// and one that did is recognised by the history (rule 52).
    pub fn rotate_new_current(&mut self, random: u64, primary: bool) {
        let mut next = Uuid::from_random(random);
        if self.contains(next) {
            // Never reuse an identifier (GI-9), even with a broken source of randomness.
            next = Uuid::from_random(random.rotate_left(17).wrapping_add(self.current.0 | 2));
        }
        if self.has_begun_resync() {
            self.push(self.current);
        } else {
            self.set_bitmap_rotating(self.current);
        }
        self.current = next.with_role_bit(primary);
        assert!(!self.current.same(Uuid::ZERO), "a generation has an identifier");
        assert!(!self.current.same(Uuid::FRESH), "a new generation is not fresh metadata");
    }

    fn contains(&self, uuid: Uuid) -> bool {
        [self.current, self.bitmap, self.history[0], self.history[1]]
            .into_iter()
            .any(|slot| slot.same(uuid))
    }

    /// Both nodes have the same data now: the bitmap counts from nothing, its generation goes
    /// into the history.
    pub fn clear_bitmap(&mut self) {
        if !self.bitmap.is_zero() {
            self.push(self.bitmap);
            self.bitmap = Uuid::ZERO;
        }
    }

    /// Empties the bitmap slot without a trace: the last step of skipping the initial resync.
    pub fn drop_bitmap(&mut self) {
        self.bitmap = Uuid::ZERO;
    }

    /// Marks the current generation with the role of this node.
    pub fn set_role(&mut self, primary: bool) {
        self.current = self.current.with_role_bit(primary);
    }

    /// The identifier of a resync from here: derived from the generation that the bitmap counts
    /// from, random if there is none.
    #[must_use]
    pub fn sync_uuid(&self, random: u64) -> Uuid {
        if self.bitmap.is_zero() || self.bitmap == Uuid::FRESH {
            Uuid::from_random(random)
        } else {
            Uuid(self.bitmap.0.wrapping_add(SYNC_OFFSET))
        }
    }

    /// A resync to a peer of the generation `peer` is about to start: the bitmap slot names that
    /// generation if it is part of this past, so that the peer is recognised whatever it hears of
    /// the resync. Which blocks differ is settled by then.
    pub fn start_from(&mut self, peer: Uuid) {
        if self.bitmap.same(peer) || self.bitmap.is_zero() {
            return;
        }
        if let Some(older) = self.history.iter_mut().find(|uuid| uuid.same(peer)) {
            std::mem::swap(&mut self.bitmap, older);
        }
    }

    /// A resync from here starts under the identifier `sync`.
    pub fn sync_start_source(&mut self, sync: Uuid) {
        self.set_bitmap_rotating(sync);
    }

    /// Takes the start of a resync from here back, as the peer never heard of it. Where it starts
    /// again it does so under the same identifier: a new one for each attempt would push the
    /// generation out of the history that the peer still is of (GI-2).
    pub fn undo_sync_start(&mut self) {
        self.bitmap = self.history[0];
        self.history[0] = self.history[1];
    }

    /// The same identifiers, had the end of a resync been heard before the current generation
    /// began: the bitmap counts from the generation in which it was begun.
    #[must_use]
    pub const fn with_resync_ended(&self) -> Self {
        let [begun_in, base] = self.history;
        Self { current: self.current, bitmap: begun_in, history: [self.bitmap, base] }
    }

    /// The same identifiers, had a resync not been begun before the current generation: the
    /// bitmap counts from the generation that the resync was to start from.
    #[must_use]
    pub const fn with_resync_unheard(&self) -> Self {
        let [begun_in, base] = self.history;
        Self { current: self.current, bitmap: base, history: [begun_in, Uuid::ZERO] }
    }

    /// Whether the bitmap slot holds a resync that a peer of this generation does not take part in.
    #[must_use]
    pub const fn is_start_unheard(&self, peer: Uuid) -> bool {
        self.history[0].is_base_of(self.bitmap) && !self.bitmap.same(peer)
    }

    /// A resync to here starts: until its end the data is of no other generation than `sync`.
    pub fn sync_start_target(&mut self, sync: Uuid, primary: bool) {
        self.current = sync.with_role_bit(primary);
        self.bitmap = Uuid::ZERO;
    }

    /// A resync from here has ended well.
    pub fn sync_finish_source(&mut self) {
        self.clear_bitmap();
    }

    /// A resync to here has ended well: the data is the source's now. `source` is what the
    /// source sent last, before it rotated its identifiers for the start of this resync.
    pub fn sync_finish_target(&mut self, source: &Self, primary: bool) {
        let sync = self.current;
        self.bitmap = source.bitmap;
        self.history = source.history;
        self.set_bitmap_rotating(sync);
        self.current = source.current.with_role_bit(primary);
        self.clear_bitmap();
        assert!(self.bitmap.is_zero() && self.current.same(source.current));
    }

    /// The operator declares both fresh disks to be equal, on this node: the identifiers to
    /// announce. [`Uuids::drop_bitmap`] follows once they are sent.
    pub fn skip_initial_sync(&mut self, random: u64, primary: bool) {
        self.rotate_new_current(random, primary);
    }

    /// The operator declared both fresh disks to be equal on the other node, which announced
    /// `peer`.
    pub fn adopt_skipped_sync(&mut self, peer: &Self, primary: bool) {
        self.current = peer.current.with_role_bit(primary);
        self.bitmap = Uuid::ZERO;
    }
}

impl fmt::Display for Uuids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.current, self.bitmap, self.history[0], self.history[1])
    }
}

/// What a node says of itself beside its identifiers: the last word of `P_UUIDS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UuidFlags {
    /// 1: its operator gave up its changes.
    pub discard_my_data: bool,
    /// 2: it went down as Primary.
    pub crashed_primary: bool,
    /// 4: the disk that it attaches is Inconsistent.
    pub inconsistent: bool,
    /// 8: the operator declared both fresh disks to be equal.
    pub skip_initial_sync: bool,
}

impl UuidFlags {
    /// The flags of a word; bits of newer peers are ignored.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self {
            discard_my_data: word & 1 != 0,
            crashed_primary: word & 2 != 0,
            inconsistent: word & 4 != 0,
            skip_initial_sync: word & 8 != 0,
        }
    }

    /// The word to send.
    #[must_use]
    pub fn word(self) -> u64 {
        u64::from(self.discard_my_data)
            | u64::from(self.crashed_primary) << 1
            | u64::from(self.inconsistent) << 2
            | u64::from(self.skip_initial_sync) << 3
    }
}

/// What the peer announced in `P_UUIDS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerUuids {
    /// Its identifiers.
    pub uuids: Uuids,
    /// Number of bits set in its bitmap.
    pub bits_set: u64,
    /// Its flags.
    pub flags: UuidFlags,
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: u64 = 0x9b9f_0000_0000_0010;
    const W: u64 = 0x6a52_cb25_2550_8b30;
    const SYNC: u64 = 0x6a53_cb25_2550_8b30;

    #[test]
    fn the_role_bit_is_no_part_of_the_identity() {
        let uuid = Uuid(W);
        assert!(uuid.same(uuid.with_role_bit(true)));
        assert_ne!(uuid, uuid.with_role_bit(true));
        assert!(uuid.with_role_bit(true).role_bit());
        assert!(!uuid.with_role_bit(true).with_role_bit(false).role_bit());
        assert_eq!(uuid.to_string(), "6A52CB2525508B30");
        assert_eq!(Uuid::FRESH.to_string(), "0000000000000004");
        assert!(!Uuid(1).is_zero() && Uuid(1).same(Uuid::ZERO));
    }

    #[test]
    fn random_identifiers_are_never_special() {
        for random in [0, 1, 4, 5] {
            let uuid = Uuid::from_random(random);
            assert!(!uuid.same(Uuid::ZERO) && !uuid.same(Uuid::FRESH));
        }
        assert_eq!(Uuid::from_random(77), Uuid(77));
        let mut uuids = Uuids::from_slots([8, 0, 2, 0]);
        uuids.rotate_new_current(8, false);
        assert!(!uuids.current.same(Uuid(8)) && uuids.bitmap == Uuid(8));
    }

    #[test]
    fn rotation_loses_only_the_oldest() {
        let mut uuids = Uuids::from_slots([8, 6, 2, 0]);
        uuids.set_bitmap_rotating(Uuid(10));
        assert_eq!(uuids.slots(), [8, 10, 6, 2]);
        uuids.clear_bitmap();
        assert_eq!(uuids.slots(), [8, 0, 10, 6]);
        uuids.clear_bitmap();
        assert_eq!(uuids.slots(), [8, 0, 10, 6]);
        uuids.set_bitmap_rotating(Uuid(12));
        assert_eq!(uuids.slots(), [8, 12, 10, 6]);
        uuids.drop_bitmap();
        uuids.rotate_new_current(20, true);
        assert_eq!(uuids.slots(), [21, 8, 10, 6]);
        uuids.set_role(false);
        assert_eq!(uuids.slots(), [20, 8, 10, 6]);
        uuids.rotate_new_current(30, false);
        assert_eq!(uuids.slots(), [30, 20, 8, 10]);
    }

    #[test]
    fn a_bitmap_resync_as_captured() {
        let before = Uuids::from_slots([X, W, 0, 0]);
        let (mut source, mut target) = (before, Uuids::from_slots([W, 0, 0, 0]));
        let sync = source.sync_uuid(99);
        assert_eq!(sync, Uuid(SYNC));
        source.sync_start_source(sync);
        assert_eq!(source.slots(), [X, SYNC, W, 0]);
        target.sync_start_target(sync, false);
        assert_eq!(target.slots(), [SYNC, 0, 0, 0]);
        source.sync_finish_source();
        target.sync_finish_target(&before, false);
        assert_eq!(source.slots(), [X, 0, SYNC, W]);
        assert_eq!(target, source);
    }

    #[test]
    fn the_first_full_resync_as_captured() {
        let (mut source, mut target) = (Uuids::fresh(), Uuids::fresh());
        source.rotate_new_current(X, true);
        assert_eq!(source.slots(), [X | 1, 4, 0, 0]);
        let sent = source;
        let sync = source.sync_uuid(0xabcd_0000);
        assert_eq!(sync, Uuid(0xabcd_0000));
        source.sync_start_source(sync);
        target.sync_start_target(sync, false);
        source.sync_finish_source();
        target.sync_finish_target(&sent, false);
        assert_eq!(source.slots(), [X | 1, 0, 0xabcd_0000, 4]);
        assert_eq!(target.slots(), [X, 0, 0xabcd_0000, 4]);
    }

    #[test]
    fn a_source_without_a_bitmap_uuid_leaves_its_history_to_the_target() {
        let sent = Uuids::from_slots([X, 0, W, 2]);
        let mut target = Uuids::from_slots([W, 0, 30, 32]);
        target.sync_start_target(Uuid(SYNC), true);
        assert_eq!(target.current, Uuid(SYNC | 1));
        target.sync_finish_target(&sent, true);
        assert_eq!(target.slots(), [X | 1, 0, SYNC | 1, W]);
        assert_eq!(sent.sync_uuid(50), Uuid(50));
    }

    #[test]
    fn skipping_the_initial_resync_as_captured() {
        let (mut here, mut there) = (Uuids::fresh(), Uuids::fresh());
        here.skip_initial_sync(0xb990_aa80_e5df_b352, false);
        assert_eq!(here.slots(), [0xb990_aa80_e5df_b352, 4, 0, 0]);
        there.adopt_skipped_sync(&here, false);
        here.drop_bitmap();
        assert_eq!(here.slots(), [0xb990_aa80_e5df_b352, 0, 0, 0]);
        assert_eq!(there, here);
        let mut old = Uuids::from_slots([4, W, 0, 0]);
        old.skip_initial_sync(X, false);
        assert_eq!(old.slots(), [X, 4, W, 0]);
    }

    #[test]
    fn flags_survive_the_way_to_a_word_and_back() {
        for word in 0..16 {
            assert_eq!(UuidFlags::from_word(word).word(), word);
        }
        assert_eq!(UuidFlags::from_word(0xf0), UuidFlags::default());
        assert!(UuidFlags::from_word(2).crashed_primary);
        assert!(UuidFlags::from_word(4).inconsistent);
        let uuids = Uuids::from_slots([X, W, 1, 0]);
        assert_eq!(
            uuids.to_string(),
            "9B9F000000000010:6A52CB2525508B30:0000000000000001:0000000000000000"
        );
    }
}
