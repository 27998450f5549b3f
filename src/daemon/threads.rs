//! Processor time for sealing: so many files at once, of all sites together, and none that hangs counts for long.
//!
//! A file is read while it is sealed, and the volume it is on may hang; a thread that waits for it cannot be had back. So it
//! has a thread to itself, and after [`HANGS_AFTER`] the others no longer wait for its turn to end. How many files
//! of one site can hang is bounded by its transfers. Deliberately absent: a pool, whose threads would be gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinError;

/// The turns of all sites.
#[derive(Debug, Clone)]
pub(super) struct Threads {
    turns: Arc<Semaphore>,
    hangs_after: Duration,
}

/// Longer than it takes to read and seal the largest object; one that is still at it then has one thread too many run.
const HANGS_AFTER: Duration = Duration::from_secs(5);

impl Threads {
    /// Lets so many run at once; zero counts as one.
    pub(super) fn new(threads: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(threads.max(1))), hangs_after: HANGS_AFTER }
    }

    /// Runs a job once it has a turn.
    ///
    /// # Errors
    /// Where the job panics.
    pub(super) async fn run<T, F>(&self, job: F) -> Result<T, JoinError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let turn = self.turns.acquire().await.expect("the semaphore is never closed");
        let mut running = tokio::task::spawn_blocking(job);
        match tokio::time::timeout(self.hangs_after, &mut running).await {
            Ok(done) => done,
            Err(_) => {
                drop(turn);
                running.await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    /// A job that never has its turn fails its test by this, instead of hanging with it.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn threads(threads: usize, hangs_after: Duration) -> Threads {
        Threads { hangs_after, ..Threads::new(threads) }
    }

    #[tokio::test]
    async fn a_job_that_hangs_holds_up_the_others_only_so_long() {
        let threads = threads(1, Duration::from_millis(10));
        let (volume_is_back, waits) = mpsc::channel();
        let hanging = {
            let threads = threads.clone();
            tokio::spawn(async move { threads.run(move || waits.recv()).await })
        };
        // Both orders are the same here: the other one has its turn before the volume is back.
        assert_eq!(threads.run(|| 7).await.unwrap(), 7);
        tokio::task::yield_now().await;
        let turn = tokio::time::timeout(PATIENCE, threads.run(|| 8)).await;
        assert_eq!(turn.expect("the job that hangs gives its turn up").unwrap(), 8);
        assert!(!hanging.is_finished());
        volume_is_back.send(()).unwrap();
        assert_eq!(hanging.await.unwrap().unwrap(), Ok(()));
        assert!(threads.run::<(), _>(|| panic!("it fails")).await.is_err_and(|error| error.is_panic()));
        assert_eq!(threads.run(|| 9).await.unwrap(), 9);
    }

    #[tokio::test]
    async fn no_more_run_at_once_than_there_are_turns() {
        let threads = threads(2, Duration::from_secs(3600));
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let jobs = (0..16).map(|_| {
            let (threads, running, most) = (threads.clone(), running.clone(), most.clone());
            tokio::spawn(async move {
                let job = move || {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    std::thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                };
                threads.run(job).await.unwrap();
            })
        });
        for job in jobs.collect::<Vec<_>>() {
            job.await.unwrap();
        }
        assert!((1..=2).contains(&most.load(Ordering::SeqCst)), "{most:?}");
    }
}
