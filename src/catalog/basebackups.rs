//! The basebackups of a site, and which of them a user means.
//!
//! A listing costs one folder listing and two small reads for each id, [`READS_MAX`] of them at a time. Attempts
//! without outcome, abandoned and expired ones are no basebackups. A record that cannot be trusted does not hide
//! the others, but `latest` never passes over it in silence; a store that cannot tell fails the listing.
//! Deliberately absent: whether a basebackup can be recovered, which WAL coverage decides.

use futures::StreamExt;
use thiserror::Error;

use crate::codec::Digest;
use crate::repo::{
    self, BasebackupId, ErrorKind, Repository,
    documents::{BackupRecord, Outcome},
    keyring::Trust,
};

/// Everything the store says of the basebackups of a site.
#[derive(Debug, Default)]
pub struct BasebackupList {
    /// Complete and not expired, oldest first.
    pub complete: Vec<ListedBasebackup>,
    /// Those whose outcome is there and cannot be read or trusted, oldest first.
    pub unreadable: Vec<(BasebackupId, repo::Error)>,
    /// Attempts that have no outcome: running, or killed.
    pub unfinished: Vec<BasebackupId>,
}

/// A complete, unexpired basebackup.
#[derive(Debug, Clone)]
pub struct ListedBasebackup {
    /// What is known of it without any key.
    pub record: BackupRecord,
    /// BLAKE3 of its `backup.json`.
    pub digest: Digest,
    /// Whether a trusted signer vouches for it.
    pub trust: Trust,
}

/// Why a name stands for no basebackup.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// The site has none.
    #[error("there is no basebackup")]
    NoBasebackup,
    /// Nothing is called that.
    #[error("there is no basebackup \"{name}\"")]
    NotFound { name: String },
    /// `latest~n` reaches behind the oldest.
    #[error("there is no basebackup \"{name}\": the site has {count}")]
    TooFarBack { name: String, count: usize },
    /// Several ids begin so, or several basebackups have that label.
    #[error("\"{name}\" stands for more than one basebackup: {}", join(.candidates))]
    Ambiguous { name: String, candidates: Vec<BasebackupId> },
    /// The basebackup that is meant, or might be, cannot be read.
    #[error("cannot use basebackup {id}: {reason}")]
    Unreadable { id: BasebackupId, reason: String },
}

/// Ids whose documents are read at a time: a listing waits for the network, not for bandwidth.
const READS_MAX: usize = 16;
/// A prefix of an id is shorter than this only by mistake: `2` would be every basebackup.
const PREFIX_LEN_MIN: usize = 4;

impl ResolveError {
    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoBasebackup => "Take one with \"walden backup\".",
            Self::NotFound { .. } | Self::TooFarBack { .. } => {
                "\"walden list\" shows the basebackups; \"latest\", \"latest~1\", an id, its unique prefix or a label \
                 name one."
            }
            Self::Ambiguous { .. } => "Give the whole id.",
            Self::Unreadable { .. } => "Name another basebackup by its id to use it all the same.",
        })
    }
}

/// Lists the basebackups of a site.
///
/// # Errors
/// Where the store cannot tell; objects that are damaged or not trusted are part of the list.
pub async fn list(repository: &Repository) -> Result<BasebackupList, repo::Error> {
    let layout = repository.layout();
    let folder = layout.basebackups();
    let names = repository.store().list_folder(&folder).await?.folders;
    let ids: Vec<BasebackupId> = names
        .iter()
        // What is not named like one of ours is not ours.
        .filter_map(|name| layout.parse_basebackup_folder(&format!("{folder}{name}")))
        .collect();
    let mut found =
        futures::stream::iter(ids.into_iter().map(|id| async move { (id, look_up(repository, id).await) }))
            .buffered(READS_MAX);
    let mut list = BasebackupList::default();
    while let Some((id, state)) = found.next().await {
        match state {
            Ok(State::Complete(listed)) => list.complete.push(*listed),
            Ok(State::Unfinished) => list.unfinished.push(id),
            Ok(State::Gone) => {}
            Err(error) if error.kind() == ErrorKind::Damaged => list.unreadable.push((id, error)),
            Err(error) => return Err(error),
        }
    }
    list.complete.sort_by_key(|listed| listed.record.id);
    list.unreadable.sort_by_key(|(id, _)| *id);
    Ok(list)
}

/// Looks one basebackup up by its id: nothing where it is not complete, abandoned or expired.
///
/// # Errors
/// Where the store cannot tell, and where the record is damaged or not trusted.
pub async fn find(
    repository: &Repository,
    id: BasebackupId,
) -> Result<Option<ListedBasebackup>, repo::Error> {
    match look_up(repository, id).await? {
        State::Complete(listed) => Ok(Some(*listed)),
        State::Unfinished | State::Gone => Ok(None),
    }
}

enum State {
    Complete(Box<ListedBasebackup>),
    Unfinished,
    Gone,
}

