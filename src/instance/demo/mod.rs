//! The demonstration: a scratch cluster taken through everything, by the commands its users would type.
//!
//! ```text
//! prepare ─ initdb ─ fill ─ backup ─ archive ─ mount ─ clone ─ compare ─ write ─ clean up
//! ```
//! One folder holds all of it; the source is under load until its WAL is archived to the last record, so that
//! clone and source can be compared row by row. Whatever happens, a failure and a signal included, nothing is
//! left running or mounted, and the folder is removed unless it is to be kept. Deliberately absent: any short cut
//! past the command line.

mod checksum;
mod cluster;
mod commands;
mod error;
mod leftovers;
mod programs;
mod report;
mod scratch;
mod stage;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::clock::Clock;
use crate::replication::{ConnectOptions, Session};

pub use error::DemoError;
pub use report::{BackupFigures, CloneFigures, DemoReport, MountFigures, Step, StepReport, WalFigures};

use checksum::Checksums;
use commands::As;
use stage::Stage;

/// What a demonstration is given.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The binary whose commands are shown: our own.
    pub binary: PathBuf,
    /// Where the scratch folder is made.
    pub parent: PathBuf,
    /// pgbench's scale, about 16 MB each.
    pub scale: u32,
    /// Whether the folder stays.
    pub keep: bool,
}

/// Who is told how it goes.
pub trait Audience: Send + Sync {
    /// Hears that a step begins.
    fn begins(&self, step: Step);
    /// Hears how it went.
    fn done(&self, step: &StepReport);
    /// Hears of what was found wrong while cleaning up after a failure.
    fn warned(&self, problem: &DemoError);
}

/// The clone's name, and the mount's folder.
const CLONE: &str = "demo";
/// How long the load runs before the backup begins, so that there is something in motion.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long the load goes on after the backup, for WAL that recovery has to replay.
const LOAD_AFTER: Duration = Duration::from_secs(3);

/// Runs the demonstration until its end or until `interrupted` resolves, and cleans up.
pub async fn run(
    options: &DemoOptions,
    clock: Arc<dyn Clock>,
    audience: &dyn Audience,
    interrupted: impl Future<Output = ()>,
) -> Result<DemoReport, DemoError> {
    let bin_directory = programs::find()?;
    let mut stage = Stage::create(options, bin_directory, clock.clone())?;
    let mut demo = Demo { stage: &mut stage, scale: options.scale, clock, audience, steps: Vec::new() };
    let outcome = tokio::select! {
        outcome = demo.play() => outcome,
        () = interrupted => Err(DemoError::Interrupted),
    };
    // The children of an interrupted command were killed with its future; what they left is found by name.
    let cleaned = stage.clean_up().await;
    match (outcome, cleaned) {
        (Ok(report), Ok(())) => Ok(report),
        (Ok(_), Err(problem)) => Err(problem.in_step(Step::CleanUp)),
        (Err(error), cleaned) => {
            if let Err(problem) = cleaned {
                audience.warned(&problem);
            }
            Err(error)
        }
    }
}

struct Demo<'a> {
    stage: &'a mut Stage,
    scale: u32,
    clock: Arc<dyn Clock>,
    audience: &'a dyn Audience,
    steps: Vec<StepReport>,
}

