//! A process that is told to end while it begins something: what has been begun comes to its end first, if that is soon.
//!
//! A mount that is on its way would otherwise come about when nobody is there to take it away, and a server that is being
//! started would not be stopped. What waits for the store is given up: nothing has been mounted or started by then.

use std::pin::{Pin, pin};
use std::time::Duration;

/// What came of a step.
#[derive(Debug)]
pub(super) enum Step<R> {
    /// It came to its end.
    Done(R),
    /// This process was told to end meanwhile; what came of the step all the same has to be taken back.
    Told(Option<R>),
}

/// A step takes milliseconds without the store, and a read that waits for it has [`STOPPING_PATIENCE`] before.
///
/// [`STOPPING_PATIENCE`]: super::lazy_uppers::STOPPING_PATIENCE
const GRACE: Duration = Duration::from_secs(8);

/// Takes a step; `hurry` is called when this process is told to end meanwhile, and the step has a moment left then.
pub(super) async fn step<S: Future, T: Future<Output = ()>>(
    step: S,
    terminated: Pin<&mut T>,
    hurry: impl FnOnce(),
) -> Step<S::Output> {
    step_within(GRACE, step, terminated, hurry).await
}

async fn step_within<S: Future, T: Future<Output = ()>>(
    grace: Duration,
    step: S,
    terminated: Pin<&mut T>,
    hurry: impl FnOnce(),
) -> Step<S::Output> {
    let mut step = pin!(step);
    tokio::select! {
        done = step.as_mut() => return Step::Done(done),
        () = terminated => hurry(),
    }
    Step::Told(tokio::time::timeout(grace, step).await.ok())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn what_was_begun_ends_and_what_waits_is_given_up() {
        let hurried = Cell::new(false);
        let hurry = || hurried.set(true);
        assert!(matches!(step(ready(1), pin!(pending()), hurry).await, Step::Done(1)));
        assert!(!hurried.get());
        let slow = async {
            tokio::task::yield_now().await;
            2
        };
        assert!(matches!(step(slow, pin!(ready(())), hurry).await, Step::Told(Some(2))));
        assert!(hurried.get());
        let moment = Duration::from_millis(1);
        let waits = step_within(moment, pending::<u8>(), pin!(ready(())), || {}).await;
        assert!(matches!(waits, Step::Told(None)));
    }
}
