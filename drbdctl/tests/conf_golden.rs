//! Configurations of several eras, their warnings, and their normal form.
//!
//! `data/conf/NAME.conf` is read with `NAME.dump` as the expected dump and `NAME.warn` as the
//! expected warnings. Setting `UPDATE_GOLDEN` writes the files anew; the difference is then for a
//! human to read.

use std::path::{Path, PathBuf};

use drbdctl::conf::{self, Config, Inputs, Main, MemoryFiles, RealFiles, Warning};

/// Reads text as if it came from standard input.
fn parse(text: &str) -> (Config, Vec<Warning>) {
    let name = PathBuf::from("STDIN");
    let main = Main::Text { name, bytes: text.into(), dir: PathBuf::from("/etc") };
    let inputs = Inputs { main, also: Vec::new(), exclude: Vec::new() };
    conf::load_inputs(inputs, &MemoryFiles::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Compares with a file, or writes it.
fn compare(path: &Path, found: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, found).expect("test data are writable");
    }
    let expected = std::fs::read_to_string(path).expect("golden file is there");
    assert_eq!(found, expected, "{}", path.display());
}

/// The dump of each sample is the one on file, is a fixed point, and reading it warns of nothing
/// that the sample was not warned of.
#[test]
fn samples() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/conf");
    for name in ["v83", "v84", "v9"] {
        let path = dir.join(name).with_extension("conf");
        let (config, warnings) =
            conf::load(&path, &RealFiles).unwrap_or_else(|error| panic!("{error}"));
        let dump = config.dump();
        compare(&path.with_extension("dump"), &dump);
        let warned: Vec<String> =
            warnings.iter().map(|w| format!("{}: {}\n", w.line, w.text)).collect();
        compare(&path.with_extension("warn"), &warned.concat());
        let (again, repeated) = parse(&dump);
        assert_eq!(again.dump(), dump, "{name}");
        for warning in repeated {
            assert!(warnings.iter().any(|w| w.text == warning.text), "new: {warning}");
        }
    }
}

/// The form for operators has comments with places, and is the same configuration.
#[test]
fn dump_for_operators() {
    let text = "resource r0 {\n on alice { device minor 0; disk /dev/a; address 10.0.0.1:7; }\n \
                on bob { device minor 0; disk /dev/a; address 10.0.0.2:7; }\n}\n\
                resource r1 { on a { device minor 0; disk /dev/a; address 10.0.0.3:7; }\n \
                on b { device minor 0; disk /dev/a; address 10.0.0.4:7; } }\n";
    let (config, _) = parse(text);
    let dump = config.dump_for("alice", &[]);
    let comments: Vec<&str> = dump.lines().filter(|line| line.starts_with('#')).collect();
    assert_eq!(
        comments,
        [
            "# STDIN",
            "# resource r0 on alice: not ignored, not stacked",
            "# defined at STDIN:1",
            "# resource r1 on alice: ignored, not stacked",
            "# defined at STDIN:5",
        ]
    );
    assert_eq!(parse(&dump).0.dump(), config.dump());
}
