//! `walden wal push|fetch`: PostgreSQL's archive_command and restore_command; what people ask for has files of its own.
//!
//! The server runs push and fetch once for every file, so they work on one thread and open nothing they do not need;
//! push has a daemon do it where there is one, and begins with asking it.
//! What a failure of fetch means to PostgreSQL is `exit`'s business; here every way out that is not a file in its
//! place or a proven absence is an error.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::codec::SystemRandom;
use crate::config::{self, KeyPurpose, SiteConfig};
use crate::control::{self, ArchivedFile, DaemonAnswer, DaemonRequest, PushRequest, ask_daemon};
use crate::pg::ArchiveFileName;
use crate::repo::wal_object::Archived;
use crate::repo::{self, Repository, RepositoryOptions};
use crate::wal;
use crate::wal::archive::Archive;
use crate::wal::fetch::{FetchOptions, Fetched, fetch};
use crate::wal::last_request::is_last_request;
use crate::wal::push::{OnConflict, check_file, push};
use crate::wal::queue::Overflow;

use super::context::Context;
use super::daemon;
use super::detached;
use super::error::CommandError;
use super::exit::{ExitKind, ExitPolicy};
use super::output::Report;
use super::prefetch::{Asked, Place};
use super::text::TextStyle;
use super::wal_check::WalCheck;
use super::wal_head::keep_head;
use super::wal_list::WalList;
use super::wal_queue::{LeftOutFile, QueueLimit};
use super::wal_receive::WalReceive;

/// Archives and receives WAL, fetches it back, lists and checks it
#[derive(Debug, Args)]
pub struct Wal {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Push(WalPush),
    Fetch(WalFetch),
    List(WalList),
    Receive(WalReceive),
    Check(WalCheck),
}

/// Archives one file of pg_wal: archive_command = 'walden wal push %p'
#[derive(Debug, Args)]
struct WalPush {
    /// The file, as PostgreSQL's %p gives it: pg_wal/NAME from the data directory
    path: PathBuf,
    /// Where something else stands under the segment's name, or it is damaged: archive this one beside it, for readers to take
    #[arg(long)]
    force: bool,
}

/// Fetches one file from the archive: restore_command = 'walden wal fetch %f %p'
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 0 when the file is there, 1 when the archive has none, 200 when it cannot tell."
)]
struct WalFetch {
    /// The name of the file, PostgreSQL's %f
    name: String,
    /// Where to put it, PostgreSQL's %p
    path: PathBuf,
}

impl Wal {
    /// Returns how the outcome becomes a status: for fetch by what PostgreSQL makes of it.
    pub(super) fn exit_policy(&self) -> ExitPolicy {
        match self.action {
            Action::Fetch(_) => ExitPolicy::RestoreCommand,
            Action::Push(_) | Action::List(_) | Action::Check(_) | Action::Receive(_) => ExitPolicy::Usual,
        }
    }

    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        match &self.action {
            Action::Push(command) => command.run(context),
            Action::Fetch(command) => command.run(context),
            Action::List(command) => command.run(context),
            Action::Receive(command) => command.run(context),
            Action::Check(command) => command.run(context),
        }
    }
}

