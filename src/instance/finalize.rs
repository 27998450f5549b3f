//! Makes an ordinary data directory of a clone that is whole and stopped.
//!
//! An order is written into the folder first; from then on the clone cannot be started, only finalized, however often
//! this is killed. Its steps follow from it and can each be taken again:
//!
//! ```text
//! bring the trees → bring the WAL → lead links there → settings, marker → forget origins → sync → remove copies' originals
//!   → release
//! ```
//! The release is last: until then PG_VERSION and pg_control are held back, and nothing can start what is not whole.
//! After it nothing in the directory is touched any more, for somebody may have started it. As long as the clone has its
//! data, nothing was released, whatever stands in the place. Deliberately absent: hydration and stopping, which are the
//! supervisor's, the order (`finalize_plan`), the way of a tree (`bring`), and the pin, which is the store's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::durable::{self, Create};
use crate::disk::{self, Owner, PrivateArea, clone_marker, private_area};
use crate::instance::bring::{bring, bring_wal, is_copy_of};
use crate::instance::isolation::config_files;
use crate::instance::native_settings::{AUTO_CONF, CONF, HBA_FILE, IDENT_FILE, naming_itself, with_block};
use crate::instance::places::{at, is_plain_file, is_there, read_plain, remove};
use crate::mount::upper::forget_origins;
use crate::repo::lease::Pin;
use crate::restore;

/// What is made of a clone, and where; written before the first step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinalizeOrder {
    /// Version of this file, 1.
    pub format: u32,
    /// The clone.
    pub name: String,
    /// The site it was made from.
    pub site: String,
    /// Whom the directory belongs to: user and group.
    pub owner: (u32, u32),
    /// The data directory.
    pub data: TreeMove,
    /// Its WAL, which was kept apart.
    pub wal: PathBuf,
    /// Its tablespaces.
    pub tablespaces: Vec<TablespaceMove>,
    /// What its server is told.
    pub settings: Vec<(String, String)>,
    /// Whether it may archive.
    pub is_adopted: bool,
    /// Whether a rename does not reach the place.
    pub is_copied: bool,
    /// What keeps the basebackup, to be ended last.
    pub pin: Option<Pin>,
}

/// A tree and its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeMove {
    /// Where it is in the clone.
    pub from: PathBuf,
    /// Where it is to be.
    pub to: PathBuf,
}

/// A tablespace, by its name in `pg_tblspc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TablespaceMove {
    /// The name of its link, which is its OID.
    pub oid: String,
    /// The tree.
    pub tree: TreeMove,
}

/// Why a step could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FinalizeError {
    /// A file.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Something that a whole clone has is not there.
    #[error("\"{}\" is missing, and the clone is not whole without it", path.display())]
    Missing { path: PathBuf },
    /// Something is at the place.
    #[error("\"{}\" exists and is not an empty directory", path.display())]
    Taken { path: PathBuf },
    /// The place would go with a clone.
    #[error("\"{}\" is in the folder of the clones, where a name is a clone's", path.display())]
    Inside { path: PathBuf },
    /// The copy does not fit.
    #[error(transparent)]
    Space(#[from] restore::Error),
    /// Something else is to be moved or removed than what a clone has.
    #[error("\"{}\" is not in the folder of the clone itself, or a link leads there", path.display())]
    Strange { path: PathBuf },
    /// Somebody else has written what is to be done.
    #[error("\"{}\" was written by user {}", path.display(), author.user())]
    Author { path: PathBuf, author: Owner },
    /// What keeps it from reaching outside is not known.
    #[error("the clone's settings do not say of \"{setting}\" what keeps a data directory private")]
    NotPrivate { setting: &'static str },
    /// Sockets of one that stays private are in the data directory.
    #[error("the path of the socket, \"{}\", is longer than a socket's may be", .0.display())]
    SocketPath(PathBuf),
}

impl FinalizeError {
    /// Returns what the user should do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Disk(error) => return error.hint().map(str::to_owned),
            Self::Space(error) => return error.hint().map(str::to_owned),
            Self::Missing { .. } => return None,
            Self::Taken { .. } => {
                "Name a directory that is not there yet or an empty one, or move away what is there."
                    .to_owned()
            }
            Self::Inside { .. } => {
                "Name a place elsewhere, or leave --to out to have it in the folder of the clone.".to_owned()
            }
            Self::Strange { .. } => return None,
            Self::Author { .. } => "Call it as the user who began it.".to_owned(),
            Self::NotPrivate { .. } => "\"walden clone restart\" writes them down anew.".to_owned(),
            Self::SocketPath(_) => "Name a shorter path with --to.".to_owned(),
        })
    }
}

