//! One fetch at a time for one stretch of a file, whoever asks.
//!
//! A file is cut into windows of one chunk. Who wants bytes claims the windows that nobody fetches and waits for
//! the others. Chunks may gather pages from anywhere, so two windows can still name one chunk; that costs a
//! second request at worst, never a wrong byte. A claim ends when it is dropped, so a reader that is killed or
//! fails hands its windows to whoever waits.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::mount::lower::NodeId;

/// The stretch that is fetched as one: a full basebackup's chunk.
pub const WINDOW: u64 = 64 * 1024;

/// The fetches under way.
#[derive(Debug, Default)]
pub struct Flights {
    busy: Mutex<HashSet<(NodeId, u64)>>,
    landed: Notify,
}

/// Windows that only the holder fetches, until it drops this.
#[derive(Debug)]
pub struct Claim {
    flights: Arc<Flights>,
    node: NodeId,
    windows: Vec<u64>,
}

impl Flights {
    /// Creates the table.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Claims the windows touching `range` that nobody fetches; waits until there is at least one.
    ///
    /// The caller looks again at what is missing once it holds the claim: the wait may have cured it.
    pub async fn claim(self: &Arc<Self>, node: NodeId, range: Range<u64>) -> Claim {
        loop {
            let landed = self.landed.notified();
            let mut landed = std::pin::pin!(landed);
            // Registered before looking, or a flight that lands in between would not wake us.
            landed.as_mut().enable();
            let windows = self.claim_free(node, &range);
            if !windows.is_empty() {
                return Claim { flights: self.clone(), node, windows };
            }
            landed.await;
        }
    }

    fn claim_free(&self, node: NodeId, range: &Range<u64>) -> Vec<u64> {
        let mut busy = self.busy.lock().expect("no holder of this lock panics");
        let windows = range.start / WINDOW..range.end.div_ceil(WINDOW).max(range.start / WINDOW + 1);
        windows.filter(|window| busy.insert((node, *window))).collect()
    }
}

impl Claim {
    /// Returns the claimed part of `range` as maximal runs, in order.
    pub fn runs_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for window in &self.windows {
            let start = (window * WINDOW).max(range.start);
            let end = ((window + 1) * WINDOW).min(range.end);
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ if start < end => runs.push(start..end),
                _ => {}
            }
        }
        runs
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut busy = self.flights.busy.lock().expect("no holder of this lock panics");
        for window in &self.windows {
            busy.remove(&(self.node, *window));
        }
        drop(busy);
        self.flights.landed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);

    #[tokio::test]
    async fn two_readers_of_one_window_take_turns_and_others_do_not() {
        let flights = Flights::new();
        let first = flights.claim(NODE, 0..8192).await;
        let second = tokio::spawn({
            let flights = flights.clone();
            async move { flights.claim(NODE, 8192..16384).await.runs_in(&(8192..16384)) }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        let elsewhere = flights.claim(NODE, WINDOW..WINDOW + 1).await;
        let other_file = flights.claim(NodeId(2), 0..1).await;
        assert!(!second.is_finished());
        drop(first);
        assert_eq!(second.await.unwrap(), [8192..16384]);
        drop((elsewhere, other_file));
        assert!(flights.busy.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_wide_range_takes_what_is_free() {
        let flights = Flights::new();
        let middle = flights.claim(NODE, WINDOW..2 * WINDOW).await;
        let wide = flights.claim(NODE, 100..3 * WINDOW).await;
        assert_eq!(wide.runs_in(&(100..3 * WINDOW)), [100..WINDOW, 2 * WINDOW..3 * WINDOW]);
        drop(middle);
        drop(wide);
        let all = flights.claim(NODE, 100..3 * WINDOW).await;
        assert_eq!(all.runs_in(&(100..3 * WINDOW)), [100..3 * WINDOW]);
    }

    #[tokio::test]
    async fn a_reader_that_gives_up_frees_its_windows() {
        let flights = Flights::new();
        let abandoned = tokio::spawn({
            let flights = flights.clone();
            async move {
                let _claim = flights.claim(NODE, 0..1).await;
                std::future::pending::<()>().await;
            }
        });
        tokio::task::yield_now().await;
        abandoned.abort();
        assert!(abandoned.await.is_err());
        assert_eq!(flights.claim(NODE, 0..1).await.runs_in(&(0..1)), [0..1]);
    }
}
