//! A basebackup from the first question to the commit.
//!
//! check → `begin` → start the backup on the server → walk, plan, copy → `pg_control` → stop → `backup_label`,
//! `backup_manifest` → WAL in the archive → commit. The session is watched all the time: with it the backup ends.
//! Nothing is undone on failure, because nothing counts before the last step; what was uploaded is left for the
//! sweep. Dropping the future at any point is the same as a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::backup::carry::{Carried, WalCarrier, carrying, hold_wal};
use crate::backup::data_directory::{SourceTree, WalkOptions};
use crate::backup::error::Error;
use crate::backup::live_directory::{read_control_file, read_identity};
use crate::backup::origin::{Chosen, Node, Origin, choose_origin};
use crate::backup::packer::{Packed, Packer};
use crate::backup::page_check::PageCheck;
use crate::backup::pipeline::{Budget, copy};
use crate::backup::plan::{PlanOptions, plan_copy};
use crate::backup::rate::Meter;
use crate::backup::read_pages::JobContext;
use crate::backup::server_facts::ServerFacts;
use crate::backup::server_manifest::{ManifestFacts, server_manifest};
use crate::backup::server_record::{empty_record, server_record};
use crate::backup::source::{BackupSession, Checkpoint, StartOptions, Stopped, switch_wal};
use crate::backup::source_file::{DirectorySource, FileState};
use crate::backup::wal_wait::{NeededWal, WalArchive, archive_histories, wait_for_wal};
use crate::codec::{Compression, CpuPool};
use crate::monitor::{Monitor, Task};
use crate::pg::{Lsn, RelationMap, WalSegmentNumber};
use crate::replication::Session;
use crate::repo::{
    self, BasebackupWriter, BeginOptions, ClusterId, Completion, NamedChunks, Repository,
    documents::BackupRecord, entry::TreePath, manifest::ManifestContent,
};

/// How a basebackup is taken.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The servers it may be taken from, in the user's order.
    pub nodes: Vec<Node>,
    /// The data directory; none: where the server says it is.
    pub data_directory: Option<PathBuf>,
    /// What the user calls it.
    pub label: Option<String>,
    /// Whether its WAL comes by streaming, so that the server needs not archive it.
    pub wal_received: bool,
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
    /// Bytes that were read of the server's files.
    pub read_bytes: u64,
    /// Files that were gone before they could be read.
    pub vanished: u64,
    /// Files that became shorter while they were read.
    pub shrunk: u64,
}

/// What was copied while the server was in backup mode.
struct Copied {
    tree: Arc<SourceTree>,
    packed: Packed,
    named: NamedChunks,
    stopped: Stopped,
    started: (Lsn, Timestamp),
    carried: Option<Carried>,
}

const POSTGRES: &str = "postgres";

