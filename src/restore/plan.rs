//! What a restore will write and where: decided and checked before the first byte is written.
//!
//! The plan is a value one can print (`--dry-run`) and keep: an unfinished restore goes on by the very plan it began
//! with. Looking at the disk and at the file table is done here, deciding in `destinations`, `target` and
//! `recovery_settings`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::catalog::host::{self, Host};
use crate::catalog::wal_scan::{WalScan, scan_wal};
use crate::catalog::{PlannedRecovery, RecoveryPlan, RecoveryTarget, Target};
use crate::disk::Owner;
use crate::pg::{ControlFile, RECOVERY_SIGNAL, STANDBY_SIGNAL, TimelineId, WalSegmentNumber};
use crate::repo::entry::{Content, Entry, Node, TreePath};
use crate::repo::{self, Basebackup, BasebackupId};
use crate::restore::Error;
use crate::restore::destinations::{ConfigurationPlace, Destinations};
use crate::restore::recovery_settings::{
    RecoveryEnd, RecoveryFacts, ReplayLimits, Setting, recovery_settings,
};
use crate::restore::target::{
    TargetFacts, check_existing, check_place, check_space, is_own_tablespace, resolve, used_bytes,
};

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// PGDATA to be.
    pub target_directory: PathBuf,
    /// Tablespaces, by oid or name, and where they go.
    pub tablespace_map: Vec<(String, PathBuf)>,
    /// Where configuration that was outside PGDATA goes.
    pub configuration_directory: Option<PathBuf>,
    /// What to do with what is there already.
    pub existing: Existing,
    /// Whether files are filled while the server runs: their zero pages take room then.
    pub is_instant: bool,
    /// What the server does once it is started.
    pub mode: RecoveryMode,
    /// The command that fetches WAL.
    pub restore_command: Option<String>,
    /// Whom everything belongs to.
    pub owner: Owner,
    /// Who is restoring.
    pub user: Owner,
    /// Places that a restore must stay apart from, with what they are.
    pub apart_from: Vec<(PathBuf, String)>,
    /// Version of the C library of this host, where it is known.
    pub libc: Option<String>,
    /// The data directory of the source, if it is on this host.
    pub source_directory: Option<PathBuf>,
}

/// What is done with a directory that something is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Existing {
    /// It is refused.
    Refuse,
    /// It is emptied, where Walden has restored it.
    Replace,
    /// Files that are the basebackup's stay, others are made so.
    Delta,
}

/// What a restored server does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveryMode {
    /// Recovers to its target.
    Target,
    /// Follows a primary.
    Standby { primary_conninfo: String },
}

/// What will be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// Version of this value, 1.
    pub format: u32,
    /// The basebackup.
    pub basebackup: BasebackupId,
    /// BLAKE3 of its manifest.
    pub manifest_digest: String,
    /// Where everything goes.
    pub destinations: Destinations,
    /// Links of `pg_tblspc` to make, by oid.
    pub tablespace_names: BTreeMap<u32, String>,
    /// Whom it belongs to: user and group.
    pub owner: (u32, u32),
    /// What is done with what is there.
    pub existing: Existing,
    /// What recovery may ask for.
    pub recovery: RecoveryPlan,
    /// Where recovery ends; a standby's does not.
    pub target: Option<RecoveryTarget>,
    /// The timeline it follows.
    pub timeline: TimelineId,
    /// Lines for `postgresql.auto.conf`.
    pub settings: Vec<Setting>,
    /// Lines for the configuration that is restored outside PGDATA, and the path of its main file in the tree.
    pub configuration: Option<(String, Vec<Setting>)>,
    /// How much there is to do.
    pub figures: Figures,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// How much a restore has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Packs they come from.
    pub packs: u64,
    /// Stored bytes of those packs that the basebackup names.
    pub stored_bytes: u64,
    /// WAL segments that recovery will fetch, at most.
    pub wal_segments: u64,
    /// Their bytes.
    pub wal_bytes: u64,
}

const CONTROL_FILE: &str = "data/global/pg_control";

