//! What may be under way for one mount: requests, the bytes they bring, and the threads that open them.
//!
//! Everybody who fetches file content stands at one gate. It lets in who is waited for before who is not, and keeps a
//! part free of those nobody waits for, so that a page asked for now finds a place at once. A request gives back its
//! place when it is answered, and its bytes when they were handed on: memory is bounded by what comes out, not by what
//! was asked for. Deliberately absent: rates; a hydrator that is to be slow asks slowly.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::oneshot;

use crate::codec::CpuPool;

/// How much somebody waits for what is fetched; the later go before the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Nobody does: all the rest is to become local some day.
    Background,
    /// Somebody will in a moment: it follows what is being read.
    Ahead,
    /// Somebody does.
    Foreground,
}

/// Requests under way at once: at 20 ms each they fetch 1200 scattered chunks a second, and a connection apiece is what
/// stores and their proxies take without a word.
pub const REQUESTS_MAX: usize = 24;

/// Stored and decoded bytes under way at once, three eighths of what a mount may take in all: eight requests of the
/// largest kind, or half of it for six to twelve parts of a hydrator, by how they compress.
pub const BYTES_MAX: u64 = 96 << 20;

/// The requests of one mount; clones share the bounds.
#[derive(Debug, Clone)]
pub struct Transfers {
    gate: Arc<Gate>,
    pool: Option<CpuPool>,
}

/// Leave for one request and the bytes it brings, until this is dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
    bytes: u64,
    is_asking: bool,
}

#[derive(Debug)]
struct Gate {
    requests_max: usize,
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: usize,
    bytes: u64,
    /// Who waits, in the order of [`Urgency`], each with the bytes it needs room for.
    waiting: [VecDeque<Waiter>; 3],
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    admitted: oneshot::Sender<Permit>,
}

impl Urgency {
    const FALLING: [Self; 3] = [Self::Foreground, Self::Ahead, Self::Background];

    /// Returns how many quarters of what there is may be taken when this one comes in.
    fn quarters(self) -> u64 {
        match self {
            Self::Background => 2,
            Self::Ahead => 3,
            Self::Foreground => 4,
        }
    }
}

impl Transfers {
    /// Opens chunks on the threads of `pool`.
    pub fn new(pool: CpuPool) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    /// Opens chunks on threads of its own, one for each core.
    pub fn per_core() -> Self {
        Self::new(CpuPool::per_core())
    }

    /// Bounds what is under way.
    fn bounded(requests_max: usize, bytes_max: u64) -> Self {
        let gate = Gate { requests_max: requests_max.max(1), bytes_max, state: Mutex::default() };
        Self { gate: Arc::new(gate), pool: None }
    }

    /// Returns the threads that open chunks, where there are any.
    pub(crate) fn pool(&self) -> Option<&CpuPool> {
        self.pool.as_ref()
    }

    /// Waits until a request that brings `bytes`, stored and decoded, may go out.
    ///
    /// One that is larger than its share goes as soon as there is nothing else of its kind or before it.
    pub(crate) async fn admit(&self, urgency: Urgency, bytes: u64) -> Permit {
        let waiting = {
            let mut state = self.gate.lock();
            let bytes = bytes.min(self.gate.bytes_share(urgency));
            state.forget_those_who_left();
            if state.nobody_before(urgency) && self.gate.has_room(&state, urgency, bytes) {
                return self.gate.permit(&mut state, bytes);
            }
            let (admitted, waiting) = oneshot::channel();
            state.waiting[urgency as usize].push_back(Waiter { bytes, admitted });
            waiting
        };
        waiting.await.expect("the gate keeps who waits until they are admitted")
    }
}

impl Default for Transfers {
    /// The usual bounds; chunks are opened by whoever asks for them.
    fn default() -> Self {
        Self::bounded(REQUESTS_MAX, BYTES_MAX)
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    fn bytes_share(&self, urgency: Urgency) -> u64 {
        self.bytes_max / 4 * urgency.quarters()
    }

    fn has_room(&self, state: &State, urgency: Urgency, bytes: u64) -> bool {
        // At least one of each kind, or a gate of one place would keep some out for ever.
        let requests_share = (self.requests_max * urgency.quarters() as usize / 4).max(1);
        state.requests < requests_share && state.bytes + bytes <= self.bytes_share(urgency)
    }

    fn permit(self: &Arc<Self>, state: &mut State, bytes: u64) -> Permit {
        state.requests += 1;
        state.bytes += bytes;
        Permit { gate: self.clone(), bytes, is_asking: true }
    }

    /// Lets in whom there is room for now: nobody passes one who is more urgent.
    fn admit_waiting(self: &Arc<Self>) {
        let mut admitted = Vec::new();
        let mut state = self.lock();
        state.forget_those_who_left();
        'kinds: for urgency in Urgency::FALLING {
            while let Some(first) = state.waiting[urgency as usize].front() {
                if !self.has_room(&state, urgency, first.bytes) {
                    break 'kinds;
                }
                if let Some(waiter) = state.waiting[urgency as usize].pop_front() {
                    let permit = self.permit(&mut state, waiter.bytes);
                    admitted.push((waiter.admitted, permit));
                }
            }
        }
        drop(state);
        for (admitted, permit) in admitted {
            // Who left in this moment hands the permit back, and that lets in the next.
            let _ = admitted.send(permit);
        }
    }
}