/// Takes a full basebackup; `archive` makes the archive of a cluster to be asked for its WAL.
pub async fn run(
    repository: &Repository,
    options: &BackupOptions,
    pool: &CpuPool,
    archive: impl Fn(ClusterId) -> Box<dyn WalArchive>,
    monitor: &dyn Monitor,
) -> Result<BackupOutcome, Error> {
    let began = repository.clock().monotonic();
    repository.check_store().await?;
    let needs_no_archiving = options.wal_received || options.standalone;
    let Chosen { session, origin, primary } =
        choose_origin(&options.nodes, options.data_directory.as_deref(), needs_no_archiving).await?;
    let (cluster, wal_floor) = (origin.cluster, origin.control.redo);
    repository.admit(cluster).await?;
    let begin = BeginOptions {
        cluster,
        timeline: origin.facts.identity.timeline,
        wal_floor,
        parent: None,
        host: options.host.clone(),
        pid: std::process::id(),
    };
    let writer = Arc::new(BasebackupWriter::begin(repository, begin).await?);
    let source = origin.data_directory.display();
    tracing::info!("basebackup {} of cluster {cluster} begins, from \"{source}\"", writer.id());
    let meter = Meter::new(options.rate, repository.shared_clock());
    let copied =
        copy_in_backup_mode(session, &origin, options, pool, writer.clone(), &meter, monitor).await?;
    archive_histories(repository, cluster, copied.stopped.timeline, &origin.data_directory).await?;
    if copied.carried.is_none() {
        archive_rest(repository, &*archive(cluster), primary, &needed_wal(cluster, &copied), options).await?;
    }

    let Copied { tree, packed, mut named, stopped, started, carried } = copied;
    let mut record = empty_record(writer.id(), cluster, stopped.timeline, (started.0, stopped.lsn));
    record.label = options.label.clone();
    (record.started_at, record.stopped_at, record.wal_floor) = (started.1, stopped.at, wal_floor);
    record.server =
        server_record(&origin.facts, &origin.control, &options.host, tree.outside_configuration.clone());
    record.size = packed.size;
    let mut entries = packed.entries;
    entries.extend(tree.entries.iter().cloned());
    if let Some(carried) = carried {
        record.wal = Some(carried.wal);
        named.extend(carried.named);
        entries.extend(carried.entries);
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
    let record = writer.finish(completion).await?;
    Ok(BackupOutcome {
        record,
        took: repository.clock().monotonic().duration_since(began),
        read_bytes: meter.read_bytes(),
        vanished: tree.vanished + packed.vanished,
        shrunk: packed.shrunk,
    })
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

async fn copy_in_backup_mode(
    session: Session,
    origin: &Origin,
    options: &BackupOptions,
    pool: &CpuPool,
    writer: Arc<BasebackupWriter>,
    meter: &Meter,
    monitor: &dyn Monitor,
) -> Result<Copied, Error> {
    let Origin { facts, data_directory, .. } = origin;
    let label = options.label.clone().unwrap_or_else(|| format!("walden {}", writer.id()));
    let start = StartOptions { checkpoint: options.checkpoint, label };
    // Before the start, so that nothing from there on is removed.
    let slot = if options.standalone { Some(hold_wal(&session, writer.id()).await?) } else { None };
    let session = BackupSession::start_on(session, facts.clone(), start).await?;
    let started = (session.started().lsn, session.started().at);
    let mut carrier = None;
    if let Some(slot) = slot {
        let (begun, compression) = (session.started(), options.compression);
        carrier = Some(WalCarrier::new(slot, origin, begun, writer.clone(), compression).await?);
    }
    let mut packer = Packer::new(writer, options.compression, options.budget.uploads);
    let copying = copy_files(origin, started.0, options, pool, &mut packer, meter, monitor);
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

    let written = |size: usize| FileState { size: size as u64, mode: 0o600, modified: stopped.at };
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
    let (packed, named) = packer.finish().await?;
    Ok(Copied { tree, packed, named, stopped, started, carried })
}

async fn copy_files(
    origin: &Origin,
    start_lsn: Lsn,
    options: &BackupOptions,
    pool: &CpuPool,
    packer: &mut Packer,
    meter: &Meter,
    monitor: &dyn Monitor,
) -> Result<Arc<SourceTree>, Error> {
    let Origin { facts, data_directory, control, .. } = origin;
    let walk = walk_options(data_directory, facts);
    let (tree, mapped) = blocking(move || {
        let tree = SourceTree::walk(&walk)?;
        let mapped = mapped_relations(&tree);
        Ok((Arc::new(tree), mapped))
    })
    .await?;
    tree.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let plan = plan_copy(&tree.files, &PlanOptions { postgres: postgres_of(facts), mapped });
    tracing::debug!("{plan}");
    let has_checksums = control.data_checksum_version != 0;
    let context = JobContext {
        source: Arc::new(meter.before(Arc::new(DirectorySource::new(tree.clone())))),
        page_check: has_checksums.then(|| PageCheck::new(start_lsn, control.relation_segment_pages)),
        compression: options.compression,
    };
    let progress = monitor.start(Task::bytes("backup", plan.bytes));
    copy(&plan, &tree.files, Arc::new(context), pool, options.budget, packer, &progress).await?;
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
