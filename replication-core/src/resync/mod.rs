//! Resynchronisation: bringing the blocks that differ from the source to the target.
//!
//! `exchange` merges the two bitmaps, `target` asks for blocks at the pace of [`rate`],
//! `source` answers. Bits are cleared only on proof: the target has written the block (BM-3).

pub(crate) mod exchange;
pub mod rate;
pub(crate) mod source;
pub(crate) mod target;
