//! Receives WAL by streaming: server → spool → store, without loss and without an end.
//!
//! ```text
//! server ──▶ stream ──▶ spool (fsync) ──▶ feedback        plan: every decision, pure
//!                         └──▶ upload: pieces, segments, history files ──▶ store
//! ```
//!
//! The receiving half follows the servers of the site over restarts, failovers and timelines; the storing half empties
//! the spool. Where the server cannot go on from where we are (the slot was lost, WAL was removed), that is said in the
//! log and in `receive.json` together with the hole, and receiving goes on behind it: the next basebackup needs that
//! WAL. Deliberately absent: removing what pieces leave in the store (the sweep), and alerts.

mod disk_work;
mod gap;
mod holes;
mod origin;
mod plan;
mod removed;
mod resume;
mod server;
mod start;
mod state;
mod stream;
mod upload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::clock::Clock;
use crate::codec::Compression;
use crate::disk::{self, Owner};
use crate::memory;
use crate::pg::{Lsn, WalSegmentSize};
use crate::replication::{ConnectOptions, Error as SessionError, ReplicationConnection, Started};
use crate::repo::ClusterId;
use crate::wal::Error;
use crate::wal::spool::Position;

use disk_work::on_disk;
use plan::{PieceRule, SlotStep, Unfit, plan_least_report, plan_slot, plan_start, segment_start};
use resume::Resume;
use server::{Candidate, Choice, Wanted, choose, restart_of, slot_facts, unfit_error};
use start::{Begun, begin};
use state::{Shared, clear, keep_written, note, put_all, warn_of, with_hint};
use stream::{StreamEnd, Streaming};
use upload::{Stop, Uploader};

pub use gap::Gap;
pub use state::{Problem, ReceiveState, STATE_FILE, read_state};
pub use upload::OpenRepository;

/// When the server is told that WAL is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Acknowledge {
    /// Once it is synced in the spool of this host.
    #[default]
    Spool,
    /// Once it is in the store.
    Store,
}

/// What is received, for whom.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// The servers, in the order in which they are asked; each with the application_name to be known by.
    pub nodes: Vec<ConnectOptions>,
    /// The data directory, where it is on this host: a clone's is refused.
    pub data_directory: Option<PathBuf>,
    /// The physical replication slot.
    pub slot: String,
    /// When the server is told that WAL is durable.
    pub acknowledge: Acknowledge,
    /// The site's spool folder.
    pub spool: PathBuf,
    /// To whom what is created there belongs.
    pub owner: Option<Owner>,
    /// Below so many free bytes on the spool's volume receiving pauses, and goes on at half as many again.
    pub free_bytes_min: u64,
    /// How WAL is compressed.
    pub compression: Compression,
}

/// Leaves room for the server's own WAL, should it share the volume, and for whoever cleans up.
pub const FREE_BYTES_MIN: u64 = 512 << 20;
/// A commit is in the store some seconds later at the latest, and an hour of light load makes 1800 small objects.
const PIECE_INTERVAL: Duration = Duration::from_secs(2);
/// Under load a segment of 16 MiB is whole before this matters much; larger ones are not left waiting.
const PIECE_BYTES: u32 = 8 << 20;
/// Pauses between attempts to reach a server.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A standby is received from for so long before it is looked again for the primary, where there are several servers.
const STANDBY_PERIOD: Duration = Duration::from_secs(30);
/// How long the storing half may go on after we are told to stop; what is left waits for the next start.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// The same where the servers are of another cluster now: nothing is received of that before the spool is empty, and a
/// slow store has to come to the end of a segment at least. Whoever is told to stop meanwhile does not wait for it.
const EMPTYING_TIMEOUT: Duration = Duration::from_secs(30);
/// Long enough that a load of single commits does not have its memory taken between them.
const IDLE_LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Where the spools of all sites are, below the state folder.
const SPOOL_FOLDER: &str = "spool";

/// Returns the spool folder of a site.
pub fn spool_of(state: &Path, site: &str) -> PathBuf {
    state.join(SPOOL_FOLDER).join(site)
}

