//! `walden clone finalize`: waits until everything of a clone is local, stops it, and makes an ordinary data directory
//! of it.
//!
//! Until the order is written it is a clone like before, and an attempt that ends early has only fetched; from then on
//! it can be finalized and nothing else, whatever kills this. The pin ends when the directory needs nothing any more,
//! and the clone's folder goes last. Deliberately absent: starting the server, which is its owner's affair now.

use std::fmt::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::config::{KeyPurpose, WalSource};
use crate::control::{self, CloneState, HydrationState, Reply, Request};
use crate::disk::LockFile;
use crate::instance::adoption::claim_timeline;
use crate::instance::clone_folder::{CloneFolder, CloneSpec, HydrateSpec};
use crate::instance::finalize::FinalizeOrder;
use crate::instance::finalize_plan::{
    Adoption, check_place, clear_folder, plan_order, read_order, write_order,
};
use crate::monitor::{Progress, Task};
use crate::restore::target::resolve;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::site::archive_command;
use super::super::text::TextStyle;
use super::delete::{detach_dead_mount, let_go};
use super::start::{HandedOver, start};
use super::stop::{stop, wait_for_end};
use super::{ask, existing, is_supervised, status_of};

/// Makes an ordinary data directory of a clone
#[derive(Debug, Args)]
pub(super) struct CloneFinalize {
    /// The name of the clone
    name: String,

    /// Where the data directory is to be, absent or empty; else in the clone's folder
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,

    /// Lets it archive into the site it was made from, whose cluster it then goes on as
    #[arg(long)]
    adopt: bool,
}

/// How often a clone is asked whether everything of it is local.
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize)]
struct Finalized {
    name: String,
    data_directory: PathBuf,
    tablespaces: Vec<PathBuf>,
    adopted: bool,
    start: String,
}

impl CloneFinalize {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        // There is none where an earlier call has come as far as removing it.
        let before = folder.read_spec().ok();
        let prepared = self.prepare(context, &folder);
        let (order, _lock) = prepared.inspect_err(|_| give_back(&folder, before.as_ref()))?;
        order.carry_out()?;
        if let Some(pin) = &order.pin {
            context.block_on_one_thread(let_go(context, &order.site, pin))??;
        }
        clear_folder(&folder, &order)?;
        context.end_progress();
        context.output.print(&Finalized::of(&order))
    }

    /// Has everything of the clone local and its server stopped, and returns what is to be done, which is written down then.
    fn prepare(
        &self,
        context: &Context,
        folder: &CloneFolder,
    ) -> Result<(FinalizeOrder, LockFile), CommandError> {
        if read_order(folder)?.is_none() {
            check_place(folder, self.to.as_deref())?;
            context.block_on(make_whole(context, folder))??;
        }
        let lock = context.block_on_one_thread(folder.lock_to_work())??;
        let order = match read_order(folder)? {
            Some(order) => self.check_same(order)?,
            None => self.order(context, folder)?,
        };
        Ok((order, lock))
    }

    /// Decides and writes down what is done; from here on the clone is on its way.
    fn order(&self, context: &Context, folder: &CloneFolder) -> Result<FinalizeOrder, CommandError> {
        detach_dead_mount(folder)?;
        let spec = folder.read_spec()?;
        let site = context.config()?.site(Some(&spec.site))?;
        let command = archive_command(context, site)?.value();
        let adoption = match (self.adopt, site.wal) {
            (false, _) => Adoption::Private,
            (true, WalSource::Push) => Adoption::Archives(&command),
            (true, WalSource::Receive) => Adoption::Received,
        };
        let order = plan_order(folder, &spec, self.to.as_deref(), adoption)?;
        if order.is_adopted {
            // What cannot be archived later is to be known while it is a clone still.
            context.block_on(async {
                let repository = context.open_repository(site, KeyPurpose::Write).await?;
                Ok::<_, CommandError>(claim_timeline(&repository, spec.cluster, folder).await?)
            })??;
        }
        write_order(folder, &order)?;
        Ok(order)
    }

    /// Goes on with what an earlier call decided, unless this one asks for something else.
    fn check_same(&self, order: FinalizeOrder) -> Result<FinalizeOrder, CommandError> {
        let is_elsewhere = self.to.as_ref().is_some_and(|to| resolve(to) != order.data.to);
        if !is_elsewhere && (order.is_adopted || !self.adopt) {
            return Ok(order);
        }
        let (name, place) = (&self.name, order.data.to.display());
        let adopted = if order.is_adopted { " --adopt" } else { "" };
        let message =
            format!("clone \"{name}\" is on its way to \"{place}\" already, and has to arrive there");
        Err(CommandError::failed(message)
            .hint(format!("Call it as it was begun: --to \"{place}\"{adopted}.")))
    }
}

