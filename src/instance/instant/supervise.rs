//! The one process of an unfinished restore: it mounts, starts PostgreSQL, brings the rest, and unmounts once that is possible.
//!
//! mount → PostgreSQL → requests, the rest of the basebackup → plain → until the server stops → unmount. When this process is
//! killed PostgreSQL dies with it, and `--resume` goes on from what is beneath. It never starts a server that somebody has
//! stopped. Reads wait for the store while there is recovery to lose, be it that of a crash, after that until a deadline. A
//! server that could not be started leaves the mount, so that its configuration can be put right. Deliberately absent: isolation.

use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use tokio::task::JoinSet;

use crate::control::{
    HydrationState, HydrationStatus, Listener, Pending, RestoreReply, RestoreRequest, RestoreStatus,
    RestoredServer, RestoredTablespace,
};
use crate::instance::cutting_over::CuttingOver;
use crate::instance::ending::{Step, step};
use crate::instance::hydration::Hydrating;
use crate::instance::instant::InstantError;
use crate::instance::instant::always_read::AlwaysRead;
use crate::instance::instant::ending::Ending;
use crate::instance::instant::mounts::{InstantMounts, blocking};
use crate::instance::instant::prepare::forget_dead_server;
use crate::instance::instant::running::{Running, launch, restored};
use crate::instance::instant::server_state::{
    Told, ask, before_cut_over, decide, endpoint, is_for_want_of_wal, is_recovering, is_starting,
    read_pid_file,
};
use crate::instance::instant::starts::{Ended, Next, Starts};
use crate::instance::instant::unfinished::{self, Found, Unfinished};
use crate::instance::lazy_uppers::{RUNNING_PATIENCE, STOPPING_PATIENCE};
use crate::instance::orphans;
use crate::instance::postmaster::Postmaster;
use crate::instance::server::{ServerError, StopMode, last_words, tail};
use crate::instance::store_wait::{Waited, until_it_answers};
use crate::mount::patience::Patience;
use crate::mount::upper::Upper;
use crate::pg::PostmasterPid;
use crate::repo::Repository;
use crate::restore;
use crate::restore::target::resolve;
use crate::storage::Traffic;

/// What a supervisor is given.
#[derive(Debug)]
pub struct SuperviseOptions {
    /// PGDATA.
    pub target: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// What the server says before it has a log of its own.
    pub server_log: PathBuf,
    /// The site, opened for reading.
    pub repository: Repository,
    /// What the store is asked.
    pub traffic: Arc<Traffic>,
    /// Requests to the store, and bytes read from it, before this process began.
    pub spent_requests: u64,
    /// See `spent_requests`.
    pub spent_bytes: u64,
    /// The environment that PostgreSQL is given.
    pub environment: Vec<(String, String)>,
    /// When the user asked for it.
    pub asked_at: Instant,
    /// Whether the server is started here.
    pub starts: bool,
}

/// How often a server is looked at until it answers, and after that.
const LOOK: Duration = Duration::from_millis(200);
const LOOK_LATER: Duration = Duration::from_secs(1);
/// How long a cut-over that is under way is waited for at the end: what is cut off may leave a database.
const CUT_OVER_WAIT: Duration = Duration::from_secs(10);
const CUT_OVER_LOOK: Duration = Duration::from_millis(50);
/// What a postmaster ends with of its own accord once one of its processes has crashed.
const CRASHED: i32 = 1;

/// Serves a restore until its directory is plain and nobody uses the mount, or it is told to end.
pub async fn supervise(
    options: SuperviseOptions,
    terminated: impl Future<Output = ()>,
) -> Result<(), InstantError> {
    orphans::adopt();
    let data = resolve(&options.target);
    let target = data.clone();
    let unfinished = match blocking(move || unfinished::find(&target)).await? {
        Found::Instant(unfinished) => *unfinished,
        Found::Ended(_) | Found::Other | Found::Plain => {
            return Err(restore::Error::NothingToResume { path: data }.into());
        }
    };
    run(&options, &unfinished, pin!(terminated)).await
}

