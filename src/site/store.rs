//! The store of a site: every right that Walden needs there, tried with an object of its own.
//! A store that may not be deleted from is no failure: that is what an object lock is for.

use jiff::SignedDuration;

use crate::clock::Clock;
use crate::codec::{Random, RandomExt};
use crate::repo::layout::Layout;
use crate::site::item::{Item, describe};
use crate::storage::{self, Error, ErrorKind, Listing, Store};

/// Leases and retention compare the store's times with each other and with this host's; an hour would matter.
const SKEW_MAX: SignedDuration = SignedDuration::from_secs(60);

/// Tries a store; `place` is what messages call it.
pub async fn check_store(
    store: &dyn Store,
    layout: &Layout,
    place: &str,
    clock: &dyn Clock,
    random: &dyn Random,
) -> Vec<Item> {
    let before = clock.now();
    let seen = match storage::examine(store, &layout.probe(&random.array())).await {
        Ok(seen) => seen,
        Err(error) => {
            let detail = format!("{place}: {}", describe(&error));
            return vec![Item::failed("store", detail, hint_of(&error))];
        }
    };
    let skew = skew(seen.created_at.duration_since(before), clock.now().duration_since(before));
    vec![
        Item::ok("store", format!("{place}: an object was created and read back")),
        check_listing(&seen.listing),
        match (seen.capabilities.create_only, seen.capabilities.read_after_write) {
            (true, true) => Item::ok("store create-only", "a second put of a key is refused"),
            (false, _) => Item::failed(
                "store create-only",
                "a second put of a key replaces the object",
                "Two writers would overwrite each other; use a store with conditional puts, or switch them on there.",
            ),
            (_, false) => Item::failed(
                "store create-only",
                "a read does not see the put before it",
                "Use a store with strong consistency.",
            ),
        },
        if seen.deleted {
            Item::ok("store deletion", "the object was removed")
        } else {
            Item::ok("store deletion", "denied: this host can add, and remove nothing")
        },
        if skew.abs() <= SKEW_MAX {
            Item::ok("store clock", "the store's clock agrees with this host's")
        } else {
            let side = if skew.is_negative() { "behind" } else { "ahead of" };
            let detail = format!("the store's clock is {} s {side} this host's", skew.abs().as_secs());
            Item::warning("store clock", detail, "Set the clocks by NTP.")
        },
    ]
}

fn check_listing(listing: &Listing) -> Item {
    let name = "store listing";
    let refused = |error: &Error| {
        match error.kind() {
        ErrorKind::Denied => {
            "Give this host the right to list objects below the site's prefix: basebackups and WAL are found by it."
                .to_owned()
        }
        _ => hint_of(error),
    }
    };
    match listing {
        Listing::Shown => Item::ok(name, "the object is in the listing"),
        Listing::Missing => {
            let hint = "Use a store whose listings show what has been put before.";
            Item::failed(name, "the object is not in the listing", hint)
        }
        Listing::Refused(error) => Item::failed(name, describe(error), refused(error)),
    }
}

/// How far the store's clock is off, for an object that was created `stored` after the question, which took `took`.
fn skew(stored: SignedDuration, took: SignedDuration) -> SignedDuration {
    if stored.is_negative() {
        stored
    } else {
        // Any moment while the question was under way is right.
        (stored - took).max(SignedDuration::ZERO)
    }
}