/// Has a clone that is not finalized after all live as long, and fetch as much, as it was told before.
fn give_back(folder: &CloneFolder, before: Option<&CloneSpec>) {
    let Some(before) = before.filter(|_| !folder.order_file().exists()) else { return };
    let given_back = folder.read_spec().and_then(|spec| {
        let own = CloneSpec { expires_at: before.expires_at, hydrate: before.hydrate, ..spec.clone() };
        if own == spec { Ok(()) } else { folder.write_spec(&own) }
    });
    if let Err(error) = given_back {
        tracing::warn!("the clone has no end any more, and fetches everything when it is started: {error}");
    }
}

/// Waits until everything of the clone is local, and stops it.
async fn make_whole(context: &Context, folder: &CloneFolder) -> Result<(), CommandError> {
    let (name, mut spec) = (folder.name(), folder.read_spec()?);
    // Before anything of it is changed; also a stopped one may turn out to recover.
    if is_supervised(folder)? && status_of(folder).await?.state != CloneState::Running {
        return Err(refused(name, "its recovery has not ended"));
    }
    if spec.expires_at.take().is_some() {
        // Who makes it last does not want it deleted on the way.
        folder.write_spec(&spec)?;
    }
    if spec.hydrate != HydrateSpec::default() && !folder.read_hydration().is_done {
        // It is stopped in the end anyway: started again, it fetches everything, and as fast as it comes.
        stop(folder).await?;
        spec.hydrate = HydrateSpec::default();
        folder.write_spec(&spec)?;
    }
    if !is_supervised(folder)? {
        let spent = HandedOver::of(context, context.clock().monotonic());
        start(context, folder, &spec.site, spent).await?;
    }
    // What could not come before is tried again.
    if status_of(folder).await?.hydration.state == HydrationState::Failed {
        ask(folder, &Request::Hydrate).await?;
    }
    let mut progress = Hydration { context, progress: None, shown: 0, waits_for: None };
    loop {
        match control::request(&folder.control_socket(), &Request::Finalize).await {
            Ok(Reply::Done) => break,
            Ok(Reply::NotYet { .. }) => progress.show(folder).await?,
            Ok(Reply::Failed { message }) => return Err(refused(name, &message)),
            Ok(other @ Reply::Status(_)) => {
                return Err(CommandError::failed(format!("the supervisor answered {other:?}")));
            }
            Err(error) => {
                let last = folder.read_state().ok().and_then(|last| last.message);
                let why = last.unwrap_or_else(|| error.to_string());
                return Err(CommandError::failed(format!("clone \"{name}\" ended on the way: {why}"))
                    .hint(format!("See \"{}\".", folder.mount_log().display())));
            }
        }
        tokio::time::sleep(POLL).await;
    }
    wait_for_end(folder).await
}

fn refused(name: &str, message: &str) -> CommandError {
    CommandError::failed(format!("clone \"{name}\" cannot be finalized: {message}"))
        .hint(format!("\"walden clone promote {name}\" ends its recovery."))
}

/// What is shown while the rest is fetched.
struct Hydration<'a> {
    context: &'a Context,
    progress: Option<Progress>,
    shown: u64,
    waits_for: Option<String>,
}

impl Hydration<'_> {
    async fn show(&mut self, folder: &CloneFolder) -> Result<(), CommandError> {
        let status = status_of(folder).await?;
        if status.hydration.state == HydrationState::Failed {
            let why =
                status.hydration.reason.unwrap_or_else(|| "some of it does not become local".to_owned());
            let message = format!("clone \"{}\" does not become whole: {why}", status.name);
            return Err(CommandError::failed(message)
                .hint(format!("It runs on as before. See \"{}\".", folder.mount_log().display())));
        }
        if status.hydration.state == HydrationState::Waiting && status.hydration.reason != self.waits_for {
            self.waits_for.clone_from(&status.hydration.reason);
            tracing::info!("hydration waits: {}", self.waits_for.as_deref().unwrap_or_default());
        }
        let task = Task::bytes("hydrate", Some(status.total_bytes));
        let progress = self.progress.get_or_insert_with(|| self.context.monitor().start(task));
        progress.advance(status.hydrated_bytes.saturating_sub(self.shown));
        self.shown = self.shown.max(status.hydrated_bytes);
        Ok(())
    }
}

impl Finalized {
    fn of(order: &FinalizeOrder) -> Self {
        let data = order.data.to.display();
        let start = format!("pg_ctl -D '{data}' -l '{data}.log' start");
        let mut places = order.places().map(PathBuf::from);
        let data_directory = places.next().unwrap_or_default();
        let (name, adopted) = (order.name.clone(), order.is_adopted);
        Self { name, data_directory, tablespaces: places.collect(), adopted, start }
    }
}

impl Report for Finalized {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        writeln!(out, "clone {} is a data directory", self.name)?;
        writeln!(out, "  data          {}", self.data_directory.display())?;
        for tablespace in &self.tablespaces {
            writeln!(out, "  tablespace    {}", tablespace.display())?;
        }
        writeln!(out, "  start         {}", self.start)?;
        match self.adopted {
            true => writeln!(
                out,
                "  archives      yes: once it runs, have the site's connection lead to it, and back it up"
            ),
            false => writeln!(
                out,
                "  archives      no: it is as private as the clone was, by postgresql.auto.conf"
            ),
        }
    }
}
