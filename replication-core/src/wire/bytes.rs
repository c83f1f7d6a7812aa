//! Big-endian fields at fixed offsets of a buffer whose length was checked before.

/// The `N` bytes at `at`.
///
/// # Panics
/// If the buffer is shorter: its length is checked against the packet's layout before.
fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let tail = bytes.get(at..).expect("the layout fits the checked length");
    *tail.first_chunk().expect("the layout fits the checked length")
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(chunk(bytes, at))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(chunk(bytes, at))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(chunk(bytes, at))
}

/// An opaque token in the byte order of whoever made it.
pub(super) fn ne32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(chunk(bytes, at))
}

/// An opaque token in the byte order of whoever made it.
pub(super) fn ne64(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(chunk(bytes, at))
}
