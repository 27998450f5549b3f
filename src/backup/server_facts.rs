//! What a server tells about itself before a basebackup: one struct, gathered in a handful of queries.
//!
//! Nothing here is decided, only asked. What takes a right the role lacks is left out and listed in `unreadable`, so
//! that a backup by an ordinary monitoring role works and says what it could not keep. What no backup can do without
//! (the data directory, the identifiers) is an error instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::server_identity::ServerIdentity;
use super::source::SourceError;
use crate::pg::{MajorVersion, Oid, WalSegmentSize};
use crate::replication::{Error as SessionError, Row, Session};

/// SQLSTATE `insufficient_privilege`.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Settings whose values a basebackup records; those a version does not have are simply absent.
const SETTINGS: [&str; 31] = [
    "archive_command",
    "archive_library",
    "archive_mode",
    "block_size",
    "config_file",
    "data_checksums",
    "data_directory",
    "external_pid_file",
    "full_page_writes",
    "hba_file",
    "huge_pages",
    "ident_file",
    "listen_addresses",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
    "port",
    "segment_size",
    "server_version",
    "shared_buffers",
    "shared_preload_libraries",
    "ssl",
    "summarize_wal",
    "synchronous_standby_names",
    "track_commit_timestamp",
    "unix_socket_directories",
    "wal_block_size",
    "wal_level",
    "wal_segment_size",
];

/// A server as it describes itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerFacts {
    pub version: MajorVersion,
    /// As `server_version` prints it, such as `15.20 (Debian 15.20-0+deb12u1)`.
    pub version_text: String,
    pub identity: ServerIdentity,
    pub wal_segment_size: WalSegmentSize,
    /// The catalog version, which tells builds of one major apart before its release.
    pub catalog_version: u32,
    pub data_checksums: bool,
    pub maximum_alignment: u32,
    /// The role `initdb` created, by which a clone is entered: that of oid 10.
    pub bootstrap_role: String,
    pub tablespaces: Vec<Tablespace>,
    pub databases: Vec<Database>,
    /// `config_file`, `hba_file`, `ident_file` and every file they were seen to include.
    pub configuration_files: Vec<PathBuf>,
    /// The versions of the libraries that decide how text is ordered, as the server sees them.
    pub libc_version: Option<String>,
    pub icu_version: Option<String>,
    /// The values of the settings worth recording.
    pub settings: BTreeMap<String, String>,
    /// What the role may not see, in words.
    pub unreadable: Vec<String>,
}

/// A tablespace besides the two every cluster has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: Oid,
    pub name: String,
    /// Where its link points; for one created in place, the directory in the data directory.
    pub location: PathBuf,
    /// True where the tablespace is a directory in `pg_tblspc` and no link (15 and later).
    pub in_place: bool,
}

/// A database, with what its text indexes depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    pub oid: Oid,
    pub name: String,
    /// `None` where the role may not ask, or the database was dropped meanwhile.
    pub size_bytes: Option<u64>,
    /// `c` (libc), `i` (ICU) or `b` (builtin); always libc before 15.
    pub locale_provider: String,
    pub collate: String,
    /// The version the collations were built with; recorded from 15 on.
    pub collation_version: Option<String>,
}

/// What `pg_stat_archiver` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiverStatus {
    pub archived_count: u64,
    pub last_archived_wal: Option<String>,
    pub last_archived_at: Option<Timestamp>,
    pub failed_count: u64,
    pub last_failed_wal: Option<String>,
    pub last_failed_at: Option<Timestamp>,
}

