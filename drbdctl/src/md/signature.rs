//! What a device carries: marks of file systems, swap, volume managers, partition tables and old
//! metadata formats.
//!
//! This is a guess from a few bytes and serves to stop an operator who named the wrong device. It
//! finds what is common on servers; it proves nothing about a device it finds nothing on.
//! Where a format records its own size, that is read too: internal metadata must lie behind it.
//! The marks come from the public descriptions of the formats.

use std::fmt;

use replication_core::units::SECTOR_SIZE;

use super::device::Device;
use crate::exit::Failure;

/// Bytes looked at from the start of the device: the farthest mark (of a file system whose
/// superblock lies at 64 KiB) and what follows it.
const HEAD: usize = 128 << 10;
/// Bytes looked at from its end: an array's superblock lies up to 128 KiB before it.
const TAIL: usize = 132 << 10;

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: &'static str,
    /// Byte offset of the mark.
    pub at: u64,
    /// Bytes that it says it takes up, from the start of the device.
    pub size: Option<u64>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (mark at byte {})", self.name, self.at)
    }
}

/// A mark at a fixed place, and how to read the size.
struct Mark {
    name: &'static str,
    at: usize,
    bytes: &'static [u8],
    size: fn(&Head<'_>) -> Option<u64>,
}

const fn mark(name: &'static str, at: usize, bytes: &'static [u8]) -> Mark {
    Mark { name, at, bytes, size: |_| None }
}

/// Marks at the start of a device. The first that fits names it; what is laid out by several
/// layers (a file system in a container) is named by the outermost.
const MARKS: &[Mark] = &[
    Mark { name: "XFS file system", at: 0, bytes: b"XFSB", size: xfs_size },
    Mark { name: "btrfs file system", at: 0x1_0040, bytes: b"_BHRfS_M", size: btrfs_size },
    mark("LUKS encrypted volume", 0, b"LUKS\xba\xbe"),
    mark("LVM physical volume", 24, b"LVM2 001"),
    Mark { name: "LVM physical volume", at: 512 + 24, bytes: b"LVM2 001", size: lvm_size },
    mark("LVM physical volume", 1024 + 24, b"LVM2 001"),
    mark("LVM physical volume", 1536 + 24, b"LVM2 001"),
    mark("md array member (1.1)", 0, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    mark("md array member (1.2)", 4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    Mark { name: "swap space", at: 4096 - 10, bytes: b"SWAPSPACE2", size: swap_size },
    Mark { name: "swap space", at: 4096 - 10, bytes: b"SWAP-SPACE", size: swap_size },
    mark("swap space", 16_384 - 10, b"SWAPSPACE2"),
    mark("swap space", 65_536 - 10, b"SWAPSPACE2"),
    mark("GPT partition table", 512, b"EFI PART"),
    mark("GPT partition table", 4096, b"EFI PART"),
    Mark { name: "NTFS file system", at: 3, bytes: b"NTFS    ", size: ntfs_size },
    Mark { name: "exFAT file system", at: 3, bytes: b"EXFAT   ", size: exfat_size },
    mark("FAT file system", 82, b"FAT32   "),
    mark("FAT file system", 54, b"FAT16   "),
    mark("FAT file system", 54, b"FAT12   "),
    mark("F2FS file system", 1024, b"\x10\x20\xf5\xf2"),
    mark("JFS file system", 0x8000, b"JFS1"),
    mark("ReiserFS file system", 0x1_0034, b"ReIsErFs"),
    mark("ReiserFS file system", 0x1_0034, b"ReIsEr2Fs"),
    mark("ReiserFS file system", 0x1_0034, b"ReIsEr3Fs"),
    mark("GFS2 file system", 0x1_0000, b"\x01\x16\x19\x70"),
    mark("OCFS2 file system", 8192, b"OCFSV2"),
    mark("bcache device", 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    mark("ISO 9660 file system", 0x8001, b"CD001"),
    mark("squashfs file system", 0, b"hsqs"),
];

/// The start of a device.
struct Head<'a>(&'a [u8]);

impl Head<'_> {
    fn has(&self, at: usize, bytes: &[u8]) -> bool {
        self.0.get(at..at + bytes.len()).is_some_and(|found| found == bytes)
    }

    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at + N)?.try_into().ok()
    }