async fn run<T: Future<Output = ()>>(
    options: &SuperviseOptions,
    unfinished: &Unfinished,
    mut terminated: Pin<&mut T>,
) -> Result<(), InstantError> {
    let opening = InstantMounts::open(&options.repository, unfinished);
    let mounts = match step(opening, terminated.as_mut(), || {}).await {
        Step::Done(opened) => opened?,
        Step::Told(Some(Ok(mut opened))) => return opened.close().await,
        Step::Told(_) => return Ok(()),
    };
    let mut serving = Serving::new(options, unfinished, mounts);
    let outcome = match Listener::bind(&options.socket) {
        Ok(listener) => serving.serve(&listener, terminated).await,
        Err(error) => Err(error.into()),
    };
    // Whatever happened: what PostgreSQL was told is durable is made so, and nothing stays mounted.
    let closed = serving.close().await;
    outcome.and(closed)
}

/// A restore that is being served.
struct Serving<'a> {
    options: &'a SuperviseOptions,
    unfinished: &'a Unfinished,
    mounts: InstantMounts,
    /// Leads to the data directory beneath the mount.
    beneath: PathBuf,
    running: Running,
    server: RestoredServer,
    /// Whether it runs and has not come so far as to let somebody in.
    is_starting: bool,
    /// Why no server runs.
    message: Option<String>,
    /// Why the directory is not plain though everything is local.
    unplaced: Option<String>,
    /// The server that is known to have ended its recovery.
    over_for: Option<Pid>,
    starts: Starts,
    answered: Option<f64>,
    plain: Option<f64>,
    fetching: AlwaysRead,
    hydrating: Hydrating,
    waiting: JoinSet<Waited>,
    /// Whether what the store is waited for was a server that had answered, and ended as it does when one of its processes has.
    has_crashed: bool,
    archive_is_away: bool,
    cutting: CuttingOver,
    ending: Ending,
}

impl<'a> Serving<'a> {
    fn new(options: &'a SuperviseOptions, unfinished: &'a Unfinished, mounts: InstantMounts) -> Self {
        let cutting = CuttingOver::new(!mounts.is_hydrated());
        Self {
            options,
            unfinished,
            beneath: mounts.data_beneath(),
            mounts,
            running: Running::default(),
            server: RestoredServer::Stopped,
            is_starting: false,
            message: None,
            unplaced: None,
            over_for: None,
            starts: Starts::default(),
            answered: None,
            plain: None,
            fetching: AlwaysRead::default(),
            hydrating: Hydrating::default(),
            waiting: JoinSet::new(),
            has_crashed: false,
            archive_is_away: false,
            cutting,
            ending: Ending::default(),
        }
    }

    /// Serves until nothing is mounted any more, or this process is to end.
    async fn serve<T: Future<Output = ()>>(
        &mut self,
        listener: &Listener<RestoreRequest>,
        mut terminated: Pin<&mut T>,
    ) -> Result<(), InstantError> {
        self.fetching.begin(&self.mounts);
        self.set_patience();
        if self.options.starts {
            forget_dead_server(&self.beneath)?;
            self.start_or_tell().await;
        }
        loop {
            let look = if self.answered.is_some() || self.is_idle() { LOOK_LATER } else { LOOK };
            tokio::select! {
                pending = listener.next() => self.answer(pending).await,
                status = self.running.own_ended() => {
                    let status = status.map_err(|error| InstantError::Internal(error.to_string()))?;
                    self.server_ended(status).await?;
                }
                Some(fetched) = self.fetching.ended() => {
                    let fetched = fetched.map_err(|error| InstantError::Internal(error.to_string()))?;
                    self.fetching.was_fetched(fetched, &self.mounts);
                }
                Some(ended) = self.hydrating.ended() => if let Err(error) = ended {
                    tracing::error!("the hydrator ended: {error}");
                },
                Some(waited) = self.waiting.join_next() => self.store_was_asked(waited.ok()).await,
                () = tokio::time::sleep(look) => {}
                () = terminated.as_mut() => return Ok(()),
            }
            self.look().await;
            self.go_on().await;
            if self.ending.is_plain() && self.is_idle() && self.mounts.try_close().await? {
                return Ok(());
            }
        }
    }

    /// Tells whether no server runs, and none is about to.
    fn is_idle(&self) -> bool {
        self.running.pid().is_none() && self.waiting.is_empty()
    }

    fn seconds(&self) -> f64 {
        let now = self.options.repository.clock().monotonic();
        now.saturating_duration_since(self.options.asked_at).as_secs_f64()
    }

