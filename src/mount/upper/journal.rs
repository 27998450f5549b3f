//! The names of the lower that are gone: removed, or moved elsewhere.
//!
//! An append-only text file of lines `hide <path in the lower>`, percent-escaped. A name once hidden never comes
//! back: what is created in its place lies in the upper and has no need of the lower's. So the set only grows, is
//! bounded by the lower's names, and replaying it needs no order. A line counts once it ends. A power cut can take lines
//! that were not synced, cut one short, or leave zeros in their place with later ones behind: from the first zero on
//! nothing was synced, so nothing is believed. Anything else that is not a line is damage.
//!
//! After a failed sync the journal takes no more: what it held may be on disk or not, and only a fresh start can
//! tell.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::mount::upper::local_disk::{LocalDisk, LocalFile};

/// No journal is read beyond this: 256 MiB hold three million names.
const LENGTH_MAX: u64 = 256 * 1024 * 1024;

/// The names of the lower that are gone.
#[derive(Debug)]
pub(crate) struct NamesJournal {
    file: Arc<dyn LocalFile>,
    length: u64,
    hidden: HashSet<Vec<u8>>,
    /// Something was appended since the last sync.
    unsynced: bool,
    failed: bool,
}

/// A journal that was not synced since it had a length.
#[derive(Debug)]
pub(crate) struct Unsynced {
    pub(crate) file: Arc<dyn LocalFile>,
    length: u64,
}

impl NamesJournal {
    /// Opens the journal at a path, creating an empty one, and cuts off what a crash left of its last lines.
    pub(crate) fn open(disk: &dyn LocalDisk, path: &Path) -> io::Result<Self> {
        let file = match disk.stat(path)? {
            Some(_) => disk.open(path)?,
            None => disk.create(path, 0o600)?,
        };
        let size = file.stat()?.attributes.size;
        if size > LENGTH_MAX {
            return Err(io::Error::other(format!("the names journal is {size} bytes long")));
        }
        let mut text = vec![0; size as usize];
        let read = file.read_at(&mut text, 0)?;
        text.truncate(read);
        let (hidden, length) = parse(&text)?;
        if length < size {
            tracing::warn!(
                bytes = size - length,
                "dropping the end of the names journal, which was never synced"
            );
            file.set_length(length)?;
        }
        file.sync(false)?;
        Ok(Self { file, length, hidden, unsynced: false, failed: false })
    }

    /// Tells whether a name of the lower is gone.
    pub(crate) fn is_hidden(&self, path: &[u8]) -> bool {
        self.hidden.contains(path)
    }

    /// Hides a name of the lower; on stable storage only after [`Self::sync`].
    pub(crate) fn hide(&mut self, path: &[u8]) -> io::Result<()> {
        self.check()?;
        if self.hidden.contains(path) {
            return Ok(());
        }
        let line = format!("hide {}\n", escape(path));
        if let Err(error) = self.file.write_at(line.as_bytes(), self.length) {
            // A full disk may have taken a part; the next line begins where this one did.
            self.file.set_length(self.length).inspect_err(|_| self.failed = true)?;
            return Err(error);
        }
        self.length += line.len() as u64;
        self.unsynced = true;
        self.hidden.insert(path.to_vec());
        Ok(())
    }

