//! `[limits]`: how much of the machine Walden takes.
//!
//! Defaults come from the machine: a thread for each processor the process may use, and memory that leaves
//! three quarters of a small machine alone and is enough on a large one.

use std::num::NonZeroU64;
use std::thread;

use super::error::Result;
use super::table::Table;

/// The limits of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Threads for CPU work.
    pub threads: usize,
    /// Requests to the store that are under way at once.
    pub transfers: usize,
    /// Memory for data on its way and for caches.
    pub memory_bytes: u64,
    /// Bytes that a basebackup reads in a second, where that is limited.
    pub rate: Option<NonZeroU64>,
}

const THREADS_MAX: i64 = 1024;
const TRANSFERS_MAX: i64 = 1024;
const TRANSFERS_DEFAULT: usize = 8;
/// Two packs on their way and a cache that is worth its name.
const MEMORY_BYTES_MIN: u64 = 64 << 20;
const MEMORY_BYTES_DEFAULT_MAX: u64 = 256 << 20;

impl Limits {
    /// Returns the limits of a host without a configuration file.
    pub fn of_machine() -> Self {
        Self {
            threads: thread::available_parallelism().map_or(1, usize::from),
            transfers: TRANSFERS_DEFAULT,
            memory_bytes: (machine_memory() / 4).clamp(MEMORY_BYTES_MIN, MEMORY_BYTES_DEFAULT_MAX),
            rate: None,
        }
    }

    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let defaults = Self::of_machine();
        let memory_bytes = match table.size("memory")? {
            None => defaults.memory_bytes,
            Some(entry) if entry.value >= MEMORY_BYTES_MIN => entry.value,
            Some(entry) => return Err(entry.bad("less than 64MiB is not enough to work with", None)),
        };
        let rate = match table.size("rate")? {
            None => None,
            Some(entry) => match NonZeroU64::new(entry.value) {
                Some(rate) => Some(rate),
                None => return Err(entry.bad("nothing would ever be read", None)),
            },
        };
        Ok(Self {
            threads: count(table, "threads", THREADS_MAX)?.unwrap_or(defaults.threads),
            transfers: count(table, "transfers", TRANSFERS_MAX)?.unwrap_or(defaults.transfers),
            memory_bytes,
            rate,
        })
    }
}

fn count(table: &Table<'_>, key: &str, max: i64) -> Result<Option<usize>> {
    let Some(entry) = table.integer(key)? else { return Ok(None) };
    match usize::try_from(entry.value) {
        Ok(count) if (1..=max).contains(&entry.value) => Ok(Some(count)),
        _ => Err(entry.bad(format!("{} is not between 1 and {max}", entry.value), None)),
    }
}

/// Returns the machine's memory, 0 where the kernel does not tell.
pub fn machine_memory() -> u64 {
    std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(total_of_meminfo).unwrap_or(0)
}

fn total_of_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        assert_eq!(total_of_meminfo("MemTotal:        8049060 kB\nMemFree: 1 kB\n"), Some(8_049_060 * 1024));
        for text in ["", "MemFree: 1 kB", "MemTotal: many kB", "MemTotal: 99999999999999999999 kB"] {
            assert_eq!(total_of_meminfo(text), None, "{text}");
        }
    }
}