impl ServerFacts {
    /// Asks a server about itself.
    pub async fn gather(session: &Session) -> Result<Self, SourceError> {
        let mut unreadable = Vec::new();
        let identity = ServerIdentity::ask(session).await?;
        let settings = settings(session).await?;
        let control = session.query_one(CONTROL, &[]).await?;
        let wal_segment_size = WalSegmentSize::new(control.unsigned("segment_bytes")?)
            .map_err(|error| SessionError::Unexpected { detail: error.to_string() })?;
        let bootstrap = session.query_one("SELECT rolname::text AS name FROM pg_roles WHERE oid = 10", &[]);
        let bootstrap_role = bootstrap.await?.text("name")?;
        let configuration_files = configuration_files(session, &settings, &mut unreadable).await?;
        let libraries = session.query(LIBRARIES, &[]).await?;
        let library = |provider: &str| -> Result<Option<String>, SessionError> {
            let mut found = libraries.iter().filter(|row| row.text("provider").is_ok_and(|p| p == provider));
            found.next().map_or(Ok(None), |row| row.text_opt("version"))
        };
        Ok(Self {
            version: session.version(),
            version_text: settings.get("server_version").cloned().unwrap_or_default(),
            identity,
            wal_segment_size,
            catalog_version: control.unsigned("catalog_version")?,
            data_checksums: control.int("checksum_version")? != 0,
            maximum_alignment: control.unsigned("alignment")?,
            bootstrap_role,
            tablespaces: tablespaces(session).await?,
            databases: databases(session, &mut unreadable).await?,
            configuration_files,
            libc_version: library("c")?,
            icu_version: library("i")?,
            settings,
            unreadable,
        })
    }

    /// Returns the value of a recorded setting.
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// Returns the data directory as the server names it.
    pub fn data_directory(&self) -> &Path {
        &self.identity.data_directory
    }

    /// Returns true where the server archives WAL at all: a backup whose WAL goes nowhere is none.
    pub fn archives(&self) -> bool {
        let mode = self.setting("archive_mode").unwrap_or("off");
        mode == "always" || (mode == "on" && !self.identity.in_recovery)
    }
}

impl ArchiverStatus {
    /// Asks for the archiver's counters.
    pub async fn ask(session: &Session) -> Result<Self, SourceError> {
        let row = session.query_one(ARCHIVER, &[]).await?;
        let time = |column: &str| -> Result<Option<Timestamp>, SessionError> {
            let known = row.int_opt(column)?;
            known.map(|_| row.timestamp(column)).transpose()
        };
        Ok(Self {
            archived_count: row.unsigned("archived_count")?,
            last_archived_wal: row.text_opt("last_archived_wal")?,
            last_archived_at: time("last_archived_at")?,
            failed_count: row.unsigned("failed_count")?,
            last_failed_wal: row.text_opt("last_failed_wal")?,
            last_failed_at: time("last_failed_at")?,
        })
    }
}

const CONTROL: &str = "SELECT bytes_per_wal_segment::bigint AS segment_bytes, \
     data_page_checksum_version::bigint AS checksum_version, max_data_alignment::bigint AS alignment, \
     catalog_version_no::bigint AS catalog_version FROM pg_control_init(), pg_control_system()";

/// The C locale has no version, and one collation of each provider tells the library's.
const LIBRARIES: &str = "SELECT collprovider::text AS provider, max(pg_collation_actual_version(oid)) AS version \
     FROM pg_collation WHERE collprovider IN ('c', 'i') GROUP BY collprovider";

const ARCHIVER: &str = "SELECT archived_count, last_archived_wal, failed_count, last_failed_wal, \
     (extract(epoch FROM last_archived_time) * 1000000)::bigint AS last_archived_at, \
     (extract(epoch FROM last_failed_time) * 1000000)::bigint AS last_failed_at FROM pg_stat_archiver";

async fn settings(session: &Session) -> Result<BTreeMap<String, String>, SourceError> {
    let names = SETTINGS.map(|name| format!("'{name}'")).join(", ");
    let sql = format!("SELECT name, setting FROM pg_settings WHERE name IN ({names})");
    let mut settings = BTreeMap::new();
    for row in session.query(&sql, &[]).await? {
        settings.insert(row.text("name")?, row.text_opt("setting")?.unwrap_or_default());
    }
    Ok(settings)
}

