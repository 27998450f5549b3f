//! Cheap random fractions from a seed, for the spread of retries and for the faults of tests.
//!
//! SplitMix64 (Steele, Lea and Flood, 2014). Nothing secret and nothing unique may come from here.

use std::sync::atomic::{AtomicU64, Ordering};

/// A source of fractions that is shared without a lock; one seed gives one sequence.
#[derive(Debug)]
pub(super) struct Jitter(AtomicU64);

impl Jitter {
    /// Starts the sequence of a seed.
    pub(super) fn seeded(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Draws a number from 0, inclusive, to 1, exclusive.
    pub(super) fn fraction(&self) -> f64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The upper 53 bits, which a double holds exactly.
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_in_range_spread_and_repeatable() {
        let draw = |seed| {
            let jitter = Jitter::seeded(seed);
            std::iter::repeat_with(|| jitter.fraction()).take(1000).collect::<Vec<_>>()
        };
        let fractions = draw(1);
        assert!(fractions.iter().all(|fraction| (0.0..1.0).contains(fraction)));
        let mean = fractions.iter().sum::<f64>() / 1000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
        assert_eq!(fractions, draw(1));
        assert_ne!(fractions, draw(2));
    }
}