impl Demo<'_> {
    /// Plays all steps in order.
    async fn play(&mut self) -> Result<DemoReport, DemoError> {
        self.prepare().await.map_err(|error| error.in_step(Step::Prepare))?;
        let postgresql = self.initdb().await.map_err(|error| error.in_step(Step::Initdb))?;
        let database_bytes = self.fill().await.map_err(|error| error.in_step(Step::Fill))?;
        let backup = self.back_up().await.map_err(|error| error.in_step(Step::Backup))?;
        let wal = self.archive().await.map_err(|error| error.in_step(Step::Archive))?;
        let mount = self.mount().await.map_err(|error| error.in_step(Step::Mount))?;
        let (clone, server) = self.clone_it().await.map_err(|error| error.in_step(Step::Clone))?;
        let tables = self.compare(&server).await.map_err(|error| error.in_step(Step::Compare))?;
        self.write(&server).await.map_err(|error| error.in_step(Step::Write))?;
        self.end().await.map_err(|error| error.in_step(Step::CleanUp))?;
        Ok(DemoReport {
            ok: true,
            postgresql,
            database_bytes,
            backup,
            wal,
            mount,
            clone,
            tables,
            checksums_equal: true,
            steps: std::mem::take(&mut self.steps),
            folder: self.stage.kept_folder(),
        })
    }

    async fn prepare(&mut self) -> Result<(), DemoError> {
        let timer = self.begin(Step::Prepare);
        let folder = self.stage.scratch.join("keys");
        let create = ["key", "create", "--id", "demo"];
        let key: CreatedKey = self.stage.walden.run_in(&folder, &create).await?;
        self.stage.configure(&key.configuration)?;
        let what = format!("keys and configuration in {}", self.stage.scratch.path().display());
        self.done(timer.report(what));
        Ok(())
    }

    async fn initdb(&mut self) -> Result<String, DemoError> {
        let timer = self.begin(Step::Initdb);
        self.stage.start_cluster().await?;
        let version = "select current_setting('server_version') as version";
        let session = self.stage.cluster()?.session_in("postgres").await?;
        let version = session.query_one(version, &[]).await?.text("version")?;
        let user = &self.stage.scratch.account().name;
        self.done(timer.report(format!("PostgreSQL {version} with page checksums, as user {user}")));
        Ok(version)
    }

    async fn fill(&mut self) -> Result<u64, DemoError> {
        let timer = self.begin(Step::Fill);
        let cluster = self.stage.cluster()?;
        cluster.fill(self.scale).await?;
        let bytes = cluster.database_bytes().await?;
        let what = format!("pgbench at scale {} and a table of text with an index", self.scale);
        self.done(timer.report(what).with(bytes, None));
        Ok(bytes)
    }

    async fn back_up(&mut self) -> Result<BackupFigures, DemoError> {
        let walden = self.stage.walden.clone();
        let cluster = self.stage.cluster()?;
        cluster.start_load()?;
        tokio::time::sleep(WARM_UP).await;
        let before = cluster.transactions().await?;
        let timer = self.begin(Step::Backup);
        let backup: BackupDocument = walden.run(As::Server, &["backup"]).await?;
        let took = timer.took();
        let transactions = self.stage.cluster()?.transactions().await?.saturating_sub(before);
        let what = format!("basebackup {}; {transactions} transactions meanwhile", backup.id);
        self.done(timer.report_after(took, what).with(backup.stored_bytes, backup.requests));
        let (stored_bytes, requests) = (backup.stored_bytes, backup.requests);
        Ok(BackupFigures { seconds: took.as_secs_f64(), stored_bytes, requests, transactions })
    }

    async fn archive(&mut self) -> Result<WalFigures, DemoError> {
        let timer = self.begin(Step::Archive);
        tokio::time::sleep(LOAD_AFTER).await;
        let cluster = self.stage.cluster()?;
        cluster.stop_load().await?;
        cluster.archive_to_the_end().await?;
        let listed: WalDocument = self.stage.walden.run(As::Server, &["wal", "list"]).await?;
        let figures = listed.figures();
        let what = format!("{} segments of WAL, to the last record", figures.segments);
        self.done(timer.report(what).with(figures.stored_bytes, None));
        Ok(figures)
    }

    async fn mount(&mut self) -> Result<MountFigures, DemoError> {
        let timer = self.begin(Step::Mount);
        let folder = self.stage.mount().await?;
        let took = timer.took();
        let figures = stage::look_around(folder, took).await?;
        let what = format!("{} files of the basebackup, {} segments", figures.files, figures.wal_segments);
        self.done(timer.report(what).with(figures.bytes, None));
        Ok(figures)
    }

    async fn clone_it(&mut self) -> Result<(CloneFigures, ConnectOptions), DemoError> {
        let timer = self.begin(Step::Clone);
        let status = self.stage.create_clone(CLONE).await?;
        let server = status.connect_options()?;
        let account = i64::from(self.scale) * 100_000 / 2 + 1;
        let look_up = format!("select abalance::bigint from public.pgbench_accounts where aid = {account}");
        Session::connect(&server).await?.query_one(&look_up, &[]).await?.int("abalance")?;
        let took = timer.took();
        let status = self.stage.clone_status(CLONE).await?;
        let what = "recovered to the end of the archive, first query answered";
        self.done(timer.report_after(took, what).with(status.bytes_fetched, Some(status.requests)));
        let (bytes_fetched, requests) = (status.bytes_fetched, status.requests);
        Ok((CloneFigures { seconds_to_first_query: took.as_secs_f64(), bytes_fetched, requests }, server))
    }

    async fn compare(&mut self, clone: &ConnectOptions) -> Result<u64, DemoError> {
        let timer = self.begin(Step::Compare);
        let source = Checksums::of(&self.stage.cluster()?.connect_options()).await?;
        source.compare(&Checksums::of(clone).await?)?;
        let status = self.stage.clone_status(CLONE).await?;
        let what = format!("{} tables, every row the same", source.len());
        self.done(timer.report(what).with(status.bytes_fetched, Some(status.requests)));
        Ok(source.len())
    }

    async fn write(&mut self, clone: &ConnectOptions) -> Result<(), DemoError> {
        let timer = self.begin(Step::Write);
        let script = "create table written (n int); insert into written select generate_series(1, 1000)";
        let psql = ["clone", "psql", CLONE, "--", "-X", "-q", "-d", cluster::DATABASE, "-c", script];
        self.stage.walden.run_text(As::Caller, &psql).await?;
        let written = "select count(*) from public.written";
        if Session::connect(clone).await?.query_one(written, &[]).await?.int("count")? != 1000 {
            return Err(DemoError::Leaked("what was written in the clone is not there"));
        }
        let present = "select to_regclass('public.written') is not null as present";
        if self.stage.cluster()?.session().await?.query_one(present, &[]).await?.bool("present")? {
            return Err(DemoError::Leaked("what was written in the clone is in the source as well"));
        }
        self.done(timer.report("1000 rows in a new table of the clone, the source untouched"));
        Ok(())
    }

    async fn end(&mut self) -> Result<(), DemoError> {
        let timer = self.begin(Step::CleanUp);
        self.stage.delete_clone(CLONE).await?;
        self.stage.unmount().await?;
        self.stage.cluster()?.stop().await?;
        self.done(timer.report("clone deleted, unmounted, server stopped"));
        Ok(())
    }

    fn begin(&self, step: Step) -> Timer {
        self.audience.begins(step);
        Timer { step, clock: self.clock.clone(), started: self.clock.monotonic() }
    }

    fn done(&mut self, report: StepReport) {
        self.audience.done(&report);
        self.steps.push(report);
    }
}

