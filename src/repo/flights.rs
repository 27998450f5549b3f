//! One fetch at a time for one thing, whoever asks.
//!
//! Who wants several things claims those that nobody fetches, fetches them, and comes back for the others: so nobody
//! who waits holds anything that somebody waits for. A claim ends when it is dropped, so a reader that is killed or
//! fails hands its things to whoever waits. Who is waited for does not wait long for a fetch that nobody waits for:
//! that is taken over, at once while it stands behind others, or after a while, at the price of a second request. Where
//! somebody else sees to it that there is no second one, so is a fetch of an equal.

use std::collections::HashMap;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Sleep;

use crate::repo::transfers::Urgency;

/// How long one waits for a fetch that may be taken over from: more than the largest request takes at 10 MB/s.
const TAKE_OVER_AFTER: Duration = Duration::from_millis(500);

/// The fetches under way.
#[derive(Debug)]
pub struct Flights<K> {
    busy: Mutex<Busy<K>>,
    landed: Notify,
    takes_over_equals: bool,
}

#[derive(Debug)]
struct Busy<K> {
    flights: HashMap<K, Flight>,
    claims: u64,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    claim: u64,
    urgency: Urgency,
    /// Whether the request that brings it is on its way.
    is_out: bool,
}

/// What only the holder fetches, until it drops this.
#[derive(Debug)]
pub struct Claim<K: Copy + Eq + Hash> {
    flights: Arc<Flights<K>>,
    id: u64,
    keys: Vec<K>,
}

/// What came of trying to claim.
struct Attempt<K> {
    id: u64,
    taken: Vec<K>,
    /// Whether something was left to a fetch that may be taken over from.
    outranks: bool,
}

impl<K: Copy + Eq + Hash> Flights<K> {
    /// Creates the table.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::with(false))
    }

    /// Creates a table in which who is waited for takes over from one as urgent too, after a while.
    ///
    /// For things of which those who fetch them below see to it that each is fetched once. There each has a deadline, which
    /// is not to begin anew for one after the other of those who wait here.
    pub fn taking_over_equals() -> Arc<Self> {
        Arc::new(Self::with(true))
    }

    fn with(takes_over_equals: bool) -> Self {
        let busy = Mutex::new(Busy { flights: HashMap::new(), claims: 0 });
        Self { busy, landed: Notify::new(), takes_over_equals }
    }

    /// Claims those of `keys` that nobody fetches, in their order; waits until there is at least one.
    ///
    /// The caller looks again at what is missing once it holds the claim: the wait may have cured it.
    pub async fn claim(self: &Arc<Self>, keys: &[K], urgency: Urgency) -> Claim<K> {
        let mut patience: Option<Pin<Box<Sleep>>> = None;
        let mut is_overdue = false;
        loop {
            let mut landed = std::pin::pin!(self.landed.notified());
            // Registered before looking, or a flight that lands in between would not wake us.
            landed.as_mut().enable();
            let Attempt { id, taken, outranks } = self.attempt(keys, urgency, is_overdue);
            if !taken.is_empty() || keys.is_empty() {
                return Claim { flights: self.clone(), id, keys: taken };
            }
            if outranks {
                let patience = patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(TAKE_OVER_AFTER)));
                tokio::select! {
                    () = landed => {}
                    () = patience.as_mut() => is_overdue = true,
                }
            } else {
                landed.await;
            }
        }
    }

    fn attempt(&self, keys: &[K], urgency: Urgency, is_overdue: bool) -> Attempt<K> {
        let mut busy = self.lock();
        let id = busy.claims;
        busy.claims += 1;
        let (mut taken, mut outranks) = (Vec::new(), false);
        for key in keys {
            let is_free = match busy.flights.get(key) {
                None => true,
                Some(flight) if self.outranks(urgency, flight.urgency) => {
                    outranks = true;
                    // What still stands behind others comes sooner by a request of one's own.
                    is_overdue || (flight.urgency < urgency && !flight.is_out)
                }
                Some(_) => false,
            };
            if is_free {
                busy.flights.insert(*key, Flight { claim: id, urgency, is_out: false });
                taken.push(*key);
            }
        }
        Attempt { id, taken, outranks }
    }

    /// Tells whether one may take over from another, sooner or later.
    fn outranks(&self, urgency: Urgency, other: Urgency) -> bool {
        let is_equal = urgency == Urgency::Foreground && other == urgency;
        other < urgency || (self.takes_over_equals && is_equal)
    }

    /// Ends the flights of a claim, but for those that somebody took over.
    fn land(&self, claim: u64, keys: &[K]) {
        if keys.is_empty() {
            return;
        }
        let mut busy = self.lock();
        for key in keys {
            if busy.flights.get(key).is_some_and(|flight| flight.claim == claim) {
                busy.flights.remove(key);
            }
        }
        drop(busy);
        self.landed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Busy<K>> {
        self.busy.lock().expect("no holder of this lock panics")
    }

    /// Tells whether nothing is being fetched.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.lock().flights.is_empty()
    }
}

impl<K: Copy + Eq + Hash> Claim<K> {
    /// Returns what is claimed, in the order in which it was asked for.
    pub fn keys(&self) -> &[K] {
        &self.keys
    }

    /// Takes note that the request for what is claimed is on its way.
    pub fn goes_out(&self) {
        let mut busy = self.flights.lock();
        for key in &self.keys {
            if let Some(flight) = busy.flights.get_mut(key).filter(|flight| flight.claim == self.id) {
                flight.is_out = true;
            }
        }
    }