    /// Reads wait as long as recovery would be lost, or the files that must never fail to be read have not all come. One
    /// from a crash has no file that tells of it, but nobody is let in before it is over.
    fn set_patience(&self) {
        let lasts = is_recovering(&self.beneath) || self.is_starting || !self.fetching.is_over();
        self.mounts.wait_for_store(if lasts { Patience::Forever } else { RUNNING_PATIENCE });
    }

    /// Looks what the server does, whoever started it.
    async fn look(&mut self) {
        let file = read_pid_file(&self.beneath);
        let plan = &self.unfinished.plan;
        if self.running.look_for_others(file.as_ref(), &plan.destinations.data, plan.owner()) {
            tracing::info!("a server that was started by somebody else runs here now");
            self.message = None;
            // Once that one is stopped, it is stopped.
            self.waiting.abort_all();
        }
        let Some(pid) = self.running.pid() else {
            self.is_starting = false;
            self.server = match (&self.message, self.waiting.is_empty()) {
                (_, false) => RestoredServer::Recovering,
                (Some(_), true) => RestoredServer::Failed,
                (None, true) => RestoredServer::Stopped,
            };
            return;
        };
        let lasts = is_recovering(&self.beneath);
        // The file of one that is gone says nothing of the one that starts.
        let file = file.filter(|file| file.pid == pid.as_raw());
        let status = file.as_ref().and_then(|file| file.status);
        self.is_starting = is_starting(status);
        let is_known = self.over_for == Some(pid);
        let told = match file.as_ref().filter(|file| file.is_ready() && !is_known) {
            Some(file) => match endpoint(file, &self.unfinished.spec.superuser, self.unfinished.plan.owner())
            {
                Some(endpoint) => ask(&endpoint).await,
                None => None,
            },
            None => is_known.then_some(Told::Over),
        };
        // One that does not let Walden in is not asked again once its directory says that it is over.
        if told == Some(Told::Over)
            || told.is_none() && !lasts && file.as_ref().is_some_and(PostmasterPid::is_ready)
        {
            self.over_for = Some(pid);
        }
        let before = std::mem::replace(&mut self.server, decide(status, lasts, told));
        if self.running.is_foreign() && self.server == RestoredServer::Recovering && before != self.server {
            self.sync_beside();
        }
    }

    /// Has the disk take what was written, beside a recovery that was not begun here: its server may ask the mount for that
    /// by `syncfs`, of which no mount hears. One that fails is taken note of there.
    fn sync_beside(&self) {
        let uppers = self.mounts.uppers().to_vec();
        drop(tokio::task::spawn_blocking(move || uppers.iter().try_for_each(Upper::sync_all)));
    }

    /// Does what the state of the server and of the upper calls for.
    async fn go_on(&mut self) {
        self.set_patience();
        let now = self.options.repository.clock().monotonic();
        self.starts.looked(self.server.answers() && !self.running.is_foreign(), now);
        let has_answered = self.answered.is_some();
        if !has_answered && self.server.answers() && self.fetching.is_over() {
            self.answered = Some(self.seconds());
        }
        // A recovery that goes on has the store for itself; without a server nobody is in the way.
        if !self.hydrating.has_begun() && (self.answered.is_some() || self.is_idle()) {
            self.hydrating.begin(&self.mounts);
        }
        if !self.ending.is_plain() && self.mounts.is_hydrated() && self.fetching.is_over() {
            match self.ending.make_plain(&self.mounts, self.unfinished, &self.options.repository).await {
                Ok(()) => (self.plain, self.unplaced) = (Some(self.seconds()), None),
                // The server goes on, and so does this: the disk may have room later.
                Err(error) => self.tell_once(&error),
            }
        }
        let cuts_over = self.unfinished.spec.cut_over && self.ending.is_plain();
        if cuts_over && self.server == RestoredServer::Running && !self.cutting.has_begun() {
            self.cut_over();
        }
    }

    fn cut_over(&mut self) {
        // One that is about to end has a file no more.
        let Some(file) = read_pid_file(&self.beneath) else { return };
        let owner = self.unfinished.plan.owner();
        match endpoint(&file, &self.unfinished.spec.superuser, owner) {
            Some(endpoint) => self.cutting.begin(&self.options.repository, &endpoint),
            None => self.cutting.give_up("the server has no Unix socket"),
        }
    }

