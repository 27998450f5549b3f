//! Whether packs that are named are in the store, as large as they were written.
//!
//! A listing of each folder, then a look at what it lacks, because a listing is no proof. Asked before a basebackup
//! reuses them, so that what is gone is stored again, and once more before it is committed. What stands in a pack is
//! not looked at: that is for `verify`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::{StreamExt, TryStreamExt, stream};

use crate::repo::error::Error;
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::refs::PackRecord;
use crate::repo::repository::Repository;
use crate::storage::ObjectKey;

/// Keys asked for at a time, as many as S3 gives.
const LIST_PAGE: usize = 1000;
/// Folders listed at a time, and packs looked at: a month of daily basebackups has thirty folders.
const REQUESTS_MAX: usize = 8;

/// Returns which of `records` are not in the store with the size they were written with, ascending.
///
/// # Errors
/// Where the store cannot tell.
pub async fn missing_packs<'a>(
    repository: &Repository,
    records: impl Iterator<Item = &'a PackRecord>,
) -> Result<Vec<PackId>, Error> {
    let layout = repository.layout();
    let wanted: BTreeMap<ObjectKey, &PackRecord> =
        records.map(|record| (layout.pack(record.id, &record.salt), record)).collect();
    let origins: BTreeSet<BasebackupId> = wanted.values().map(|record| record.id.origin).collect();
    let listings = origins.into_iter().map(|origin| list_packs(repository, origin));
    let listed: Vec<Vec<(ObjectKey, u64)>> =
        stream::iter(listings).buffered(REQUESTS_MAX).try_collect().await?;
    let sizes: HashMap<ObjectKey, u64> = listed.into_iter().flatten().collect();
    let looks = wanted.into_iter().map(|(key, record)| {
        let listed = sizes.get(&key).copied();
        async move {
            let size = match listed {
                Some(size) => Some(size),
                None => size_of(repository, &key).await?,
            };
            Ok::<_, Error>((size != Some(u64::from(record.size))).then_some(record.id))
        }
    });
    let mut missing: Vec<PackId> = stream::iter(looks)
        .buffered(REQUESTS_MAX)
        .try_filter_map(|it| async move { Ok(it) })
        .try_collect()
        .await?;
    missing.sort();
    Ok(missing)
}

async fn list_packs(repository: &Repository, origin: BasebackupId) -> Result<Vec<(ObjectKey, u64)>, Error> {
    let (mut packs, mut after) = (Vec::new(), None);
    loop {
        let page =
            repository.store().list(&repository.layout().packs(origin), after.as_ref(), LIST_PAGE).await?;
        after = page.last().map(|object| object.key.clone());
        let more = page.len() == LIST_PAGE;
        packs.extend(page.into_iter().map(|object| (object.key, object.size)));
        if !more {
            return Ok(packs);
        }
    }
}

async fn size_of(repository: &Repository, key: &ObjectKey) -> Result<Option<u64>, Error> {
    match repository.store().head(key).await {
        Ok(object) => Ok(Some(object.size)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
