//! The receiving half while a stream is open: server → memory → spool → feedback.
//!
//! One batch is written and synced while the next comes in, so that commits share a sync as they do in the server. The
//! server hears a position as flushed when the spool has it durably, or the store where `ack = "store"`, never
//! earlier. What waits in memory is bounded; behind that the server waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::disk::Space;
use crate::pg::{Lsn, TimelineId};
use crate::replication::{
    Error as SessionError, NextTimeline, StandbyStatus, Streamed, WalMessage, WalStream,
};
use crate::wal::Error;
use crate::wal::receive::plan::plan_pause;
use crate::wal::receive::state::Shared;
use crate::wal::receive::{Acknowledge, told_to};
use crate::wal::spool::Position;

/// WAL in memory that is not being written yet.
const PENDING_BYTES_MAX: usize = 4 << 20;
/// The server is told our position at least so often; it gives up on us after wal_sender_timeout, a minute.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// While nothing is read of the stream, its questions are not heard: the server is told before it asks, however short its
/// wal_sender_timeout may reasonably be.
const STATUS_INTERVAL_UNHEARD: Duration = Duration::from_secs(1);
/// A server that has said nothing for so long is asked, and given up after twice as long (failure 39).
const SILENCE_ASKED: Duration = Duration::from_secs(30);
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A server that hangs may not even take a report any more.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often free space and silence are looked at.
const TICK: Duration = Duration::from_secs(1);

/// How a stream ended, apart from errors.
#[derive(Debug)]
pub(super) enum StreamEnd {
    /// All that was wanted is spooled.
    Filled,
    /// The timeline ended, all of it is spooled.
    Timeline(NextTimeline),
    /// We were told to stop; all that came is spooled.
    Stopped,
    /// It is time to look whether a better server is there.
    LookAgain,
}

/// What a stream needs.
pub(super) struct Streaming<'a> {
    pub shared: &'a Arc<Shared>,
    pub clock: &'a Arc<dyn Clock>,
    pub acknowledge: Acknowledge,
    /// The server hears of nothing before this: what the slot keeps begins there.
    pub kept_from: Lsn,
    pub free_bytes_min: u64,
    pub stop: watch::Receiver<bool>,
    /// Up to where WAL is wanted, if not for good.
    pub until: Option<Lsn>,
    /// When to end to look for a better server.
    pub look_again: Option<Instant>,
}

struct Buffers {
    timeline: TimelineId,
    received: Lsn,
    spooled: Lsn,
    pending: Vec<u8>,
    writing: Option<JoinHandle<Result<Position, Error>>>,
    paused: bool,
    /// Whether the stream is read at the moment: there is room for what it brings.
    heeds: bool,
    /// How much room the spool's volume has, while that is being asked.
    asking: Option<JoinHandle<Result<u64, Error>>>,
    heard: Instant,
    asked: bool,
    told: Instant,
    reported: Lsn,
}

