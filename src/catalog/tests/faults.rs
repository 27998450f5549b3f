//! One request of the store that fails, at each position of making a plan: the plan is the same or the store is named;
//! what did not come is never taken for what is not there.

use super::*;
use crate::clock::SystemClock;
use crate::storage::{ErrorKind, RetryOptions, Retrying, Store};

async fn plan_through(
    store: Arc<dyn Store>,
    clock: &ManualClock,
    target: &RecoveryTarget,
) -> Result<Vec<String>, RecoveryError> {
    let repository = Repository::open(testing::options(store, clock.clone(), 5)).await?;
    let request = RecoveryRequest { basebackup: None, target, until_hole: false };
    let planned = plan_for_target(&repository, request).await?;
    let mut found = spans(&planned);
    found.push(planned.record.id.to_string());
    Ok(found)
}

#[tokio::test]
async fn a_fault_at_any_call_of_planning_is_survived_or_told_and_is_never_a_refusal() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.history(OLD, 2, 1, within(6)).await;
    site.wal(OLD, 1, 3..7).await;
    site.wal(OLD, 2, 6..9).await;
    site.backup(OLD, 2, 7, 7).await;
    let faulty = site.store.inner().clone();
    let pause = Duration::from_millis(1);
    let options = RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
    let retrying = Arc::new(Retrying::new(faulty.clone(), options, Arc::new(SystemClock), 1));
    for asked in [Target::Latest, Target::Lsn(within(8)), Target::Immediate] {
        let asked = target(asked);
        let whole = plan_through(faulty.clone(), &site.clock, &asked).await.unwrap();
        for fault in [Fault::Before(ErrorKind::Unreachable), Fault::After(ErrorKind::Unreachable)] {
            let mut failures = 0;
            for calls in 0.. {
                let what = format!("{asked:?}, {fault:?} at call {calls}");
                let before = faulty.faults();
                let inject = || faulty.inject(Rule::always(fault.clone()).skip(calls).times(1));
                inject();
                let plain = plan_through(faulty.clone(), &site.clock, &asked).await;
                faulty.heal();
                match plain {
                    Ok(planned) => assert_eq!(planned, whole, "{what}"),
                    Err(error) => {
                        failures += 1;
                        let named = error.to_string().contains("main/");
                        assert!(matches!(error, RecoveryError::Repository(_)) && named, "{what}: {error}");
                    }
                }
                if faulty.faults() == before {
                    assert!(calls > 8 && failures > 0, "{what}: {failures} failures");
                    break;
                }
                inject();
                let again = plan_through(retrying.clone(), &site.clock, &asked).await;
                faulty.heal();
                assert_eq!(again.unwrap_or_else(|error| panic!("{what}, again: {error}")), whole, "{what}");
            }
        }
    }
}
