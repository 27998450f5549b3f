//! Who waits for the store, and for which files: what a hydrator gives way to, and what it fetches before the rest.
//!
//! Every read that has to wait for bytes enters here and leaves when it has them. A file that is read and is local has
//! no heat: there is nothing to fetch for it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::mount::caller::Caller;
use crate::mount::fs::LocalId;

/// Files whose heat is remembered; a hydrator forgets each when it takes it up, and without one this is enough.
const HEAT_FILES_MAX: usize = 4096;

/// The reads of others than the hydrator.
#[derive(Debug, Default)]
pub(crate) struct ForegroundReads {
    waiting: AtomicUsize,
    heat: Mutex<Heat>,
}

/// A read that waits until this is dropped.
#[derive(Debug)]
pub(crate) struct WaitingRead<'a> {
    of: Option<&'a ForegroundReads>,
}

/// How often a file was waited for, and when last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Touched {
    reads: u32,
    last: u64,
}

/// The files that were waited for.
#[derive(Debug, Default)]
struct Heat {
    files: HashMap<LocalId, Touched>,
    reads: u64,
}

impl ForegroundReads {
    /// Takes note of a caller that waits for bytes of a file, unless that is the hydrator.
    pub(crate) fn enter(&self, caller: &Caller, file: LocalId) -> WaitingRead<'_> {
        if caller.is_background {
            return WaitingRead { of: None };
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.heat.lock().expect("no holder of this lock panics").touch(file);
        WaitingRead { of: Some(self) }
    }

    /// Tells whether somebody waits.
    pub(crate) fn are_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Returns the file with the most heat.
    pub(crate) fn hottest(&self) -> Option<(Touched, LocalId)> {
        self.heat.lock().expect("no holder of this lock panics").hottest()
    }

    /// Forgets a file's heat.
    pub(crate) fn forget(&self, file: LocalId) {
        self.heat.lock().expect("no holder of this lock panics").files.remove(&file);
    }
}

impl Drop for WaitingRead<'_> {
    fn drop(&mut self) {
        if let Some(reads) = self.of {
            reads.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Heat {
    fn touch(&mut self, file: LocalId) {
        self.reads += 1;
        if self.files.len() >= HEAT_FILES_MAX && !self.files.contains_key(&file) {
            return;
        }
        let touched = self.files.entry(file).or_default();
        touched.reads = touched.reads.saturating_add(1);
        touched.last = self.reads;
    }

    fn hottest(&self) -> Option<(Touched, LocalId)> {
        self.files.iter().map(|(file, touched)| (*touched, *file)).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_is_waited_for_most_comes_first_then_the_latest() {
        let reads = ForegroundReads::default();
        let wait = |file| drop(reads.enter(&Caller::internal(), LocalId(file)));
        [1, 2, 3, 2, 3].into_iter().for_each(wait);
        let order = std::iter::from_fn(|| {
            let (_, file) = reads.hottest()?;
            reads.forget(file);
            Some(file.0)
        });
        assert_eq!(order.collect::<Vec<_>>(), [3, 2, 1]);
    }

    #[test]
    fn who_waits_is_counted_until_it_has_what_it_wants_and_the_hydrator_is_not() {
        let reads = ForegroundReads::default();
        let hydrator = reads.enter(&Caller::background(), LocalId(1));
        assert!(!reads.are_waiting() && reads.hottest().is_none());
        let (first, second) =
            (reads.enter(&Caller::internal(), LocalId(1)), reads.enter(&Caller::internal(), LocalId(2)));
        drop((first, hydrator));
        assert!(reads.are_waiting());
        drop(second);
        assert!(!reads.are_waiting());
    }

    #[test]
    fn heat_has_a_bound() {
        let reads = ForegroundReads::default();
        for file in 0..2 * HEAT_FILES_MAX as u64 {
            drop(reads.enter(&Caller::internal(), LocalId(file)));
        }
        assert_eq!(reads.heat.lock().unwrap().files.len(), HEAT_FILES_MAX);
    }
}
