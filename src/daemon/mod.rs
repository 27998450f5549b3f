//! The process that archives for the servers of this host: a socket, a push service for each site, and jobs.
//!
//! callers (`serve`) → who may (`access`) → the site's `SitePush`, which knows what it has archived (`outcomes`), reads
//! what comes next (`look_ahead`), keeps within its share of memory and transfers (`budget`), and notes how far the
//! archive reaches (`heads`). What goes on without being asked is a task of `jobs`, or WAL by streaming (`receiving`);
//! all of it ends by one `Shutdown`. A site stands by itself: nothing that is shared waits for a store, so that one that is
//! dead or has no key stops no other.
//! Deliberately absent: the configuration and the opening of repositories, which come in as options; schedules.

mod access;
mod budget;
mod file_identity;
mod heads;
mod idle_memory;
mod jobs;
mod look_ahead;
mod outcomes;
mod receiving;
mod serve;
mod shutdown;
mod site_push;
mod threads;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::clock::Clock;
use crate::codec::Compression;
use crate::control::{self, DaemonListener, Destination, Failure};
use crate::disk::{self, LockFile};
use crate::memory;
use crate::repo::Repository;
use crate::wal;
use crate::wal::head_notes::HeadNotes;

use jobs::Jobs;
use receiving::Receivers;
use serve::Callers;
use shutdown::ShutdownSource;
use site_push::{SitePush, Workers};
use threads::Threads;

pub use receiving::PrepareReceiving;

/// What a daemon is told.
pub struct DaemonOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// What it holds while it runs, so that there is no second one.
    pub lock: PathBuf,
    /// The sites it works for.
    pub sites: Vec<SiteOptions>,
    /// Threads for compression and encryption.
    pub threads: usize,
    /// Requests to the store of one site that are under way at once.
    pub transfers: usize,
    /// Memory for WAL on its way, of all sites together.
    pub memory_bytes: u64,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// How a failure is told to a command.
    pub failure_of: fn(wal::Error) -> Failure,
}

/// A site that a daemon works for.
pub struct SiteOptions {
    /// Its name in the configuration.
    pub name: String,
    /// The server's data directory, whose owner may have WAL archived.
    pub data_directory: Option<PathBuf>,
    /// Where its WAL goes, for callers to compare with what they were told.
    pub destination: Destination,
    /// When heads of its archive were written; `None`: none is written.
    pub head_notes: Option<HeadNotes>,
    /// How WAL is compressed.
    pub compression: Compression,
    /// Opens the repository for writing; called again after failures.
    pub open: OpenRepository,
    /// Where its WAL comes by streaming, what that needs.
    pub receive: Option<PrepareReceiving>,
}

/// Opens a repository.
pub type OpenRepository = Box<dyn Fn() -> BoxFuture<'static, Result<Repository, Failure>> + Send + Sync>;

/// Why a daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one already.
    #[error("another daemon is running: {0}")]
    Running(disk::Error),
    /// The lock could not be taken.
    #[error(transparent)]
    Disk(disk::Error),
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] control::Error),
}

/// A daemon that listens and does not work yet.
pub struct Daemon {
    listener: DaemonListener,
    sites: Vec<Arc<SitePush>>,
    receivers: Receivers,
    /// What is to be received, by the names of sites.
    to_receive: Vec<(String, PrepareReceiving)>,
    _lock: LockFile,
}

/// How long callers that wait for their file may go on waiting, and receivers storing, once the daemon has been told to
/// end.
const GRACE: Duration = Duration::from_secs(3);
/// How long it may then take to tell those who still wait that there is no more waiting.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a daemon takes to end once it has been told to, at most.
pub const ENDS_WITHIN: Duration = GRACE.saturating_add(FAREWELL);

impl Daemon {
    /// Takes the lock and listens.
    pub fn start(mut options: DaemonOptions) -> Result<Self, Error> {
        let lock = LockFile::acquire(&options.lock).map_err(|error| match error {
            disk::Error::Locked { .. } => Error::Running(error),
            error => Error::Disk(error),
        })?;
        let listener = DaemonListener::bind(&options.socket)?;
        memory::map_large_things();
        let receivers = Receivers::new(options.clock.clone(), options.failure_of);
        let receive = |site: &mut SiteOptions| Some((site.name.clone(), site.receive.take()?));
        let to_receive = options.sites.iter_mut().filter_map(receive).collect();
        let workers = Workers {
            threads: Threads::new(options.threads),
            clock: options.clock,
            failure_of: options.failure_of,
        };
        let share = options.memory_bytes / options.sites.len().max(1) as u64;
        let sites = options.sites.into_iter();
        let sites = sites
            .map(|site| Arc::new(SitePush::new(site, workers.clone(), options.transfers, share)))
            .collect();
        Ok(Self { listener, sites, receivers, to_receive, _lock: lock })
    }

    /// Works until `stop` resolves, and ends within [`ENDS_WITHIN`] whatever stores do.
    ///
    /// What is still under way then is left to the runtime to drop: a file that is half on its way was not
    /// acknowledged, and PostgreSQL asks for it again.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let source = ShutdownSource::default();
        let mut jobs = Jobs::new(source.shutdown());
        for site in &self.sites {
            let opening = site.clone();
            jobs.spawn(site.name(), "first opening", async move { opening.open_once().await });
            jobs.spawn(site.name(), "look-ahead", site.clone().look_ahead());
            jobs.spawn(site.name(), "heads", site.clone().keep_heads());
            jobs.spawn(site.name(), "idle memory", idle_memory::give_back(site.clone()));
        }
        for (site, prepare) in self.to_receive {
            self.receivers.start(site, prepare, source.shutdown());
        }
        let callers = Arc::new(Callers::new(self.sites, source.shutdown()));
        tokio::select! {
            () = callers.clone().take(self.listener) => {}
            () = stop => {}
        }
        tracing::info!("ending");
        source.request();
        let all_done = async { tokio::join!(callers.all_answered(), self.receivers.all_ended()) };
        if tokio::time::timeout(GRACE, all_done).await.is_err() {
            source.expire();
            let _ = tokio::time::timeout(FAREWELL, callers.all_answered()).await;
        }
        jobs.end();
    }
}

impl fmt::Debug for SiteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SiteOptions").field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for DaemonOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { socket, sites, .. } = self;
        f.debug_struct("DaemonOptions").field("socket", socket).field("sites", sites).finish_non_exhaustive()
    }
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon").field("listener", &self.listener).finish_non_exhaustive()
    }
}
