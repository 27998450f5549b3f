//! Brings everything that is not local yet, in the background and behind everybody else.
//!
//! survey → plan → files side by side → survey again, until one finds nothing; then everything is put on stable storage,
//! and a mark in the private area says so. Allocation is the record: whoever begins anew surveys and goes on.
//!
//! Before each request stands a gate: few at once while a read of somebody else waits for bytes, none beyond the rate,
//! none while the store is away, none while the disk has less room than a reserve. Files that cannot come for another
//! reason are told, counted and left. Deliberately absent: relations that are dropped before a recovery target; the
//! hydrator begins when recovery has ended, and they are gone by then.
//!
//! ```text
//! survey   what is missing      plan     in which order      heat   who waits, and for what
//! file     one file             bucket   how fast            progress   how far
//! share    how many at once
//! ```

mod bucket;
mod file;
pub(crate) mod heat;
mod plan;
mod progress;
pub(crate) mod share;
mod survey;

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::disk::private_area::WHOLE_MARK;
use crate::mount::fs::{FileKind, LocalId};
use crate::mount::lower::NodeId;
use crate::mount::single_flight::WINDOW;
use crate::mount::upper::Upper;
use crate::mount::upper::hydrate::bucket::{Backoff, TokenBucket};
use crate::mount::upper::hydrate::plan::{Plan, Wanted};
use crate::mount::upper::hydrate::progress::Watch;
use crate::mount::upper::hydrate::share::{REQUESTS_AT_ONCE, Share, UnderWay};
use crate::mount::upper::hydrate::survey::{Survey, Trouble};
use crate::mount::upper::namespace::of_io;
use crate::mount::upper::room::Use;

pub use plan::{Place, StoredOrder};
pub use progress::{HydrationReport, HydrationState};

/// How a hydrator goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HydrateOptions {
    /// Whether it fetches at all; else it only finds out how much is missing.
    pub is_on: bool,
    /// The most bytes that become local in a second.
    pub rate: Option<NonZeroU64>,
}

/// Fetches what is missing of some uppers that are filled from one store.
#[derive(Debug)]
pub struct Hydrator {
    uppers: Vec<Upper>,
    order: Arc<dyn StoredOrder>,
    clock: Arc<dyn Clock>,
    options: HydrateOptions,
    pauses: Pauses,
    part_bytes: u64,
    requests: Semaphore,
    share: Share,
    bucket: Option<Mutex<TokenBucket>>,
    backoff: Mutex<Backoff>,
    failures: Mutex<Failures>,
    watch: Watch,
}

/// What could not be made local.
#[derive(Debug, Default)]
struct Failures {
    files: HashSet<(usize, LocalId)>,
    first: Option<String>,
}

/// How long a hydrator waits for what.
#[derive(Debug, Clone, Copy)]
struct Pauses {
    /// Between two looks whether reads still wait, and at the rate.
    gate: Duration,
    /// Between two looks at a disk without room.
    room: Duration,
    /// After the first failure of the store; it doubles up to the next one.
    store_first: Duration,
    store_longest: Duration,
    /// After this a request that is under way is told of as waiting.
    slow: Duration,
    /// Between two surveys.
    survey: Duration,
}

/// A server's read takes milliseconds, and the hydrator is to go on soon after; statements that wait for the rate or for
/// a disk are told as fast as a person looks.
const PAUSES: Pauses = Pauses {
    gate: Duration::from_millis(2),
    room: Duration::from_secs(10),
    store_first: Duration::from_secs(1),
    store_longest: Duration::from_secs(60),
    slow: Duration::from_secs(5),
    survey: Duration::from_secs(1),
};
/// The longest sleep at the gate, so that what has changed is seen.
const GATE_SLEEP_MAX: Duration = Duration::from_secs(1);

/// Files or groups of small files that are taken up at once.
const JOBS_AT_ONCE: usize = 12;
/// A large file comes in parts of this size; with a rate, in parts of a second's worth.
const PART_BYTES: u64 = 4 << 20;
/// Files of one survey: some 150 bytes each. What is beyond comes with the next one.
const WANTED_MAX: usize = 500_000;
/// Surveys that bring nothing further although nothing was moved, before they are given up.
const IDLE_SURVEYS_MAX: u32 = 3;
/// Attempts in a row at what fails for no reason that anybody gives, each after a longer pause: half a minute in all.
const UNCLEAR_ATTEMPTS_MAX: u32 = 5;