/// Decides what a restore writes; refuses before anything is written.
pub async fn plan_restore(
    basebackup: &Basebackup,
    planned: PlannedRecovery,
    options: &RestoreOptions,
) -> Result<RestorePlan, Error> {
    let start = basebackup.start();
    host::check_architecture(&basebackup.record().server, &Host::here(None))?;
    let data = resolve(&options.target_directory);
    let map: Vec<(String, PathBuf)> =
        options.tablespace_map.iter().map(|(name, path)| (name.clone(), resolve(path))).collect();
    let configuration = configuration_place(basebackup, options);
    let destinations = Destinations::new(&data, &start.tablespaces, &map, configuration)?;
    let sizes = Sizes::of(basebackup, &destinations, options.is_instant).await?;
    check_targets(&destinations, &sizes, basebackup, options)?;
    let PlannedRecovery { plan, target, .. } = &planned;
    let scan = scan_wal(basebackup.repository(), plan, &target.target, basebackup.record().start_lsn).await?;
    check_replay(&scan, &destinations)?;
    let control = control_file(basebackup).await?;
    let main_inside = basebackup.entry(&tree_path("data/postgresql.conf")?).await?.is_some();
    let unknown_configuration = !main_inside && destinations.configuration.is_none();
    let end = match &options.mode {
        RecoveryMode::Target => RecoveryEnd::Target(&planned.target, planned.timeline),
        RecoveryMode::Standby { primary_conninfo } => RecoveryEnd::Standby { primary_conninfo },
    };
    let settings = recovery_settings(&RecoveryFacts {
        restore_command: options.restore_command.as_deref(),
        end,
        limits: ReplayLimits {
            at_basebackup: control.limits,
            in_wal: scan.limits,
            are_configured: !unknown_configuration,
        },
    })?;
    let standby = matches!(options.mode, RecoveryMode::Standby { .. });
    let record = basebackup.record();
    let names = start.tablespaces.iter().filter(|tablespace| !tablespace.location.is_empty());
    let figures = figures(&sizes, basebackup, &planned);
    Ok(RestorePlan {
        format: 1,
        basebackup: record.id,
        manifest_digest: record.manifest.digest.to_string(),
        tablespace_names: names.map(|tablespace| (tablespace.oid, tablespace.name.clone())).collect(),
        owner: (options.owner.uid, options.owner.gid),
        existing: options.existing,
        warnings: warnings(basebackup, &planned, options, &destinations, unknown_configuration),
        configuration: outside_configuration(basebackup, &destinations, main_inside),
        recovery: RecoveryPlan { standby, ..planned.plan },
        target: (!standby).then_some(planned.target),
        timeline: planned.timeline,
        destinations,
        settings,
        figures,
    })
}

impl RestorePlan {
    /// Returns whom everything belongs to.
    pub fn owner(&self) -> Owner {
        Owner { uid: self.owner.0, gid: self.owner.1 }
    }

    /// Returns the name of the file that makes the server recover.
    pub fn signal(&self) -> &'static str {
        if self.recovery.standby { STANDBY_SIGNAL } else { RECOVERY_SIGNAL }
    }
}

/// How much goes where.
#[derive(Debug, Default)]
struct Sizes {
    files: u64,
    directories: u64,
    bytes: u64,
    by_place: BTreeMap<PathBuf, u64>,
    /// What the basebackup has directly in a tablespace: the folder of its own major version.
    tablespace_folders: Vec<PathBuf>,
}

impl Sizes {
    /// Adds up the file table, and refuses one that names what no basebackup has.
    async fn of(
        basebackup: &Basebackup,
        destinations: &Destinations,
        has_zeros: bool,
    ) -> Result<Self, Error> {
        let mut sizes = Self::default();
        basebackup.visit_entries(|_, entry| sizes.add(entry, destinations, has_zeros)).await?;
        Ok(sizes)
    }

