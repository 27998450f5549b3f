//! A basebackup by BASE_BACKUP, from the first question to the commit.
//!
//! ask by SQL → can a replication connection be made to the same server? → full or incremental → `begin` → replication
//! connection → BASE_BACKUP → histories → what came, held against the server's manifest → the server is still the same →
//! `backup_manifest` → WAL in the archive → commit → what is remembered is saved. The session is watched all the time: a
//! server that goes, falls silent or becomes another one ends it. The replication connection is there no longer than it
//! is needed. As with `backup::run`, nothing counts before the last step, and dropping the future at any point is the
//! same as a failure.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::backup::change::Today;
use crate::backup::changed_blocks::ChangedBlocks;
use crate::backup::error::Error;
use crate::backup::known_parent::KnownParent;
use crate::backup::origin::{Chosen, choose};
use crate::backup::packer::{Packer, Stored};
use crate::backup::pipeline::Budget;
use crate::backup::rate::RateLimit;
use crate::backup::read_pages::JOB_BYTES;
use crate::backup::reading::START_PACKS_MAX;
use crate::backup::run::{BackupOptions, BackupOutcome, blocking, new_packer};
use crate::backup::server_facts::{Database, ServerFacts};
use crate::backup::server_identity::{Difference, ServerIdentity};
use crate::backup::server_manifest::{ManifestFacts, server_manifest};
use crate::backup::server_record::{empty_record, server_record};
use crate::backup::site_state::{Begun, SiteState};
use crate::backup::source::{Checkpoint, SourceError, switch_wal};
use crate::backup::source_file::FileState;
use crate::backup::stream::changes::Changes;
use crate::backup::stream::copy::{Finished, Incoming, copy};
use crate::backup::stream::error::StreamError;
use crate::backup::stream::histories::{archive_histories, ask_histories};
use crate::backup::stream::manifest::ManifestFile;
use crate::backup::stream::origin::RemoteOrigin;
use crate::backup::stream::outside::{OutsideFiles, read_outside};
use crate::backup::stream::receive::{ReceiveOptions, Received, Receiver, tablespaces_left_out};
use crate::backup::stream::server::Server;
use crate::backup::stream::start_set::StartSet;
use crate::backup::stream::work::{PageJudge, WorkContext};
use crate::backup::wal_wait::{NeededWal, WalArchive, wait_for_wal};
use crate::codec::CpuPool;
use crate::monitor::{Monitor, Task};
use crate::pg::{ControlFile, Lsn, MajorVersion, TimelineHistory, TimelineId, WalSegmentNumber};
use crate::replication::{BaseBackup, BaseBackupEnd, BaseBackupOptions, Error as SessionError, Session};
use crate::repo::{
    self, BasebackupWriter, BeginOptions, ClusterId, Completion, Repository,
    entry::{Entry, TreePath},
    manifest::{ManifestContent, Tablespace},
};

/// What was copied.
struct Copied {
    entries: Vec<Entry>,
    tablespaces: Vec<Tablespace>,
    outside: Vec<String>,
    stored: Stored,
    control: ControlFile,
    timeline: TimelineId,
    wal: (Lsn, Lsn),
    times: (Timestamp, Timestamp),
    received_bytes: u64,
    histories: Vec<(TimelineHistory, Bytes)>,
}

/// Bytes of a large file that are compared at once where most are as they were, so that what differs fills chunks: raw
/// and compressed they are within what the budget has for a job.
const WIDE_BYTES: u64 = 2 << 20;
/// A link in an archive has no longer target.
const LINK_BYTES_MAX: usize = 99;
/// The server's clock.
const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS at";

/// Takes a basebackup through the server; `archive` makes the archive of a cluster to be asked for its WAL.
pub async fn run(
    repository: &Repository,
    options: &BackupOptions,
    pool: &CpuPool,
    archive: impl Fn(ClusterId) -> Box<dyn WalArchive>,
    monitor: &dyn Monitor,
) -> Result<BackupOutcome, Error> {
    match attempt(repository, options, pool, &archive, monitor, true).await {
        Err(Error::Received(error)) if error.is_of_changes() => {
            tracing::warn!("the server is asked for everything: {error}");
            attempt(repository, options, pool, &archive, monitor, false).await
        }
        outcome => outcome,
    }
}