    fn le16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn le32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn le64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

fn xfs_size(head: &Head<'_>) -> Option<u64> {
    let block = u32::from_be_bytes(head.bytes(4)?);
    u64::from_be_bytes(head.bytes(8)?).checked_mul(block.into())
}

/// The size of this device, which may be one of several of the file system.
fn btrfs_size(head: &Head<'_>) -> Option<u64> {
    head.le64(0x1_0000 + 0xd1)
}

fn swap_size(head: &Head<'_>) -> Option<u64> {
    (u64::from(head.le32(1028)?) + 1).checked_mul(4096)
}

/// The header of the volume follows its label; the label says where, counted from itself.
fn lvm_size(head: &Head<'_>) -> Option<u64> {
    let header = usize::try_from(head.le32(512 + 20)?).ok()?;
    head.le64(512_usize.checked_add(header)?.checked_add(32)?)
}

fn ntfs_size(head: &Head<'_>) -> Option<u64> {
    // The last sector, behind those counted, holds a copy of the first.
    head.le64(0x28)?.checked_add(1)?.checked_mul(head.le16(0x0b)?.into())
}

fn exfat_size(head: &Head<'_>) -> Option<u64> {
    let shift = u32::from(head.bytes::<1>(108)?[0]);
    head.le64(72)?.checked_mul(1_u64.checked_shl(shift)?)
}

/// ext2, ext3 and ext4 share a mark; features tell them apart.
fn ext(head: &Head<'_>) -> Option<Found> {
    const SUPER: usize = 1024;
    const HAS_JOURNAL: u32 = 0x4;
    const IS_64BIT: u32 = 0x80;
    // Extents, 64 bit, flexible groups: features that ext3 does not know.
    const EXT4_ONLY: u32 = 0x40 | IS_64BIT | 0x200;
    if head.le16(SUPER + 56)? != 0xef53 {
        return None;
    }
    let (compatible, incompatible) = (head.le32(SUPER + 92)?, head.le32(SUPER + 96)?);
    let name = if incompatible & EXT4_ONLY != 0 {
        "ext4 file system"
    } else if compatible & HAS_JOURNAL != 0 {
        "ext3 file system"
    } else {
        "ext2 file system"
    };
    let high = if incompatible & IS_64BIT == 0 { 0 } else { head.le32(SUPER + 0x150)? };
    let blocks = u64::from(high) << 32 | u64::from(head.le32(SUPER + 4)?);
    let block = 1024_u64.checked_shl(head.le32(SUPER + 24)?);
    let size = block.and_then(|block| blocks.checked_mul(block));
    Some(Found { name, at: 1024 + 56, size })
}

/// A partition table of the old kind: its mark and at least one partition.
fn mbr(head: &Head<'_>) -> Option<Found> {
    let is_used = |n: usize| head.bytes::<1>(446 + 16 * n + 4).is_some_and(|[kind]| kind != 0);
    let is_table = head.has(510, b"\x55\xaa") && (0..4).any(is_used);
    is_table.then_some(Found { name: "MBR partition table", at: 510, size: None })
}

/// What `head`, the start of a device, shows.
fn at_start(head: &Head<'_>) -> Option<Found> {
    if let Some(found) = ext(head) {
        return Some(found);
    }
    let found = MARKS.iter().find(|mark| head.has(mark.at, mark.bytes));
    match found {
        Some(mark) => {
            let at = u64::try_from(mark.at).expect("places in the table are small");
            Some(Found { name: mark.name, at, size: (mark.size)(head).filter(|size| *size > 0) })
        }
        None => mbr(head),
    }
}

/// Marks at the end, where internal metadata goes.
fn at_end(tail: &[u8], tail_start: u64, device: u64) -> Option<Found> {
    let is_at = |at: u64, bytes: &[u8]| {
        let from = at.checked_sub(tail_start).and_then(|from| usize::try_from(from).ok());
        from.and_then(|from| tail.get(from..)?.get(..bytes.len())) == Some(bytes)
    };
    let md = b"\xfc\x4e\x2b\xa9";
    let sectors = device / SECTOR_SIZE;
    let places = [
        ("md array member (1.0)", (sectors & !7).checked_sub(16).map(|s| s * SECTOR_SIZE), &md[..]),
        ("md array member (0.90)", (device & !0xffff).checked_sub(0x1_0000), &md[..]),
        (
            "GPT backup partition table",
            sectors.checked_sub(1).map(|s| s * SECTOR_SIZE),
            b"EFI PART",
        ),
    ];
    let mut places = places.into_iter().filter_map(|(name, at, mark)| Some((name, at?, mark)));
    let (name, at, _) = places.find(|(_, at, mark)| is_at(*at, mark))?;
    Some(Found { name, at, size: Some(device) })
}

/// Looks at both ends of a device.
///
/// # Errors
/// If it cannot be read.
pub fn probe(device: &Device) -> Result<Option<Found>, Failure> {
    let mut head = vec![0; HEAD];
    device.read_at(0, &mut head)?;
    if let Some(found) = at_start(&Head(&head)) {
        return Ok(Some(found));
    }
    let size = device.size.byte();
    let tail_len = u64::try_from(TAIL).expect("a constant");
    let tail_start = size.saturating_sub(tail_len);
    let mut tail = vec![0; TAIL];
    device.read_at(tail_start, &mut tail)?;
    Ok(at_end(&tail, tail_start, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::md::device::Access;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const SIZE: u64 = 64 << 20;

    /// Bytes and where they go.
    type Bytes = (u64, &'static [u8]);

    /// A sparse device with these bytes at these places.
    fn probed(writes: &[(u64, &[u8])]) -> Option<Found> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        for (at, bytes) in writes {
            file.write_all_at(bytes, *at).unwrap();
        }
        probe(&Device::open(&path, Access::Read).unwrap()).unwrap()
    }

    /// Every format, from the bytes of its description.
    #[test]
    fn formats() {
        let table: &[(&str, &[Bytes], Option<u64>)] = &[
            ("XFS file system", &[(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x20\0")], Some(0x2000 * 4096)),
            (
                "btrfs file system",
                &[(0x1_0040, b"_BHRfS_M"), (0x1_00d1, &[0, 0, 0, 3, 0, 0, 0, 0])],
                Some(48 << 20),
            ),
            ("LUKS encrypted volume", &[(0, b"LUKS\xba\xbe\0\x02")], None),
            (
                "LVM physical volume",
                &[
                    (512, b"LABELONE"),
                    (512 + 20, &[32, 0, 0, 0]),
                    (512 + 24, b"LVM2 001"),
                    (512 + 64, &[0, 0, 0xc0, 3, 0, 0, 0, 0]),
                ],
                Some(60 << 20),
            ),
            ("md array member (1.2)", &[(4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0")], None),
            ("swap space", &[(1028, &[0xe7, 3, 0, 0]), (4086, b"SWAPSPACE2")], Some(1000 * 4096)),
            (
                "GPT partition table",
                &[(510, b"\x55\xaa"), (450, b"\xee"), (512, b"EFI PART")],
                None,
            ),
            ("MBR partition table", &[(510, b"\x55\xaa"), (450, b"\x83")], None),
            ("md array member (1.0)", &[(SIZE - 8192, b"\xfc\x4e\x2b\xa9")], Some(SIZE)),
            ("md array member (0.90)", &[(SIZE - 65536, b"\xfc\x4e\x2b\xa9")], Some(SIZE)),
            ("GPT backup partition table", &[(SIZE - 512, b"EFI PART")], Some(SIZE)),
        ];
        for (name, writes, size) in table {
            let found = probed(writes).unwrap_or_else(|| panic!("{name} was not found"));
            assert_eq!((found.name, found.size), (*name, *size));
        }
        assert_eq!(probed(&[]), None);
        // The mark alone, without a partition, is what an empty boot sector has.
        assert_eq!(probed(&[(510, b"\x55\xaa")]), None);
    }

    /// The three generations of one format, and a size that needs its upper half.
    #[test]
    fn generations_of_ext() {
        let ext = |compatible: u32, incompatible: u32, high: u32| {
            probed(&[
                (1024 + 4, &5000_u32.to_le_bytes()),
                (1024 + 24, &2_u32.to_le_bytes()),
                (1024 + 56, &0xef53_u16.to_le_bytes()),
                (1024 + 92, &compatible.to_le_bytes()),
                (1024 + 96, &incompatible.to_le_bytes()),
                (1024 + 0x150, &high.to_le_bytes()),
            ])
            .unwrap()
        };
        let table = [
            (ext(0, 0x2, 7), "ext2 file system", 5000 * 4096),
            (ext(0x4, 0x2, 7), "ext3 file system", 5000 * 4096),
            (ext(0x4, 0x42, 7), "ext4 file system", 5000 * 4096),
            (ext(0x4, 0xc2, 7), "ext4 file system", ((7 << 32) + 5000) * 4096),
        ];
        for (found, name, size) in table {
            assert_eq!(found, Found { name, at: 1080, size: Some(size) });
        }
    }

    /// Sizes that make no sense are unknown, not wrong.
    #[test]
    fn nonsense_sizes() {
        let xfs = [&b"XFSB"[..], &[0xff; 12]].concat();
        assert_eq!(probed(&[(0, &xfs)]).unwrap().size, None);
        let ext = probed(&[(1024 + 24, &u32::MAX.to_le_bytes()), (1080, &[0x53, 0xef])]);
        assert_eq!(ext.unwrap().size, None);
    }
}