async fn configuration_files(
    session: &Session,
    settings: &BTreeMap<String, String>,
    unreadable: &mut Vec<String>,
) -> Result<Vec<PathBuf>, SourceError> {
    let main = ["config_file", "hba_file", "ident_file"].iter().filter_map(|name| settings.get(*name));
    let mut files: Vec<PathBuf> = main.filter(|path| !path.is_empty()).map(PathBuf::from).collect();
    let mut sources = vec![
        // Seen by any monitoring role, but only files whose settings took effect.
        "SELECT DISTINCT sourcefile AS path FROM pg_settings WHERE sourcefile IS NOT NULL ORDER BY 1",
        "SELECT DISTINCT sourcefile AS path FROM pg_file_settings WHERE sourcefile IS NOT NULL ORDER BY 1",
    ];
    if session.version() >= MajorVersion::V16 {
        sources.extend([
            "SELECT DISTINCT file_name AS path FROM pg_hba_file_rules WHERE file_name IS NOT NULL ORDER BY 1",
            "SELECT DISTINCT file_name AS path FROM pg_ident_file_mappings WHERE file_name IS NOT NULL ORDER BY 1",
        ]);
    }
    for sql in sources {
        let Some(rows) = permitted(session, sql).await? else {
            unreadable.push("which files the configuration includes".into());
            break;
        };
        for row in rows {
            let path = PathBuf::from(row.text("path")?);
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

async fn tablespaces(session: &Session) -> Result<Vec<Tablespace>, SourceError> {
    let sql = "SELECT oid::bigint AS oid, spcname::text AS name, pg_tablespace_location(oid) AS location \
               FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global') ORDER BY oid";
    let mut tablespaces = Vec::new();
    for row in session.query(sql, &[]).await? {
        let location = PathBuf::from(row.text("location")?);
        let in_place = !location.is_absolute();
        tablespaces.push(Tablespace {
            oid: Oid(row.unsigned("oid")?),
            name: row.text("name")?,
            location,
            in_place,
        });
    }
    Ok(tablespaces)
}

async fn databases(session: &Session, unreadable: &mut Vec<String>) -> Result<Vec<Database>, SourceError> {
    let recorded = if session.version() >= MajorVersion::V15 {
        "datlocprovider::text AS provider, datcollversion AS version"
    } else {
        "'c'::text AS provider, NULL::text AS version"
    };
    let sql = format!(
        "SELECT oid::bigint AS oid, datname::text AS name, datcollate::text AS collate, {recorded} \
         FROM pg_database ORDER BY oid"
    );
    let sizes = sizes(session).await?;
    if sizes.is_none() {
        unreadable.push("the sizes of the databases".into());
    }
    let mut databases = Vec::new();
    for row in session.query(&sql, &[]).await? {
        let oid = Oid(row.unsigned("oid")?);
        databases.push(Database {
            oid,
            name: row.text("name")?,
            size_bytes: sizes.as_ref().and_then(|sizes| sizes.get(&oid).copied()),
            locale_provider: row.text("provider")?,
            collate: row.text("collate")?,
            collation_version: row.text_opt("version")?,
        });
    }
    Ok(databases)
}

/// Returns the size of each database, or `None` where the server refuses: a database dropped between the statement's
/// snapshot and the look at its files fails the whole statement, and sizes are worth no more than one attempt.
async fn sizes(session: &Session) -> Result<Option<BTreeMap<Oid, u64>>, SourceError> {
    let sql = "SELECT oid::bigint AS oid, pg_database_size(oid) AS size FROM pg_database \
               WHERE has_database_privilege(oid, 'CONNECT') \
               OR pg_has_role('pg_read_all_stats', 'USAGE')";
    let rows = match session.query(sql, &[]).await {
        Ok(rows) => rows,
        Err(SessionError::Sql { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut sizes = BTreeMap::new();
    for row in rows {
        if let Some(size) = row.int_opt("size")?.and_then(|size| u64::try_from(size).ok()) {
            sizes.insert(Oid(row.unsigned("oid")?), size);
        }
    }
    Ok(Some(sizes))
}

/// Runs a query whose refusal for want of rights is an answer too.
async fn permitted(session: &Session, sql: &str) -> Result<Option<Vec<Row>>, SourceError> {
    match session.query(sql, &[]).await {
        Ok(rows) => Ok(Some(rows)),
        Err(error) if error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
