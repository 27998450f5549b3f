//! `DIR/basebackups`: one directory for each basebackup, and `latest`.
//!
//! Looking a basebackup up reads its record and nothing more; its index is opened when `data`, `tablespaces`,
//! `config` or `links.txt` is. Symbolic links stay within the mount: `wal` leads to the cluster's archive, and what
//! the source linked to elsewhere is told in `links.txt` instead of being followed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::catalog::ListedBasebackup;
use crate::catalog::wal_reader::{Found, Patience, patiently};
use crate::clock::Clock;
use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::fs::{FileKind, Lifetime, Volume};
use crate::mount::inventory::Inventory;
use crate::mount::lower::LowerError;
use crate::mount::lower_volume::LowerVolume;
use crate::mount::open_basebackups::{OnDemand, OpenBasebackups};
use crate::mount::patience::{self, PatienceSwitch, PatientLower};
use crate::mount::repo_lower::{ReaderSource, RepoLower, lower_error};
use crate::mount::virtual_dir::{DynamicDir, Found as FoundItem, Item, StaticFile};
use crate::repo::documents::Outcome;
use crate::repo::entry::TreePath;
use crate::repo::{self, BasebackupId};

/// `DIR/basebackups`.
#[derive(Debug)]
pub(crate) struct BasebackupsDir {
    inventory: Arc<Inventory>,
    open: Arc<OpenBasebackups>,
    clock: Arc<dyn Clock>,
    owner: Owner,
    directories: Mutex<HashMap<BasebackupId, Arc<BasebackupDir>>>,
}

/// `DIR/basebackups/<id>`.
#[derive(Debug)]
struct BasebackupDir {
    listed: Arc<ListedBasebackup>,
    source: Arc<OnDemand>,
    clock: Arc<dyn Clock>,
    parts: Vec<(&'static str, Arc<dyn Volume>)>,
}

/// How long data of a basebackup is waited for before the reader is told `EIO`.
pub(crate) const STORE_PATIENCE: Duration = Duration::from_secs(30);

const LATEST: &str = "latest";
const RECORD: &str = "backup.json";
const LINKS: &str = "links.txt";
const WAL: &str = "wal";

impl BasebackupsDir {
    pub(crate) fn new(
        inventory: Arc<Inventory>,
        open: Arc<OpenBasebackups>,
        clock: Arc<dyn Clock>,
        owner: Owner,
    ) -> Self {
        Self { inventory, open, clock, owner, directories: Mutex::default() }
    }

    /// Returns the directory of a basebackup, always the same one.
    fn directory(&self, listed: &Arc<ListedBasebackup>) -> Arc<BasebackupDir> {
        let mut directories = self.directories.lock().expect("no holder of this lock panics");
        let make = || Arc::new(BasebackupDir::new(listed.clone(), self));
        directories.entry(listed.record.id).or_insert_with(make).clone()
    }
}

impl BasebackupDir {
    fn new(listed: Arc<ListedBasebackup>, site: &BasebackupsDir) -> Self {
        let source = Arc::new(OnDemand { open: site.open.clone(), id: listed.record.id });
        let volume = |part: &'static str| {
            let root = TreePath::new(part).expect("the parts of a basebackup have plain names");
            let lower = Arc::new(RepoLower::opened_by(source.clone(), root));
            let switch = PatienceSwitch::new(patience::Patience::Deadline(STORE_PATIENCE));
            let lower = Arc::new(PatientLower::new(lower, switch, site.clock.clone()));
            let volume: Arc<dyn Volume> = Arc::new(LowerVolume::new(lower, site.owner));
            (part, volume)
        };
        let mut parts = vec![volume("data"), volume("tablespaces")];
        if !listed.record.server.outside_configuration.is_empty() {
            parts.push(volume("config"));
        }
        Self { parts, source, clock: site.clock.clone(), listed }
    }

    /// Returns what the basebackup is, without the signature.
    fn record(&self) -> Result<Item, LowerError> {
        let outcome = Outcome::Complete(Box::new(self.listed.record.clone()));
        let mut text = serde_json::to_vec_pretty(&outcome)
            .map_err(|error| LowerError::Contract { detail: error.to_string() })?;
        text.push(b'\n');
        Ok(Item::File(Arc::new(StaticFile::new(text, self.listed.record.stopped_at))))
    }