/// One step; taking it again changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// A tree comes to its place, as incomplete as it was.
    Bring { tree: TreeMove, is_copied: bool },
    /// The WAL comes into the data directory, in place of the link that led to it.
    BringWal { from: PathBuf, data: PathBuf, is_copied: bool },
    /// A tablespace's link leads to where it is now.
    Link { data: PathBuf, oid: String, target: PathBuf },
    /// Configuration files that are missing, and what the server is told.
    Configure { data: PathBuf },
    /// What only a clone has goes.
    Strip { data: PathBuf },
    /// The attributes of an upper go.
    Forget { directory: PathBuf },
    /// Everything is made durable.
    Sync { directory: PathBuf },
    /// What was copied goes.
    Remove { from: PathBuf },
    /// What is held back comes to its place, and the private area goes.
    Release { directory: PathBuf },
}

impl FinalizeOrder {
    /// Takes the steps that are left; afterwards the data directory can be started.
    pub fn carry_out(&self) -> Result<(), FinalizeError> {
        self.steps().iter().try_for_each(|step| step.take(self))
    }

    /// Returns where the directories are that this makes: data, then tablespaces.
    pub fn places(&self) -> impl Iterator<Item = &Path> {
        self.trees().map(|tree| tree.to.as_path())
    }

    /// Returns what comes there, in the same order.
    pub(super) fn trees(&self) -> impl Iterator<Item = &TreeMove> {
        std::iter::once(&self.data).chain(self.tablespaces.iter().map(|one| &one.tree))
    }

    /// Tells whether anything is in its place; until then the clone holds all of it.
    pub fn has_begun(&self) -> bool {
        // The data directory is brought first.
        !is_there(&self.data.from) || is_copy_of(&self.data)
    }

    /// Returns the steps, in order; once the data directory is released, only what may be left of that.
    pub(super) fn steps(&self) -> Vec<Step> {
        let data = || self.data.to.clone();
        // Tablespaces first: with the data directory's release all is done.
        let mut places: Vec<PathBuf> = self.places().map(Path::to_owned).collect();
        places.rotate_left(1);
        let releases = places.iter().map(|place| Step::Release { directory: place.clone() });
        // What has a version while the clone has its data is another one, which came there since.
        if is_released(&self.data.to) && !is_there(&self.data.from) {
            return releases.collect();
        }
        let bring = |tree: &TreeMove| Step::Bring { tree: tree.clone(), is_copied: self.is_copied };
        let mut steps = vec![bring(&self.data)];
        steps.extend(self.tablespaces.iter().map(|one| bring(&one.tree)));
        steps.push(Step::BringWal { from: self.wal.clone(), data: data(), is_copied: self.is_copied });
        steps.extend(self.tablespaces.iter().map(|one| Step::Link {
            data: data(),
            oid: one.oid.clone(),
            target: one.tree.to.clone(),
        }));
        steps.push(Step::Configure { data: data() });
        steps.push(Step::Strip { data: data() });
        steps.extend(places.iter().map(|place| Step::Forget { directory: place.clone() }));
        steps.extend(places.iter().map(|place| Step::Sync { directory: place.clone() }));
        steps.extend(self.trees().map(|tree| Step::Remove { from: tree.from.clone() }));
        steps.extend(releases);
        steps
    }

