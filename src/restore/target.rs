//! Whether directories may be restored into: facts looked up first, then decided, all before anything is written.
//!
//! What is in a directory is somebody's, so it stays unless the user names a way to deal with it, and even `--force`
//! replaces only what Walden itself has restored there (failure 25).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::{Owner, Space, private_area, state_file};
use crate::pg::{ControlFile, SystemIdentifier};
use crate::repo::{BasebackupId, ClusterId};
use crate::restore::Error;
use crate::restore::destinations::Destinations;
use crate::restore::plan::Existing;
use crate::restore::server::{Server, server_in};

/// The file in a restored data directory that says who put it there.
pub const MARKER_FILE_NAME: &str = "walden.restore.json";
/// The plan of an unfinished restore, in its private area; without it nothing has begun.
pub(crate) const STATE_FILE_NAME: &str = "restore.json";
/// How a restore goes on whose server runs before everything is there, beside its plan; plain ones have none.
pub(crate) const INSTANT_FILE_NAME: &str = "instant.json";

/// What a restored directory says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreMarker {
    /// Version of this file, 1.
    pub format: u32,
    /// The basebackup it was restored from.
    pub basebackup: BasebackupId,
    /// The cluster.
    pub cluster: ClusterId,
    /// Where it was restored to.
    pub destinations: Destinations,
}

/// Where an unfinished restore writes: of its plan what every release can read.
#[derive(Debug, Deserialize)]
struct Begun {
    destinations: Destinations,
}

/// What is known of a data directory to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetFacts {
    /// Who owns it, where it exists.
    pub owner: Option<Owner>,
    /// Whether anything is in it.
    pub filled: bool,
    /// Whether a restore of it has not ended.
    pub unfinished: bool,
    /// Where that restore writes, as far as its plan can be read.
    pub begun: Option<Destinations>,
    /// What a restore has left there.
    pub marker: Option<RestoreMarker>,
    /// The cluster whose data directory it is.
    pub cluster: Option<SystemIdentifier>,
    /// The server that runs there, or may.
    pub server: Option<Server>,
}

/// The type of Walden's own mounts.
const MOUNT_TYPE: &str = "fuse.walden";
/// Every fresh ext4 file system has it.
const LOST_AND_FOUND: &str = "lost+found";

impl TargetFacts {
    /// Looks a directory up.
    pub fn of(path: &Path) -> Result<Self, Error> {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Error::at("look up", path)(error)),
            Ok(metadata) if !metadata.is_dir() => {
                return Err(Error::Unfit { path: path.to_owned(), what: "not a directory".to_owned() });
            }
            Ok(_) => {}
        }
        let control = fs::read(path.join("global/pg_control")).unwrap_or_default();
        let control = ControlFile::parse(&control).ok();
        let state = path.join(private_area::DIRECTORY_NAME).join(STATE_FILE_NAME);
        let begun: Option<Begun> = state_file::read_document(&state, "the plan of a restore").ok();
        let marker = state_file::read_document(&path.join(MARKER_FILE_NAME), "the marker of a restore").ok();
        Ok(Self {
            owner: Some(Owner::of(path)?),
            filled: is_filled(path)?,
            unfinished: state.exists(),
            begun: begun.map(|begun| begun.destinations),
            marker,
            cluster: control.map(|control| control.system_identifier),
            server: server_in(path),
        })
    }

    /// Decides whether the basebackup of a cluster may be restored there.
    pub fn decide(
        &self,
        path: &Path,
        existing: Existing,
        cluster: ClusterId,
        user: Owner,
    ) -> Result<(), Error> {
        let path = path.to_owned();
        if let Some(server) = self.server {
            return Err(server.refusal(&path));
        }
        if let Some(owner) = self.owner.filter(|owner| !user.is_root() && owner.uid != user.uid) {
            return Err(Error::Owner { path, owner: owner.uid, user: user.uid });
        }
        match existing {
            _ if !self.filled => Ok(()),
            Existing::Refuse if self.unfinished => Err(Error::Unfinished { path }),
            Existing::Refuse => Err(Error::NotEmpty { path }),
            Existing::Replace if self.unfinished => Ok(()),
            Existing::Replace => self.decide_by_marker(path, cluster.system_identifier),
            Existing::Delta => match (self.cluster, &self.marker) {
                (Some(found), _) if found == cluster.system_identifier => Ok(()),
                (Some(found), _) => {
                    Err(Error::OtherCluster { path, reason: format!("its system identifier is {found}") })
                }
                (None, Some(marker)) if marker.cluster == cluster => Ok(()),
                (None, _) if self.unfinished => Ok(()),
                (None, _) => {
                    Err(Error::OtherCluster { path, reason: "it has no global/pg_control".to_owned() })
                }
            },
        }
    }
}

