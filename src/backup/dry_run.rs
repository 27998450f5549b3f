//! What a basebackup would read, from where, and how: everything that is decided before anything is written.
//!
//! The server is asked, the data directory walked and what this host remembers looked at as for a real one; no backup is
//! started on the server, no file of it is read, and nothing is written but the lock that keeps two basebackups of a site
//! apart. Sizes are those of the moment. What the server's WAL might say of unchanged files is asked in backup mode alone,
//! so a real one may read less. What a killed one has left would be gone on with by its journal alone: damage in the rest
//! shows when it is taken up, which is not done here.

use std::path::PathBuf;

use crate::backup::change::{Decision, Reason, Today};
use crate::backup::data_directory::SourceTree;
use crate::backup::error::Error;
use crate::backup::known_parent::Prepared;
use crate::backup::origin::{Chosen, Origin, choose_origin};
use crate::backup::plan::{GroupSummary, PlanOptions, Step};
use crate::backup::reading::plan_reading;
use crate::backup::run::{
    BackupOptions, BackupSource, blocking, mapped_relations, postgres_of, walk_options,
};
use crate::backup::site_state::SiteState;
use crate::pg::{Lsn, TimelineId};
use crate::repo::{self, ClusterId, Membership, Repository};

/// What a basebackup would read.
#[derive(Debug, Clone)]
pub struct DryRun {
    /// The data directory.
    pub data_directory: PathBuf,
    /// The cluster.
    pub cluster: ClusterId,
    /// Whether its WAL and basebackups have been here before.
    pub is_first: bool,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Whether the server is a standby.
    pub in_recovery: bool,
    /// `server_version`.
    pub server_version: String,
    /// The redo location of the last checkpoint: WAL from here on would be needed, or from a later one.
    pub redo_lsn: Lsn,
    /// Whether it would be full, and why.
    pub decision: Decision,
    /// Files, and their bytes.
    pub files: (u64, u64),
    /// Files that would be read, and their bytes.
    pub read: (u64, u64),
    /// Tablespaces: oid, name and bytes.
    pub tablespaces: Vec<(u32, String, u64)>,
    /// The files that a start needs, which are read first.
    pub start_set: Vec<GroupSummary>,
    /// Names of configuration files outside the data directory.
    pub outside_configuration: Vec<String>,
    /// What would be passed over, for people.
    pub warnings: Vec<String>,
}

/// Looks at what a basebackup with these options would read; `repository` is the site's, where there is one yet.
///
/// # Errors
/// What would keep a basebackup from being begun.
pub async fn dry_run(repository: Option<&Repository>, options: &BackupOptions) -> Result<DryRun, Error> {
    if options.source == BackupSource::Replication {
        return Err(Error::NeedsDirectory { what: "a dry run" });
    }
    let needs_no_archiving = options.wal_received || options.standalone;
    let Chosen { origin, .. } =
        choose_origin(&options.nodes, options.data_directory.as_deref(), needs_no_archiving).await?;
    let membership = match repository {
        Some(repository) => repository.membership(origin.cluster).await?,
        None => Membership::First,
    };
    if let Membership::Foreign(known) = membership {
        return Err(repo::Error::ForeignCluster { cluster: origin.cluster, known }.into());
    }
    let Prepared { decision, parent } = prepare(repository, options, &origin).await?;
    let walk = walk_options(&origin.data_directory, &origin.facts);
    let postgres = postgres_of(&origin.facts);
    let (tree, plan) = blocking(move || {
        let tree = SourceTree::walk(&walk)?;
        let plan_options = PlanOptions { postgres, mapped: mapped_relations(&tree) };
        let reading = plan_reading(&tree.files, &plan_options, parent.as_deref(), None);
        Ok((tree, reading.plan))
    })
    .await?;
    let kept = plan.steps.iter().filter(|step| matches!(step, Step::Keep(_))).count() as u64;
    let files = (tree.files.len() as u64, tree.files.iter().map(|file| file.size).sum());
    Ok(DryRun {
        decision,
        files,
        read: (files.0 - kept, plan.bytes),
        cluster: origin.cluster,
        is_first: membership == Membership::First,
        timeline: origin.facts.identity.timeline,
        in_recovery: origin.facts.identity.in_recovery,
        server_version: origin.facts.version_text.clone(),
        redo_lsn: origin.control.redo,
        tablespaces: tablespaces_of(&tree),
        start_set: plan.groups,
        outside_configuration: tree.outside_configuration,
        warnings: tree.warnings,
        data_directory: origin.data_directory,
    })
}

/// Decides whether it would be full; where there is no site yet nothing is remembered of it.
async fn prepare(
    repository: Option<&Repository>,
    options: &BackupOptions,
    origin: &Origin,
) -> Result<Prepared, Error> {
    let Some(repository) = repository else {
        return Ok(Prepared::full(if options.full { Reason::Asked } else { Reason::NoState }));
    };
    let (cluster, timeline) = (origin.cluster, origin.facts.identity.timeline);
    let today = Today::of(repository, cluster, timeline, origin.control.data_checksum_version != 0);
    let states = SiteState::take(repository, options.states.as_deref()).await?;
    states.foresee(repository, &today, options.full, Some(&origin.data_directory)).await
}

fn tablespaces_of(tree: &SourceTree) -> Vec<(u32, String, u64)> {
    let bytes_below = |roots: [String; 2]| {
        let is_below =
            |path: &repo::entry::TreePath| roots.iter().any(|root| path.strip(root.as_bytes()).is_some());
        tree.files.iter().filter(|file| is_below(&file.path)).map(|file| file.size).sum()
    };
    let place = |oid: u32| [format!("tablespaces/{oid}"), format!("data/pg_tblspc/{oid}")];
    let of = |it: &repo::manifest::Tablespace| (it.oid, it.name.clone(), bytes_below(place(it.oid)));
    tree.tablespaces.iter().map(of).collect()
}
