//! Progress and counters: engines report them, `cli` shows them, tests read them.
//!
//! An engine takes a `&dyn Monitor` or an `Arc<dyn Monitor>` as its last argument, starts a [`Task`] and advances
//! the [`Progress`] it gets back, from any thread. Advancing is one atomic addition: whoever shows progress samples it,
//! so that no worker ever waits for a terminal. What an engine returns at its end are its own `Stats`, gathered
//! with [`Counter`]s where several threads count.
//!
//! Deliberately absent: messages (that is what `tracing` is for), rates and time (the one who shows them reads
//! the clock).

mod counter;
mod progress;
mod recording;
mod usage;

use std::fmt::Debug;

pub use counter::Counter;
pub use progress::{Progress, Task, TaskState, Unit, Watch};
pub use recording::RecordingMonitor;
pub use usage::Usage;

/// Somebody who is told what is going on.
pub trait Monitor: Send + Sync + Debug {
    /// Takes note of a new task and returns the handle to advance it by; the task ends with its last handle.
    fn start(&self, task: Task) -> Progress;

    /// Counts events that belong to no task, such as retries.
    fn count(&self, event: &'static str, amount: u64);
}

/// A monitor for when nobody looks.
#[derive(Debug, Clone, Copy, Default)]
pub struct VoidMonitor;

impl Monitor for VoidMonitor {
    fn start(&self, task: Task) -> Progress {
        Progress::new(task)
    }

    fn count(&self, _event: &'static str, _amount: u64) {}
}