/// Takes one; with `changes` the server may be asked for what has changed, and nothing else.
async fn attempt(
    repository: &Repository,
    options: &BackupOptions,
    pool: &CpuPool,
    archive: &impl Fn(ClusterId) -> Box<dyn WalArchive>,
    monitor: &dyn Monitor,
    changes: bool,
) -> Result<BackupOutcome, Error> {
    let began = repository.clock().monotonic();
    repository.check_store().await?;
    let received = options.wal_received;
    let look = async |session: &Session, facts: ServerFacts| RemoteOrigin::of(session, facts, received).await;
    let Chosen { connection, session, origin, primary } = choose(&options.nodes, look).await?;
    let cluster = origin.cluster;
    repository.admit(cluster).await?;
    let server = Server::new(connection, session, origin);
    let Server { session, origin, .. } = &server;
    // Whether it can be made is seen before anything is written; it is not needed for a while.
    drop(server.connect(repository).await?);
    let begin = BeginOptions {
        cluster,
        timeline: origin.facts.identity.timeline,
        wal_floor: origin.redo,
        parent: None,
        host: options.host.clone(),
        pid: std::process::id(),
    };
    let today = Today::of(repository, cluster, begin.timeline, origin.facts.data_checksums);
    let states = SiteState::take(repository, options.states.as_deref()).await?;
    let prepared = states.prepare(repository, &today, options.full, None).await?;
    let (writer, begun) = states.begin(repository, begin, prepared).await?;
    let writer = Arc::new(writer);
    let address = session.address();
    tracing::info!("basebackup {} of cluster {cluster} begins, by BASE_BACKUP from {address}", writer.id());
    let state = states.remembered(writer.id(), &begun, &today).await;
    let packer = new_packer(&writer, &at_most(options), &begun, state);
    let asked = Asked { options, begun: &begun, changes };
    let copying = receive(repository, &server, asked, pool, packer, monitor);
    let mut copied = tokio::select! {
        copied = copying => copied?,
        lost = session.lost() => return Err(SourceError::from(lost).into()),
        silent = server.falls_silent() => return Err(SourceError::from(silent).into()),
    };
    archive_histories(repository, cluster, copied.timeline, &copied.histories).await?;
    if let Some(primary) = primary {
        // A standby cannot end the segment it stopped in, and an idle primary would take hours to (failure 19).
        switch_wal(&primary).await?;
    }
    let needed = needed_wal(cluster, &copied);
    wait_for_wal(&*archive(cluster), &needed, repository.clock(), options.wal_patience).await?;
    let mut work = copied.stored.packed.work;
    work.chunks_reused = copied.stored.named.chunks_not_of(writer.id());
    let state = copied.stored.state.take();
    let received_bytes = Some(copied.received_bytes);
    let completion = completion(&writer, options, origin, copied);
    let writer = Arc::into_inner(writer)
        .ok_or_else(|| repo::Error::Internal("an upload outlived the copy".to_owned()))?;
    let committed = writer.finish_pinned(completion).await?;
    states.save(state, &begun, &today, &committed).await;
    Ok(BackupOutcome {
        record: committed.record,
        took: repository.clock().monotonic().duration_since(began),
        vanished: 0,
        shrunk: 0,
        decision: begun.decision,
        work,
        packs_bytes: committed.packs_bytes,
        received_bytes,
    })
}

/// What it is asked for.
#[derive(Clone, Copy)]
struct Asked<'a> {
    options: &'a BackupOptions,
    begun: &'a Begun,
    changes: bool,
}

/// Returns the basebackup of which the server may be asked for changes: not where pages have to come that are as they
/// were, to be stored again or to be looked at once in a while.
fn changes_of(asked: Asked<'_>, facts: &ServerFacts, start_set_again: bool) -> Option<Arc<KnownParent>> {
    let parent = asked.begun.parent.as_ref().filter(|_| asked.changes && !start_set_again)?;
    let are_needed = parent.reads_all() || parent.takes_bytes();
    let summarizes = facts.version >= MajorVersion::V17 && facts.setting("summarize_wal") == Some("on");
    (summarizes && !are_needed).then(|| parent.clone())
}

/// Returns the options with an upload less, where there are several: two packs are under construction side by side.
fn at_most(options: &BackupOptions) -> BackupOptions {
    let uploads = options.budget.uploads.saturating_sub(1).max(1);
    BackupOptions { budget: Budget { uploads, ..options.budget }, ..options.clone() }
}

fn completion(
    writer: &BasebackupWriter,
    options: &BackupOptions,
    origin: &RemoteOrigin,
    copied: Copied,
) -> Completion {
    let Copied { mut entries, tablespaces, outside, stored, control, timeline, wal, times, .. } = copied;
    let Stored { packed, named, .. } = stored;
    let mut record = empty_record(writer.id(), origin.cluster, timeline, wal);
    record.label = options.label.clone();
    (record.started_at, record.stopped_at, record.wal_floor) = (times.0, times.1, origin.redo);
    record.server = server_record(&origin.facts, &control, &options.host, outside);
    if let Some(platform) = &origin.platform {
        record.server.platform.clone_from(platform);
    }
    record.size = packed.size;
    entries.extend(packed.entries);
    let content = ManifestContent { entries, tablespaces, links: Vec::new(), start_set: packed.start_set };
    Completion { record, content, named, compression: options.compression }
}