    /// Lets go of what has come already, so that nobody waits for the rest.
    pub fn land(&mut self, mut has_come: impl FnMut(&K) -> bool) {
        let landed: Vec<K> = self.keys.extract_if(.., |key| has_come(key)).collect();
        self.flights.land(self.id, &landed);
    }

    /// Parts with the first `count` of what is claimed.
    pub fn split_front(&mut self, count: usize) -> Self {
        let keys = self.keys.drain(..count.min(self.keys.len())).collect();
        Self { flights: self.flights.clone(), id: self.id, keys }
    }
}

impl<K: Copy + Eq + Hash> Drop for Claim<K> {
    fn drop(&mut self) {
        self.flights.land(self.id, &self.keys);
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    const NOW: Urgency = Urgency::Foreground;

    #[tokio::test]
    async fn what_is_free_is_claimed_and_the_rest_waited_for_with_empty_hands() {
        let flights: Arc<Flights<u32>> = Flights::new();
        let middle = flights.claim(&[2], NOW).await;
        let wide = flights.claim(&[1, 2, 3], NOW).await;
        assert_eq!(wide.keys(), [1, 3]);
        let mut rest = Box::pin(flights.claim(&[2], NOW));
        assert!(poll!(rest.as_mut()).is_pending());
        drop(wide);
        assert!(poll!(rest.as_mut()).is_pending());
        drop(middle);
        let rest = rest.await;
        assert_eq!(rest.keys(), [2]);
        drop(rest);
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn what_has_come_is_let_go_before_the_rest() {
        let flights: Arc<Flights<u32>> = Flights::new();
        let mut claim = flights.claim(&[1, 2, 3, 4], NOW).await;
        let front = claim.split_front(2);
        assert_eq!((front.keys(), claim.keys()), (&[1, 2][..], &[3, 4][..]));
        drop(front);
        claim.land(|key| *key == 4);
        let others = flights.claim(&[1, 2, 3, 4], NOW).await;
        assert_eq!(others.keys(), [1, 2, 4]);
        drop((claim, others));
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn a_reader_that_gives_up_frees_what_it_claimed_and_one_that_waits_leaves_nothing() {
        let flights: Arc<Flights<u32>> = Flights::new();
        let abandoned = tokio::spawn({
            let flights = flights.clone();
            async move {
                let _claim = flights.claim(&[1], NOW).await;
                std::future::pending::<()>().await;
            }
        });
        while flights.is_idle() {
            tokio::task::yield_now().await;
        }
        let mut waits = Box::pin(flights.claim(&[1], NOW));
        assert!(poll!(waits.as_mut()).is_pending());
        drop(waits);
        abandoned.abort();
        assert!(abandoned.await.is_err());
        assert_eq!(flights.claim(&[1], NOW).await.keys(), [1]);
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn who_is_waited_for_takes_over_what_nobody_waits_for_and_nothing_else() {
        let flights: Arc<Flights<u32>> = Flights::new();
        let slow = flights.claim(&[1, 2], Urgency::Background).await;
        slow.goes_out();
        let equal = flights.claim(&[3], NOW).await;
        let taken = flights.claim(&[1, 3], NOW).await;
        assert_eq!(taken.keys(), [1]);
        // The one who was overtaken ends without ending the flight of who came after.
        drop(slow);
        let mut again = Box::pin(flights.claim(&[1], Urgency::Background));
        assert!(poll!(again.as_mut()).is_pending());
        assert_eq!(flights.claim(&[2], Urgency::Background).await.keys(), [2]);
        drop(taken);
        assert_eq!(again.await.keys(), [1]);
        drop(equal);
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn a_fetch_that_has_not_asked_yet_is_taken_over_at_once() {
        let flights: Arc<Flights<u32>> = Flights::new();
        let mut queued = flights.claim(&[1, 2, 3], Urgency::Background).await;
        let asked = queued.split_front(1);
        asked.goes_out();
        let mut waits = Box::pin(flights.claim(&[1], NOW));
        assert!(poll!(waits.as_mut()).is_pending(), "this one is on its way");
        let ahead = flights.claim(&[2], Urgency::Ahead).await;
        let taken = flights.claim(&[2, 3], NOW).await;
        assert_eq!((ahead.keys(), taken.keys()), (&[2][..], &[2, 3][..]));
        // It goes out without what it has lost, and comes to its end without ending the others.
        queued.goes_out();
        drop((queued, ahead));
        let mut again = Box::pin(flights.claim(&[3], Urgency::Background));
        assert!(poll!(again.as_mut()).is_pending());
        drop((asked, taken));
        assert_eq!((waits.await.keys(), again.await.keys()), (&[1][..], &[3][..]));
        assert!(flights.is_idle());
    }

    #[tokio::test]
    async fn where_nobody_is_to_wait_for_an_equal_s_deadline_equals_are_taken_over_from() {
        let flights: Arc<Flights<u32>> = Flights::taking_over_equals();
        let claims = [flights.claim(&[1], NOW).await, flights.claim(&[1], NOW).await];
        let [background, ahead] = [Urgency::Background, Urgency::Ahead].map(|urgency| {
            let flights = flights.clone();
            tokio::spawn(async move { flights.claim(&[1], urgency).await.keys().to_vec() })
        });
        let third = flights.claim(&[1], NOW).await;
        assert!(!background.is_finished() && !ahead.is_finished(), "nobody waits for these");
        drop(claims);
        assert!(!flights.is_idle(), "the last has it");
        drop(third);
        assert_eq!((background.await.unwrap(), ahead.await.unwrap()), (vec![1], vec![1]));
        assert!(flights.is_idle());
    }
}
