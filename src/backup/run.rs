//! A basebackup from the first question to the commit.
//!
//! check → full or incremental → `begin` → start the backup on the server → walk, plan, copy → `pg_control` → stop →
//! `backup_label`, `backup_manifest` → WAL in the archive → commit → what is remembered is saved. The session is watched
//! all the time: with it the backup ends. Nothing is undone on failure, because nothing counts before the last step; what
//! was uploaded is left for the sweep. Dropping the future at any point is the same as a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::backup::carry::{Carried, WalCarrier, carrying, hold_wal};
use crate::backup::change::{Decision, Today};
use crate::backup::data_directory::{SourceTree, WalkOptions};
use crate::backup::error::Error;
use crate::backup::hints::Hints;
use crate::backup::live_directory::{read_control_file, read_identity};
use crate::backup::origin::{Chosen, Node, Origin, choose_origin};
use crate::backup::packer::{Packer, Stored, WorkDone};
use crate::backup::page_check::PageCheck;
use crate::backup::pipeline::{Budget, CopySource, copy};
use crate::backup::plan::PlanOptions;
use crate::backup::rate::{RateLimit, limited};
use crate::backup::read_pages::JobContext;
use crate::backup::reading::{Reading, plan_reading};
use crate::backup::server_facts::ServerFacts;
use crate::backup::server_manifest::{ManifestFacts, server_manifest};
use crate::backup::server_record::{empty_record, server_record};
use crate::backup::site_state::{Begun, SiteState};
use crate::backup::source::{
    BackupSession, Checkpoint, SourceError, StartOptions, Stopped, check_label, switch_wal,
};
use crate::backup::source_file::{DirectorySource, FileState};
use crate::backup::state::{Journal, StateWriter};
use crate::backup::stream;
use crate::backup::wal_wait::{NeededWal, WalArchive, archive_histories, wait_for_wal};
use crate::clock::Clock;
use crate::codec::{Compression, CpuPool};
use crate::monitor::{Monitor, Task};
use crate::pg::{Lsn, RelationMap, WalSegmentNumber};
use crate::replication::{Error as SessionError, Session};
use crate::repo::{
    self, BasebackupWriter, BeginOptions, ClusterId, Completion, Repository, documents::BackupRecord,
    entry::TreePath, manifest::ManifestContent,
};

/// Where the files of a basebackup come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BackupSource {
    /// The data directory, which is on this host.
    #[default]
    DataDirectory,
    /// The server, which may be on any host, by BASE_BACKUP.
    Replication,
}

/// How a basebackup is taken.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// Where the files come from.
    pub source: BackupSource,
    /// The servers it may be taken from, in the user's order.
    pub nodes: Vec<Node>,
    /// The data directory; none: where the server says it is.
    pub data_directory: Option<PathBuf>,
    /// What the user calls it.
    pub label: Option<String>,
    /// Whether its WAL comes by streaming, so that the server needs not archive it.
    pub wal_received: bool,
    /// Whether nothing of earlier basebackups is reused.
    pub full: bool,
    /// Where this host remembers basebackups, a folder for each site; or why nothing is remembered.
    pub states: Result<PathBuf, String>,
    /// How the server begins.
    pub checkpoint: Checkpoint,
    /// How chunks are compressed.
    pub compression: Compression,
    /// How much of the machine is taken.
    pub budget: Budget,
    /// How long the archive may take to have the WAL.
    pub wal_patience: Duration,
    /// Whether the basebackup carries its WAL itself, so that the archive need not have it.
    pub standalone: bool,
    /// Bytes of the source that are read in a second, where that is limited.
    pub rate: Option<NonZeroU64>,
    /// This host, for people.
    pub host: String,
}

/// What became of it.
#[derive(Debug, Clone)]
pub struct BackupOutcome {
    /// The basebackup.
    pub record: BackupRecord,
    /// How long it took, by this host's clock.
    pub took: Duration,
    /// Files that were gone before they could be read.
    pub vanished: u64,
    /// Files that became shorter while they were read.
    pub shrunk: u64,
    /// Whether it is a full one, and why.
    pub decision: Decision,
    /// What was read, and what of it had to be stored.
    pub work: WorkDone,
    /// Bytes of all packs it names, whether they are in use or not.
    pub packs_bytes: u64,
    /// Bytes that came from the server; none where its data directory was read.
    pub received_bytes: Option<u64>,
}

