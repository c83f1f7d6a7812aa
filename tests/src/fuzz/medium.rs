//! What a disk holds (AL-6, MD-2, MD-5).

use replication_core::meta::al_journal::{encode_transaction, replay};
use replication_core::meta::{Geometry, MetaKind, Page, Superblock, dump};
use replication_core::units::{AlExtent, Sector};

use super::Bytes;
use crate::crash::history::{extents, fresh, setup};
use crate::crash::medium::{Device, Image, SECTOR};
use crate::crash::recover::{recover, superblock_of};
use crate::sim::setup::NodeSetup;

thread_local! {
    static DISK: (NodeSetup, Image) = {
        let node = setup(extents(2)).nodes[0].clone();
        let image = fresh(&node);
        (node, image)
    };
}

/// Overwrites bytes of an image.
fn patch(image: &mut Image, mut at: u64, bytes: &[u8]) {
    for byte in bytes {
        let sector = at / SECTOR as u64;
        let mut contents = image.get(&(Device::Data, sector)).map_or([0; SECTOR], |s| **s);
        contents[usize::try_from(at).expect("a small disk") % SECTOR] = *byte;
        image.insert((Device::Data, sector), contents.into());
        at += 1;
    }
}

/// Metadata with some bytes of superblock, log and bitmap changed: attached or refused, and if it
/// is attached, then attached again with the same outcome. Refused means that nothing is written.
pub fn metadata(data: &[u8]) {
    DISK.with(|(node, image)| attach_patched(node, image.clone(), Bytes(data)));
}

fn attach_patched(node: &NodeSetup, mut image: Image, mut bytes: Bytes<'_>) {
    let data = node.devices[0].data;
    let geometry = node.geometry(0, data, None).expect("a disk is configured");
    while !bytes.is_empty() {
        let (area, offset) = (bytes.u8(), u64::from(bytes.u16()));
        let length = usize::from(bytes.u8());
        let start = match area % 4 {
            0 => geometry.superblock.byte() + offset % 96,
            1 => geometry.activity_log.byte() + offset % (8 * 4096),
            2 => geometry.bitmap.byte() + offset % 4096,
            _ => {
                put_transaction(&mut image, &geometry, &mut bytes);
                continue;
            }
        };
        let end = data * SECTOR as u64;
        let room = usize::try_from(end - start).expect("a small disk");
        patch(&mut image, start, bytes.take(length.min(room)));
    }
    let Ok((found, after)) = recover(node, &image, 1, None) else { return };
    let before = superblock_of(node, &image).expect("attached metadata can be read");
    assert_eq!(found.uuids[0] | 1, before.uuids.current | 1, "an attach keeps the generation");
    let (again, _) = recover(node, &after, 2, None).expect("it was attached once");
    assert_eq!(again, found, "{}", found.differences(&again));
}

/// Puts a well-formed transaction into the log, anywhere.
fn put_transaction(image: &mut Image, geometry: &Geometry, bytes: &mut Bytes<'_>) {
    let block = u32::from(bytes.u8()) % geometry.al_blocks();
    let number = bytes.u32();
    let slots: Vec<Option<AlExtent>> = (0..1 + bytes.u8() % 8)
        .map(|_| bytes.u16())
        .map(|extent| (extent % 7 != 0).then_some(AlExtent(u32::from(extent))))
        .collect();
    let count = u16::try_from(slots.len()).expect("at most eight");
    let updates: Vec<(u16, AlExtent)> = (0..bytes.u8() % 4)
        .map(|_| (bytes.u16() % count, AlExtent(u32::from(bytes.u16()))))
        .collect();
    let mut page = Page::zeroed();
    encode_transaction(number, &updates, &slots, bytes.u16() % count, &mut page);
    patch(image, geometry.al_block_sector(block).byte(), &page.0);
}

/// Blocks of a log, of any bytes and shape: reading gives an answer, twice the same.
pub fn log(data: &[u8]) {
    let mut bytes = Bytes(data);
    let stripes = 1 + u32::from(bytes.u8() % 4);
    let size = 8_u32.div_ceil(stripes) + u32::from(bytes.u8() % 8);
    let mut pages = Vec::new();
    for index in 0..stripes * size {
        let mut page = Page::zeroed();
        let start = data.len() / usize::try_from(stripes * size).expect("few") * index as usize;
        let rest = &data[start.min(data.len())..];
        let length = rest.len().min(4096);
        page.0[..length].copy_from_slice(&rest[..length]);
        if bytes.u8() % 4 != 0 {
            let slots = vec![Some(AlExtent(index)); 1 + usize::from(bytes.u8() % 16)];
            let slot = u16::from(bytes.u8()) % u16::try_from(slots.len()).expect("few");
            let updates = [(slot, AlExtent(u32::from(bytes.u16())))];
            encode_transaction(bytes.u32(), &updates, &slots, 0, &mut page);
        }
        pages.push(*page);
    }
    let first = replay(&pages, stripes, size);
    let second = replay(&pages, stripes, size);
    assert_eq!(first, second);
    if let Ok(found) = first {
        assert!(found.extents.is_sorted() && found.ends.0 < stripes * size);
        assert!(found.ends.1 < stripes * size);
    }
}

/// A text dump: refused with a line, or read; what was read is printed and read the same again.
pub fn dump_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let restored = match dump::parse(text) {
        Ok(restored) => restored,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let size = Sector((restored.la_size.0 % (1 << 24)).next_multiple_of(8) + (1 << 16));
    let shape = (restored.al_stripes, restored.al_stripe_size_4k);
    let Ok(geometry) = Geometry::new(MetaKind::Internal, size, size, shape.0, shape.1) else {
        return;
    };
    let superblock = Superblock { ..restored.superblock(&geometry) };
    if superblock.check(&geometry, None).is_err() {
        return;
    }
    let mut printed = String::new();
    let read = |number, page: &mut Page| {
        restored.read_page(number, page);
        Ok::<(), std::fmt::Error>(())
    };
    dump::dump(&superblock, &geometry, &mut printed, read).expect("a string takes it");
    let again = dump::parse(&printed).unwrap_or_else(|error| panic!("{error} in\n{printed}"));
    assert_eq!(again.uuids, restored.uuids);
    assert_eq!(again.la_size, restored.la_size);
    let (mut one, mut two) = (Page::zeroed(), Page::zeroed());
    for number in 0..geometry.bitmap_sectors / 8 {
        restored.read_page(number, &mut one);
        again.read_page(number, &mut two);
        assert!(one == two, "page {number} of the bitmap");
    }
}
