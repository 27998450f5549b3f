//! `walden clone start`: starts the supervisor of a clone and waits until PostgreSQL answers.
//!
//! The supervisor is this binary executed again, in a session of its own, so that it outlives the terminal. What
//! has been spent before it began (planning, requests to the store) is handed over, so that the figures of
//! `clone status` are those of the whole.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;

use crate::control::{CloneState, CloneStatus, HydrationState, Request};
use crate::instance::clone_folder::CloneFolder;
use crate::repo;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::exit::ExitKind;
use super::chosen::Chosen;
use super::expired::refuse_over;
use super::hydrate_arguments::HydrateArguments;
use super::{ask, is_supervised, refuse_finalizing, status_of};

/// Starts a clone that was stopped, or that a reboot took down
#[derive(Debug, Args)]
pub(super) struct CloneStart {
    /// The name of the clone, or a pattern with * and ?: of several, those that do not run
    name: String,

    #[command(flatten)]
    hydrate: HydrateArguments,
}

/// What was spent before the supervisor began.
#[derive(Debug, Clone, Default, Args)]
pub(in crate::cli) struct HandedOver {
    /// Seconds.
    #[arg(long, default_value_t = 0.0)]
    pub spent_seconds: f64,
    /// Requests to the store.
    #[arg(long, default_value_t = 0)]
    pub spent_requests: u64,
    /// Bytes read from the store.
    #[arg(long, default_value_t = 0)]
    pub spent_bytes: u64,
}

/// How often a starting clone is asked.
const POLL: Duration = Duration::from_millis(20);

impl CloneStart {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let chosen = Chosen::find(context, &self.name)?;
        let start = |folder: &CloneFolder| {
            if !is_supervised(folder)? {
                self.remember_hydration(folder)?;
                return start_and_tell(context, folder);
            }
            self.go_on(context, folder, chosen.are_several)
        };
        chosen.each("started", start, |started| chosen.print(context, started))
    }

    /// Has a clone that runs fetch again what could not come; one of which nothing failed is none to be started.
    fn go_on(
        &self,
        context: &Context,
        folder: &CloneFolder,
        is_passed_over: bool,
    ) -> Result<CloneStatus, CommandError> {
        context.block_on_one_thread(async {
            let status = status_of(folder).await?;
            // Options are for the next start.
            if status.hydration.state == HydrationState::Failed && !self.hydrate.are_given() {
                ask(folder, &Request::Hydrate).await?;
                return status_of(folder).await;
            }
            if is_passed_over {
                return Ok(status);
            }
            let message = format!("clone \"{}\" is running already", folder.name());
            Err(CommandError::failed(message))
        })?
    }

    /// Writes down how the rest of the clone comes from now on, where that was said.
    fn remember_hydration(&self, folder: &CloneFolder) -> Result<(), CommandError> {
        let mut spec = folder.read_spec()?;
        let hydrate = self.hydrate.change(spec.hydrate);
        if hydrate != spec.hydrate {
            spec.hydrate = hydrate;
            folder.write_spec(&spec)?;
        }
        Ok(())
    }
}

/// Starts a clone and tells how it is.
pub(super) fn start_and_tell(context: &Context, folder: &CloneFolder) -> Result<CloneStatus, CommandError> {
    let asked_at = context.clock().monotonic();
    let site = folder.read_spec()?.site;
    context.block_on(async {
        start(context, folder, &site, HandedOver::of(context, asked_at)).await?;
        status_of(folder).await
    })?
}

impl HandedOver {
    /// What this process has spent since `asked_at`.
    pub(in crate::cli) fn of(context: &Context, asked_at: Instant) -> Self {
        let (traffic, now) = (context.traffic.snapshot(), context.clock().monotonic());
        Self {
            spent_seconds: now.saturating_duration_since(asked_at).as_secs_f64(),
            spent_requests: traffic.requests(),
            spent_bytes: traffic.bytes_read,
        }
    }
}

/// Starts the supervisor and waits for the clone's first answer.
pub(super) async fn start(
    context: &Context,
    folder: &CloneFolder,
    site: &str,
    spent: HandedOver,
) -> Result<(), CommandError> {
    refuse_finalizing(folder)?;
    refuse_over(context, folder)?;
    let mut supervisor = spawn(context, folder, site, &spent)?;
    loop {
        if let Ok(Some(status)) = supervisor.try_wait() {
            return Err(failure(folder, &status.to_string()));
        }
        if let Ok(status) = status_of(folder).await
            && status.supervisor_pid == Some(supervisor.id())
            && status.seconds_to_ready.is_some()
            && (status.state != CloneState::Recovering || folder.read_spec()?.read_early)
        {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

fn spawn(
    context: &Context,
    folder: &CloneFolder,
    site: &str,
    spent: &HandedOver,
) -> Result<Child, CommandError> {
    let failed = |error: std::io::Error| {
        CommandError::failed(format!("could not start the clone's supervisor: {error}"))
    };
    let log = File::options().append(true).create(true).open(folder.mount_log()).map_err(failed)?;
    Command::new(std::env::current_exe().map_err(failed)?)
        .arg("--config")
        .arg(&context.config()?.file)
        .args(["--site", site, "internal", "serve-clone", folder.name()])
        .args(["--spent-seconds", &spent.spent_seconds.to_string()])
        .args(["--spent-requests", &spent.spent_requests.to_string()])
        .args(["--spent-bytes", &spent.spent_bytes.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(failed)
}

/// Says why the supervisor ended: what it wrote down, or else how it ended.
fn failure(folder: &CloneFolder, status: &str) -> CommandError {
    let last = folder.read_state().ok();
    let kind =
        if last.as_ref().is_some_and(|last| last.damaged) { ExitKind::Damaged } else { ExitKind::Failed };
    let (message, hint) = last.map(|last| (last.message, last.hint)).unwrap_or_default();
    let message = message.unwrap_or_else(|| format!("the supervisor ended with {status}"));
    let hint = hint.unwrap_or_else(|| match kind {
        ExitKind::Damaged => repo::Error::DAMAGED_HINT.to_owned(),
        _ => format!("See \"{}\" and \"{}\".", folder.server_log().display(), folder.mount_log().display()),
    });
    CommandError::new(kind, format!("clone \"{}\" did not start: {message}", folder.name())).hint(hint)
}
