//! One WAL file from the archive to where the server wants it: the restore_command.
//!
//! plan → the pure answer to the name → the file, verified, written whole (and synced by the server, which does so before
//! it gives the file its name). What recovery needs and does not come is
//! asked for again until `wait` is over, and then it is an error: PostgreSQL would take anything gentler for the end
//! of the archive and promote (failure 1). What lies outside the plan is absent without asking anybody.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

use crate::catalog::ending_segment::{end_of_records, is_filled};
use crate::catalog::wal_reader::{Found, Patience, Pauses, may_heal};
use crate::catalog::{Answer, InArchive, RecoveryPlan, answer};
use crate::disk::StagedFile;
use crate::disk::durable::TEMPORARY_PREFIX;
use crate::pg::{ArchiveFileName, ControlFile, STANDBY_SIGNAL, WalSegmentName};
use crate::repo::{self, Repository};
use crate::storage::{self, Verb};
use crate::wal::Error;
use crate::wal::archive::{Archive, Held};
use crate::wal::data_directory::{cluster_of, read_at_most, read_control_file};
use crate::wal::last_request::LastRequest;
use crate::wal::plan_file::{self, owned_like};
use crate::wal::push::check_segment;

/// What is to be fetched, for whom.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// The server's data directory.
    pub data_directory: PathBuf,
    /// The file.
    pub name: ArchiveFileName,
    /// Where it is to be written, absolute or from the current directory.
    pub target: PathBuf,
    /// How long to ask again for what should be there.
    pub wait: Duration,
}

/// How a fetch ended, apart from errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// The file is at its target.
    Restored,
    /// The archive has none, and recovery may go by that.
    Absent,
}

/// Fetches one file to its target.
///
/// # Errors
/// Where recovery must not go on without the file, whatever the reason.
pub async fn fetch<O>(options: &FetchOptions, archive: &Archive<O>) -> Result<Fetched, Error>
where
    O: AsyncFn() -> Result<Repository, repo::Error>,
{
    let Some(content) = find(options, archive).await? else { return Ok(Fetched::Absent) };
    let mut staged = stage(options)?;
    staged.write(&content)?;
    staged.finish()?;
    Ok(Fetched::Restored)
}

/// Begins the file at its target. PostgreSQL never reads part of one, and syncs it before it becomes a segment of its
/// own (`KeepFileRestoredFromArchive`), so it is not synced here as well.
pub fn stage(options: &FetchOptions) -> Result<StagedFile, Error> {
    remove_leftovers(&options.target);
    Ok(StagedFile::begin(&options.target, owned_like(&options.data_directory)?)?)
}

/// Decides about one file, and reads it; nothing where the archive has none and recovery may go by that. A store that
/// is away is waited for.
///
/// # Errors
/// As those of [`fetch`].
pub async fn find<O>(options: &FetchOptions, archive: &Archive<O>) -> Result<Option<Bytes>, Error>
where
    O: AsyncFn() -> Result<Repository, repo::Error>,
{
    let control = read_control_file(&options.data_directory)?;
    let until = Patience::Until(archive.clock().monotonic() + options.wait);
    match LastRequest::of(options, &control) {
        None => find_with(options, archive, control, until).await,
        Some(LastRequest::First) => Ok(None),
        Some(LastRequest::OwnCopy) => find_with(options, archive, control, until).await.or_else(|error| {
            tracing::warn!("the server's own {} is taken: {error}", options.name);
            Ok(None)
        }),
        Some(LastRequest::Nothing) => {
            let mut pauses = Pauses::new();
            loop {
                match find_with(options, archive, control.clone(), Patience::Forever).await {
                    Err(error) => tracing::error!("recovery waits for {}: {error}", options.name),
                    found => return found,
                }
                pauses.pause(Patience::Forever, archive.clock()).await;
            }
        }
    }
}

async fn find_with<O>(
    options: &FetchOptions,
    archive: &Archive<O>,
    control: ControlFile,
    patience: Patience,
) -> Result<Option<Bytes>, Error>
where
    O: AsyncFn() -> Result<Repository, repo::Error>,
{
    let known = known_plan(options, &control)?;
    if known.as_ref().is_some_and(|plan| is_outside(plan, options.name)) {
        return Ok(None);
    }
    let mut fetch = Fetch { options, control, archive, patience, plan: known };
    if fetch.has_carried_copy() {
        return Ok(None);
    }
    let mut pauses = Pauses::new();
    let mut damaged_reads = 0;
    loop {
        let error = match fetch.attempt_in_time().await {
            Ok(outcome) => return Ok(outcome),
            Err(error) => error,
        };
        archive.release().await;
        damaged_reads += u32::from(matches!(&error, Error::Repository(error) if is_damage(error)));
        let again = is_worth_repeating(&error) && damaged_reads < DAMAGED_READS_MAX;
        if !again || !pauses.pause(patience, archive.clock()).await {
            return Err(error);
        }
        tracing::warn!("trying again: {error}");
    }
}