impl TargetFacts {
    /// Decides whether Walden has restored what is there. The marker is a file like any other: a copy of the directory
    /// has it, whether made with `cp` or with `pg_basebackup`.
    fn decide_by_marker(&self, path: PathBuf, cluster: SystemIdentifier) -> Result<(), Error> {
        let Some(marker) = &self.marker else { return Err(Error::NotRestored { path }) };
        let restored = marker.cluster.system_identifier;
        if marker.destinations.data != path {
            let of = format!("\"{}\"", marker.destinations.data.display());
            return Err(Error::StrangeMarker { path, of });
        }
        let there = self.cluster.unwrap_or(restored);
        match [there, cluster].into_iter().find(|other| *other != restored) {
            Some(other) => {
                Err(Error::StrangeMarker { path, of: format!("cluster {restored}, not of {other}") })
            }
            None => Ok(()),
        }
    }
}

/// Decides whether what is in the destinations may be replaced: before a restore is planned, and again once it holds
/// them, because planning takes time and others come to the same directories.
///
/// `source` is the data directory of the source, where that is on this host: a copy of it has its links, and these lead
/// to the source's tablespaces (failure 27b).
pub fn check_existing(
    destinations: &Destinations,
    existing: Existing,
    cluster: ClusterId,
    user: Owner,
    source: Option<&Path>,
) -> Result<(), Error> {
    let facts = TargetFacts::of(&destinations.data)?;
    facts.decide(&destinations.data, existing, cluster, user)?;
    let source = source.map(resolve).filter(|source| *source != destinations.data);
    for (oid, path) in &destinations.tablespaces {
        let of_source = source.as_ref().is_some_and(|source| is_linked_tablespace(source, *oid, path));
        let own = !of_source && is_own_tablespace(&facts, &destinations.data, *oid, path);
        decide_part(path, existing, own, user)?;
    }
    match &destinations.configuration {
        // Files of the same name are replaced, and nothing else is touched.
        Some(place) => decide_part(&place.directory, existing, true, user),
        None => Ok(()),
    }
}

/// Decides whether a tablespace or the configuration may be restored into a directory.
///
/// `own` says that what is there belongs to what is in the data directory, so that its fate is decided with it.
fn decide_part(path: &Path, existing: Existing, own: bool, user: Owner) -> Result<(), Error> {
    let facts = TargetFacts::of(path)?;
    let path = path.to_owned();
    if let Some(owner) = facts.owner.filter(|owner| !user.is_root() && owner.uid != user.uid) {
        return Err(Error::Owner { path, owner: owner.uid, user: user.uid });
    }
    match existing {
        _ if !facts.filled => Ok(()),
        Existing::Refuse => Err(Error::NotEmpty { path }),
        Existing::Replace | Existing::Delta if own => Ok(()),
        Existing::Replace | Existing::Delta => Err(Error::NotRestored { path }),
    }
}