impl State {
    fn forget_those_who_left(&mut self) {
        for waiting in &mut self.waiting {
            waiting.retain(|waiter| !waiter.admitted.is_closed());
        }
    }

    fn nobody_before(&self, urgency: Urgency) -> bool {
        self.waiting[urgency as usize..].iter().all(VecDeque::is_empty)
    }
}

impl Permit {
    /// Gives back the place of the request, which was answered; its bytes still count.
    pub(crate) fn answered(&mut self) {
        if std::mem::take(&mut self.is_asking) {
            self.gate.lock().requests -= 1;
            self.gate.admit_waiting();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.gate.lock();
            state.requests -= usize::from(self.is_asking);
            state.bytes -= self.bytes;
        }
        self.gate.admit_waiting();
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    /// Requests and bytes that are under way.
    fn under_way(transfers: &Transfers) -> (usize, u64) {
        let state = transfers.gate.lock();
        (state.requests, state.bytes)
    }

    #[tokio::test]
    async fn who_is_waited_for_goes_first_and_finds_a_place_kept_free() {
        let transfers = Transfers::bounded(4, 1000);
        let first = transfers.admit(Urgency::Background, 1).await;
        let second = transfers.admit(Urgency::Background, 1).await;
        let mut background = Box::pin(transfers.admit(Urgency::Background, 1));
        assert!(poll!(background.as_mut()).is_pending(), "half of it is theirs");
        let ahead = transfers.admit(Urgency::Ahead, 1).await;
        let mut more_ahead = Box::pin(transfers.admit(Urgency::Ahead, 1));
        assert!(poll!(more_ahead.as_mut()).is_pending(), "three quarters");
        let page = transfers.admit(Urgency::Foreground, 1).await;
        let mut next_page = Box::pin(transfers.admit(Urgency::Foreground, 1));
        assert!(poll!(next_page.as_mut()).is_pending(), "all four");

        drop(first);
        assert!(poll!(more_ahead.as_mut()).is_pending());
        let next_page = next_page.await;
        assert_eq!(under_way(&transfers), (4, 4));
        drop((second, page));
        let more_ahead = more_ahead.await;
        assert!(poll!(background.as_mut()).is_pending());
        drop((ahead, next_page));
        let background = background.await;
        drop((more_ahead, background));
        assert_eq!(under_way(&transfers), (0, 0));
    }

    #[tokio::test]
    async fn an_answer_frees_the_place_and_handing_it_on_frees_its_bytes() {
        let transfers = Transfers::bounded(2, 100);
        let mut first = transfers.admit(Urgency::Foreground, 60).await;
        let mut second = transfers.admit(Urgency::Foreground, 40).await;
        let mut third = Box::pin(transfers.admit(Urgency::Foreground, 10));
        assert!(poll!(third.as_mut()).is_pending());
        first.answered();
        first.answered();
        second.answered();
        assert!(poll!(third.as_mut()).is_pending(), "there is no room for its bytes yet");
        assert_eq!(under_way(&transfers), (0, 100));
        drop(second);
        assert_eq!(third.await.bytes, 10);
        drop(first);
        assert_eq!(under_way(&transfers), (0, 0));
    }

    #[tokio::test]
    async fn what_is_larger_than_all_there_is_goes_alone() {
        let transfers = Transfers::bounded(4, 100);
        let small = transfers.admit(Urgency::Ahead, 1).await;
        let mut huge = Box::pin(transfers.admit(Urgency::Ahead, u64::MAX));
        assert!(poll!(huge.as_mut()).is_pending());
        drop(small);
        let huge = huge.await;
        assert_eq!(under_way(&transfers), (1, 75));
        drop(huge);
        assert_eq!(under_way(&transfers), (0, 0));
    }

    #[tokio::test]
    async fn who_gives_up_stands_in_nobody_s_way_and_keeps_nothing() {
        let transfers = Transfers::bounded(1, 100);
        let held = transfers.admit(Urgency::Foreground, 1).await;
        let mut leaves = Box::pin(transfers.admit(Urgency::Foreground, 1));
        let mut leaves_late = Box::pin(transfers.admit(Urgency::Foreground, 1));
        let mut stays = Box::pin(transfers.admit(Urgency::Background, 1));
        assert!(poll!(leaves.as_mut()).is_pending());
        assert!(poll!(leaves_late.as_mut()).is_pending());
        assert!(poll!(stays.as_mut()).is_pending());
        drop(leaves);
        drop(held);
        // Admitted by now, without having looked.
        drop(leaves_late);
        drop(stays.await);
        assert_eq!(under_way(&transfers), (0, 0));
    }
}
