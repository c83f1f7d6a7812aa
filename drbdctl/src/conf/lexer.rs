//! Cuts configuration text into words, quoted strings and punctuation.
//!
//! The lexer knows no keywords: an option value may be any word, so whether a word is reserved is
//! for the parser to say. Comments may hold any bytes, because files of earlier decades have
//! comments in earlier encodings; words are ASCII and quoted strings are UTF-8.
//! Rules: the lexer section of the notes on the user's surface.

use std::fmt;
use std::sync::Arc;

use super::error::{Fault, Outcome, Problem};
use super::source::Loc;

/// Longest word, in characters.
pub(crate) const MAX_WORD: usize = 128;
/// Longest quoted string, in characters after the removal of backslashes.
pub(crate) const MAX_QUOTED: usize = 255;

/// One piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Letters, digits, `/`, `.`, `_`, `-`.
    Word(String),
    /// Anything between double quotes.
    Quoted(String),
    /// One of `{ } [ ] ; :`.
    Punct(char),
    /// The end of the file.
    End,
}

/// A piece of text and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) at: Loc,
}

impl Token {
    /// Whether this is the unquoted word `word`.
    pub(crate) fn is_word(&self, word: &str) -> bool {
        matches!(&self.kind, TokenKind::Word(text) if text == word)
    }

    /// Whether this is the punctuation mark `mark`.
    pub(crate) fn is_punct(&self, mark: char) -> bool {
        self.kind == TokenKind::Punct(mark)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            TokenKind::Word(text) | TokenKind::Quoted(text) => f.write_str(text),
            TokenKind::Punct(mark) => write!(f, "{mark}"),
            TokenKind::End => f.write_str("end of file"),
        }
    }
}

/// Whether `byte` may be part of an unquoted word.
pub(crate) fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/._-".contains(&byte)
}

/// A file being read.
#[derive(Debug)]
pub(crate) struct Lexer {
    file: usize,
    bytes: Arc<[u8]>,
    pos: usize,
    /// A token that was looked at and not taken.
    ahead: Option<Token>,
}

impl Lexer {
    /// Starts at the beginning of a file of the sources.
    pub(crate) fn new(file: usize, bytes: Arc<[u8]>) -> Self {
        Self { file, bytes, pos: 0, ahead: None }
    }

    /// Looks at the next token without taking it.
    pub(crate) fn peek(&mut self) -> Outcome<&Token> {
        let token = match self.ahead.take() {
            Some(token) => token,
            None => self.scan()?,
        };
        Ok(self.ahead.insert(token))
    }

    /// Takes the next token.
    pub(crate) fn next(&mut self) -> Outcome<Token> {
        match self.ahead.take() {
            Some(token) => Ok(token),
            None => self.scan(),
        }
    }

    /// Takes the text between brackets, which holds colons: an IPv6 address.
    pub(crate) fn bracketed(&mut self) -> Outcome<(String, Loc)> {
        assert!(self.ahead.is_none(), "text is read before it is cut into tokens");
        self.skip_blank();
        let start = self.pos;
        if self.bytes.get(start) != Some(&b'[') {
            let token = self.scan()?;
            let found = token.to_string();
            let problem = Problem::Expected { expected: "[".to_owned(), found };
            return Err(Fault::new(token.at, problem)
                .help("an IPv6 address is written in brackets: ipv6 [fd00::1]:7789"));
        }
        let rest = &self.bytes[start + 1..];
        let is_part = |&b: &u8| is_word_byte(b) || b == b':' || b == b'%';
        let len = rest.iter().take_while(|b| is_part(b)).count();
        let text: String = rest[..len].iter().map(|&b| char::from(b)).collect();
        self.pos = start + 1 + len;
        if rest.get(len) != Some(&b']') {
            let token = self.scan()?;
            let found = token.to_string();
            let problem = Problem::Expected { expected: "]".to_owned(), found };
            return Err(Fault::new(token.at, problem));
        }
        self.pos += 1;
        Ok((text, self.loc(start, len + 2)))
    }

