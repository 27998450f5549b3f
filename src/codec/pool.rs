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
        let permit = Arc::clone(&self.shared.room).acquire_owned().await.expect("the semaphore is never closed");
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
    panic::catch_unwind(AssertUnwindSafe(job)).map_err(|payload| Error::JobPanicked { message: text_of(&*payload) })
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