/// Starts reading what recovery will ask for after a segment, where a plan of its own tells what that is.
pub async fn read_on<O>(options: &FetchOptions, archive: &Archive<O>) -> Result<(), Error>
where
    O: AsyncFn() -> Result<Repository, repo::Error>,
{
    let ArchiveFileName::Segment(segment) = options.name else { return Ok(()) };
    if let Some(plan) = known_plan(options, &read_control_file(&options.data_directory)?)? {
        let held = archive.hold_for(&plan).await?.0;
        held.ahead(plan.cluster).follow(segment, Some(&plan));
    }
    Ok(())
}

/// Returns the plan to go by; none where the first fetch has yet to make it.
fn known_plan(options: &FetchOptions, control: &ControlFile) -> Result<Option<RecoveryPlan>, Error> {
    let standby = || Some(plan_file::standby_plan(cluster_of(control)));
    if options.data_directory.join(STANDBY_SIGNAL).exists() {
        return Ok(standby());
    }
    let known = plan_file::read(&options.data_directory, control)?;
    // Whoever has none by then was a standby, and is to get none.
    Ok(if LastRequest::of(options, control).is_some() { known.or_else(standby) } else { known })
}

/// A damaged object is read once more, in case the way was at fault and not the store.
const DAMAGED_READS_MAX: u32 = 2;
/// An attempt has at least this long, however short the wait: a segment takes its time on a slow line.
pub const ATTEMPT_MIN: Duration = Duration::from_secs(60);

struct Fetch<'a, O> {
    options: &'a FetchOptions,
    control: ControlFile,
    archive: &'a Archive<O>,
    patience: Patience,
    plan: Option<RecoveryPlan>,
}

