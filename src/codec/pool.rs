//! The CPU pool: named threads that hash, compress, seal and open, behind two bounded queues.
//!
//! A caller that finds the queue full waits for room: an async caller without holding a tokio worker, a blocking
//! caller on its own thread. The two kinds have a queue each, so that neither can take all the room of the other.
//! A panic in a job is that caller's error; the thread lives on. A job whose async caller has gone away before
//! it began is not run. Deliberately absent: order and priorities; a caller that needs order numbers its results.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded, select};
use tokio::sync::{Semaphore, oneshot};

use super::error::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    static ON_POOL_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// A bounded pool of threads for CPU work; clones share it, the last one to go ends it.
#[derive(Clone)]
pub struct CpuPool {
    shared: Arc<Shared>,
}

struct Shared {
    threads: usize,
    queue: usize,
    /// Never full for a holder of a permit of `room`.
    from_async: Sender<Job>,
    room: Arc<Semaphore>,
    from_blocking: Sender<Job>,
}

impl CpuPool {
    /// Starts `threads` threads; of each kind of caller at most `queue` jobs wait. Zero counts as one.
    pub fn new(threads: usize, queue: usize) -> Self {
        let (threads, queue) = (threads.max(1), queue.max(1));
        let (from_async, async_jobs) = bounded(queue);
        let (from_blocking, blocking_jobs) = bounded(queue);
        for number in 0..threads {
            let (async_jobs, blocking_jobs) = (async_jobs.clone(), blocking_jobs.clone());
            thread::Builder::new()
                .name(format!("cpu-{number}"))
                .spawn(move || work(&async_jobs, &blocking_jobs))
                .expect("the operating system starts a thread for each core");
        }
        let room = Arc::new(Semaphore::new(queue));
        Self { shared: Arc::new(Shared { threads, queue, from_async, room, from_blocking }) }
    }

    /// Starts one thread per core the process may use, and as many jobs again in each queue.
    pub fn per_core() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores, cores)
    }

    /// Returns the number of threads.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `job` on the pool, first awaiting room in the queue.
    pub async fn run<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let permit =
            Arc::clone(&self.shared.room).acquire_owned().await.expect("the semaphore is never closed");
        let (reply, result) = oneshot::channel();
        let job = Box::new(move || {
            // The place in the queue is free once the job has left it.
            drop(permit);
            if !reply.is_closed() {
                // A caller that leaves while the job runs does not want the result.
                let _ = reply.send(caught(job));
            }
        });
        self.shared.from_async.try_send(job).expect("a permit is a free place in the queue");
        result.await.expect("every job of a caller that waits is run and answered")
    }

    /// Runs `job` on the pool, blocking this thread until it is done.
    ///
    /// Must not be called from async code. On a thread of a pool it runs `job` there and then, for waiting for
    /// its own kind could wait for ever.
    pub fn run_blocking<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        if ON_POOL_THREAD.get() {
            return caught(job);
        }
        let (reply, result) = bounded(1);
        let job = Box::new(move || {
            let _ = reply.send(caught(job));
        });
        self.shared.from_blocking.send(job).expect("the threads live as long as the pool");
        result.recv().expect("every job is run and answered")
    }
}

impl fmt::Debug for CpuPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { threads, queue, .. } = &*self.shared;
        f.debug_struct("CpuPool").field("threads", threads).field("queue", queue).finish_non_exhaustive()
    }
}

/// Runs jobs of both queues, fairly, until the pool is gone.
fn work(async_jobs: &Receiver<Job>, blocking_jobs: &Receiver<Job>) {
    ON_POOL_THREAD.set(true);
    loop {
        let job = select! {
            recv(async_jobs) -> job => job,
            recv(blocking_jobs) -> job => job,
        };
        // Both queues close together, when no caller is left that could wait for an answer.
        let Ok(job) = job else { return };
        // The job catches its own panic; this one is for a result nobody waits for that panics when dropped.
        let _ = panic::catch_unwind(AssertUnwindSafe(job));
    }
}

