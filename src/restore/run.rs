//! Carrying a plan out: hold back → make room → files → links → settings → sync → release.
//!
//! Everything can be repeated after a crash at any point and gives the same bytes. The two files without which no
//! server starts wait in `.walden/held` until all else is on stable storage; their renames are the commit.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::codec::CpuPool;
use crate::disk::durable::{self, Create};
use crate::disk::private_area::HELD_BACK;
use crate::disk::{self, Binding, LockFile, Owner, PrivateArea, state_file};
use crate::monitor::{Monitor, Task};
use crate::repo::entry::Entry;
use crate::repo::lease::{LEASE_RENEWAL_SECONDS, Lease};
use crate::repo::{Basebackup, FileReader};
use crate::restore::Error;
use crate::restore::batches::{Batches, FileFate};
use crate::restore::destinations::Destinations;
use crate::restore::existing::{Staying, clear, sizes, staying_by_content, staying_by_journal};
use crate::restore::file_writer::FileWriter;
use crate::restore::journal::Journal;
use crate::restore::plan::{Existing, RestorePlan};
use crate::restore::recovery_settings::AUTO_CONF;
use crate::restore::server::server_in;
use crate::restore::settings_files::{read_or_empty, to_json, write_configuration, write_settings};
use crate::restore::shape::Shape;
use crate::restore::target::{INSTANT_FILE_NAME, STATE_FILE_NAME, check_existing, resolve};
use crate::restore::writer::Writer;

/// What a restore may use.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Threads for CPU work.
    pub pool: CpuPool,
    /// Requests to the store that are under way at once.
    pub transfers: usize,
    /// Stored bytes that are held at once.
    pub memory_bytes: u64,
    /// Bytes after which what is complete is synced and noted.
    pub checkpoint_bytes: u64,
}

/// What a restore has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreOutcome {
    /// Files that were written.
    pub files_written: u64,
    /// Files that were there already.
    pub files_kept: u64,
    /// Bytes that were written.
    pub bytes_written: u64,
}

/// How much is written between two syncs where nothing else is asked for.
pub const CHECKPOINT_BYTES: u64 = 2 << 30;
const JOURNAL_FILE: &str = "restore.journal";
/// Says that only the renames are left: all else is on stable storage.
pub(crate) const COMPLETE_FILE: &str = "complete";
/// Map chunks and small files are read through a reader of their own.
const READER_CACHE_BYTES: usize = 4 << 20;

/// Reads the plan of an unfinished restore, for `--resume`; refuses where going on by it would touch what is not its own.
pub fn read_unfinished(target_directory: &Path) -> Result<RestorePlan, Error> {
    let nothing = || Error::NothingToResume { path: target_directory.to_owned() };
    let area = PrivateArea::open(target_directory)?.ok_or_else(nothing)?;
    let path = area.directory().join(STATE_FILE_NAME);
    let unusable = |detail: String| Error::State { path: path.clone(), detail };
    let (plan, author): (RestorePlan, Owner) =
        state_file::read_owned_document(&path, "the plan of a restore").map_err(|error| match error {
            error if error.is_not_found() => nothing(),
            disk::Error::Malformed { detail, .. } => unusable(detail),
            error => Error::Disk(error),
        })?;
    // It says what root would write, remove and give away, and the directory is another's to write in.
    if Owner::current().is_root() && !author.is_root() {
        return Err(Error::OthersPlan { path: target_directory.to_owned(), author: author.user() });
    }
    if plan.format != 1 {
        return Err(unusable(format!("it has format {}", plan.format)));
    }
    let (path, began) = (resolve(target_directory), &plan.destinations.data);
    if path != *began {
        return Err(Error::Moved { path, began: began.clone() });
    }
    // All but the removal of the private area may have been done, and the server started.
    match server_in(&path) {
        Some(server) => Err(server.refusal(&path)),
        None => Ok(plan),
    }
}

/// Restores by a plan; `resume` goes on with an unfinished restore by the same plan.
pub async fn restore(
    basebackup: Basebackup,
    plan: &RestorePlan,
    resume: bool,
    resources: &Resources,
    monitor: &dyn Monitor,
) -> Result<RestoreOutcome, Error> {
    let lease = Lease::create(basebackup.repository(), basebackup.record().id).await?;
    if lease.is_none() {
        tracing::warn!("the store refuses writes: retention does not know that a basebackup is read here");
    }
    let mut restore = Restore { basebackup: Arc::new(basebackup), plan, resources, monitor };
    let Some(mut lease) = lease else { return restore.run(resume).await };
    let outcome = tokio::select! {
        outcome = restore.run(resume) => outcome,
        () = keep(&mut lease) => Err(Error::Internal("a lease ended by itself".to_owned())),
    };
    if let Err(error) = lease.end().await {
        tracing::warn!("could not end the lease on basebackup {}: {error}", plan.basebackup);
    }
    outcome
}