impl WalPush {
    fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        // What a person decides about one file is done, however many wait.
        let limit = match self.force {
            true => QueueLimit::none(context, site, &self.path),
            false => QueueLimit::of(context, site, &self.path)?,
        };
        let pushed = match self.push_unless_over(context, site, &limit)? {
            Ok(pushed) => {
                // As checked here, or by the daemon.
                if let Ok(cluster) = pushed.cluster.parse() {
                    limit.make_up(cluster, |path| {
                        let history = Self { path, force: false };
                        Ok(history.push_unless_over(context, site, &limit)?.is_ok())
                    });
                }
                pushed
            }
            Err(overflow) => Pushed::left_out(limit.leave_out(overflow)?),
        };
        context.output.print(&pushed)
    }

    /// Archives the file, by the daemon or alone, unless too much WAL waits before it is done.
    fn push_unless_over(
        &self,
        context: &Context,
        site: &SiteConfig,
        limit: &QueueLimit<'_>,
    ) -> Result<Result<Pushed, Overflow>, CommandError> {
        if let Some(overflow) = limit.overflow() {
            return Ok(Err(overflow));
        }
        let through_daemon = self.push_through_daemon(context, site, || limit.overflow().is_none())?;
        if let Some(pushed) = through_daemon {
            return Ok(Ok(pushed));
        }
        if let Some(overflow) = limit.overflow() {
            return Ok(Err(overflow));
        }
        self.push_alone(context, site, limit)
    }

    /// Has the daemon archive the file, as long as `waits` says so; `None` where there is none, it was not waited for,
    /// or it is not known what became of the request.
    fn push_through_daemon(
        &self,
        context: &Context,
        site: &SiteConfig,
        waits: impl FnMut() -> bool,
    ) -> Result<Option<Pushed>, CommandError> {
        let config = context.config()?;
        let socket = daemon::socket(config);
        let request = DaemonRequest::Push(PushRequest {
            site: site.name.clone(),
            path: detached::absolute(&self.path)?,
            force: self.force,
            destination: daemon::destination(config, site),
        });
        match ask_daemon(&socket, &request, waits) {
            Ok(DaemonAnswer::Archived(file)) => Ok(Some(file.into())),
            Ok(DaemonAnswer::Failed(failure)) => Err(failure.into()),
            Ok(DaemonAnswer::Working) => Ok(None),
            Ok(DaemonAnswer::Elsewhere) => {
                tracing::warn!(
                    "archiving without the daemon, which was started with another storage or other recipients of site \
                     \"{}\": start it again",
                    site.name
                );
                Ok(None)
            }
            Err(control::Error::NotRunning { source, .. }) if is_absence(&source) => Ok(None),
            Err(error) => {
                // What is archived twice is compared, so that it may be done here whatever the daemon did.
                tracing::warn!("archiving without the daemon: {error}");
                Ok(None)
            }
        }
    }

    fn push_alone(
        &self,
        context: &Context,
        site: &SiteConfig,
        limit: &QueueLimit<'_>,
    ) -> Result<Result<Pushed, Overflow>, CommandError> {
        let compression = context.config()?.compression.wal;
        let file = check_file(&self.path)?;
        let on_conflict = if self.force { OnConflict::Supersede } else { OnConflict::Refuse };
        let archive = async {
            let repository = context.open_or_create_repository(site).await?;
            let archived = push(&repository, &file, compression, on_conflict).await?;
            Ok::<_, CommandError>((repository, archived))
        };
        let archived = context.block_on_one_thread(async {
            let (repository, archived) = tokio::select! {
                archived = archive => archived?,
                overflow = limit.overflowed() => return Ok::<_, CommandError>(Err(overflow)),
            };
            keep_head(context, site, &repository, &file).await;
            Ok(Ok(archived))
        })??;
        Ok(archived.map(|archived| Pushed {
            name: file.name.to_string(),
            cluster: file.cluster.to_string(),
            created: archived == Archived::Created,
            left_out: false,
        }))
    }
}

/// Returns whether there is no daemon, as on most hosts.
fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// What `wal push` did; silent as text, because the server's log is no place for good news.
#[derive(Debug, Serialize)]
struct Pushed {
    name: String,
    cluster: String,
    created: bool,
    /// Whether it was not archived at all, because more WAL waits than `queue_max`.
    left_out: bool,
}

impl Pushed {
    fn left_out(LeftOutFile { name, cluster }: LeftOutFile) -> Self {
        Self { name, cluster, created: false, left_out: true }
    }
}

impl From<ArchivedFile> for Pushed {
    fn from(ArchivedFile { name, cluster, created }: ArchivedFile) -> Self {
        Self { name, cluster, created, left_out: false }
    }
}

impl Report for Pushed {
    fn write_text(&self, _out: &mut String, _style: &TextStyle) -> fmt::Result {
        Ok(())
    }
}

/// One call of the store is repeated for this long at most; the fetch itself decides about the rest.
const CALL_DEADLINE_MAX: Duration = Duration::from_secs(10);

