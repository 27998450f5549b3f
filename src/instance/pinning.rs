//! Keeping a basebackup in the store for as long as something here stands on it.
//! Deliberately absent: ending it, which whoever holds the pin does.

use crate::repo::lease::Pin;
use crate::repo::{self, BasebackupId, Repository};
use crate::storage;

/// Pins a basebackup, saying for whom; nothing where the store takes no writes.
pub(super) async fn pin(
    repository: &Repository,
    id: BasebackupId,
    whom: &str,
) -> Result<Option<Pin>, repo::Error> {
    match Pin::create(repository, id, whom).await {
        Ok(pin) => Ok(Some(pin)),
        Err(repo::Error::Store(error)) if error.kind() == storage::ErrorKind::Denied => Ok(None),
        Err(error) => Err(error),
    }
}