    /// Puts what was hidden so far on stable storage.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.check()?;
        if self.unsynced {
            self.file.sync(true).inspect_err(|_| self.failed = true)?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Returns what has to be synced for all that was hidden so far; nothing where it was.
    pub(crate) fn unsynced(&self) -> io::Result<Option<Unsynced>> {
        self.check()?;
        Ok(self.unsynced.then(|| Unsynced { file: self.file.clone(), length: self.length }))
    }

    /// Takes note of how a sync ended.
    pub(crate) fn note_sync(&mut self, of: &Unsynced, outcome: &io::Result<()>) {
        match outcome {
            Ok(()) if of.length == self.length => self.unsynced = false,
            Ok(()) => {}
            Err(_) => self.failed = true,
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.failed { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

/// Returns the hidden paths and the length of the part that can be trusted.
fn parse(text: &[u8]) -> io::Result<(HashSet<Vec<u8>>, u64)> {
    let mut hidden = HashSet::new();
    let mut at = 0;
    while let Some(end) = text[at..].iter().position(|byte| *byte == b'\n') {
        match parse_line(&text[at..at + end]) {
            Some(path) => hidden.insert(path),
            None if text[at..at + end].contains(&0) => break,
            None => return Err(io::Error::other(format!("the names journal is malformed at byte {at}"))),
        };
        at += end + 1;
    }
    Ok((hidden, at as u64))
}

fn parse_line(line: &[u8]) -> Option<Vec<u8>> {
    let mut rest = line.strip_prefix(b"hide ")?;
    let mut path = Vec::with_capacity(rest.len());
    while let [first, tail @ ..] = rest {
        rest = tail;
        match first {
            b'%' => {
                let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
                path.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &rest[2..];
            }
            0x21..=0x7e => path.push(*first),
            _ => return None,
        }
    }
    Some(path)
}

fn escape(path: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(path.len());
    for byte in path {
        match byte {
            b'%' | 0..=0x20 | 0x7f.. => write!(text, "%{byte:02x}").expect("a string takes everything"),
            plain => text.push(char::from(*plain)),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mount::upper::real_disk::RealDisk;

    const PATH: &str = "names.journal";

    fn reopen(place: &Path) -> NamesJournal {
        NamesJournal::open(&RealDisk::open(place).unwrap(), Path::new(PATH)).unwrap()
    }

    #[test]
    fn hidden_names_are_hidden_after_reopening_odd_ones_too() {
        let scratch = tempfile::tempdir().unwrap();
        let odd: [&[u8]; 4] = [b"base/1/16384", b"a b%c\nd", b"\xff\x00", b""];
        let mut journal = reopen(scratch.path());
        for path in odd {
            journal.hide(path).unwrap();
            journal.hide(path).unwrap();
        }
        journal.sync().unwrap();
        let length = journal.length;
        let journal = reopen(scratch.path());
        assert!(odd.iter().all(|path| journal.is_hidden(path)));
        assert!(!journal.is_hidden(b"base/1"));
        assert_eq!((journal.hidden.len(), journal.length), (4, length));
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_the_rest_stands() {
        for tail in [&b"hide ba"[..], b"hide", b"\0\0\0\0", b"\0\0ide b\nhide c\n", b"hide b\0\0\0\nhide c\n"]
        {
            let scratch = tempfile::tempdir().unwrap();
            let mut journal = reopen(scratch.path());
            journal.hide(b"first").unwrap();
            journal.file.write_at(tail, journal.length).unwrap();
            let mut journal = reopen(scratch.path());
            assert!(journal.is_hidden(b"first") && journal.hidden.len() == 1);
            journal.hide(b"second").unwrap();
            assert!(reopen(scratch.path()).is_hidden(b"second"));
        }
    }

    #[test]
    fn damage_before_the_end_is_an_error() {
        for text in [&b"hide a\nhode b\nhide c\n"[..], b"hide %4\n", b"\x01\nhide a\n", b"hide a b\n"] {
            let scratch = tempfile::tempdir().unwrap();
            std::fs::write(scratch.path().join(PATH), text).unwrap();
            let disk = RealDisk::open(scratch.path()).unwrap();
            assert!(NamesJournal::open(&disk, Path::new(PATH)).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_names_come_back_and_any_damage_behind_them_hides_no_fewer(
            paths in prop::collection::hash_set(prop::collection::vec(any::<u8>(), 1..12), 0..5),
            damage: Vec<u8>,
            zeros: bool,
        ) {
            let mut text: Vec<u8> =
                paths.iter().flat_map(|path| format!("hide {}\n", escape(path)).into_bytes()).collect();
            prop_assert_eq!(&parse(&text).unwrap().0, &paths);
            let length = text.len() as u64;
            text.extend_from_slice(if zeros { b"\0" } else { b"" });
            text.extend_from_slice(&damage);
            match parse(&text) {
                Ok((hidden, trusted)) => {
                    prop_assert!(hidden.is_superset(&paths));
                    prop_assert!((length..=text.len() as u64).contains(&trusted));
                    prop_assert!(!zeros || trusted == length);
                }
                Err(_) => prop_assert!(!zeros),
            }
        }
    }
}
