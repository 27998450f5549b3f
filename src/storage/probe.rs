//! Finding out at start what a store really does, by trying it (failure 42).
//!
//! create → read → create again with another body → read → delete. Where "create only if absent" is claimed
//! and not kept, or a read does not see the write before it, the layers above allow one declared writer and
//! no sweep.

use bytes::Bytes;
use jiff::Timestamp;

use super::error::{Error, ErrorKind};
use super::key::ObjectKey;
use super::store::{FOLDER_ENTRIES_MAX, Store};

const FIRST: Bytes = Bytes::from_static(b"walden probe, first body\n");
const SECOND: Bytes = Bytes::from_static(b"walden probe, another body\n");

/// What a store was seen to keep of its contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A second create of a key is refused and changes nothing.
    pub create_only: bool,
    /// A read after a create sees the object.
    pub read_after_write: bool,
}

/// How an object was seen in a listing.
#[derive(Debug, Clone)]
pub enum Listing {
    /// It is there.
    Shown,
    /// It is not.
    Missing,
    /// There was no listing.
    Refused(Error),
}

/// What one small object told about a store, beyond what every repository needs.
#[derive(Debug, Clone)]
pub struct Examination {
    /// What the store keeps of its contract.
    pub capabilities: Capabilities,
    /// Whether a listing shows the object.
    pub listing: Listing,
    /// When the object was created, by the store's clock.
    pub created_at: Timestamp,
    /// The object could be deleted; not so under an object lock, or for a role that may only add.
    pub deleted: bool,
}

/// Looks into every right that a store may grant or not, with one object under `key`, which nobody else uses.
pub async fn examine(store: &dyn Store, key: &ObjectKey) -> Result<Examination, Error> {
    store.create(key, FIRST).await?;
    let outcome = examine_object(store, key).await;
    let deleted = match store.delete(key).await {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::Denied => false,
        Err(error) => return Err(outcome.err().unwrap_or(error)),
    };
    let (capabilities, listing, created_at) = outcome?;
    Ok(Examination { capabilities, listing, created_at, deleted })
}

async fn examine_object(
    store: &dyn Store,
    key: &ObjectKey,
) -> Result<(Capabilities, Listing, Timestamp), Error> {
    let created_at = store.head(key).await?.last_modified;
    let folder = key.as_str().rsplit_once('/').map_or("", |(folder, _)| folder);
    // A right by itself: a role may read what it knows the name of, and list nothing.
    let listing = match store.list(folder, None, FOLDER_ENTRIES_MAX).await {
        Ok(objects) if objects.iter().any(|object| object.key == *key) => Listing::Shown,
        Ok(_) => Listing::Missing,
        Err(error) => Listing::Refused(error),
    };
    Ok((try_object(store, key).await?, listing, created_at))
}

/// Tries a store with one small object under `key`, which nobody else uses, and deletes it.
///
/// Where deleting is denied, as under an object lock, the object stays; that is no failure of the probe.
pub async fn probe(store: &dyn Store, key: &ObjectKey) -> Result<Capabilities, Error> {
    store.create(key, FIRST).await?;
    let outcome = try_object(store, key).await;
    match store.delete(key).await {
        Ok(()) => (),
        Err(error) if error.kind() == ErrorKind::Denied => {
            tracing::debug!(%key, %error, "the probe's object stays");
        }
        Err(error) => return outcome.and(Err(error)),
    }
    outcome
}

async fn try_object(store: &dyn Store, key: &ObjectKey) -> Result<Capabilities, Error> {
    let read_after_write = reads(store, key, &FIRST).await?;
    let refused = match store.create(key, SECOND).await {
        Ok(()) => false,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => true,
        Err(error) => return Err(error),
    };
    // Refused in words, but not in deed, is no refusal.
    let create_only = refused && !reads(store, key, &SECOND).await?;
    Ok(Capabilities { create_only, read_after_write })
}