    fn tell_once(&mut self, error: &InstantError) {
        let message = format!("not everything of the directory could be put in its place: {}", error.told());
        if self.unplaced.as_ref() != Some(&message) {
            tracing::error!("{message}");
            self.unplaced = Some(message);
        }
    }

    /// Starts PostgreSQL; the mount has been synced before.
    async fn start(&mut self) -> Result<(), InstantError> {
        self.mounts.sync().await?;
        self.is_starting = true;
        self.set_patience();
        let launch = launch(
            self.unfinished,
            is_recovering(&self.beneath),
            self.beneath.join("postmaster.pid"),
            self.options.server_log.clone(),
            self.options.environment.clone(),
        );
        self.running.started(Postmaster::start(&launch).await?, &launch);
        self.starts.started();
        self.message = None;
        self.server = RestoredServer::Recovering;
        Ok(())
    }

    async fn start_or_tell(&mut self) {
        if let Err(error) = self.start().await {
            tracing::error!("{error}");
            self.message = Some(error.told());
        }
    }

    /// Decides what follows from the end of a server that was started here.
    async fn server_ended(&mut self, status: ExitStatus) -> Result<(), InstantError> {
        self.running.forget_own();
        // A process that is left over may still wait for the store.
        self.fetching.cut_off();
        self.mounts.wait_for_store(STOPPING_PATIENCE);
        blocking(|| {
            orphans::end();
            Ok(())
        })
        .await?;
        // Whoever is connected next finds files that are local.
        self.cutting.stop().await;
        self.cutting = CuttingOver::new(!self.mounts.is_hydrated());
        if status.success() {
            tracing::info!("the server was stopped");
            self.message = None;
            return Ok(());
        }
        let log = last_words(&tail(&self.options.server_log));
        let message = format!("PostgreSQL ended ({status}): {log}");
        tracing::error!("{message}");
        self.message = Some(match self.mounts.damage() {
            // PostgreSQL only saw that a read failed.
            Some(damage) => format!("{damage}; {message}"),
            None => message.clone(),
        });
        self.archive_is_away = is_for_want_of_wal(&log);
        let has_answered = self.answered.is_some() || self.starts.has_answered();
        self.has_crashed = has_answered && status.code() == Some(CRASHED);
        let ended = Ended {
            is_plain: self.ending.is_plain(),
            is_recovering: is_recovering(&self.beneath),
            archive_is_away: self.archive_is_away,
            has_crashed: self.has_crashed,
        };
        match self.starts.plan_next(ended) {
            Next::Nothing => {}
            Next::AskStore(pause) => {
                let (repository, id) = (self.options.repository.clone(), self.unfinished.plan.basebackup);
                let message = format!("recovery starts again when the store answers: {message}");
                self.waiting.spawn(async move {
                    tokio::time::sleep(pause).await;
                    until_it_answers(&repository, id, &message).await
                });
            }
            Next::Start(pause) => {
                self.waiting.spawn(async move {
                    tokio::time::sleep(pause).await;
                    Waited::ItIsBack
                });
            }
        }
        Ok(())
    }

    /// Starts a recovery again that ended for want of the store, or was over.
    async fn store_was_asked(&mut self, waited: Option<Waited>) {
        match waited {
            // Somebody else has started one meanwhile.
            _ if self.running.pid().is_some() => {}
            Some(Waited::ItIsBack) => self.start_or_tell().await,
            // At its target it waits for a person, and lost one of its sessions meanwhile.
            Some(Waited::ItWasThere) if self.has_crashed || self.archive_is_away => {
                self.start_or_tell().await;
            }
            // It was not the cause, or is gone for good: the message stays.
            Some(Waited::ItWasThere | Waited::TooLong | Waited::Stopped(_)) | None => {}
        }
    }

