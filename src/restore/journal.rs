//! Which files of an unfinished restore are on stable storage: one line of numbers for each sync.
//!
//! A line is appended after what it names has been synced, so it can be trusted after a power cut; a line that a
//! crash cut short does not count, and nothing behind it does.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::disk::state_file;
use crate::restore::Error;

/// A file is a number of at most eight digits and a space: as many files as no cluster has.
const JOURNAL_BYTES_MAX: u64 = 9 * 100_000_000;

/// The journal of one restore.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens it for appending.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        Ok(Self { path: path.to_owned(), file: file.map_err(Error::at("open", path))? })
    }

    /// Reads which files are complete.
    pub(super) fn read(path: &Path) -> Result<HashSet<u64>, Error> {
        match state_file::read(path, "the journal of a restore", JOURNAL_BYTES_MAX) {
            Ok(text) => Ok(parse(&text)),
            Err(error) if error.is_not_found() => Ok(HashSet::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes files that have been synced.
    pub(super) fn record(&mut self, numbers: &[u64]) -> Result<(), Error> {
        let mut line: Vec<u8> = Vec::new();
        for number in numbers {
            line.extend_from_slice(format!("{number} ").as_bytes());
        }
        line.extend_from_slice(b".\n");
        self.file.write_all(&line).map_err(Error::at("write", &self.path))?;
        self.file.sync_data().map_err(Error::at("fsync", &self.path))
    }
}

fn parse(text: &[u8]) -> HashSet<u64> {
    let mut numbers = HashSet::new();
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let words = line.strip_suffix(b".\n").and_then(|line| str::from_utf8(line).ok());
        let parsed =
            words.map(|words| words.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>());
        match parsed {
            Some(Ok(line)) => numbers.extend(line),
            _ => break,
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_whole_lines_count() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("journal");
        assert!(Journal::read(&path).unwrap().is_empty());
        Journal::open(&path).unwrap().record(&[1, 2]).unwrap();
        Journal::open(&path).unwrap().record(&[30]).unwrap();
        assert_eq!(Journal::read(&path).unwrap(), HashSet::from([1, 2, 30]));
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            let cut = parse(&whole[..cut]);
            assert!(cut.is_empty() || cut == HashSet::from([1, 2]), "{cut:?}");
        }
        assert_eq!(parse(&[&whole[..], b"4 5\n6 .\n"].concat()), HashSet::from([1, 2, 30]));
    }

    proptest! {
        #[test]
        fn what_follows_whole_lines_takes_none_of_their_numbers_away(
            lines in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..4), 0..5),
            damage: Vec<u8>,
        ) {
            let mut text = Vec::new();
            for line in &lines {
                line.iter().for_each(|number| text.extend_from_slice(format!("{number} ").as_bytes()));
                text.extend_from_slice(b".\n");
            }
            let whole: HashSet<u64> = lines.into_iter().flatten().collect();
            prop_assert_eq!(&parse(&text), &whole);
            text.extend_from_slice(&damage);
            prop_assert!(whole.is_subset(&parse(&text)));
        }
    }
}