fn hint_of(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Denied => {
            "Give this host the right to create, read and list objects below the site's prefix."
        }
        ErrorKind::Unreachable | ErrorKind::OutcomeUnknown => {
            "Look whether the store answers from this host, and whether url and endpoint are right."
        }
        ErrorKind::Full => "Make room in the store.",
        _ => "Correct [storage] in the configuration; the message says what is wrong.",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::SystemRandom;
    use crate::site::Status;
    use crate::storage::{Fault, Faulty, MemoryStore, ObjectKey, Rule, Verb};

    async fn failing(rules: Vec<Rule>) -> Vec<(String, Status)> {
        let store = Faulty::new(MemoryStore::new());
        rules.into_iter().for_each(|rule| store.inject(rule));
        let layout = Layout::new(ObjectKey::parse("main").unwrap());
        let clock = crate::clock::SystemClock;
        let items = check_store(&store, &layout, "memory://", &clock, &SystemRandom).await;
        assert!(items.iter().all(|item| item.status == Status::Ok || item.hint.is_some()));
        let bad = items.into_iter().filter(|item| item.status != Status::Ok);
        bad.map(|item| (item.name, item.status)).collect()
    }

    #[tokio::test]
    async fn each_missing_right_fails_its_own_line() {
        let denied = || Fault::Before(ErrorKind::Denied);
        assert_eq!(failing(Vec::new()).await, []);
        let store = vec![("store".to_owned(), Status::Failed)];
        assert_eq!(failing(vec![Rule::on(Verb::Create, denied())]).await, store);
        assert_eq!(failing(vec![Rule::on(Verb::Get, denied())]).await, store);
        assert_eq!(failing(vec![Rule::on(Verb::Delete, denied())]).await, []);
        let listing = vec![("store listing".to_owned(), Status::Failed)];
        for refusal in [denied(), Fault::Before(ErrorKind::Unreachable), Fault::Before(ErrorKind::Other)] {
            assert_eq!(failing(vec![Rule::on(Verb::List, refusal)]).await, listing);
        }
        let overwrites = failing(vec![Rule::on(Verb::Create, Fault::Overwrite)]).await;
        assert_eq!(overwrites, [("store create-only".to_owned(), Status::Failed)]);
    }

    #[tokio::test]
    async fn a_clock_that_is_off_is_seen_from_both_sides() {
        let layout = Layout::new(ObjectKey::parse("main").unwrap());
        for (now, words) in [("2000-01-01T00:00:00Z", "ahead of"), ("2100-01-01T00:00:00Z", "behind")] {
            let clock = ManualClock::new(now.parse::<Timestamp>().unwrap());
            let items = check_store(&MemoryStore::new(), &layout, "memory://", &clock, &SystemRandom).await;
            let item = items.last().unwrap();
            assert_eq!(item.status, Status::Warning);
            assert!(item.detail.contains(words), "{}", item.detail);
        }
        let store_clock = ManualClock::new("2026-11-20T11:00:00Z".parse().unwrap());
        let store = MemoryStore::with_clock(Arc::new(store_clock));
        for (here, said) in [
            ("10:00:00", Some("the store's clock is 3600 s ahead of this host's")),
            ("12:00:00", Some("the store's clock is 3600 s behind this host's")),
            // As much as hosts without NTP are apart after a while, and nothing that a lease or retention minds.
            ("10:59:00", None),
            ("11:01:00", None),
            ("10:58:59", Some("the store's clock is 61 s ahead of this host's")),
            ("11:01:01", Some("the store's clock is 61 s behind this host's")),
        ] {
            let clock = ManualClock::new(format!("2026-11-20T{here}Z").parse().unwrap());
            let items = check_store(&store, &layout, "memory://", &clock, &SystemRandom).await;
            let item = items.last().unwrap();
            match said {
                Some(said) => {
                    assert_eq!((item.status, &*item.detail), (Status::Warning, said));
                    assert_eq!(item.hint.as_deref(), Some("Set the clocks by NTP."));
                }
                None => {
                    let agrees = "the store's clock agrees with this host's";
                    assert_eq!((item.status, &*item.detail), (Status::Ok, agrees), "{here}");
                }
            }
        }
        let seconds = SignedDuration::from_secs;
        assert_eq!(skew(seconds(3), seconds(5)), seconds(0));
        assert_eq!(skew(seconds(9), seconds(5)), seconds(4));
        assert_eq!(skew(seconds(-2), seconds(5)), seconds(-2));
    }
}
