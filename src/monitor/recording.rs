//! A monitor that remembers, so that a test can ask what an engine reported.
//!
//! Tasks are kept in the order they were started, also those that have ended.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Monitor, Progress, Task, Watch};

/// A monitor that keeps every task and every count.
#[derive(Debug, Default)]
pub struct RecordingMonitor {
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    tasks: Vec<Watch>,
    counts: BTreeMap<&'static str, u64>,
}

impl RecordingMonitor {
    /// Creates a monitor that has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the tasks of that name, in the order they were started.
    pub fn tasks(&self, name: &str) -> Vec<Watch> {
        self.log().tasks.iter().filter(|watch| watch.state().task().name == name).cloned().collect()
    }

    /// Returns how much all tasks of that name have done together.
    pub fn done(&self, name: &str) -> u64 {
        self.tasks(name).iter().map(|watch| watch.state().done()).sum()
    }

    /// Returns how often an event was counted.
    pub fn counted(&self, event: &str) -> u64 {
        self.log().counts.get(event).copied().unwrap_or(0)
    }

    /// Returns the names of the tasks that have not ended.
    pub fn unfinished(&self) -> Vec<&'static str> {
        let log = self.log();
        log.tasks.iter().filter(|watch| !watch.has_ended()).map(|watch| watch.state().task().name).collect()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // Whatever a panicking test thread left behind is still a valid log.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Monitor for RecordingMonitor {
    fn start(&self, task: Task) -> Progress {
        let progress = Progress::new(task);
        self.log().tasks.push(progress.watch());
        progress
    }

    fn count(&self, event: &'static str, amount: u64) {
        *self.log().counts.entry(event).or_default() += amount;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn it_remembers_what_an_engine_reported() {
        let recording = Arc::new(RecordingMonitor::new());
        let monitor: Arc<dyn Monitor> = recording.clone();
        let first = monitor.start(Task::bytes("upload", 10));
        monitor.start(Task::bytes("upload", None)).advance(3);
        first.advance(4);
        monitor.count("retry", 1);
        monitor.count("retry", 1);
        assert_eq!(recording.done("upload"), 7);
        assert_eq!(recording.unfinished(), ["upload"]);
        first.finish();
        assert_eq!(recording.unfinished(), [""; 0]);
        assert_eq!((recording.counted("retry"), recording.counted("timeout")), (2, 0));
    }
}
