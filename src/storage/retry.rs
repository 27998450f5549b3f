//! Trying again, until a deadline, what may succeed a moment later.
//!
//! Only `Unreachable` and `OutcomeUnknown` are tried again, after pauses that double up to a bound and are
//! spread by chance, and longer where the store asks for it. Every attempt is cut off at the deadline, so
//! that nothing waits for ever for a store that does not answer (failure 39). The deadline is the option's
//! plus the time the call's bytes may take on a slow line; attempts that carried nothing get none of that.
//!
//! A create whose answer was lost is repeated with the same bytes. If the key is then taken, the object is
//! read back: our bytes mean success, others a conflict (failure 43). Taken at the first attempt is always
//! a conflict.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use crate::clock::Clock;

use super::error::{Error, Verb};
use super::jitter::Jitter;
use super::key::ObjectKey;
use super::store::{Folder, ObjectMeta, Store, folder_name};

/// The slowest line that is still waited for.
pub const BYTES_PER_SECOND_MIN: u64 = 64 * 1024;

/// The most bytes a call is given time for: no object of the format is much larger.
const BYTES_TIMED_MAX: u64 = 64 * 1024 * 1024;

/// The longest pause taken because the store asks for it; it may name hours.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// What a listed key counts as, in bytes, when the time of a listing is reckoned.
const BYTES_PER_KEY: u64 = 1024;

/// How long and how often to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryOptions {
    /// From the first attempt on, after which no other begins and the running one is given up.
    pub deadline: Duration,
    /// Bounds the attempts where the store fails faster than the deadline comes.
    pub attempts_max: u32,
    /// The first pause, before it is spread.
    pub pause_first: Duration,
    /// The longest pause.
    pub pause_max: Duration,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(120),
            attempts_max: 24,
            pause_first: Duration::from_millis(100),
            pause_max: Duration::from_secs(10),
        }
    }
}

impl RetryOptions {
    /// Tries for so long, and as often as that takes.
    pub fn within(deadline: Duration) -> Self {
        let default = Self::default();
        let pauses = u64::max(1, default.pause_max.as_secs() / 2);
        let attempts = u32::try_from(deadline.as_secs() / pauses).unwrap_or(u32::MAX);
        Self { deadline, attempts_max: default.attempts_max.max(attempts), ..default }
    }

    /// Returns the pause after so many attempts: doubled each time up to the longest, and at least half of
    /// that.
    fn pause(&self, attempts: u32, fraction: f64) -> Duration {
        let doubled = self.pause_first.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        doubled.min(self.pause_max).mul_f64(0.5 + fraction / 2.0)
    }
}

/// A store that tries again.
#[derive(Debug)]
pub struct Retrying<S> {
    inner: S,
    options: RetryOptions,
    clock: Arc<dyn Clock>,
    jitter: Jitter,
}

impl<S: Store> Retrying<S> {
    /// Tries calls to `inner` again; `seed` spreads the pauses and should differ between processes.
    pub fn new(inner: S, options: RetryOptions, clock: Arc<dyn Clock>, seed: u64) -> Self {
        Self { inner, options, clock, jitter: Jitter::seeded(seed) }
    }

    fn begin<'a>(&'a self, verb: Verb, key: &'a str, bytes: u64) -> Round<'a> {
        let transfer = Duration::from_secs(bytes.min(BYTES_TIMED_MAX) / BYTES_PER_SECOND_MIN);
        let deadline = self.clock.monotonic() + self.options.deadline + transfer;
        Round {
            options: self.options,
            clock: &*self.clock,
            jitter: &self.jitter,
            verb,
            key,
            deadline,
            transfer,
            carried: Duration::ZERO,
            attempts: 0,
        }
    }

    async fn retry<T, F, C>(&self, verb: Verb, key: &str, bytes: u64, call: C) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
        C: Fn() -> F,
    {
        let mut round = self.begin(verb, key, bytes);
        loop {
            match round.attempt(call()).await {
                Err(error) if error.is_retryable() => round.pause(error).await?,
                outcome => return outcome,
            }
        }
    }

    /// Compares what stands under a taken key with what an attempt of ours may have put there.
    async fn read_back(&self, round: &mut Round<'_>, key: &ObjectKey, body: &Bytes) -> Result<bool, Error> {
        match round.attempt(self.inner.get(key, body.len() as u64)).await {
            Ok(found) => Ok(found == *body),
            Err(Error::TooLarge { .. }) => Ok(false),
            // Taken and yet absent: another create of it is still under way, or it was deleted since.
            Err(error) => Err(Error::OutcomeUnknown { key: key.to_string(), source: Some(Arc::new(error)) }),
        }
    }
}

