//! The packet types: code, protocol name and socket (protocol notes, sections 4.1 and 4.2).

use std::fmt;

/// One of the two sockets of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// Handshake, writes, reads, resync data, bitmaps, state.
    Data,
    /// Pings and answers.
    Meta,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Meta => "meta",
        })
    }
}

macro_rules! commands {
    ($($variant:ident = $code:literal, $name:literal, $stream:expr;)*) => {
        /// The type of a packet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Command {
            $(
                #[doc = concat!("`", $name, "`, ", stringify!($code), ".")]
                $variant,
            )*
        }

        impl Command {
            /// Every packet type.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The number in the packet header.
            #[must_use]
            pub const fn code(self) -> u16 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The customary name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The socket that carries it; `None` if both may.
            #[must_use]
            pub const fn stream(self) -> Option<Stream> {
                match self { $(Self::$variant => $stream,)* }
            }

            /// The packet type of a number.
            #[must_use]
            pub const fn from_code(code: u16) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

commands! {
    Data = 0x00, "P_DATA", Some(Stream::Data);
    DataReply = 0x01, "P_DATA_REPLY", Some(Stream::Data);
    RsDataReply = 0x02, "P_RS_DATA_REPLY", Some(Stream::Data);
    Barrier = 0x03, "P_BARRIER", Some(Stream::Data);
    Bitmap = 0x04, "P_BITMAP", Some(Stream::Data);
    UnplugRemote = 0x07, "P_UNPLUG_REMOTE", Some(Stream::Data);
    DataRequest = 0x08, "P_DATA_REQUEST", Some(Stream::Data);
    RsDataRequest = 0x09, "P_RS_DATA_REQUEST", Some(Stream::Data);
    SyncParam = 0x0a, "P_SYNC_PARAM", Some(Stream::Data);
    Protocol = 0x0b, "P_PROTOCOL", Some(Stream::Data);
    Uuids = 0x0c, "P_UUIDS", Some(Stream::Data);
    Sizes = 0x0d, "P_SIZES", Some(Stream::Data);
    State = 0x0e, "P_STATE", Some(Stream::Data);
    SyncUuid = 0x0f, "P_SYNC_UUID", Some(Stream::Data);
    AuthChallenge = 0x10, "P_AUTH_CHALLENGE", Some(Stream::Data);
    AuthResponse = 0x11, "P_AUTH_RESPONSE", Some(Stream::Data);
    StateChgReq = 0x12, "P_STATE_CHG_REQ", Some(Stream::Data);
    Ping = 0x13, "P_PING", Some(Stream::Meta);
    PingAck = 0x14, "P_PING_ACK", Some(Stream::Meta);
    RecvAck = 0x15, "P_RECV_ACK", Some(Stream::Meta);
    WriteAck = 0x16, "P_WRITE_ACK", Some(Stream::Meta);
    RsWriteAck = 0x17, "P_RS_WRITE_ACK", Some(Stream::Meta);
    Superseded = 0x18, "P_SUPERSEDED", Some(Stream::Meta);
    NegAck = 0x19, "P_NEG_ACK", Some(Stream::Meta);
    NegDReply = 0x1a, "P_NEG_DREPLY", Some(Stream::Meta);
    NegRsDReply = 0x1b, "P_NEG_RS_DREPLY", Some(Stream::Meta);
    BarrierAck = 0x1c, "P_BARRIER_ACK", Some(Stream::Meta);
    StateChgReply = 0x1d, "P_STATE_CHG_REPLY", Some(Stream::Meta);
    OvRequest = 0x1e, "P_OV_REQUEST", Some(Stream::Data);
    OvReply = 0x1f, "P_OV_REPLY", Some(Stream::Data);
    OvResult = 0x20, "P_OV_RESULT", Some(Stream::Meta);
    CsumRsRequest = 0x21, "P_CSUM_RS_REQUEST", Some(Stream::Data);
    RsIsInSync = 0x22, "P_RS_IS_IN_SYNC", Some(Stream::Meta);
    SyncParam89 = 0x23, "P_SYNC_PARAM89", Some(Stream::Data);
    CompressedBitmap = 0x24, "P_COMPRESSED_BITMAP", Some(Stream::Data);
    DelayProbe = 0x27, "P_DELAY_PROBE", None;
    OutOfSync = 0x28, "P_OUT_OF_SYNC", Some(Stream::Data);
    RsCancel = 0x29, "P_RS_CANCEL", Some(Stream::Meta);
    ConnStChgReq = 0x2a, "P_CONN_ST_CHG_REQ", Some(Stream::Data);
    ConnStChgReply = 0x2b, "P_CONN_ST_CHG_REPLY", Some(Stream::Meta);
    RetryWrite = 0x2c, "P_RETRY_WRITE", Some(Stream::Meta);
    ProtocolUpdate = 0x2d, "P_PROTOCOL_UPDATE", Some(Stream::Data);
    Trim = 0x31, "P_TRIM", Some(Stream::Data);
    RsThinRequest = 0x32, "P_RS_THIN_REQ", Some(Stream::Data);
    RsDeallocated = 0x33, "P_RS_DEALLOCATED", Some(Stream::Data);
    Zeroes = 0x36, "P_ZEROES", Some(Stream::Data);
    InitialMeta = 0xfff1, "P_INITIAL_META", Some(Stream::Meta);
    InitialData = 0xfff2, "P_INITIAL_DATA", Some(Stream::Data);
    ConnectionFeatures = 0xfffe, "P_CONNECTION_FEATURES", Some(Stream::Data);
}

impl Command {
    /// Whether the packet may arrive on `stream`.
    #[must_use]
    pub fn is_on(self, stream: Stream) -> bool {
        self.stream().is_none_or(|own| own == stream)
    }

    /// Whether the packet concerns the connection, so that its volume number has no meaning.
    #[must_use]
    pub const fn is_connection_level(self) -> bool {
        matches!(
            self,
            Self::Barrier
                | Self::BarrierAck
                | Self::UnplugRemote
                | Self::Protocol
                | Self::ProtocolUpdate
                | Self::AuthChallenge
                | Self::AuthResponse
                | Self::Ping
                | Self::PingAck
                | Self::DelayProbe
                | Self::ConnStChgReq
                | Self::ConnStChgReply
                | Self::InitialMeta
                | Self::InitialData
                | Self::ConnectionFeatures
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes and types belong to each other one to one, and the obsolete ones are unknown.
    #[test]
    fn codes_are_unique() {
        for command in Command::ALL {
            assert_eq!(Command::from_code(command.code()), Some(*command));
        }
        for code in [0x05, 0x06, 0x25, 0x26, 0x2e, 0x2f, 0x30, 0x34, 0x35, 0x40, 0xfff3] {
            assert_eq!(Command::from_code(code), None, "{code:#x}");
        }
    }
}
