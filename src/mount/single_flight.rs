//! One fetch at a time for one stretch of a file, whoever asks.
//!
//! A file is cut into windows of one chunk. Who wants bytes claims the windows that nobody fetches and waits for
//! the others, by the rules of [`repo::Flights`]. Chunks may gather pages from anywhere, so two windows can still name
//! one chunk; the file reader sees to that. A window is let go as soon as it is local, not when the whole of a long
//! fetch is. How long a read waits for the store is counted below, by each reader from when it has its windows: so
//! nobody waits long for windows of a reader who waits for the store.

use std::ops::Range;
use std::sync::Arc;

use crate::mount::lower::NodeId;
use crate::repo::{self, Urgency};

/// The stretch that is fetched as one: a full basebackup's chunk.
pub const WINDOW: u64 = 64 * 1024;

type Window = (NodeId, u64);

/// The fetches under way.
#[derive(Debug, Clone)]
pub struct Flights {
    windows: Arc<repo::Flights<Window>>,
}

/// Windows that only the holder fetches, until it drops this.
#[derive(Debug)]
pub struct Claim {
    windows: repo::Claim<Window>,
}

impl Flights {
    /// Creates the table.
    pub fn new() -> Self {
        Self { windows: repo::Flights::taking_over_equals() }
    }

    /// Claims the windows touching `ranges`, which are in order, that nobody fetches; waits until there is at least one.
    ///
    /// The caller looks again at what is missing once it holds the claim: the wait may have cured it.
    pub async fn claim(&self, node: NodeId, ranges: &[Range<u64>], urgency: Urgency) -> Claim {
        let windows_of = |range: &Range<u64>| {
            range.start / WINDOW..range.end.div_ceil(WINDOW).max(range.start / WINDOW + 1)
        };
        let mut windows: Vec<Window> =
            ranges.iter().flat_map(windows_of).map(|window| (node, window)).collect();
        windows.dedup();
        Claim { windows: self.windows.claim(&windows, urgency).await }
    }

    /// Tells whether nothing is being fetched.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.windows.is_idle()
    }
}

impl Claim {
    /// Returns the claimed part of `range` as maximal runs, in order.
    pub fn runs_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (_, window) in self.windows.keys() {
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

    /// Lets go of those windows that touch `come` and are local by now.
    pub fn land(&mut self, come: &Range<u64>, is_local: impl Fn(&Range<u64>) -> bool) {
        self.windows.land(|(_, window)| {
            let bytes = window * WINDOW..(window + 1) * WINDOW;
            bytes.start < come.end && come.start < bytes.end && is_local(&bytes)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);
    const NOW: Urgency = Urgency::Foreground;

    #[tokio::test]
    async fn two_readers_of_one_window_take_turns_and_others_do_not() {
        let flights = Flights::new();
        let first = flights.claim(NODE, &[0..8192], NOW).await;
        let second = tokio::spawn({
            let flights = flights.clone();
            async move { flights.claim(NODE, &[8192..16384], NOW).await.runs_in(&(8192..16384)) }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        let elsewhere = flights.claim(NODE, &[WINDOW..WINDOW + 1], NOW).await;
        let other_file = flights.claim(NodeId(2), &[0..1], NOW).await;
        assert!(!second.is_finished());
        drop(first);
        assert_eq!(second.await.unwrap(), [8192..16384]);
        drop((elsewhere, other_file));
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn a_wide_range_takes_what_is_free() {
        let flights = Flights::new();
        let middle = flights.claim(NODE, &[WINDOW..2 * WINDOW], NOW).await;
        let wide = flights.claim(NODE, &[100..3 * WINDOW], NOW).await;
        assert_eq!(wide.runs_in(&(100..3 * WINDOW)), [100..WINDOW, 2 * WINDOW..3 * WINDOW]);
        drop(middle);
        drop(wide);
        let all = flights.claim(NODE, &[100..3 * WINDOW], NOW).await;
        assert_eq!(all.runs_in(&(100..3 * WINDOW)), [100..3 * WINDOW]);
    }

    #[tokio::test]
    async fn a_window_that_has_come_is_let_go_while_the_others_are_under_way() {
        let flights = Flights::new();
        let mut wide = flights.claim(NODE, &[0..4 * WINDOW], NOW).await;
        // The third came in part, and the first did not come now.
        wide.land(&(WINDOW..2 * WINDOW + 8192), |window| window.end <= 2 * WINDOW);
        let others = flights.claim(NODE, &[0..4 * WINDOW], NOW).await;
        assert_eq!(others.runs_in(&(0..4 * WINDOW)), [WINDOW..2 * WINDOW]);
        drop((wide, others));
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn a_reader_that_gives_up_frees_its_windows() {
        let flights = Flights::new();
        let abandoned = tokio::spawn({
            let flights = flights.clone();
            async move {
                let _claim = flights.claim(NODE, &[0..1], NOW).await;
                std::future::pending::<()>().await;
            }
        });
        tokio::task::yield_now().await;
        abandoned.abort();
        assert!(abandoned.await.is_err());
        assert_eq!(flights.claim(NODE, &[0..1], NOW).await.runs_in(&(0..1)), [0..1]);
    }
}