/// What decides how files are copied.
struct How<'a> {
    options: &'a BackupOptions,
    begun: &'a Begun,
    clock: Arc<dyn Clock>,
}

/// What was copied while the server was in backup mode.
struct Copied {
    tree: Arc<SourceTree>,
    stored: Stored,
    stopped: Stopped,
    started: (Lsn, Timestamp),
    carried: Option<Carried>,
}

const POSTGRES: &str = "postgres";

/// Takes a basebackup; `archive` makes the archive of a cluster to be asked for its WAL.
pub async fn run(
    repository: &Repository,
    options: &BackupOptions,
    pool: &CpuPool,
    archive: impl Fn(ClusterId) -> Box<dyn WalArchive>,
    monitor: &dyn Monitor,
) -> Result<BackupOutcome, Error> {
    // Before anything is begun: the server would refuse it, or cut it.
    options.label.as_deref().map_or(Ok(()), check_label)?;
    match options.source {
        BackupSource::DataDirectory => read_directory(repository, options, pool, archive, monitor).await,
        BackupSource::Replication if options.standalone => {
            Err(Error::NeedsDirectory { what: "a standalone basebackup" })
        }
        BackupSource::Replication => stream::run(repository, options, pool, archive, monitor).await,
    }
}

/// Takes a basebackup from the data directory.
async fn read_directory(
    repository: &Repository,
    options: &BackupOptions,
    pool: &CpuPool,
    archive: impl Fn(ClusterId) -> Box<dyn WalArchive>,
    monitor: &dyn Monitor,
) -> Result<BackupOutcome, Error> {
    let began = repository.clock().monotonic();
    repository.check_store().await?;
    let needs_no_archiving = options.wal_received || options.standalone;
    let Chosen { session, origin, primary, .. } =
        choose_origin(&options.nodes, options.data_directory.as_deref(), needs_no_archiving).await?;
    let (cluster, wal_floor) = (origin.cluster, origin.control.redo);
    repository.admit(cluster).await?;
    let timeline = origin.facts.identity.timeline;
    let today = Today::of(repository, cluster, timeline, origin.control.data_checksum_version != 0);
    let states = SiteState::take(repository, options.states.as_deref()).await?;
    let prepared = states.prepare(repository, &today, options.full, Some(&origin.data_directory)).await?;
    let begin = BeginOptions {
        cluster,
        timeline,
        wal_floor,
        parent: None,
        host: options.host.clone(),
        pid: std::process::id(),
    };
    let (writer, begun) = states.begin(repository, begin, prepared).await?;
    let writer = Arc::new(writer);
    let source = origin.data_directory.display();
    tracing::info!("basebackup {} of cluster {cluster} begins, from \"{source}\"", writer.id());
    let packer = new_packer(&writer, options, &begun, states.remembered(writer.id(), &begun, &today).await);
    let how = How { options, begun: &begun, clock: repository.shared_clock() };
    let copying = copy_in_backup_mode(session, &origin, &how, (pool, &writer), packer, monitor);
    let copied = copying.await.map_err(|error| of_holder(error, options))?;
    archive_histories(repository, cluster, copied.stopped.timeline, &origin.data_directory).await?;
    if copied.carried.is_none() {
        archive_rest(repository, &*archive(cluster), primary, &needed_wal(cluster, &copied), options).await?;
    }

    let Copied { tree, stored: Stored { packed, mut named, state }, stopped, started, carried } = copied;
    let mut work = packed.work;
    work.chunks_reused = named.chunks_not_of(writer.id());
    let mut record = empty_record(writer.id(), cluster, stopped.timeline, (started.0, stopped.lsn));
    record.label = options.label.clone();
    (record.started_at, record.stopped_at, record.wal_floor) = (started.1, stopped.at, wal_floor);
    record.server =
        server_record(&origin.facts, &origin.control, &options.host, tree.outside_configuration.clone());
    record.size = packed.size;
    let mut entries = packed.entries;
    entries.extend(tree.entries.iter().cloned());
    if let Some(carried) = carried {
        carried.add_to(&mut record, &mut named, &mut entries);
    }
    let content = ManifestContent {
        entries,
        tablespaces: tree.tablespaces.clone(),
        links: tree.links.clone(),
        start_set: packed.start_set,
    };
    let writer = Arc::into_inner(writer)
        .ok_or_else(|| repo::Error::Internal("an upload outlived the copy".to_owned()))?;
    let completion = Completion { record, content, named, compression: options.compression };
    let committed = writer.finish_pinned(completion).await?;
    states.save(state, &begun, &today, &committed).await;
    Ok(BackupOutcome {
        record: committed.record,
        took: repository.clock().monotonic().duration_since(began),
        vanished: tree.vanished + packed.vanished,
        shrunk: packed.shrunk,
        decision: begun.decision,
        work,
        packs_bytes: committed.packs_bytes,
        received_bytes: None,
    })
}