const NOT_STARTED: &str = "the server does not answer yet";
const NO_ROOM: &str = "the disk has no room beyond what the server may need";
const NO_STORE: &str = "the store does not answer";
const LOST: &str = "the disk has lost something that was written to it";

impl Hydrator {
    /// Creates a hydrator that does nothing before [`Self::run`].
    pub fn new(
        uppers: Vec<Upper>,
        order: Arc<dyn StoredOrder>,
        clock: Arc<dyn Clock>,
        options: HydrateOptions,
    ) -> Arc<Self> {
        Arc::new(Self::with_pauses(uppers, order, clock, options, PAUSES))
    }

    fn with_pauses(
        uppers: Vec<Upper>,
        order: Arc<dyn StoredOrder>,
        clock: Arc<dyn Clock>,
        options: HydrateOptions,
        pauses: Pauses,
    ) -> Self {
        let watch = match (uppers.iter().all(Upper::is_hydrated), options.is_on) {
            (true, _) => Watch::new(HydrationState::Done, None),
            (false, true) => Watch::new(HydrationState::Waiting, Some(NOT_STARTED.to_owned())),
            (false, false) => Watch::new(HydrationState::Off, None),
        };
        Self {
            uppers,
            order,
            clock,
            options,
            pauses,
            part_bytes: part_bytes(options.rate),
            requests: Semaphore::new(REQUESTS_AT_ONCE),
            share: Share::default(),
            bucket: options.rate.map(|rate| Mutex::new(TokenBucket::new(rate))),
            backoff: Mutex::new(Backoff::new(pauses.store_first, pauses.store_longest)),
            failures: Mutex::default(),
            watch,
        }
    }

    /// Works until everything is local, or what is left cannot become so; may be dropped at any time and run again.
    pub async fn run(self: Arc<Self>) {
        if self.uppers.iter().all(Upper::is_hydrated) {
            return self.watch.ends(HydrationState::Done, None);
        }
        *self.failures() = Failures::default();
        if self.options.is_on {
            self.watch.begins();
        }
        // Whoever asks would be told for ever that it is at work.
        let outcome = AssertUnwindSafe(self.hydrate()).catch_unwind().await;
        match outcome.unwrap_or_else(|panic| Err(format!("bug: {}", said(&*panic)))) {
            Ok(state) => self.watch.ends(state, None),
            Err(reason) => {
                tracing::error!("hydration has failed: {reason}");
                self.watch.ends(HydrationState::Failed, Some(reason));
            }
        }
    }

    /// Returns how far it is.
    pub fn report(&self) -> HydrationReport {
        self.watch.report(self.filled_bytes(), self.clock.monotonic())
    }

    async fn hydrate(self: &Arc<Self>) -> Result<HydrationState, String> {
        let mut places = None;
        let (mut idle, mut last) = (0, None);
        let mut is_again = false;
        loop {
            let moves = self.moves();
            let mut surveys = self.survey().await?;
            let missing: u64 = surveys.iter().map(Survey::bytes).sum();
            self.watch.surveyed(missing, self.filled_bytes());
            if !self.options.is_on {
                return Ok(HydrationState::Off);
            }
            let is_complete = surveys.iter().all(|survey| survey.is_complete);
            let mut wanted: Vec<Wanted> =
                surveys.iter_mut().flat_map(|survey| std::mem::take(&mut survey.wanted)).collect();
            {
                let failures = self.failures();
                wanted.retain(|wanted| !failures.files.contains(&(wanted.upper, wanted.id)));
            }
            let is_still = self.moves() == moves && surveys.iter().all(|survey| survey.is_steady);
            if wanted.is_empty() && is_still {
                let failure = self.failures().first.clone();
                return match failure {
                    Some(failure) => Err(failure),
                    None if is_complete => self.finish().await.map(|()| HydrationState::Done),
                    None => Err("there are more files than a survey takes".to_owned()),
                };
            }
            let found = Some((moves, wanted.len(), missing));
            idle = if self.moves() == moves && found == last { idle + 1 } else { 0 };
            if idle == IDLE_SURVEYS_MAX {
                return Err("what is missing does not become local".to_owned());
            }
            last = found;
            if places.is_none() {
                places = Some(self.places().await);
            }
            let plan = Plan::new(wanted, places.as_ref().unwrap_or(&HashMap::new()));
            self.work(plan).await;
            // The directories of what was wanted are held until here.
            drop(surveys);
            // The second survey mostly finds nothing, and then the directory is whole; nobody is to wait for that.
            if std::mem::replace(&mut is_again, true) {
                tokio::time::sleep(self.pauses.survey).await;
            }
        }
    }

