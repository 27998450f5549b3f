//! The recovery plan as it lies in a data directory: `walden.plan.json`.
//!
//! Restore writes it there. Where somebody set restore_command by hand there is none, and the first fetch makes one
//! from the archive and goes by it until recovery ends. A plan that belongs to an earlier recovery (it was copied
//! with the directory, or the server was promoted since) would end this one too early, so what the control file
//! contradicts is replaced. A standby needs no plan: it waits and never ends by itself.

use std::path::Path;

use crate::catalog::{PLAN_FILE_NAME, RecoveryPlan, TimelineSpan, TimelineTree, WalCoverage};
use crate::disk::durable::{Create, write_file};
use crate::disk::{self, Owner};
use crate::pg::{ControlFile, WalSegmentNumber};
use crate::repo::{ClusterId, Repository};
use crate::wal::Error;
use crate::wal::data_directory::{cluster_of, read_at_most};

/// The version of the file that this release reads and writes.
const FORMAT: u32 = 1;
/// A plan has a line or two for each timeline.
const PLAN_BYTES_MAX: u64 = 4 << 20;

/// Returns the plan of a standby of this cluster, which pins nothing.
pub fn standby_plan(cluster: ClusterId) -> RecoveryPlan {
    let (basebackup, spans, forced, carried) = (None, Vec::new(), None, None);
    RecoveryPlan { format: FORMAT, cluster, basebackup, spans, standby: true, forced, carried }
}

/// Reads the plan of a data directory, or returns nothing where there is none that belongs to this recovery.
pub fn read(data_directory: &Path, control: &ControlFile) -> Result<Option<RecoveryPlan>, Error> {
    let path = data_directory.join(PLAN_FILE_NAME);
    let bytes = match read_at_most(&path, PLAN_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(Error::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let unusable = |detail: String| Error::Plan { path: path.clone(), detail };
    let plan: RecoveryPlan = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
    if plan.format != FORMAT {
        return Err(unusable(format!("it has format {}, and this release knows {FORMAT}", plan.format)));
    }
    match contradiction(&plan, control) {
        None => Ok(Some(plan)),
        Some(reason) => {
            tracing::warn!("\"{}\" is of another recovery and is replaced: {reason}", path.display());
            Ok(None)
        }
    }
}

/// Makes a plan from what the archive holds and writes it down.
pub async fn create(
    repository: &Repository,
    data_directory: &Path,
    control: &ControlFile,
) -> Result<RecoveryPlan, Error> {
    let cluster = cluster_of(control);
    let coverage = WalCoverage::load(repository, cluster).await?;
    let tree = TimelineTree::load(repository, cluster).await?;
    let plan = RecoveryPlan::of_archive(cluster, &tree, &coverage, false);
    if plan.spans.is_empty() {
        return Err(Error::NoArchive { cluster });
    }
    write(data_directory, &plan)?;
    Ok(plan)
}

/// Writes the plan of a data directory, as the directory's owner.
pub fn write(data_directory: &Path, plan: &RecoveryPlan) -> Result<(), Error> {
    let path = data_directory.join(PLAN_FILE_NAME);
    let mut text = serde_json::to_vec_pretty(plan)
        .map_err(|error| Error::Plan { path: path.clone(), detail: error.to_string() })?;
    text.push(b'\n');
    Ok(write_file(&path, &text, owned_like(data_directory)?)?)
}

/// Says how to create a file beside those of a data directory: root writes on its owner's behalf.
pub(crate) fn owned_like(directory: &Path) -> Result<Create, disk::Error> {
    let owner = if Owner::current().is_root() { Some(Owner::of(directory)?) } else { None };
    Ok(Create { owner, ..Create::PRIVATE_FILE })
}

/// Says why a plan cannot be that of the recovery under way, if so.
fn contradiction(plan: &RecoveryPlan, control: &ControlFile) -> Option<String> {
    let cluster = cluster_of(control);
    if plan.cluster != cluster {
        return Some(format!("it is for cluster {}, and this is {cluster}", plan.cluster));
    }
    if plan.standby {
        return Some("it is a standby's".to_owned());
    }
    if plan.spans.iter().all(|span| span.timeline < control.timeline) {
        return Some(format!("the last checkpoint is on timeline {}", control.timeline));
    }
    // By number alone: on the switch-point segment the plan may name the child where the checkpoint names the parent.
    let checkpoint = WalSegmentNumber::containing(control.redo, cluster.segment_size);
    let last_of = |span: &TimelineSpan| match span.last {
        Some(last) => last.number(cluster.segment_size).ok(),
        None => Some(WalSegmentNumber(u64::MAX)),
    };
    let beyond = plan.spans.iter().filter_map(last_of).all(|last| last < checkpoint);
    beyond.then(|| format!("the last checkpoint, at {}, lies behind the plan's end", control.redo))
}
