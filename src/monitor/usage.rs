//! What this process has taken of the machine so far: processor time and memory.
//!
//! The kernel counts; nothing is sampled. Deliberately absent: what its children took.

use std::time::Duration;

/// What this process has taken so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time of all threads, in user mode and in the kernel.
    pub cpu: Duration,
    /// The most memory it had at a time.
    pub memory_bytes_peak: u64,
}

impl Usage {
    /// Asks the kernel.
    #[expect(unsafe_code, reason = "getrusage fills in a structure of ours")]
    pub fn now() -> Self {
        // SAFETY: all bytes zero are a valid rusage, getrusage writes nothing but it, and cannot fail for ourselves.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            usage
        };
        let time = |time: libc::timeval| {
            let (seconds, micros) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_usec));
            Duration::from_secs(seconds.unwrap_or(0)) + Duration::from_micros(micros.unwrap_or(0))
        };
        // Linux counts it in KiB.
        let memory_bytes_peak = u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10;
        Self { cpu: time(usage.ru_utime) + time(usage.ru_stime), memory_bytes_peak }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_touched_has_been_taken() {
        let before = Usage::now();
        assert!(before.memory_bytes_peak > 0);
        let touched = vec![1_u8; (before.memory_bytes_peak as usize).max(64 << 20)];
        assert!(touched.iter().map(|byte| u64::from(*byte)).sum::<u64>() > 0);
        let after = Usage::now();
        assert!(after.memory_bytes_peak > before.memory_bytes_peak, "{before:?}, {after:?}");
        assert!(after.cpu >= before.cpu);
    }
}