/// Has the server send everything, and packs it.
async fn receive(
    repository: &Repository,
    server: &Server,
    asked: Asked<'_>,
    pool: &CpuPool,
    mut packer: Packer,
    monitor: &dyn Monitor,
) -> Result<Copied, Error> {
    let (Server { session, origin, .. }, Asked { options, begun, .. }) = (server, asked);
    let facts = &origin.facts;
    let outside = read_outside(session, facts).await?;
    let label = options.label.clone().unwrap_or_else(|| format!("walden {}", packer.basebackup()));
    let fast = options.checkpoint == Checkpoint::Fast;
    let tablespace_map = needs_map(facts);
    let start_set_again = is_scattered(begun, &facts.databases).await?;
    let parent = changes_of(asked, facts, start_set_again);
    let base = BaseBackupOptions { label, fast, tablespace_map, incremental: false };
    let (base, summaries) = server.begin(repository, &base, parent).await?;
    let (start, timeline) = base.started();
    check_timeline(facts.identity.timeline, timeline)?;
    let known = facts.tablespaces.iter().map(|tablespace| (tablespace.oid, tablespace.in_place));
    if let Some(oid) = tablespaces_left_out(known, base.tablespaces(), tablespace_map) {
        return Err(StreamError::Tablespace { oid }.into());
    }
    let started = now(session).await?;
    let receiver = Receiver::new(receive_options(origin, &base, started, begun, summaries));
    let judge = PageJudge { start_lsn: start, segment_pages: origin.segment_pages };
    let context = Arc::new(WorkContext {
        compression: options.compression,
        page_judge: facts.data_checksums.then_some(judge),
        hash_key: begun.hash_key.clone(),
        parent: begun.parent.clone(),
        start_set_again,
    });
    let estimate: u64 = facts.databases.iter().filter_map(|database| database.size_bytes).sum();
    let progress = monitor.start(Task::bytes("backup", (estimate > 0).then_some(estimate)));
    let limit = options.rate.map(|rate| RateLimit::new(rate, repository.shared_clock()));
    let mut incoming = Incoming::new(base, receiver, limit, server.heard());
    let copied = copy(&mut incoming, context, pool, options.budget, &mut packer, &progress).await;
    if let Err(error) = copied {
        return Err(failed(server, incoming, error).await);
    }
    let Finished { received, end, received_bytes, mut connection } = incoming.finish()?;
    let histories = ask_histories(&mut connection, timeline).await?;
    drop(connection);

    check_timeline(timeline, end.timeline)?;
    check_same(session, facts).await?;
    let times = (started, now(session).await?);
    if let Some(damage) = &end.damage {
        tracing::warn!("the server says: {damage}");
    }
    received.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let control = ControlFile::parse(&received.control.1).map_err(StreamError::ControlFile)?;
    let wal = (start, end.lsn);
    let (mut entries, tablespaces) =
        pack_rest(&mut packer, received, &outside, facts, &end, wal, times.1).await?;
    entries.extend(outside.entries);
    let stored = packer.finish().await?;
    let outside = outside.names;
    Ok(Copied {
        entries,
        tablespaces,
        outside,
        stored,
        control,
        timeline,
        wal,
        times,
        received_bytes,
        histories,
    })
}

/// Says why a copy failed, and leaves the server as the next attempt needs it.
async fn failed(server: &Server, incoming: Incoming, error: Error) -> Error {
    match &error {
        // A standby that is promoted ends it with an error; that it is another server now says more.
        Error::Source(SourceError::Session(SessionError::Sql { .. })) => {
            let checked = check_same(&server.session, &server.origin.facts).await;
            return checked.err().unwrap_or(error);
        }
        // Everything is asked for next, and its place is needed for that.
        Error::Received(received) if received.is_of_changes() => server.end(incoming).await,
        _ => {}
    }
    error
}

