//! What the bytes of a connection mean: framing, packets, bitmap transfer, version agreement and
//! authentication digests.
//!
//! Responsible for: turning bytes into typed packets and back, bit-exact with the in-kernel driver
//! 8.4.11 (protocol 86 to 101). Not responsible for: when a packet is sent and what follows from
//! it. A packet is read in three steps, so that payload never passes through here:
//!
//! 1. [`HeaderKind::size`] bytes go to [`decode_header`];
//! 2. [`plan_body`] says how many fixed bytes and how much payload follow;
//! 3. the fixed bytes go to [`decode`]; payload goes into a buffer of the driver.
//!
//! Invariants: WP-1 (any bytes give a packet or an error; at most 4 KiB are asked for besides
//! payload), WP-2 (authentication digests), WP-3 (version agreement), WP-4 (lengths, alignment and
//! addresses are checked here as far as they do not depend on the device), BM-9 (bitmaps).
//!
//! Source: protocol notes, sections 1 to 4, 10.1, 12.2 to 12.4.

pub mod auth;
mod bytes;
mod codec;
mod command;
mod decode;
mod encode;
mod error;
pub mod features;
mod flags;
mod header;
mod packet;
pub mod rle;
#[cfg(test)]
mod tests;

pub use auth::{AuthError, HmacAlg};
pub use codec::{Agreed, BodyPlan, plan_body};
pub use command::{Command, Stream};
pub use decode::decode;
pub use encode::encode;
pub use error::DecodeError;
pub use features::{Incompatible, negotiate};
pub use flags::{DpFlags, Features, SizesFlags, UuidFlags};
pub use header::{Header, HeaderKind, decode_header};
pub use packet::{
    AlgName, BarrierToken, BlockAck, BlockId, BlockRequest, CompressedBitmap, DataHeader, Desc,
    Digest, FeaturesPacket, OvResult, Packet, Protocol, QueueLimits, RangeHeader,
    ReplicationProtocol, ResyncController, Sizes, SyncParam, UuidsPacket,
};
pub use rle::{BitmapReceiver, BitmapSender, Progress, encode_bitmap};