impl<O: AsyncFn() -> Result<Repository, repo::Error>> Fetch<'_, O> {
    /// Attempts it once, and gives up on a peer that neither answers nor fails (failure 39).
    async fn attempt_in_time(&mut self) -> Result<Option<Bytes>, Error> {
        let (Patience::Until(end), name) = (self.patience, self.options.name) else {
            return self.attempt().await;
        };
        let limit = end.saturating_duration_since(self.archive.clock().monotonic()).max(ATTEMPT_MIN);
        tokio::time::timeout(limit, self.attempt()).await.unwrap_or_else(|_| {
            let reason = Some(format!("nothing came within {} s", limit.as_secs()));
            let (verb, key) = (Verb::Get, name.to_string());
            Err(repo::Error::from(storage::Error::Unreachable { verb, key, reason, source: None }).into())
        })
    }

    async fn attempt(&mut self) -> Result<Option<Bytes>, Error> {
        if self.plan.is_none() {
            let (held, _) = self.archive.hold().await?;
            let folder = &self.options.data_directory;
            self.plan = Some(plan_file::create(&held.repository, folder, &self.control).await?);
        }
        let plan = self.plan.as_ref().expect("it has just been made where there was none");
        let name = self.options.name;
        if is_outside(plan, name) {
            return Ok(None);
        }
        let (held, fresh) = self.archive.hold_for(plan).await?;
        let ending = match name {
            ArchiveFileName::Segment(segment) => plan.ending_of(segment).map(|end| (segment, end)),
            _ => None,
        };
        let read = match ending {
            Some((segment, end)) => {
                held.ahead(plan.cluster).reader().read_ending(segment, end, self.patience).await?
            }
            None => self.read(&held, plan).await?,
        };
        if matches!(read, Found::Absent) && !fresh {
            held.repository.confirm().await?;
        }
        let (archive, found) = match read {
            Found::Present(bytes) => (InArchive::Present, Ok(bytes)),
            Found::Absent => (InArchive::Absent, Err(Error::Missing { name: name.to_string() })),
            Found::Unreadable(error) => (InArchive::Unknown, Err(error.into())),
        };
        if let (Some((segment, _)), Ok(bytes)) = (ending, &found)
            && self.has_more_than(segment, bytes)
        {
            return Ok(None);
        }
        let own_copy = archive == InArchive::Absent && !plan.standby && self.has_all_that_is_planned(plan);
        match (answer(plan, name, archive, own_copy), found) {
            (Answer::Absent, _) => Ok(None),
            (Answer::Serve, Ok(bytes)) => Ok(Some(bytes)),
            (Answer::Serve | Answer::CannotTell, found) => {
                Err(found.err().unwrap_or_else(|| Error::Missing { name: name.to_string() }))
            }
        }
    }

    /// Asks the archive, and has it read on from a segment that is there.
    async fn read(&self, held: &Held, plan: &RecoveryPlan) -> Result<Found<Bytes>, repo::Error> {
        let ahead = held.ahead(plan.cluster);
        let found = ahead.reader().read(self.options.name, self.patience).await?;
        if let (Found::Present(_), ArchiveFileName::Segment(segment)) = (&found, self.options.name) {
            ahead.follow(segment, Some(plan));
        }
        Ok(found)
    }

    /// Tells whether the segment came with the basebackup and holds all that recovery is to have of it: then the server's
    /// own copy is as good as the archive's, which need not have one.
    fn has_carried_copy(&self) -> bool {
        let (Some(plan), ArchiveFileName::Segment(segment)) = (&self.plan, self.options.name) else {
            return false;
        };
        let is_carried = plan.carried.as_ref().is_some_and(|wal| wal.contains(segment));
        let is_superseded = plan.forced.as_ref().is_none_or(|forced| forced.contains(&segment));
        is_carried && !is_superseded && !plan.standby && self.has_all_that_is_planned(plan)
    }

    /// Tells whether the server has the segment itself, with as much WAL in it as the plan goes by.
    ///
    /// In a copy of a running server its last segment is filled to some point: recovery that reads it ends there, and
    /// what is archived behind it is lost. Where nothing of a timeline was archived but its history, the
    /// server's own segment is all there is, however far it is filled.
    fn has_all_that_is_planned(&self, plan: &RecoveryPlan) -> bool {
        let (size, ArchiveFileName::Segment(segment)) = (self.control.wal_segment_size, self.options.name)
        else {
            return false;
        };
        let (Some(own), Ok(start)) = (self.valid_copy(), segment.start_lsn(size)) else { return false };
        let has_all = match plan.ending_of(segment) {
            Some(end) => end_of_records(start, &own, size) >= end,
            None => plan.is_bare(segment) || is_filled(start, &own, size),
        };
        if !has_all {
            tracing::warn!("the server's own {segment} ends before the WAL that was archived");
        }
        has_all
    }

    /// Tells whether the server's own segment holds more WAL than the archive's beginning of it: what it wrote last was
    /// perhaps never archived, and must not be written over.
    fn has_more_than(&self, segment: WalSegmentName, beginning: &Bytes) -> bool {
        let size = self.control.wal_segment_size;
        let (Some(own), Ok(start)) = (self.valid_copy(), segment.start_lsn(size)) else { return false };
        end_of_records(start, &own, size) > end_of_records(start, beginning, size)
    }

    fn valid_copy(&self) -> Option<Bytes> {
        let ArchiveFileName::Segment(segment) = self.options.name else { return None };
        let path = self.options.data_directory.join("pg_wal").join(segment.to_string());
        let bytes = read_at_most(&path, u64::from(self.control.wal_segment_size.bytes())).ok()?;
        check_segment(&bytes, segment, &self.control).ok()?;
        Some(bytes.into())
    }
}

/// Tells whether a name is absent whatever the archive says.
fn is_outside(plan: &RecoveryPlan, name: ArchiveFileName) -> bool {
    answer(plan, name, InArchive::Present, false) == Answer::Absent
}

fn is_damage(error: &repo::Error) -> bool {
    error.kind() == repo::ErrorKind::Damaged
}

/// Tells whether asking again may bring something else.
fn is_worth_repeating(error: &Error) -> bool {
    match error {
        Error::Missing { .. } => true,
        // An absent site.json may be a bucket that is mounted late; it is never the end of the archive.
        Error::Repository(error) => may_heal(error) || is_damage(error) || error.is_absent(),
        _ => false,
    }
}

/// Removes what a fetch that was killed left beside the target; recovery runs one at a time.
fn remove_leftovers(target: &Path) {
    let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else { return };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let suffix = format!("-{}", name.to_string_lossy());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let found = entry.file_name();
        let found = found.to_string_lossy();
        if found.starts_with(TEMPORARY_PREFIX) && found.ends_with(&suffix) {
            // What cannot be removed is in nobody's way but the disk's.
            let _ = fs::remove_file(entry.path());
        }
    }
}