    fn owner(&self) -> Owner {
        Owner { uid: self.owner.0, gid: self.owner.1 }
    }
}

/// Tells whether a data directory can be started: the file comes to its place when all else has been done.
fn is_released(data: &Path) -> bool {
    data.join("PG_VERSION").exists()
}

impl Step {
    pub(super) fn take(&self, order: &FinalizeOrder) -> Result<(), FinalizeError> {
        let owner = order.owner();
        match self {
            Self::Bring { tree, is_copied } => bring(tree, *is_copied, owner),
            Self::BringWal { from, data, is_copied } => bring_wal(from, data, *is_copied, owner),
            Self::Link { data, oid, target } => lead_link(data, oid, target, owner),
            Self::Configure { data } => configure(data, order),
            Self::Strip { data } => strip(data, order.is_adopted),
            Self::Forget { directory } => {
                Ok(forget_origins(directory).map_err(at("forget the origins of", directory))?)
            }
            Self::Sync { directory } => Ok(durable::sync_file_system(directory)?),
            Self::Remove { from } => Ok(remove(from)?),
            Self::Release { directory } => {
                match PrivateArea::open(directory)? {
                    Some(area) => area.release()?,
                    None => private_area::clear_released(directory)?,
                }
                Ok(())
            }
        }
    }
}

fn lead_link(data: &Path, oid: &str, target: &Path, owner: Owner) -> Result<(), FinalizeError> {
    let link = data.join("pg_tblspc").join(oid);
    if fs::read_link(&link).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let new = temporary(data)?.join("link");
    durable::remove_file(&new)?;
    symlink(target, &new).map_err(at("create", &new))?;
    owner.give(&new)?;
    Ok(durable::rename(&new, &link)?)
}

fn configure(data: &Path, order: &FinalizeOrder) -> Result<(), FinalizeError> {
    let create = Create::PRIVATE_FILE.owned_by(order.owner());
    for (name, text) in config_files(&order.name) {
        // Those of a Debian cluster are elsewhere, and the server does not start without.
        let file = data.join(name);
        // A link leads to the source's own, which names the source's directory.
        if !is_there(&file) || name == CONF && !is_plain_file(&file) {
            // Nobody is let in without a word where the socket is not in a folder of the owner's.
            durable::write_file(&file, text.replace("trust", "peer").as_bytes(), create)?;
        }
        let own = match name {
            "pg_hba.conf" => HBA_FILE,
            "pg_ident.conf" => IDENT_FILE,
            _ => continue,
        };
        if !order.is_adopted {
            durable::write_file(&data.join(own), text.as_bytes(), create)?;
        }
    }
    let file = data.join(CONF);
    if let Some(text) = naming_itself(&read_plain(&file)?, data) {
        durable::write_file(&file, &text, create)?;
    }
    let file = data.join(AUTO_CONF);
    let text = with_block(&read_plain(&file)?, &order.settings, order.is_adopted);
    Ok(durable::write_file(&file, &text, create)?)
}

/// Removes what only a clone has; one that may not archive keeps its marker, which is what says so.
fn strip(data: &Path, is_adopted: bool) -> Result<(), FinalizeError> {
    // It names the clone's paths; pg_ctl would start by it again.
    durable::remove_file(&data.join("postmaster.opts"))?;
    if is_adopted {
        durable::remove_file(&clone_marker::path_in(data))?;
    }
    Ok(())
}