    /// Surveys every upper, waiting for what can be waited for.
    async fn survey(&self) -> Result<Vec<Survey>, String> {
        let mut unclear = 0;
        loop {
            match self.try_survey().await {
                Ok(surveys) => return Ok(surveys),
                Err(Trouble::Lasting(reason)) => return Err(reason),
                Err(Trouble::Unclear(reason)) if unclear == UNCLEAR_ATTEMPTS_MAX => return Err(reason),
                Err(Trouble::Unclear(reason)) => self.stumble(&mut unclear, &reason).await,
                Err(trouble) => self.note(&trouble).await,
            }
        }
    }

    async fn try_survey(&self) -> Result<Vec<Survey>, Trouble> {
        self.pass(0).await;
        let mut surveys = Vec::new();
        for (number, upper) in self.uppers.iter().enumerate() {
            surveys.push(upper.survey(number, self.options.is_on, WANTED_MAX).await?);
        }
        self.store_answers();
        Ok(surveys)
    }

    async fn places(&self) -> HashMap<NodeId, Place> {
        self.order.places().await.unwrap_or_else(|error| {
            tracing::warn!("hydration goes by directories: {error}");
            HashMap::new()
        })
    }

    /// Comes to the end of a plan.
    async fn work(self: &Arc<Self>, mut plan: Plan) {
        let mut jobs = JoinSet::new();
        loop {
            while jobs.len() < JOBS_AT_ONCE
                && let Some(job) = self.next_job(&mut plan)
            {
                jobs.spawn(self.clone().run_job(job));
            }
            match jobs.join_next().await {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::error!("a part of the hydration ended: {error}"),
                None => return,
            }
        }
    }

    fn next_job(&self, plan: &mut Plan) -> Option<Vec<Wanted>> {
        if let Some(job) = plan.take_of_start_set() {
            return Some(job);
        }
        let hottest = || {
            let uppers = self.uppers.iter().enumerate();
            let hot = uppers.filter_map(|(n, upper)| Some((upper.shared.foreground.hottest()?, n)));
            hot.max().map(|((_, file), n)| (n, file))
        };
        while let Some((upper, file)) = hottest() {
            self.uppers[upper].shared.foreground.forget(file);
            if let Some(wanted) = plan.take(upper, file) {
                return Some(vec![wanted]);
            }
        }
        plan.take_next()
    }

    async fn run_job(self: Arc<Self>, job: Vec<Wanted>) {
        let is_group = job.len() > 1;
        if is_group {
            let _permit = self.requests.acquire().await;
            let _under_way = self.gate(job[0].upper, job.iter().map(|wanted| wanted.bytes).sum()).await;
            let files = job.iter().filter(|wanted| wanted.kind == FileKind::File && wanted.bytes > 0);
            let nodes: Vec<NodeId> = files.map(Wanted::node).collect();
            // Each file is asked for again, and says what is wrong.
            match self.order.load(&nodes).await {
                Err(error) if error.is_transient() => {
                    self.backoff().failed(self.clock.monotonic());
                }
                _ => self.store_answers(),
            }
        }
        for wanted in &job {
            self.make_whole(wanted, !is_group).await;
        }
    }

