//! `walden internal serve-restore`: the supervisor of one unfinished restore, started by `restore --instant` and `--resume`.
//! What was spent before it began is handed over as arguments, so that its figures are those of the whole.

use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use clap::Args;

use crate::config::KeyPurpose;
use crate::instance::instant::supervise::{SuperviseOptions, supervise};
use crate::instance::instant::unfinished::{LastWords, control_socket};

use super::clone::HandedOver;
use super::context::Context;
use super::error::CommandError;
use super::instant_process::server_log;
use super::serve_clone::terminated;

/// Mounts an unfinished restore, runs its PostgreSQL and answers for it
#[derive(Debug, Args)]
pub(super) struct ServeRestore {
    /// The data directory
    target_dir: PathBuf,
    /// Leaves it to somebody else to start PostgreSQL
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    spent: HandedOver,
}

impl ServeRestore {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let served = self.serve(context);
        if let Err(error) = &served {
            let words = LastWords {
                kind: error.kind.name().to_owned(),
                message: error.message(),
                hint: error.hint.clone(),
            };
            if let Err(error) = words.write(&self.target_dir) {
                tracing::warn!("{error}");
            }
        }
        served
    }

    fn serve(&self, context: &Context) -> Result<(), CommandError> {
        let (config, site) = (context.config()?, context.site()?);
        let now = context.clock().monotonic();
        let spent = Duration::try_from_secs_f64(self.spent.spent_seconds).unwrap_or_default();
        let run = config.paths.open_run()?.path;
        let socket = control_socket(&run, &self.target_dir)?;
        let server_log = server_log(context, &self.target_dir)?;
        context.block_on(async {
            let mut terminated = pin!(terminated());
            let repository = tokio::select! {
                opened = context.open_repository(site, KeyPurpose::Read) => opened?,
                () = terminated.as_mut() => return Ok(()),
            };
            let options = SuperviseOptions {
                target: self.target_dir.clone(),
                socket,
                server_log,
                repository,
                traffic: context.traffic.clone(),
                spent_requests: self.spent.spent_requests,
                spent_bytes: self.spent.spent_bytes,
                environment: context.environment.for_postgres(),
                asked_at: now.checked_sub(spent).unwrap_or(now),
                starts: !self.no_start,
            };
            Ok::<_, CommandError>(supervise(options, terminated).await?)
        })?
    }
}
