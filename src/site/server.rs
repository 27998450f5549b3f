//! One server of a site: whether it answers, what the role may do, whose data directory is on this host.
//!
//! Rights are asked for before anything that takes them, so that a role without them gets one line and a GRANT, and
//! not the refusal of some query.

use std::path::{Path, PathBuf};

use crate::backup::{
    ArchiverStatus, BackupSource, ServerFacts, SourceError, Tablespace, check_directory, read_identity,
};
use crate::disk::CloneMarker;
use crate::pg::MajorVersion;
use crate::replication::{ConnectOptions, Error as SessionError, Session};
use crate::repo::{ClusterId, Error as RepoError, Membership, Repository};
use crate::site::data_files::{self, check_data_files};
use crate::site::item::{Item, describe};
use crate::site::receiving::{check_receiving, check_replication};
use crate::site::settings::check_settings;

/// A server and what the configuration says of it.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// How to reach it.
    pub connection: ConnectOptions,
    /// Where the files of basebackups come from.
    pub source: BackupSource,
    /// Its data directory; `None`: the one it names.
    pub data_directory: Option<PathBuf>,
    /// The name of the site, for its archive_command.
    pub site: String,
    /// The slot, where its WAL comes by streaming and not by its archive_command.
    pub slot: Option<String>,
    /// Where the site has several servers, the data directory may be on another host.
    pub has_others: bool,
}

/// What was found, and what further checks work with.
#[derive(Debug)]
pub struct CheckedServer {
    /// The lines, in order.
    pub items: Vec<Item>,
    /// The session, where there is one, and what the server told about itself.
    pub server: Option<(Session, ServerFacts)>,
}

/// The name of the line.
const DATA_DIRECTORY: &str = "data directory";

/// Connects to a server and looks at everything that needs no repository.
pub async fn check_server(options: &NodeOptions) -> CheckedServer {
    let session = match Session::connect(&options.connection).await {
        Ok(session) => session,
        Err(error) => return CheckedServer { items: vec![refused(&error)], server: None },
    };
    let mut items = Vec::new();
    let rights = check_rights(&session, options.source).await;
    let facts = ServerFacts::gather(&session).await;
    let (user, address) = (session.user(), session.address());
    let facts = match facts {
        Ok(facts) => facts,
        Err(error) => {
            items.push(Item::ok("connection", format!("user \"{user}\" at {address}")));
            items.push(rights.unwrap_or_else(|| {
                Item::failed("rights", describe(&error), error.hint().unwrap_or_else(grant_monitor))
            }));
            return CheckedServer { items, server: None };
        }
    };
    let role = if facts.identity.in_recovery { "a standby" } else { "a primary" };
    items.push(Item::ok(
        "connection",
        format!("user \"{user}\" at {address}: PostgreSQL {}, {role}", facts.version_text),
    ));
    items.push(rights.unwrap_or_else(|| rights_of(&facts)));
    match options.source {
        BackupSource::DataDirectory => items.extend(check_data_directory(options, &facts).await),
        BackupSource::Replication => {
            let path = facts.data_directory().display();
            items
                .push(Item::ok(DATA_DIRECTORY, format!("\"{path}\", which the server sends by BASE_BACKUP")));
            // Where WAL is received, the right to replicate is looked at with the slot.
            if options.slot.is_none() {
                items.push(check_replication(&options.connection).await);
            }
        }
    }
    items.extend(check_settings(&facts, &options.site, options.slot.is_some()));
    if let Some(slot) = &options.slot {
        items.extend(check_receiving(&options.connection, &session, &facts, slot).await);
    } else {
        items.push(match ArchiverStatus::ask(&session).await {
            Ok(archiver) => check_archiver(&archiver),
            Err(error) => Item::warning("archiver", describe(&error), "The message says what to mend."),
        });
    }
    CheckedServer { items, server: Some((session, facts)) }
}

/// Returns the cluster of a server.
pub fn cluster_of(facts: &ServerFacts) -> ClusterId {
    ClusterId { system_identifier: facts.identity.system_identifier, segment_size: facts.wal_segment_size }
}

/// Looks whether a cluster may write into the site.
pub async fn check_cluster(repository: &Repository, cluster: ClusterId) -> Item {
    match repository.membership(cluster).await {
        Ok(Membership::Accepted) => Item::ok("cluster", format!("{cluster} is of this site")),
        Ok(Membership::First) => Item::ok("cluster", format!("{cluster} will be the first of this site")),
        Ok(Membership::Foreign(known)) => {
            let error = RepoError::ForeignCluster { cluster, known };
            Item::failed("cluster", error.to_string(), error.hint().unwrap_or_default())
        }
        Err(error) => Item::failed("cluster", describe(&error), "The message says what to mend."),
    }
}

fn refused(error: &SessionError) -> Item {
    let hint =
        error.hint().unwrap_or_else(|| "Correct the connection in the site's configuration.".to_owned());
    Item::failed("connection", describe(error), hint)
}

fn grant_monitor() -> String {
    "Make the role a member of pg_monitor.".to_owned()
}

