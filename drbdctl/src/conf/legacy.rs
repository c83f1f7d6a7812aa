//! Spellings of earlier versions and what they are called today.
//!
//! Tutorials and machines have configurations of every version since 0.7. What only changed its
//! name or its section is moved there; the dump then shows the form of today.

use super::table::Section;

/// What a name in a section stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Today {
    pub(crate) section: Section,
    pub(crate) name: &'static str,
    /// Whether the operator should hear of the new name.
    pub(crate) is_noted: bool,
    /// Suffix of a number that has none, where the unit changed.
    pub(crate) suffix: Option<&'static str>,
}

const fn moved(section: Section, name: &'static str) -> Today {
    Today { section, name, is_noted: false, suffix: None }
}

/// Members of the historic `syncer` section.
const SYNCER: &[(&str, Today)] = &[
    ("rate", moved(Section::Disk, "resync-rate")),
    ("after", moved(Section::Disk, "resync-after")),
    ("al-extents", moved(Section::Disk, "al-extents")),
    ("al-updates", moved(Section::Disk, "al-updates")),
    ("resync-rate", moved(Section::Disk, "resync-rate")),
    ("resync-after", moved(Section::Disk, "resync-after")),
    ("c-plan-ahead", moved(Section::Disk, "c-plan-ahead")),
    ("c-delay-target", moved(Section::Disk, "c-delay-target")),
    ("c-fill-target", moved(Section::Disk, "c-fill-target")),
    ("c-max-rate", moved(Section::Disk, "c-max-rate")),
    ("c-min-rate", moved(Section::Disk, "c-min-rate")),
    ("verify-alg", moved(Section::Net, "verify-alg")),
    ("csums-alg", moved(Section::Net, "csums-alg")),
    ("csums-after-crash-only", moved(Section::Net, "csums-after-crash-only")),
    ("use-rle", moved(Section::Net, "use-rle")),
    ("cpu-mask", moved(Section::Options, "cpu-mask")),
    ("on-no-data-accessible", moved(Section::Options, "on-no-data-accessible")),
];

/// What `name` in `section` is called today, if that differs.
pub(crate) fn today(section: Section, name: &str) -> Option<Today> {
    match (section, name) {
        (Section::Syncer, _) => {
            SYNCER.iter().find(|(old, _)| *old == name).map(|(_, today)| *today)
        }
        (Section::Disk, "fencing") => Some(moved(Section::Net, "fencing")),
        (Section::Disk, "disk-size") => {
            Some(Today { section: Section::Disk, name: "size", is_noted: false, suffix: Some("K") })
        }
        (Section::Handlers, "outdate-peer") => Some(Today {
            section: Section::Handlers,
            name: "fence-peer",
            is_noted: true,
            suffix: None,
        }),
        (Section::Startup, "incon-degr-cmd") => Some(Today {
            section: Section::Handlers,
            name: "pri-on-incon-degr",
            is_noted: true,
            suffix: None,
        }),
        (
            Section::Global
            | Section::Startup
            | Section::Options
            | Section::Disk
            | Section::Net
            | Section::Handlers,
            _,
        ) => None,
    }
}

/// Names that are understood in `section`, for the help of error messages.
pub(crate) fn known_names(section: Section) -> impl Iterator<Item = &'static str> {
    let moved: &'static [(&str, Today)] = match section {
        Section::Syncer => SYNCER,
        Section::Global
        | Section::Startup
        | Section::Options
        | Section::Disk
        | Section::Net
        | Section::Handlers => &[],
    };
    let own = section.specs().iter().map(|spec| spec.name);
    own.chain(moved.iter().map(|(name, _)| *name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::table;

    /// Everything that is moved arrives at an option that exists.
    #[test]
    fn every_move_has_a_destination() {
        for (old, today) in SYNCER {
            assert!(table::find(today.section, today.name).is_some(), "{old}");
        }
        for (section, old) in [
            (Section::Disk, "fencing"),
            (Section::Disk, "disk-size"),
            (Section::Handlers, "outdate-peer"),
            (Section::Startup, "incon-degr-cmd"),
        ] {
            let today = today(section, old).expect("moved");
            assert!(table::find(today.section, today.name).is_some(), "{old}");
        }
    }
}
