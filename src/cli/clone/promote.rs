//! `walden clone promote`: ends the recovery of a clone that waits at its target or lets readers in.
//! It returns when the clone takes writes, on a timeline of its own.

use std::time::Duration;

use clap::Args;

use crate::control::{CloneState, Request};

use super::super::context::Context;
use super::super::error::CommandError;
use super::status::StatusReport;
use super::{ask, existing, status_of};

/// Ends a clone's recovery, so that it takes writes
#[derive(Debug, Args)]
pub(super) struct ClonePromote {
    /// The name of the clone
    name: String,
}

/// How often a clone is asked whether its recovery has ended.
const POLL: Duration = Duration::from_millis(50);

impl ClonePromote {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        let status = context.block_on_one_thread(async {
            ask(&folder, &Request::Promote).await?;
            loop {
                let status = status_of(&folder).await?;
                match status.state {
                    CloneState::Running => break Ok(status),
                    CloneState::Creating | CloneState::Recovering => {}
                    // It came to its target only now, or has not heard yet; then it is running in a moment.
                    CloneState::Paused => drop(ask(&folder, &Request::Promote).await),
                    CloneState::Stopped | CloneState::Failed => {
                        let why = status.message.unwrap_or_else(|| format!("it is {}", status.state));
                        let message = format!("clone \"{}\" ended before its recovery did: {why}", self.name);
                        break Err(CommandError::failed(message)
                            .hint(format!("See \"{}\".", folder.server_log().display())));
                    }
                }
                tokio::time::sleep(POLL).await;
            }
        })??;
        context.output.print(&StatusReport(status))
    }
}