impl Streaming<'_> {
    /// Receives until the timeline ends, the stream fails or we are told to stop.
    pub async fn run(mut self, mut stream: WalStream, start: Position) -> Result<StreamEnd, Error> {
        let now = self.clock.monotonic();
        let mut buffers = Buffers {
            timeline: start.timeline,
            received: start.lsn,
            spooled: start.lsn,
            pending: Vec::new(),
            writing: None,
            paused: self.shared.state().paused,
            heeds: true,
            asking: None,
            heard: now,
            asked: false,
            told: now,
            reported: Lsn::ZERO,
        };
        let result = self.receive(&mut stream, &mut buffers).await;
        // Whatever ended it, what came is kept: the server may never be able to send it again.
        self.drain(&mut buffers).await?;
        if matches!(result, Ok(StreamEnd::Filled | StreamEnd::Stopped | StreamEnd::LookAgain)) {
            // The server waits for this before it shuts down, and a slot for what it may remove.
            let farewell = self.report(&mut stream, &mut buffers, false);
            let _ = tokio::time::timeout(FAREWELL, farewell).await;
        }
        result
    }

    async fn receive(&mut self, stream: &mut WalStream, buffers: &mut Buffers) -> Result<StreamEnd, Error> {
        let mut durable = self.shared.durable.subscribe();
        let mut stop = self.stop.clone();
        let mut tick = tokio::time::interval(TICK);
        self.report(stream, buffers, true).await?;
        loop {
            self.write_pending(buffers);
            buffers.heeds = !buffers.paused && buffers.pending.len() < PENDING_BYTES_MAX;
            tokio::select! {
                biased;
                () = told_to(&mut stop) => return Ok(StreamEnd::Stopped),
                // Before the stream, which may always have something.
                _ = tick.tick() => {
                    if self.look_again.is_some_and(|at| self.clock.monotonic() >= at) {
                        return Ok(StreamEnd::LookAgain);
                    }
                    self.look_around(stream, buffers).await?;
                }
                written = async { buffers.writing.as_mut().expect("the branch has a guard").await },
                    if buffers.writing.is_some() =>
                {
                    buffers.writing = None;
                    buffers.spooled = joined(written)?.lsn;
                    self.shared.spooled.notify_one();
                    self.report_progress(stream, buffers).await?;
                }
                free = async { buffers.asking.as_mut().expect("the branch has a guard").await },
                    if buffers.asking.is_some() =>
                {
                    buffers.asking = None;
                    self.heed_room(buffers, joined(free)?);
                }
                Ok(()) = durable.changed(), if self.acknowledge == Acknowledge::Store => {
                    self.report_progress(stream, buffers).await?;
                }
                streamed = stream.next(), if buffers.heeds => {
                    (buffers.heard, buffers.asked) = (self.clock.monotonic(), false);
                    match streamed? {
                        Streamed::Ended(next) => return Ok(StreamEnd::Timeline(next)),
                        Streamed::Message(message) => self.take(stream, buffers, message).await?,
                    }
                    if self.until.is_some_and(|until| buffers.received >= until) {
                        return Ok(StreamEnd::Filled);
                    }
                }
            }
        }
    }

    async fn take(
        &self,
        stream: &mut WalStream,
        buffers: &mut Buffers,
        message: WalMessage,
    ) -> Result<(), Error> {
        match message {
            WalMessage::Wal { start, bytes, .. } if start == buffers.received => {
                let wanted = self.until.map_or(usize::MAX, |until| until.0.saturating_sub(start.0) as usize);
                let bytes = &bytes[..bytes.len().min(wanted)];
                buffers.pending.extend_from_slice(bytes);
                buffers.received = buffers.received + bytes.len() as u64;
                Ok(())
            }
            WalMessage::Wal { start, .. } => {
                let detail = format!("WAL at {start}, where {} follows", buffers.received);
                Err(SessionError::Unexpected { detail }.into())
            }
            WalMessage::Keepalive { reply: true, .. } => self.report(stream, buffers, false).await,
            WalMessage::Keepalive { .. } => Ok(()),
        }
    }

    /// Starts writing what came, where nothing is being written.
    fn write_pending(&self, buffers: &mut Buffers) {
        if buffers.writing.is_some() || buffers.pending.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut buffers.pending);
        // Not where the spool ends: where a write failed these bytes do not follow it, and the spool refuses them.
        let lsn = Lsn(buffers.received.0 - bytes.len() as u64);
        let at = Position { timeline: buffers.timeline, lsn };
        let shared = self.shared.clone();
        buffers.writing = Some(tokio::task::spawn_blocking(move || shared.spool.append(at, &bytes)));
    }

    async fn drain(&self, buffers: &mut Buffers) -> Result<(), Error> {
        loop {
            if let Some(writing) = buffers.writing.take() {
                buffers.spooled = joined(writing.await)?.lsn;
                self.shared.spooled.notify_one();
            }
            if buffers.pending.is_empty() {
                return Ok(());
            }
            self.write_pending(buffers);
        }
    }

    /// Returns what may be called flushed; zero where nothing of this timeline may.
    fn flushed(&self, buffers: &Buffers) -> Lsn {
        let flushed = match self.acknowledge {
            Acknowledge::Spool => buffers.spooled,
            Acknowledge::Store => {
                let durable = self.shared.durable.borrow().filter(|at| at.timeline == buffers.timeline);
                durable.map_or(Lsn::ZERO, |at| at.lsn.min(buffers.spooled))
            }
        };
        // Where WAL is received again, our word of where we are would set the slot back to what may be gone already: it
        // would be lost then, with what it keeps.
        if flushed < self.kept_from { Lsn::ZERO } else { flushed }
    }

    async fn report_progress(&self, stream: &mut WalStream, buffers: &mut Buffers) -> Result<(), Error> {
        if self.flushed(buffers) == buffers.reported {
            return Ok(());
        }
        self.report(stream, buffers, false).await
    }

    async fn report(&self, stream: &mut WalStream, buffers: &mut Buffers, reply: bool) -> Result<(), Error> {
        let flushed = self.flushed(buffers);
        // Written is what `synchronous_commit = remote_write` waits for: no less than durable here, too.
        let status = StandbyStatus { written: flushed, flushed, reply };
        stream.report(status, self.clock.now()).await?;
        (buffers.told, buffers.reported) = (self.clock.monotonic(), flushed);
        Ok(())
    }

    /// Looks at the clock once a second, and has the volume looked at.
    async fn look_around(&self, stream: &mut WalStream, buffers: &mut Buffers) -> Result<(), Error> {
        let now = self.clock.monotonic();
        // Not waited for here: where the volume hangs the server would give us up meanwhile.
        let shared = self.shared.clone();
        buffers.asking.get_or_insert_with(|| {
            tokio::task::spawn_blocking(move || Ok(Space::at(shared.spool.folder())?.free_bytes))
        });
        if !buffers.heeds {
            // It cannot be heard.
            (buffers.heard, buffers.asked) = (now, false);
        }
        let silent = now.saturating_duration_since(buffers.heard);
        if silent >= SILENCE_MAX {
            let detail = format!("the server has been silent for {} s", silent.as_secs());
            return Err(SessionError::Lost { detail }.into());
        }
        let ask = silent >= SILENCE_ASKED && !buffers.asked;
        let interval = if buffers.heeds { STATUS_INTERVAL } else { STATUS_INTERVAL_UNHEARD };
        if ask || now.saturating_duration_since(buffers.told) >= interval {
            buffers.asked |= ask;
            self.report(stream, buffers, ask).await?;
        }
        Ok(())
    }

    /// Pauses or goes on by the room there is.
    fn heed_room(&self, buffers: &mut Buffers, free_bytes: u64) {
        let paused = plan_pause(buffers.paused, free_bytes, self.free_bytes_min);
        if paused == buffers.paused {
            return;
        }
        let free = free_bytes >> 20;
        match paused {
            true => tracing::error!("receiving pauses: {free} MiB are left on the spool's volume"),
            false => tracing::warn!("receiving goes on: {free} MiB are left on the spool's volume"),
        }
        buffers.paused = paused;
        self.shared.state().paused = paused;
    }
}

fn joined<T>(done: Result<Result<T, Error>, tokio::task::JoinError>) -> Result<T, Error> {
    done.map_err(|error| crate::repo::Error::Internal(error.to_string()))?
}
