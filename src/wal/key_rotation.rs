//! The data key that a long-running process seals WAL with: one for many segments, and never for long.
//!
//! Wrapping a key costs an RSA operation for each recipient, and whoever reads unwraps each key once, so a segment's own
//! key would be paid for twice. A key that serves for ever would make one secret open a whole archive: it is drawn
//! anew after [`KEY_AGE_MAX`] or [`KEY_SEGMENTS_MAX`]. It is never written down; a restart draws another.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::repo::wal_object::WalKey;
use crate::repo::{Error, Keyring};

/// The keys of one process for one site, one after the other.
#[derive(Debug, Default)]
pub struct KeyRotation {
    current: Mutex<Option<Current>>,
}

#[derive(Debug)]
struct Current {
    key: WalKey,
    drawn_at: Instant,
    segments: u32,
}

/// How long a key is used.
const KEY_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How many files a key is used for: 64 GiB of WAL in segments of the usual size.
const KEY_SEGMENTS_MAX: u32 = 4096;

impl KeyRotation {
    /// Returns the key for one more file.
    pub fn next(&self, keyring: &Keyring, clock: &dyn Clock) -> Result<WalKey, Error> {
        let now = clock.monotonic();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = current.as_mut().filter(|current| !current.is_worn(now)) {
            current.segments += 1;
            return Ok(current.key.clone());
        }
        let key = WalKey::create(keyring)?;
        *current = Some(Current { key: key.clone(), drawn_at: now, segments: 1 });
        Ok(key)
    }
}

impl Current {
    fn is_worn(&self, now: Instant) -> bool {
        self.segments >= KEY_SEGMENTS_MAX || now.saturating_duration_since(self.drawn_at) >= KEY_AGE_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::clock::ManualClock;
    use crate::codec::SeededRandom;

    use super::*;

    #[test]
    fn a_key_is_drawn_anew_after_its_time_and_after_its_segments() {
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let keyring = Keyring::unencrypted(Arc::new(SeededRandom::new(1)));
        let keys = KeyRotation::default();
        let used = || keys.current.lock().unwrap().as_ref().unwrap().segments;
        for expected in 1..=KEY_SEGMENTS_MAX {
            keys.next(&keyring, &clock).unwrap();
            assert_eq!(used(), expected);
        }
        keys.next(&keyring, &clock).unwrap();
        assert_eq!(used(), 1, "another one after so many segments");
        clock.advance(KEY_AGE_MAX - Duration::from_secs(1));
        keys.next(&keyring, &clock).unwrap();
        assert_eq!(used(), 2);
        clock.advance(Duration::from_secs(1));
        keys.next(&keyring, &clock).unwrap();
        assert_eq!(used(), 1, "another one after a day");
    }
}