async fn reads(store: &dyn Store, key: &ObjectKey, body: &Bytes) -> Result<bool, Error> {
    match store.get(key, FIRST.len().max(SECOND.len()) as u64).await {
        Ok(found) => Ok(found == *body),
        Err(error) if error.is_absent() => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Verb;
    use super::super::fault::{Fault, Faulty, Rule};
    use super::super::memory::MemoryStore;
    use super::*;

    fn key() -> ObjectKey {
        ObjectKey::parse("site/probe/0badcafe").unwrap()
    }

    async fn probed(rules: Vec<Rule>) -> (Result<Capabilities, Error>, MemoryStore) {
        let memory = MemoryStore::new();
        let store = Faulty::new(memory.clone());
        rules.into_iter().for_each(|rule| store.inject(rule));
        (probe(&store, &key()).await, memory)
    }

    #[tokio::test]
    async fn a_store_that_keeps_the_contract_is_found_to() {
        let (outcome, memory) = probed(Vec::new()).await;
        assert_eq!(outcome.unwrap(), Capabilities { create_only: true, read_after_write: true });
        assert!(memory.list("", None, 1).await.unwrap().is_empty(), "the probe deletes its object");
    }

    #[tokio::test]
    async fn a_store_that_ignores_the_condition_is_found_out() {
        let (outcome, _) = probed(vec![Rule::on(Verb::Create, Fault::Overwrite)]).await;
        assert_eq!(outcome.unwrap(), Capabilities { create_only: false, read_after_write: true });
    }

    #[tokio::test]
    async fn a_store_that_shows_writes_late_is_found_out() {
        let (outcome, _) =
            probed(vec![Rule::on(Verb::Get, Fault::Before(ErrorKind::NotFound)).times(1)]).await;
        assert_eq!(outcome.unwrap(), Capabilities { create_only: true, read_after_write: false });
    }

    #[tokio::test]
    async fn a_store_that_refuses_and_overwrites_all_the_same_is_found_out() {
        // What the second read returns stands in for such a store: the second body.
        let memory = MemoryStore::new();
        let store = Lying(memory.clone());
        let found = probe(&store, &key()).await.unwrap();
        assert!(!found.create_only);
    }

    /// Overwrites and says `AlreadyExists`.
    #[derive(Debug)]
    struct Lying(MemoryStore);

    #[async_trait::async_trait]
    impl Store for Lying {
        async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
            let outcome = self.0.create(key, body.clone()).await;
            self.0.tamper(key, |_| Some(body));
            outcome
        }

        async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
            self.0.get(key, size_max).await
        }

        async fn get_range(&self, key: &ObjectKey, range: std::ops::Range<u64>) -> Result<Bytes, Error> {
            self.0.get_range(key, range).await
        }

        async fn head(&self, key: &ObjectKey) -> Result<super::super::ObjectMeta, Error> {
            self.0.head(key).await
        }

        async fn list(
            &self,
            prefix: &str,
            after: Option<&ObjectKey>,
            limit: usize,
        ) -> Result<Vec<super::super::ObjectMeta>, Error> {
            self.0.list(prefix, after, limit).await
        }

        async fn list_folder(&self, prefix: &str) -> Result<super::super::Folder, Error> {
            self.0.list_folder(prefix).await
        }

        async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
            self.0.delete(key).await
        }
    }

    #[tokio::test]
    async fn failures_are_passed_on_and_the_object_still_removed() {
        let (outcome, memory) = probed(vec![Rule::on(Verb::Get, Fault::Before(ErrorKind::Denied))]).await;
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Denied);
        assert!(memory.list("", None, 1).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn an_object_that_may_not_be_deleted_is_no_failure() {
        let (outcome, _) = probed(vec![Rule::on(Verb::Delete, Fault::Before(ErrorKind::Denied))]).await;
        assert!(outcome.unwrap().create_only);
        let (outcome, _) = probed(vec![Rule::on(Verb::Delete, Fault::Before(ErrorKind::Unreachable))]).await;
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unreachable);
    }
}