async fn keep(lease: &mut Lease) {
    loop {
        tokio::time::sleep(Duration::from_secs(LEASE_RENEWAL_SECONDS)).await;
        if let Err(error) = lease.renew().await {
            tracing::warn!("could not renew the lease on a basebackup: {error}");
        }
    }
}

struct Restore<'a> {
    basebackup: Arc<Basebackup>,
    plan: &'a RestorePlan,
    resources: &'a Resources,
    monitor: &'a dyn Monitor,
}

impl Restore<'_> {
    async fn run(&mut self, resume: bool) -> Result<RestoreOutcome, Error> {
        let destinations = &self.plan.destinations;
        let shape = Shape::of(&self.basebackup, destinations).await?;
        let (area, lock) = self.hold_back(resume)?;
        if area.directory().join(COMPLETE_FILE).exists() {
            area.release()?;
            drop(lock);
            return Ok(RestoreOutcome {
                files_written: 0,
                files_kept: shape.files.len() as u64,
                bytes_written: 0,
            });
        }
        take_away_start_files(&destinations.data)?;
        let staying = self.staying(&shape, &area, resume).await?;
        clear(destinations, &shape, &staying)?;
        shape.make_directories(destinations, self.plan.owner())?;
        let files = Arc::new(FileWriter::new(self.plan.owner()));
        let files_written = self.write_files(&area, &staying, &files).await?;
        shape.make_links(self.plan.owner())?;
        write_settings(self.plan, &read_or_empty(&destinations.data.join(AUTO_CONF))?)?;
        write_configuration(self.plan)?;
        shape.finish_directories(self.plan.owner())?;
        let roots = roots(destinations);
        tokio::task::spawn_blocking(move || sync_all(&roots))
            .await
            .map_err(|error| Error::Internal(error.to_string()))??;
        durable::write_file(&area.directory().join(COMPLETE_FILE), b"", Create::PRIVATE_FILE)?;
        area.release()?;
        drop(lock);
        let files_kept = staying.complete.len() as u64;
        Ok(RestoreOutcome { files_written, files_kept, bytes_written: files.written.load(Ordering::Relaxed) })
    }

    /// Takes hold of the target and writes down what is to become of it.
    fn hold_back(&self, resume: bool) -> Result<(PrivateArea, LockFile), Error> {
        let (plan, owner) = (self.plan, self.plan.owner());
        // Where nobody is at work yet, what is refused is left without a trace; else the lock tells who is.
        if PrivateArea::open(&plan.destinations.data)?.is_none() {
            self.check_again(resume)?;
        }
        for (root, _) in plan.destinations.all() {
            durable::create_dir_all(root, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
        }
        let area = PrivateArea::create(&plan.destinations.data, Some(owner))?;
        let lock = area.lock()?;
        self.check_again(resume)?;
        area.clear_temporary(&lock)?;
        let state = area.directory().join(STATE_FILE_NAME);
        if !resume {
            for name in [COMPLETE_FILE, JOURNAL_FILE, INSTANT_FILE_NAME] {
                durable::remove_file(&area.directory().join(name))?;
            }
            area.unbind()?;
            // Its owner says who has decided this.
            durable::write_file(&state, &to_json(plan)?, Create::PRIVATE_FILE)?;
        }
        area.bind(&Binding {
            basebackup: plan.basebackup.to_string(),
            manifest_digest: self.basebackup.record().manifest.digest.to_string(),
            part: "data".to_owned(),
        })?;
        Ok((area, lock))
    }

    /// Looks at the target as planning did: since then a server may have been started there, or another restore have
    /// come and gone.
    fn check_again(&self, resume: bool) -> Result<(), Error> {
        let RestorePlan { destinations, existing, recovery, .. } = self.plan;
        if !resume {
            return check_existing(destinations, *existing, recovery.cluster, Owner::current(), None);
        }
        match read_unfinished(&destinations.data)? == *self.plan {
            true => Ok(()),
            false => Err(Error::Unfinished { path: destinations.data.clone() }),
        }
    }

    async fn staying(&self, shape: &Shape, area: &PrivateArea, resume: bool) -> Result<Staying, Error> {
        if self.plan.existing == Existing::Delta {
            let reader = FileReader::new(self.basebackup.clone(), READER_CACHE_BYTES);
            let (destinations, owner) = (&self.plan.destinations, self.plan.owner());
            return staying_by_content(&reader, shape, destinations, owner, &self.resources.pool).await;
        }
        if !resume {
            return Ok(Staying::default());
        }
        let complete = Journal::read(&area.directory().join(JOURNAL_FILE))?;
        Ok(staying_by_journal(complete, &sizes(&self.basebackup).await?, shape))
    }

    /// Writes every file that does not stay, and returns how many those were.
    async fn write_files(
        &self,
        area: &PrivateArea,
        staying: &Staying,
        files: &Arc<FileWriter>,
    ) -> Result<u64, Error> {
        let Resources { pool, transfers, memory_bytes, checkpoint_bytes } = self.resources;
        let progress = self.monitor.start(Task::bytes("restore", self.plan.figures.bytes));
        let writer = Writer::new(
            self.basebackup.clone(),
            files.clone(),
            pool.clone(),
            *transfers,
            *memory_bytes,
            progress,
        );
        let (destinations, held) = (&self.plan.destinations, area.held_directory());
        let fate = |number: u64, entry: &Entry| fate_of(number, entry, destinations, &held, staying);
        let mut batches = Batches::new(self.basebackup.clone(), *transfers, fate);
        let journal = Journal::open(&area.directory().join(JOURNAL_FILE))?;
        let mut checkpoints =
            Checkpoints::new(journal, roots(destinations), files.clone(), *checkpoint_bytes);
        let mut write_all = async || {
            let mut count = 0;
            while let Some(batch) = batches.next().await? {
                count += batch.files.len() as u64;
                writer.write(batch, || checkpoints.take_if_due()).await?;
            }
            Ok(count)
        };
        let written = write_all().await;
        // Also where writing failed: what is being synced is what --resume need not fetch again.
        let synced = checkpoints.end().await;
        written.and_then(|count| synced.map(|()| count))
    }
}

