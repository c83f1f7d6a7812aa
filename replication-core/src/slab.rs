//! A table of fixed capacity whose keys recognise that their entry is gone.
//!
//! Everything that waits for an answer (requests, disk operations, timers) lives in such a table
//! and is known outside by its [`Key`]. A key names a place and the generation of that place, so
//! an answer that comes after its entry was removed finds nothing, also when the place has been
//! taken again. The slab does not decide what to do with a stale answer: the caller counts and
//! drops it.
//!
//! Invariants kept:
//! - LV-2: the capacity is fixed at creation, a full table refuses; nothing allocates later.
//! - Same calls, same keys: the place freed last is taken first, iteration goes by place.
//!
//! Source: ours.

/// Names one entry of one [`Slab`]: the generation in the upper 32 bits, the place in the lower.
///
/// **Range**: never 0 and never `u64::MAX`, so both can stand for "no key" outside of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u64);

impl Key {
    fn new(generation: u32, index: u32) -> Self {
        assert!(generation != 0, "generation 0 would allow the key 0");
        assert!(index != u32::MAX, "the last index would allow the key u64::MAX");
        Self((u64::from(generation) << 32) | u64::from(index))
    }

    /// The place of the entry in its table, below the capacity of the table that gave the key.
    #[must_use]
    pub fn index(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).expect("masked to 32 bits")
    }

    /// How often the place had been used, counted from 1; wraps after 2^32 - 1 uses.
    #[must_use]
    pub fn generation(self) -> u32 {
        u32::try_from(self.0 >> 32).expect("shifted to 32 bits")
    }
}

/// What a place holds.
#[derive(Debug)]
enum Content<T> {
    /// Nothing; the next place of the list of vacant ones, if any.
    Vacant { next: Option<u32> },
    /// An entry.
    Taken(T),
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    content: Content<T>,
}

/// A table of at most `capacity` entries.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Place<T>>,
    vacant: Option<u32>,
    len: usize,
}

impl<T> Slab<T> {
    /// An empty table for `capacity` entries. This is the only call that allocates.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let places = (0..capacity)
            .map(|index| {
                let next = (index + 1 < capacity).then_some(index + 1);
                Place { generation: 1, content: Content::Vacant { next } }
            })
            .collect();
        Self { places, vacant: (capacity > 0).then_some(0), len: 0 }
    }

    /// Puts `value` into the table; `None` if it is full (the value is dropped).
    pub fn insert(&mut self, value: T) -> Option<Key> {
        let index = self.vacant?;
        let place = &mut self.places[offset(index)];
        match place.content {
            Content::Vacant { next } => self.vacant = next,
            Content::Taken(_) => panic!("the list of vacant places led to a taken one"),
        }
        place.content = Content::Taken(value);
        let key = Key::new(place.generation, index);
        self.len += 1;
        assert!(self.len <= self.places.len(), "more entries than places");
        Some(key)
    }

    /// The entry of `key`; `None` if it was removed or the key was never given by this table.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&T> {
        let place = self.places.get(offset(key.index()))?;
        match &place.content {
            Content::Taken(value) if place.generation == key.generation() => Some(value),
            Content::Taken(_) | Content::Vacant { .. } => None,
        }
    }

    /// The entry of `key`, to be changed; `None` as with [`Self::get`].
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let place = self.places.get_mut(offset(key.index()))?;
        match &mut place.content {
            Content::Taken(value) if place.generation == key.generation() => Some(value),
            Content::Taken(_) | Content::Vacant { .. } => None,
        }
    }

    /// Takes the entry of `key` out; `None` as with [`Self::get`].
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        let place = &mut self.places[offset(key.index())];
        let vacant = Content::Vacant { next: self.vacant };
        let Content::Taken(value) = std::mem::replace(&mut place.content, vacant) else {
            panic!("the entry was there a moment ago");
        };
        place.generation = following(place.generation);
        self.vacant = Some(key.index());
        assert!(self.len > 0, "an entry was removed from an empty table");
        self.len -= 1;
        Some(value)
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most entries the table can hold.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        u32::try_from(self.places.len()).expect("created with a 32-bit capacity")
    }

    /// All entries in the order of their places.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        (0u32..).zip(&self.places).filter_map(|(index, place)| match &place.content {
            Content::Taken(value) => Some((Key::new(place.generation, index), value)),
            Content::Vacant { .. } => None,
        })
    }

    /// The keys of all entries in the order of their places.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.iter().map(|(key, _)| key)
    }

    /// Walks the whole table and compares what is kept twice.
    ///
    /// # Panics
    /// If the table contradicts itself.
    pub fn self_check(&self) {
        assert_eq!(self.iter().count(), self.len, "counted entries");
        let mut vacant = 0;
        let mut at = self.vacant;
        while let Some(index) = at {
            vacant += 1;
            assert!(vacant <= self.places.len(), "the list of vacant places has a loop");
            at = match self.places[offset(index)].content {
                Content::Vacant { next } => next,
                Content::Taken(_) => panic!("taken place {index} is listed as vacant"),
            };
        }
        assert_eq!(vacant + self.len, self.places.len(), "every place is taken or listed");
        assert!(self.places.iter().all(|place| place.generation != 0));
    }
}

