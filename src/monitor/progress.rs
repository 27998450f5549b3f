//! A task under way: what it is, how far it is, whether it has ended.
//!
//! A `Progress` is the engine's end, cloned into as many threads as work on the task; `TaskState` is the other
//! end, for sampling. The total may be unknown, and may grow while files are still being found.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an amount counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown as a size and a rate.
    Bytes,
    /// Things, shown with their plural: `files`, `WAL segments`.
    Items(&'static str),
}

/// A piece of work that is worth watching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// What is being done, in a word or two: `backup`, `fetch WAL`.
    pub name: &'static str,
    /// What its amounts count.
    pub unit: Unit,
    /// How much there is to do, as far as known.
    pub total: Option<u64>,
}

impl Task {
    /// Describes work measured in bytes.
    pub fn bytes(name: &'static str, total: impl Into<Option<u64>>) -> Self {
        Self { name, unit: Unit::Bytes, total: total.into() }
    }

    /// Describes work measured in things, named in the plural.
    pub fn items(name: &'static str, plural: &'static str, total: impl Into<Option<u64>>) -> Self {
        Self { name, unit: Unit::Items(plural), total: total.into() }
    }
}

/// Stands for a total that is not known; no task is that large.
const UNKNOWN: u64 = u64::MAX;

/// How far a task is.
#[derive(Debug)]
pub struct TaskState {
    task: Task,
    done: AtomicU64,
    total: AtomicU64,
}

impl TaskState {
    /// Returns what the task was called when it started.
    pub fn task(&self) -> Task {
        self.task
    }

    /// Returns how much is done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns how much there is to do, as far as known now.
    pub fn total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|total| *total != UNKNOWN)
    }
}

/// The handle by which a task is advanced; the task ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Progress {
    state: Arc<TaskState>,
    // Ends the task with its last handle, while `TaskState` lives on with whoever watches.
    alive: Arc<()>,
}

/// The watcher's end of a task.
#[derive(Debug, Clone)]
pub struct Watch {
    state: Arc<TaskState>,
    alive: std::sync::Weak<()>,
}

impl Progress {
    /// Starts a task that nobody watches yet.
    pub fn new(task: Task) -> Self {
        let total = AtomicU64::new(task.total.unwrap_or(UNKNOWN));
        Self { state: Arc::new(TaskState { task, done: AtomicU64::new(0), total }), alive: Arc::new(()) }
    }

    /// Returns an end that sees how far the task is and when it has ended.
    pub fn watch(&self) -> Watch {
        Watch { state: self.state.clone(), alive: Arc::downgrade(&self.alive) }
    }

    /// Says that another `amount` is done.
    pub fn advance(&self, amount: u64) {
        self.state.done.fetch_add(amount, Ordering::Relaxed);
    }

    /// Corrects how much there is to do.
    pub fn set_total(&self, total: u64) {
        self.state.total.store(total, Ordering::Relaxed);
    }

    /// Ends the task as far as this handle is concerned; the same as dropping it, in words.
    pub fn finish(self) {}
}

impl Watch {
    /// Returns how far the task is.
    pub fn state(&self) -> &TaskState {
        &self.state
    }

    /// Returns whether the last handle is gone.
    pub fn has_ended(&self) -> bool {
        self.alive.strong_count() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_ends_with_its_last_handle() {
        let progress = Progress::new(Task::bytes("backup", 100));
        let watch = progress.watch();
        let worker = progress.clone();
        worker.advance(30);
        worker.finish();
        assert!(!watch.has_ended());
        progress.advance(12);
        drop(progress);
        assert!(watch.has_ended());
        assert_eq!((watch.state().done(), watch.state().total()), (42, Some(100)));
    }

    #[test]
    fn a_total_may_be_unknown_at_first() {
        let progress = Progress::new(Task::items("scan", "files", None));
        assert_eq!(progress.watch().state().total(), None);
        progress.set_total(7);
        assert_eq!(progress.watch().state().total(), Some(7));
        assert_eq!(progress.watch().state().task().unit, Unit::Items("files"));
    }
}
