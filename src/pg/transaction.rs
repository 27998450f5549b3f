//! Transaction numbers, and the server's way to tell time.
//!
//! Both are as they stand in files; what they mean for a recovery target is `catalog`'s.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

/// A transaction's number as tuples and WAL carry it, which wraps around; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(pub u32);

/// A transaction's number with its epoch, which never wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FullTransactionId(pub u64);

impl TransactionId {
    /// No transaction.
    pub const INVALID: Self = Self(0);
}

impl fmt::Display for TransactionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// As `pg_controldata` shows it, epoch and number.
impl fmt::Display for FullTransactionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// Seconds from 1970 to 2000, where the server's timestamps begin.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// Reads a `TimestampTz`: microseconds since 2000. None for what no calendar reaches.
pub(super) fn timestamp_from_microseconds(microseconds: i64) -> Option<Timestamp> {
    let epoch = Timestamp::from_second(POSTGRES_EPOCH_SECONDS).ok()?;
    epoch.checked_add(SignedDuration::from_micros(microseconds)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn time_begins_in_2000() {
        let text = |microseconds| timestamp_from_microseconds(microseconds).map(|t| t.to_string());
        assert_eq!(text(0).as_deref(), Some("2000-01-01T00:00:00Z"));
        assert_eq!(text(848_546_079_921_028).as_deref(), Some("2026-11-21T03:14:39.921028Z"));
        assert_eq!(text(i64::MAX), None);
    }

    #[test]
    fn a_full_number_shows_its_epoch() {
        assert_eq!(FullTransactionId(2 << 32 | 740).to_string(), "2:740");
    }

    proptest! {
        #[test]
        fn any_number_is_a_time_or_none(microseconds: i64) {
            let _ = timestamp_from_microseconds(microseconds);
        }
    }
}
