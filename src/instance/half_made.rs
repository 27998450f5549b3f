//! A clone that is being made, and what a kill leaves of one: a folder without a description.
//!
//! ```text
//! folder, locked → making.json: whose pin it is going to be → the pin → plan, places → clone.json → no making.json
//! ```
//! So a pin that is in the store is always written down somewhere: whoever finds a half-made folder that nobody holds the
//! lock of ends its pin, and makes the clone anew or removes it. Nothing in such a folder is anybody's work, for only a clone
//! with a description can be started. Deliberately absent: what a kill leaves of a removal, which has an upper still.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::durable::TEMPORARY_PREFIX;
use crate::disk::{self, LockFile, Owner, durable, state_file};
use crate::instance::clone_folder::{CloneFolder, check_format, write_json};
use crate::instance::create::CreateError;
use crate::instance::places::{at, is_absent_or_empty};
use crate::repo::lease::Pin;
use crate::repo::{self, BasebackupId, Repository};
use crate::storage;

/// What is held, or about to be, for a clone that is being made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Making {
    /// Version of this file, 1.
    pub format: u32,
    /// The site in the configuration.
    pub site: String,
    /// What keeps the basebackup, or is about to.
    pub pin: Pin,
}

const WHAT: &str = "the beginning of a clone";
/// What Walden puts into the folder of a clone that was never started; `data`, which a clone may become, is not among it.
const NAMES: [&str; 12] = [
    "lock",
    "upper",
    "pg_wal",
    "tablespaces",
    "config",
    "run",
    "mnt",
    "making.json",
    "plan.json",
    "state.json",
    "server.log",
    "mount.log",
];

