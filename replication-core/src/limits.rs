//! Every limit of the core, with its reason and where it comes from.

/// Lowest protocol version we speak (protocol range of the in-tree driver 8.4.11).
pub const PROTOCOL_MIN: u32 = 86;
/// Highest protocol version we speak.
pub const PROTOCOL_MAX: u32 = 101;

/// Largest payload of one request in bytes, protocol 100 and later.
pub const MAX_BIO_SIZE: u32 = 1 << 20;
/// Largest payload of one request in bytes, protocol 95 to 99.
pub const MAX_BIO_SIZE_P95: u32 = 1 << 17;
/// Largest payload of one request in bytes, protocol 94 and earlier.
pub const MAX_BIO_SIZE_P94: u32 = 1 << 15;
/// Largest range of a discard or write-zeroes in bytes when the WSAME feature is agreed.
pub const MAX_DISCARD_SIZE: u32 = 128 << 20;
/// Largest range of a discard or write-zeroes in bytes without that feature.
pub const MAX_DISCARD_SIZE_OLD: u32 = 4 << 20;
/// Size of a control packet with its header; bounds the packets of a bitmap transfer.
pub const CONTROL_PACKET_SIZE: usize = 4096;
/// Longest algorithm name or shared secret with its terminating NUL.
pub const MAX_NAME: usize = 64;
/// Bytes of our authentication challenge, and the least accepted from the peer.
pub const CHALLENGE_SIZE: usize = 64;
/// Most bytes of a challenge accepted from the peer.
pub const CHALLENGE_SIZE_MAX: usize = 128;

/// Volumes of one resource: a bound for loops over untrusted input, far above practice.
pub const MAX_VOLUMES: usize = 64;
/// Highest volume number of a configuration.
pub const MAX_VOLUME_NR: u16 = 65534;

/// Slots of the activity log: least, most and default (`al-extents`).
pub const AL_EXTENTS_MIN: u16 = 67;
/// Most slots of the activity log.
pub const AL_EXTENTS_MAX: u16 = 65534;
/// Default number of slots of the activity log.
pub const AL_EXTENTS_DEFAULT: u16 = 1237;
/// Slot changes that one activity-log transaction can carry (format field width).
pub const AL_UPDATES_PER_TRANSACTION: usize = 64;
/// Slots of context that one activity-log transaction carries.
pub const AL_CONTEXT_PER_TRANSACTION: usize = 919;

/// Largest device in sectors: 16 TiB, so that a bitmap takes at most 512 MiB of memory.
pub const MAX_DEVICE_SECTORS: u64 = 1 << 35;
/// Sizes of a device that are remembered while its metadata may be at any of their ends: one more
/// for each resize that was refused since the disk was attached. Our choice.
pub const MAX_KNOWN_SIZES: usize = 16;

/// Requests of the host in flight for one volume; the queue depth of a frontend may not exceed it.
pub const MAX_QUEUE_DEPTH: u16 = 4096;
/// Requests of the peer that are held at a time; more are left in the socket.
pub const MAX_PEER_REQUESTS: u32 = 4096;
/// Write epochs of the peer that are held at a time: one for each write that may be held.
pub const MAX_PEER_EPOCHS: usize = 4096;
/// Acknowledgements that wait for the peer to read; then its data waits, too. Twice as many end
/// the connection: whoever lets answers pile up and goes on asking reads none.
pub const MAX_UNREAD_ACKS: u64 = 2 * 4096;

/// Connections that a listening node holds before their first packet has come.
pub const MAX_PENDING_ACCEPTS: usize = 5;
