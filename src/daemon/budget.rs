//! A site's share of the daemon's memory: every file on its way holds what it takes until it is stored.
//!
//! A file is read frame by frame, so that memory has no more of it than what becomes of it sealed: at most twice its
//! size while that is put together, and once after that. What is stored in parts takes that of two parts, however large
//! it is. A file that would never fit goes alone, with the whole share. Nobody waits for memory while holding some.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::repo::wal_object::{PART_BYTES, WAL_RAW_BYTES_MAX};

/// The memory that files of a site may take.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    units: Arc<Semaphore>,
    capacity: u32,
    used: Arc<AtomicBool>,
}

/// A part of it, held until dropped.
#[derive(Debug)]
pub(super) struct Charge(OwnedSemaphorePermit);

/// What is counted in: a semaphore counts no further than 32 bits.
const UNIT_BYTES: u64 = 64 << 10;
/// What a file takes while it is sealed, in its own size: its frames at their largest, and the object made of them.
const SEALING_FACTOR: u64 = 2;

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        let capacity = units(bytes).max(1);
        Self { units: Arc::new(Semaphore::new(capacity as usize)), capacity, used: Arc::default() }
    }

    /// Returns whether memory was used since the last time, and none is now.
    pub(super) fn has_become_idle(&self) -> bool {
        let idle = self.units.available_permits() == self.capacity as usize;
        idle && self.used.swap(false, Ordering::Relaxed)
    }

    /// Waits for what sealing a file of that size takes.
    pub(super) async fn charge_for_sealing(&self, file_bytes: u64) -> Charge {
        let at_once = if file_bytes > WAL_RAW_BYTES_MAX { PART_BYTES as u64 } else { file_bytes };
        self.charge(at_once * SEALING_FACTOR).await
    }

    /// Waits for what comparing a file of that size with the archive takes: one object of it as it is stored.
    pub(super) async fn charge_for_comparing(&self, file_bytes: u64) -> Charge {
        self.charge(file_bytes.min(WAL_RAW_BYTES_MAX)).await
    }

    async fn charge(&self, bytes: u64) -> Charge {
        let units = units(bytes).clamp(1, self.capacity);
        let permit = self.units.clone().acquire_many_owned(units).await;
        self.used.store(true, Ordering::Relaxed);
        Charge(permit.expect("the semaphore is never closed"))
    }
}

impl Charge {
    /// Gives back what is held beyond so many bytes.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        let held = self.0.num_permits();
        let surplus = held.saturating_sub(units(bytes as u64).max(1) as usize);
        drop(self.0.split(surplus));
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX >> 4).min(u32::MAX >> 4)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test]
    async fn files_wait_for_memory_and_one_that_is_too_large_goes_alone() {
        let budget = Budget::new(64 * MIB);
        assert!(!budget.has_become_idle(), "nothing was used");
        let mut first = budget.charge_for_sealing(16 * MIB).await;
        let second = budget.charge_for_sealing(16 * MIB).await;
        assert!(budget.charge_for_sealing(16 * MIB).now_or_never().is_none());
        first.shrink_to(4 << 20);
        assert!(budget.charge_for_sealing(14 * MIB).now_or_never().is_some());
        drop(second);
        let alone = budget.charge_for_sealing(64 * MIB).now_or_never();
        assert!(alone.is_none(), "the first one still holds some");
        drop(first);
        let alone = budget.charge_for_sealing(64 * MIB).now_or_never().unwrap();
        assert!(budget.charge_for_sealing(0).now_or_never().is_none());
        assert!(!budget.has_become_idle());
        drop(alone);
        assert!(budget.has_become_idle() && !budget.has_become_idle());
        assert!(budget.charge_for_sealing(0).now_or_never().is_some());
    }

    #[tokio::test]
    async fn of_what_is_stored_in_parts_the_parts_are_charged() {
        let budget = Budget::new(128 * MIB);
        let held: Vec<_> =
            (0..2).map(|_| budget.charge_for_sealing(1 << 30).now_or_never().unwrap()).collect();
        assert!(budget.charge_for_sealing(1 << 30).now_or_never().is_none());
        drop(held);
        let compared = (0..2).map(|_| budget.charge_for_comparing(1 << 30).now_or_never().unwrap());
        assert_eq!(compared.collect::<Vec<_>>().len(), 2);
    }
}
