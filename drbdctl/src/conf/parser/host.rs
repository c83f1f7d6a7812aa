//! Host sections and addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::ast::{Address, Host, HostKind, Name};
use super::super::error::{Fault, Outcome, Problem};
use super::super::lexer::{Lexer, TokenKind};
use super::super::source::Loc;
use super::super::table::Section;
use super::{Parser, unexpected, unknown};

/// Highest node id.
const NODE_ID_MAX: u32 = 31;

/// Statements in a host section.
const IN_HOST: &[&str] = &[
    "device",
    "disk",
    "meta-disk",
    "flexible-meta-disk",
    "address",
    "volume",
    "node-id",
    "options",
    "proxy",
    "skip",
    "}",
];

impl Parser<'_> {
    /// Parses `on HOST ... { ... }` after its keyword.
    pub(super) fn on(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Host> {
        let mut names = vec![self.name(lex, "host name")?];
        while !lex.peek()?.is_punct('{') {
            names.push(self.name(lex, "host name | {")?);
        }
        self.host_body(lex, HostKind::On, names, None, at)
    }

    /// Parses `floating ADDRESS { ... }` after its keyword.
    pub(super) fn floating(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Host> {
        let address = self.address(lex)?;
        if lex.peek()?.is_punct(';') {
            lex.next()?;
            return Ok(host(HostKind::Floating, Vec::new(), Some(address), at));
        }
        self.host_body(lex, HostKind::Floating, Vec::new(), Some(address), at)
    }

    /// Parses `stacked-on-top-of RESOURCE { ... }` after its keyword.
    pub(super) fn stacked(&mut self, lex: &mut Lexer, at: Loc) -> Outcome<Host> {
        let lower = self.name(lex, "resource name")?;
        self.host_body(lex, HostKind::Stacked(lower.text), Vec::new(), None, at)
    }

    /// Parses the braces of a host section.
    fn host_body(
        &mut self,
        lex: &mut Lexer,
        kind: HostKind,
        names: Vec<Name>,
        address: Option<Address>,
        at: Loc,
    ) -> Outcome<Host> {
        let mut host = host(kind, names, address, at);
        self.punct(lex, '{')?;
        loop {
            let token = lex.next()?;
            match &token.kind {
                TokenKind::Punct('}') => return Ok(host),
                TokenKind::Word(word) => self.host_statement(lex, word, token.at, &mut host)?,
                TokenKind::Quoted(_) | TokenKind::Punct(_) | TokenKind::End => {
                    return Err(unexpected(&token, IN_HOST));
                }
            }
        }
    }

    /// Parses a statement in a host section.
    fn host_statement(
        &mut self,
        lex: &mut Lexer,
        word: &str,
        at: Loc,
        host: &mut Host,
    ) -> Outcome<()> {
        match word {
            "address" => {
                if let Some(first) = &host.address {
                    let problem = Problem::Conflict { what: "keyword", key: word.to_owned() };
                    return Err(Fault::new(at, problem).first(first.at));
                }
                host.address = Some(self.address(lex)?);
                self.punct(lex, ';')?;
            }
            "node-id" => {
                if let Some((_, first)) = host.node_id {
                    let problem = Problem::Conflict { what: "keyword", key: word.to_owned() };
                    return Err(Fault::new(at, problem).first(first));
                }
                host.node_id = Some(self.integer(lex, word, (0, NODE_ID_MAX))?);
                self.punct(lex, ';')?;
            }
            "options" => self.options_only(lex, Section::Options, &mut host.options)?,
            "proxy" => {
                self.warn(at, "section proxy is accepted but has no effect");
                host.proxy.extend(self.free(lex, word)?);
            }
            "skip" => lex.skip_statement(at)?,
            _ => {
                if !self.volume_part(lex, word, at, &mut host.volumes)? {
                    return Err(unknown(word, at, IN_HOST));
                }
            }
        }
        Ok(())
    }

    /// Takes `[FAMILY] IP:PORT`.
    pub(super) fn address(&mut self, lex: &mut Lexer) -> Outcome<Address> {
        let token = lex.next()?;
        let TokenKind::Word(first) = &token.kind else {
            let fault = unexpected(&token, &["ipv4", "ipv6", "IP address"]);
            return Err(match token.is_punct('[') {
                true => fault.help("before an IPv6 address stands the word ipv6"),
                false => fault,
            });
        };
        let (ip, scope, at) = match first.as_str() {
            "ipv6" => ipv6(lex)?,
            "ipv4" => {
                let word = self.value(lex, "IPv4 address")?;
                (ipv4(&word.text, word.at)?, None, word.at)
            }
            "ssocks" | "sdp" | "sci" => {
                let what = format!("address family {first}");
                return Err(Fault::new(token.at, Problem::NotAvailable { what })
                    .help("available: ipv4 ipv6"));
            }
            _ => (ipv4(first, token.at)?, None, token.at),
        };
        self.punct(lex, ':')?;
        let port = self.port(lex)?;
        Ok(Address { ip, scope, port, at })
    }

    /// Takes a port number.
    pub(super) fn port(&mut self, lex: &mut Lexer) -> Outcome<u16> {
        let (port, _) = self.integer(lex, "port", (1, 65_535))?;
        Ok(u16::try_from(port).expect("the range of ports ends below 2^16"))
    }
}

/// A host section without statements.
fn host(kind: HostKind, names: Vec<Name>, address: Option<Address>, at: Loc) -> Host {
    Host {
        kind,
        names,
        address,
        node_id: None,
        volumes: Vec::new(),
        options: Vec::new(),
        proxy: Vec::new(),
        at,
    }
}

/// Reads a dotted quad.
fn ipv4(text: &str, at: Loc) -> Outcome<IpAddr> {
    text.parse::<Ipv4Addr>().map(IpAddr::V4).map_err(|_| {
        let expected = "ipv4 | ipv6 | IP address".to_owned();
        Fault::new(at, Problem::Expected { expected, found: text.to_owned() })
            .help("host names are not looked up, write the address itself")
    })
}

/// Takes `[IPv6%SCOPE]`.
fn ipv6(lex: &mut Lexer) -> Outcome<(IpAddr, Option<String>, Loc)> {
    let (text, at) = lex.bracketed()?;
    let (ip, scope) = match text.split_once('%') {
        Some((ip, scope)) => (ip, Some(scope.to_owned())),
        None => (text.as_str(), None),
    };
    let is_scope = |scope: &String| !scope.is_empty() && !scope.contains(['%', ':', '/']);
    match ip.parse::<Ipv6Addr>() {
        Ok(ip) if scope.as_ref().is_none_or(is_scope) => Ok((IpAddr::V6(ip), scope, at)),
        Ok(_) | Err(_) => {
            let expected = "IPv6 address".to_owned();
            Err(Fault::new(at, Problem::Expected { expected, found: text }))
        }
    }
}