    fn add(&mut self, entry: &Entry, destinations: &Destinations, has_zeros: bool) -> Result<(), Error> {
        let Some(place) = destinations.place(&entry.path)? else { return Ok(()) };
        match &entry.node {
            Node::Directory => {
                self.directories += 1;
                let parent = place.parent();
                if destinations.tablespaces.values().any(|root| Some(&**root) == parent) {
                    self.tablespace_folders.push(place);
                }
            }
            Node::Symlink(_) => {}
            Node::File { size, content } => {
                self.files += 1;
                self.bytes += size;
                let all = destinations.all();
                let root = all.iter().find(|(root, _)| place.starts_with(root)).map(|(root, _)| *root);
                let needed = match content {
                    Content::Map(map) if !has_zeros => *size - zero_bytes(map).min(*size),
                    _ => *size,
                };
                *self.by_place.entry(root.unwrap_or(&place).to_owned()).or_default() += needed;
            }
        }
        Ok(())
    }

    /// Returns how much more room each place needs than what will be replaced in it.
    fn needs(&self, destinations: &Destinations) -> Vec<(PathBuf, u64)> {
        let replaced = |path: &PathBuf| match destinations.tablespaces.values().any(|root| root == path) {
            true => {
                let own = self.tablespace_folders.iter().filter(|folder| folder.starts_with(path));
                own.map(|folder| used_bytes(folder)).sum()
            }
            false => used_bytes(path),
        };
        let need = |(path, bytes): (&PathBuf, &u64)| (path.clone(), bytes.saturating_sub(replaced(path)));
        self.by_place.iter().map(need).collect()
    }
}

/// Bytes that become holes.
fn zero_bytes(map: &repo::page_map::MapBlock) -> u64 {
    let zero = map.extents().iter().filter(|extent| extent.source == repo::page_map::PageSource::Zero);
    zero.map(|extent| u64::from(extent.count) * repo::page_map::PAGE_SIZE).sum()
}

fn check_targets(
    destinations: &Destinations,
    sizes: &Sizes,
    basebackup: &Basebackup,
    options: &RestoreOptions,
) -> Result<(), Error> {
    for (place, _) in destinations.all() {
        check_place(place, &options.apart_from)?;
    }
    let (cluster, source) = (basebackup.record().cluster, options.source_directory.as_deref());
    check_existing(destinations, options.existing, cluster, options.user, source)?;
    check_space(&sizes.needs(destinations))
}

/// Refuses WAL whose replay would create a tablespace over what is on this host (failure 27b).
///
/// The path stands in the WAL, and is the primary's. Which host that was nobody can tell: a basebackup names the host it
/// was taken on, which may be a standby's or a container's. So what is there on this host decides.
fn check_replay(scan: &WalScan, destinations: &Destinations) -> Result<(), Error> {
    let facts = TargetFacts::of(&destinations.data)?;
    for (oid, path) in &scan.tablespaces {
        let place = resolve(path);
        let ours = is_own_tablespace(&facts, &destinations.data, *oid, &place);
        if !ours && TargetFacts::of(&place).is_ok_and(|facts| facts.filled) {
            return Err(Error::ReplayedTablespace { oid: *oid, path: path.clone() });
        }
    }
    Ok(())
}

/// Returns what a basebackup has of `pg_control`.
pub async fn control_file(basebackup: &Basebackup) -> Result<ControlFile, Error> {
    let damaged =
        |detail: String| Error::Repository(repo::Error::Damaged { object: CONTROL_FILE.to_owned(), detail });
    let found = basebackup.entry(&tree_path(CONTROL_FILE)?).await?;
    let Some((_, Entry { node: Node::File { content: Content::Inline(bytes), .. }, .. })) = found else {
        return Err(damaged("the basebackup has none".to_owned()));
    };
    ControlFile::parse(&bytes).map_err(|error| damaged(error.to_string()))
}

fn tree_path(path: &str) -> Result<TreePath, Error> {
    TreePath::new(path).map_err(|error| Error::Internal(error.to_string()))
}

fn configuration_place(basebackup: &Basebackup, options: &RestoreOptions) -> Option<ConfigurationPlace> {
    let directory = resolve(options.configuration_directory.as_deref()?);
    let main = basebackup.record().server.outside_configuration.first()?;
    let folder = main.rsplit_once('/').map_or("", |(folder, _)| folder);
    Some(ConfigurationPlace { directory, top: format!("config/{folder}").trim_end_matches('/').to_owned() })
}