impl Making {
    /// Reads what was held for a clone that is not made, if that came so far.
    pub fn read(folder: &CloneFolder) -> Result<Option<Self>, disk::Error> {
        let path = file(folder);
        match state_file::read_document::<Self>(&path, WHAT) {
            Ok(making) => check_format(making.format, &path, WHAT).map(|()| Some(making)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends the pin, which may never have come about.
    ///
    /// # Errors
    /// What keeps it from being ended, or from being told: it may hold the basebackup then.
    pub async fn end(&self, repository: &Repository) -> Result<(), repo::Error> {
        match self.pin.end(repository).await {
            // Where the store takes no writes there is none; but credentials expire, and others may have made it.
            Err(error) if is_denied(&error) => match self.pin.is_there(repository).await? {
                true => Err(error),
                false => Ok(()),
            },
            ended => ended,
        }
    }
}

/// Makes a clone's folder, in place of what was left of one that was never made; nobody else works on it while the lock is
/// held.
///
/// # Errors
/// `Exists` where there is a clone, or anything else, and `InTheMaking` where somebody is at it.
pub(super) async fn make_folder(
    repository: &Repository,
    folder: &CloneFolder,
    site: &str,
    owner: Owner,
) -> Result<LockFile, CreateError> {
    match make_or_take_over(repository, folder, site, owner).await {
        Err(CreateError::Disk(disk::Error::Locked { holder, .. })) => {
            Err(CreateError::InTheMaking { name: folder.name().to_owned(), holder })
        }
        made => made,
    }
}

async fn make_or_take_over(
    repository: &Repository,
    folder: &CloneFolder,
    site: &str,
    owner: Owner,
) -> Result<LockFile, CreateError> {
    match folder.create(owner) {
        Err(disk::Error::Exists { path }) => {
            let exists = || CreateError::Disk(disk::Error::Exists { path: path.clone() });
            if !is_half_made(folder)? {
                return Err(exists());
            }
            let _lock = folder.lock()?;
            // It may have been made in between; and the pin of another site is for who can reach that.
            let making = Making::read(folder)?;
            if !is_half_made(folder)? || making.as_ref().is_some_and(|making| making.site != site) {
                return Err(exists());
            }
            if let Some(making) = making {
                tracing::warn!("clone \"{}\" was begun and never made; it is made anew", folder.name());
                making.end(repository).await?;
            }
            folder.remove()?;
            Ok(folder.create(owner)?)
        }
        created => Ok(created?),
    }
}

/// Pins the basebackup for a clone that is being made; nothing where the store takes no writes.
pub(super) async fn pin(
    repository: &Repository,
    id: BasebackupId,
    folder: &CloneFolder,
    site: &str,
) -> Result<Option<Pin>, CreateError> {
    let pin = Pin::draw(repository, id);
    let making = Making { format: 1, site: site.to_owned(), pin: pin.clone() };
    write_json(&file(folder), &making, WHAT)?;
    match pin.hold(repository, &format!("clone {}", folder.name())).await {
        Ok(()) => Ok(Some(pin)),
        Err(error) if is_denied(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Takes note that the clone has its description, by which its pin is found from now on: what stays of its making is passed
/// over, and no reason to give up what is made.
pub(super) fn made(folder: &CloneFolder) {
    if let Err(error) = durable::remove_file(&file(folder)) {
        tracing::warn!("{error}");
    }
}

/// Leaves nothing of a clone that could not be made: nothing is mounted yet, and nothing in it is anybody's work. What the
/// store does not let go of stays written down.
pub(super) async fn give_up(
    repository: &Repository,
    folder: &CloneFolder,
    error: CreateError,
) -> CreateError {
    // Whether a pin came about nobody knows where the store did not say; ended, it holds nothing.
    let ended = match Making::read(folder) {
        Ok(Some(making)) => making.end(repository).await.map_err(CreateError::from),
        Ok(None) => Ok(()),
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(()) => folder.discard(),
        Err(error) => {
            let name = folder.name();
            tracing::warn!(
                "a basebackup may be held for nobody until \"walden clone delete {name}\": {error}"
            );
        }
    }
    error
}

fn is_denied(error: &repo::Error) -> bool {
    matches!(error, repo::Error::Store(error) if error.kind() == storage::ErrorKind::Denied)
}

/// Tells whether nothing but the beginning of a clone is in its folder, and nothing of anybody else's.
fn is_half_made(folder: &CloneFolder) -> Result<bool, disk::Error> {
    let is_described = folder.spec_file().exists() || folder.order_file().exists();
    if is_described || !folder.is_clone() || !is_absent_or_empty(&folder.upper())? {
        return Ok(false);
    }
    let is_own = |name: &str| NAMES.contains(&name) || name.starts_with(TEMPORARY_PREFIX);
    let mut entries = std::fs::read_dir(folder.path()).map_err(at("open directory", folder.path()))?;
    Ok(entries.all(|entry| entry.is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_own))))
}

fn file(folder: &CloneFolder) -> PathBuf {
    folder.path().join("making.json")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::repo::testing;
    use crate::storage::{ErrorKind, Fault, Faulty, MemoryStore, Rule, Verb};

    const ID: &str = "20261120T101500Z-3fa9";

    async fn site() -> (Arc<Faulty<MemoryStore>>, Repository) {
        let store = Arc::new(Faulty::new(MemoryStore::new()));
        let repository = testing::site(store.clone(), testing::clock()).await;
        (store, repository)
    }

    async fn is_ended(repository: &Repository, pin: &Pin) -> bool {
        repository.store().head(&repository.layout().pin_end(pin.id, &pin.random)).await.is_ok()
    }

    #[tokio::test]
    async fn what_a_kill_has_left_is_made_anew_and_what_somebody_makes_is_left_alone() {
        let clones = tempfile::tempdir().unwrap();
        let (_, repository) = site().await;
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        let make = |site| make_folder(&repository, &folder, site, Owner::current());
        let lock = make("main").await.unwrap();
        let held = pin(&repository, ID.parse().unwrap(), &folder, "main").await.unwrap().unwrap();
        let refused = make("main").await.unwrap_err();
        assert!(refused.to_string().starts_with("clone \"one\" is being made by process "), "{refused}");
        drop(lock);
        let refused = make("other").await.unwrap_err();
        assert!(matches!(refused, CreateError::Disk(disk::Error::Exists { .. })), "{refused}");
        assert!(!is_ended(&repository, &held).await);
        let lock = make("main").await.unwrap();
        assert!(is_ended(&repository, &held).await && Making::read(&folder).unwrap().is_none());
        std::fs::write(folder.spec_file(), "").unwrap();
        drop(lock);
        let refused = make("main").await.unwrap_err();
        assert!(matches!(refused, CreateError::Disk(disk::Error::Exists { .. })), "{refused}");
    }

    #[tokio::test]
    async fn a_pin_that_may_not_be_ended_stays_written_down_and_one_that_never_was_is_in_nobodys_way() {
        let clones = tempfile::tempdir().unwrap();
        let (store, repository) = site().await;
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        let make = || make_folder(&repository, &folder, "main", Owner::current());
        let denied = || Rule::on(Verb::Create, Fault::Before(ErrorKind::Denied));
        let _lock = make().await.unwrap();
        let held = pin(&repository, ID.parse().unwrap(), &folder, "main").await.unwrap().unwrap();
        store.inject(denied());
        give_up(&repository, &folder, CreateError::RootOwner).await;
        assert_eq!(Making::read(&folder).unwrap().unwrap().pin, held);
        store.heal();
        give_up(&repository, &folder, CreateError::RootOwner).await;
        assert!(is_ended(&repository, &held).await && !folder.path().exists());

        store.inject(denied());
        let _lock = make().await.unwrap();
        assert!(pin(&repository, ID.parse().unwrap(), &folder, "main").await.unwrap().is_none());
        Making::read(&folder).unwrap().unwrap().end(&repository).await.unwrap();
        give_up(&repository, &folder, CreateError::RootOwner).await;
        assert!(!folder.path().exists());
    }

    #[test]
    fn only_a_folder_that_never_had_a_clone_is_half_made() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        drop(folder.create(Owner::current()).unwrap());
        assert!(is_half_made(&folder).unwrap());
        std::fs::remove_dir(folder.upper()).unwrap();
        for made in [folder.run(), folder.config(), folder.mount_point(), folder.pg_wal(), folder.stand_ins()]
        {
            std::fs::remove_dir(made).unwrap();
        }
        assert!(is_half_made(&folder).unwrap(), "killed before anything was in it");
        std::fs::create_dir_all(folder.upper().join("data")).unwrap();
        assert!(!is_half_made(&folder).unwrap(), "what is left of a removal");
        std::fs::remove_dir(folder.upper().join("data")).unwrap();
        std::fs::write(folder.spec_file(), "").unwrap();
        assert!(!is_half_made(&folder).unwrap());
        std::fs::remove_file(folder.spec_file()).unwrap();
        for name in [".walden-tmp-1-2-making.json", "plan.json"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert!(is_half_made(&folder).unwrap(), "killed while it was written");
        for somebodys in ["work", "data"] {
            std::fs::create_dir(folder.path().join(somebodys)).unwrap();
            assert!(!is_half_made(&folder).unwrap(), "{somebodys} is not of a clone that is being made");
            std::fs::remove_dir(folder.path().join(somebodys)).unwrap();
        }
        std::fs::remove_dir(folder.upper()).unwrap();
        std::fs::create_dir(folder.finalized_data()).unwrap();
        assert!(!is_half_made(&folder).unwrap(), "somebody's data directory");
    }
}
