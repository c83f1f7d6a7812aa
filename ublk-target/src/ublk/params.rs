//! The size and the limits that the kernel is told about a device.
//!
//! Invariants: DUR-6. The volatile cache and FUA are not a choice: without them no flush would
//! ever arrive, and a write would be durable on the peer only by luck.

use replication_core::units::{SECTOR_SIZE, Sector};

use super::error::UblkError;
use super::sys::{
    ATTR_FUA, ATTR_ROTATIONAL, ATTR_VOLATILE_CACHE, MAX_IO_BYTES, PARAM_BASIC, PARAM_DISCARD,
    PARAMS_LEN, RawParams,
};

/// Least bytes of the largest request: one page of every machine that the driver runs on.
const MIN_IO_BYTES: u32 = 4096;
/// Largest logical block: one page.
const MAX_LOGICAL_BLOCK: u32 = 4096;
/// Largest physical block that is told; larger ones are of no use to the block layer.
const MAX_PHYSICAL_BLOCK: u32 = 1 << 20;

/// What the device can discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes of the smallest unit that is really freed; not zero.
    pub granularity: u32,
    /// Most sectors of one discard; not zero.
    pub max_sectors: u32,
}

/// Size and limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Size of the device; whole logical blocks, not zero.
    pub sectors: Sector,
    /// Bytes of the smallest request: a power of two, 512 to 4096.
    pub logical_block: u32,
    /// Bytes that the medium writes at once: a power of two, at least the logical block.
    pub physical_block: u32,
    /// Most bytes of a read or write: whole pages, at most the device's `max_io_bytes`.
    pub max_io_bytes: u32,
    /// Discards, if the device takes them.
    pub discard: Option<Discard>,
    /// Most sectors of one write-zeroes; 0 = the host writes zeroes itself.
    pub max_zeroes_sectors: u32,
    /// The medium has a moving arm.
    pub rotational: bool,
}

impl Params {
    /// The form in which the kernel takes them.
    pub(super) fn encode(&self) -> Result<RawParams, UblkError> {
        let logical_shift = shift("logical block size", self.logical_block, MAX_LOGICAL_BLOCK)?;
        let physical_shift = shift("physical block size", self.physical_block, MAX_PHYSICAL_BLOCK)?;
        if physical_shift < logical_shift {
            let value = u64::from(self.physical_block);
            let rule = "at least the logical block size";
            return Err(UblkError::BadParam { what: "physical block size", value, rule });
        }
        if !(MIN_IO_BYTES..=MAX_IO_BYTES).contains(&self.max_io_bytes)
            || !self.max_io_bytes.is_multiple_of(MIN_IO_BYTES)
        {
            let value = u64::from(self.max_io_bytes);
            let rule = "a multiple of 4096, at most 32 MiB";
            return Err(UblkError::BadParam { what: "largest request", value, rule });
        }
        if self.sectors.0 == 0 || !self.sectors.0.is_multiple_of(sectors_of(self.logical_block)) {
            let rule = "a multiple of the logical block size and not zero";
            let value = self.sectors.0;
            return Err(UblkError::BadParam { what: "size in sectors", value, rule });
        }
        let mut attrs = ATTR_VOLATILE_CACHE | ATTR_FUA;
        if self.rotational {
            attrs |= ATTR_ROTATIONAL;
        }
        let mut raw = RawParams {
            len: PARAMS_LEN,
            types: PARAM_BASIC,
            attrs,
            logical_shift,
            physical_shift,
            // No preference beyond the physical block. A shift of zero would announce one byte.
            optimal_shift: physical_shift,
            minimal_shift: physical_shift,
            max_sectors: self.max_io_bytes / MIN_IO_BYTES * 8,
            dev_sectors: self.sectors.0,
            ..RawParams::default()
        };
        self.encode_discard(&mut raw)?;
        Ok(raw)
    }

    fn encode_discard(&self, raw: &mut RawParams) -> Result<(), UblkError> {
        if self.discard.is_none() && self.max_zeroes_sectors == 0 {
            return Ok(());
        }
        raw.types |= PARAM_DISCARD;
        raw.zeroes_max_sectors = self.max_zeroes_sectors;
        // The kernel insists on a granularity even where only zeroes are taken.
        raw.discard_granularity = self.logical_block;
        if let Some(discard) = self.discard {
            let granularity = u64::from(discard.granularity);
            if granularity == 0 || !granularity.is_multiple_of(self.logical_block.into()) {
                let what = "discard granularity";
                let rule = "a multiple of the logical block size and not zero";
                return Err(UblkError::BadParam { what, value: granularity, rule });
            }
            if discard.max_sectors == 0 {
                let rule = "more than zero";
                return Err(UblkError::BadParam { what: "largest discard", value: 0, rule });
            }
            raw.discard_granularity = discard.granularity;
            raw.discard_max_sectors = discard.max_sectors;
            raw.discard_segments = 1;
        }
        Ok(())
    }

