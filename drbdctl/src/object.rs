//! What a verb is applied to: `all`, `RES`, `RES/VOL`, `RES:PEER`, `RES:PEER/VOL`.

use std::fmt;

use crate::exit::Failure;

/// An object as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// Every resource of this node.
    All,
    /// One resource, or a part of it.
    Named(Named),
}

/// One resource, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The resource.
    pub resource: String,
    /// The peer, if one was named. There is only one, so this is checked and nothing more.
    pub peer: Option<String>,
    /// The volume, if one was named.
    pub volume: Option<u16>,
}

impl Named {
    /// The resource as a whole.
    pub fn whole(resource: impl Into<String>) -> Self {
        Self { resource: resource.into(), peer: None, volume: None }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.resource)?;
        if let Some(peer) = &self.peer {
            write!(f, ":{peer}")?;
        }
        match self.volume {
            Some(volume) => write!(f, "/{volume}"),
            None => Ok(()),
        }
    }
}

/// Reads an object.
///
/// # Errors
/// If a part is empty or the volume is no number. The name is not looked up here, but it cannot
/// name a file elsewhere: characters that no resource name has are refused.
pub fn parse(word: &str) -> Result<Object, Failure> {
    if word == "all" {
        return Ok(Object::All);
    }
    let bad = || Failure::usage(format!("'{word}' is not RES, RES/VOL, RES:PEER or 'all'"));
    let (front, volume) = match word.rsplit_once('/') {
        Some((front, number)) => {
            let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            let volume = number.parse().ok().filter(|_| digits);
            (front, Some(volume.ok_or_else(bad)?))
        }
        None => (word, None),
    };
    let (resource, peer) = match front.split_once(':') {
        Some((resource, peer)) => (resource, Some(peer)),
        None => (front, None),
    };
    let is_file_name = !resource.contains(['/', '\0']) && resource != "." && resource != "..";
    if resource.is_empty() || peer == Some("") || !is_file_name {
        return Err(bad());
    }
    let (resource, peer) = (resource.to_owned(), peer.map(str::to_owned));
    Ok(Object::Named(Named { resource, peer, volume }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form, and what comes back when it is printed.
    #[test]
    fn forms() {
        let named = |resource: &str, peer: Option<&str>, volume| {
            let (resource, peer) = (resource.to_owned(), peer.map(str::to_owned));
            Object::Named(Named { resource, peer, volume })
        };
        let table = [
            ("r0", named("r0", None, None)),
            ("r0/0", named("r0", None, Some(0))),
            ("r0:bob", named("r0", Some("bob"), None)),
            ("r0:bob/65534", named("r0", Some("bob"), Some(65534))),
            ("r0:10.0.0.2:7788/1", named("r0", Some("10.0.0.2:7788"), Some(1))),
        ];
        for (word, expected) in table {
            let object = parse(word).unwrap();
            assert_eq!(object, expected, "{word}");
            match object {
                Object::Named(named) => assert_eq!(named.to_string(), word),
                Object::All => panic!("{word} is not 'all'"),
            }
        }
        assert_eq!(parse("all").unwrap(), Object::All);
    }

    /// Words that name nothing, and words that would lead out of the directory of run-time files.
    #[test]
    fn malformed() {
        for word in ["", "/0", "r0/", "r0/x", "r0/+1", "r0/65536", "r0:", ":bob", "../r0", "a/b/0"]
        {
            assert_eq!(parse(word).unwrap_err().exit, 1, "{word}");
        }
        assert_eq!(parse("../0").unwrap_err().exit, 1);
    }
}