/// Returns the item of a role that lacks a right, with the statements that grant it.
async fn check_rights(session: &Session, source: BackupSource) -> Option<Item> {
    let functions: &[&str] = match (source, session.version()) {
        (BackupSource::Replication, _) => &["pg_switch_wal()"],
        (_, MajorVersion::V13 | MajorVersion::V14) => &[
            "pg_start_backup(text, boolean, boolean)",
            "pg_stop_backup(boolean, boolean)",
            "pg_switch_wal()",
        ],
        _ => &["pg_backup_start(text, boolean)", "pg_backup_stop(boolean)", "pg_switch_wal()"],
    };
    let asked: Vec<String> = functions
        .iter()
        .enumerate()
        .map(|(n, function)| format!("has_function_privilege('{function}', 'EXECUTE') AS f{n}"))
        .collect();
    let sql =
        format!("SELECT {}, pg_has_role('pg_read_all_settings', 'USAGE') AS settings", asked.join(", "));
    let row = match session.query_one(&sql, &[]).await {
        Ok(row) => row,
        Err(error) => return Some(Item::failed("rights", describe(&error), grant_monitor())),
    };
    let user = session.user().replace('"', "\"\"");
    let mut missing = Vec::new();
    let mut grants = Vec::new();
    if !row.bool("settings").unwrap_or(false) {
        missing.push("to read all settings".to_owned());
        grants.push(format!("GRANT pg_monitor TO \"{user}\";"));
    }
    for (n, function) in functions.iter().enumerate() {
        if !row.bool(&format!("f{n}")).unwrap_or(false) {
            missing.push(function.split('(').next().unwrap_or_default().to_owned());
            grants.push(format!("GRANT EXECUTE ON FUNCTION {function} TO \"{user}\";"));
        }
    }
    let detail = format!("user \"{user}\" lacks the right {}", missing.join(", "));
    let hint = format!("As a superuser, in the database of the connection: {}", grants.join(" "));
    (!missing.is_empty()).then(|| Item::failed("rights", detail, hint))
}

fn rights_of(facts: &ServerFacts) -> Item {
    if facts.unreadable.is_empty() {
        return Item::ok("rights", "basebackups, WAL switches and all settings");
    }
    let detail =
        format!("basebackups and WAL switches; the role may not see {}", facts.unreadable.join(", "));
    Item::warning("rights", detail, "A member of pg_monitor with EXECUTE on pg_show_all_file_settings() may.")
}

/// Looks at the data directory, on a thread that may wait for its volumes: thousands of files are opened, and meanwhile
/// the session goes on.
async fn check_data_directory(options: &NodeOptions, facts: &ServerFacts) -> Vec<Item> {
    let path = options.data_directory.as_deref().unwrap_or_else(|| facts.data_directory()).to_owned();
    let (may_be_elsewhere, facts) = (options.has_others, facts.clone());
    let looked = tokio::task::spawn_blocking(move || {
        if may_be_elsewhere && !path.exists() {
            let detail = format!("\"{}\" is not on this host", path.display());
            let hint = "No basebackup is taken from this node here.";
            return vec![Item::warning(DATA_DIRECTORY, detail, hint)];
        }
        look_at_data_directory(&path, &facts)
    });
    looked.await.unwrap_or_else(|error| {
        vec![Item::failed(
            DATA_DIRECTORY,
            format!("internal error: {error}"),
            "Report it: walden is at fault.",
        )]
    })
}

/// Looks whether a directory is this server's, and can be read with all its tablespaces.
fn look_at_data_directory(path: &Path, facts: &ServerFacts) -> Vec<Item> {
    let (directory, files) = match judge_directory(path, facts) {
        Ok(()) => {
            let version = format!("PG_{}_{}", facts.version.number(), facts.catalog_version);
            let directory = Item::ok(DATA_DIRECTORY, format!("\"{}\" is this server's", path.display()));
            (directory, check_data_files(path, &version))
        }
        Err((detail, hint)) => {
            let files = Item::skipped(data_files::NAME, "the data directory has to be right first");
            (Item::failed(DATA_DIRECTORY, detail, hint), files)
        }
    };
    vec![directory, check_tablespaces(&facts.tablespaces), files]
}

fn judge_directory(path: &Path, facts: &ServerFacts) -> Result<(), (String, String)> {
    let run_as = || {
        "Name the server's own data directory, and run walden as the user that PostgreSQL runs as, or as root."
            .to_owned()
    };
    if let Ok(Some(marker)) = CloneMarker::detect(path) {
        let detail = format!("\"{}\" is the clone \"{}\"", path.display(), marker.name);
        return Err((detail, "A clone is not backed up; name the server it was made from.".to_owned()));
    }
    let identity = read_identity(path).map_err(|error| (describe(&error), run_as()))?;
    check_directory(&facts.identity, &identity)
        .map_err(|error: SourceError| (describe(&error), error.hint().unwrap_or_else(run_as)))?;
    let base = path.join("base");
    std::fs::read_dir(&base)
        .map(drop)
        .map_err(|error| (format!("could not list \"{}\": {error}", base.display()), run_as()))
}

fn check_tablespaces(tablespaces: &[Tablespace]) -> Item {
    let outside: Vec<&Tablespace> = tablespaces.iter().filter(|tablespace| !tablespace.in_place).collect();
    for tablespace in &outside {
        if let Err(error) = std::fs::read_dir(&tablespace.location) {
            let (name, location) = (&tablespace.name, tablespace.location.display());
            let detail = format!("could not list \"{location}\" of tablespace \"{name}\": {error}");
            return Item::failed("tablespaces", detail, "Make the directory readable for this user.");
        }
    }
    match outside.len() {
        0 => Item::ok("tablespaces", "none outside the data directory"),
        count => Item::ok("tablespaces", format!("{count} outside the data directory, readable")),
    }
}

fn check_archiver(archiver: &ArchiverStatus) -> Item {
    let archived = archiver.last_archived_wal.as_deref().unwrap_or("nothing yet");
    match (&archiver.last_failed_wal, archiver.last_failed_at) {
        (Some(segment), Some(at)) if archiver.last_archived_at.is_none_or(|archived| archived < at) => {
            let detail = format!("it failed with {segment} at {at}; archived so far: {archived}");
            Item::warning("archiver", detail, "The server's log has what the archive_command said.")
        }
        _ => Item::ok("archiver", format!("{} files archived, the last {archived}", archiver.archived_count)),
    }
}