    /// Passes over one statement of any content: up to `;`, or a block with balanced braces.
    /// Comments and quoted strings may contain unbalanced ones.
    pub(crate) fn skip_statement(&mut self, from: Loc) -> Outcome<()> {
        assert!(self.ahead.is_none(), "text is skipped before it is cut into tokens");
        let mut depth = 0_usize;
        loop {
            self.skip_blank();
            let Some(&byte) = self.bytes.get(self.pos) else {
                let problem = Problem::Expected {
                    expected: if depth == 0 { "; | {" } else { "}" }.to_owned(),
                    found: "end of file".to_owned(),
                };
                return Err(Fault::new(from, problem).help("the skipped section has no end"));
            };
            self.pos += 1;
            match byte {
                b';' if depth == 0 => return Ok(()),
                b'{' => depth += 1,
                b'}' if depth == 0 => {
                    let problem =
                        Problem::Expected { expected: "; | {".to_owned(), found: "}".to_owned() };
                    return Err(Fault::new(self.loc(self.pos - 1, 1), problem));
                }
                b'}' if depth == 1 => return Ok(()),
                b'}' => depth -= 1,
                b'"' => self.skip_quoted(),
                _ => {}
            }
        }
    }

    /// Passes over the rest of a quoted string, which ends at the latest with its line.
    fn skip_quoted(&mut self) {
        while let Some(&byte) = self.bytes.get(self.pos) {
            match byte {
                b'\n' => return,
                b'\\' if self.bytes.get(self.pos + 1) != Some(&b'\n') => self.pos += 2,
                b'"' => {
                    self.pos += 1;
                    return;
                }
                _ => self.pos += 1,
            }
        }
        self.pos = self.pos.min(self.bytes.len());
    }

