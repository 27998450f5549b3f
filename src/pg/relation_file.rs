//! Which relation a file belongs to, by its path alone.
//!
//! `global/<n>`, `base/<database>/<n>` and `pg_tblspc/<tablespace>/PG_<version>_<catalog>/<database>/<n>`, where
//! `<n>` is the relation's file number, then its fork, then its segment: `16384`, `16384_fsm`, `16384.1`,
//! `16384_vm.2`. A temporary relation carries its session in front, `t3_16384`. The rules are those of the server's
//! `relpath.c` and `reinit.c`; a leading zero makes another file, not another spelling.
//!
//! Deliberately absent: what the file holds, and files that are no relation (`PG_VERSION`, `pg_filenode.map`).

use super::data_path::DataPath;
use super::oid::Oid;

/// One file of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    pub tablespace: Oid,
    /// `Oid::INVALID` for the shared relations in `global`.
    pub database: Oid,
    /// The relation's file number, which is not always its OID.
    pub relfilenode: Oid,
    pub fork: Fork,
    /// Which piece of the fork, from 0.
    pub segment: u32,
    /// Only one session's, and gone with it.
    pub temporary: bool,
}

/// A fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    Main,
    FreeSpaceMap,
    VisibilityMap,
    /// What an unlogged relation is reset to after a crash.
    Init,
}

impl Fork {
    /// Returns the fork of that number in WAL (`ForkNumber`).
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Main,
            1 => Self::FreeSpaceMap,
            2 => Self::VisibilityMap,
            3 => Self::Init,
            _ => return None,
        })
    }

    /// Tells whether WAL names each page of it that changes. It does not name those of a free space map, and a
    /// visibility map's bits are cleared by records that name the page of the heap alone.
    pub fn is_logged(self) -> bool {
        matches!(self, Self::Main | Self::Init)
    }

    /// Returns what the server calls it: `main`, `fsm`, `vm` or `init`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::FreeSpaceMap => "fsm",
            Self::VisibilityMap => "vm",
            Self::Init => "init",
        }
    }

    /// Reads the part of a file name after `_`; the main fork has none.
    fn from_suffix(suffix: &[u8]) -> Option<Self> {
        let named = [Self::FreeSpaceMap, Self::VisibilityMap, Self::Init];
        named.into_iter().find(|fork| fork.name().as_bytes() == suffix)
    }
}

impl RelationFile {
    /// Tells which relation the file belongs to, none for every other file.
    pub fn classify(path: &DataPath) -> Option<Self> {
        let folder = DatabaseFolder::of(path)?;
        let name = FileName::parse(path.file_name())?;
        // A shared relation is never temporary.
        if name.temporary && folder.database == Oid::INVALID {
            return None;
        }
        Some(Self {
            tablespace: folder.tablespace,
            database: folder.database,
            relfilenode: name.relfilenode,
            fork: name.fork,
            segment: name.segment,
            temporary: name.temporary,
        })
    }

    /// Returns the number within the fork of the file's first page, as its checksums count.
    ///
    /// `segment_pages` is what `pg_control` has as `relseg_size`. None if the product exceeds PostgreSQL's 32 bits,
    /// as for a file whose name only looks like a segment.
    pub fn first_page(&self, segment_pages: u32) -> Option<u32> {
        self.segment.checked_mul(segment_pages)
    }
}

/// The folder that holds a database's files in one tablespace, or `global`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DatabaseFolder {
    pub(super) tablespace: Oid,
    pub(super) database: Oid,
}

impl DatabaseFolder {
    /// Returns the folder that `path` lies directly in, none if it is another kind of folder.
    pub(super) fn of(path: &DataPath) -> Option<Self> {
        let mut components = path.components();
        let (first, second) = (components.next()?, components.next()?);
        let rest: [Option<&[u8]>; 4] = std::array::from_fn(|_| components.next());
        let (tablespace, database) = match (first, rest) {
            (b"global", [None, ..]) => (Oid::GLOBAL_TABLESPACE, Oid::INVALID),
            (b"base", [Some(_), None, ..]) => (Oid::DEFAULT_TABLESPACE, Oid::from_name(second)?),
            (b"pg_tblspc", [Some(version), Some(database), Some(_), None]) if version.starts_with(b"PG_") => {
                (Oid::from_name(second)?, Oid::from_name(database)?)
            }
            _ => return None,
        };
        Some(Self { tablespace, database })
    }
}

/// The parts of a relation's file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileName {
    pub(super) relfilenode: Oid,
    pub(super) fork: Fork,
    pub(super) segment: u32,
    pub(super) temporary: bool,
}

