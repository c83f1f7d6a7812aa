//! Challenge and response with a shared secret (WP-2).
//!
//! Each node sends random bytes and expects the keyed digest over them. The algorithm is
//! configured on both nodes and never transmitted. Randomness comes from the driver.
//!
//! Source: protocol notes, section 3.2.

use std::fmt;
use std::str::FromStr;

use hmac::{Hmac, Mac};
use md5::Md5;
use serde::{Deserialize, Serialize};
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use subtle::ConstantTimeEq;
use thiserror::Error;

use super::packet::Digest;
use crate::limits::CHALLENGE_SIZE;

/// The hash below the keyed digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum HmacAlg {
    /// `md5`, 16 bytes.
    Md5,
    /// `sha1`, 20 bytes.
    Sha1,
    /// `sha256`, 32 bytes.
    Sha256,
    /// `sha512`, 64 bytes.
    Sha512,
}

/// An algorithm name that this node does not know.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("cram-hmac-alg {name:?} is not supported; known are md5, sha1, sha256, sha512")]
pub struct UnknownAlg {
    /// The name.
    pub name: String,
}

/// The peer did not prove that it knows the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AuthError {
    /// Its challenge is ours: answering it would hand out the answer to our own.
    #[error("the peer sent our own challenge back")]
    Reflected,
    /// Its answer has the size of another digest. Another attempt may be made.
    #[error("authentication response of {found} bytes where {expected} were expected")]
    ResponseSize {
        /// Bytes of the digest.
        expected: usize,
        /// Bytes of the answer.
        found: usize,
    },
    /// Its answer is wrong. No further attempt is made.
    #[error("the peer does not know the shared secret")]
    WrongResponse,
}

impl HmacAlg {
    /// Bytes of the digest.
    #[must_use]
    pub const fn digest_size(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The name as Linux spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl fmt::Display for HmacAlg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HmacAlg {
    type Err = UnknownAlg;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512]
            .into_iter()
            .find(|alg| alg.name() == name)
            .ok_or_else(|| UnknownAlg { name: name.to_owned() })
    }
}

/// The answer to a challenge: the keyed digest over all of it.
#[must_use]
pub fn respond(alg: HmacAlg, secret: &[u8], challenge: &[u8]) -> Digest {
    match alg {
        HmacAlg::Md5 => digest(Hmac::<Md5>::new_from_slice(secret), challenge),
        HmacAlg::Sha1 => digest(Hmac::<Sha1>::new_from_slice(secret), challenge),
        HmacAlg::Sha256 => digest(Hmac::<Sha256>::new_from_slice(secret), challenge),
        HmacAlg::Sha512 => digest(Hmac::<Sha512>::new_from_slice(secret), challenge),
    }
}

fn digest<M: Mac, E: fmt::Debug>(keyed: Result<M, E>, challenge: &[u8]) -> Digest {
    let keyed = keyed.expect("a keyed digest takes keys of any length");
    let output = keyed.chain_update(challenge).finalize().into_bytes();
    output.iter().copied().collect()
}

/// Refuses a challenge of the peer whose beginning is our own.
///
/// # Errors
/// [`AuthError::Reflected`].
pub fn check_challenge(ours: &[u8; CHALLENGE_SIZE], theirs: &[u8]) -> Result<(), AuthError> {
    if theirs.starts_with(ours) { Err(AuthError::Reflected) } else { Ok(()) }
}

/// Checks the peer's answer to our challenge, in time that does not depend on its bytes.
///
/// # Errors
/// [`AuthError::ResponseSize`] and [`AuthError::WrongResponse`].
pub fn verify(
    alg: HmacAlg,
    secret: &[u8],
    challenge: &[u8; CHALLENGE_SIZE],
    response: &[u8],
) -> Result<(), AuthError> {
    let expected = respond(alg, secret, challenge);
    if response.len() != expected.len() {
        let (expected, found) = (expected.len(), response.len());
        return Err(AuthError::ResponseSize { expected, found });
    }
    if bool::from(expected.as_slice().ct_eq(response)) {
        Ok(())
    } else {
        Err(AuthError::WrongResponse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digests are those of the published test vectors (RFC 2202 and RFC 4231, case 2).
    #[test]
    fn digests_match_published_vectors() {
        let (key, text) = (b"Jefe", b"what do ya want for nothing?");
        let cases = [
            (HmacAlg::Md5, "750c783e6ab0b503eaa86e310a5db738"),
            (HmacAlg::Sha1, "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"),
            (HmacAlg::Sha256, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
            (
                HmacAlg::Sha512,
                "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554\
                 9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
            ),
        ];
        for (alg, expected) in cases {
            let digest = respond(alg, key, text);
            assert_eq!(hex(&digest), expected);
            assert_eq!(digest.len(), alg.digest_size());
        }
    }

    /// Only the right answer under the right secret is accepted.
    #[test]
    fn wrong_answers_are_refused() {
        let challenge = [7; CHALLENGE_SIZE];
        let alg = HmacAlg::Sha256;
        let mut answer = respond(alg, b"secret", &challenge);
        assert_eq!(verify(alg, b"secret", &challenge, &answer), Ok(()));
        assert_eq!(verify(alg, b"other", &challenge, &answer), Err(AuthError::WrongResponse));
        let size = AuthError::ResponseSize { expected: 32, found: 31 };
        assert_eq!(verify(alg, b"secret", &challenge, &answer[..31]), Err(size));
        answer[31] ^= 1;
        assert_eq!(verify(alg, b"secret", &challenge, &answer), Err(AuthError::WrongResponse));
    }

    /// Our own challenge is refused, also with bytes behind it.
    #[test]
    fn our_own_challenge_is_refused() {
        let ours = [3; CHALLENGE_SIZE];
        let mut theirs = ours.to_vec();
        assert_eq!(check_challenge(&ours, &theirs), Err(AuthError::Reflected));
        theirs.push(9);
        assert_eq!(check_challenge(&ours, &theirs), Err(AuthError::Reflected));
        theirs[0] ^= 1;
        assert_eq!(check_challenge(&ours, &theirs), Ok(()));
    }

    /// Names are those of the kernel's algorithms, and only the supported ones.
    #[test]
    fn names_are_parsed() {
        for alg in [HmacAlg::Md5, HmacAlg::Sha1, HmacAlg::Sha256, HmacAlg::Sha512] {
            assert_eq!(alg.to_string().parse(), Ok(alg));
        }
        let unknown = UnknownAlg { name: "SHA1".to_owned() };
        assert_eq!("SHA1".parse::<HmacAlg>(), Err(unknown));
    }
}