/// Syncs what is complete now and then, beside the work, and notes it.
struct Checkpoints {
    journal: Arc<Mutex<Journal>>,
    roots: Vec<PathBuf>,
    files: Arc<FileWriter>,
    interval: u64,
    last: u64,
    taken: Vec<JoinHandle<Result<(), Error>>>,
}

impl Checkpoints {
    fn new(journal: Journal, roots: Vec<PathBuf>, files: Arc<FileWriter>, interval: u64) -> Self {
        let journal = Arc::new(Mutex::new(journal));
        Self { journal, roots, files, interval, last: 0, taken: Vec::new() }
    }

    /// Begins one where enough has been written since the last; one at a time.
    fn take_if_due(&mut self) {
        let written = self.files.written.load(Ordering::Relaxed);
        let busy = self.taken.last().is_some_and(|task| !task.is_finished());
        if written - self.last < self.interval || busy {
            return;
        }
        self.last = written;
        let (finished, roots, journal) =
            (self.files.take_finished(), self.roots.clone(), self.journal.clone());
        self.taken.push(tokio::task::spawn_blocking(move || {
            sync_all(&roots)?;
            journal.lock().expect("no holder of this lock panics").record(&finished)
        }));
    }

    /// Waits for those under way and tells of the first that failed.
    async fn end(self) -> Result<(), Error> {
        for taken in self.taken {
            taken.await.map_err(|error| Error::Internal(error.to_string()))??;
        }
        Ok(())
    }
}

fn fate_of(
    number: u64,
    entry: &Entry,
    destinations: &Destinations,
    held: &Path,
    staying: &Staying,
) -> Result<FileFate, Error> {
    let Some(place) = destinations.place(&entry.path)? else { return Ok(FileFate::Skip) };
    let below = entry.path.strip(b"data").unwrap_or_default();
    if let Some((_, name)) = HELD_BACK.iter().find(|(path, _)| path.as_bytes() == below) {
        return Ok(FileFate::Write(held.join(name)));
    }
    if staying.complete.contains(&number) {
        return Ok(FileFate::Skip);
    }
    let in_place = staying.in_place.contains(&number);
    Ok(if in_place { FileFate::Mend(place) } else { FileFate::Write(place) })
}

/// Removes what lets a server start, before anything else is changed.
fn take_away_start_files(data: &Path) -> Result<(), Error> {
    for (place, _) in HELD_BACK {
        let path = data.join(place);
        if fs::symlink_metadata(&path).is_ok() {
            durable::remove_file(&path)?;
        }
    }
    Ok(())
}

fn roots(destinations: &Destinations) -> Vec<PathBuf> {
    destinations.all().into_iter().map(|(path, _)| path.to_owned()).collect()
}

/// Syncs the file systems of all destinations, each once.
fn sync_all(roots: &[PathBuf]) -> Result<(), Error> {
    let mut synced = HashSet::new();
    for root in roots {
        let device = fs::metadata(root).map_err(Error::at("look up", root))?.dev();
        if synced.insert(device) {
            durable::sync_file_system(root)?;
        }
    }
    Ok(())
}
