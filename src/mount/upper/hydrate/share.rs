//! How many requests of a hydrator are on their way at once: all it has, or fewer while somebody else's read waits.
//! Deliberately absent: how many bytes a mount fetches in all, which the gate of the transfers bounds for everybody.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests that are on their way at once: a part of 4 MiB takes some 45 ms from being asked for at 20 ms to being written, so
/// that twelve keep two cores at work. Each holds a part in memory, stored and decoded: what the gate of the transfers
/// allows to whom nobody waits for.
pub(crate) const REQUESTS_AT_ONCE: usize = 12;
/// The same while a read of somebody else waits for bytes. A page that is waited for shares the line with so many parts,
/// and has a seventh of it. With none, a server that always waits for some cold page never came to the end of them; with
/// two, TPC-B had 0.07 of native five seconds after the start of 1.9 GB at 20 ms, and with six 0.13 to 0.40: that all is
/// warm sooner is worth more than that each read is answered a little sooner.
pub(crate) const BESIDE_READS: usize = 6;

/// Counts what is on its way.
#[derive(Debug, Default)]
pub(crate) struct Share {
    under_way: AtomicUsize,
}

/// A request that is on its way until this is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay<'a> {
    share: &'a Share,
}

impl Share {
    /// Begins a request, unless as many are on their way as there may be now.
    pub(crate) fn begin(&self, are_reads_waiting: bool) -> Option<UnderWay<'_>> {
        let most = if are_reads_waiting { BESIDE_READS } else { REQUESTS_AT_ONCE };
        let next = |under_way| (under_way < most).then_some(under_way + 1);
        let begun = self.under_way.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
        begun.is_ok().then(|| UnderWay { share: self })
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.share.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_are_begun_while_somebody_waits_and_none_is_taken_back() {
        let share = Share::default();
        let mut all: Vec<_> = std::iter::from_fn(|| share.begin(false)).collect();
        assert_eq!(all.len(), REQUESTS_AT_ONCE);
        all.truncate(BESIDE_READS);
        assert!(share.begin(true).is_none());
        all.pop();
        let again = share.begin(true);
        assert!(again.is_some() && share.begin(true).is_none());
        assert!(share.begin(false).is_some(), "nobody waits any more");
    }
}