/// Returns what the main file outside PGDATA has to say anew, because it names paths of the source.
fn outside_configuration(
    basebackup: &Basebackup,
    destinations: &Destinations,
    main_inside: bool,
) -> Option<(String, Vec<Setting>)> {
    let place = destinations.configuration.as_ref()?;
    let files = &basebackup.record().server.outside_configuration;
    let main = files.first().filter(|_| !main_inside)?;
    let mut settings = vec![("data_directory", destinations.data.clone())];
    if place.directory != Path::new("/").join(place.top.trim_start_matches("config/")) {
        let names = [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];
        let there =
            |name: &str| files.iter().any(|file| format!("config/{file}") == format!("{}/{name}", place.top));
        settings.extend(
            names
                .iter()
                .filter(|(_, name)| there(name))
                .map(|(set, name)| (*set, place.directory.join(name))),
        );
        settings.push(("external_pid_file", PathBuf::new()));
    }
    let setting =
        |(name, path): (&str, PathBuf)| Setting { name: name.to_owned(), value: path.display().to_string() };
    Some((format!("config/{main}"), settings.into_iter().map(setting).collect()))
}

fn figures(sizes: &Sizes, basebackup: &Basebackup, planned: &PlannedRecovery) -> Figures {
    let packs = basebackup.refs().records();
    let size = planned.plan.cluster.segment_size;
    let end = match planned.target.target {
        Target::Lsn(lsn) => Some(WalSegmentNumber::containing(lsn, size)),
        Target::Immediate => Some(WalSegmentNumber::containing(basebackup.record().stop_lsn, size)),
        _ => None,
    };
    let spans = planned.plan.spans.iter().filter_map(|span| {
        let (first, last) = (span.first.number(size).ok()?.0, span.last?.number(size).ok()?.0);
        let last = end.map_or(last, |end| last.min(end.0));
        Some((last + 1).saturating_sub(first))
    });
    let wal_segments: u64 = spans.sum();
    Figures {
        files: sizes.files,
        directories: sizes.directories,
        bytes: sizes.bytes,
        packs: packs.len() as u64,
        stored_bytes: packs.iter().map(|pack| u64::from(pack.live)).sum(),
        wal_segments,
        wal_bytes: wal_segments * u64::from(size.bytes()),
    }
}

/// Returns the links that stand in a data directory and lead out of it, such as `pg_wal` to a file system of its own.
fn links_out_of(data: &Path) -> Vec<(PathBuf, PathBuf)> {
    let entries = std::fs::read_dir(data).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| {
        let target = std::fs::read_link(entry.path()).ok()?;
        Some((entry.path(), resolve(&data.join(target))))
    });
    let mut links: Vec<_> = links.filter(|(_, target)| !target.starts_with(data)).collect();
    links.sort();
    links
}

fn warnings(
    basebackup: &Basebackup,
    planned: &PlannedRecovery,
    options: &RestoreOptions,
    destinations: &Destinations,
    unknown_configuration: bool,
) -> Vec<String> {
    let record = basebackup.record();
    let mut warnings = planned.warnings();
    if record.size.damaged_pages > 0 {
        let pages = record.size.damaged_pages;
        warnings.push(format!("{pages} pages had a wrong checksum in the source already"));
    }
    warnings.extend(host::ordering_warning(&record.server, &Host::here(options.libc.clone())));
    for link in &basebackup.start().links {
        let target = String::from_utf8_lossy(&link.target);
        let place = destinations.place(&link.path).ok().flatten();
        if let Some(place) = place {
            warnings.push(format!(
                "\"{}\" was a link to \"{target}\" and becomes what was there",
                place.display()
            ));
        }
    }
    for (link, target) in links_out_of(&destinations.data) {
        warnings.push(format!(
            "\"{}\" is a link to \"{}\" and is replaced: what is there stays and is no longer the data directory's",
            link.display(),
            target.display()
        ));
    }
    if unknown_configuration {
        warnings.push(format!(
            "the source's configuration is outside the data directory and is not restored (--config-dir does): {}",
            record.server.outside_configuration.join(", ")
        ));
    }
    warnings
}
