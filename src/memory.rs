//! What the C library's allocator is told, so that memory that was needed for a while goes back to the machine.
//!
//! Left to itself it keeps what segments were read into, and part of it even when it is told to give back (the ends of
//! its arenas). So large things are mapped one by one, which go back when they are freed, and what is left of small ones
//! is given back by who knows that nothing is to be done. Deliberately absent: when that is, and other C libraries.
//! Beside that, what the process has used of memory and processors, for those who report it.

use std::time::Duration;

/// Everything larger is a mapping of its own: segments are, whatever their size, and what is counted in kilobytes is not.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: i32 = 512 << 10;

/// So much free memory at the end of an arena stays, until [`give_back`]: the frames of a segment come and go there, and
/// would each be given back and faulted in again.
#[cfg(target_env = "gnu")]
const KEPT_BYTES_MAX: i32 = 4 << 20;

/// Has large things mapped one by one, from now on and in the whole process.
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "only the C library's allocator can be told"))]
pub fn map_large_things() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointer, and may be called at any time from any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX);
    }
}

/// Gives back what is free; it may take milliseconds.
#[cfg_attr(
    target_env = "gnu",
    expect(unsafe_code, reason = "only the C library knows what its allocator keeps")
)]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer, and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What a process has used of the machine so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Time on processors, of all its threads, in the kernel as well.
    pub cpu: Duration,
    /// The most memory that it had at once.
    pub peak_memory_bytes: u64,
}

impl Usage {
    /// Asks the kernel what this process has used.
    #[expect(unsafe_code, reason = "a system call that fills in a structure of numbers")]
    pub fn of_process() -> Self {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the structure is as large as the kernel takes it to be, and of numbers alone: zeroed, it is valid even
        // where the call fails, which it does only for another structure or another first argument.
        let usage = unsafe {
            libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
            usage.assume_init()
        };
        let time = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec.unsigned_abs())
                + Duration::from_micros(time.tv_usec.unsigned_abs())
        };
        let cpu = time(usage.ru_utime) + time(usage.ru_stime);
        // Linux counts in KiB.
        Self { cpu, peak_memory_bytes: usage.ru_maxrss.unsigned_abs() * 1024 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_grows_with_what_is_done() {
        let before = Usage::of_process();
        assert!(before.peak_memory_bytes > 1 << 20, "{before:?}");
        let held = vec![7_u8; before.peak_memory_bytes as usize + (16 << 20)];
        let mut sum = 0_u64;
        while Usage::of_process().cpu < before.cpu + Duration::from_millis(20) {
            sum = held.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        }
        let after = Usage::of_process();
        assert!(
            after.peak_memory_bytes > before.peak_memory_bytes + (8 << 20),
            "{sum}: {before:?} {after:?}"
        );
    }
}
