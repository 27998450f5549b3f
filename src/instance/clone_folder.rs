//! The folder of a clone: what stands where, and what is remembered there.
//!
//! ```text
//! <clones>/<name>/clone.json    what it was made from and how it is run
//!                 plan.json     what its recovery may ask of the archive     making.json   its pin, while it is made
//!                 state.json, settings.json, hydration.json   how it ended, for when nothing of it runs
//!                 upper/        what differs from the basebackup
//!                 mnt/          the mount: data, tablespaces, wal
//!                 pg_wal/       WAL of the clone itself, not through the mount
//!                 tablespaces/  places that replayed WAL believes to be elsewhere
//!                 config/       generated configuration files
//!                 run/          sockets: PostgreSQL's and the supervisor's
//!                 server.log, mount.log     finalize.json, while a data directory is made of it
//! ```
//! Mode 0700, owned by whom PostgreSQL runs as. Supervisor, reset, finalize or delete holds the lock, and is alone.

use std::error::Error as StdError;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::catalog::{Hole, RecoveryTarget};
use crate::control::{CloneSetting, CloneState};
use crate::disk::durable::{self, Create};
use crate::disk::{self, LockFile, Owner, state_file};
use crate::instance::places::{at, remove};
use crate::pg::{RecoveryLimits, TimelineId};
use crate::repo::lease::Pin;
use crate::repo::{BasebackupId, ClusterId};

/// A clone's folder, which may or may not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneFolder {
    path: PathBuf,
    name: String,
}

/// What a clone was made from and how it is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneSpec {
    /// Version of this file, 1.
    pub format: u32,
    /// The clone's name.
    pub name: String,
    /// The site in the configuration.
    pub site: String,
    /// The basebackup.
    pub basebackup: BasebackupId,
    /// BLAKE3 of its manifest: the upper belongs to this one and no other.
    pub manifest_digest: String,
    /// The cluster.
    pub cluster: ClusterId,
    /// Its major version.
    pub major: u32,
    /// PostgreSQL's programs.
    pub bin_directory: PathBuf,
    /// Where recovery ends.
    pub target: RecoveryTarget,
    /// The hole before which it ends, where the target lay behind one.
    #[serde(default)]
    pub until_hole: Option<Hole>,
    /// The timeline it follows.
    pub timeline: TimelineId,
    /// Whether sessions are let in before the target is reached.
    pub read_early: bool,
    /// The port in the socket's name.
    pub port: u16,
    /// The role that initdb created.
    pub superuser: String,
    /// Whom PostgreSQL runs as: user and group.
    pub owner: (u32, u32),
    /// What keeps the basebackup; nothing where the store takes no writes.
    pub pin: Option<Pin>,
    /// The greatest limits that the WAL announces.
    #[serde(default)]
    pub limits: RecoveryLimits,
    /// Libraries to preload: those of the source that stay inside a clone and are on this host.
    #[serde(default)]
    pub preload: String,
    /// Absolute paths that replayed WAL writes to, each with the folder that stands in for it.
    pub stand_ins: Vec<(PathBuf, PathBuf)>,
    /// What its user should know of it.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// How the rest of the basebackup comes.
    #[serde(default)]
    pub hydrate: HydrateSpec,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it is deleted, if ever.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
}

/// How the rest of a clone's basebackup comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HydrateSpec {
    /// Whether it comes in the background.
    pub in_background: bool,
    /// The most bytes of it that become local in a second.
    pub rate: Option<NonZeroU64>,
}

/// How much of a clone's basebackup was local when its supervisor last wrote it down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastHydration {
    /// Bytes that were local.
    pub hydrated_bytes: u64,
    /// Bytes that the basebackup has.
    pub total_bytes: u64,
    /// Whether everything was local and on stable storage.
    pub is_done: bool,
}

impl Default for HydrateSpec {
    fn default() -> Self {
        Self { in_background: true, rate: None }
    }
}

/// How a clone ended, or that it is still on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastState {
    /// What it was doing.
    pub state: CloneState,
    /// Why it failed.
    pub message: Option<String>,
    /// Whether it failed of damaged or untrusted data.
    #[serde(default)]
    pub damaged: bool,
    /// What to do about it, where that is known.
    #[serde(default)]
    pub hint: Option<String>,
}

impl LastState {
    /// A state in which nothing has failed.
    pub fn sound(state: CloneState) -> Self {
        Self { state, message: None, damaged: false, hint: None }
    }

