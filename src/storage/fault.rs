//! A store that fails as told, for tests.
//!
//! [`Faulty`] holds an ordered list of rules. A call takes the first rule that matches it, is not waiting
//! for an earlier match and is not used up; that rule's [`Fault`] decides what happens. Without a matching
//! rule the call goes through. [`Faulty::seeded`] instead fails calls at random from a seed: the same seed
//! and calls fail the same way.
//!
//! Deliberately absent: a way to reach this from configuration. No user's store is faulty on purpose.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::error::{Error, ErrorKind, Verb};
use super::jitter::Jitter;
use super::key::ObjectKey;
use super::store::{Folder, ObjectMeta, Store};

/// What a faulty store does to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Fails without doing anything.
    Before(ErrorKind),
    /// Does it and fails: the answer was lost. A create says `OutcomeUnknown` by
    /// `After(ErrorKind::OutcomeUnknown)`.
    After(ErrorKind),
    /// Does nothing and never answers.
    HangBefore,
    /// Does it and never answers.
    HangAfter,
    /// Waits, then does it.
    Delay(Duration),
    /// Returns only so many bytes of a body, as if they were all: a store that lies.
    TruncateBody(usize),
    /// Returns a body with all bits of the byte at this position flipped; past the end, the last one.
    FlipByte(usize),
    /// Creates even though the key is taken, as stores do that ignore the condition (failure 42).
    Overwrite,
}

/// Which calls a fault befalls.
#[derive(Clone)]
pub struct Rule {
    verb: Option<Verb>,
    matches: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    skip: usize,
    times: usize,
    fault: Fault,
}

impl Rule {
    /// Makes every call fail that way.
    pub fn always(fault: Fault) -> Self {
        Self { verb: None, matches: Arc::new(|_| true), skip: 0, times: usize::MAX, fault }
    }

    /// Makes every call of one verb fail that way.
    pub fn on(verb: Verb, fault: Fault) -> Self {
        Self { verb: Some(verb), ..Self::always(fault) }
    }

    /// Narrows the rule to keys (of listings: prefixes) that contain `part`.
    pub fn key(self, part: &str) -> Self {
        let part = part.to_owned();
        self.key_where(move |key| key.contains(&part))
    }

    /// Narrows the rule to keys (of listings: prefixes) that satisfy `matches`.
    pub fn key_where(self, matches: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { matches: Arc::new(matches), ..self }
    }

    /// Lets the first `calls` matching calls through.
    pub fn skip(self, calls: usize) -> Self {
        Self { skip: calls, ..self }
    }

    /// Ends the rule after so many faults.
    pub fn times(self, faults: usize) -> Self {
        Self { times: faults, ..self }
    }

    fn is_for(&self, verb: Verb, key: &str) -> bool {
        self.times > 0 && self.verb.is_none_or(|wanted| wanted == verb) && (self.matches)(key)
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { verb, skip, times, fault, .. } = self;
        write!(f, "Rule({verb:?}, skip {skip}, times {times}, {fault:?})")
    }
}

/// A store that fails as told; its clones share the rules.
#[derive(Debug, Clone)]
pub struct Faulty<S> {
    inner: S,
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    random: Option<Random>,
    faults: usize,
}

#[derive(Debug)]
struct Random {
    source: Jitter,
    share: f64,
}

impl<S> Faulty<S> {
    /// Passes every call on until rules are added.
    pub fn new(inner: S) -> Self {
        Self { inner, plan: Arc::default() }
    }

    /// Fails about `share` (0 to 1) of the calls, before or after their effect, as a bad network does.
    pub fn seeded(inner: S, seed: u64, share: f64) -> Self {
        let random = Some(Random { source: Jitter::seeded(seed), share });
        Self { inner, plan: Arc::new(Mutex::new(Plan { random, ..Plan::default() })) }
    }

    /// Adds a rule behind those there are.
    pub fn inject(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    /// Ends all faults.
    pub fn heal(&self) {
        let mut plan = self.lock();
        plan.rules.clear();
        plan.random = None;
    }

    /// Returns how many calls met a fault.
    pub fn faults(&self) -> usize {
        self.lock().faults
    }

    /// Returns the store below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().expect("no holder of this lock panics")
    }
}

