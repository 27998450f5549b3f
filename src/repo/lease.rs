//! What keeps a basebackup from being swept while somebody reads it: leases for readers, pins for clones.
//!
//! A lease is a row of numbered objects, a new one every ten minutes; without a new one for an hour it is dead. A
//! pin has no end but the one its owner writes. Both are unsigned on purpose: a forged one only delays deletion.
//! A reader creates its lease first and looks for `expired` afterwards; a store that refuses writes gives none.

use bytes::Bytes;

use crate::codec::RandomExt;
use crate::repo::error::Error;
use crate::repo::id::BasebackupId;
use crate::repo::repository::Repository;
use crate::storage::ErrorKind;

/// How often a reader renews its lease, in seconds.
pub const LEASE_RENEWAL_SECONDS: u64 = 600;

/// A reader's hold on a basebackup.
#[derive(Debug)]
pub struct Lease {
    repository: Repository,
    id: BasebackupId,
    random: [u8; 8],
    next: u32,
}

/// A clone's hold on a basebackup, which outlives its processes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pin {
    /// The basebackup that is held.
    pub id: BasebackupId,
    /// Tells pins of one basebackup apart.
    #[serde(with = "crate::repo::text_forms::hex_bytes")]
    pub random: [u8; 8],
}

impl Lease {
    /// Takes a lease, or nothing where this host may not write to the store.
    pub async fn create(repository: &Repository, id: BasebackupId) -> Result<Option<Self>, Error> {
        let random = repository.keyring().random().array();
        let mut lease = Self { repository: repository.clone(), id, random, next: 0 };
        match lease.renew().await {
            Ok(()) => {}
            Err(Error::Store(error)) if error.kind() == ErrorKind::Denied => return Ok(None),
            Err(error) => return Err(error),
        }
        // Only now is the look for the mark worth anything: a sweeper that came before us has left it.
        let error = match repository.is_expired(id).await {
            Ok(true) => Error::Expired(id),
            Ok(false) => return Ok(Some(lease)),
            Err(error) => error,
        };
        lease.end().await?;
        Err(error)
    }

    /// Writes the next object of the row.
    pub async fn renew(&mut self) -> Result<(), Error> {
        let key = self.repository.layout().lease(self.id, &self.random, self.next);
        match self.repository.store().create(&key, Bytes::from_static(b"lease\n")).await {
            // Ours, of an earlier call whose answer was lost. It is as old as that call, so the row goes on.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                self.next += 1;
                let key = self.repository.layout().lease(self.id, &self.random, self.next);
                self.repository.store().create(&key, Bytes::from_static(b"lease\n")).await?;
            }
            other => other?,
        }
        self.next += 1;
        Ok(())
    }

    /// Ends the lease; a reader that is killed leaves that to time.
    pub async fn end(self) -> Result<(), Error> {
        let key = self.repository.layout().lease_end(self.id, &self.random);
        Ok(self.repository.store().create(&key, Bytes::from_static(b"end\n")).await?)
    }
}

impl Pin {
    /// Pins a basebackup until [`Pin::end`], saying for whom.
    pub async fn create(repository: &Repository, id: BasebackupId, owner: &str) -> Result<Self, Error> {
        let pin = Self::draw(repository, id);
        pin.hold(repository, owner).await?;
        Ok(pin)
    }

    /// Draws a pin that holds nothing yet: whoever writes it down before [`Pin::hold`] can end it, whatever happens.
    pub fn draw(repository: &Repository, id: BasebackupId) -> Self {
        Self { id, random: repository.keyring().random().array() }
    }

    /// Holds the basebackup until [`Pin::end`], saying for whom.
    pub async fn hold(&self, repository: &Repository, owner: &str) -> Result<(), Error> {
        let key = repository.layout().pin(self.id, &self.random);
        repository.store().create(&key, format!("{owner}\n").into()).await?;
        match repository.is_expired(self.id).await {
            Ok(false) => Ok(()),
            Ok(true) => self.end(repository).await.and(Err(Error::Expired(self.id))),
            Err(error) => self.end(repository).await.and(Err(error)),
        }
    }

    /// Tells whether the pin came about, be it ended by now.
    pub async fn is_there(&self, repository: &Repository) -> Result<bool, Error> {
        let key = repository.layout().pin(self.id, &self.random);
        match repository.store().head(&key).await {
            Err(error) if error.is_absent() => Ok(false),
            found => Ok(found.map(|_| true)?),
        }
    }

    /// Ends the pin; ending it again changes nothing.
    pub async fn end(&self, repository: &Repository) -> Result<(), Error> {
        let key = repository.layout().pin_end(self.id, &self.random);
        match repository.store().create(&key, Bytes::from_static(b"end\n")).await {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::repo::testing;
    use crate::storage::{Fault, Faulty, MemoryStore, Rule, Store, Verb};

    #[tokio::test]
    async fn a_renewal_whose_answer_was_lost_does_not_stop_those_after_it() {
        let store = Arc::new(Faulty::new(MemoryStore::new()));
        let repository = testing::site(store.clone(), testing::clock()).await;
        let id: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        let mut lease = Lease::create(&repository, id).await.unwrap().unwrap();
        let lost = Fault::After(ErrorKind::OutcomeUnknown);
        store.inject(Rule::on(Verb::Create, lost).key("leases/").times(1));
        lease.renew().await.unwrap_err();
        lease.renew().await.unwrap();
        lease.renew().await.unwrap();
        let row = store.list("main/leases", None, 10).await.unwrap();
        let numbers: Vec<&str> = row.iter().map(|o| o.key.as_str().rsplit('/').next().unwrap()).collect();
        assert_eq!(numbers, ["0", "1", "2", "3"]);
    }

    #[tokio::test]
    async fn no_lease_is_taken_on_what_has_expired_nor_where_writes_are_denied() {
        let store = Arc::new(Faulty::new(MemoryStore::new()));
        let repository = testing::site(store.clone(), testing::clock()).await;
        let id: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        store.create(&repository.layout().expired(id), Bytes::from_static(b"x")).await.unwrap();
        let error = Lease::create(&repository, id).await.unwrap_err();
        assert!(matches!(error, Error::Expired(expired) if expired == id), "{error}");
        let row = store.list("main/leases", None, 10).await.unwrap();
        assert!(row.iter().any(|object| object.key.as_str().ends_with("/end")), "the lease is let go");
        store.inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::Denied)));
        assert!(Lease::create(&repository, id).await.unwrap().is_none());
    }
}
