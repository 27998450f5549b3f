//! Progress on a terminal: one line, drawn over itself, with amounts, rates and the time that is left.
//!
//! A thread samples the tasks a few times a second; engines only add to their counters. What the line says is a
//! pure function of two samples of each task. Without a terminal, with `-q` or `--no-progress` there is no monitor of
//! this kind at all.

use std::fmt::Write;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::monitor::{Monitor, Progress, Task, Unit, Watch};

use super::screen::draw_progress;
use super::text::{duration, size};

/// How often the line is drawn.
const TICK: Duration = Duration::from_millis(250);
/// A terminal without a better answer; a longer line would wrap and not be drawn over.
const LINE_LEN_MAX: usize = 79;
/// Before this much time a rate means nothing.
const RATE_AFTER: Duration = Duration::from_secs(1);

/// A monitor that draws on standard error until it is dropped.
#[derive(Debug)]
pub(super) struct TerminalMonitor {
    tasks: Arc<Mutex<Vec<Watched>>>,
    clock: Arc<dyn Clock>,
    ticker: Mutex<Option<Ticker>>,
}

#[derive(Debug)]
struct Watched {
    watch: Watch,
    started: Instant,
}

#[derive(Debug)]
struct Ticker {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl TerminalMonitor {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        let tasks: Arc<Mutex<Vec<Watched>>> = Arc::default();
        let ticker = start_ticker(tasks.clone(), clock.clone());
        Self { tasks, clock, ticker: Mutex::new(ticker) }
    }

    /// Wipes the line and draws no more, whoever still holds the monitor.
    pub(super) fn stop(&self) {
        let ticker = self.ticker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Ticker { stop, thread }) = ticker {
            drop(stop);
            // A ticker that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Monitor for TerminalMonitor {
    fn start(&self, task: Task) -> Progress {
        let progress = Progress::new(task);
        lock(&self.tasks).push(Watched { watch: progress.watch(), started: self.clock.monotonic() });
        progress
    }

    fn count(&self, event: &'static str, amount: u64) {
        tracing::debug!(event, amount, "counted");
    }
}

impl Drop for TerminalMonitor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts the thread that draws; without threads there is no progress, which is no reason to fail.
fn start_ticker(tasks: Arc<Mutex<Vec<Watched>>>, clock: Arc<dyn Clock>) -> Option<Ticker> {
    let (stop, stopped) = mpsc::channel();
    let tick = move || {
        while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            draw_progress(&line(&mut lock(&tasks), clock.monotonic()));
        }
        draw_progress("");
    };
    let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(tick).ok()?;
    Some(Ticker { stop, thread })
}

/// Drops the tasks that have ended and describes the others in one line.
fn line(tasks: &mut Vec<Watched>, now: Instant) -> String {
    tasks.retain(|task| !task.watch.has_ended());
    let parts: Vec<String> = tasks
        .iter()
        .map(|task| {
            let state = task.watch.state();
            describe(state.task(), state.done(), state.total(), now.saturating_duration_since(task.started))
        })
        .collect();
    parts.join("; ").chars().take(LINE_LEN_MAX).collect()
}

fn describe(task: Task, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let amount = |amount: u64| match task.unit {
        Unit::Bytes => size(amount),
        Unit::Items(_) => amount.to_string(),
    };
    let mut text = format!("{}: {}", task.name, amount(done));
    // Writing to a String does not fail.
    let _ = total.map(|total| write!(text, " of {}", amount(total)));
    if let Unit::Items(plural) = task.unit {
        let _ = write!(text, " {plural}");
    }
    if let Some(percent) = total.filter(|total| *total > 0).map(|total| done.min(total) * 100 / total) {
        let _ = write!(text, " ({percent} %)");
    }
    if elapsed < RATE_AFTER {
        return text;
    }
    let rate = (done as f64 / elapsed.as_secs_f64()) as u64;
    let _ = write!(text, ", {}/s", amount(rate));
    if let Some(left) =
        total.and_then(|total| total.saturating_sub(done).checked_div(rate)).filter(|left| *left > 0)
    {
        let _ = write!(text, ", {} left", duration(Duration::from_secs(left)));
    }
    text
}

fn lock(tasks: &Mutex<Vec<Watched>>) -> MutexGuard<'_, Vec<Watched>> {
    tasks.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_shows_amount_rate_and_what_is_left() {
        let bytes = Task::bytes("backup", None);
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        assert_eq!(describe(bytes, 0, None, Duration::ZERO), "backup: 0 B");
        assert_eq!(
            describe(bytes, 600 << 20, Some(6000 << 20), minute),
            "backup: 600 MiB of 5.86 GiB (10 %), 10.0 MiB/s, 9 min 0 s left"
        );
        let files = Task::items("scan", "files", None);
        assert_eq!(describe(files, 1200, None, second), "scan: 1200 files, 1200/s");
        assert_eq!(describe(files, 0, Some(0), minute), "scan: 0 of 0 files, 0/s");
        assert_eq!(
            describe(files, u64::MAX / 200, Some(7), second),
            "scan: 92233720368547758 of 7 files (100 %), 92233720368547760/s"
        );
    }

    #[test]
    fn tasks_that_have_ended_leave_the_line() {
        let now = Instant::now();
        let (first, second) = (Progress::new(Task::bytes("a", 4)), Progress::new(Task::bytes("b", 4)));
        let watched = |progress: &Progress| Watched { watch: progress.watch(), started: now };
        let mut tasks = vec![watched(&first), watched(&second)];
        first.advance(1);
        assert_eq!(line(&mut tasks, now), "a: 1 B of 4 B (25 %); b: 0 B of 4 B (0 %)");
        first.finish();
        assert_eq!(line(&mut tasks, now), "b: 0 B of 4 B (0 %)");
        drop(second);
        assert_eq!(line(&mut tasks, now), "");
    }

    #[test]
    fn a_stopped_monitor_still_takes_tasks() {
        let monitor = TerminalMonitor::new(Arc::new(crate::clock::SystemClock));
        monitor.stop();
        monitor.start(Task::items("late", "files", 1)).advance(1);
        monitor.count("retry", 1);
        monitor.stop();
    }
}