async fn look_up(repository: &Repository, id: BasebackupId) -> Result<State, repo::Error> {
    let (expired, outcome) = futures::join!(repository.is_expired(id), repo::read_outcome(repository, id));
    if expired? {
        return Ok(State::Gone);
    }
    match outcome {
        Ok((Outcome::Complete(record), digest, trust)) if record.id == id => {
            Ok(State::Complete(Box::new(ListedBasebackup { record: *record, digest, trust })))
        }
        Ok((Outcome::Complete(record), ..)) => Err(repo::Error::Damaged {
            object: format!("backup.json of basebackup {id}"),
            detail: format!("it is that of basebackup {}", record.id),
        }),
        Ok((Outcome::Abandoned { .. }, ..)) => Ok(State::Gone),
        Err(repo::Error::Incomplete(_)) => Ok(State::Unfinished),
        Err(error) => Err(error),
    }
}

impl BasebackupList {
    /// Returns the basebackup that `name` stands for: `latest`, `latest~n`, an id, its unique prefix, or a label.
    ///
    /// An id is looked for first, then a label, then a prefix. Among equal labels nothing is guessed.
    pub fn resolve(&self, name: &str) -> Result<&ListedBasebackup, ResolveError> {
        if let Some(back) = parse_latest(name) {
            return self.latest(name, back);
        }
        let by_id = |id: &BasebackupId| id.to_string() == name;
        if let Some(listed) = self.complete.iter().find(|listed| by_id(&listed.record.id)) {
            return Ok(listed);
        }
        if let Some((id, error)) = self.unreadable.iter().find(|(id, _)| by_id(id)) {
            return Err(ResolveError::Unreadable { id: *id, reason: error.to_string() });
        }
        let labelled = |listed: &&ListedBasebackup| listed.record.label.as_deref() == Some(name);
        if let Some(listed) = unique(name, self.complete.iter().filter(labelled))? {
            return Ok(listed);
        }
        let starts_so = |id: BasebackupId| name.len() >= PREFIX_LEN_MIN && id.to_string().starts_with(name);
        let begun = unique(name, self.complete.iter().filter(|listed| starts_so(listed.record.id)))?;
        let damaged = self.unreadable.iter().find(|(id, _)| starts_so(*id));
        match (begun, damaged) {
            (Some(listed), None) => Ok(listed),
            (Some(listed), Some((id, _))) => {
                let candidates = vec![listed.record.id, *id];
                Err(ResolveError::Ambiguous { name: name.to_owned(), candidates })
            }
            (None, Some((id, error))) => Err(ResolveError::Unreadable { id: *id, reason: error.to_string() }),
            (None, None) if self.complete.is_empty() => Err(ResolveError::NoBasebackup),
            (None, None) => Err(ResolveError::NotFound { name: name.to_owned() }),
        }
    }

    fn latest(&self, name: &str, back: usize) -> Result<&ListedBasebackup, ResolveError> {
        let count = self.complete.len();
        let listed = match count.checked_sub(back.saturating_add(1)) {
            Some(at) => &self.complete[at],
            None if count == 0 => {
                return Err(self.unreadable_among(|_| true).unwrap_or(ResolveError::NoBasebackup));
            }
            None => return Err(ResolveError::TooFarBack { name: name.to_owned(), count }),
        };
        match self.unreadable_among(|id| id > listed.record.id) {
            Some(error) => Err(error),
            None => Ok(listed),
        }
    }

    /// Returns why the newest of the basebackups that `meant` names cannot be used, where a record cannot be read.
    ///
    /// Whoever chooses for the user asks this first: taking an older one without a word would be wrong data in
    /// silence.
    pub fn unreadable_among(&self, meant: impl Fn(BasebackupId) -> bool) -> Option<ResolveError> {
        let (id, error) = self.unreadable.iter().rev().find(|(id, _)| meant(*id))?;
        Some(ResolveError::Unreadable { id: *id, reason: error.to_string() })
    }
}

/// Returns how far before the newest one `latest` or `latest~n` lies.
fn parse_latest(name: &str) -> Option<usize> {
    let back = name.strip_prefix("latest")?;
    if back.is_empty() {
        return Some(0);
    }
    back.strip_prefix('~')?.parse().ok()
}

fn unique<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a ListedBasebackup>,
) -> Result<Option<&'a ListedBasebackup>, ResolveError> {
    let candidates: Vec<&ListedBasebackup> = candidates.collect();
    match candidates[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => {
            let candidates = candidates.iter().map(|listed| listed.record.id).collect();
            Err(ResolveError::Ambiguous { name: name.to_owned(), candidates })
        }
    }
}