    /// Makes something whole, however long that takes, or notes why it cannot be.
    async fn make_whole(&self, wanted: &Wanted, is_charged: bool) {
        let (mut left, mut unclear) = (wanted.bytes, 0);
        loop {
            let before = left;
            let outcome = self.try_make_whole(wanted, is_charged, &mut left).await;
            if left < before {
                unclear = 0;
            }
            let lasting = match outcome {
                Ok(()) => break,
                Err(Trouble::Lasting(reason)) => reason,
                Err(Trouble::Unclear(reason)) if unclear == UNCLEAR_ATTEMPTS_MAX => reason,
                Err(Trouble::Unclear(reason)) => {
                    self.stumble(&mut unclear, &reason).await;
                    continue;
                }
                Err(trouble) => {
                    self.note(&trouble).await;
                    continue;
                }
            };
            return self.give_up(wanted, lasting);
        }
        self.watch.settled(left, self.filled_bytes());
    }

    /// Takes note of something that cannot become local.
    fn give_up(&self, wanted: &Wanted, reason: String) {
        let name = String::from_utf8_lossy(&wanted.name);
        tracing::error!("file \"{name}\" cannot be made local: {reason}");
        let mut failures = self.failures();
        failures.files.insert((wanted.upper, wanted.id));
        failures.first.get_or_insert(reason);
        self.watch.file_failed();
    }

    /// Takes note of a trouble that nobody explains, and waits a while: a disk or a store may only have stumbled.
    async fn stumble(&self, unclear: &mut u32, reason: &str) {
        tracing::warn!("hydration tries again: {reason}");
        let pause = self.pauses.store_first.saturating_mul(1 << *unclear);
        *unclear += 1;
        tokio::time::sleep(pause.min(self.pauses.store_longest)).await;
    }

    /// Takes note of a trouble that passes, and waits until it may have.
    async fn note(&self, trouble: &Trouble) {
        let Trouble::Store(error) = trouble else {
            self.watch.waits(NO_ROOM);
            return tokio::time::sleep(self.pauses.room).await;
        };
        if self.backoff().failed(self.clock.monotonic()) {
            tracing::warn!("hydration waits for the store: {error}");
        }
        self.watch.waits(NO_STORE);
        loop {
            let left = self.backoff().left(self.clock.monotonic());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(GATE_SLEEP_MAX)).await;
        }
    }

    /// Waits until a request for so many bytes may be made; it is on its way while the answer is held.
    async fn gate(&self, upper: usize, bytes: u64) -> UnderWay<'_> {
        while !self.uppers[upper].shared.room.is_for(Use::Hydration) {
            self.watch.waits(NO_ROOM);
            tokio::time::sleep(self.pauses.room).await;
        }
        let under_way = self.give_way().await;
        self.pass(bytes).await;
        under_way
    }

    /// Waits until there is a place beside what others wait for.
    async fn give_way(&self) -> UnderWay<'_> {
        loop {
            let are_reads_waiting = self.uppers.iter().any(|upper| upper.shared.foreground.are_waiting());
            if let Some(under_way) = self.share.begin(are_reads_waiting) {
                return under_way;
            }
            tokio::time::sleep(self.pauses.gate).await;
        }
    }

    /// Waits for the rate and the store; whoever is let pass asks the store and says what came of it.
    async fn pass(&self, bytes: u64) {
        let mut is_paid = false;
        loop {
            let now = self.clock.monotonic();
            let pause = if !is_paid {
                self.watch.goes_on();
                let pause = self.spend(bytes, now);
                is_paid = pause.is_zero();
                pause
            } else {
                let away = self.backoff().wait(now);
                if away.is_zero() {
                    self.watch.goes_on();
                    return;
                }
                self.watch.waits(NO_STORE);
                away
            };
            if !pause.is_zero() {
                tokio::time::sleep(pause.min(GATE_SLEEP_MAX)).await;
            }
        }
    }

    /// Lets bytes through the bucket, or returns how long to wait for that.
    fn spend(&self, bytes: u64, now: Instant) -> Duration {
        let Some(bucket) = self.bucket.as_ref().filter(|_| bytes > 0) else { return Duration::ZERO };
        let mut bucket = bucket.lock().expect("no holder of this lock panics");
        let wait = bucket.wait(now);
        if wait.is_zero() {
            bucket.spend(bytes, now);
        }
        wait
    }

    fn store_answers(&self) {
        self.backoff().succeeded();
        self.watch.goes_on();
    }

    /// Puts everything on stable storage and says so.
    async fn finish(self: &Arc<Self>) -> Result<(), String> {
        loop {
            let this = self.clone();
            let finish = move || this.uppers.iter().try_for_each(Upper::finish);
            match tokio::task::spawn_blocking(finish).await.map_err(|error| error.to_string())? {
                Err(Trouble::Room) => self.note(&Trouble::Room).await,
                outcome => return outcome.map_err(|trouble| trouble.to_string()),
            }
        }
    }

    fn moves(&self) -> u64 {
        self.uppers.iter().map(Upper::moves).sum()
    }

    fn filled_bytes(&self) -> u64 {
        self.uppers.iter().map(|upper| upper.stats().filled_bytes).sum()
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().expect("no holder of this lock panics")
    }

    fn backoff(&self) -> MutexGuard<'_, Backoff> {
        self.backoff.lock().expect("no holder of this lock panics")
    }
}

