//! What is in the directories already: which files may stay, and the removal of everything that does not belong.
//!
//! A delta compares files with the CRC of PostgreSQL's own `backup_manifest`: page maps carry no digest of a page that
//! could be compared without fetching it (decision 0701). A file whose CRC and size are the same stays unread by the
//! store; of one that differs only the pages that differ are written. An unfinished restore goes by its journal.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;

use crate::codec::CpuPool;
use crate::disk::{Owner, private_area};
use crate::pg::Crc32cDigest;
use crate::repo::entry::{Entry, Node, TreePath};
use crate::repo::{self, Basebackup, FileReader};
use crate::restore::Error;
use crate::restore::destinations::Destinations;
use crate::restore::file_writer::set_attributes;
use crate::restore::shape::Shape;

/// What may stay of what is there, by number in the file table.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Staying {
    /// Files that are complete.
    pub complete: HashSet<u64>,
    /// Files of which some pages may be right.
    pub in_place: HashSet<u64>,
}

/// The server's manifest, as far as it is needed.
#[derive(Debug, Deserialize)]
struct ServerManifest {
    #[serde(rename = "Files")]
    files: Vec<ManifestFile>,
}

#[derive(Debug, Deserialize)]
struct ManifestFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

/// A file takes about 150 bytes: seven million files. It is read whole, and its size is what a basebackup says.
const MANIFEST_BYTES_MAX: u64 = 1 << 30;
const READ_BYTES: usize = 1 << 20;
const LOST_AND_FOUND: &str = "lost+found";

/// Finds what an unfinished restore has completed.
pub(super) fn staying_by_journal(
    complete: HashSet<u64>,
    sizes: &HashMap<u64, u64>,
    shape: &Shape,
) -> Staying {
    let there = |(path, number): (&PathBuf, &u64)| {
        let same = fs::symlink_metadata(path)
            .is_ok_and(|metadata| metadata.is_file() && Some(&metadata.len()) == sizes.get(number));
        (same && complete.contains(number)).then_some(*number)
    };
    Staying { complete: shape.files.iter().filter_map(there).collect(), in_place: HashSet::new() }
}

/// Compares what is there with the basebackup; what stays gets its owner, mode and time, as if it had been written.
pub(super) async fn staying_by_content(
    reader: &FileReader,
    shape: &Shape,
    destinations: &Destinations,
    owner: Owner,
    pool: &CpuPool,
) -> Result<Staying, Error> {
    let basebackup = reader.basebackup();
    let checksums = manifest_checksums(reader).await?;
    let mut candidates: Vec<Candidate> = Vec::new();
    let consider = |number, entry: &Entry| {
        if let (Node::File { size, .. }, Some(path)) = (&entry.node, destinations.place(&entry.path)?)
            && shape.files.get(&path) == Some(&number)
        {
            let checksum = server_path(&entry.path).and_then(|path| checksums.get(&path).cloned());
            let (size, mode, modified) = (*size, entry.mode, entry.modified);
            candidates.push(Candidate { number, path, size, mode, modified, checksum });
        }
        Ok::<_, Error>(())
    };
    basebackup.visit_entries(consider).await?;
    let compared = candidates.into_iter().map(|candidate| async move {
        let number = candidate.number;
        let state = pool.run(move || candidate.settle(owner)).await??;
        Ok::<_, Error>((number, state))
    });
    let mut compared = futures::stream::iter(compared).buffer_unordered(pool.threads() * 2);
    let mut staying = Staying::default();
    while let Some(found) = compared.next().await {
        match found? {
            (number, State::Same) => drop(staying.complete.insert(number)),
            (number, State::Differs) => drop(staying.in_place.insert(number)),
            (_, State::Absent) => {}
        }
    }
    Ok(staying)
}