/// Ids for a message, at most five of them.
fn join(ids: &[BasebackupId]) -> String {
    let mut text: Vec<String> = ids.iter().take(5).map(ToString::to_string).collect();
    if ids.len() > text.len() {
        text.push(format!("and {} more", ids.len() - text.len()));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::clock::ManualClock;
    use crate::repo::builder::BasebackupBuilder;
    use crate::repo::testing;
    use crate::storage::{MemoryStore, ObjectKey, Store};

    use super::*;

    struct Site {
        store: Arc<MemoryStore>,
        clock: ManualClock,
        repository: Repository,
    }

    impl Site {
        async fn create() -> Self {
            let clock = testing::clock();
            let store = Arc::new(MemoryStore::with_clock(Arc::new(clock.clone())));
            let repository = testing::site(store.clone(), clock.clone()).await;
            Self { store, clock, repository }
        }

        async fn begin(&self) -> BasebackupBuilder {
            self.clock.advance(std::time::Duration::from_secs(60));
            BasebackupBuilder::begin(&self.repository, testing::basebackup(), None).await.unwrap()
        }

        async fn backup(&self) -> BasebackupId {
            self.begin().await.finish().await.unwrap().id
        }
    }

    fn relabel(list: &mut BasebackupList, labels: &[&str]) {
        for (listed, label) in list.complete.iter_mut().zip(labels) {
            listed.record.label = Some((*label).to_owned());
        }
    }

    #[tokio::test]
    async fn only_complete_and_unexpired_basebackups_are_listed() {
        let site = Site::create().await;
        assert!(list(&site.repository).await.unwrap().complete.is_empty());
        let ids = [site.backup().await, site.backup().await, site.backup().await];
        drop(site.begin().await);
        site.store.create(&site.repository.layout().expired(ids[1]), "{}".into()).await.unwrap();
        let stranger = ObjectKey::parse("main/basebackups/notes/readme").unwrap();
        site.store.create(&stranger, "x".into()).await.unwrap();

        let list = list(&site.repository).await.unwrap();
        let listed: Vec<_> = list.complete.iter().map(|listed| listed.record.id).collect();
        assert_eq!(listed, [ids[0], ids[2]]);
        assert_eq!(list.unfinished.len(), 1);
        assert!(list.unreadable.is_empty());
    }

    #[tokio::test]
    async fn a_basebackup_is_found_by_age_id_prefix_and_label_and_nothing_is_guessed() {
        let site = Site::create().await;
        let none = list(&site.repository).await.unwrap();
        assert!(matches!(none.resolve("latest"), Err(ResolveError::NoBasebackup)));
        let ids = [site.backup().await, site.backup().await, site.backup().await];
        let mut list = list(&site.repository).await.unwrap();
        relabel(&mut list, &["before-upgrade", "weekly", "weekly"]);
        let id = |name: &str| list.resolve(name).map(|listed| listed.record.id);

        assert_eq!(id("latest").unwrap(), ids[2]);
        assert_eq!(id("latest~0").unwrap(), ids[2]);
        assert_eq!(id("latest~2").unwrap(), ids[0]);
        assert_eq!(id(&ids[1].to_string()).unwrap(), ids[1]);
        assert_eq!(id(&ids[1].to_string()[..14]).unwrap(), ids[1]);
        assert_eq!(id("before-upgrade").unwrap(), ids[0]);

        for (name, message) in [
            ("latest~3", "there is no basebackup \"latest~3\": the site has 3".to_owned()),
            ("weekly", format!("\"weekly\" stands for more than one basebackup: {}, {}", ids[1], ids[2])),
            (
                "2026",
                format!("\"2026\" stands for more than one basebackup: {}, {}, {}", ids[0], ids[1], ids[2]),
            ),
            ("latest~x", "there is no basebackup \"latest~x\"".to_owned()),
            ("2", "there is no basebackup \"2\"".to_owned()),
            ("", "there is no basebackup \"\"".to_owned()),
        ] {
            let error = id(name).unwrap_err();
            assert_eq!(error.to_string(), message);
            assert!(error.hint().is_some());
        }
    }

    #[tokio::test]
    async fn a_damaged_record_hides_no_other_and_is_not_passed_over() {
        let site = Site::create().await;
        let ids = [site.backup().await, site.backup().await];
        let key = site.repository.layout().outcome(ids[1]);
        site.store.tamper(&key, |_| Some("{".into()));

        let list = list(&site.repository).await.unwrap();
        assert_eq!(list.complete.len(), 1);
        assert_eq!(list.unreadable.len(), 1);
        for name in ["latest", &ids[1].to_string(), &ids[1].to_string()[..14]] {
            let error = list.resolve(name).unwrap_err();
            assert!(
                matches!(&error, ResolveError::Unreadable { id, .. } if *id == ids[1]),
                "{name}: {error}"
            );
        }
        assert_eq!(list.resolve(&ids[0].to_string()).unwrap().record.id, ids[0]);
    }

    #[tokio::test]
    async fn a_record_moved_to_another_id_is_not_taken_for_it() {
        let site = Site::create().await;
        let ids = [site.backup().await, site.backup().await];
        let bytes = site.store.get(&site.repository.layout().outcome(ids[0]), 1 << 20).await.unwrap();
        site.store.tamper(&site.repository.layout().outcome(ids[1]), |_| Some(bytes));
        let list = list(&site.repository).await.unwrap();
        assert_eq!(list.unreadable.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [ids[1]]);
    }
}
