//! The one process of a running clone: it mounts, starts PostgreSQL, answers requests, and takes everything down.
//!
//! mount → first start only: links, marker, signal file (`prepare`) → sync → PostgreSQL → requests until it ends or is told to →
//! stop → sync → unmount. The order on the way down is what makes everything that was fsynced be there at the next
//! start. When this process is killed PostgreSQL dies with it (`launch`), and the next start begins with detaching
//! the dead mount. Reads wait for the store for ever while there is recovery to lose, and until what must never fail
//! to be read is local; after that until a deadline. The rest of the basebackup comes once the server answers and has
//! ended its recovery, or waits in it. A recovery that ended for want of the store is started again
//! (`store_wait`). Deliberately absent: starting again after any other failure.

use std::error::Error as StdError;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};

use crate::catalog::RecoveryPlan;
use crate::control::{self, CloneSetting, CloneState, CloneStatus, Listener, Pending, Reply, Request};
use crate::disk::{self, LockFile, state_file};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, LastState};
use crate::instance::clone_mount::CloneMount;
use crate::instance::cutting_over::CuttingOver;
use crate::instance::ending::{Step, step};
use crate::instance::hydration::{self, Hydrating};
use crate::instance::isolation::clone_settings;
use crate::instance::launch_order::{facts, launch, listed};
use crate::instance::lazy_uppers::{MountFailure, RUNNING_PATIENCE, STOPPING_PATIENCE};
use crate::instance::orphans;
use crate::instance::prepare::prepare;
use crate::instance::requests;
use crate::instance::reset;
use crate::instance::server::{Endpoint, Server, ServerError, StopMode};
use crate::instance::store_wait::{self, Waited};
use crate::mount::patience::Patience;
use crate::pg::{ControlFileError, RECOVERY_SIGNAL};
use crate::replication::Session;
use crate::repo::{self, Repository};
use crate::storage::Traffic;

/// What a supervisor is given.
#[derive(Debug)]
pub struct SuperviseOptions {
    /// The clone.
    pub folder: CloneFolder,
    /// The site it was made from, opened for reading.
    pub repository: Repository,
    /// What the store is asked.
    pub traffic: Arc<Traffic>,
    /// Requests to the store, and bytes read from it, before this process began.
    pub spent_requests: u64,
    /// See `spent_requests`.
    pub spent_bytes: u64,
    /// Memory of the host.
    pub host_memory_bytes: u64,
    /// The environment that PostgreSQL is given.
    pub environment: Vec<(String, String)>,
    /// When the user asked for it.
    pub asked_at: Instant,
}