impl WalFetch {
    fn run(&self, context: &Context) -> Result<(), CommandError> {
        let name: ArchiveFileName = self.name.parse().map_err(wal::Error::from)?;
        let site = context.site()?;
        let mut options = FetchOptions {
            data_directory: PathBuf::from("."),
            name,
            target: self.path.clone(),
            wait: site.fetch_wait,
        };
        // Who waits for ever does that alone.
        let place = Place::of(context, site, &options.data_directory).filter(|_| !is_last_request(&options));
        let asked_at = context.clock().monotonic();
        let fetched = match place.as_ref().map_or(Asked::Nobody, |place| place.ask(&options)) {
            Asked::Answer(fetched) => fetched,
            Asked::CannotTell => {
                let waited = context.clock().monotonic().saturating_duration_since(asked_at);
                options.wait = options.wait.saturating_sub(waited);
                fetch_alone(context, site, &options, place.as_ref())?
            }
            Asked::Nobody => fetch_alone(context, site, &options, place.as_ref())?,
        };
        match fetched {
            Fetched::Restored => context.output.print(&FetchedFile { name: self.name.clone() }),
            Fetched::Absent => Err(CommandError::new(
                ExitKind::Absent,
                format!("{name} is not in the archive, or lies behind the end of the recovery plan"),
            )),
        }
    }
}

/// Fetches without a prefetcher, and leaves one behind for the next segments.
fn fetch_alone(
    context: &Context,
    site: &SiteConfig,
    options: &FetchOptions,
    place: Option<&Place>,
) -> Result<Fetched, CommandError> {
    // A key that cannot be read does not come by waiting, so that is said before anything is asked.
    context.config()?.keyring(KeyPurpose::Read, Arc::new(SystemRandom))?;
    let refused = RefCell::new(None);
    let open = async || open_for_fetch(context, site, &refused).await;
    let archive = Archive::once(open, context.clock());
    let fetched = context.block_on_one_thread(fetch(options, &archive))?;
    if let (Ok(Fetched::Restored), Some(place)) = (&fetched, place) {
        place.start(context, options);
    }
    fetched.map_err(|error| refused.take().map_or_else(|| error.into(), CommandError::from))
}

/// Opens the repository; a complaint about the configuration is kept in `refused` for the message.
pub(super) async fn open_for_fetch(
    context: &Context,
    site: &SiteConfig,
    refused: &RefCell<Option<config::Error>>,
) -> Result<Repository, repo::Error> {
    refused.take();
    let opened = context.open_store_within(site, site.fetch_wait.min(CALL_DEADLINE_MAX));
    let keyring = context
        .config()
        .map_err(|error| repo::Error::Internal(error.message()))
        .map(|config| config.keyring(KeyPurpose::Read, Arc::new(SystemRandom)));
    match (opened, keyring?) {
        (Ok(store), Ok(keyring)) => {
            let (site, clock) = (site.prefix.clone(), context.clock());
            Repository::open(RepositoryOptions { store, site, keyring, clock }).await
        }
        (Err(config::Error::Store(error)), _) => Err(error.into()),
        (Err(error), _) | (_, Err(error)) => {
            let message = error.to_string();
            refused.replace(Some(error));
            Err(repo::Error::Internal(message))
        }
    }
}

/// What `wal fetch` did; silent as text.
#[derive(Debug, Serialize)]
struct FetchedFile {
    name: String,
}

impl Report for FetchedFile {
    fn write_text(&self, _out: &mut String, _style: &TextStyle) -> fmt::Result {
        Ok(())
    }
}

impl From<wal::Error> for CommandError {
    fn from(error: wal::Error) -> Self {
        if let wal::Error::Repository(error) = error {
            return error.into();
        }
        let kind = match error.kind() {
            wal::ErrorKind::Retry => ExitKind::Unreachable,
            wal::ErrorKind::Input => ExitKind::Failed,
            wal::ErrorKind::Damaged => ExitKind::Damaged,
            wal::ErrorKind::Bug => ExitKind::Bug,
        };
        let hint = error.hint().map(str::to_owned);
        Self { kind, error: error.into(), hint }
    }
}
