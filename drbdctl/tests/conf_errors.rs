//! What an operator sees when a configuration is wrong.
//!
//! `data/conf/errors.txt` holds cases of the form `==== title`, text, `----`, message. Setting
//! `UPDATE_GOLDEN` writes the messages anew; the difference is then for a human to read.

use std::path::{Path, PathBuf};

use drbdctl::conf::{self, Inputs, Main, MemoryFiles, Problem};

/// The message about a text, without a trailing line end.
fn message(text: &str) -> String {
    let name = PathBuf::from("/etc/drbd.conf");
    let main = Main::Text { name, bytes: text.into(), dir: PathBuf::from("/etc") };
    let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
    match conf::load_inputs(inputs, &MemoryFiles::default()) {
        Ok(_) => panic!("this was accepted:\n{text}"),
        Err(error) => {
            assert_eq!(error.exit_code(), conf::EXIT_CONFIG);
            error.to_string()
        }
    }
}

/// Every case gives its message to the letter, with exit code 10.
#[test]
fn messages() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/conf/errors.txt");
    let cases = std::fs::read_to_string(&path).expect("test data are there");
    let mut written = String::new();
    for case in cases.split("==== ").skip(1) {
        let (title, rest) = case.split_once('\n').expect("a title ends with its line");
        let (text, _) = rest.split_once("----\n").expect("a text ends with a line of dashes");
        let found = message(text);
        written.push_str(&format!("==== {title}\n{text}----\n{found}\n"));
    }
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &written).expect("test data are writable");
    }
    let cases = std::fs::read_to_string(&path).expect("test data are there");
    for (found, expected) in written.split("==== ").zip(cases.split("==== ")) {
        assert_eq!(found, expected);
    }
    assert!(cases.matches("==== ").count() >= 75, "no case got lost");
}

/// Bytes that are no text, in a string and elsewhere, and a text without end.
#[test]
fn bytes_that_are_no_text() {
    let load = |bytes: &[u8]| {
        let main = Main::Text { name: "f".into(), bytes: bytes.to_vec(), dir: ".".into() };
        let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
        conf::load_inputs(inputs, &MemoryFiles::default()).expect_err("wrong")
    };
    let error = load(b"resource \"\xff\" {}");
    assert_eq!(error.problem(), &Problem::StringNotText);
    assert_eq!(error.place().map(|place| place.column), Some(10));
    let error = load(b"\xe4");
    assert_eq!(error.problem(), &Problem::StrayByte { found: 0xe4 });
    let long = vec![b'#'; conf::MAX_FILE_BYTES + 1];
    assert!(matches!(load(&long).problem(), Problem::TooLarge { .. }));
}