/// Says what was lost with a session that kept WAL: whoever asks it first hears only that it is gone.
fn of_holder(error: Error, options: &BackupOptions) -> Error {
    match error {
        Error::Source(SourceError::Session(SessionError::Lost { detail })) if options.standalone => {
            Error::WalHolderLost { detail }
        }
        error => error,
    }
}

/// Waits until the archive has the WAL that is needed.
async fn archive_rest(
    repository: &Repository,
    archive: &dyn WalArchive,
    primary: Option<Session>,
    needed: &NeededWal,
    options: &BackupOptions,
) -> Result<(), Error> {
    if let Some(primary) = primary {
        // A standby cannot end the segment it stopped in, and an idle primary would take hours to (failure 19).
        switch_wal(&primary).await?;
    }
    wait_for_wal(archive, needed, repository.clock(), options.wal_patience).await
}

pub(super) fn new_packer(
    writer: &Arc<BasebackupWriter>,
    options: &BackupOptions,
    begun: &Begun,
    (state, journal): (Option<StateWriter>, Option<Journal>),
) -> Packer {
    let packer = Packer::new(writer.clone(), options.compression, options.budget.uploads);
    let packer = match &begun.parent {
        Some(parent) => packer.writing_again(parent.written_again()),
        None => packer,
    };
    let packer = match state {
        Some(state) => packer.remembering(state),
        None => packer,
    };
    match journal {
        Some(journal) => packer.journaling(journal),
        None => packer,
    }
}

async fn copy_in_backup_mode(
    session: Session,
    origin: &Origin,
    how: &How<'_>,
    (pool, writer): (&CpuPool, &Arc<BasebackupWriter>),
    mut packer: Packer,
    monitor: &dyn Monitor,
) -> Result<Copied, Error> {
    let Origin { facts, data_directory, .. } = origin;
    let How { options, begun, clock } = how;
    let label = options.label.clone().unwrap_or_else(|| format!("walden {}", packer.basebackup()));
    let start = StartOptions { checkpoint: options.checkpoint, label };
    // Before the start, so that nothing from there on is removed.
    let slot = if options.standalone { Some(hold_wal(&session, packer.basebackup()).await?) } else { None };
    let session = BackupSession::start_on(session, facts.clone(), start).await?;
    let started = (session.started().lsn, session.started().at);
    let mut carrier = None;
    if let Some(slot) = slot {
        let (begun, compression) = (session.started(), options.compression);
        carrier = Some(WalCarrier::new(slot, origin, begun, writer.clone(), compression).await?);
    }
    let hints = match &begun.parent {
        Some(parent) => {
            let segment_pages = origin.control.relation_segment_pages;
            Hints::gather(&session, parent, data_directory, segment_pages, &**clock).await?
        }
        None => None,
    };
    let copying = copy_files(origin, started.0, (how, hints), pool, &mut packer, monitor);
    let tree = tokio::select! {
        tree = carrying(carrier.as_mut(), session.session(), copying) => tree?,
        lost = session.lost() => return Err(lost.into()),
    };
    let directory = data_directory.clone();
    let ((bytes, state, _), identity) =
        blocking(move || Ok((read_control_file(&directory)?, read_identity(&directory)?))).await?;
    session.check_directory(&identity)?;
    packer.push_bytes(TreePath::new("data/global/pg_control")?, state, bytes).await?;
    let (stopped, session) = session.end().await?;
    let carried = match carrier {
        Some(carrier) => Some(carrier.finish(&session, &stopped).await?),
        None => None,
    };

    let written =
        |size: usize| FileState { size: size as u64, mode: 0o600, modified: stopped.at, identity: None };
    let backup_label = bytes::Bytes::from(stopped.backup_label.clone());
    packer.push_bytes(TreePath::new("data/backup_label")?, written(backup_label.len()), backup_label).await?;
    let manifest = ManifestFacts {
        version: facts.version,
        system_identifier: facts.identity.system_identifier,
        timeline: stopped.timeline,
        wal: (started.0, stopped.lsn),
    };
    let packed = packer.packed();
    let text =
        bytes::Bytes::from(server_manifest(&manifest, &packed.entries, &packed.checksums, &tree.entries));
    packer.push_bytes(TreePath::new("data/backup_manifest")?, written(text.len()), text).await?;
    let stored = packer.finish().await?;
    Ok(Copied { tree, stored, stopped, started, carried })
}