    /// The meaning of what the kernel reports.
    pub(super) fn decode(raw: &RawParams) -> Result<Self, UblkError> {
        let discards = raw.types & PARAM_DISCARD != 0;
        let discard =
            Discard { granularity: raw.discard_granularity, max_sectors: raw.discard_max_sectors };
        Ok(Self {
            sectors: Sector(raw.dev_sectors),
            logical_block: unshift("logical block shift", raw.logical_shift)?,
            physical_block: unshift("physical block shift", raw.physical_shift)?,
            max_io_bytes: raw.max_sectors.saturating_mul(512),
            discard: (discards && discard.max_sectors > 0).then_some(discard),
            max_zeroes_sectors: if discards { raw.zeroes_max_sectors } else { 0 },
            rotational: raw.attrs & ATTR_ROTATIONAL != 0,
        })
    }
}

/// Checks a size for [`super::Control::update_size`] too: a device is never made empty.
pub(super) fn check_size(sectors: Sector) -> Result<(), UblkError> {
    if sectors.0 > 0 {
        return Ok(());
    }
    let rule = "more than zero; stop the device instead";
    Err(UblkError::BadParam { what: "size in sectors", value: 0, rule })
}

fn sectors_of(bytes: u32) -> u64 {
    u64::from(bytes) / SECTOR_SIZE
}

fn shift(what: &'static str, bytes: u32, most: u32) -> Result<u8, UblkError> {
    if bytes.is_power_of_two() && (512..=most).contains(&bytes) {
        return Ok(u8::try_from(bytes.trailing_zeros()).expect("at most 31"));
    }
    let rule = "a power of two, at least 512, and no larger than the kernel takes";
    Err(UblkError::BadParam { what, value: u64::from(bytes), rule })
}

fn unshift(what: &'static str, shift: u8) -> Result<u32, UblkError> {
    let rule = "9 to 31";
    let bad = || UblkError::BadParam { what, value: u64::from(shift), rule };
    if shift < 9 {
        return Err(bad());
    }
    1_u32.checked_shl(u32::from(shift)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Params = Params {
        sectors: Sector(131_072),
        logical_block: 512,
        physical_block: 4096,
        max_io_bytes: 1 << 20,
        discard: Some(Discard { granularity: 4096, max_sectors: 8192 }),
        max_zeroes_sectors: 8192,
        rotational: false,
    };

    #[test]
    fn a_volatile_cache_and_fua_are_always_announced() {
        for rotational in [false, true] {
            let raw = Params { rotational, ..GOOD }.encode().unwrap();
            assert_eq!(raw.attrs & 0b1100, 0b1100);
            assert_eq!(raw.attrs & 0b0010 != 0, rotational);
        }
    }

    #[test]
    fn parameters_survive_the_trip_to_the_kernel_and_back() {
        let no_discard = Params { discard: None, ..GOOD };
        let plain = Params { discard: None, max_zeroes_sectors: 0, ..GOOD };
        let large = Params { logical_block: 4096, rotational: true, ..GOOD };
        for params in [GOOD, no_discard, plain, large] {
            assert_eq!(Params::decode(&params.encode().unwrap()).unwrap(), params);
        }
        assert_eq!(plain.encode().unwrap().types, 1);
        let raw = no_discard.encode().unwrap();
        assert_eq!((raw.types, raw.discard_segments, raw.discard_granularity), (3, 0, 512));
        let raw = GOOD.encode().unwrap();
        assert_eq!((raw.len, raw.max_sectors, raw.logical_shift), (136, 2048, 9));
        assert_eq!((raw.physical_shift, raw.optimal_shift, raw.discard_segments), (12, 12, 1));
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_a_name() {
        let no_granularity = Some(Discard { granularity: 0, max_sectors: 1 });
        let no_discard = Some(Discard { granularity: 512, max_sectors: 0 });
        let table = [
            (Params { logical_block: 520, ..GOOD }, "logical block size"),
            (Params { logical_block: 256, ..GOOD }, "logical block size"),
            (Params { logical_block: 8192, physical_block: 8192, ..GOOD }, "logical block size"),
            (Params { physical_block: 0, ..GOOD }, "physical block size"),
            (Params { logical_block: 4096, physical_block: 512, ..GOOD }, "physical block size"),
            (Params { max_io_bytes: 512, ..GOOD }, "largest request"),
            (Params { max_io_bytes: 5000, ..GOOD }, "largest request"),
            (Params { max_io_bytes: (32 << 20) + 4096, ..GOOD }, "largest request"),
            (Params { sectors: Sector(0), ..GOOD }, "size in sectors"),
            (Params { logical_block: 4096, sectors: Sector(9), ..GOOD }, "size in sectors"),
            (Params { discard: no_granularity, ..GOOD }, "discard granularity"),
            (Params { discard: no_discard, ..GOOD }, "largest discard"),
        ];
        for (params, expected) in table {
            match params.encode() {
                Err(UblkError::BadParam { what, .. }) => assert_eq!(what, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        assert!(check_size(Sector(0)).is_err());
        check_size(Sector(1)).unwrap();
    }

    #[test]
    fn nonsense_from_the_kernel_is_an_error() {
        for shift in [0, 8, 32, 255] {
            let raw = RawParams { logical_shift: shift, ..GOOD.encode().unwrap() };
            assert!(Params::decode(&raw).is_err(), "{shift}");
        }
    }
}
