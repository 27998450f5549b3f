//! Makes a second clone of the same basebackup, to the same target, with the same options.
//!
//! Of what the first one has changed nothing comes along: it is a clone like the first was when it was made, and it
//! recovers to the very same end, because it goes by the same plan. Deliberately absent: choosing anything anew.

use std::path::{Path, PathBuf};

use crate::catalog::RecoveryPlan;
use crate::disk::{Owner, state_file};
use crate::instance::clone_folder::{CloneFolder, CloneSpec};
use crate::instance::create::{CreateError, give_up, holder, write_folder};
use crate::instance::isolation::socket_path;
use crate::instance::pinning::pin;
use crate::repo::Repository;

/// Makes the folder `new` of a clone like that in `folder`; it can be started afterwards.
pub async fn duplicate(
    repository: &Repository,
    folder: &CloneFolder,
    new: &CloneFolder,
    port: u16,
) -> Result<CloneSpec, CreateError> {
    socket_path(&new.run(), port).map_err(CreateError::SocketPath)?;
    let first = folder.read_spec()?;
    let plan: RecoveryPlan = state_file::read_document(&folder.plan_file(), "a recovery plan")?;
    let owner = Owner { uid: first.owner.0, gid: first.owner.1 };
    new.create(owner)?;
    let pin = match pin(repository, first.basebackup, &holder(new)).await {
        Ok(pin) => pin,
        Err(error) => return Err(give_up(repository, new, None, error.into()).await),
    };
    let created_at = repository.clock().now();
    // It lives as long as the first was to.
    let lifetime = first.expires_at.map(|at| at.duration_since(first.created_at));
    let stand_ins = first.stand_ins.iter().map(|(place, own)| (place.clone(), moved(folder, new, own)));
    let spec = CloneSpec {
        name: new.name().to_owned(),
        port,
        pin: pin.clone(),
        stand_ins: stand_ins.collect(),
        created_at,
        expires_at: lifetime.and_then(|lifetime| created_at.checked_add(lifetime).ok()),
        ..first.clone()
    };
    match write_folder(new, &spec, &plan, owner) {
        Ok(()) => Ok(spec),
        Err(error) => Err(give_up(repository, new, pin, error.into()).await),
    }
}

/// Returns the path in the new folder of one in the first.
fn moved(folder: &CloneFolder, new: &CloneFolder, path: &Path) -> PathBuf {
    path.strip_prefix(folder.path()).map_or_else(|_| path.to_owned(), |rest| new.path().join(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_for_a_foreign_path_is_in_the_new_folder() {
        let [folder, new] = ["one", "two"].map(|name| CloneFolder::new(Path::new("/clones"), name).unwrap());
        let place = folder.tablespace(16385);
        assert_eq!(moved(&folder, &new, &place), new.tablespace(16385));
    }
}
