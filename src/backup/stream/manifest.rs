//! The server's `backup_manifest`, read line by line as it comes, and held against what came.
//!
//! The server writes a line for each file, in all versions; so no more than a line is in memory beside what is kept of
//! it. The last line has the SHA-256 of all before it. Walden stores a manifest of its own (`server_manifest`), because
//! the server's also lists what Walden leaves out; that both agree on every file is checked here, with sizes and CRCs.

use serde::Deserialize;

use crate::backup::data_directory::server_path;
use crate::backup::stream::error::StreamError;
use crate::codec::Sha256;
use crate::pg::{Crc32c, Lsn, TimelineId};
use crate::repo::entry::Entry;

/// A manifest being read.
#[derive(Debug)]
pub struct ManifestReader {
    line: Vec<u8>,
    number: u64,
    part: Part,
    digest: Sha256,
    read: ServerManifest,
}

/// What a manifest says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ServerManifest {
    files: Vec<ManifestFile>,
    wal: Vec<(TimelineId, Lsn, Lsn)>,
}

/// A file as the server sent it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ManifestFile {
    /// What the server calls it.
    pub path: Vec<u8>,
    /// Its bytes.
    pub size: u64,
    /// CRC of them.
    pub crc: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Head,
    Files,
    BetweenLists,
    Wal,
    Digest,
    End,
}

#[derive(Deserialize)]
struct FileLine {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct WalLine {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

/// A path of 4 KiB, each byte of it escaped with six.
const LINE_BYTES_MAX: usize = 64 << 10;

impl ManifestFile {
    /// Returns a file as it came; nothing for one that is no part of the data directory.
    pub fn of(entry: &Entry, crc: Option<Crc32c>) -> Option<Self> {
        let path = server_path(&entry.path).filter(|path| !path.is_empty())?;
        Some(Self { path, size: entry.size(), crc: crc.map(|crc| crc.0) })
    }
}

impl Default for ManifestReader {
    fn default() -> Self {
        Self {
            line: Vec::new(),
            number: 1,
            part: Part::Head,
            digest: Sha256::new(),
            read: ServerManifest::default(),
        }
    }
}

impl ManifestReader {
    /// Reads the next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.take(&line)?;
            self.number += 1;
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > LINE_BYTES_MAX {
            return Err(self.wrong("it is too long"));
        }
        Ok(())
    }

    /// Returns what it said.
    pub fn finish(self) -> Result<ServerManifest, StreamError> {
        if self.part != Part::End || !self.line.is_empty() {
            return Err(self.wrong("the manifest ends here"));
        }
        Ok(self.read)
    }

    fn take(&mut self, line: &[u8]) -> Result<(), StreamError> {
        let text = std::str::from_utf8(line).map_err(|error| self.wrong(error))?;
        let last = self.part == Part::Digest;
        if !last {
            self.digest.update(line);
            self.digest.update(b"\n");
        }
        let item = text.strip_suffix(',').unwrap_or(text);
        self.part = match self.part {
            Part::Head if text == "\"Files\": [" => Part::Files,
            Part::Head if self.number <= 2 => Part::Head,
            Part::Files if text == "]," => Part::BetweenLists,
            Part::Files => {
                let file = self.file(item)?;
                self.read.files.push(file);
                Part::Files
            }
            Part::BetweenLists if text == "\"WAL-Ranges\": [" => Part::Wal,
            Part::Wal if text == "]," => Part::Digest,
            Part::Wal => {
                let range = self.range(item)?;
                self.read.wal.push(range);
                Part::Wal
            }
            Part::Digest => {
                self.check_digest(text)?;
                Part::End
            }
            Part::Head | Part::BetweenLists | Part::End => return Err(self.wrong("it is not expected")),
        };
        Ok(())
    }

    fn file(&self, line: &str) -> Result<ManifestFile, StreamError> {
        let file: FileLine = serde_json::from_str(line).map_err(|error| self.wrong(error))?;
        let path = match (file.path, file.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(digits)) => hex::decode(digits).map_err(|error| self.wrong(error))?,
            _ => return Err(self.wrong("a file has one path")),
        };
        let crc = match (file.algorithm.as_deref(), file.checksum) {
            (Some("CRC32C"), Some(digits)) => {
                let mut bytes = [0; 4];
                hex::decode_to_slice(digits, &mut bytes).map_err(|error| self.wrong(error))?;
                Some(u32::from_le_bytes(bytes))
            }
            // It was asked to sum all of them up.
            _ => return Err(self.wrong("the checksum is not the one that was asked for")),
        };
        Ok(ManifestFile { path, size: file.size, crc })
    }

