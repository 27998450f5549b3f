//! What PostgreSQL will ask for next: the files of `pg_wal` that are marked ready, in the order it takes them.
//!
//! Read again only when what was found has been used up and somebody has asked since: a server that is long behind has
//! tens of thousands of files there. Only the first [`FOUND_MAX`] are kept, whatever there is; where there were as many,
//! most of what a look would find is the same until half of them were asked for.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use crate::pg::ArchiveFileName;

/// Files that one look finds.
const FOUND_MAX: usize = 256;
const READY: &str = ".ready";

/// What comes next in one data directory.
#[derive(Debug, Default)]
pub(super) struct Upcoming {
    /// Found and not begun, the next one last.
    found: Vec<ArchiveFileName>,
    /// Requests since the last look.
    asked: usize,
    /// Whether that found as many files as it keeps.
    was_full: bool,
    /// How many files may still be begun before somebody asks again.
    allowance: usize,
}

/// Files that are begun for one request at most: a server that no longer asks is not worked for.
const AHEAD_MAX: usize = 64;

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Begin with this file, if it is still to be done.
    Begin(ArchiveFileName),
    /// Look what there is.
    Look,
    /// Nothing, until somebody asks.
    Rest,
}

impl Upcoming {
    /// Takes note of a request.
    pub(super) fn asked(&mut self) {
        self.asked += 1;
        self.allowance = AHEAD_MAX;
    }

    /// Takes note of what a look has found, in the order of PostgreSQL.
    pub(super) fn found(&mut self, found: Vec<ArchiveFileName>) {
        self.was_full = found.len() >= FOUND_MAX;
        self.found = found;
        self.found.reverse();
    }

    /// Takes a file back that `next` named too early.
    pub(super) fn put_back(&mut self, name: ArchiveFileName) {
        self.found.push(name);
    }

    /// Decides what to do next.
    pub(super) fn next(&mut self) -> Next {
        if self.allowance == 0 {
            return Next::Rest;
        }
        match self.found.pop() {
            Some(name) => Next::Begin(name),
            None if self.asked >= if self.was_full { FOUND_MAX / 2 } else { 1 } => {
                self.asked = 0;
                Next::Look
            }
            None => Next::Rest,
        }
    }

    /// Takes note that a file was begun, which `next` named.
    pub(super) fn begun(&mut self) {
        self.allowance = self.allowance.saturating_sub(1);
    }
}

/// Lists the first files that are marked ready: histories, then the others by name, as PostgreSQL takes them.
pub(super) fn look(data_directory: &Path) -> io::Result<Vec<ArchiveFileName>> {
    let mut first = BTreeSet::new();
    for entry in fs::read_dir(data_directory.join("pg_wal/archive_status"))? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().and_then(|name| name.strip_suffix(READY)) else { continue };
        let Ok(parsed) = name.parse::<ArchiveFileName>() else { continue };
        first.insert((!matches!(parsed, ArchiveFileName::History(_)), name.to_owned(), parsed));
        if first.len() > FOUND_MAX {
            first.pop_last();
        }
    }
    Ok(first.into_iter().map(|(.., name)| name).collect())
}

/// Returns whether a file is still marked ready.
pub(super) fn is_ready(data_directory: &Path, name: ArchiveFileName) -> bool {
    data_directory.join(format!("pg_wal/archive_status/{name}{READY}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ArchiveFileName {
        text.parse().unwrap()
    }

    #[test]
    fn histories_come_first_and_then_what_is_older() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("pg_wal/archive_status");
        fs::create_dir_all(&status).unwrap();
        let write = |name: &str| fs::write(status.join(name), "").unwrap();
        for file in [
            "000000020000000000000001.ready",
            "000000010000000000000005.ready",
            "000000010000000000000004.partial.ready",
            "000000010000000000000002.done",
            "00000003.history.ready",
            "RECOVERYXLOG.ready",
            "000000010000000000000004.ready.tmp",
        ] {
            write(file);
        }
        let found = look(folder.path()).unwrap();
        let expected = [
            "00000003.history",
            "000000010000000000000004.partial",
            "000000010000000000000005",
            "000000020000000000000001",
        ];
        assert_eq!(found, expected.map(name));
        assert!(is_ready(folder.path(), expected[1].parse().unwrap()));
        assert!(!is_ready(folder.path(), name("000000010000000000000002")));
        for n in 0..2 * FOUND_MAX {
            write(&format!("0000000100000001{n:08X}.ready"));
        }
        let found = look(folder.path()).unwrap();
        assert_eq!(found.len(), FOUND_MAX);
        assert_eq!(found[..3], expected[..3].iter().map(|text| name(text)).collect::<Vec<_>>());
        assert_eq!(found[3], name("000000010000000100000000"));
    }

    #[test]
    fn one_request_is_a_reason_for_one_look_and_for_so_many_files() {
        let files: Vec<ArchiveFileName> =
            (0..2 * AHEAD_MAX).map(|n| name(&format!("0000000100000000{n:08X}"))).collect();
        let mut upcoming = Upcoming::default();
        assert_eq!(upcoming.next(), Next::Rest);
        upcoming.asked();
        assert_eq!(upcoming.next(), Next::Look);
        upcoming.found(files.clone());
        for file in &files[..AHEAD_MAX] {
            assert_eq!(upcoming.next(), Next::Begin(*file));
            upcoming.begun();
        }
        assert_eq!(upcoming.next(), Next::Rest);
        upcoming.asked();
        assert_eq!(upcoming.next(), Next::Begin(files[AHEAD_MAX]));
        upcoming.put_back(files[AHEAD_MAX]);
        // What was found and needed nothing does not count.
        for file in &files[AHEAD_MAX..] {
            assert_eq!(upcoming.next(), Next::Begin(*file));
        }
        assert_eq!(upcoming.next(), Next::Look);
        upcoming.found(Vec::new());
        assert_eq!(upcoming.next(), Next::Rest);
    }

    #[test]
    fn where_there_are_more_files_than_a_look_keeps_not_each_request_is_a_reason_for_one() {
        let files: Vec<ArchiveFileName> =
            (0..FOUND_MAX).map(|n| name(&format!("0000000100000001{n:08X}"))).collect();
        let mut upcoming = Upcoming::default();
        upcoming.asked();
        for requests in [1, FOUND_MAX / 2, FOUND_MAX / 2] {
            for _ in 1..requests {
                assert_eq!(upcoming.next(), Next::Rest);
                upcoming.asked();
            }
            assert_eq!(upcoming.next(), Next::Look);
            upcoming.found(files.clone());
            // All of them are known.
            for file in &files {
                assert_eq!(upcoming.next(), Next::Begin(*file));
            }
            assert_eq!(upcoming.next(), Next::Rest);
            upcoming.asked();
        }
    }
}