impl FileName {
    /// Reads a name such as `16384`, `16384_vm.1` or `t3_16384`.
    pub(super) fn parse(name: &[u8]) -> Option<Self> {
        let (temporary, rest) = match name.strip_prefix(b"t") {
            Some(after) => {
                let session = digits(after);
                let rest = after[session..].strip_prefix(b"_").filter(|_| session > 0)?;
                (true, rest)
            }
            None => (false, name),
        };
        let (number, rest) = rest.split_at(digits(rest));
        let relfilenode = Oid::from_name(number)?;
        let (fork, rest) = match rest.strip_prefix(b"_") {
            Some(suffix) => {
                let end = suffix.iter().position(|b| *b == b'.').unwrap_or(suffix.len());
                (Fork::from_suffix(&suffix[..end])?, &suffix[end..])
            }
            None => (Fork::Main, rest),
        };
        let segment = match rest {
            [] => 0,
            [b'.', number @ ..] => Oid::from_name(number)?.0,
            _ => return None,
        };
        Some(Self { relfilenode, fork, segment, temporary })
    }
}

fn digits(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| b.is_ascii_digit()).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn classify(path: &str) -> Option<(u32, u32, u32, Fork, u32, bool)> {
        let file = RelationFile::classify(&DataPath::new(path).unwrap())?;
        let RelationFile { tablespace, database, relfilenode, fork, segment, temporary } = file;
        Some((tablespace.0, database.0, relfilenode.0, fork, segment, temporary))
    }

    #[test]
    fn every_place_of_a_relation_is_known() {
        let cases = [
            ("global/1262", (1664, 0, 1262, Fork::Main, 0, false)),
            ("base/5/16384", (1663, 5, 16384, Fork::Main, 0, false)),
            ("base/5/16384.7", (1663, 5, 16384, Fork::Main, 7, false)),
            ("base/5/16384_fsm", (1663, 5, 16384, Fork::FreeSpaceMap, 0, false)),
            ("base/5/16384_vm.1", (1663, 5, 16384, Fork::VisibilityMap, 1, false)),
            ("base/5/16384_init", (1663, 5, 16384, Fork::Init, 0, false)),
            ("base/5/t3_16384", (1663, 5, 16384, Fork::Main, 0, true)),
            ("base/5/t3_16384_fsm.1", (1663, 5, 16384, Fork::FreeSpaceMap, 1, true)),
            ("pg_tblspc/16390/PG_15_202209061/5/16391", (16390, 5, 16391, Fork::Main, 0, false)),
        ];
        for (path, expected) in cases {
            assert_eq!(classify(path), Some(expected), "{path}");
        }
    }

    #[test]
    fn every_other_file_is_none() {
        let others = [
            "PG_VERSION",
            "16384",
            "base/16384",
            "base/5",
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "base/5/x/16384",
            "base/five/16384",
            "base/5/016384",
            "base/5/16384.",
            "base/5/16384.0",
            "base/5/16384.01",
            "base/5/16384_",
            "base/5/16384_main",
            "base/5/16384_fsm_vm",
            "base/5/16384.1.1",
            "base/5/16384.gz",
            "base/5/16384_fsm ",
            "base/5/4294967296",
            "base/5/t_16384",
            "base/5/t3_",
            "base/5/t3",
            "global/pg_control",
            "global/t3_16384",
            "global/1/1262",
            "pg_tblspc/16390",
            "pg_tblspc/16390/PG_15_202209061/5",
            "pg_tblspc/16390/PG_15_202209061/5/16391/1",
            "pg_tblspc/16390/other/5/16391",
            "pg_tblspc/x/PG_15_202209061/5/16391",
        ];
        for path in others {
            assert_eq!(classify(path), None, "{path}");
        }
    }

    #[test]
    fn pages_are_counted_through_the_segments() {
        let file = RelationFile::classify(&DataPath::new("base/5/16384.2").unwrap()).unwrap();
        assert_eq!(file.first_page(131_072), Some(262_144));
        let file = RelationFile::classify(&DataPath::new("base/5/16384.4294967295").unwrap()).unwrap();
        assert_eq!(file.first_page(131_072), None);
    }

    proptest! {
        #[test]
        fn any_path_is_classified_or_not(
            bytes in prop::collection::vec(any::<u8>(), 0..30),
            name in r"(base|global|pg_tblspc|t)?/?[0-9._tfsmvinPG/]{0,20}",
        ) {
            for path in [bytes, name.into_bytes()] {
                if let Ok(path) = DataPath::new(path) {
                    let _ = RelationFile::classify(&path);
                }
            }
        }
    }
}