/// Receives until `stop` says so.
///
/// # Errors
/// What no later attempt mends: the archive contradicts what is received, the site is another cluster's, or another
/// process receives for it.
pub async fn run(
    options: ReceiveOptions,
    open: OpenRepository,
    clock: Arc<dyn Clock>,
    stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    memory::map_large_things();
    let mut told = stop.clone();
    let begun = tokio::select! {
        begun = begin(&options, &clock) => begun?,
        () = told_to(&mut told) => return Ok(()),
    };
    let Begun { shared, cluster, lock: _lock } = begun;
    if let Some(hole) = shared.hole() {
        tracing::error!(
            "WAL from {} to {} is missing in the spool: it is asked for again",
            hole.from.lsn,
            hole.to
        );
    }
    // The storing half stops after the receiving one, so that what came last is stored as well.
    let stop_storing = watch::Sender::new(Stop::No);
    let uploader = Uploader {
        shared: shared.clone(),
        cluster,
        open,
        clock: clock.clone(),
        compression: options.compression,
        rule: PieceRule {
            interval: PIECE_INTERVAL,
            bytes: PIECE_BYTES,
            at_once: options.acknowledge == Acknowledge::Store,
        },
        stop: stop_storing.subscribe(),
    };
    let mut uploading = tokio::spawn(uploader.run());
    let receiver = Receiver {
        options: &options,
        cluster,
        shared: &shared,
        clock: &clock,
        stop,
        here: shared.spool.end(),
        resume: None,
        refused_slot: None,
        removed: Vec::new(),
        waiting_since: None,
    };
    let outcome = tokio::select! {
        received = receiver.run() => {
            let (stop, patience) = plan_end(&received);
            stop_storing.send_replace(stop);
            let uploaded = tokio::time::timeout(patience, &mut uploading).await;
            received.and(uploaded.map_or(Ok(()), finished))
        }
        uploaded = &mut uploading => finished(uploaded),
        never = keep_written(&options.spool, options.owner, &shared, &*clock) => never,
        never = give_memory_back(&shared) => never,
    };
    uploading.abort();
    {
        let mut state = shared.state();
        state.streaming = false;
        if let Err(error) = &outcome {
            state.receive_problem = Some(Problem::of_end(error, clock.now()));
        }
    }
    warn_of(put_all(&shared, &options.spool, options.owner, clock.now()).await);
    outcome
}

/// Decides what the storing half is told when receiving has ended, and for how long it is waited for.
fn plan_end(received: &Result<(), Error>) -> (Stop, Duration) {
    match received {
        Err(Error::OtherCluster { .. }) => (Stop::Emptied, EMPTYING_TIMEOUT),
        _ => (Stop::Soon, STOP_TIMEOUT),
    }
}

/// Resolves when it is time to stop.
async fn told_to(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn finished(uploaded: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    uploaded.map_err(|error| crate::repo::Error::Internal(error.to_string()))?
}

/// Gives memory back to the machine whenever nothing has come or gone for a while; never returns.
async fn give_memory_back(shared: &Shared) -> Result<(), Error> {
    let (mut before, mut given) = (None, None);
    loop {
        tokio::time::sleep(IDLE_LOOK_INTERVAL).await;
        let now = Some((shared.spool.end(), *shared.durable.borrow()));
        if now == before && now != given {
            let _ = tokio::task::spawn_blocking(memory::give_back).await;
            given = now;
        }
        before = now;
    }
}

/// A server that is about to be received from.
struct Prepared {
    candidate: Candidate,
    start: Position,
    /// Whether our slot is there.
    slot: bool,
    /// The server hears of nothing before this.
    kept_from: Lsn,
    /// Where what is missing within the spool ends, if that is what is wanted.
    until: Option<Lsn>,
}

struct Receiver<'a> {
    options: &'a ReceiveOptions,
    cluster: ClusterId,
    shared: &'a Arc<Shared>,
    clock: &'a Arc<dyn Clock>,
    stop: watch::Receiver<bool>,
    /// Where what was received ends.
    here: Option<Position>,
    /// What the archive lacks, where the spool held nothing.
    resume: Option<Resume>,
    /// The server, by address, that would not stream from our slot.
    refused_slot: Option<String>,
    /// The servers, by address, that have removed what follows.
    removed: Vec<String>,
    /// Since when one is waited for that may have kept what the others have removed.
    waiting_since: Option<Instant>,
}