/// Returns whether a tablespace's directory is the one that the data directory uses now, or that an unfinished restore of
/// it is filling: links and marker come last.
pub fn is_own_tablespace(facts: &TargetFacts, data: &Path, oid: u32, path: &Path) -> bool {
    let of_marker = facts.marker.iter().map(|marker| &marker.destinations);
    let mut known = of_marker.chain(&facts.begun).filter(|known| known.data == data);
    known.any(|known| known.tablespaces.get(&oid).is_some_and(|known| known == path))
        || is_linked_tablespace(data, oid, path)
}

/// Returns whether a data directory has a link to the directory of a tablespace.
fn is_linked_tablespace(data: &Path, oid: u32, path: &Path) -> bool {
    fs::canonicalize(data.join("pg_tblspc").join(oid.to_string())).is_ok_and(|linked| linked == path)
}

/// Refuses a place on a mount of Walden's, or one that has to stay apart from what is given.
pub fn check_place(path: &Path, apart_from: &[(PathBuf, String)]) -> Result<(), Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mount_type_of(path, &mounts).is_some_and(|kind| kind == MOUNT_TYPE) {
        return Err(Error::Unfit { path: path.to_owned(), what: "on a mount of walden".to_owned() });
    }
    for (other, what) in apart_from {
        let other = resolve(other);
        if path.starts_with(&other) || other.starts_with(path) {
            let other = format!("{what} in \"{}\"", other.display());
            return Err(Error::Overlap { path: path.to_owned(), other });
        }
    }
    Ok(())
}

/// Refuses where the file systems have too little room; each place comes with the bytes it needs more than it has.
pub fn check_space(needs: &[(PathBuf, u64)]) -> Result<(), Error> {
    let mut systems: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (path, needed) in needs {
        let existing = nearest_existing(path);
        let device = fs::metadata(existing).map_err(Error::at("look up", existing))?.dev();
        match systems.iter_mut().find(|(known, ..)| *known == device) {
            Some((.., sum)) => *sum += needed,
            None => systems.push((device, path.clone(), *needed)),
        }
    }
    for (_, path, needed) in systems {
        let free = Space::at(nearest_existing(&path))?.free_bytes;
        if free < needed {
            return Err(Error::NoSpace { path, needed, free });
        }
    }
    Ok(())
}

/// Returns the path with every link in its existing part resolved.
pub fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // A dead mount is there as well, though whoever looks is told that it is not.
    if let Ok(real) = fs::canonicalize(&absolute) {
        return real;
    }
    let existing = nearest_existing(&absolute);
    let real = fs::canonicalize(existing).unwrap_or_else(|_| existing.to_owned());
    match absolute.strip_prefix(existing) {
        Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
        _ => real,
    }
}

/// Returns the bytes that the files in a directory take.
pub fn used_bytes(path: &Path) -> u64 {
    let mut used = 0;
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                Ok(metadata) => used += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    used
}

fn nearest_existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}

fn is_filled(path: &Path) -> Result<bool, Error> {
    let mut entries = fs::read_dir(path).map_err(Error::at("list", path))?;
    let begun = || path.join(private_area::DIRECTORY_NAME).join(STATE_FILE_NAME).exists();
    let counts = |entry: fs::DirEntry| {
        let name = entry.file_name();
        name != LOST_AND_FOUND && (name != private_area::DIRECTORY_NAME || begun())
    };
    Ok(entries.any(|entry| entry.map_or(true, counts)))
}