/// Measures one step.
struct Timer {
    step: Step,
    clock: Arc<dyn Clock>,
    started: std::time::Instant,
}

impl Timer {
    fn took(&self) -> Duration {
        self.clock.monotonic().saturating_duration_since(self.started)
    }

    fn report(&self, what: impl Into<String>) -> StepReport {
        self.report_after(self.took(), what)
    }

    fn report_after(&self, took: Duration, what: impl Into<String>) -> StepReport {
        StepReport::new(self.step, took, what)
    }
}

/// What is read from `key create`.
#[derive(Debug, Deserialize)]
struct CreatedKey {
    configuration: String,
}

/// What is read from `backup`.
#[derive(Debug, Deserialize)]
struct BackupDocument {
    id: String,
    stored_bytes: u64,
    requests: Option<u64>,
}

/// What is read from `wal list`.
#[derive(Debug, Deserialize)]
struct WalDocument {
    clusters: Vec<WalCluster>,
}

#[derive(Debug, Deserialize)]
struct WalCluster {
    timelines: Vec<WalTimeline>,
}

#[derive(Debug, Deserialize)]
struct WalTimeline {
    segments: u64,
    bytes: u64,
    stored_bytes: u64,
}

impl WalDocument {
    fn figures(&self) -> WalFigures {
        let mut figures = WalFigures::default();
        for timeline in self.clusters.iter().flat_map(|cluster| &cluster.timelines) {
            figures.segments += timeline.segments;
            figures.bytes += timeline.bytes;
            figures.stored_bytes += timeline.stored_bytes;
        }
        figures
    }
}