impl Receiver<'_> {
    async fn run(mut self) -> Result<(), Error> {
        let mut pause = PAUSE_FIRST;
        let mut stop = self.stop.clone();
        while !*stop.borrow() {
            let hole = self.shared.hole();
            let attempt = self.attempt().await;
            let before = self.here;
            self.here = self.here.max(self.shared.spool.end());
            if self.here != before || self.shared.hole() != hole {
                pause = PAUSE_FIRST;
                self.removed.clear();
                (self.resume, self.waiting_since) = (None, None);
            }
            self.shared.state().streaming = false;
            let error = match attempt {
                Ok(()) => continue,
                Err(error) if is_hopeless(&error) => {
                    if matches!(error, Error::OtherCluster { .. }) {
                        self.give_up_all_spooled().await;
                    }
                    return Err(error);
                }
                Err(error) => error,
            };
            if let Error::SetBack { timeline, flushed, here, .. } = error {
                self.tell_set_back(Position { timeline, lsn: flushed }, here).await;
            }
            note(
                &mut self.shared.state().receive_problem,
                format!("receiving stopped: {}", with_hint(&error)),
                self.clock.now(),
            );
            tokio::select! {
                _ = tokio::time::sleep(pause) => {}
                _ = stop.changed() => {}
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(())
    }

    /// Chooses a server and receives from it until the stream ends.
    async fn attempt(&mut self) -> Result<(), Error> {
        let mut stop = self.stop.clone();
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared?,
            () = told_to(&mut stop) => return Ok(()),
        };
        let Some(Prepared { candidate, start, slot, kept_from, until }) = prepared else { return Ok(()) };
        let standby = candidate.facts.standby && self.options.nodes.len() > 1;
        let address = candidate.connection.address().to_owned();
        let slot = slot.then_some(self.options.slot.as_str());
        let started = tokio::select! {
            started = candidate.connection.start_streaming(slot, start.lsn, start.timeline) => started,
            () = told_to(&mut stop) => return Ok(()),
        };
        let stream = match started {
            Ok(Started::Streaming(stream)) => stream,
            Ok(Started::Ended(..)) if until.is_some() => {
                self.removed.push(address);
                return Ok(());
            }
            Ok(Started::Ended(_, next)) => return self.end_timeline(start, next.switch),
            Err(error) => {
                if slot.is_some() && is_slot_refused(&error) {
                    self.refused_slot = Some(address);
                }
                return Err(error.into());
            }
        };
        let Position { timeline, lsn } = start;
        tracing::info!("receiving timeline {timeline} from {lsn} on, from {address}");
        {
            let mut state = self.shared.state();
            clear(&mut state.receive_problem, "WAL is received again");
            (state.streaming, state.server, state.timeline) = (true, Some(address.clone()), Some(timeline));
        }
        let streaming = Streaming {
            shared: self.shared,
            clock: self.clock,
            acknowledge: self.options.acknowledge,
            kept_from,
            free_bytes_min: self.options.free_bytes_min,
            stop: self.stop.clone(),
            until,
            look_again: standby.then(|| self.clock.monotonic() + STANDBY_PERIOD),
        };
        match streaming.run(stream, start).await {
            // A hole that reaches beyond the end of its timeline there is not filled any further.
            Ok(StreamEnd::Timeline(_)) if until.is_some() => Ok(()),
            Ok(StreamEnd::Timeline(next)) => {
                let end = self.shared.spool.end().filter(|end| end.timeline == timeline).unwrap_or(start);
                self.end_timeline(end, next.switch)
            }
            Ok(StreamEnd::Filled | StreamEnd::Stopped | StreamEnd::LookAgain) => Ok(()),
            Err(Error::Session(error)) if is_removed(&error) => {
                // Another server may have kept it.
                self.removed.push(address);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Chooses a server, keeps its history files and sees to the slot; nothing where a gap has to be jumped over first.
    async fn prepare(&mut self) -> Result<Option<Prepared>, Error> {
        let (cluster, shared) = (Some(self.cluster), Some(&**self.shared));
        let wanted = Wanted { cluster, here: self.here, removed: &self.removed, shared };
        let choice = choose(&self.options.nodes, &wanted).await?;
        let mut candidate = match (choice, self.wanted()) {
            (Choice::Removed { candidate, oldest, unheard }, Some(here)) => {
                self.meet_removal(candidate, here, oldest, unheard).await?;
                return Ok(None);
            }
            (Choice::Untold(mut candidate, error), _) => {
                // Whoever brings the file may take a night: nothing is to be removed meanwhile.
                self.see_to_slot(&mut candidate).await?;
                return Err(error);
            }
            (Choice::Server(candidate) | Choice::Removed { candidate, .. }, _) => candidate,
        };
        let (shared, histories) = (self.shared.clone(), std::mem::take(&mut candidate.histories));
        on_disk(move || {
            histories.iter().try_for_each(|(timeline, content)| shared.spool.put_history(*timeline, content))
        })
        .await?;
        self.shared.spooled.notify_one();
        // First of all: the server is to remove nothing while the store is waited for.
        let (slot, restart) = self.see_to_slot(&mut candidate).await?;
        if self.here.is_none() {
            self.look_into_archive(&candidate, restart).await?;
        }
        let hole = self.shared.hole();
        let wanted = hole.map(|hole| hole.from).or(self.here);
        let start = plan_start(&candidate.facts, wanted, restart);
        if let Some(hole) = hole.filter(|hole| start != Ok(hole.from)) {
            if let Err(unfit @ Unfit::NoHistory { .. }) = start {
                // It may have what is missing, once it can tell.
                let unheard = unfit_error(&candidate, unfit).to_string();
                self.meet_removal(candidate, hole.from, None, Some(unheard)).await?;
            } else {
                // What is missing is not on its way.
                self.removed.push(candidate.connection.address().to_owned());
            }
            return Ok(None);
        }
        let start = start.map_err(|unfit| unfit_error(&candidate, unfit))?;
        // A clean slate begins where a segment begins; the spool continues what it has.
        let continued = hole.is_some() || self.shared.spool.end() == Some(start);
        let lsn = if continued { start.lsn } else { segment_start(start.lsn, self.size()) };
        let start = Position { lsn, ..start };
        let kept_from = plan_least_report(restart.filter(|_| slot), candidate.facts.identity.flushed);
        Ok(Some(Prepared { candidate, start, slot, kept_from, until: hole.map(|hole| hole.to) }))
    }

    fn size(&self) -> WalSegmentSize {
        self.cluster.segment_size
    }

    /// Creates the slot, replaces one that was lost, or checks it; returns whether it is there, and what it keeps.
    ///
    /// None is created on a standby: it would keep WAL there for good once the primary is received from again.
    async fn see_to_slot(&mut self, candidate: &mut Candidate) -> Result<(bool, Option<Lsn>), Error> {
        let name = &self.options.slot;
        let standby = candidate.facts.standby;
        let facts = match slot_facts(candidate, name).await {
            Ok(facts) => facts,
            Err(error) => {
                tracing::debug!("the slot is not looked at: {error}");
                if !standby {
                    create_if_missing(&mut candidate.connection, name).await?;
                }
                return Ok((!standby, None));
            }
        };
        let is_refused = self.refused_slot.as_deref() == Some(candidate.connection.address());
        match plan_slot(facts.as_ref(), is_refused) {
            SlotStep::Use => return Ok((true, facts.and_then(|slot| slot.restart))),
            SlotStep::Refuse(why) => {
                return Err(Error::Slot { slot: name.clone(), detail: why });
            }
            SlotStep::Create | SlotStep::Replace if standby => return Ok((false, None)),
            SlotStep::Create => candidate.connection.create_slot(name).await?,
            SlotStep::Replace => {
                tracing::error!(
                    "slot \"{name}\" was lost: the server may have removed WAL that was not received"
                );
                candidate.connection.drop_slot(name).await?;
                candidate.connection.create_slot(name).await?;
                self.refused_slot = None;
            }
        }
        Ok((true, restart_of(candidate, name).await))
    }

    /// Takes note that a timeline was received to its end.
    fn end_timeline(&mut self, end: Position, switch: Lsn) -> Result<(), Error> {
        if end.lsn != switch {
            let detail = format!("timeline {} ended at {switch}, received up to {}", end.timeline, end.lsn);
            return Err(SessionError::Unexpected { detail }.into());
        }
        tracing::info!("timeline {} ended at {switch}", end.timeline);
        self.here = Some(end);
        // Who had removed what came before may have all of the next timeline.
        self.removed.clear();
        (self.resume, self.waiting_since) = (None, None);
        self.shared.spooled.notify_one();
        Ok(())
    }
}

async fn create_if_missing(connection: &mut ReplicationConnection, slot: &str) -> Result<(), SessionError> {
    match connection.create_slot(slot).await {
        // duplicate_object: it is there.
        Err(error) if error.sqlstate() == Some("42710") => Ok(()),
        other => other,
    }
}

/// undefined_file: the segment that was asked for is gone.
fn is_removed(error: &SessionError) -> bool {
    error.sqlstate() == Some("58P01")
}

/// object_not_in_prerequisite_state: from PostgreSQL 18 on that is said of a physical slot that was lost; of a logical one
/// always.
fn is_slot_refused(error: &SessionError) -> bool {
    error.sqlstate() == Some("55000")
}

/// Tells what no later attempt mends. A spool that has lost what it held knows what is left when it is opened again.
fn is_hopeless(error: &Error) -> bool {
    matches!(
        error,
        Error::OtherCluster { .. }
            | Error::Clone { .. }
            | Error::Session(SessionError::Settings { .. })
            | Error::Disk(disk::Error::Malformed { .. })
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_cluster_wrote_that_is_gone_is_stored_with_more_patience() {
        let cluster = |text: &str| text.parse().unwrap();
        let foreign = Error::OtherCluster { expected: cluster("1-16"), found: cluster("2-16") };
        assert_eq!(plan_end(&Err(foreign)), (Stop::Emptied, EMPTYING_TIMEOUT));
        let other = Error::Missing { name: "WAL".into() };
        for received in [Ok(()), Err(other)] {
            assert_eq!(plan_end(&received), (Stop::Soon, STOP_TIMEOUT));
        }
    }
}
