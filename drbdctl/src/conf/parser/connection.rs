//! The `connection` and `connection-mesh` sections.

use super::super::ast::{Connection, End, Setting};
use super::super::error::{Fault, Outcome, Problem};
use super::super::lexer::{Lexer, TokenKind};
use super::super::source::Loc;
use super::super::table::Section;
use super::{Parser, unexpected, unknown};

/// Most hosts of a mesh: the number of node ids.
const MESH_MAX: usize = 32;

/// Statements in a connection.
const IN_CONNECTION: &[&str] = &["host", "path", "net", "disk", "volume", "skip", "}"];
/// Statements in a mesh.
const IN_MESH: &[&str] = &["hosts", "net", "}"];

impl Parser<'_> {
    /// Parses `connection [NAME] { ... }` after its keyword.
    pub(super) fn connection(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Connection> {
        if !lex.peek()?.is_punct('{') {
            let name = self.name(lex, "connection name | {")?;
            self.warn(name.at, format!("the name '{}' of the connection is ignored", name.text));
        }
        let mut connection = empty(at);
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => break,
                TokenKind::Word(word) => {
                    self.connection_statement(lex, word, token.at, &mut connection)?;
                }
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_CONNECTION));
                }
            }
        }
        let from_path = connection.paths.first().map(|(ends, _)| ends.len());
        let count =
            if connection.ends.is_empty() { from_path } else { Some(connection.ends.len()) };
        match count {
            Some(2) => Ok(connection),
            Some(_) | None => {
                let problem = Problem::Expected {
                    expected: "two hosts in a connection".to_owned(),
                    found: count.unwrap_or(0).to_string(),
                };
                Err(Fault::new(at, problem))
            }
        }
    }

    /// Parses a statement in a connection.
    fn connection_statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        connection: &mut Connection,
    ) -> Outcome<()> {
        match word {
            "host" => {
                let end = self.end(lex)?;
                connection.ends.push(end);
            }
            "path" => {
                let ends = self.path(lex, at)?;
                if !connection.paths.is_empty() {
                    self.warn(at, "only the first path of a connection is used");
                }
                connection.paths.push((ends, at));
            }
            "net" => self.options_only(lex, Section::Net, &mut connection.net)?,
            "disk" => self.options_only(lex, Section::Disk, &mut connection.disk)?,
            "volume" => {
                let volume = self.connection_volume(lex)?;
                connection.volumes.push(volume);
            }
            "skip" => lex.skip_statement(at)?,
            _ => return Err(unknown(word, at, IN_CONNECTION)),
        }
        Ok(())
    }

    /// Parses `volume N { disk { ... } }` after its keyword.
    fn connection_volume(&mut self, lex: &mut Lexer) -> Outcome<(u16, Vec<Setting>)> {
        let (number, _) = self.integer(lex, "volume", (0, 65_534))?;
        let nr = u16::try_from(number).expect("the range of volume numbers ends below 2^16");
        let mut list = Vec::new();
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            if token.is_punct('}') {
                return Ok((nr, list));
            }
            if !token.is_word("disk") {
                return Err(unexpected(&token, &["disk", "}"]));
            }
            self.options_only(lex, Section::Disk, &mut list)?;
        }
    }

    /// Parses `host NAME ...;` after its keyword.
    fn end(&mut self, lex: &mut Lexer) -> Outcome<End> {
        let host = self.name(lex, "host name")?;
        let mut end = End { host, address: None, port: None, proxy: Vec::new() };
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct(';') => return Ok(end),
                TokenKind::Word(word) if word == "address" && end.address.is_none() => {
                    end.address = Some(self.address(lex)?);
                }
                TokenKind::Word(word) if word == "port" && end.port.is_none() => {
                    end.port = Some(self.port(lex)?);
                }
                TokenKind::Word(word) if word == "via" && end.proxy.is_empty() => {
                    self.warn(token.at, "section proxy is accepted but has no effect");
                    end.proxy = self.free(lex, word)?;
                    // Without a block, the `;` that ends the proxy also ends the statement.
                    if !lex.peek()?.is_punct(';') {
                        return Ok(end);
                    }
                }
                TokenKind::Word(_)
                | TokenKind::Quoted(_)
                | TokenKind::Punct(_)
                | TokenKind::End => {
                    return Err(unexpected(&token, &["address", "port", "via", ";"]));
                }
            }
        }
    }

    /// Parses `path { host ...; host ...; }` after its keyword.
    fn path(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Vec<End>> {
        let mut ends = Vec::new();
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            if token.is_punct('}') {
                break;
            }
            if !token.is_word("host") {
                return Err(unexpected(&token, &["host", "}"]));
            }
            let end = self.end(lex)?;
            ends.push(end);
        }
        if ends.len() == 2 {
            return Ok(ends);
        }
        let expected = "two hosts in a path".to_owned();
        Err(Fault::new(at, Problem::Expected { expected, found: ends.len().to_string() }))
    }

    /// Parses `connection-mesh { hosts A B ...; net { ... } }` after its keyword; gives a
    /// connection for each pair.
    pub(super) fn mesh(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Vec<Connection>> {
        let mut ends: Vec<End> = Vec::new();
        let mut net = Vec::new();
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => break,
                TokenKind::Word(word) if word == "hosts" => {
                    while !lex.peek()?.is_punct(';') {
                        let host = self.name(lex, "host name | ;")?;
                        ends.push(End { host, address: None, port: None, proxy: Vec::new() });
                    }
                    lex.next()?;
                }
                TokenKind::Word(word) if word == "net" => {
                    self.options_only(lex, Section::Net, &mut net)?;
                }
                TokenKind::Word(word) => return Err(unknown(word, token.at, IN_MESH)),
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_MESH));
                }
            }
        }
        if !(2..=MESH_MAX).contains(&ends.len()) {
            let expected = format!("2 to {MESH_MAX} hosts in a connection-mesh");
            let problem = Problem::Expected { expected, found: ends.len().to_string() };
            return Err(Fault::new(at, problem));
        }
        let mut connections = Vec::new();
        for (n, one) in ends.iter().enumerate() {
            for other in &ends[n + 1..] {
                let ends = vec![one.clone(), other.clone()];
                connections.push(Connection { ends, net: net.clone(), ..empty(at) });
            }
        }
        Ok(connections)
    }
}

/// A connection without statements.
fn empty(at: Loc) -> Connection {
    Connection {
        ends: Vec::new(),
        paths: Vec::new(),
        net: Vec::new(),
        disk: Vec::new(),
        volumes: Vec::new(),
        at,
    }
}
