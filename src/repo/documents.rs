//! The signed, plain documents of a basebackup, as JSON.
//!
//! `begin` is the intent and fixes key, parent and cluster before anything is read; `backup.json` is the outcome,
//! created once by whoever comes first; `expired` is retention's mark. Field names are part of the format.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::codec::Digest;
use crate::pg::{Lsn, TimelineId};
use crate::repo::carried_wal::CarriedWal;
use crate::repo::id::{BasebackupId, ClusterId};
use crate::repo::keyring::KeyEnvelope;

/// `begin`: an attempt at a basebackup has started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Begin {
    /// The attempt.
    pub id: BasebackupId,
    /// The basebackup whose chunks may be named; none for a full one.
    pub parent: Option<BasebackupId>,
    /// The cluster that is backed up.
    pub cluster: ClusterId,
    /// The timeline it was on.
    pub timeline: TimelineId,
    /// Redo location at the start: no WAL from here on may go while the attempt is alive.
    pub wal_floor: Lsn,
    /// The data key of everything the attempt writes.
    pub key: KeyEnvelope,
    /// Who is at it.
    pub host: String,
    /// The process there.
    pub pid: u32,
}

/// `backup.json`: what became of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// A whole basebackup.
    Complete(Box<BackupRecord>),
    /// Given up, and nobody may complete it any more.
    Abandoned { id: BasebackupId },
}

/// What is known of a complete basebackup without any key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Its id.
    pub id: BasebackupId,
    /// The basebackup whose chunks it names.
    pub parent: Option<BasebackupId>,
    /// BLAKE3 of the parent's `backup.json`.
    pub parent_digest: Option<Digest>,
    /// What the user called it.
    pub label: Option<String>,
    /// The cluster.
    pub cluster: ClusterId,
    /// The timeline of start and stop.
    pub timeline: TimelineId,
    /// START WAL LOCATION: recovery needs the WAL from here on.
    pub start_lsn: Lsn,
    /// End of the backup: recovery is consistent from here on.
    pub stop_lsn: Lsn,
    /// Redo location at the start, at or before `start_lsn`.
    pub wal_floor: Lsn,
    /// When it started.
    pub started_at: Timestamp,
    /// When it stopped.
    pub stopped_at: Timestamp,
    /// The server it was taken from.
    pub server: ServerRecord,
    /// Keys of all packs it names, the own one first.
    pub keys: Vec<KeyEnvelope>,
    /// The manifest.
    pub manifest: ManifestPin,
    /// The list of packs.
    pub refs: ObjectPin,
    /// How large it is.
    pub size: SizeRecord,
    /// The WAL that it carries itself, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal: Option<CarriedWal>,
}

/// What a restore has to know of the server before it opens anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ServerRecord {
    /// `server_version`, "15.18 (Debian …)".
    pub version: String,
    /// The major version, 13 and up.
    pub major: u32,
    /// Catalog version number.
    pub catalog_version: u32,
    /// Version of pg_control.
    pub control_version: u32,
    /// Whether pages have checksums.
    pub data_checksums: bool,
    /// Bytes of a page.
    pub block_size: u32,
    /// Pages of a segment file of a relation.
    pub relation_segment_pages: u32,
    /// Alignment of the architecture.
    pub maximum_alignment: u32,
    /// Operating system and architecture.
    pub platform: String,
    /// Version of libc, as the collation provider reports it.
    pub libc: Option<String>,
    /// Version of ICU.
    pub icu: Option<String>,
    /// `datcollversion` of each database that has one.
    pub collation_versions: Vec<DatabaseCollation>,
    /// Name of the role with oid 10, the bootstrap superuser.
    pub superuser: String,
    /// Host name of the server, or of the host that read its directory.
    pub host: String,
    /// What the server preloads, as it was set.
    #[serde(default)]
    pub preload_libraries: String,
    /// Names of the configuration files outside PGDATA, below `config/`: main, hba, ident.
    pub outside_configuration: Vec<String>,
}

/// A database and the version of its collation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseCollation {
    /// Name of the database.
    pub database: String,
    /// `datcollversion`.
    pub version: String,
}

/// Pins an object that has no signature of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectPin {
    /// Bytes of the object.
    pub size: u64,
    /// BLAKE3 of the object.
    pub digest: Digest,
}

/// Pins the manifest, as a whole and by its beginning, so that it can be trusted in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestPin {
    /// Bytes of the object.
    pub size: u64,
    /// BLAKE3 of the object.
    pub digest: Digest,
    /// Bytes of header and index.
    pub head_size: u64,
    /// BLAKE3 of header and index.
    pub head_digest: Digest,
    /// Bytes of header, index and start frame: what a reader fetches first.
    pub start_size: u64,
}

/// How large a basebackup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct SizeRecord {
    /// Files, without directories and links, and without WAL that is carried.
    pub files: u64,
    /// Bytes of these files.
    pub database_bytes: u64,
    /// Bytes that this basebackup added to the store.
    pub stored_bytes: u64,
    /// Stored bytes that it names, whoever wrote them.
    pub live_bytes: u64,
    /// Pages whose checksum was wrong.
    pub damaged_pages: u64,
}

/// `expired`: from now on no parent, not listed, not restored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Expired {
    /// Which basebackup.
    pub id: BasebackupId,
    /// Why.
    pub reason: String,
}

/// `site.json`: what every object of the site is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// Version of the repository format, 1.
    pub format: u32,
    /// The site's identity, whatever it is called and wherever it stands.
    pub site: uuid::Uuid,
    /// Features a reader must know.
    pub required: Vec<String>,
}