/// One call, from its first attempt to its outcome.
struct Round<'a> {
    options: RetryOptions,
    clock: &'a dyn Clock,
    jitter: &'a Jitter,
    verb: Verb,
    key: &'a str,
    /// When the running attempt is given up.
    deadline: Instant,
    /// The part of the deadline that is for the call's bytes.
    transfer: Duration,
    /// How long attempts have taken that may have carried some of them.
    carried: Duration,
    attempts: u32,
}

impl Round<'_> {
    fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(self.clock.monotonic())
    }

    /// Says how long another attempt may begin: the time for bytes counts as far as it was used for them, or a store
    /// that is silent would be asked for as long as the largest listing may take.
    fn remaining_to_begin(&self) -> Duration {
        self.remaining().saturating_sub(self.transfer.saturating_sub(self.carried))
    }

    /// Runs one attempt until the deadline; a create cut off there may have happened.
    async fn attempt<T>(&mut self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let begun = self.clock.monotonic();
        let outcome = self.cut_off(call).await;
        if outcome.as_ref().err().is_some_and(|error| !error.carried_nothing()) {
            self.carried += self.clock.monotonic().saturating_duration_since(begun);
        }
        outcome
    }

    async fn cut_off<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match tokio::time::timeout(self.remaining(), call).await {
            Ok(outcome) => outcome,
            Err(_) if self.verb == Verb::Create => {
                Err(Error::OutcomeUnknown { key: self.key.to_owned(), source: None })
            }
            Err(_) => Err(self.given_up(None)),
        }
    }

    /// Waits before the next attempt, or returns the error to give up with.
    async fn pause(&mut self, error: Error) -> Result<(), Error> {
        self.attempts += 1;
        let asked = error.retry_after().unwrap_or_default().min(RETRY_AFTER_MAX);
        let pause = self.options.pause(self.attempts, self.jitter.fraction()).max(asked);
        if self.attempts >= self.options.attempts_max || pause >= self.remaining_to_begin() {
            return Err(match error {
                Error::Unreachable { source, .. } => self.given_up(source),
                error => error,
            });
        }
        tracing::warn!(
            verb = %self.verb, key = self.key, attempt = self.attempts, error = %describe(&error),
            pause_ms = pause.as_millis() as u64, "trying again"
        );
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn given_up(&self, source: Option<super::error::Source>) -> Error {
        let reason = match self.attempts {
            0 | 1 => "given up after the first attempt".to_owned(),
            attempts => format!("given up after {attempts} attempts"),
        };
        Error::Unreachable { verb: self.verb, key: self.key.to_owned(), reason: Some(reason), source }
    }
}

/// Joins an error and its sources, for a log line that is the only trace of an attempt.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[async_trait]
impl<S: Store> Store for Retrying<S> {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let mut round = self.begin(Verb::Create, key.as_str(), body.len() as u64);
        let mut sent = false;
        loop {
            let outcome = match round.attempt(self.inner.create(key, body.clone())).await {
                Err(Error::AlreadyExists { key: taken }) if sent => {
                    match self.read_back(&mut round, key, &body).await {
                        Ok(true) => Ok(()),
                        Ok(false) => Err(Error::AlreadyExists { key: taken }),
                        Err(error) => Err(error),
                    }
                }
                outcome => outcome,
            };
            let error = match outcome {
                Ok(()) => return Ok(()),
                Err(error @ Error::AlreadyExists { .. }) => return Err(error),
                Err(error) => error,
            };
            sent |= matches!(error, Error::OutcomeUnknown { .. });
            if error.is_retryable() {
                round.pause(error).await.map_err(|error| unless_certain(sent, key, error))?;
            } else {
                return Err(unless_certain(sent, key, error));
            }
        }
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        self.retry(Verb::Get, key.as_str(), size_max, || self.inner.get(key, size_max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        let length = range.end.saturating_sub(range.start);
        self.retry(Verb::GetRange, key.as_str(), length, || self.inner.get_range(key, range.clone())).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        self.retry(Verb::Head, key.as_str(), 0, || self.inner.head(key)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let bytes = (limit as u64).saturating_mul(BYTES_PER_KEY);
        self.retry(Verb::List, folder_name(prefix), bytes, || self.inner.list(prefix, after, limit)).await
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        self.retry(Verb::ListFolder, folder_name(prefix), BYTES_TIMED_MAX, || self.inner.list_folder(prefix))
            .await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        self.retry(Verb::Delete, key.as_str(), 0, || self.inner.delete(key)).await
    }
}

/// Keeps an error from claiming that nothing was created when an earlier attempt may have.
fn unless_certain(sent: bool, key: &ObjectKey, error: Error) -> Error {
    match error {
        error @ Error::OutcomeUnknown { .. } => error,
        error if sent => Error::OutcomeUnknown { key: key.to_string(), source: Some(Arc::new(error)) },
        error => error,
    }
}

#[cfg(test)]
mod tests;