/// Removes everything in the destinations that is neither a directory of the basebackup nor a file that stays.
///
/// The configuration's directory is the host's, and only files of the basebackup's names are removed in it. A tablespace's
/// directory is shared with clusters of other major versions, as pg_upgrade leaves it: only the folder that the basebackup
/// has there is its own.
pub(super) fn clear(destinations: &Destinations, shape: &Shape, staying: &Staying) -> Result<(), Error> {
    let directories = shape.directory_set();
    let stays = |path: &Path| {
        let number = shape.files.get(path);
        number.is_some_and(|n| staying.complete.contains(n) || staying.in_place.contains(n))
    };
    let tablespaces = destinations.tablespaces.values().map(|root| (root, true));
    for (root, is_shared) in std::iter::once((&destinations.data, false)).chain(tablespaces) {
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(Error::at("list", &folder))? {
                let entry = entry.map_err(Error::at("list", &folder))?;
                let (path, kind) = (entry.path(), entry.file_type().map_err(Error::at("look up", &folder))?);
                let name = entry.file_name();
                let spared = match is_shared {
                    true => !directories.contains(&*path),
                    false => {
                        kind.is_dir() && (name == private_area::DIRECTORY_NAME || name == LOST_AND_FOUND)
                    }
                };
                match kind.is_dir() {
                    _ if spared && folder == *root => {}
                    true if directories.contains(&*path) => folders.push(path),
                    true => fs::remove_dir_all(&path).map_err(Error::at("remove", &path))?,
                    false if kind.is_file() && stays(&path) => {}
                    false => fs::remove_file(&path).map_err(Error::at("remove", &path))?,
                }
            }
        }
    }
    let configuration = destinations.configuration.as_ref().map(|place| &*place.directory);
    let replaced = shape.files.keys().filter(|path| configuration.is_some_and(|root| path.starts_with(root)));
    for path in replaced.filter(|path| !stays(path)) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::at("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

enum State {
    Absent,
    Same,
    Differs,
}

/// A file of the basebackup whose place is to be looked at.
struct Candidate {
    number: u64,
    path: PathBuf,
    size: u64,
    mode: u32,
    modified: Timestamp,
    checksum: Option<String>,
}

impl Candidate {
    /// Compares, and where nothing differs sets what belongs to the file beside its content.
    fn settle(&self, owner: Owner) -> Result<State, Error> {
        let path = &*self.path;
        let open = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
        // Absent, not a file, or one that cannot be read: it is made anew.
        let Ok(mut file) = open else { return Ok(State::Absent) };
        let metadata = file.metadata().map_err(Error::at("look up", path))?;
        // One that has another name is somebody's copy, made with `cp -al` or `rsync --link-dest`.
        if !metadata.is_file() || metadata.nlink() > 1 {
            return Ok(State::Absent);
        }
        if metadata.len() == self.size
            && self.checksum.is_some()
            && self.checksum == Some(crc_of(&mut file, path)?)
        {
            return match set_attributes(&file, path, owner, self.mode, self.modified) {
                // Somebody else's: in a directory of ours it can still be made anew.
                Err(Error::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                    Ok(State::Absent)
                }
                set => set.map(|()| State::Same),
            };
        }
        Ok(if metadata.uid() == owner.uid { State::Differs } else { State::Absent })
    }
}

/// Reads a file to its end, and returns its CRC as the server's manifest has it.
fn crc_of(file: &mut File, path: &Path) -> Result<String, Error> {
    let mut digest = Crc32cDigest::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer).map_err(Error::at("read", path))? {
            0 => return Ok(digest.finish().manifest_hex()),
            count => digest.update(&buffer[..count]),
        }
    }
}

/// Reads the CRCs of the server's manifest, by the path that the server calls a file.
async fn manifest_checksums(reader: &FileReader) -> Result<HashMap<Vec<u8>, String>, Error> {
    let path = TreePath::new("data/backup_manifest").map_err(|error| Error::Internal(error.to_string()))?;
    let found: Option<(u64, Entry)> = reader.basebackup().entry(&path).await?;
    let Some((_, entry)) = found else { return Ok(HashMap::new()) };
    if entry.size() > MANIFEST_BYTES_MAX {
        tracing::warn!("{path} has {} bytes and is not read: every file is fetched", entry.size());
        return Ok(HashMap::new());
    }
    let text = reader.read(&entry, 0..entry.size()).await?;
    let manifest: ServerManifest = serde_json::from_slice(&text)
        .map_err(|error| repo::Error::Damaged { object: path.to_string(), detail: error.to_string() })?;
    let checksum = |file: ManifestFile| {
        let path = match (file.path, file.encoded_path) {
            (Some(path), _) => path.into_bytes(),
            (None, encoded) => hex::decode(encoded?).ok()?,
        };
        (file.algorithm.as_deref() == Some("CRC32C")).then_some((path, file.checksum?))
    };
    Ok(manifest.files.into_iter().filter_map(checksum).collect())
}

/// Returns what the server calls a path of the tree, relative to its data directory.
fn server_path(path: &TreePath) -> Option<Vec<u8>> {
    if let Some(below) = path.strip(b"data") {
        return Some(below.to_vec());
    }
    let below = path.strip(b"tablespaces")?;
    Some([b"pg_tblspc/", below].concat())
}

/// Returns the sizes of all files by number.
pub(super) async fn sizes(basebackup: &Basebackup) -> Result<HashMap<u64, u64>, Error> {
    let mut sizes = HashMap::new();
    let note = |number, entry: &Entry| {
        sizes.insert(number, entry.size());
        Ok::<_, Error>(())
    };
    basebackup.visit_entries(note).await?;
    Ok(sizes)
}