    /// The end of a clone that failed, with every cause said once: what a store said stands below the first.
    pub fn failed(error: &dyn StdError, damaged: bool) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let said = error.to_string();
            if !message.contains(&said) {
                message = format!("{message}: {said}");
            }
            cause = error.source();
        }
        Self { state: CloneState::Failed, message: Some(message), damaged, hint: None }
    }
}

/// A name that cannot be a clone's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a name for a clone: letters, digits, - and _, at most {NAME_LEN_MAX}")]
pub struct InvalidCloneName(String);

/// The version of a clone's description, and of the order to finalize it.
const FORMAT: u32 = 1;
/// Whoever looks whether a clone runs makes it, wherever that is.
const LOCK_NAME: &str = "lock";
/// Who only looks is gone after a system call; who holds the lock for a second is at work.
const LOCK_LOOKS_MAX: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Socket paths end at 107 bytes, and the name is part of them.
const NAME_LEN_MAX: usize = 40;

impl CloneFolder {
    /// Returns the folder of the clone `name` below `clones`.
    pub fn new(clones: &Path, name: &str) -> Result<Self, InvalidCloneName> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !first || name.len() > NAME_LEN_MAX || !name.bytes().all(valid) {
            return Err(InvalidCloneName(name.to_owned()));
        }
        Ok(Self { path: clones.join(name), name: name.to_owned() })
    }

    /// Lists the clones below `clones`, by name.
    pub fn list(clones: &Path) -> Result<Vec<Self>, disk::Error> {
        let entries = match std::fs::read_dir(clones) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(disk::Error::Io { action: "list", path: clones.to_owned(), source }),
        };
        let mut folders: Vec<Self> = entries
            .filter_map(|entry| Self::new(clones, entry.ok()?.file_name().to_str()?).ok())
            .filter(|folder| folder.spec_file().exists())
            .collect();
        folders.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(folders)
    }

    /// Returns the clone's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns where the plan of its recovery is.
    pub fn plan_file(&self) -> PathBuf {
        self.path.join("plan.json")
    }

    /// Returns where the upper is.
    pub fn upper(&self) -> PathBuf {
        self.path.join("upper")
    }

    /// Returns the mount point.
    pub fn mount_point(&self) -> PathBuf {
        self.path.join("mnt")
    }

    /// Returns PGDATA, within the mount.
    pub fn data_directory(&self) -> PathBuf {
        self.mount_point().join("data")
    }

    /// Returns where a file of PGDATA that came to be in the clone stands beneath the mount.
    ///
    /// The supervisor looks here: it serves the mount, and a thread of it that waits for its own answer when it is
    /// killed would keep the mount, and all who wait for it, for ever.
    pub fn beneath_mount(&self, name: &str) -> PathBuf {
        self.upper().join("data").join(name)
    }

    /// Returns where a tablespace of the basebackup stands, within the mount.
    pub fn tablespace(&self, oid: u32) -> PathBuf {
        self.mount_point().join("tablespaces").join(oid.to_string())
    }

    /// Returns where the clone's own WAL is.
    pub fn pg_wal(&self) -> PathBuf {
        self.path.join("pg_wal")
    }

    /// Returns where places that replayed WAL believes to be elsewhere are.
    pub fn stand_ins(&self) -> PathBuf {
        self.path.join("tablespaces")
    }

    /// Returns where the generated configuration files are.
    pub fn config(&self) -> PathBuf {
        self.path.join("config")
    }

    /// Returns where the sockets are.
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Returns where the clone's server may write: not what the supervisor and the commands go by, nor beneath the mount.
    pub fn writable(&self) -> Vec<PathBuf> {
        vec![self.mount_point(), self.pg_wal(), self.stand_ins(), self.run()]
    }

    /// Returns the supervisor's socket.
    pub fn control_socket(&self) -> PathBuf {
        self.run().join("walden.sock")
    }

    /// Returns PostgreSQL's log.
    pub fn server_log(&self) -> PathBuf {
        self.path.join("server.log")
    }

    /// Returns the supervisor's log.
    pub fn mount_log(&self) -> PathBuf {
        self.path.join("mount.log")
    }

    /// Returns where the order is to make a data directory of the clone, while there is one.
    pub fn order_file(&self) -> PathBuf {
        self.path.join("finalize.json")
    }

    /// Returns where it stands which timeline history the clone has put into the archive.
    pub fn claim_file(&self) -> PathBuf {
        self.path.join("claimed.history")
    }

    /// Returns where the data directory is that was made of the clone, where no other place was named.
    pub fn finalized_data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Tells whether what is in the folder is a clone's, be it what a kill has left of one.
    ///
    /// Anything else is somebody's: the data directory that a clone became, its tablespaces once that was moved away, or
    /// a folder that was made here for something else. So `upper` comes first when a clone is made, and goes last.
    pub fn is_clone(&self) -> bool {
        self.spec_file().exists() || self.order_file().exists() || self.upper().is_dir() || self.is_bare()
    }

    /// Tells whether there is nothing in the folder but a lock: a clone was about to be made, or is removed but for this.
    fn is_bare(&self) -> bool {
        let Ok(mut entries) = std::fs::read_dir(&self.path) else { return false };
        entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK_NAME))
    }

    /// Makes the folder and those in it, and takes its lock; of two callers exactly one succeeds.
    ///
    /// # Errors
    /// `Exists` where it is there already, and `Locked` where somebody has taken it over, which is then left as it is; after
    /// any other nothing is left.
    pub fn create(&self, owner: Owner) -> Result<LockFile, disk::Error> {
        let private = Create::PRIVATE_DIRECTORY.owned_by(owner);
        durable::create_new_dir(&self.path, private)?;
        // First: what nobody holds the lock of looks like what a kill has left.
        let lock = self.lock()?;
        let folders =
            [self.upper(), self.pg_wal(), self.stand_ins(), self.config(), self.run(), self.mount_point()];
        let made = folders.iter().try_for_each(|folder| durable::create_dir(folder, private));
        if made.is_err() {
            self.discard();
        }
        made.map(|()| lock)
    }

    /// Removes everything of a clone of which nothing runs or is mounted, for who holds its lock.
    ///
    /// What it can be started or finalized by goes first; then all but `upper`, by which what a kill has left is known for
    /// a clone's.
    pub fn remove(&self) -> Result<(), disk::Error> {
        durable::remove_file(&self.spec_file())?;
        durable::remove_file(&self.order_file())?;
        let upper = self.upper();
        for entry in std::fs::read_dir(&self.path).map_err(at("open directory", &self.path))? {
            let path = entry.map_err(at("read directory", &self.path))?.path();
            if path != upper && path != self.lock_file() {
                remove(&path)?;
            }
        }
        remove(&upper)?;
        remove(&self.path)?;
        durable::fsync_parent(&self.path)
    }

    /// Removes a folder in which nothing is mounted and nothing is anybody's work, in the order by which what a kill leaves
    /// of it is known for a clone's.
    pub fn discard(&self) {
        if let Err(error) = self.remove() {
            tracing::warn!("could not remove \"{}\": {error}", self.path.display());
        }
    }

    /// Takes the lock that says a supervisor is alive, or that somebody works on the clone.
    pub fn lock(&self) -> Result<LockFile, disk::Error> {
        LockFile::acquire(&self.lock_file())
    }

    /// Takes the lock once who only looks whether a supervisor is alive has let it go.
    ///
    /// # Errors
    /// `Locked` where a supervisor, or whoever else works on the clone, holds it.
    pub async fn lock_to_work(&self) -> Result<LockFile, disk::Error> {
        let mut looks = 0;
        loop {
            match self.lock() {
                Err(disk::Error::Locked { .. }) if looks < LOCK_LOOKS_MAX => looks += 1,
                outcome => return outcome,
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        }
    }

    /// Writes what the clone is.
    pub fn write_spec(&self, spec: &CloneSpec) -> Result<(), disk::Error> {
        write_json(&self.spec_file(), spec, "the description of a clone")
    }

    /// Reads what the clone is.
    pub fn read_spec(&self) -> Result<CloneSpec, disk::Error> {
        let (path, what) = (self.spec_file(), "the description of a clone");
        let spec: CloneSpec = state_file::read_document(&path, what)?;
        check_format(spec.format, &path, what).map(|()| spec)
    }

    /// Remembers how the clone is, for when nobody answers.
    pub fn write_state(&self, state: &LastState) -> Result<(), disk::Error> {
        write_json(&self.path.join("state.json"), state, "the state of a clone")
    }

    /// Returns what was remembered last.
    pub fn read_state(&self) -> Result<LastState, disk::Error> {
        state_file::read_document(&self.path.join("state.json"), "the state of a clone")
    }

    /// Remembers what the server is told.
    pub fn write_settings(&self, settings: &[CloneSetting]) -> Result<(), disk::Error> {
        write_json(&self.settings_file(), &settings, "the settings of a clone")
    }

    /// Returns what the server was told last; before its first start there is no such file.
    pub fn read_settings(&self) -> Result<Vec<CloneSetting>, disk::Error> {
        state_file::read_document(&self.settings_file(), "the settings of a clone")
    }

    /// Remembers how much of the basebackup is local.
    pub fn write_hydration(&self, hydration: &LastHydration) -> Result<(), disk::Error> {
        write_json(&self.hydration_file(), hydration, "the progress of a clone")
    }

    /// Returns how much of the basebackup was local; nothing before the first start.
    pub fn read_hydration(&self) -> LastHydration {
        state_file::read_document(&self.hydration_file(), "the progress of a clone").unwrap_or_default()
    }

    fn lock_file(&self) -> PathBuf {
        self.path.join(LOCK_NAME)
    }

    fn hydration_file(&self) -> PathBuf {
        self.path.join("hydration.json")
    }

    fn settings_file(&self) -> PathBuf {
        self.path.join("settings.json")
    }

    /// Returns where it is written what the clone is.
    pub fn spec_file(&self) -> PathBuf {
        self.path.join("clone.json")
    }
}