    async fn answer(&mut self, pending: Pending<RestoreRequest>) {
        let reply = match pending.request {
            RestoreRequest::Status => {
                self.look().await;
                RestoreReply::Status(Box::new(self.status()))
            }
            RestoreRequest::Start => {
                self.hydrating.begin_again(&self.mounts).await;
                self.fetching.begin_again(&self.mounts);
                self.look().await;
                if self.running.pid().is_some() || !self.waiting.is_empty() {
                    RestoreReply::Done
                } else {
                    self.starts.forget();
                    match self.start().await {
                        Ok(()) => RestoreReply::Done,
                        Err(error) => RestoreReply::Failed { message: error.told() },
                    }
                }
            }
        };
        pending.answer(&reply).await;
    }

    fn status(&self) -> RestoreStatus {
        let Unfinished { plan, spec } = self.unfinished;
        let traffic = self.options.traffic.snapshot();
        let tablespaces = plan.destinations.tablespaces.iter().map(|(oid, directory)| RestoredTablespace {
            oid: *oid,
            name: plan.tablespace_names.get(oid).cloned().unwrap_or_default(),
            directory: directory.clone(),
        });
        let is_plain = self.ending.is_plain();
        let cut_over = || self.cutting.told().or_else(|| before_cut_over(self.server, is_plain));
        let cut_over = spec.cut_over.then(cut_over).flatten();
        RestoreStatus {
            site: spec.site.clone(),
            basebackup: plan.basebackup.to_string(),
            target_directory: plan.destinations.data.clone(),
            tablespaces: tablespaces.collect(),
            timeline: plan.timeline.get(),
            target: plan.target.as_ref().map(|target| target.target.to_string()),
            settings: restored(&plan.settings),
            config_settings: plan.configuration.iter().flat_map(|(_, settings)| restored(settings)).collect(),
            command_line_settings: self.running.settings().to_vec(),
            warnings: plan.warnings.clone(),
            hydrates: spec.hydrate.in_background,
            server: self.server,
            message: self.message.clone(),
            is_plain,
            is_cutting_over: spec.cut_over && cut_over.is_none(),
            cut_over,
            supervisor_pid: std::process::id(),
            server_pid: self.running.pid().map(|pid| pid.as_raw().unsigned_abs()),
            answered_after_seconds: self.answered,
            plain_after_seconds: self.plain,
            hydrated_bytes: if is_plain { self.mounts.total_bytes() } else { self.mounts.hydrated_bytes() },
            total_bytes: self.mounts.total_bytes(),
            hydration: self.hydration(),
            bytes_fetched: self.options.spent_bytes + traffic.bytes_read,
            requests: self.options.spent_requests + traffic.requests(),
        }
    }

    /// Returns how the rest comes, the last step to a plain directory included.
    fn hydration(&self) -> HydrationStatus {
        let hydration = self.mounts.hydration();
        match &self.unplaced {
            Some(why) => {
                HydrationStatus { state: HydrationState::Waiting, reason: Some(why.clone()), ..hydration }
            }
            None => hydration,
        }
    }

    /// Stops the server, and one that somebody has started since the last look, perhaps in the stead of the first.
    async fn stop_servers(&mut self) -> Result<(), ServerError> {
        let plan = &self.unfinished.plan;
        let mut stopped = Ok(());
        for _ in 0..2 {
            let file = read_pid_file(&self.beneath);
            self.running.look_for_others(file.as_ref(), &plan.destinations.data, plan.owner());
            stopped = stopped.and(self.running.stop(StopMode::Fast, &plan.destinations.data).await);
        }
        stopped
    }

    /// Stops the server, whoever started it, and takes the mounts away.
    async fn close(&mut self) -> Result<(), InstantError> {
        let paused = async {
            while !self.cutting.pause() {
                tokio::time::sleep(CUT_OVER_LOOK).await;
            }
        };
        if tokio::time::timeout(CUT_OVER_WAIT, paused).await.is_err() {
            tracing::warn!("the cut-over does not end; a database of its own may be left");
        }
        self.cutting.stop().await;
        self.hydrating.stop().await;
        self.waiting.shutdown().await;
        // A server that waits for the store has to hear that it is to stop.
        self.mounts.wait_for_store(STOPPING_PATIENCE);
        let stopped = self.stop_servers().await;
        let ended = blocking(|| {
            orphans::end();
            Ok(())
        })
        .await;
        if self.ending.is_plain() {
            self.ending.finish().await;
        }
        let closed = self.mounts.close().await;
        ended.and(closed).and(stopped.map_err(InstantError::from))
    }
}