    /// Passes over white space and comments.
    fn skip_blank(&mut self) {
        while let Some(&byte) = self.bytes.get(self.pos) {
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' => self.pos += 1,
                b'#' => {
                    let rest = &self.bytes[self.pos..];
                    self.pos += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    /// A place in this file.
    fn loc(&self, start: usize, len: usize) -> Loc {
        Loc { file: self.file, start, len }
    }

    /// Cuts the next token.
    fn scan(&mut self) -> Outcome<Token> {
        self.skip_blank();
        let start = self.pos;
        let Some(&byte) = self.bytes.get(start) else {
            return Ok(Token { kind: TokenKind::End, at: self.loc(start, 0) });
        };
        if b"{}[];:".contains(&byte) {
            self.pos += 1;
            let kind = TokenKind::Punct(char::from(byte));
            return Ok(Token { kind, at: self.loc(start, 1) });
        }
        if byte == b'"' {
            return self.scan_quoted();
        }
        let len = self.bytes[start..].iter().take_while(|&&b| is_word_byte(b)).count();
        if len == 0 {
            return Err(self.stray(byte));
        }
        self.pos += len;
        let at = self.loc(start, len);
        if len > MAX_WORD {
            return Err(Fault::new(at, Problem::TokenTooLong { len, max: MAX_WORD }));
        }
        let text = self.bytes[start..self.pos].iter().map(|&b| char::from(b)).collect();
        Ok(Token { kind: TokenKind::Word(text), at })
    }

    /// The error about a character that starts no token.
    fn stray(&self, found: u8) -> Box<Fault> {
        let fault = Fault::new(self.loc(self.pos, 1), Problem::StrayByte { found });
        match found {
            b'=' => fault.help(
                "statements have the form 'name value;', \
                 the 'name=value' form of version 0.6 is not read",
            ),
            b'\'' => fault.help("strings are put into double quotes"),
            _ => fault.help("a word with other characters than a-z A-Z 0-9 / . _ - is quoted"),
        }
    }

    /// Cuts a quoted string. A backslash stands for the character after it.
    fn scan_quoted(&mut self) -> Outcome<Token> {
        let start = self.pos;
        let mut content = Vec::new();
        let mut pos = start + 1;
        loop {
            match self.bytes.get(pos) {
                None | Some(b'\n') => {
                    let at = self.loc(start, pos - start);
                    return Err(Fault::new(at, Problem::StringUnterminated)
                        .help("the closing '\"' has to be on the same line"));
                }
                Some(b'"') => break,
                Some(b'\\') if !matches!(self.bytes.get(pos + 1), None | Some(b'\n')) => {
                    content.push(self.bytes[pos + 1]);
                    pos += 2;
                }
                Some(&byte) => {
                    content.push(byte);
                    pos += 1;
                }
            }
        }
        self.pos = pos + 1;
        let at = self.loc(start, self.pos - start);
        let Ok(text) = String::from_utf8(content) else {
            return Err(Fault::new(at, Problem::StringNotText));
        };
        let len = text.chars().count();
        if len > MAX_QUOTED {
            return Err(Fault::new(at, Problem::StringTooLong { len, max: MAX_QUOTED }));
        }
        Ok(Token { kind: TokenKind::Quoted(text), at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lexer(text: &[u8]) -> Lexer {
        Lexer::new(0, text.into())
    }

    /// Every kind of token, with comments in an old encoding between them.
    #[test]
    fn tokens_of_a_statement() {
        let mut lex = lexer(b"#\xe4\nnet{ x-1 \"a \\\"b\\\\\" ; } [0]:");
        let mut seen = Vec::new();
        loop {
            let token = lex.next().expect("text is correct");
            if token.kind == TokenKind::End {
                break;
            }
            seen.push(token.to_string());
        }
        assert_eq!(seen, ["net", "{", "x-1", "a \"b\\", ";", "}", "[", "0", "]", ":"]);
    }

    /// Limits of words and strings: the longest passes, one more does not.
    #[test]
    fn lengths_are_limited() {
        let token = lexer("a".repeat(128).as_bytes()).next().expect("fits");
        assert_eq!(token.to_string().len(), 128);
        let fault = lexer("a".repeat(129).as_bytes()).next().expect_err("too long");
        assert_eq!(fault.problem, Problem::TokenTooLong { len: 129, max: 128 });
        let quoted = |n: usize| format!("\"{}\"", "\u{e4}".repeat(n));
        let token = lexer(quoted(255).as_bytes()).next().expect("fits");
        assert_eq!(token.to_string().chars().count(), 255);
        let fault = lexer(quoted(256).as_bytes()).next().expect_err("too long");
        assert_eq!(fault.problem, Problem::StringTooLong { len: 256, max: 255 });
    }

    /// Text that is no token.
    #[test]
    fn faults() {
        let table: [(&[u8], Problem); 6] = [
            (b"\"abc", Problem::StringUnterminated),
            (b"\"abc\n\"", Problem::StringUnterminated),
            (b"\"abc\\\n\"", Problem::StringUnterminated),
            (b"\"abc\\", Problem::StringUnterminated),
            (b"\"\xff\"", Problem::StringNotText),
            (b"=", Problem::StrayByte { found: b'=' }),
        ];
        for (text, problem) in table {
            assert_eq!(lexer(text).next().expect_err("wrong").problem, problem);
        }
    }

    /// A skipped block may hold anything; what follows it is read again.
    #[test]
    fn skipping() {
        let at = Loc { file: 0, start: 0, len: 0 };
        let table: [(&[u8], Option<&str>); 7] = [
            (b"a { b=\xff { } # }\n \"}\" } next", Some("next")),
            (b"x y; next", Some("next")),
            (b"{ \" } next", None),
            (b"{ \"\n } next", Some("next")),
            (b"{ \"\\", None),
            (b"}", None),
            (b"{ { }", None),
        ];
        for (text, expected) in table {
            let mut lex = lexer(text);
            let next = lex.skip_statement(at).and_then(|()| lex.next());
            assert_eq!(next.ok().map(|token| token.to_string()).as_deref(), expected);
        }
    }

    /// An IPv6 address with a scope; brackets that do not close.
    #[test]
    fn brackets() {
        assert_eq!(lexer(b" [fe80::1%eth0]").bracketed().expect("address").0, "fe80::1%eth0");
        for text in [&b"[fe80"[..], b"fe80]", b"[fe 80]", b""] {
            assert!(matches!(
                lexer(text).bracketed().expect_err("wrong").problem,
                Problem::Expected { .. }
            ));
        }
    }
}
