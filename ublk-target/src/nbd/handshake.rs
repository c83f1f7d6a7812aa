//! The NBD handshake: fixed newstyle, byte by byte, without any I/O.
//!
//! | option | answer |
//! |---|---|
//! | `EXPORT_NAME` | the old form, then transmission |
//! | `GO`, `INFO` | `INFO_EXPORT` and `INFO_BLOCK_SIZE`, then acknowledged |
//! | `LIST` | every volume that has a size |
//! | `STRUCTURED_REPLY` | acknowledged |
//! | `ABORT` | acknowledged, then closed |
//! | all others | unsupported |
//!
//! Memory for a client is bounded by [`OPTION_MAX`]; a longer option ends the connection.
//!
//! Source: the NBD protocol description (`doc/proto.md` of the NBD project).

use super::proto::{self, Limits, be16, be32, be64};

/// Longest option data: a name of 4096 bytes, and a list of information requests.
pub const OPTION_MAX: u32 = 8192;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;
const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
const CLIENT_NO_ZEROES: u32 = 1 << 1;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
const REP_ERR_INVALID: u32 = (1 << 31) + 3;
const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// The unit that clients should prefer: a block of the bitmap.
const PREFERRED_BLOCK: u32 = 4096;
/// Zeroes at the end of the old form, which a client can decline.
const EXPORT_NAME_ZEROES: usize = 124;

/// A volume as offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its number.
    pub name: String,
    /// Size and limits. A size of zero: it is not known yet, and the volume is not offered.
    pub limits: Limits,
}

/// What became of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More are needed.
    More,
    /// So many were used; there may be more to do.
    Used(usize),
    /// So many were used; requests for an export follow.
    Transmission {
        /// Bytes used.
        used: usize,
        /// Place of the export in the list.
        export: usize,
    },
    /// So many were used; the connection is to be closed after the reply.
    Close(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Options,
}

/// The handshake with one client.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    no_zeroes: bool,
    structured: bool,
}

impl Handshake {
    /// Starts with the server's greeting.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Self { stage: Stage::ClientFlags, no_zeroes: false, structured: false }
    }

    /// Whether structured replies were agreed.
    #[must_use]
    pub fn is_structured(&self) -> bool {
        self.structured
    }

    /// Takes the next step from `input`, the bytes not used so far; replies are appended to `out`.
    pub fn advance(&mut self, input: &[u8], exports: &[Export], out: &mut Vec<u8>) -> Progress {
        match self.stage {
            Stage::ClientFlags => self.on_client_flags(input),
            Stage::Options => self.on_option(input, exports, out),
        }
    }

    fn on_client_flags(&mut self, input: &[u8]) -> Progress {
        if input.len() < 4 {
            return Progress::More;
        }
        let flags = be32(input, 0);
        let known = CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES;
        if flags & CLIENT_FIXED_NEWSTYLE == 0 || flags & !known != 0 {
            return Progress::Close(4);
        }
        self.no_zeroes = flags & CLIENT_NO_ZEROES != 0;
        self.stage = Stage::Options;
        Progress::Used(4)
    }

    fn on_option(&mut self, input: &[u8], exports: &[Export], out: &mut Vec<u8>) -> Progress {
        const HEAD: usize = 16;
        if input.len() < HEAD {
            return Progress::More;
        }
        let (magic, option, length) = (be64(input, 0), be32(input, 8), be32(input, 12));
        if magic != OPTION_MAGIC || length > OPTION_MAX {
            return Progress::Close(HEAD);
        }
        let used = HEAD + usize::try_from(length).expect("bounded by OPTION_MAX");
        let Some(data) = input.get(HEAD..used) else {
            return Progress::More;
        };
        match option {
            OPT_EXPORT_NAME => self.on_export_name(data, used, exports, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                Progress::Close(used)
            }
            OPT_LIST if data.is_empty() => {
                for export in exports.iter().filter(|export| export.limits.sectors.0 > 0) {
                    let length = u32::try_from(export.name.len()).expect("names are short");
                    let mut data = length.to_be_bytes().to_vec();
                    data.extend_from_slice(export.name.as_bytes());
                    reply(out, option, REP_SERVER, &data);
                }
                reply(out, option, REP_ACK, &[]);
                Progress::Used(used)
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
                Progress::Used(used)
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => {
                reply(out, option, REP_ERR_INVALID, b"this option has no data");
                Progress::Used(used)
            }
            OPT_INFO | OPT_GO => self.on_info(option, data, used, exports, out),
            _ => {
                reply(out, option, REP_ERR_UNSUP, b"unsupported option");
                Progress::Used(used)
            }
        }
    }

    fn on_export_name(
        &self,
        name: &[u8],
        used: usize,
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Progress {
        // This option has no error reply: an unknown name ends the connection.
        let Some(export) = find(name, exports) else {
            return Progress::Close(used);
        };
        let limits = &exports[export].limits;
        out.extend_from_slice(&limits.sectors.byte().to_be_bytes());
        out.extend_from_slice(&proto::transmission_flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + EXPORT_NAME_ZEROES, 0);
        }
        Progress::Transmission { used, export }
    }

    fn on_info(
        &self,
        option: u32,
        data: &[u8],
        used: usize,
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Progress {
        let Some(name) = info_name(data) else {
            reply(out, option, REP_ERR_INVALID, b"malformed option");
            return Progress::Used(used);
        };
        let Some(export) = find(name, exports) else {
            let text = b"no such volume, or its size is not known yet";
            reply(out, option, REP_ERR_UNKNOWN, text);
            return Progress::Used(used);
        };
        let limits = &exports[export].limits;
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&limits.sectors.byte().to_be_bytes());
        info.extend_from_slice(&proto::transmission_flags(self.structured).to_be_bytes());
        reply(out, option, REP_INFO, &info);
        let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        info.extend_from_slice(&limits.block_size.to_be_bytes());
        info.extend_from_slice(&PREFERRED_BLOCK.to_be_bytes());
        info.extend_from_slice(&limits.max_io_size.to_be_bytes());
        reply(out, option, REP_INFO, &info);
        reply(out, option, REP_ACK, &[]);
        match option {
            OPT_GO => Progress::Transmission { used, export },
            _ => Progress::Used(used),
        }
    }
}

