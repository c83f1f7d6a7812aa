//! Flag words that travel in packets.

use std::ops::BitOr;

/// Declares a set of flags over an unsigned integer.
macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident($int:ty) {
        $($(#[$flag_doc:meta])* $flag:ident = $value:expr,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self($value);)*

            /// Whether every flag of `other` is set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The flags set in both.
            #[must_use]
            pub const fn intersection(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

flag_set! {
    /// The flags of a mirrored write (protocol notes, section 10.1).
    /// From version 100 on, unknown bits are kept.
    DpFlags(u32) {
        /// Hint: somebody waits for this write.
        RW_SYNC = 2,
        /// The sender is in a resync state: the receiver may clear the bits of the range.
        MAY_SET_IN_SYNC = 4,
        /// Without use.
        UNPLUG = 8,
        /// The write is durable when it completes.
        FUA = 16,
        /// Everything before is durable before this write starts.
        FLUSH = 32,
        /// A discard; in a write of zeroes: the range may be unmapped.
        DISCARD = 64,
        /// Answer when the write was received (protocol B).
        SEND_RECEIVE_ACK = 128,
        /// Answer when the write is on disk (protocol C).
        SEND_WRITE_ACK = 256,
        /// Obsolete: one block written over a range.
        WSAME = 512,
        /// A write of zeroes.
        ZEROES = 1024,
    }
}

impl DpFlags {
    /// The flags that exist in a protocol version; the others are neither sent nor taken.
    #[must_use]
    pub const fn for_version(self, version: u32) -> Self {
        let acks = Self::SEND_RECEIVE_ACK.0 | Self::SEND_WRITE_ACK.0;
        let mask = match version {
            0..95 => Self::RW_SYNC.0 | Self::MAY_SET_IN_SYNC.0,
            95..100 => !acks,
            100.. => u32::MAX,
        };
        Self(self.0 & mask)
    }
}

flag_set! {
    /// Optional parts of the protocol (protocol notes, section 3.1). Unknown bits are kept.
    Features(u32) {
        /// Discards may be sent.
        TRIM = 1,
        /// Resync may report ranges of zeroes instead of sending them.
        THIN_RESYNC = 2,
        /// Sizes carry queue limits, and discards may be as large as 128 MiB.
        WSAME = 4,
        /// Writes of zeroes may be sent, and a discard need not zero.
        WZEROES = 8,
        /// Everything that the in-kernel driver 8.4.11 announces.
        OURS = 15,
    }
}

flag_set! {
    /// The flags of the sizes packet (protocol notes, section 3.5). Unknown bits are kept.
    SizesFlags(u16) {
        /// The operator forced this size.
        FORCED = 1,
        /// New space counts as clean.
        NO_RESYNC = 2,
    }
}

flag_set! {
    /// The flags of the UUIDs packet (protocol notes, section 3.6). Unknown bits are kept.
    UuidFlags(u64) {
        /// The sender offers to give up its data.
        DISCARD_MY_DATA = 1,
        /// The sender was Primary when it went down.
        CRASHED_PRIMARY = 2,
        /// The disk that the sender is attaching is Inconsistent.
        INCONSISTENT = 4,
        /// The initial sync is skipped.
        SKIP_INITIAL_SYNC = 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Old versions are not sent flags that they do not know.
    #[test]
    fn old_versions_get_fewer_flags() {
        let all = DpFlags(2 | 4 | 16 | 32 | 64 | 128 | 256 | 1024);
        assert_eq!(all.for_version(86), DpFlags::RW_SYNC | DpFlags::MAY_SET_IN_SYNC);
        assert_eq!(all.for_version(99), DpFlags(2 | 4 | 16 | 32 | 64 | 1024));
        assert_eq!(all.for_version(100), all);
    }

    /// A set contains its parts and not the rest.
    #[test]
    fn sets_contain_their_parts() {
        let flags = DpFlags::FUA | DpFlags::FLUSH;
        assert!(flags.contains(DpFlags::FUA));
        assert!(!flags.contains(DpFlags::FUA | DpFlags::DISCARD));
        assert_eq!(Features(0x3ff).intersection(Features::OURS), Features(0xf));
    }
}