/// The generation after `generation`; 0 is left out.
fn following(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn offset(index: u32) -> usize {
    usize::try_from(index).expect("an address has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_full_table_refuses_and_a_freed_place_is_taken_again() {
        let mut slab = Slab::new(2);
        let a = slab.insert('a').unwrap();
        let b = slab.insert('b').unwrap();
        assert_eq!(slab.insert('c'), None);
        assert_eq!((a.0, b.0), (1 << 32, (1 << 32) | 1));
        assert_eq!(slab.remove(a), Some('a'));
        let c = slab.insert('c').unwrap();
        assert_eq!(c.0, 2 << 32);
        assert_eq!(slab.iter().collect::<Vec<_>>(), [(c, &'c'), (b, &'b')]);
        slab.self_check();
    }

    #[test]
    fn a_stale_key_finds_nothing() {
        let mut slab = Slab::new(1);
        let old = slab.insert(1).unwrap();
        assert_eq!(slab.remove(old), Some(1));
        assert_eq!(slab.remove(old), None);
        let new = slab.insert(2).unwrap();
        assert_ne!(old, new);
        assert_eq!(slab.get(old), None);
        assert_eq!(slab.get_mut(old), None);
        assert_eq!(slab.remove(old), None);
        assert_eq!(slab.get(new), Some(&2));
    }

    #[test]
    fn keys_from_elsewhere_find_nothing() {
        let mut slab = Slab::new(1);
        slab.insert(1).unwrap();
        for raw in [0, 1, u64::MAX, (1 << 32) | 7, 9 << 32] {
            assert_eq!(slab.get(Key(raw)), None, "{raw:#x}");
            assert_eq!(slab.remove(Key(raw)), None, "{raw:#x}");
        }
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn the_generation_wraps_around_zero() {
        let mut slab = Slab::new(1);
        slab.places[0].generation = u32::MAX;
        let last = slab.insert(()).unwrap();
        assert_ne!(last.0, u64::MAX);
        assert_eq!(slab.remove(last), Some(()));
        assert_eq!(slab.insert(()), Some(Key(1 << 32)));
        slab.self_check();
    }

    #[test]
    fn a_table_without_places_is_always_full() {
        let mut slab = Slab::new(0);
        assert_eq!((slab.insert(1), slab.len(), slab.capacity()), (None, 0, 0));
        assert!(slab.is_empty());
        slab.self_check();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16),
        Remove(usize),
        Change(usize, u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any::<u16>().prop_map(Step::Insert),
            any::<usize>().prop_map(Step::Remove),
            (any::<usize>(), any::<u16>()).prop_map(|(at, value)| Step::Change(at, value)),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(
            capacity in 0u32..20,
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut slab = Slab::new(capacity);
            let mut model = BTreeMap::new();
            let mut given: Vec<Key> = Vec::new();
            for step in steps {
                match step {
                    Step::Insert(value) => {
                        let key = slab.insert(value);
                        prop_assert_eq!(key.is_some(), model.len() < offset(capacity));
                        if let Some(key) = key {
                            prop_assert!(!given.contains(&key), "a key was given twice");
                            given.push(key);
                            model.insert(key, value);
                        }
                    }
                    Step::Remove(at) if !given.is_empty() => {
                        let key = given[at % given.len()];
                        prop_assert_eq!(slab.remove(key), model.remove(&key));
                    }
                    Step::Change(at, value) if !given.is_empty() => {
                        let key = given[at % given.len()];
                        let entry = slab.get_mut(key).map(|entry| std::mem::replace(entry, value));
                        let known = model.get_mut(&key).map(|e| std::mem::replace(e, value));
                        prop_assert_eq!(entry, known);
                    }
                    Step::Remove(_) | Step::Change(..) => {}
                }
                slab.self_check();
                prop_assert_eq!(slab.len(), model.len());
                let mut expected: Vec<_> = model.iter().map(|(key, value)| (*key, value)).collect();
                expected.sort_by_key(|(key, _)| key.index());
                prop_assert_eq!(slab.iter().collect::<Vec<_>>(), expected);
                prop_assert!(slab.keys().eq(slab.iter().map(|(key, _)| key)));
                for key in &given {
                    prop_assert_eq!(slab.get(*key), model.get(key));
                }
            }
        }
    }
}