/// The name in the data of `INFO` and `GO`; the list behind it only says what the client would
/// like to hear, and it hears everything.
fn info_name(data: &[u8]) -> Option<&[u8]> {
    let length = usize::try_from(be32(data.get(..4)?, 0)).ok()?;
    let rest = &data[4..];
    let name = rest.get(..length)?;
    let requests = &rest[length..];
    let count = usize::from(be16(requests.get(..2)?, 0));
    (requests.len() == 2 + 2 * count).then_some(name)
}

fn find(name: &[u8], exports: &[Export]) -> Option<usize> {
    let place = match name {
        b"" => (!exports.is_empty()).then_some(0),
        name => exports.iter().position(|export| export.name.as_bytes() == name),
    };
    place.filter(|place| exports[*place].limits.sectors.0 > 0)
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    let length = u32::try_from(data.len()).expect("replies are short");
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_core::units::Sector;

    fn exports() -> Vec<Export> {
        let export = |name: &str, sectors| Export {
            name: name.to_owned(),
            limits: Limits { sectors: Sector(sectors), block_size: 512, max_io_size: 1 << 20 },
        };
        vec![export("0", 2048), export("7", 4096), export("8", 0)]
    }

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn info(name: &[u8]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&[0, 1, 0, 3]);
        data
    }

    fn opened() -> Handshake {
        let mut handshake = Handshake::new(&mut Vec::new());
        let progress = handshake.advance(&[0, 0, 0, 3], &exports(), &mut Vec::new());
        assert_eq!(progress, Progress::Used(4));
        handshake
    }

    /// The kinds of the replies in `bytes`.
    fn kinds(mut bytes: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(be64(bytes, 0), REPLY_MAGIC);
            kinds.push(be32(bytes, 12));
            bytes = &bytes[20 + usize::try_from(be32(bytes, 16)).unwrap()..];
        }
        kinds
    }

    #[test]
    fn the_greeting_is_fixed_newstyle() {
        let mut out = Vec::new();
        Handshake::new(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn go_leads_to_transmission_with_size_and_limits() {
        let mut out = Vec::new();
        let bytes = option(OPT_GO, &info(b"7"));
        let progress = opened().advance(&bytes, &exports(), &mut out);
        assert_eq!(progress, Progress::Transmission { used: bytes.len(), export: 1 });
        assert_eq!(kinds(&out), [REP_INFO, REP_INFO, REP_ACK]);
        assert_eq!(out[20..22], [0, 0]);
        assert_eq!(be64(&out, 22), 4096 * 512);
        assert_eq!(be16(&out, 30), 0b1_0110_1101);
        assert_eq!(be32(&out, 32 + 20 + 2), 512);
        assert_eq!(be32(&out, 32 + 20 + 10), 1 << 20);
    }

    #[test]
    fn info_stays_in_the_handshake_and_the_empty_name_is_the_first_volume() {
        let mut out = Vec::new();
        let bytes = option(OPT_INFO, &info(b""));
        let progress = opened().advance(&bytes, &exports(), &mut out);
        assert_eq!(progress, Progress::Used(bytes.len()));
        assert_eq!(be64(&out, 22), 2048 * 512);
    }

    #[test]
    fn structured_replies_are_agreed_and_announced() {
        let mut handshake = opened();
        let mut out = Vec::new();
        let bytes = option(OPT_STRUCTURED_REPLY, &[]);
        assert_eq!(handshake.advance(&bytes, &exports(), &mut out), Progress::Used(16));
        assert_eq!(kinds(&out), [REP_ACK]);
        assert!(handshake.is_structured());
        out.clear();
        handshake.advance(&option(OPT_GO, &info(b"0")), &exports(), &mut out);
        assert_eq!(be16(&out, 30), 0b1_1110_1101);
    }

    #[test]
    fn the_list_names_volumes_with_a_size() {
        let mut out = Vec::new();
        opened().advance(&option(OPT_LIST, &[]), &exports(), &mut out);
        assert_eq!(kinds(&out), [REP_SERVER, REP_SERVER, REP_ACK]);
        assert_eq!(out[20..25], [0, 0, 0, 1, b'0']);
    }

    #[test]
    fn the_old_form_has_zeroes_unless_declined() {
        for (flags, length) in [(1, 134), (3, 10)] {
            let mut handshake = Handshake::new(&mut Vec::new());
            handshake.advance(&[0, 0, 0, flags], &exports(), &mut Vec::new());
            let mut out = Vec::new();
            let bytes = option(OPT_EXPORT_NAME, b"0");
            let progress = handshake.advance(&bytes, &exports(), &mut out);
            assert_eq!(progress, Progress::Transmission { used: 17, export: 0 });
            assert_eq!(out.len(), length);
        }
        let unknown = option(OPT_EXPORT_NAME, b"5");
        let progress = opened().advance(&unknown, &exports(), &mut Vec::new());
        assert_eq!(progress, Progress::Close(17));
    }

    #[test]
    fn what_is_not_known_gets_an_error_and_the_handshake_goes_on() {
        let table = [
            (option(OPT_GO, &info(b"5")), REP_ERR_UNKNOWN),
            (option(OPT_GO, &info(b"8")), REP_ERR_UNKNOWN),
            (option(OPT_GO, &[0, 0]), REP_ERR_INVALID),
            (option(OPT_GO, &[0, 0, 0, 9, b'0', 0, 0]), REP_ERR_INVALID),
            (option(OPT_GO, &[0xff, 0xff, 0xff, 0xff, 0, 0]), REP_ERR_INVALID),
            (option(OPT_LIST, b"x"), REP_ERR_INVALID),
            (option(5, &[]), REP_ERR_UNSUP),
            (option(10, b"anything"), REP_ERR_UNSUP),
        ];
        for (bytes, kind) in table {
            let mut out = Vec::new();
            let progress = opened().advance(&bytes, &exports(), &mut out);
            assert_eq!(progress, Progress::Used(bytes.len()));
            assert_eq!(kinds(&out), [kind]);
        }
    }

    #[test]
    fn abort_is_acknowledged_and_garbage_closes() {
        let mut out = Vec::new();
        let progress = opened().advance(&option(OPT_ABORT, &[]), &exports(), &mut out);
        assert_eq!(progress, Progress::Close(16));
        assert_eq!(kinds(&out), [REP_ACK]);
        let progress = opened().advance(&[0x55; 16], &exports(), &mut Vec::new());
        assert_eq!(progress, Progress::Close(16));
        let mut long = option(OPT_GO, &[]);
        long[12..16].copy_from_slice(&(OPTION_MAX + 1).to_be_bytes());
        assert_eq!(opened().advance(&long, &exports(), &mut Vec::new()), Progress::Close(16));
        let mut handshake = Handshake::new(&mut Vec::new());
        let progress = handshake.advance(&[0, 0, 0, 0], &exports(), &mut Vec::new());
        assert_eq!(progress, Progress::Close(4));
    }

    #[test]
    fn every_prefix_of_an_option_asks_for_more() {
        let bytes = option(OPT_GO, &info(b"0"));
        for end in 0..bytes.len() {
            let mut out = Vec::new();
            let progress = opened().advance(&bytes[..end], &exports(), &mut out);
            assert_eq!((progress, out.len()), (Progress::More, 0));
        }
    }
}