    /// Returns the list of links of the source that left its data directory: `path -> target`, a line each.
    async fn links(&self) -> Result<Item, LowerError> {
        let reader = waiting(&*self.clock, LINKS, || self.source.reader()).await?;
        let mut text = Vec::new();
        for link in reader.map(|reader| reader.basebackup().start().links.clone()).unwrap_or_default() {
            text.extend_from_slice(link.path.as_bytes());
            text.extend_from_slice(b" -> ");
            text.extend_from_slice(&link.target);
            text.push(b'\n');
        }
        Ok(Item::File(Arc::new(StaticFile::new(text, self.listed.record.stopped_at))))
    }
}

#[async_trait::async_trait]
impl DynamicDir for BasebackupsDir {
    async fn lookup(&self, _: &Caller, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
        if name == LATEST {
            let newest = waiting(&*self.clock, name, || self.inventory.newest()).await?.flatten();
            let link = |listed: Arc<ListedBasebackup>| FoundItem {
                item: Item::Symlink(listed.record.id.to_string().into_bytes()),
                lifetime: Lifetime::Once,
            };
            return Ok(newest.map(link));
        }
        let Ok(id) = name.parse() else { return Ok(None) };
        let listed = waiting(&*self.clock, name, || self.inventory.find(id)).await?.flatten();
        let found =
            |listed| FoundItem { item: Item::Directory(self.directory(&listed)), lifetime: Lifetime::Once };
        Ok(listed.map(found))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        let ids = waiting(&*self.clock, "the list of basebackups", || self.inventory.list()).await?;
        let ids = ids.unwrap_or_default();
        let mut names: Vec<(Vec<u8>, FileKind)> =
            ids.iter().map(|id| (id.to_string().into_bytes(), FileKind::Directory)).collect();
        if !ids.is_empty() {
            names.push((LATEST.into(), FileKind::Symlink));
        }
        Ok(behind(names, after, limit))
    }
}

#[async_trait::async_trait]
impl DynamicDir for BasebackupDir {
    async fn lookup(&self, _: &Caller, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let name = std::str::from_utf8(name).unwrap_or_default();
        let item = match name {
            RECORD => self.record()?,
            LINKS => self.links().await?,
            WAL => Item::Symlink(format!("../../clusters/{}/wal", self.listed.record.cluster).into_bytes()),
            _ => match self.parts.iter().find(|(part, _)| *part == name) {
                Some((_, volume)) => Item::Volume(volume.clone()),
                None => return Ok(None),
            },
        };
        Ok(Some(FoundItem { item, lifetime: Lifetime::Forever }))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        let mut names: Vec<(Vec<u8>, FileKind)> =
            self.parts.iter().map(|(part, _)| (part.as_bytes().to_vec(), FileKind::Directory)).collect();
        names.push((RECORD.into(), FileKind::File));
        names.push((LINKS.into(), FileKind::File));
        names.push((WAL.into(), FileKind::Symlink));
        names.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(behind(names, after, limit))
    }

    fn modified(&self) -> jiff::Timestamp {
        self.listed.record.stopped_at
    }
}

/// Asks the store for a while; `None` where it answers that there is nothing.
pub(crate) async fn waiting<T, F>(
    clock: &dyn Clock,
    what: &str,
    ask: impl Fn() -> F,
) -> Result<Option<T>, LowerError>
where
    F: Future<Output = Result<T, repo::Error>>,
{
    let patience = Patience::Until(clock.monotonic() + STORE_PATIENCE);
    match patiently(clock, patience, what, ask).await.map_err(|error| lower_error(&error))? {
        Found::Present(value) => Ok(Some(value)),
        Found::Absent => Ok(None),
        Found::Unreadable(error) => Err(lower_error(&error)),
    }
}

/// Returns up to `limit` of the names that sort behind `after`.
pub(crate) fn behind(
    names: Vec<(Vec<u8>, FileKind)>,
    after: Option<&[u8]>,
    limit: usize,
) -> Vec<(Vec<u8>, FileKind)> {
    names.into_iter().filter(|(name, _)| after.is_none_or(|after| &name[..] > after)).take(limit).collect()
}
