//! Writes the server's own `backup_manifest`, so that `pg_verifybackup` accepts a mount or a restore.
//!
//! header → one line a file → the WAL needed → the digest of everything before it. Version 1 up to 16; version 2,
//! which adds the system identifier, from 17. The text is built in memory, about 150 bytes a file, and drained by
//! `take` where that is too much. SHA-256 belongs to a higher module and comes in as a `ManifestDigest`.
//!
//! Deliberately absent: reading one; Walden has its own manifest.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::data_path::DataPath;
use super::lsn::Lsn;
use super::system_identifier::SystemIdentifier;
use super::timeline::TimelineId;
use super::version::MajorVersion;

/// A running SHA-256, over what a manifest has so far.
pub trait ManifestDigest {
    /// Adds bytes.
    fn update(&mut self, bytes: &[u8]);

    /// Returns the digest.
    fn finish(self) -> [u8; 32];
}

/// How a file's checksum was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestChecksum<'a> {
    /// Only the size is checked.
    None,
    /// The text of `Crc32c::manifest_hex`.
    Crc32c(&'a str),
    /// 64 hexadecimal digits.
    Sha256(&'a str),
}

/// WAL without which the backup is not consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestWalRange {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub end: Lsn,
}

/// A manifest being written.
#[derive(Debug)]
pub struct BackupManifest<D> {
    text: String,
    digest: D,
    /// Bytes of `text` the digest has seen.
    digested: usize,
    files: u64,
    wal_ranges: Vec<ManifestWalRange>,
}

impl<D: ManifestDigest> BackupManifest<D> {
    /// Begins the manifest of a backup of that version.
    pub fn new(version: MajorVersion, system_identifier: SystemIdentifier, digest: D) -> Self {
        let text = if version < MajorVersion::V17 {
            "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [".to_owned()
        } else {
            format!(
                "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {system_identifier},\n\
                 \"Files\": ["
            )
        };
        Self { text, digest, digested: 0, files: 0, wal_ranges: Vec::new() }
    }

    /// Adds a file. Its path is below PGDATA, through `pg_tblspc` for a tablespace; what is below `pg_wal` and
    /// the manifest itself are not listed.
    pub fn file(&mut self, path: &DataPath, size: u64, modified: Timestamp, checksum: ManifestChecksum<'_>) {
        self.text.push_str(if self.files == 0 { "\n{ " } else { ",\n{ " });
        self.files += 1;
        match str::from_utf8(path.as_bytes()) {
            Ok(path) => self.field("Path", |text| push_json_string(text, path)),
            Err(_) => self.field("Encoded-Path", |text| {
                push_json_string(text, &hex::encode(path.as_bytes()));
            }),
        }
        // Whole seconds of GMT; the server fills in the name the C library has for it.
        let modified = modified.strftime("%Y-%m-%d %H:%M:%S GMT");
        let _infallible = write!(self.text, ", \"Size\": {size}, \"Last-Modified\": \"{modified}\"");
        let (algorithm, digits) = match checksum {
            ManifestChecksum::None => ("NONE", ""),
            ManifestChecksum::Crc32c(digits) => ("CRC32C", digits),
            ManifestChecksum::Sha256(digits) => ("SHA256", digits),
        };
        if algorithm != "NONE" {
            let _infallible =
                write!(self.text, ", \"Checksum-Algorithm\": \"{algorithm}\", \"Checksum\": \"{digits}\"");
        }
        self.text.push_str(" }");
    }

    /// Adds WAL that recovery needs; of several timelines, the newest first.
    pub fn wal_range(&mut self, timeline: TimelineId, start: Lsn, end: Lsn) {
        self.wal_ranges.push(ManifestWalRange { timeline, start, end });
    }

    /// Returns the text written since the last call, for those who do not keep it in memory.
    pub fn take(&mut self) -> Vec<u8> {
        self.digest.update(&self.text.as_bytes()[self.digested..]);
        self.digested = 0;
        std::mem::take(&mut self.text).into_bytes()
    }

    /// Ends the manifest and returns what `take` has not.
    pub fn finish(mut self) -> Vec<u8> {
        self.text.push_str("\n],\n\"WAL-Ranges\": [");
        for (index, ManifestWalRange { timeline, start, end }) in self.wal_ranges.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            let _infallible = write!(
                self.text,
                "{separator}\n{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            );
        }
        self.text.push_str("\n],\n");
        self.digest.update(&self.text.as_bytes()[self.digested..]);
        let digest = hex::encode(self.digest.finish());
        let _infallible = writeln!(self.text, "\"Manifest-Checksum\": \"{digest}\"}}");
        self.text.into_bytes()
    }

    fn field(&mut self, name: &str, value: impl FnOnce(&mut String)) {
        let _infallible = write!(self.text, "\"{name}\": ");
        value(&mut self.text);
    }
}

