//! The trait every store implements, and the contract that stands on it.
//!
//! `conformance` turns each heading of the contract into checks and is run on every store and on every
//! wrapper.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::error::Error;
use super::key::ObjectKey;

/// Most objects and folders one `list_folder` returns; a folder with more is refused, not held in memory.
pub const FOLDER_ENTRIES_MAX: usize = 1_000_000;

/// The longest range one `get_range` reads: beyond every object of the format, so more is a damaged map
/// speaking.
pub const RANGE_BYTES_MAX: u64 = 1 << 30;

/// A place that keeps objects under keys.
///
/// # Atomicity
///
/// An object appears under its key whole or not at all. No reader and no listing ever sees part of one,
/// whatever happens to the writer. An object that exists never changes.
///
/// # Durability
///
/// When [`create`](Store::create) returns `Ok`, the object survives the loss of power: content, name and
/// every folder on the way to it.
///
/// # Create-only
///
/// Of any number of creates of one key, in one process or in many, exactly one succeeds. The others fail
/// with `AlreadyExists` and change nothing; the object they found is durable, whoever created it. A key
/// must not name an object and a folder at once (`a` and `a/b`): some stores could not hold both, so no
/// caller tries.
///
/// # Read after write
///
/// A `get`, `get_range` or `head` that begins after a create returned `Ok` finds the object, from any
/// process; one that begins after a delete returned `Ok` does not. `NotFound` is a proof, given only by a
/// store that answered: a missing bucket or repository folder, a refused permission, a dead peer are other
/// errors.
///
/// # Unknown outcomes
///
/// A create whose answer was lost fails with `OutcomeUnknown`: the object may exist, or may come to exist
/// later. Every other error of `create` says that this call created nothing and will not. Reading the key
/// back settles it (`retry::Retrying` does): our bytes mean that it was created. So two writers of the very
/// same bytes may both be told that they created the object; who must know which of them did makes the
/// bytes differ. A delete that failed may have happened; deleting again is harmless.
///
/// # Listing is not a snapshot
///
/// A listing holds every object that existed from before it began until after it ended and none that was
/// absent all that time; what is created or deleted meanwhile may be in it or not. Order is ascending by
/// the bytes of the key. A folder may be reported that holds no object (any more). Names that are not
/// object keys are not reported: they are not ours.
///
/// # Cancellation
///
/// A call whose future is dropped may have happened or not, as if its answer had been lost.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// Creates an object from its whole content, unless the key is taken.
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error>;

    /// Reads a whole object; one larger than `size_max` bytes is refused with `TooLarge` before any memory
    /// is taken.
    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error>;

    /// Reads exactly the bytes of `range`, which must not be empty; `Truncated` where the object ends
    /// before them.
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error>;

    /// Reads size and age of an object.
    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error>;

    /// Lists at most `limit` objects in and below the folder `prefix`, ascending, those after `after` only.
    ///
    /// The prefix is whole components, with or without a slash at its end; `""` is the whole store. Fewer
    /// than `limit` objects mean that there are no more. A missing folder is empty.
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error>;

    /// Lists one level: the folders and the objects directly in the folder `prefix`, each ascending.
    ///
    /// A missing folder is empty; one with more than [`FOLDER_ENTRIES_MAX`] entries is refused with
    /// `TooLarge`.
    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error>;

    /// Removes an object; a missing one is success.
    async fn delete(&self, key: &ObjectKey) -> Result<(), Error>;
}

/// What a store knows of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// The object's key.
    pub key: ObjectKey,
    /// Its size in bytes.
    pub size: u64,
    /// When the store finished creating it, by the store's clock.
    pub last_modified: Timestamp,
}

/// One level of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder {
    /// Names of the folders, one component each, ascending.
    pub folders: Vec<String>,
    /// The objects directly in the folder, ascending by key.
    pub objects: Vec<ObjectMeta>,
}

/// Checks a folder prefix and returns it with a slash at its end, or empty for the whole store.
pub(crate) fn folder_prefix(prefix: &str) -> Result<String, Error> {
    let folder = prefix.strip_suffix('/').unwrap_or(prefix);
    if prefix.is_empty() {
        return Ok(String::new());
    }
    match ObjectKey::parse(folder) {
        Ok(_) => Ok(format!("{folder}/")),
        Err(error) => Err(Error::Invalid {
            key: prefix.to_owned(),
            reason: format!("cannot list \"{}\": it is not a folder of object keys", prefix.escape_debug()),
            source: Some(Arc::new(error)),
        }),
    }
}

/// Names a folder in a message, where the whole store has no name of its own.
pub(crate) fn folder_name(prefix: &str) -> &str {
    if prefix.is_empty() { "/" } else { prefix }
}

/// Checks that a range holds at least one byte and at most [`RANGE_BYTES_MAX`], and returns its length.
pub(crate) fn range_length(key: &ObjectKey, range: &Range<u64>) -> Result<u64, Error> {
    match range.end.checked_sub(range.start) {
        Some(length @ 1..=RANGE_BYTES_MAX) => Ok(length),
        Some(size) if size > RANGE_BYTES_MAX => {
            Err(Error::TooLarge { key: key.to_string(), size, size_max: RANGE_BYTES_MAX })
        }
        _ => Err(Error::Invalid {
            key: key.to_string(),
            reason: format!("cannot read the empty range {}..{} of {key}", range.start, range.end),
            source: None,
        }),
    }
}

#[async_trait]
impl<T: Store + ?Sized> Store for Arc<T> {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        (**self).create(key, body).await
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        (**self).get(key, size_max).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        (**self).get_range(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        (**self).head(key).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        (**self).list(prefix, after, limit).await
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        (**self).list_folder(prefix).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        (**self).delete(key).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::ErrorKind;
    use super::*;

    #[test]
    fn a_folder_prefix_is_whole_components() {
        assert_eq!(folder_prefix("").unwrap(), "");
        assert_eq!(folder_prefix("main/wal").unwrap(), "main/wal/");
        assert_eq!(folder_prefix("main/wal/").unwrap(), "main/wal/");
        for wrong in ["/", "..", "main//", "/main", "main/../.."] {
            assert_eq!(folder_prefix(wrong).unwrap_err().kind(), ErrorKind::Invalid, "{wrong}");
        }
    }

    #[test]
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    fn a_range_that_is_empty_or_absurd_is_refused() {
        let key = ObjectKey::parse("a").unwrap();
        assert_eq!(range_length(&key, &(3..7)).unwrap(), 4);
        assert!(range_length(&key, &(3..3)).is_err());
        assert!(range_length(&key, &(7..3)).is_err());
        assert_eq!(range_length(&key, &(0..RANGE_BYTES_MAX)).unwrap(), RANGE_BYTES_MAX);
        assert_eq!(range_length(&key, &(0..u64::MAX)).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}
