//! The beginnings of segments that servers were shown a moment ago: a copy asks for a name more than once.
//!
//! `cp` looks at a file, opens it and looks again; where it is another one by then, it gives up, and PostgreSQL takes
//! that for the end of the archive. While a receiver goes on, each look would find more. So a server is shown again what
//! it was shown once, until it has not asked for [`KEPT`]; another one, which came later, is shown what there is by then.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::mount::restoring::ServerIdentity;
use crate::pg::WalSegmentName;

/// How long it is kept for the next look; a recovery asks for its last segment again when it has replayed it.
const KEPT: Duration = Duration::from_secs(60);
/// However often a server asks: one that is started again and again is to see what has come at last.
const KEPT_MAX: Duration = Duration::from_secs(600);
/// How many are kept: no more servers are at the end of an archive at once.
const COUNT_MAX: usize = 4;

#[derive(Debug, Default)]
pub(super) struct WalBeginnings {
    shown: Mutex<HashMap<(ServerIdentity, WalSegmentName), Shown>>,
}

#[derive(Debug)]
struct Shown {
    first: Instant,
    last: Instant,
    content: Bytes,
}

impl WalBeginnings {
    /// Tells whether there is anything to be shown again to anybody.
    pub(super) fn is_empty(&self, now: Instant) -> bool {
        self.lock(now).is_empty()
    }

    /// Returns what a server was shown of a segment.
    pub(super) fn find(
        &self,
        server: ServerIdentity,
        segment: WalSegmentName,
        now: Instant,
    ) -> Option<Bytes> {
        let mut shown = self.lock(now);
        let shown = shown.get_mut(&(server, segment))?;
        shown.last = now;
        Some(shown.content.clone())
    }

    /// Returns what a server is shown of a segment from now on: `content`, unless it was shown something already.
    pub(super) fn show(
        &self,
        server: ServerIdentity,
        segment: WalSegmentName,
        content: Bytes,
        now: Instant,
    ) -> Bytes {
        if let Some(shown) = self.find(server, segment, now) {
            return shown;
        }
        let mut shown = self.lock(now);
        let oldest = shown.iter().min_by_key(|(_, shown)| shown.last).map(|(key, _)| *key);
        if let Some(oldest) = oldest.filter(|_| shown.len() >= COUNT_MAX) {
            shown.remove(&oldest);
        }
        shown.insert((server, segment), Shown { first: now, last: now, content: content.clone() });
        content
    }

    /// Forgets what was kept long enough.
    fn lock(&self, now: Instant) -> MutexGuard<'_, HashMap<(ServerIdentity, WalSegmentName), Shown>> {
        let mut shown = self.shown.lock().expect("no holder of this lock panics");
        shown.retain(|_, shown| {
            let (asked, begun) =
                (now.saturating_duration_since(shown.last), now.saturating_duration_since(shown.first));
            asked < KEPT && begun < KEPT_MAX
        });
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_was_shown_stays_until_it_does_not_ask() {
        let beginnings = WalBeginnings::default();
        let segment: WalSegmentName = "000000010000000000000001".parse().unwrap();
        let (early, late, start) = (Bytes::from_static(b"1"), Bytes::from_static(b"2"), Instant::now());
        let (server, other) = ((1, 1), (1, 2));
        assert_eq!(beginnings.find(server, segment, start), None);
        assert_eq!(beginnings.show(server, segment, early.clone(), start), early);
        let almost = start + KEPT - Duration::from_secs(1);
        assert_eq!(beginnings.show(other, segment, late.clone(), almost), late, "who comes later sees more");
        assert_eq!(beginnings.show(server, segment, late.clone(), almost), early);
        assert_eq!(beginnings.find(server, segment, almost + KEPT / 2), Some(early));
        assert!(!beginnings.is_empty(almost + KEPT));
        assert_eq!(beginnings.show(server, segment, late.clone(), almost + 2 * KEPT), late);
        let mut asked = almost + 2 * KEPT;
        while asked < almost + 2 * KEPT + KEPT_MAX {
            assert!(beginnings.find(server, segment, asked).is_some());
            asked += KEPT / 2;
        }
        assert_eq!(beginnings.find(server, segment, asked), None);
        for number in 0..10 {
            beginnings.show((2, number), segment, late.clone(), asked);
        }
        assert_eq!(beginnings.shown.lock().unwrap().len(), COUNT_MAX);
    }
}