/// Packs what was kept until everything had come, checks all of it against the server's manifest, and adds ours.
async fn pack_rest(
    packer: &mut Packer,
    received: Received,
    outside: &OutsideFiles,
    facts: &ServerFacts,
    end: &BaseBackupEnd,
    wal: (Lsn, Lsn),
    stopped: Timestamp,
) -> Result<(Vec<Entry>, Vec<Tablespace>), Error> {
    let written =
        |size: usize, modified| FileState { size: size as u64, mode: 0o600, modified, identity: None };
    let Received { control, label, manifest, left_out, entries, tablespaces, changed, put_together, .. } =
        received;
    packer.turn_to(false);
    packer.push_bytes(TreePath::new("data/global/pg_control")?, control.0, control.1).await?;
    packer.push_bytes(TreePath::new("data/backup_label")?, label.0, label.1).await?;
    manifest.check_wal(end.timeline, wal.0, wal.1)?;
    let packed = packer.packed();
    let files = packed.entries.iter().zip(&packed.checksums);
    let came = files.filter_map(|(entry, crc)| ManifestFile::of(entry, *crc));
    let came = came.filter(|file| !put_together.contains(&file.path)).chain(changed).collect();
    manifest.check_files(came, left_out)?;
    for (path, modified, bytes) in &outside.files {
        packer.push_bytes(path.clone(), written(bytes.len(), *modified), bytes.clone()).await?;
    }
    let ours = ManifestFacts {
        version: facts.version,
        system_identifier: facts.identity.system_identifier,
        timeline: end.timeline,
        wal,
    };
    let packed = packer.packed();
    let text = Bytes::from(server_manifest(&ours, &packed.entries, &packed.checksums, &[]));
    packer.push_bytes(TreePath::new("data/backup_manifest")?, written(text.len(), stopped), text).await?;
    Ok((entries, tablespaces))
}

fn receive_options(
    origin: &RemoteOrigin,
    base: &BaseBackup,
    started: Timestamp,
    begun: &Begun,
    summaries: Option<ChangedBlocks>,
) -> ReceiveOptions {
    let facts = &origin.facts;
    let changes = summaries.zip(begun.parent.clone()).map(|(summaries, parent)| Changes {
        known: Box::new(move |path| parent.file(path)),
        summaries: Arc::new(summaries),
        segment_pages: origin.segment_pages,
    });
    ReceiveOptions {
        data_directory: facts.data_directory().to_owned(),
        directory_mode: origin.directory_mode,
        version_directory: format!("PG_{}_{}", facts.version.number(), facts.catalog_version),
        tablespaces: base.tablespaces().to_vec(),
        tablespace_names: facts.tablespaces.iter().map(|it| (it.oid, it.name.clone())).collect(),
        started,
        start_set: StartSet::new(&facts.databases, started),
        piece_bytes: if begun.parent.is_some() { WIDE_BYTES } else { JOB_BYTES },
        changes,
    }
}

/// Tells whether the start-up set would lie in too many packs if only what has changed were stored: then it is stored
/// again as a whole.
pub(super) async fn is_scattered(begun: &Begun, databases: &[Database]) -> Result<bool, Error> {
    let Some(parent) = begun.parent.clone() else {
        return Ok(false);
    };
    // Times are not remembered: of states any may be recent.
    let now = begun.at;
    let mut start_set = StartSet::new(databases, now);
    blocking(move || {
        let packs = parent.packs_of_all(|known| start_set.takes(&known.path, known.size, now));
        Ok(packs.len() + 1 > START_PACKS_MAX)
    })
    .await
}

/// Tells whether locations have to come in a file: then nothing comes of what is in `pg_tblspc` itself.
fn needs_map(facts: &ServerFacts) -> bool {
    facts.tablespaces.iter().any(|tablespace| tablespace.location.as_os_str().len() > LINK_BYTES_MAX)
}

async fn now(session: &Session) -> Result<Timestamp, Error> {
    let row = session.query_one(NOW, &[]).await.map_err(SourceError::from)?;
    Ok(row.timestamp("at").map_err(SourceError::from)?)
}

async fn check_same(session: &Session, facts: &ServerFacts) -> Result<(), Error> {
    let differences = facts.identity.differences(&ServerIdentity::ask(session).await?);
    if differences.is_empty() { Ok(()) } else { Err(SourceError::ServerChanged { differences }.into()) }
}

/// Checks that a backup begins on the timeline the server is on, and ends where it began.
fn check_timeline(expected: TimelineId, found: TimelineId) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    let differences = vec![Difference { what: "timeline", expected, found }];
    Err(SourceError::ServerChanged { differences }.into())
}

fn needed_wal(cluster: ClusterId, copied: &Copied) -> NeededWal {
    let size = cluster.segment_size;
    NeededWal {
        timeline: copied.timeline,
        first: WalSegmentNumber::containing(copied.wal.0, size),
        last: WalSegmentNumber::ending_at(copied.wal.1, size),
        size,
    }
}
