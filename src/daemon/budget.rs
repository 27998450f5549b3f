//! A site's share of the daemon's memory: every file on its way holds what it takes until it is stored.
//!
//! A file is charged twice its size while it is read and sealed, and what its sealed form takes after that. One that
//! would never fit goes alone, with the whole share. Nobody waits for memory while holding some.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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
/// What a file takes while it is sealed, in its own size: its content, and its frames at their largest.
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

    /// Waits for what reading and sealing a file of that size takes.
    pub(super) async fn charge_for_sealing(&self, file_bytes: u64) -> Charge {
        let units = units(file_bytes.saturating_mul(SEALING_FACTOR)).clamp(1, self.capacity);
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
        let alone = budget.charge_for_sealing(1 << 40).now_or_never();
        assert!(alone.is_none(), "the first one still holds some");
        drop(first);
        let alone = budget.charge_for_sealing(1 << 40).now_or_never().unwrap();
        assert!(budget.charge_for_sealing(0).now_or_never().is_none());
        assert!(!budget.has_become_idle());
        drop(alone);
        assert!(budget.has_become_idle() && !budget.has_become_idle());
        assert!(budget.charge_for_sealing(0).now_or_never().is_some());
    }
}