/// Why a supervisor gave up.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The folder.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountFailure),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// PostgreSQL.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The socket.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A file in the data directory.
    #[error("could not {action} \"{path}\": {source}")]
    Prepare { action: &'static str, path: String, source: io::Error },
    /// The control file.
    #[error(transparent)]
    ControlFile(#[from] ControlFileError),
    /// What the server would change is on its way elsewhere, or there.
    #[error("the clone is on its way to be an ordinary data directory")]
    Finalizing,
    /// Something failed after damage was met.
    #[error("{damage}; {error}")]
    Damaged { damage: String, error: Box<SuperviseError> },
}

impl SuperviseError {
    /// Returns what the user should do, where that is another thing than to read the logs.
    fn hint(&self) -> Option<String> {
        match self {
            Self::Mount(MountFailure::Mount(error)) => error.hint(),
            Self::Repository(error) | Self::Mount(MountFailure::Repository(error)) => {
                error.hint().map(str::to_owned)
            }
            Self::Damaged { .. } => Some(repo::Error::DAMAGED_HINT.to_owned()),
            _ => None,
        }
    }

    /// Says whether data of the repository is damaged or not to be trusted.
    fn is_damage(&self) -> bool {
        match self {
            Self::Repository(error) | Self::Mount(MountFailure::Repository(error)) => {
                error.kind() == repo::ErrorKind::Damaged
            }
            Self::Damaged { .. } => true,
            Self::Disk(_)
            | Self::Mount(_)
            | Self::Server(_)
            | Self::Control(_)
            | Self::Prepare { .. }
            | Self::ControlFile(_)
            | Self::Finalizing => false,
        }
    }
}

/// A fast stop writes a checkpoint through the mount; after this it is told to end at once.
const STOP_WAIT: Duration = Duration::from_secs(60);
/// A recovery that ends for want of the store this often is not helped by starting it again.
const STARTS_MAX: u32 = 5;
/// How long the server is asked for its state: its answer may need pages from the store.
const STATE_WAIT: Duration = Duration::from_secs(10);
/// How often a server that lets readers in during recovery is looked at: whether recovery has ended.
const RECOVERY_LOOK: Duration = Duration::from_secs(1);

/// Runs a clone until it is told to stop or ends by itself, for who holds the lock of its folder; `terminated` resolves
/// when this process is to end.
pub async fn supervise(
    options: SuperviseOptions,
    _lock: &LockFile,
    terminated: impl Future<Output = ()>,
) -> Result<(), SuperviseError> {
    let folder = options.folder.clone();
    // Only here: whoever asked for the start looked before, and the order may have come since.
    if folder.order_file().exists() {
        return Err(SuperviseError::Finalizing);
    }
    orphans::adopt();
    let outcome = run(options, terminated).await;
    let last = match &outcome {
        Ok(()) => LastState::sound(CloneState::Stopped),
        Err(error) => LastState { hint: error.hint(), ..LastState::failed(error, error.is_damage()) },
    };
    folder.write_state(&last)?;
    outcome
}

/// Notes why a supervisor could not even open the repository, for whoever started it: it ends without another word.
pub fn could_not_open(
    folder: &CloneFolder,
    _lock: &LockFile,
    error: &(dyn StdError + Send + Sync + 'static),
    damaged: bool,
) -> Result<(), disk::Error> {
    folder.write_state(&LastState::failed(error, damaged))
}

async fn run(options: SuperviseOptions, terminated: impl Future<Output = ()>) -> Result<(), SuperviseError> {
    let folder = &options.folder;
    let spec = folder.read_spec()?;
    reset::complete(folder, &spec)?;
    let plan: RecoveryPlan = state_file::read_document(&folder.plan_file(), "a recovery plan")?;
    folder.write_state(&LastState::sound(CloneState::Recovering))?;
    let listener = Listener::bind(&folder.control_socket())?;
    let mut terminated = pin!(terminated);
    let opening = CloneMount::open(&options.repository, folder, &spec, plan);
    let mut mount = match step(opening, terminated.as_mut(), || {}).await {
        Step::Done(opened) => opened?,
        Step::Told(Some(Ok(mut opened))) => return Ok(opened.close().await?),
        Step::Told(_) => return Ok(()),
    };
    let outcome = run_servers(&options, &spec, &listener, &mount, terminated).await;
    let outcome = outcome.map_err(|error| match mount.damage() {
        // PostgreSQL only saw that a read failed.
        Some(damage) => SuperviseError::Damaged { damage, error: Box::new(error) },
        None => error,
    });
    hydration::remember(folder, &mount, Ok(()));
    // Whatever happened, what PostgreSQL was told is durable is made so, and nothing stays mounted.
    let closed = mount.close().await;
    let (stopped_by, ()) = (outcome?, closed?);
    if let Some(pending) = stopped_by {
        folder.write_state(&LastState::sound(CloneState::Stopped))?;
        pending.answer(&Reply::Done).await;
    }
    Ok(())
}

/// Runs PostgreSQL, and again where its recovery ended for want of the store; returns the request that stopped it, if
/// it was one.
async fn run_servers<T: Future<Output = ()>>(
    options: &SuperviseOptions,
    spec: &CloneSpec,
    listener: &Listener,
    mount: &CloneMount,
    mut terminated: Pin<&mut T>,
) -> Result<Option<Pending>, SuperviseError> {
    for start in 1.. {
        let outcome = run_server(options, spec, listener, mount, terminated.as_mut()).await;
        // A process that is left over may still wait for the store.
        mount.wait_for_store(STOPPING_PATIENCE);
        blocking(|| {
            orphans::end();
            Ok(())
        })
        .await?;
        let error = match outcome {
            // Nobody is to stand beside it.
            Err(error @ SuperviseError::Server(ServerError::StillRunning(_))) => return Err(error),
            Err(error @ SuperviseError::Server(_)) => error,
            other => return other,
        };
        if start == STARTS_MAX || mount.damage().is_some() || !is_recovering(&options.folder) {
            return Err(error);
        }
        match store_wait::wait(options, spec, listener, terminated.as_mut(), &error).await {
            Waited::ItIsBack => {}
            Waited::ItWasThere | Waited::TooLong => return Err(error),
            Waited::Stopped(by) => return Ok(by),
        }
    }
    Ok(None)
}

/// PostgreSQL removes the file when recovery has ended, before it lets anybody write.
fn is_recovering(folder: &CloneFolder) -> bool {
    folder.beneath_mount(RECOVERY_SIGNAL).exists()
}

/// A server that is starting or runs.
struct Run<'a> {
    options: &'a SuperviseOptions,
    spec: &'a CloneSpec,
    mount: &'a CloneMount,
    server: Server,
    settings: Vec<CloneSetting>,
    session: Option<Session>,
    state: CloneState,
    seconds_to_ready: Option<f64>,
    hydrating: Hydrating,
    cutting: CuttingOver,
}

/// Runs PostgreSQL once; returns the request that stopped it, if it was one.
async fn run_server<T: Future<Output = ()>>(
    options: &SuperviseOptions,
    spec: &CloneSpec,
    listener: &Listener,
    mount: &CloneMount,
    mut terminated: Pin<&mut T>,
) -> Result<Option<Pending>, SuperviseError> {
    let hurry = || mount.wait_for_store(STOPPING_PATIENCE);
    let mut run = match step(Run::start(options, spec, mount), terminated.as_mut(), hurry).await {
        Step::Done(started) => started?,
        // What a server that was started all the same leaves is ended like that of any other.
        Step::Told(Some(Ok(mut started))) => {
            mount.wait_for_store(STOPPING_PATIENCE);
            return started.server.stop(StopMode::Fast, STOP_WAIT).await.map(|()| None).map_err(Into::into);
        }
        Step::Told(Some(Err(error))) => {
            tracing::warn!("the server did not start, and is not to any more: {error}");
            return Ok(None);
        }
        Step::Told(None) => return Ok(None),
    };
    let mut fetching = JoinSet::new();
    fetching.spawn(mount.fetch_never_failing());
    let outcome = loop {
        let is_ready = run.session.is_some();
        tokio::select! {
            biased;
            // First: a service manager tells the server too, which has ended by itself then only as far as it knows.
            () = terminated.as_mut() => break Ok(None),
            next = run.server.next(!is_ready) => run.session = Some(next?),
            Some(fetched) = fetching.join_next() => {
                let failed = |error: JoinError| MountFailure::Internal(error.to_string());
                if let Err(error) = fetched.map_err(failed).flatten() {
                    break Err(error.into());
                }
            }
            Some(ended) = run.hydrating.ended() => hydration::remember(&options.folder, mount, ended),
            pending = listener.next() => if let Some(stopping) = run.answer(pending).await {
                break Ok(Some(stopping));
            },
            () = tokio::time::sleep(RECOVERY_LOOK), if is_ready && run.state != CloneState::Running => {}
        }
        if run.session.is_some() && fetching.is_empty() {
            if let Err(error) = run.ready().await {
                break Err(error);
            }
            run.cut_over().await;
        }
    };
    run.hydrating.stop().await;
    run.cutting.stop().await;
    // A server that waits for the store has to hear that it is to stop.
    mount.wait_for_store(STOPPING_PATIENCE);
    run.session = None;
    let mode = if outcome.is_ok() { StopMode::Fast } else { StopMode::Immediate };
    run.server.stop(mode, STOP_WAIT).await?;
    outcome
}

impl<'a> Run<'a> {
    async fn start(
        options: &'a SuperviseOptions,
        spec: &'a CloneSpec,
        mount: &'a CloneMount,
    ) -> Result<Self, SuperviseError> {
        let folder = &options.folder;
        let (prepared_folder, prepared_spec) = (folder.clone(), spec.clone());
        let control = blocking(move || prepare(&prepared_folder, &prepared_spec)).await?;
        mount.sync().await?;
        let endpoint = Endpoint::of_clone(folder.run(), spec.port, spec.superuser.clone());
        mount.wait_for_store(Patience::Forever);
        let settings = clone_settings(&facts(options, spec, &control, is_recovering(folder)));
        let server = Server::start(&launch(options, spec, &settings), endpoint).await?;
        let settings = settings.into_iter().map(listed).collect();
        let (state, session, seconds_to_ready) = (CloneState::Recovering, None, None);
        let (hydrating, cutting) = (Hydrating::default(), CuttingOver::new(!mount.is_hydrated()));
        Ok(Self {
            options,
            spec,
            mount,
            server,
            settings,
            session,
            state,
            seconds_to_ready,
            hydrating,
            cutting,
        })
    }

    /// Lets the store's absence be an error once there is no recovery to lose, and tells that the server answers.
    async fn ready(&mut self) -> Result<(), SuperviseError> {
        self.allow_missing_store();
        if !self.hydrating.has_begun() {
            self.look().await;
            // Recovery may have ended in between, and whoever sees it running does not look again.
            self.allow_missing_store();
            // A recovery that goes on has the store for itself.
            if self.state != CloneState::Recovering {
                self.hydrating.begin(self.mount);
            }
        }
        if self.seconds_to_ready.is_some() {
            return Ok(());
        }
        let now = self.options.repository.clock().monotonic();
        self.seconds_to_ready = Some(now.saturating_duration_since(self.options.asked_at).as_secs_f64());
        self.options.folder.write_settings(&self.settings)?;
        self.options.folder.write_state(&LastState::sound(self.state))?;
        Ok(())
    }

    fn allow_missing_store(&self) {
        if !is_recovering(&self.options.folder) {
            self.mount.wait_for_store(RUNNING_PATIENCE);
        }
    }

    /// Answers a request, unless it is one to stop, which is returned and answered when all is done.
    async fn answer(&mut self, pending: Pending) -> Option<Pending> {
        let reply = match pending.request {
            Request::Stop => return Some(pending),
            Request::Status => Reply::Status(Box::new(self.status().await)),
            Request::Reload => requests::reload(&self.server),
            Request::Hydrate => {
                self.hydrating.begin_again(self.mount).await;
                Reply::Done
            }
            Request::Promote => {
                self.look().await;
                match self.session {
                    // Nobody is let in: the server replays up to its target, which ends its recovery by itself.
                    None => Reply::Done,
                    Some(_) => requests::promote(self.server.endpoint(), self.state).await,
                }
            }
            Request::Finalize => {
                self.look().await;
                // One that waits for somebody need not come about any more; it begins again where this is refused.
                let is_whole = self.mount.is_hydrated() && self.cutting.pause();
                match requests::may_be_finalized(self.server.endpoint(), self.state, is_whole).await {
                    Ok(()) => return Some(pending),
                    Err(reply) => reply,
                }
            }
        };
        pending.answer(&reply).await;
        None
    }

    /// Has all sessions open their files again, once everything is local and the server takes writes.
    async fn cut_over(&mut self) {
        if self.cutting.has_begun() || !self.mount.is_hydrated() {
            return;
        }
        if self.state != CloneState::Running {
            self.look().await;
        }
        if self.state == CloneState::Running {
            self.cutting.begin(&self.options.repository, self.server.endpoint());
        }
    }

    /// Asks the server how it is; what it does not answer in time, its directory tells.
    async fn look(&mut self) {
        let Some(session) = &self.session else { return };
        let mut asked = tokio::time::timeout(STATE_WAIT, state_of(session)).await;
        if matches!(asked, Ok(Err(_))) {
            // Somebody has ended the session; the server lets another one in.
            asked = tokio::time::timeout(STATE_WAIT, async {
                let session = self.server.endpoint().connect().await?;
                state_of(self.session.insert(session)).await
            })
            .await;
        }
        self.state = match asked {
            Ok(Ok(state)) => state,
            _ if is_recovering(&self.options.folder) => CloneState::Recovering,
            _ => CloneState::Running,
        };
    }

    async fn status(&mut self) -> CloneStatus {
        if self.seconds_to_ready.is_some() && self.state != CloneState::Running {
            self.look().await;
        }
        let (options, mount) = (self.options, self.mount);
        let traffic = options.traffic.snapshot();
        CloneStatus {
            supervisor_pid: Some(std::process::id()),
            server_pid: Some(self.server.pid()),
            settings: self.settings.clone(),
            hydrated_bytes: mount.hydrated_bytes(),
            total_bytes: mount.total_bytes(),
            hydration: mount.hydration(),
            bytes_fetched: options.spent_bytes + traffic.bytes_read,
            requests: options.spent_requests + traffic.requests(),
            seconds_to_ready: self.seconds_to_ready,
            cut_over_waits_for: self.cutting.waits_for(),
            ..resting_status(&options.folder, self.spec, &LastState::sound(self.state))
        }
    }
}

/// Returns the status of a clone of which nothing runs.
pub fn resting_status(folder: &CloneFolder, spec: &CloneSpec, last: &LastState) -> CloneStatus {
    let last_hydration = folder.read_hydration();
    CloneStatus {
        name: spec.name.clone(),
        state: last.state,
        message: last.message.clone(),
        site: spec.site.clone(),
        basebackup: spec.basebackup.to_string(),
        target: match &spec.until_hole {
            Some(hole) => format!("the end of the WAL before a hole ({hole} missing)"),
            None => spec.target.target.to_string(),
        },
        port: spec.port,
        socket_directory: folder.run(),
        data_directory: folder.data_directory(),
        superuser: spec.superuser.clone(),
        supervisor_pid: None,
        server_pid: None,
        warnings: spec.warnings.clone(),
        expires_at: spec.expires_at,
        settings: folder.read_settings().unwrap_or_default(),
        hydrated_bytes: last_hydration.hydrated_bytes,
        total_bytes: last_hydration.total_bytes,
        hydration: hydration::resting_status(spec, &last_hydration),
        bytes_fetched: 0,
        requests: 0,
        seconds_to_ready: None,
        cut_over_waits_for: None,
    }
}

/// Asks the server whether it is still in recovery, and whether it waits there.
async fn state_of(session: &Session) -> Result<CloneState, ServerError> {
    let sql = "select case when not pg_is_in_recovery() then 'running' \
               when pg_get_wal_replay_pause_state() = 'paused' then 'paused' else 'recovering' end";
    // 13 has no pg_get_wal_replay_pause_state.
    let old = "select case when not pg_is_in_recovery() then 'running' \
               when pg_is_wal_replay_paused() then 'paused' else 'recovering' end";
    let sql = if session.version().number() >= 14 { sql } else { old };
    let rows = session.simple(sql).await?;
    let word = rows.first().and_then(|row| row.first()).and_then(Option::as_deref);
    Ok(match word {
        Some("running") => CloneState::Running,
        Some("paused") => CloneState::Paused,
        _ => CloneState::Recovering,
    })
}

/// Runs what goes through our own mount on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SuperviseError> + Send + 'static,
) -> Result<T, SuperviseError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(SuperviseError::Prepare {
            action: "finish work in",
            path: "the data directory".to_owned(),
            source: io::Error::other(error),
        }),
    }
}
