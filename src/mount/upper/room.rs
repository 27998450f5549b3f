//! Whose the room on the disk is: what the server writes comes first, then what its reads bring, then the hydrator.
//!
//! The last of the room is the server's alone: when it cannot write WAL it ends. So the hydrator stops at a reserve, and
//! what a read brings is answered without being kept once a part of that is taken too. What has to be local, the edges of a
//! page that is written in part or what must never fail to be read, is kept as long as there is any room. A disk that cannot
//! be asked, or does not tell its size, has room: a write that finds none says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::mount::fs::Capacity;
use crate::mount::upper::local_disk::LocalDisk;

/// For what there is to be room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// To keep what a read has brought.
    Reads,
    /// To keep what nobody has asked for.
    Hydration,
}

/// The room on the disk of one upper.
#[derive(Debug)]
pub(crate) struct Room {
    disk: Arc<dyn LocalDisk>,
    /// Reads are not kept, and the log says so.
    is_told: AtomicBool,
}

/// Room that the hydrator leaves: a PostgreSQL of default settings writes `max_wal_size`, 1 GB, between two checkpoints.
const RESERVE_BYTES: u64 = 1 << 30;
/// On a small disk the reserve is this part of it.
const RESERVE_PART: u64 = 20;
/// Reads leave this part of the reserve, 256 MiB: what is not kept is fetched at each read, which is slow, so what somebody
/// needs again has most of what the hydrator leaves; 16 segments of WAL are enough for a checkpoint to come to its end.
const READS_PART: u64 = 4;

impl Room {
    /// Watches a disk.
    pub(crate) fn new(disk: Arc<dyn LocalDisk>) -> Self {
        Self { disk, is_told: AtomicBool::new(false) }
    }

    /// Tells whether there is room for something beyond what the server may need.
    pub(crate) fn is_for(&self, what: Use) -> bool {
        let Ok(capacity) = self.disk.capacity() else { return true };
        let is_there = suffices(&capacity, what);
        match what {
            Use::Reads if !is_there => {
                if !self.is_told.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "the disk is almost full: what is read is not kept, and is fetched each time"
                    );
                }
            }
            // Told only now, so that room that comes and goes by a page is not told each time.
            Use::Reads | Use::Hydration => {
                let is_ample = suffices(&capacity, Use::Hydration);
                if is_ample && self.is_told.swap(false, Ordering::Relaxed) {
                    tracing::info!("the disk has room again: what is read is kept");
                }
            }
        }
        is_there
    }
}

fn suffices(capacity: &Capacity, what: Use) -> bool {
    let unit = u64::from(capacity.block_size);
    let (total, free) =
        (capacity.blocks.saturating_mul(unit), capacity.blocks_available.saturating_mul(unit));
    let reserve = RESERVE_BYTES.min(total / RESERVE_PART);
    let left = match what {
        Use::Hydration => reserve,
        Use::Reads => reserve / READS_PART,
    };
    total == 0 || free > left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_left_to_the_server_and_on_a_small_disk_a_smaller_one() {
        let disk = |blocks: u64, blocks_available: u64| Capacity {
            block_size: 4096,
            blocks,
            blocks_available,
            ..Capacity::default()
        };
        let blocks = |bytes: u64| bytes / 4096;
        for (what, large, small) in [(Use::Hydration, 1 << 30, 50), (Use::Reads, 256 << 20, 12)] {
            let large = blocks(large);
            assert!(suffices(&disk(blocks(1 << 40), large + 1), what));
            assert!(!suffices(&disk(blocks(1 << 40), large), what));
            assert!(suffices(&disk(1000, small + 1), what));
            assert!(!suffices(&disk(1000, small), what));
            assert!(suffices(&Capacity::default(), what), "a disk that does not tell");
        }
    }
}
