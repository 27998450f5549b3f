//! Archives again what a check has missed or found damaged and the server still has.
//!
//! What is damaged stays where it is; the server's segment is archived in its place, as `wal push --force` does, and
//! only while the one that readers get cannot be verified: what is sound and merely differs is somebody's decision.
//! Only files that PostgreSQL itself has marked for the archive, done or not, or has completed by its control file
//! (`written`): anything else that bears the name of a segment is still being written, or waits to be reused. Each goes
//! through the same checks as in the archive_command.

use std::fs;
use std::path::Path;

use crate::codec::Compression;
use crate::pg::ArchiveFileName;
use crate::repo::wal_object::Archived;
use crate::repo::{ClusterId, Repository};
use crate::wal::Error;
use crate::wal::data_directory::{cluster_of, read_control_file};
use crate::wal::push::{OnConflict, check_file, push};

use super::ClusterFindings;
use super::written::Written;

/// What a repair has done.
#[derive(Debug, Default)]
pub struct Repaired {
    /// The files that are in the archive now.
    pub archived: Vec<String>,
    /// The segments that supersede a damaged one of their name now.
    pub replaced: Vec<String>,
    /// The files that are there and could not be archived, and why.
    pub refused: Vec<(String, String)>,
}

/// Returns the cluster of a data directory.
pub fn cluster_of_directory(data_directory: &Path) -> Result<ClusterId, Error> {
    Ok(cluster_of(&read_control_file(data_directory)?))
}

/// A file that a check asks for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    name: ArchiveFileName,
    /// Whether there is one in the archive, and it is damaged.
    is_damaged: bool,
}

/// Archives what is missing or damaged of `findings`, as far as the data directory of that cluster has it.
///
/// # Errors
/// Where the directory cannot be read, or the store does not answer.
pub async fn repair(
    repository: &Repository,
    findings: &ClusterFindings,
    data_directory: &Path,
    compression: Compression,
) -> Result<Repaired, Error> {
    let mut repaired = Repaired::default();
    for Wanted { name, is_damaged } in wanted(findings, data_directory)? {
        let path = data_directory.join("pg_wal").join(name.to_string());
        let on_conflict = if is_damaged { OnConflict::Mend } else { OnConflict::Refuse };
        let archived = match check_file(&path) {
            Ok(file) => push(repository, &file, compression, on_conflict).await,
            Err(error) => Err(error),
        };
        match archived {
            // Read once more it was sound, or somebody else was faster.
            Ok(Archived::Identical) if is_damaged => {}
            Ok(_) if is_damaged => repaired.replaced.push(name.to_string()),
            Ok(_) => repaired.archived.push(name.to_string()),
            Err(error) if error.kind() == crate::wal::ErrorKind::Retry => return Err(error),
            Err(error) => repaired.refused.push((name.to_string(), error.to_string())),
        }
    }
    Ok(repaired)
}

/// Lists the files of `pg_wal` that the archive lacks or has damaged: histories first, then in the order of their names.
fn wanted(findings: &ClusterFindings, data_directory: &Path) -> Result<Vec<Wanted>, Error> {
    let pg_wal = data_directory.join("pg_wal");
    let io = |source| Error::Unreadable { path: pg_wal.clone(), source };
    let written = Written::of(data_directory)?;
    let mut wanted = Vec::new();
    for entry in fs::read_dir(&pg_wal).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let Some(Ok(name)) = name.to_str().map(str::parse::<ArchiveFileName>) else { continue };
        let is_damaged = match name {
            ArchiveFileName::Segment(segment) => findings.examined.is_damaged(segment),
            _ => false,
        };
        let is_missing = match name {
            ArchiveFileName::Segment(segment) => findings.continuity.lacks(segment),
            ArchiveFileName::History(timeline) => findings.continuity.missing_histories.contains(&timeline),
            ArchiveFileName::Partial(_) | ArchiveFileName::BackupHistory { .. } => false,
        };
        let marked = ["ready", "done"]
            .iter()
            .any(|mark| pg_wal.join("archive_status").join(format!("{name}.{mark}")).exists());
        let complete = match name {
            ArchiveFileName::Segment(segment) => marked || written.covers(segment),
            // From the moment it has its name.
            ArchiveFileName::History(_) => true,
            _ => false,
        };
        if (is_missing || is_damaged) && complete {
            wanted.push(Wanted { name, is_damaged });
        }
    }
    wanted
        .sort_by_key(|wanted| (!matches!(wanted.name, ArchiveFileName::History(_)), wanted.name.to_string()));
    Ok(wanted)
}