/// Writes a string by the rules of the server's `escape_json`.
fn push_json_string(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            c if c < ' ' => {
                let _infallible = write!(text, "\\u{:04x}", c as u32);
            }
            c => text.push(c),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;

    /// Keeps what it is given; its digest is the count of bytes.
    #[derive(Debug, Clone, Default)]
    struct Recorder(Rc<RefCell<Vec<u8>>>);

    impl ManifestDigest for Recorder {
        fn update(&mut self, bytes: &[u8]) {
            self.0.borrow_mut().extend_from_slice(bytes);
        }

        fn finish(self) -> [u8; 32] {
            let mut digest = [0; 32];
            digest[24..].copy_from_slice(&(self.0.borrow().len() as u64).to_be_bytes());
            digest
        }
    }

    fn manifest(version: MajorVersion) -> (BackupManifest<Recorder>, Rc<RefCell<Vec<u8>>>) {
        let recorder = Recorder::default();
        let seen = recorder.0.clone();
        (BackupManifest::new(version, SystemIdentifier(7_710_457_651_301_592_065), recorder), seen)
    }

    fn path(path: impl Into<Vec<u8>>) -> DataPath {
        DataPath::new(path).unwrap()
    }

    /// Lines of a manifest that PostgreSQL 15 wrote.
    #[test]
    fn the_text_is_the_servers() {
        let (mut manifest, seen) = manifest(MajorVersion::V15);
        let label: Timestamp = "2026-11-21T03:23:31.9Z".parse().unwrap();
        let version: Timestamp = "2026-11-21T03:13:37Z".parse().unwrap();
        manifest.file(&path("backup_label"), 225, label, ManifestChecksum::Crc32c("64b993c0"));
        manifest.file(&path("PG_VERSION"), 3, version, ManifestChecksum::Crc32c("8a744722"));
        manifest.wal_range(TimelineId::FIRST, Lsn(0x120_0028), Lsn(0x120_0100));
        let text = String::from_utf8(manifest.finish()).unwrap();
        let expected = r#"{ "PostgreSQL-Backup-Manifest-Version": 1,
"Files": [
{ "Path": "backup_label", "Size": 225, "Last-Modified": "2026-11-21 03:23:31 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "64b993c0" },
{ "Path": "PG_VERSION", "Size": 3, "Last-Modified": "2026-11-21 03:13:37 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "8a744722" }
],
"WAL-Ranges": [
{ "Timeline": 1, "Start-LSN": "0/1200028", "End-LSN": "0/1200100" }
],
"#;
        let digested = seen.borrow().len();
        assert_eq!(&text[..digested], expected);
        assert_eq!(seen.borrow().as_slice(), expected.as_bytes());
        assert_eq!(&text[digested..], format!("\"Manifest-Checksum\": \"{digested:064x}\"}}\n"));
    }

    #[test]
    fn from_17_on_it_names_the_cluster() {
        let (manifest, _) = manifest(MajorVersion::V17);
        let text = String::from_utf8(manifest.finish()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["PostgreSQL-Backup-Manifest-Version"], 2);
        assert_eq!(json["System-Identifier"], 7_710_457_651_301_592_065_u64);
        assert_eq!(json["Files"], serde_json::json!([]));
    }

    #[test]
    fn a_name_in_no_encoding_is_hexadecimal() {
        let (mut manifest, _) = manifest(MajorVersion::V16);
        manifest.file(&path(b"odd\xff/x"), 0, Timestamp::UNIX_EPOCH, ManifestChecksum::None);
        let text = String::from_utf8(manifest.finish()).unwrap();
        let line =
            r#"{ "Encoded-Path": "6f6464ff2f78", "Size": 0, "Last-Modified": "1970-01-01 00:00:00 GMT" }"#;
        assert!(text.contains(line), "{text}");
    }

    proptest! {
        #[test]
        fn it_is_json_with_every_file_in_it(
            names in prop::collection::vec("[a-z\"\\\\\n\u{0}-\u{20}\u{7f}-\u{ffff}]{1,12}", 0..8),
            drained: bool,
        ) {
            let paths: Vec<_> = names.into_iter().filter_map(|name| DataPath::new(name).ok()).collect();
            let (mut manifest, seen) = manifest(MajorVersion::V18);
            let mut text = Vec::new();
            for path in &paths {
                manifest.file(path, 7, Timestamp::UNIX_EPOCH, ManifestChecksum::Sha256("00"));
                if drained {
                    text.extend(manifest.take());
                }
            }
            text.extend(manifest.finish());
            prop_assert!(text.starts_with(&seen.borrow()));
            let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
            let listed: Vec<_> = json["Files"].as_array().unwrap().iter().map(|f| f["Path"].as_str().unwrap()).collect();
            let expected: Vec<_> = paths.iter().map(|path| str::from_utf8(path.as_bytes()).unwrap()).collect();
            prop_assert_eq!(listed, expected);
            prop_assert_eq!(&json["Manifest-Checksum"], &format!("{:064x}", seen.borrow().len()));
        }
    }
}
