//! A tar archive as it comes: entry, its bytes, its end; in pieces of any size, in constant memory.
//!
//! ```text
//! header ── (content ── padding)… ── zero blocks, or simply the end
//! ```
//! The fields of a header are read by crate `tar`; the framing is here, because the crate wants to pull bytes that the
//! copy pushes. The server's archives have no extensions: it refuses a name or a link of 100 bytes, writes sizes over
//! 8 GiB in binary, and before 15 leaves the zero blocks at the end out. So a header of any other kind is an error, and
//! nothing is ever gathered because a header says so. Deliberately absent: judging names.

use bytes::{Buf, Bytes};
use jiff::Timestamp;
use tar::{EntryType, Header};

/// What stands in the archive next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarPart {
    /// A file, directory or link; a file's bytes follow, and then its end.
    Entry(TarEntry),
    /// Bytes of the file.
    Content(Bytes),
    /// The file has ended.
    EndOfFile,
}

/// An entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Its name without `./` in front and `/` behind.
    pub path: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Time of last modification.
    pub modified: Timestamp,
    /// What it is.
    pub kind: TarKind,
}

/// The kinds of entries a server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    File { size: u64 },
    Directory,
    Symlink { target: Vec<u8> },
}

/// Why bytes are not an archive of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("a header has a wrong checksum")]
    Checksum,
    #[error("the {field} of \"{path}\" is not one: {detail}")]
    Field { path: String, field: &'static str, detail: String },
    #[error("\"{path}\" is of a kind that no server sends: '{kind}'")]
    Kind { path: String, kind: String },
    #[error("\"{path}\" has a size although it is no file")]
    Size { path: String },
    #[error("the archive goes on behind its end")]
    BehindEnd,
    #[error("the archive ends in the middle of {place}")]
    Cut { place: &'static str },
}

/// Reads one archive.
#[derive(Debug)]
pub struct TarReader {
    state: State,
    header: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Content { left: u64, padding: u64 },
    Padding { left: u64 },
    Ended,
}

const BLOCK_BYTES: usize = 512;
/// Where a header has its own checksum, which counts as spaces.
const CHECKSUM_FIELD: std::ops::Range<usize> = 148..156;

impl Default for TarReader {
    fn default() -> Self {
        Self { state: State::Header, header: Vec::with_capacity(BLOCK_BYTES) }
    }
}

impl TarReader {
    /// Takes what comes next off the front of `bytes`; nothing where more are needed.
    pub fn next(&mut self, bytes: &mut Bytes) -> Result<Option<TarPart>, TarError> {
        loop {
            match self.state {
                State::Content { left: 0, padding } => {
                    self.state = State::Padding { left: padding };
                    return Ok(Some(TarPart::EndOfFile));
                }
                State::Padding { left: 0 } => self.state = State::Header,
                _ if bytes.is_empty() => return Ok(None),
                State::Header => {
                    if let Some(part) = self.header(bytes)? {
                        return Ok(Some(part));
                    }
                }
                State::Content { left, padding } => {
                    let now = left.min(bytes.len() as u64);
                    self.state = State::Content { left: left - now, padding };
                    return Ok(Some(TarPart::Content(bytes.split_to(now as usize))));
                }
                State::Padding { left } => {
                    let now = left.min(bytes.len() as u64);
                    bytes.advance(now as usize);
                    self.state = State::Padding { left: left - now };
                }
                State::Ended => {
                    if bytes.iter().any(|byte| *byte != 0) {
                        return Err(TarError::BehindEnd);
                    }
                    bytes.clear();
                }
            }
        }
    }

    /// Checks that the archive may end here.
    pub fn finish(&self) -> Result<(), TarError> {
        match self.state {
            State::Header if self.header.is_empty() => Ok(()),
            State::Padding { left: 0 } | State::Ended => Ok(()),
            State::Header => Err(TarError::Cut { place: "a header" }),
            State::Content { .. } | State::Padding { .. } => Err(TarError::Cut { place: "a file" }),
        }
    }

    /// Gathers a header, and reads it once it is whole.
    fn header(&mut self, bytes: &mut Bytes) -> Result<Option<TarPart>, TarError> {
        let missing = (BLOCK_BYTES - self.header.len()).min(bytes.len());
        self.header.extend_from_slice(&bytes.split_to(missing));
        if self.header.len() < BLOCK_BYTES {
            return Ok(None);
        }
        if self.header.iter().all(|byte| *byte == 0) {
            self.state = State::Ended;
            return Ok(None);
        }
        let entry = entry(&self.header)?;
        self.header.clear();
        if let TarKind::File { size } = entry.kind {
            let padding = size.next_multiple_of(BLOCK_BYTES as u64) - size;
            self.state = State::Content { left: size, padding };
        }
        Ok(Some(TarPart::Entry(entry)))
    }
}

/// Reads a header of 512 bytes.
fn entry(bytes: &[u8]) -> Result<TarEntry, TarError> {
    let header = Header::from_byte_slice(bytes);
    let counted = |(at, byte): (usize, &u8)| if CHECKSUM_FIELD.contains(&at) { 32 } else { u32::from(*byte) };
    let sum: u32 = bytes.iter().enumerate().map(counted).sum();
    if header.cksum().ok() != Some(sum) {
        return Err(TarError::Checksum);
    }
    let name = header.path_bytes();
    let path = name.strip_prefix(b"./").unwrap_or(&name);
    let path = path.strip_suffix(b"/").unwrap_or(path).to_vec();
    let shown = || path.escape_ascii().to_string();
    let field = |field: &'static str| {
        let path = shown();
        move |error: std::io::Error| TarError::Field { path, field, detail: error.to_string() }
    };
    let mode = header.mode().map_err(field("mode"))? & 0o7777;
    let seconds = header.mtime().map_err(field("time"))?.cast_signed();
    let modified = Timestamp::from_second(seconds).map_err(|error| TarError::Field {
        path: shown(),
        field: "time",
        detail: error.to_string(),
    })?;
    let size = header.entry_size().map_err(field("size"))?;
    let kind = match header.entry_type() {
        EntryType::Regular if size <= i64::MAX as u64 => TarKind::File { size },
        EntryType::Regular => {
            return Err(TarError::Field { path: shown(), field: "size", detail: size.to_string() });
        }
        EntryType::Directory => TarKind::Directory,
        EntryType::Symlink => {
            let target = header.link_name_bytes().unwrap_or_default();
            // The server ends links as it ends directories.
            TarKind::Symlink { target: target.strip_suffix(b"/").unwrap_or(&target).to_vec() }
        }
        other => {
            let kind = [other.as_byte()].escape_ascii().to_string();
            return Err(TarError::Kind { path: shown(), kind });
        }
    };
    if size != 0 && !matches!(kind, TarKind::File { .. }) {
        return Err(TarError::Size { path: shown() });
    }
    Ok(TarEntry { path, mode, modified, kind })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(path: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o100_640);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header.set_entry_type(kind);
        header.set_cksum();
        header
    }

    fn file(path: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = header(path, EntryType::Regular, content.len() as u64).as_bytes().to_vec();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes
    }

    /// Entries with their contents, however the parts were cut.
    fn read(stream: &[u8], cuts: &[usize]) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
        let (mut reader, mut found) = (TarReader::default(), Vec::new());
        let (mut rest, mut cuts) = (stream, cuts.iter().cycle());
        let mut ended = true;
        while !rest.is_empty() {
            let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            let mut bytes = Bytes::copy_from_slice(now);
            rest = later;
            while let Some(part) = reader.next(&mut bytes)? {
                match part {
                    TarPart::Entry(entry) => {
                        assert!(ended);
                        ended = !matches!(entry.kind, TarKind::File { .. });
                        found.push((entry, Vec::new()));
                    }
                    TarPart::Content(bytes) => found.last_mut().unwrap().1.extend_from_slice(&bytes),
                    TarPart::EndOfFile => ended = true,
                }
            }
            assert!(bytes.is_empty());
        }
        reader.finish().map(|()| found)
    }

    fn sample() -> Vec<u8> {
        let mut link = header("pg_tblspc/16400/", EntryType::Symlink, 0);
        link.set_link_name_literal(b"/space/fast/").unwrap();
        link.set_cksum();
        [
            file("backup_label", b"START"),
            header("./pg_wal/archive_status/", EntryType::Directory, 0).as_bytes().to_vec(),
            link.as_bytes().to_vec(),
            file("base/5/1", &[]),
            file("base/5/2", &[7; 1024]),
            file("base/5/3", &[8; 700]),
        ]
        .concat()
    }

    #[test]
    fn entries_come_with_their_names_modes_and_times() {
        let found = read(&sample(), &[10_000]).unwrap();
        let shown: Vec<(String, TarKind, usize)> = found
            .iter()
            .map(|(entry, content)| {
                (String::from_utf8(entry.path.clone()).unwrap(), entry.kind.clone(), content.len())
            })
            .collect();
        let file = |path: &str, size: usize| (path.to_owned(), TarKind::File { size: size as u64 }, size);
        assert_eq!(
            shown,
            [
                file("backup_label", 5),
                ("pg_wal/archive_status".to_owned(), TarKind::Directory, 0),
                ("pg_tblspc/16400".to_owned(), TarKind::Symlink { target: b"/space/fast".to_vec() }, 0),
                file("base/5/1", 0),
                file("base/5/2", 1024),
                file("base/5/3", 700),
            ]
        );
        assert!(found.iter().all(|(entry, _)| entry.mode == 0o640));
        assert_eq!(found[0].0.modified.as_second(), 1_700_000_000);
    }

    #[test]
    fn a_file_of_more_than_8_gib_has_its_size_in_binary() {
        let size = (9 << 30) + 5;
        let mut bytes = Bytes::copy_from_slice(header("core", EntryType::Regular, size).as_bytes());
        let mut reader = TarReader::default();
        let Some(TarPart::Entry(entry)) = reader.next(&mut bytes).unwrap() else { panic!("no entry") };
        assert_eq!(entry.kind, TarKind::File { size });
        assert_eq!(reader.state, State::Content { left: size, padding: 507 });
    }

    #[test]
    fn hostile_headers_are_refused_and_make_no_room() {
        let error = |header: &Header| read(header.as_bytes(), &[512]).unwrap_err();
        let mut wrong = header("base/5/1", EntryType::Regular, 5);
        wrong.as_mut_bytes()[0] ^= 1;
        assert_eq!(error(&wrong), TarError::Checksum);
        // Extensions, of which a size would otherwise say how much to gather; hard links, devices, sparse files.
        for kind in [b'L', b'K', b'x', b'g', b'S', b'1', b'3', b'4', b'6', b'7', b'?'] {
            let header = header("base/5/1", EntryType::new(kind), 1 << 40);
            assert!(matches!(error(&header), TarError::Kind { .. }), "{}", char::from(kind));
        }
        for kind in [EntryType::Directory, EntryType::Symlink] {
            assert!(matches!(error(&header("a", kind, 5)), TarError::Size { .. }));
        }
        for (field, at) in [("mode", 100..108), ("size", 124..136), ("time", 136..148)] {
            for content in [b'9', b'-', b' ', 0xff] {
                let mut header = header("a", EntryType::Regular, 0);
                header.as_mut_bytes()[at.clone()].fill(content);
                header.set_cksum();
                if let Err(error) = read(header.as_bytes(), &[512]) {
                    assert!(
                        matches!(error, TarError::Field { field: f, .. } if f == field)
                            || matches!(error, TarError::Cut { .. }),
                        "{field}: {error}"
                    );
                } else {
                    // All bits set are a mode, and one second before 1970.
                    assert_eq!(content, 0xff, "{field}");
                }
            }
        }
    }

    #[test]
    fn nothing_but_zeros_follows_the_end() {
        let mut whole = sample();
        let entries = read(&whole, &[512]).unwrap();
        whole.extend([0; 2 * BLOCK_BYTES]);
        assert_eq!(read(&whole, &[100]).unwrap(), entries);
        whole.extend(file("later", b""));
        assert_eq!(read(&whole, &[100]), Err(TarError::BehindEnd));
    }

    proptest! {
        #[test]
        fn an_archive_comes_out_the_same_however_it_was_cut(cuts in proptest::collection::vec(1usize..700, 1..50)) {
            prop_assert_eq!(read(&sample(), &cuts), read(&sample(), &[10_000]));
        }

        #[test]
        fn an_archive_that_was_cut_off_within_an_entry_says_so(kept in 0usize..5000) {
            let whole = sample();
            let kept = kept.min(whole.len());
            let result = read(&whole[..kept], &[kept.max(1)]);
            let between = [0, 1024, 1536, 2048, 2560, 4096, 5632];
            prop_assert_eq!(result.is_ok(), between.contains(&kept), "{}", kept);
        }

        #[test]
        fn any_bytes_are_an_archive_or_refused(bytes: Vec<u8>, summed: bool) {
            let mut block = [0; BLOCK_BYTES];
            let len = bytes.len().min(BLOCK_BYTES);
            block[..len].copy_from_slice(&bytes[..len]);
            let mut header = Header::from_byte_slice(&block).clone();
            if summed {
                header.set_cksum();
            }
            let _ = read(header.as_bytes(), &[512]);
        }
    }
}