impl Plan {
    fn next(&mut self, verb: Verb, key: &str) -> Option<Fault> {
        let fault = self.scripted(verb, key).or_else(|| self.drawn(verb));
        self.faults += usize::from(fault.is_some());
        fault
    }

    fn scripted(&mut self, verb: Verb, key: &str) -> Option<Fault> {
        for rule in &mut self.rules {
            if !rule.is_for(verb, key) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            rule.times -= 1;
            return Some(rule.fault.clone());
        }
        None
    }

    fn drawn(&mut self, verb: Verb) -> Option<Fault> {
        let Random { source, share } = self.random.as_ref()?;
        if source.fraction() >= *share {
            return None;
        }
        let lost = if verb == Verb::Create { ErrorKind::OutcomeUnknown } else { ErrorKind::Unreachable };
        Some(if source.fraction() < 0.5 { Fault::Before(lost) } else { Fault::After(lost) })
    }
}

impl<S: Store> Faulty<S> {
    /// Runs a call under the fault that is due.
    async fn call<T>(
        &self,
        verb: Verb,
        key: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> (Result<T, Error>, Option<Fault>) {
        let fault = self.lock().next(verb, key);
        let outcome = match fault {
            Some(Fault::Before(kind)) => Err(error(kind, verb, key)),
            Some(Fault::HangBefore) => std::future::pending().await,
            Some(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                work.await
            }
            _ => work.await,
        };
        match fault {
            Some(Fault::After(kind)) => (outcome.and_then(|_| Err(error(kind, verb, key))), fault),
            Some(Fault::HangAfter) => std::future::pending().await,
            _ => (outcome, fault),
        }
    }

    async fn body(
        &self,
        verb: Verb,
        key: &ObjectKey,
        work: impl Future<Output = Result<Bytes, Error>>,
    ) -> Result<Bytes, Error> {
        let (outcome, fault) = self.call(verb, key.as_str(), work).await;
        let body = outcome?;
        Ok(match fault {
            Some(Fault::TruncateBody(length)) => body.slice(..length.min(body.len())),
            Some(Fault::FlipByte(position)) => flipped(&body, position),
            _ => body,
        })
    }
}

fn flipped(body: &Bytes, position: usize) -> Bytes {
    let mut body = body.to_vec();
    let last = body.len().saturating_sub(1);
    if let Some(byte) = body.get_mut(position.min(last)) {
        *byte = !*byte;
    }
    body.into()
}

/// Makes an error of a kind, as a store would.
fn error(kind: ErrorKind, verb: Verb, key: &str) -> Error {
    let key = key.to_owned();
    let source = || Arc::new(std::io::Error::other("injected fault"));
    match kind {
        ErrorKind::NotFound => Error::NotFound { key },
        ErrorKind::AlreadyExists => Error::AlreadyExists { key },
        ErrorKind::Unreachable => Error::Unreachable { verb, key, reason: None, source: Some(source()) },
        ErrorKind::Denied => Error::Denied { verb, key, source: Some(source()) },
        ErrorKind::Truncated => Error::Truncated { key, expected: 1, received: 0 },
        ErrorKind::TooLarge => Error::TooLarge { key, size: 1, size_max: 0 },
        ErrorKind::OutcomeUnknown => Error::OutcomeUnknown { key, source: Some(source()) },
        ErrorKind::Full => Error::Full { verb, key, source: Some(source()) },
        ErrorKind::Invalid => {
            Error::Invalid { reason: format!("injected fault on {key}"), key, source: Some(source()) }
        }
        ErrorKind::Other => Error::Other { verb, key, source: source() },
    }
}

#[async_trait]
impl<S: Store> Store for Faulty<S> {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let (outcome, fault) =
            self.call(Verb::Create, key.as_str(), self.inner.create(key, body.clone())).await;
        match (outcome, fault) {
            (Err(Error::AlreadyExists { .. }), Some(Fault::Overwrite)) => {
                self.inner.delete(key).await?;
                self.inner.create(key, body).await
            }
            (outcome, _) => outcome,
        }
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        self.body(Verb::Get, key, self.inner.get(key, size_max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        self.body(Verb::GetRange, key, self.inner.get_range(key, range)).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        self.call(Verb::Head, key.as_str(), self.inner.head(key)).await.0
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        self.call(Verb::List, prefix, self.inner.list(prefix, after, limit)).await.0
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        self.call(Verb::ListFolder, prefix, self.inner.list_folder(prefix)).await.0
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        self.call(Verb::Delete, key.as_str(), self.inner.delete(key)).await.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::super::memory::MemoryStore;
    use super::*;

    fn key(text: &str) -> ObjectKey {
        ObjectKey::parse(text).unwrap()
    }

    fn body() -> Bytes {
        Bytes::from_static(b"0123")
    }

    #[tokio::test]
    async fn keeps_the_contract_without_rules() {
        conformance::check(Arc::new(Faulty::new(MemoryStore::new())), "conformance").await;
    }

    #[tokio::test]
    async fn rules_apply_in_order_to_what_they_match() {
        let store = Faulty::new(MemoryStore::new());
        let denied = Fault::Before(ErrorKind::Denied);
        store.inject(Rule::on(Verb::Create, denied).key("packs/").skip(1).times(1));
        store.create(&key("packs/1"), body()).await.unwrap();
        store.create(&key("other/1"), body()).await.unwrap();
        let error = store.create(&key("packs/2"), body()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        store.create(&key("packs/2"), body()).await.unwrap();
        assert_eq!(store.faults(), 1);
    }

    #[tokio::test]
    async fn a_lost_answer_leaves_its_effect_and_a_refusal_does_not() {
        let store = Faulty::new(MemoryStore::new());
        store.inject(Rule::on(Verb::Create, Fault::After(ErrorKind::OutcomeUnknown)).key("lost"));
        store.inject(Rule::on(Verb::Create, Fault::Before(ErrorKind::Full)).key("full"));
        let lost = store.create(&key("lost"), body()).await.unwrap_err();
        let full = store.create(&key("full"), body()).await.unwrap_err();
        assert_eq!((lost.kind(), full.kind()), (ErrorKind::OutcomeUnknown, ErrorKind::Full));
        assert_eq!(store.get(&key("lost"), 4).await.unwrap(), body());
        assert!(store.get(&key("full"), 4).await.unwrap_err().is_absent());
    }

    #[tokio::test]
    async fn bodies_are_cut_and_flipped() {
        let store = Faulty::new(MemoryStore::new());
        store.create(&key("a"), body()).await.unwrap();
        store.inject(Rule::on(Verb::Get, Fault::TruncateBody(3)).times(1));
        store.inject(Rule::on(Verb::GetRange, Fault::FlipByte(1)).times(1));
        assert_eq!(store.get(&key("a"), 4).await.unwrap(), "012");
        assert_eq!(store.get_range(&key("a"), 0..2).await.unwrap(), [b'0', !b'1'][..]);
        assert_eq!(store.get(&key("a"), 4).await.unwrap(), body());
        store.inject(Rule::always(Fault::FlipByte(99)));
        assert_eq!(store.get(&key("a"), 4).await.unwrap(), [b'0', b'1', b'2', !b'3'][..]);
        store.heal();
        assert_eq!(store.get(&key("a"), 4).await.unwrap(), body());
    }

    #[tokio::test]
    async fn hanging_never_answers_and_a_delay_does() {
        let store = Faulty::new(MemoryStore::new());
        store.inject(Rule::on(Verb::Create, Fault::HangAfter).times(1));
        store.inject(Rule::on(Verb::Head, Fault::HangBefore));
        store.inject(Rule::on(Verb::Get, Fault::Delay(Duration::from_millis(2))));
        let patience = Duration::from_millis(20);
        assert!(tokio::time::timeout(patience, store.create(&key("a"), body())).await.is_err());
        assert!(tokio::time::timeout(patience, store.head(&key("a"))).await.is_err());
        assert_eq!(store.get(&key("a"), 4).await.unwrap(), body());
    }

    #[tokio::test]
    async fn one_seed_fails_one_way() {
        let run = async |seed| {
            let store = Faulty::seeded(MemoryStore::new(), seed, 0.5);
            let mut outcomes = Vec::new();
            for number in 0..64 {
                outcomes.push(store.create(&key(&format!("{number}")), body()).await.is_ok());
            }
            outcomes
        };
        let first = run(7).await;
        assert_eq!(first, run(7).await);
        assert_ne!(first, run(8).await);
        assert!(first.contains(&true) && first.contains(&false));
    }
}