/// Runs a job, turning a panic into an error.
fn caught<T>(job: impl FnOnce() -> T) -> Result<T> {
    // A job owns what it touches or shares it behind locks that notice a panic themselves.
    panic::catch_unwind(AssertUnwindSafe(job))
        .map_err(|payload| Error::JobPanicked { message: text_of(&*payload) })
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::poll;

    use super::*;
    use crate::codec::ErrorKind;

    /// Occupies a thread of the pool until the sender is dropped; returns once it runs.
    fn occupy(pool: &CpuPool) -> Sender<()> {
        let (hold, held) = bounded::<()>(0);
        let (running, runs) = bounded(0);
        let pool = pool.clone();
        thread::spawn(move || {
            pool.run_blocking(move || {
                running.send(()).unwrap();
                let _ = held.recv();
            })
        });
        runs.recv().unwrap();
        hold
    }

    #[tokio::test]
    async fn jobs_of_both_kinds_of_callers_run_on_named_threads() {
        let pool = CpuPool::new(2, 2);
        let name = || thread::current().name().unwrap_or_default().to_owned();
        assert!(pool.run(name).await.unwrap().starts_with("cpu-"));
        let blocking = tokio::task::spawn_blocking({
            let pool = pool.clone();
            move || pool.run_blocking(name)
        });
        assert!(blocking.await.unwrap().unwrap().starts_with("cpu-"));
        assert_eq!(pool.threads(), 2);
    }

    #[tokio::test]
    async fn a_full_queue_keeps_the_next_caller_waiting() {
        let pool = CpuPool::new(1, 2);
        let began = Arc::new(AtomicUsize::new(0));
        let job = || {
            let began = began.clone();
            move || began.fetch_add(1, Ordering::SeqCst)
        };
        let hold = occupy(&pool);
        let mut callers: Vec<_> = (0..5).map(|_| Box::pin(pool.run(job()))).collect();
        for caller in &mut callers {
            assert!(poll!(caller.as_mut()).is_pending());
        }
        assert_eq!(pool.shared.from_async.len(), 2, "two wait in the queue, three for room in it");
        assert_eq!(began.load(Ordering::SeqCst), 0);

        drop(hold);
        for result in futures::future::join_all(callers).await {
            result.unwrap();
        }
        assert_eq!(began.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn a_panic_is_the_callers_error_and_the_thread_lives_on() {
        let pool = CpuPool::new(1, 1);
        for _ in 0..3 {
            let error = pool.run(|| panic!("page {} is odd", 7)).await.unwrap_err();
            assert_eq!(error, Error::JobPanicked { message: "page 7 is odd".to_owned() });
            assert_eq!(error.kind(), ErrorKind::Bug);
        }
        let pool_too = pool.clone();
        let blocking = thread::spawn(move || pool_too.run_blocking(|| panic!("plain"))).join().unwrap();
        assert_eq!(blocking, Err(Error::JobPanicked { message: "plain".to_owned() }));
        assert_eq!(pool.run(|| 42).await, Ok(42));
    }

    #[tokio::test]
    async fn a_job_whose_caller_left_before_it_began_is_not_run() {
        let pool = CpuPool::new(1, 4);
        let hold = occupy(&pool);
        let ran = Arc::new(AtomicUsize::new(0));
        let job = {
            let ran = ran.clone();
            move || ran.fetch_add(1, Ordering::SeqCst)
        };
        let mut caller = Box::pin(pool.run(job));
        assert!(poll!(caller.as_mut()).is_pending());
        drop(caller);
        drop(hold);
        // One thread, one queue in order: once this has run, the abandoned one has been passed over.
        pool.run(|| ()).await.unwrap();
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        assert_eq!(pool.shared.room.available_permits(), 4);
    }

    #[test]
    fn a_job_may_use_its_own_pool() {
        let pool = CpuPool::new(1, 1);
        let inner = pool.clone();
        let here = pool
            .run_blocking(move || (inner.run_blocking(|| thread::current().id()), thread::current().id()));
        let (nested, outer) = here.unwrap();
        assert_eq!(nested.unwrap(), outer);
    }

    #[test]
    fn threads_end_with_the_pool() {
        let (async_jobs, blocking_jobs) = (bounded::<Job>(1), bounded::<Job>(1));
        drop((async_jobs.0, blocking_jobs.0));
        // Runs to its end, or this test does not.
        work(&async_jobs.1, &blocking_jobs.1);
        ON_POOL_THREAD.set(false);
    }

    #[tokio::test]
    async fn a_result_that_panics_when_dropped_does_not_cost_a_thread() {
        struct Grenade;
        impl Drop for Grenade {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        let pool = CpuPool::new(1, 1);
        let (hold, held) = bounded::<()>(0);
        let (running, runs) = bounded(1);
        let mut caller = Box::pin(pool.run(move || {
            running.send(()).unwrap();
            let _ = held.recv();
            Grenade
        }));
        assert!(poll!(caller.as_mut()).is_pending());
        runs.recv().unwrap();
        drop(caller);
        drop(hold);
        assert_eq!(pool.run(|| 1).await, Ok(1));
    }
}