impl Upper {
    /// Tells whether everything is local and on stable storage: the upper, with what is held back, is an ordinary
    /// directory.
    pub fn is_hydrated(&self) -> bool {
        self.shared.stable.is_whole()
    }

    /// Puts everything on stable storage, and then marks the upper as whole.
    fn finish(&self) -> Result<(), Trouble> {
        // Whatever number it has, a sync that failed has lost something: only the mark may be tried again.
        self.sync_all().map_err(|errno| Trouble::Lasting(format!("could not sync the files: {errno}")))?;
        let marked = self.shared.stable.mark_whole().map_err(of_io);
        marked.map_err(|errno| Trouble::of_errno(errno, WHOLE_MARK.as_bytes()))
    }
}

/// Returns what a panic said.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a word")
}

/// Returns how large the parts of a large file are: no more than a second's worth, and whole windows.
fn part_bytes(rate: Option<NonZeroU64>) -> u64 {
    let second = rate.map_or(PART_BYTES, NonZeroU64::get);
    second.clamp(WINDOW, PART_BYTES) / WINDOW * WINDOW
}

/// Nothing is known of how files are stored.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct NoOrder;

#[cfg(test)]
#[async_trait::async_trait]
impl StoredOrder for NoOrder {
    async fn places(&self) -> Result<HashMap<NodeId, Place>, crate::mount::lower::LowerError> {
        Ok(HashMap::new())
    }

    async fn load(&self, _: &[NodeId]) -> Result<(), crate::mount::lower::LowerError> {
        Ok(())
    }
}

#[cfg(test)]
impl Hydrator {
    /// Creates a hydrator that waits for nothing longer than a test does.
    pub(crate) fn hasty(upper: &Upper) -> Arc<Self> {
        Self::of_a_test(upper, true, Arc::new(NoOrder))
    }

    /// Creates one that only finds out how much is missing.
    pub(crate) fn counting(upper: &Upper) -> Arc<Self> {
        Self::of_a_test(upper, false, Arc::new(NoOrder))
    }

    pub(crate) fn of_a_test(upper: &Upper, is_on: bool, order: Arc<dyn StoredOrder>) -> Arc<Self> {
        let short = Duration::from_micros(100);
        let pauses = Pauses {
            gate: short,
            room: short,
            store_first: short,
            store_longest: short,
            survey: short,
            ..PAUSES
        };
        let clock = Arc::new(crate::clock::SystemClock);
        let options = HydrateOptions { is_on, rate: None };
        Arc::new(Self::with_pauses(vec![upper.clone()], order, clock, options, pauses))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_a_second_s_worth_of_whole_windows() {
        let of = |rate| part_bytes(NonZeroU64::new(rate));
        assert_eq!((of(0), of(1), of(WINDOW + 1)), (PART_BYTES, WINDOW, WINDOW));
        assert_eq!((of(10 * WINDOW), of(1 << 40)), (10 * WINDOW, PART_BYTES));
    }
}