/// Refuses a document of another release's form.
pub(super) fn check_format(format: u32, path: &Path, what: &'static str) -> Result<(), disk::Error> {
    if format == FORMAT {
        return Ok(());
    }
    let detail = format!("its format is {format}, and this release of Walden knows {FORMAT}");
    Err(disk::Error::Malformed { path: path.to_owned(), what, detail })
}

/// Writes a document durably.
pub fn write_json<T: Serialize>(path: &Path, value: &T, what: &'static str) -> Result<(), disk::Error> {
    let malformed = |error: serde_json::Error| disk::Error::Malformed {
        path: path.to_owned(),
        what,
        detail: error.to_string(),
    };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(malformed)?;
    bytes.push(b'\n');
    durable::write_file(path, &bytes, Create::PRIVATE_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_name_and_not_a_path() {
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ä", &"x".repeat(41)] {
            assert!(CloneFolder::new(Path::new("/clones"), bad).is_err(), "{bad:?}");
        }
        let folder = CloneFolder::new(Path::new("/clones"), "yesterday_2").unwrap();
        assert_eq!(folder.data_directory(), Path::new("/clones/yesterday_2/mnt/data"));
    }

    #[test]
    fn a_folder_is_made_once_and_listed_when_it_has_a_description() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        drop(folder.create(Owner::current()).unwrap());
        std::fs::write(folder.server_log(), "work").unwrap();
        assert!(matches!(folder.create(Owner::current()), Err(disk::Error::Exists { .. })));
        assert_eq!(std::fs::read_to_string(folder.server_log()).unwrap(), "work");
        assert!(CloneFolder::list(clones.path()).unwrap().is_empty());
        folder.write_state(&LastState::sound(CloneState::Creating)).unwrap();
        assert_eq!(folder.read_state().unwrap().state, CloneState::Creating);
        std::fs::write(folder.spec_file(), "{}").unwrap();
        assert_eq!(CloneFolder::list(clones.path()).unwrap(), std::slice::from_ref(&folder));
        assert!(folder.read_spec().unwrap_err().to_string().contains("clone.json"));
    }
    /// What a clone became is somebody's, also once a part of it was moved away.
    #[test]
    fn a_folder_is_a_clones_by_what_only_a_clone_has() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        assert!(!folder.is_clone());
        std::fs::create_dir(folder.path()).unwrap();
        assert!(folder.is_clone(), "killed before anything was in it");
        drop(folder.lock().unwrap());
        assert!(folder.is_clone());
        std::fs::create_dir_all(folder.path().join("data.tablespaces/16385")).unwrap();
        assert!(!folder.is_clone());
        for made in [folder.spec_file(), folder.order_file()] {
            std::fs::write(&made, "{}").unwrap();
            assert!(folder.is_clone(), "{}", made.display());
            std::fs::remove_file(&made).unwrap();
        }
        std::fs::create_dir(folder.upper()).unwrap();
        assert!(folder.is_clone());
    }

    #[test]
    fn what_a_kill_leaves_of_a_removal_can_be_removed() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        drop(folder.create(Owner::current()).unwrap());
        std::fs::write(folder.spec_file(), "{}").unwrap();
        let file = folder.upper().join("data/base/1/1259");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "x").unwrap();
        let _lock = folder.lock().unwrap();
        // As far as any removal comes before the last of `upper`.
        std::fs::remove_file(folder.spec_file()).unwrap();
        std::fs::remove_dir_all(folder.pg_wal()).unwrap();
        std::fs::remove_dir_all(folder.upper().join("data")).unwrap();
        assert!(folder.is_clone());
        folder.remove().unwrap();
        assert!(!folder.path().exists());
    }
}
