//! `walden clone …`: writable instances of a basebackup, private to this host.
//!
//! `create` decides and starts, the others look at the folder and ask the supervisor. A clone whose supervisor does
//! not answer is what its folder says it was last.

mod chosen;
mod create;
mod delete;
mod duplicate;
mod expired;
mod finalize;
mod hydrate_arguments;
mod log;
mod promote;
mod psql;
mod reload;
mod reset;
mod restart;
mod start;
mod status;
mod stop;

use clap::{Args, Subcommand};

use crate::control::{self, CloneState, CloneStatus, Reply, Request};
use crate::disk;
use crate::instance::clone_folder::CloneFolder;
use crate::instance::supervise::resting_status;

use super::context::Context;
use super::error::CommandError;

pub(super) use expired::delete_over;
pub(super) use hydrate_arguments::HydrateArguments;
pub(super) use start::HandedOver;

/// Makes and runs writable clones of a basebackup
#[derive(Debug, Args)]
pub struct Clone {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Box<create::CloneCreate>),
    List(status::CloneList),
    Start(start::CloneStart),
    Stop(stop::CloneStop),
    Restart(restart::CloneRestart),
    Reload(reload::CloneReload),
    Status(status::CloneStatusCommand),
    Log(log::CloneLog),
    Psql(psql::ClonePsql),
    Reset(reset::CloneReset),
    Duplicate(duplicate::CloneDuplicate),
    Promote(promote::ClonePromote),
    Finalize(finalize::CloneFinalize),
    Delete(delete::CloneDelete),
}

impl Clone {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        match &self.action {
            Action::Create(command) => command.run(context),
            Action::List(command) => command.run(context),
            Action::Start(command) => command.run(context),
            Action::Stop(command) => command.run(context),
            Action::Restart(command) => command.run(context),
            Action::Reload(command) => command.run(context),
            Action::Status(command) => command.run(context),
            Action::Log(command) => command.run(context),
            Action::Psql(command) => command.run(context),
            Action::Reset(command) => command.run(context),
            Action::Duplicate(command) => command.run(context),
            Action::Promote(command) => command.run(context),
            Action::Finalize(command) => command.run(context),
            Action::Delete(command) => command.run(context),
        }
    }
}

/// Returns the folder of a clone that exists.
fn existing(context: &Context, name: &str) -> Result<CloneFolder, CommandError> {
    let clones = &context.config()?.paths.clones;
    let folder = CloneFolder::new(clones, name).map_err(|error| CommandError::usage(error.to_string()))?;
    if !folder.path().is_dir() {
        return Err(CommandError::failed(format!(
            "there is no clone \"{name}\" in \"{}\"",
            clones.display()
        ))
        .hint("\"walden clone list\" shows the clones."));
    }
    if folder.is_clone() {
        return Ok(folder);
    }
    let data = folder.finalized_data();
    if data.exists() {
        let message = format!("\"{name}\" is no clone any more: \"{}\" is a data directory", data.display());
        return Err(CommandError::failed(message).hint("PostgreSQL's own pg_ctl starts and stops it."));
    }
    Err(CommandError::failed(format!("\"{}\" is no clone", folder.path().display()))
        .hint("What is in it is not Walden's. \"walden clone list\" shows the clones."))
}

/// Refuses what would undo a clone that is on its way to be a data directory.
fn refuse_finalizing(folder: &CloneFolder) -> Result<(), CommandError> {
    if folder.order_file().exists() { Err(on_its_way(folder)) } else { Ok(()) }
}

fn on_its_way(folder: &CloneFolder) -> CommandError {
    let name = folder.name();
    CommandError::failed(format!("clone \"{name}\" is on its way to be an ordinary data directory"))
        .hint(format!("\"walden clone finalize {name}\" ends that."))
}

/// Has the supervisor do something.
async fn ask(folder: &CloneFolder, request: &Request) -> Result<(), CommandError> {
    let name = folder.name();
    match control::request(&folder.control_socket(), request).await {
        Ok(Reply::Done) => Ok(()),
        Ok(Reply::Failed { message } | Reply::NotYet { message }) => {
            Err(CommandError::failed(format!("clone \"{name}\" refused: {message}")))
        }
        Ok(other @ Reply::Status(_)) => {
            Err(CommandError::failed(format!("the supervisor answered {other:?}")))
        }
        Err(control::Error::NotRunning { .. }) => {
            Err(CommandError::failed(format!("clone \"{name}\" is not running"))
                .hint(format!("\"walden clone start {name}\" starts it.")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Asks the supervisor how the clone is; where nobody answers, its folder.
async fn status_of(folder: &CloneFolder) -> Result<CloneStatus, CommandError> {
    match control::request(&folder.control_socket(), &Request::Status).await {
        Ok(Reply::Status(status)) => return Ok(*status),
        Ok(other) => return Err(CommandError::failed(format!("the supervisor answered {other:?}"))),
        Err(control::Error::NotRunning { .. }) => {}
        Err(error) => return Err(CommandError::failed(error.to_string())),
    }
    let (spec, mut last) = (folder.read_spec()?, folder.read_state()?);
    // Whoever said "running" last and does not answer now was killed; what was only made rests like what was stopped.
    let is_passing = matches!(last.state, CloneState::Creating | CloneState::Running | CloneState::Paused);
    if is_passing && !is_supervised(folder)? {
        last.state = CloneState::Stopped;
    }
    Ok(resting_status(folder, &spec, &last))
}

/// Returns whether a supervisor is alive, answering or not.
fn is_supervised(folder: &CloneFolder) -> Result<bool, CommandError> {
    match folder.lock() {
        Ok(_) => Ok(false),
        Err(disk::Error::Locked { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