async fn copy_files(
    origin: &Origin,
    start_lsn: Lsn,
    (how, hints): (&How<'_>, Option<Hints>),
    pool: &CpuPool,
    packer: &mut Packer,
    monitor: &dyn Monitor,
) -> Result<Arc<SourceTree>, Error> {
    let Origin { facts, data_directory, control, .. } = origin;
    let How { options, begun, clock } = how;
    let walk = walk_options(data_directory, facts);
    let (postgres, parent) = (postgres_of(facts), begun.parent.clone());
    let (tree, reading) = blocking(move || {
        let tree = SourceTree::walk(&walk)?;
        let mapped = mapped_relations(&tree);
        let options = PlanOptions { postgres, mapped };
        let reading = plan_reading(&tree.files, &options, parent.as_deref(), hints.as_ref());
        Ok((Arc::new(tree), reading))
    })
    .await?;
    tree.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let Reading { plan, start_set_again } = &reading;
    tracing::debug!("{plan}");
    let has_checksums = control.data_checksum_version != 0;
    let limit = options.rate.map(|rate| Arc::new(RateLimit::new(rate, clock.clone())));
    let context = Arc::new(JobContext {
        source: limited(Arc::new(DirectorySource::new(tree.clone())), limit),
        page_check: has_checksums.then(|| PageCheck::new(start_lsn, control.relation_segment_pages)),
        compression: options.compression,
        hash_key: begun.hash_key.clone(),
        parent: begun.parent.clone(),
    });
    let progress = monitor.start(Task::bytes("backup", plan.bytes));
    let start_set_again = *start_set_again;
    let source = CopySource { plan, files: &tree.files, context: &context, start_set_again };
    copy(source, pool, options.budget, packer, &progress).await?;
    Ok(tree)
}

/// Returns the database whose catalogs a start reads first.
pub(super) fn postgres_of(facts: &ServerFacts) -> Option<u32> {
    facts.databases.iter().find(|database| database.name == POSTGRES).map(|database| database.oid.0)
}

pub(super) fn walk_options(data_directory: &Path, facts: &ServerFacts) -> WalkOptions {
    WalkOptions {
        data_directory: data_directory.to_owned(),
        version_directory: format!("PG_{}_{}", facts.version.number(), facts.catalog_version),
        tablespace_names: facts.tablespaces.iter().map(|it| (it.oid.0, it.name.clone())).collect(),
        configuration: facts.configuration_files.clone(),
    }
}

/// Reads the maps of all databases; one that cannot be read now only costs its catalogs their place in the plan.
pub(super) fn mapped_relations(tree: &SourceTree) -> BTreeMap<u32, BTreeSet<u32>> {
    let mut mapped = BTreeMap::new();
    for file in tree.files.iter().filter(|file| file.path.split().1 == b"pg_filenode.map") {
        let parts: Vec<&[u8]> = file.path.as_bytes().split(|byte| *byte == b'/').collect();
        let [b"data", b"base", database, _] = parts[..] else {
            continue;
        };
        let database = std::str::from_utf8(database).ok().and_then(|digits| digits.parse().ok());
        let map =
            std::fs::read(tree.source_path(file)).ok().and_then(|bytes| RelationMap::parse(&bytes).ok());
        if let (Some(database), Some(map)) = (database, map) {
            mapped.insert(database, map.mappings.iter().map(|(_, number)| number.0).collect());
        }
    }
    mapped
}

fn needed_wal(cluster: ClusterId, copied: &Copied) -> NeededWal {
    let size = cluster.segment_size;
    NeededWal {
        timeline: copied.stopped.timeline,
        first: WalSegmentNumber::containing(copied.started.0, size),
        last: WalSegmentNumber::ending_at(copied.stopped.lsn, size),
        size,
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(repo::Error::Internal(error.to_string()).into()),
    }
}