/// Returns the folder of what is on its way in the data directory, on the same file system and of no backup.
fn temporary(data: &Path) -> Result<PathBuf, FinalizeError> {
    match PrivateArea::open(data)? {
        Some(area) => Ok(area.temporary_directory()),
        None => Err(FinalizeError::Missing { path: data.join(private_area::DIRECTORY_NAME) }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::disk::Binding;

    /// A clone's folder as a stop leaves it, and the order to make a data directory of it.
    fn stopped(scratch: &Path, is_copied: bool, is_adopted: bool) -> FinalizeOrder {
        let folder = scratch.join("one");
        let (data, space) = (folder.join("upper/data"), folder.join("upper/tablespace-16385"));
        for directory in [
            &data.join("global"),
            &data.join("base/1"),
            &data.join("pg_tblspc"),
            &space.join("PG_15_202209061"),
            &folder.join("tablespaces/16400"),
            &folder.join("pg_wal/archive_status"),
        ] {
            fs::create_dir_all(directory).unwrap();
        }
        for tree in [&data, &space] {
            let area = PrivateArea::create(tree, None).unwrap();
            let (basebackup, manifest_digest) = ("20261120T101500Z-3fa9".into(), "ab12".into());
            area.bind(&Binding { basebackup, manifest_digest, part: "data".into() }).unwrap();
            fs::write(area.directory().join(private_area::WHOLE_MARK), "").unwrap();
        }
        for (file, text) in [
            (data.join(".walden/held/PG_VERSION"), "15\n"),
            (data.join(".walden/held/pg_control"), "control"),
            (data.join("base/1/1259"), "pg_class"),
            (data.join("walden.clone"), "name = one\n"),
            (data.join("postmaster.opts"), "left"),
            (data.join("postgresql.conf"), "port = 5433\n"),
            (data.join(AUTO_CONF), "work_mem = '5MB'\n"),
            (space.join("PG_15_202209061/1"), "rows"),
            (folder.join("tablespaces/16400/2"), "young rows"),
            (folder.join("pg_wal/000000020000000000000003"), "wal"),
        ] {
            fs::write(file, text).unwrap();
        }
        symlink(folder.join("pg_wal"), data.join("pg_wal")).unwrap();
        symlink(folder.join("mnt/tablespaces/16385"), data.join("pg_tblspc/16385")).unwrap();
        symlink("/srv/young", data.join("pg_tblspc/16400")).unwrap();
        let to = scratch.join("to/main");
        let tablespace = |oid: &str, from: PathBuf| TablespaceMove {
            oid: oid.to_owned(),
            tree: TreeMove { from, to: scratch.join("to/main.tablespaces").join(oid) },
        };
        let owner = Owner::current();
        FinalizeOrder {
            format: 1,
            name: "one".to_owned(),
            site: "main".to_owned(),
            owner: (owner.uid, owner.gid),
            data: TreeMove { from: data, to },
            wal: folder.join("pg_wal"),
            tablespaces: vec![
                tablespace("16385", space),
                tablespace("16400", folder.join("tablespaces/16400")),
            ],
            settings: vec![("archive_mode".to_owned(), "off".to_owned())],
            is_adopted,
            is_copied,
            pin: None,
        }
    }

    /// Names and contents below a folder, and where links lead to from it.
    fn content(folder: &Path) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let mut directories = vec![folder.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let text = if path.is_symlink() {
                    let target = fs::read_link(&path).unwrap();
                    target.strip_prefix(folder).unwrap_or(&target).display().to_string()
                } else if path.is_dir() {
                    directories.push(path.clone());
                    String::new()
                } else {
                    fs::read_to_string(&path).unwrap()
                };
                found.insert(path.strip_prefix(folder).unwrap().to_owned(), text);
            }
        }
        found
    }

    fn assert_is_a_data_directory(order: &FinalizeOrder, to: &Path) {
        let found = content(to);
        let text = |path: &str| found.get(Path::new(path)).map(String::as_str);
        assert_eq!(text("main/PG_VERSION"), Some("15\n"));
        assert_eq!(text("main/global/pg_control"), Some("control"));
        assert_eq!(text("main/base/1/1259"), Some("pg_class"));
        assert_eq!(text("main/pg_wal/000000020000000000000003"), Some("wal"));
        assert_eq!(text("main/pg_tblspc/16385"), Some("main.tablespaces/16385"));
        assert_eq!(text("main/pg_tblspc/16400"), Some("main.tablespaces/16400"));
        assert_eq!(text("main.tablespaces/16385/PG_15_202209061/1"), Some("rows"));
        assert_eq!(text("main.tablespaces/16400/2"), Some("young rows"));
        assert_eq!(text("main/postgresql.conf"), Some("port = 5433\n"), "the source's own stays");
        assert!(!text("main/pg_hba.conf").unwrap().contains("trust"));
        assert_eq!(text("main/postmaster.opts"), None);
        assert_eq!(text("main/walden.clone").is_some(), !order.is_adopted);
        assert_eq!(text("main/pg_hba.clone.conf").is_some(), !order.is_adopted);
        let settings = text("main/postgresql.auto.conf").unwrap();
        assert!(settings.starts_with("work_mem = '5MB'\n") && settings.contains("archive_mode = 'off'"));
        let is_ours = |path: &&PathBuf| {
            path.to_string_lossy().contains("walden.") || path.ends_with("pgsql_tmp.walden")
        };
        let left: Vec<_> = found.keys().filter(is_ours).collect();
        assert_eq!(left.len(), usize::from(!order.is_adopted), "{left:?}");
        assert!(!found.keys().any(|path| path.iter().any(|part| part == ".walden")));
    }

    /// Whatever was done when it was killed, nothing can be started before all of it is there, and going on ends well.
    #[test]
    fn a_kill_before_any_step_leaves_what_can_be_finalized_again() {
        for (is_copied, is_adopted) in [(false, false), (false, true), (true, false)] {
            let count = stopped(tempfile::tempdir().unwrap().path(), is_copied, is_adopted).steps().len();
            for kill in 0..=count {
                let scratch = tempfile::tempdir().unwrap();
                let order = stopped(scratch.path(), is_copied, is_adopted);
                order.steps()[..kill].iter().for_each(|step| step.take(&order).unwrap());
                if order.data.to.join("PG_VERSION").exists() {
                    assert_is_a_data_directory(&order, &scratch.path().join("to"));
                }
                order.carry_out().unwrap_or_else(|error| panic!("killed before {kill}: {error}"));
                assert_is_a_data_directory(&order, &scratch.path().join("to"));
                // And once more, as when it is killed before the clone's folder is gone.
                order.carry_out().unwrap();
                assert_is_a_data_directory(&order, &scratch.path().join("to"));
            }
        }
    }

    #[test]
    fn a_kill_within_a_copy_begins_the_copy_again() {
        let scratch = tempfile::tempdir().unwrap();
        let order = stopped(scratch.path(), true, false);
        let area = {
            fs::create_dir_all(&order.data.to).unwrap();
            PrivateArea::create(&order.data.to, None).unwrap()
        };
        fs::write(area.directory().join("begun"), order.data.from.to_str().unwrap()).unwrap();
        fs::write(area.held_directory().join("PG_VERSION"), "1").unwrap();
        fs::create_dir_all(order.data.to.join("base/1")).unwrap();
        fs::write(order.data.to.join("base/1/1259"), "pg").unwrap();
        fs::write(order.data.to.join("half"), "").unwrap();
        order.carry_out().unwrap();
        assert_is_a_data_directory(&order, &scratch.path().join("to"));
        assert!(!order.data.to.join("half").exists());
    }

    /// Once the last file is in its place somebody may start it, whatever is left of the area.
    #[test]
    fn a_kill_within_the_release_leaves_a_directory_that_is_only_tidied() {
        let scratch = tempfile::tempdir().unwrap();
        let order = stopped(scratch.path(), false, false);
        let steps = order.steps();
        let (last, others) = steps.split_last().unwrap();
        assert_eq!(*last, Step::Release { directory: order.data.to.clone() });
        others.iter().for_each(|step| step.take(&order).unwrap());
        let held = order.data.to.join(".walden/held");
        for (place, name) in private_area::HELD_BACK {
            fs::rename(held.join(name), order.data.to.join(place)).unwrap();
        }
        fs::write(order.data.to.join("postmaster.opts"), "of a server that runs").unwrap();
        order.carry_out().unwrap();
        assert!(order.data.to.join("postmaster.opts").exists());
        fs::remove_file(order.data.to.join("postmaster.opts")).unwrap();
        assert_is_a_data_directory(&order, &scratch.path().join("to"));
    }

    #[test]
    fn what_was_released_is_left_to_its_user() {
        for is_copied in [false, true] {
            let scratch = tempfile::tempdir().unwrap();
            let order = stopped(scratch.path(), is_copied, false);
            order.carry_out().unwrap();
            let file = order.data.to.join("base/1/1259");
            fs::write(&file, "written by a server that runs").unwrap();
            fs::write(order.data.to.join("postmaster.pid"), "1").unwrap();
            order.carry_out().unwrap();
            assert_eq!(fs::read_to_string(file).unwrap(), "written by a server that runs");
            assert!(order.data.to.join("postmaster.pid").exists());
        }
    }

    /// Somebody restores, or runs initdb, where a finalize was to bring its clone that ended before it began.
    #[test]
    fn what_came_to_the_place_since_the_order_stays_and_so_does_the_clone() {
        for is_copied in [false, true] {
            for file in ["PG_VERSION", ".walden/restore.json", "pg_wal/0"] {
                let scratch = tempfile::tempdir().unwrap();
                let order = stopped(scratch.path(), is_copied, false);
                let somebodys = order.data.to.join(file);
                fs::create_dir_all(somebodys.parent().unwrap()).unwrap();
                fs::write(&somebodys, "somebody's").unwrap();
                let error = order.carry_out().unwrap_err();
                assert!(matches!(&error, FinalizeError::Taken { path } if *path == order.data.to), "{error}");
                assert!(!order.has_begun());
                assert_eq!(content(&order.data.to).iter().filter(|(_, text)| !text.is_empty()).count(), 1);
                fs::remove_dir_all(&order.data.to).unwrap();
                order.carry_out().unwrap();
                assert_is_a_data_directory(&order, &scratch.path().join("to"));
                assert!(order.has_begun());
            }
        }
    }

    #[test]
    fn a_clone_that_is_not_whole_is_not_made_a_data_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let order = stopped(scratch.path(), false, false);
        fs::remove_dir_all(&order.wal).unwrap();
        let error = order.carry_out().unwrap_err();
        assert!(matches!(&error, FinalizeError::Missing { path } if *path == order.wal), "{error}");
        assert!(!order.data.to.join("PG_VERSION").exists());
    }

    /// The server that wrote them may have been anybody's.
    #[test]
    fn links_in_place_of_configuration_are_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let order = stopped(scratch.path(), false, false);
        let secret = scratch.path().join("secret");
        fs::write(&secret, "data_directory = '/secret'\n").unwrap();
        for name in [AUTO_CONF, CONF] {
            fs::remove_file(order.data.from.join(name)).unwrap();
            symlink(&secret, order.data.from.join(name)).unwrap();
        }
        order.carry_out().unwrap();
        for name in [AUTO_CONF, CONF] {
            let file = order.data.to.join(name);
            assert!(is_plain_file(&file) && !fs::read_to_string(file).unwrap().contains("secret"), "{name}");
        }
        assert_eq!(fs::read_to_string(secret).unwrap(), "data_directory = '/secret'\n");
    }

    #[test]
    fn an_order_survives_being_written() {
        let order = stopped(tempfile::tempdir().unwrap().path(), true, true);
        let text = serde_json::to_string(&order).unwrap();
        assert_eq!(serde_json::from_str::<FinalizeOrder>(&text).unwrap(), order);
    }
}
