//! One request of the store that fails, at each position of a restore, leases and all: the restore is right, or fails, says
//! where and leaves nothing to start, and the next attempt makes it right. With the layer that asks again every one is.

use std::time::Duration;

use crate::clock::SystemClock;
use crate::storage::{RetryOptions, Retrying};

use super::*;

/// No effect, an effect without an answer, and bodies that were cut or changed.
fn faults() -> [Fault; 5] {
    let lost = StoreErrorKind::OutcomeUnknown;
    [
        Fault::Before(StoreErrorKind::Unreachable),
        Fault::Before(lost),
        Fault::After(lost),
        Fault::TruncateBody(40),
        Fault::FlipByte(40),
    ]
}

impl Site {
    /// Puts the layer that asks again between the engine and its store, as every command has it.
    async fn retrying(self) -> Self {
        let pause = Duration::from_millis(1);
        let options = RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
        let store = Retrying::new(self.store.clone(), options, Arc::new(SystemClock), 1);
        let options = testing::options(store, self.clock.clone(), 5);
        let repository = Repository::open(options).await.unwrap();
        Self { repository, ..self }
    }

    /// Restores with a fault at each call in turn; returns how many calls there were and how many restores failed.
    async fn go_through(&self, id: BasebackupId, fault: &Fault, prefix: &str) -> (usize, usize) {
        let mut failures = 0;
        for calls in 0.. {
            let (name, what) = (format!("{prefix}-{calls}"), format!("{fault:?} at call {calls}"));
            let before = self.store.faults();
            self.store.inject(Rule::always(fault.clone()).skip(calls).times(1));
            let outcome = self.restore(id, &name, Existing::Refuse).await;
            self.store.heal();
            if let Err(error) = outcome {
                failures += 1;
                let text = error.to_string();
                let named = text.contains("main/") || text.contains(&format!("basebackup {id}"));
                assert!(named, "{what}: {text}");
                self.assert_cannot_be_started(&name);
                match read_unfinished(&self.data(&name)) {
                    Ok(plan) => drop(self.run(&plan, true).await.unwrap()),
                    Err(_) => drop(self.restore(id, &name, Existing::Refuse).await.unwrap()),
                }
            }
            self.assert_restored(&name, &some_files(9));
            if self.store.faults() == before {
                return (calls, failures);
            }
        }
        unreachable!("the range has no end")
    }
}

#[test]
fn a_fault_at_any_call_is_survived_or_told_and_the_next_attempt_converges() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        for (kind, fault) in faults().iter().enumerate() {
            let (calls, failures) = site.go_through(id, fault, &format!("fault-{kind}")).await;
            assert!(calls > 5 && failures > 0, "{fault:?}: {calls} calls, {failures} failures");
        }
    });
}

#[test]
fn a_fault_at_any_call_that_is_asked_again_fails_no_restore() {
    block_on(async {
        let site = Site::create().await.retrying().await;
        let id = site.backup(&some_files(9), None).await.id;
        for (kind, fault) in faults().iter().enumerate() {
            let (calls, failures) = site.go_through(id, fault, &format!("again-{kind}")).await;
            // Bytes that were changed on their way are nothing that asking again is for.
            let lies = matches!(fault, Fault::TruncateBody(_) | Fault::FlipByte(_));
            assert!(calls > 5 && lies == (failures > 0), "{fault:?}: {calls} calls, {failures} failures");
        }
    });
}
