//! What is read of an incremental basebackup: the plan of a full one, without what need not be.
//!
//! Reads from the state, nothing else. The start-up set is stored again as a whole where it would otherwise lie in too
//! many packs: a start fetches it with one or two requests, and each basebackup puts what has changed into a pack of
//! its own.

use std::collections::BTreeSet;

use crate::backup::data_directory::SourceFile;
use crate::backup::hints::Hints;
use crate::backup::known_parent::KnownParent;
use crate::backup::plan::{Plan, PlanOptions, Step, plan_copy};

/// What is read, and how.
#[derive(Debug)]
pub struct Reading {
    /// The order.
    pub plan: Plan,
    /// Whether the start-up set is stored again as a whole.
    pub start_set_again: bool,
}

/// The start-up set lies in no more packs than this.
const START_PACKS_MAX: usize = 4;

/// Plans what is read of `files`; `hints`: what the WAL says of them.
pub fn plan_reading(
    files: &[SourceFile],
    options: &PlanOptions,
    parent: Option<&KnownParent>,
    hints: Option<&Hints>,
) -> Reading {
    let mut plan = plan_copy(files, options);
    let Some(parent) = parent else {
        return Reading { plan, start_set_again: false };
    };
    let start_set: BTreeSet<usize> =
        plan.steps[..plan.start_steps].iter().flat_map(numbers).copied().collect();
    let mut packs = BTreeSet::new();
    for known in start_set.iter().filter_map(|number| parent.file(&files[*number].path)) {
        packs.extend(parent.packs_of(&known));
    }
    // Beside those that hold it now there will be one with what has changed.
    let start_set_again = packs.len() + 1 > START_PACKS_MAX;
    plan.keep(files, |number| {
        !(start_set_again && start_set.contains(&number)) && parent.is_unread(&files[number], hints)
    });
    Reading { plan, start_set_again }
}

fn numbers(step: &Step) -> &[usize] {
    match step {
        Step::Together(numbers) => numbers,
        Step::Alone(number) | Step::Keep(number) => std::slice::from_ref(number),
        Step::WriteMaps => &[],
    }
}