/// Returns the type of the file system that a path is on, from the lines of `/proc/self/mountinfo`.
fn mount_type_of<'a>(path: &Path, mounts: &'a str) -> Option<&'a str> {
    let fields = |line: &'a str| {
        let (mount, system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(point), system.split(' ').next()?))
    };
    let above = mounts.lines().filter_map(fields).filter(|(point, _)| path.starts_with(point));
    // Of several mounts on one point the last one is seen.
    above.max_by_key(|(point, _)| point.components().count()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: Owner = Owner { uid: 1000, gid: 1000 };
    const ROOT: Owner = Owner { uid: 0, gid: 0 };

    fn cluster() -> ClusterId {
        "7301234567890123456-16".parse().unwrap()
    }

    fn decide(facts: &TargetFacts, existing: Existing, user: Owner) -> Result<(), String> {
        facts.decide(Path::new("/t"), existing, cluster(), user).map_err(|error| error.to_string())
    }

    /// Failure 25, for the data directory.
    #[test]
    fn what_is_in_a_directory_stays_unless_it_is_known_what_it_is() {
        let full = TargetFacts { owner: Some(USER), filled: true, ..TargetFacts::default() };
        let unfinished = TargetFacts { unfinished: true, ..full.clone() };
        let same = TargetFacts { cluster: Some(cluster().system_identifier), ..full.clone() };
        let other = TargetFacts { cluster: Some("7".parse().unwrap()), ..full.clone() };
        for (facts, existing, message) in [
            (&TargetFacts::default(), Existing::Refuse, None),
            (&full, Existing::Refuse, Some("\"/t\" is not empty")),
            (&full, Existing::Replace, Some("\"/t\" is not empty, and was not restored by walden")),
            (&full, Existing::Delta, Some("it has no global/pg_control")),
            (&unfinished, Existing::Refuse, Some("\"/t\" holds an unfinished restore")),
            (&unfinished, Existing::Replace, None),
            (&unfinished, Existing::Delta, None),
            (&same, Existing::Delta, None),
            (&same, Existing::Replace, Some("not restored by walden")),
            (&other, Existing::Delta, Some("its system identifier is 7")),
        ] {
            match (decide(facts, existing, USER), message) {
                (Ok(()), None) => {}
                (Err(error), Some(part)) => assert!(error.contains(part), "{error}"),
                (outcome, _) => panic!("{facts:?} {existing:?}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn neither_a_running_server_nor_another_users_directory_is_touched() {
        let running = TargetFacts {
            server: Some(Server::Running(7)),
            filled: true,
            unfinished: true,
            ..TargetFacts::default()
        };
        for existing in [Existing::Refuse, Existing::Replace, Existing::Delta] {
            assert!(decide(&running, existing, ROOT).unwrap_err().contains("process 7"));
        }
        let root = TargetFacts { owner: Some(ROOT), ..TargetFacts::default() };
        assert!(decide(&root, Existing::Refuse, USER).unwrap_err().contains("belongs to user 0"));
        assert_eq!(decide(&root, Existing::Refuse, ROOT), Ok(()));
    }

    #[test]
    fn a_mount_of_waldens_is_recognized_by_the_innermost_mount() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n\
                      2 1 0:5 / /mnt/my\\040site rw shared:1 - fuse.walden walden rw\n\
                      3 2 8:2 / /mnt/my\\040site/disk rw - xfs /dev/b rw\n";
        for (path, kind) in [
            ("/var/lib", "ext4"),
            ("/mnt/my site/latest/data", "fuse.walden"),
            ("/mnt/my site/disk/x", "xfs"),
        ] {
            assert_eq!(mount_type_of(Path::new(path), mounts), Some(kind), "{path}");
        }
    }

    #[test]
    fn a_place_is_apart_from_the_repository_in_both_directions() {
        let scratch = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(scratch.path()).unwrap();
        let repository = [(real.join("repository"), "the repository".to_owned())];
        for within in ["repository", "repository/main", ""] {
            let place = resolve(&real.join(within));
            assert!(matches!(check_place(&place, &repository), Err(Error::Overlap { .. })), "{within:?}");
        }
        check_place(&real.join("data"), &repository).unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(resolve(&real.join("link/new/data")), real.join("new/data"));
    }

    #[test]
    fn a_file_system_that_is_too_small_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("not/yet");
        check_space(&[(place.clone(), 1)]).unwrap();
        let half = Space::at(scratch.path()).unwrap().free_bytes / 2 + (1 << 30);
        let other = scratch.path().join("other");
        assert!(matches!(check_space(&[(place, half), (other, half)]), Err(Error::NoSpace { .. })));
    }
}