    fn range(&self, line: &str) -> Result<(TimelineId, Lsn, Lsn), StreamError> {
        let range: WalLine = serde_json::from_str(line).map_err(|error| self.wrong(error))?;
        let lsn = |text: &str| text.parse::<Lsn>().map_err(|error| self.wrong(error));
        let timeline = TimelineId::new(range.timeline).ok_or_else(|| self.wrong("timeline 0"))?;
        Ok((timeline, lsn(&range.start)?, lsn(&range.end)?))
    }

    fn check_digest(&self, line: &str) -> Result<(), StreamError> {
        let digest = hex::encode(self.digest.clone().finish().0);
        if line == format!("\"Manifest-Checksum\": \"{digest}\"}}") {
            return Ok(());
        }
        Err(self.wrong(format!("the manifest's own checksum is {digest}")))
    }

    fn wrong(&self, detail: impl ToString) -> StreamError {
        StreamError::Manifest { line: self.number, detail: detail.to_string() }
    }
}

impl ServerManifest {
    /// Checks that each file that `came` is what the server has sent, and that nothing else was to come but what was
    /// `left_out`.
    pub fn check_files(
        mut self,
        mut came: Vec<ManifestFile>,
        mut left_out: Vec<Vec<u8>>,
    ) -> Result<(), StreamError> {
        came.sort_unstable();
        self.files.sort_unstable();
        left_out.sort_unstable();
        let different = |path: &[u8], detail: &str| {
            let path = path.escape_ascii().to_string();
            Err(StreamError::Different { path, detail: detail.to_owned() })
        };
        if let Some(twice) = came.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return different(&twice[0].path, "came twice");
        }
        let listed = self.files.iter().filter(|file| left_out.binary_search(&file.path).is_err());
        let mut came = came.iter().peekable();
        for file in listed {
            match came.next_if(|next| next.path <= file.path) {
                Some(next) if next.path < file.path => {
                    return different(&next.path, "is not in the manifest");
                }
                Some(next) if next.size != file.size => {
                    return different(&file.path, "has another size than in the manifest");
                }
                Some(next) if file.crc.is_some() && next.crc != file.crc => {
                    return different(&file.path, "has another checksum than in the manifest");
                }
                Some(_) => {}
                None => return different(&file.path, "is in the manifest and did not come"),
            }
        }
        came.next().map_or(Ok(()), |next| different(&next.path, "is not in the manifest"))
    }

    /// Checks that the manifest is about the WAL of the backup.
    pub fn check_wal(&self, timeline: TimelineId, start: Lsn, stop: Lsn) -> Result<(), StreamError> {
        match self.wal[..] {
            [range] if range == (timeline, start, stop) => Ok(()),
            [(_, from, to), ..] => Err(StreamError::Wal { from, to }),
            [] => Err(StreamError::Wal { from: Lsn::ZERO, to: Lsn::ZERO }),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use crate::backup::server_manifest::{ManifestFacts, server_manifest};
    use crate::pg::{MajorVersion, SystemIdentifier};
    use crate::repo::entry::{Content, Node, TreePath};

    use super::*;

    fn entry(path: &[u8]) -> Entry {
        let node = Node::File { size: 3, content: Content::Inline("abc".into()) };
        Entry { path: TreePath::new(path).unwrap(), mode: 0o600, modified: Timestamp::UNIX_EPOCH, node }
    }

    fn entries() -> Vec<Entry> {
        [
            &b"data/base/5/1"[..],
            b"data/a\nb",
            b"data/odd\xff",
            b"tablespaces/7/PG_15_1/5/2",
            b"data/backup_label",
        ]
        .map(entry)
        .to_vec()
    }

    const START: Lsn = Lsn(0x0200_0028);
    const STOP: Lsn = Lsn(0x0200_0100);

    /// A manifest in the server's own form.
    fn text(version: MajorVersion, entries: &[Entry]) -> Vec<u8> {
        let facts = ManifestFacts {
            version,
            system_identifier: SystemIdentifier(7),
            timeline: TimelineId::FIRST,
            wal: (START, STOP),
        };
        server_manifest(&facts, entries, &vec![Some(Crc32c::of(b"abc")); entries.len()], &[])
    }

    fn read(text: &[u8], cut: usize) -> Result<ServerManifest, StreamError> {
        let mut reader = ManifestReader::default();
        text.chunks(cut).try_for_each(|piece| reader.push(piece))?;
        reader.finish()
    }

    fn check(text: &[u8], entries: &[Entry], left_out: &[&[u8]]) -> Result<(), StreamError> {
        let left_out = left_out.iter().map(|path| path.to_vec()).collect();
        let crc = Some(Crc32c::of(b"abc"));
        let came = entries.iter().filter_map(|entry| ManifestFile::of(entry, crc)).collect();
        read(text, 1000)?.check_files(came, left_out)
    }

    #[test]
    fn the_manifest_of_what_came_is_confirmed_in_every_version() {
        for version in [MajorVersion::V13, MajorVersion::V15, MajorVersion::V18] {
            let text = text(version, &entries());
            check(&text, &entries(), &[]).unwrap();
            let manifest = read(&text, 7).unwrap();
            manifest.check_wal(TimelineId::FIRST, START, STOP).unwrap();
            assert!(manifest.check_wal(TimelineId::FIRST, START, Lsn(STOP.0 + 1)).is_err());
        }
    }

    #[test]
    fn a_file_without_a_checksum_is_refused() {
        let entries = entries();
        let facts = ManifestFacts {
            version: MajorVersion::V18,
            system_identifier: SystemIdentifier(7),
            timeline: TimelineId::FIRST,
            wal: (START, STOP),
        };
        let mut checksums = vec![Some(Crc32c::of(b"abc")); entries.len()];
        checksums[1] = None;
        let text = server_manifest(&facts, &entries, &checksums, &[]);
        let refused = read(&text, 1000).unwrap_err().to_string();
        assert!(refused.contains("not the one that was asked for"), "{refused}");
    }

    #[test]
    fn whatever_is_missing_added_or_different_is_found() {
        let whole = entries();
        let text = text(MajorVersion::V15, &whole);
        let told = |entries: &[Entry]| check(&text, entries, &[]).unwrap_err().to_string();
        for n in 0..whole.len() {
            let mut entries = whole.clone();
            entries.remove(n);
            assert!(told(&entries).contains("did not come"), "{}", told(&entries));
            let mut entries = whole.clone();
            entries.push(whole[n].clone());
            assert!(told(&entries).contains("came twice"));
            let mut entries = whole.clone();
            entries[n].node = Node::File { size: 4, content: Content::Inline("abcd".into()) };
            assert!(told(&entries).contains("another size"));
            let mut checksums = vec![Crc32c::of(b"abc"); whole.len()];
            checksums[n] = Crc32c::of(b"abd");
            let came =
                whole.iter().zip(checksums).filter_map(|(entry, crc)| ManifestFile::of(entry, Some(crc)));
            let came = came.collect();
            let checked = read(&text, 99).unwrap().check_files(came, Vec::new());
            assert!(checked.unwrap_err().to_string().contains("another checksum"));
        }
        for added in [&b"data/0"[..], b"data/zzz", b"data/base/5/11"] {
            let entries = [whole.clone(), vec![entry(added)]].concat();
            assert!(told(&entries).contains("is not in the manifest"));
        }
        // What was left out on purpose is not missed, and configuration from outside is no part of it.
        check(&text, &whole[1..], &[b"base/5/1"]).unwrap();
        check(&text, &[whole.clone(), vec![entry(b"config/etc/x")]].concat(), &[]).unwrap();
    }

    proptest! {
        #[test]
        fn a_changed_or_cut_manifest_is_refused(at in 0usize..2000, to: u8, cut: bool, piece in 1usize..200) {
            let mut text = text(MajorVersion::V17, &entries());
            let at = at % text.len();
            if cut {
                text.truncate(at);
            } else {
                prop_assume!(text[at] != to);
                text[at] = to;
            }
            prop_assert!(read(&text, piece).is_err());
        }

        #[test]
        fn any_bytes_are_a_manifest_or_refused(bytes: Vec<u8>) {
            let _ = read(&bytes, 10);
        }
    }
}
