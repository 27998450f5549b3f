//! What is known of superseding segments without asking: listings that were made anyway, and a recovery's plan.
//!
//! Nearly no segment is ever superseded, and to ask before each read would double the requests of a recovery. So what
//! a listing showed is remembered: for moments where it was a listing, for good where a recovery goes by its plan.
//! *Not known* means that the store is asked.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::pg::{TimelineId, WalSegmentName};
use crate::repo::id::ClusterId;

/// The segments of one stretch of a timeline that are superseded.
#[derive(Debug, Clone)]
pub struct ForcedListing {
    /// The cluster.
    pub cluster: ClusterId,
    /// The timeline of all the segments.
    pub timeline: TimelineId,
    /// The stretch that was looked at.
    pub segments: RangeInclusive<WalSegmentName>,
    /// Whether the last of them was not looked at to its end.
    pub but_last: bool,
    /// The superseded ones.
    pub forced: Vec<WalSegmentName>,
    /// When the listing began; none where it is to be believed for good.
    pub listed_at: Option<Instant>,
}

/// What is known of a site, by all who share an open repository.
#[derive(Debug, Default)]
pub struct ForcedIndex {
    listings: Mutex<VecDeque<ForcedListing>>,
}

/// How long a listing is believed. A reader that goes on for long asks so often, beside a read that is under way anyway;
/// whoever forces a segment and then starts something again is not faster.
pub const LISTING_AGE_MAX: Duration = Duration::from_secs(2);
/// Listings kept: the plan of a recovery has one for each timeline, a scan reads some places side by side.
const LISTINGS_MAX: usize = 64;

impl ForcedIndex {
    /// Remembers a listing.
    pub fn note(&self, listing: ForcedListing) {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.retain(|known| !known.is_of_the_same(&listing));
        listings.push_front(listing);
        listings.truncate(LISTINGS_MAX);
    }

    /// Tells whether a segment is superseded, where that is known.
    pub fn is_forced(&self, cluster: ClusterId, segment: WalSegmentName, now: Instant) -> Option<bool> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let tells = |listing: &&ForcedListing| {
            let is_fresh = |at: Instant| now.saturating_duration_since(at) < LISTING_AGE_MAX;
            listing.cluster == cluster
                && listing.timeline == segment.timeline()
                && listing.segments.contains(&segment)
                && !(listing.but_last && *listing.segments.end() == segment)
                && listing.listed_at.is_none_or(is_fresh)
        };
        listings.iter().find(tells).map(|listing| listing.forced.contains(&segment))
    }
}

impl ForcedListing {
    fn is_of_the_same(&self, other: &Self) -> bool {
        (self.cluster, self.timeline, &self.segments) == (other.cluster, other.timeline, &other.segments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> WalSegmentName {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    #[test]
    fn a_listing_tells_of_its_stretch_for_moments_and_a_plan_for_good() {
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let other: ClusterId = "7301234567890123457-16".parse().unwrap();
        let index = ForcedIndex::default();
        let now = Instant::now();
        assert_eq!(index.is_forced(cluster, name(3), now), None);
        let listing = ForcedListing {
            cluster,
            timeline: TimelineId::FIRST,
            segments: name(3)..=name(9),
            but_last: true,
            forced: vec![name(5)],
            listed_at: Some(now),
        };
        index.note(listing.clone());
        assert_eq!(index.is_forced(cluster, name(3), now), Some(false));
        assert_eq!(index.is_forced(cluster, name(5), now), Some(true));
        for (cluster, segment) in
            [(cluster, name(2)), (cluster, name(9)), (cluster, name(10)), (other, name(5))]
        {
            assert_eq!(index.is_forced(cluster, segment, now), None, "{segment}");
        }
        assert_eq!(index.is_forced(cluster, name(5), now + LISTING_AGE_MAX), None);
        // Of two the later one tells.
        index.note(ForcedListing { forced: vec![name(9)], but_last: false, listed_at: None, ..listing });
        let late = now + LISTING_AGE_MAX * 1000;
        assert_eq!(index.is_forced(cluster, name(5), late), Some(false));
        assert_eq!(index.is_forced(cluster, name(9), late), Some(true));
    }
}
