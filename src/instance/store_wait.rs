//! Waits for the store after a recovery that ended without it.
//!
//! Reads of a clone wait for the store while there is recovery to lose, so this is for what does not wait: a command
//! that was killed while it waited, a file of the archive that nobody could vouch for. Whether the store is the cause
//! is asked of the store: what it answers to is another failure. Requests are answered all the while.

use std::pin::Pin;
use std::time::Duration;

use crate::control::{CloneState, CloneStatus, Listener, Pending, Reply, Request};
use crate::instance::clone_folder::{CloneSpec, LastState};
use crate::instance::supervise::{SuperviseError, SuperviseOptions, resting_status};
use crate::repo::{Basebackup, BasebackupId, ErrorKind, Repository};

/// What came of waiting.
#[derive(Debug)]
pub(super) enum Waited {
    /// The store answered at once: it was not the cause.
    ItWasThere,
    /// It did not, and does now.
    ItIsBack,
    /// It does not, for longer than anybody waits.
    TooLong,
    /// The clone is to stop, by a request or by a signal.
    Stopped(Option<Pending>),
}

/// The pause after the first look; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// The longest pause: a store that is back is noticed this fast.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Somebody who looks after a store looks within hours; a clone that still waits a day later is forgotten.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Looks whether the store answers, and waits until it does; `error` is what the server ended of.
pub(super) async fn wait<T: Future<Output = ()>>(
    options: &SuperviseOptions,
    spec: &CloneSpec,
    listener: &Listener,
    mut terminated: Pin<&mut T>,
    error: &SuperviseError,
) -> Waited {
    let message = format!("recovery starts again when the store answers: {error}");
    let mut look = std::pin::pin!(until_it_answers(&options.repository, spec.basebackup, &message));
    loop {
        tokio::select! {
            waited = look.as_mut() => return waited,
            pending = listener.next() => match pending.request {
                Request::Stop => return Waited::Stopped(Some(pending)),
                Request::Status => {
                    let last = LastState {
                        message: Some(message.clone()),
                        ..LastState::sound(CloneState::Recovering)
                    };
                    let status = CloneStatus {
                        supervisor_pid: Some(std::process::id()),
                        ..resting_status(&options.folder, spec, &last)
                    };
                    pending.answer(&Reply::Status(Box::new(status))).await;
                }
                Request::Promote | Request::Reload | Request::Finalize | Request::Hydrate => {
                    pending.answer(&Reply::Failed { message: message.clone() }).await;
                }
            },
            () = terminated.as_mut() => return Waited::Stopped(None),
        }
    }
}

/// Looks whether the store answers for a basebackup, and waits until it does; `message` says what waits for that.
pub(super) async fn until_it_answers(
    repository: &Repository,
    basebackup: BasebackupId,
    message: &str,
) -> Waited {
    let clock = repository.clock();
    let (begun, mut pause, mut was_away) = (clock.monotonic(), PAUSE_FIRST, false);
    loop {
        match Basebackup::open(repository, basebackup).await {
            // Damage is an answer.
            Err(error) if error.kind() != ErrorKind::Damaged => {
                if !was_away {
                    tracing::warn!("{message}; the store says: {error}");
                }
                was_away = true;
            }
            _ if was_away => {
                tracing::info!("the store answers; recovery starts again");
                return Waited::ItIsBack;
            }
            _ => return Waited::ItWasThere,
        }
        if clock.monotonic().saturating_duration_since(begun) >= WAIT_MAX {
            return Waited::TooLong;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
