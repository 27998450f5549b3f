//! `walden clone status` and `walden clone list`.
//! Field names of the JSON are those of `control::CloneStatus`, which scripts rely on.

use std::fmt::{self, Write};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::control::{CloneStatus, HydrationState};
use crate::instance::clone_folder::CloneFolder;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::{Align, TextStyle, TextTable, duration, size};
use super::chosen::Chosen;
use super::expired::delete_expired;
use super::status_of;

/// Shows how a clone is
#[derive(Debug, Args)]
pub(super) struct CloneStatusCommand {
    /// The name of the clone, or a pattern with * and ?
    name: String,
}

/// Shows the clones of this host
#[derive(Debug, Args)]
pub(super) struct CloneList {
    /// A name, or a pattern with * and ?; else all
    name: Option<String>,
}

impl CloneStatusCommand {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let chosen = Chosen::find(context, &self.name)?;
        chosen.each("asked", asked(context), |clones| match (&clones[..], chosen.are_several) {
            ([status], false) => context.output.print(&StatusReport(status.clone())),
            _ => context.output.print(&SeveralReport { clones }),
        })
    }
}

impl CloneList {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        delete_expired(context)?;
        let chosen = match &self.name {
            Some(name) => Chosen::find(context, name)?,
            None => Chosen::all(context)?,
        };
        chosen.each("asked", asked(context), |clones| context.output.print(&ListReport { clones }))
    }
}

/// Asks a clone how it is.
fn asked(context: &Context) -> impl Fn(&CloneFolder) -> Result<CloneStatus, CommandError> {
    |folder| context.block_on_one_thread(status_of(folder))?
}

/// How one clone is.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct StatusReport(pub CloneStatus);

/// Several clones, a line each.
#[derive(Debug, Serialize)]
pub(super) struct ListReport {
    pub clones: Vec<CloneStatus>,
}

/// Several clones, as much of each as of one.
#[derive(Debug, Serialize)]
struct SeveralReport {
    clones: Vec<CloneStatus>,
}

impl Report for SeveralReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        self.clones.iter().try_for_each(|status| StatusReport(status.clone()).write_text(out, style))
    }
}

impl Report for StatusReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let status = &self.0;
        writeln!(out, "clone {} is {}", status.name, status.state)?;
        if let Some(message) = &status.message {
            writeln!(out, "  because       {message}")?;
        }
        writeln!(
            out,
            "  basebackup    {} of site {}, recovered to {}",
            status.basebackup, status.site, status.target
        )?;
        writeln!(out, "  data          {}", status.data_directory.display())?;
        for warning in &status.warnings {
            writeln!(out, "  warning       {warning}")?;
        }
        if let Some(at) = status.expires_at {
            writeln!(out, "  expires       {}, unless somebody is connected then", style.time(at))?;
        }
        let (socket, port, user) = (status.socket_directory.display(), status.port, &status.superuser);
        writeln!(out, "  connect       psql -h {socket} -p {port} -U {user}")?;
        if !status.settings.is_empty() {
            let (count, name) = (status.settings.len(), &status.name);
            writeln!(
                out,
                "  settings      {count} differ from the source's: see walden --output json clone status {name}"
            )?;
        }
        if let Some(seconds) = status.seconds_to_ready {
            let (fetched, total) = (size(status.bytes_fetched), size(status.total_bytes));
            writeln!(out, "  first answer  after {seconds:.2} s")?;
            writeln!(out, "  fetched       {fetched} in {} requests, of {total}", status.requests)?;
        }
        if status.total_bytes > 0 {
            writeln!(out, "  local         {}", local_text(status))?;
        }
        if let Some(reason) = &status.cut_over_waits_for {
            writeln!(out, "  cut-over      waits: {reason}")?;
        }
        Ok(())
    }
}

/// Says how much of the basebackup is local, and what becomes of the rest.
fn local_text(status: &CloneStatus) -> String {
    let hydration = &status.hydration;
    let (local, total) = (size(status.hydrated_bytes), size(status.total_bytes));
    let reason = hydration.reason.as_deref().unwrap_or("for no reason it tells");
    let mut text = match hydration.state {
        HydrationState::Done => return format!("all of {total}"),
        HydrationState::Off => format!("{local} of {total}; the rest comes when it is read"),
        HydrationState::Waiting => format!("{local} of {total}; the rest waits: {reason}"),
        HydrationState::Failed => format!("{local} of {total}; the rest has failed: {reason}"),
        // Nothing is known of its pace in the first moments.
        HydrationState::Running if hydration.bytes_per_second == 0 => {
            format!("{local} of {total}; the rest is coming")
        }
        HydrationState::Running => {
            format!("{local} of {total}; the rest comes at {}/s", size(hydration.bytes_per_second))
        }
    };
    if hydration.state == HydrationState::Running
        && let Some(seconds) = hydration.seconds_left
    {
        text += &format!(" in {}", duration(Duration::from_secs(seconds)));
    }
    match hydration.failed_files {
        0 => {}
        1 => text += "; one file could not come",
        files => text += &format!("; {files} files could not come"),
    }
    text
}

impl Report for ListReport {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        let mut table = TextTable::new(&[
            ("name", Align::Left),
            ("state", Align::Left),
            ("basebackup", Align::Left),
            ("target", Align::Left),
            ("socket", Align::Left),
            ("port", Align::Right),
        ]);
        for clone in &self.clones {
            table.row([
                clone.name.clone(),
                clone.state.to_string(),
                clone.basebackup.clone(),
                clone.target.clone(),
                clone.socket_directory.display().to_string(),
                clone.port.to_string(),
            ]);
        }
        if table.is_empty() {
            return writeln!(out, "there is no clone on this host");
        }
        table.write(out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{CloneState, HydrationStatus};

    fn status(hydrated_bytes: u64, hydration: HydrationStatus) -> CloneStatus {
        CloneStatus {
            name: "one".to_owned(),
            state: CloneState::Running,
            message: None,
            site: "main".to_owned(),
            basebackup: "20261120T101500Z-3fa9".to_owned(),
            target: "the end of the archive".to_owned(),
            port: 5432,
            socket_directory: "/run".into(),
            data_directory: "/data".into(),
            superuser: "postgres".to_owned(),
            supervisor_pid: None,
            server_pid: None,
            warnings: Vec::new(),
            expires_at: None,
            settings: Vec::new(),
            hydrated_bytes,
            total_bytes: 4 << 20,
            hydration,
            bytes_fetched: 0,
            requests: 0,
            seconds_to_ready: None,
            cut_over_waits_for: None,
        }
    }

    #[test]
    fn the_rest_is_told_with_rate_time_and_what_keeps_it() {
        let running = HydrationStatus {
            state: HydrationState::Running,
            bytes_per_second: 1 << 20,
            seconds_left: Some(2),
            ..HydrationStatus::default()
        };
        let text = |hydration: &HydrationStatus| local_text(&status(2 << 20, hydration.clone()));
        assert_eq!(text(&running), "2.00 MiB of 4.00 MiB; the rest comes at 1.00 MiB/s in 2.0 s");
        let reason = Some("the disk is full".to_owned());
        let waiting = HydrationStatus { state: HydrationState::Waiting, reason, ..running.clone() };
        assert_eq!(text(&waiting), "2.00 MiB of 4.00 MiB; the rest waits: the disk is full");
        let failed = HydrationStatus { state: HydrationState::Failed, failed_files: 2, ..waiting };
        let told = "2.00 MiB of 4.00 MiB; the rest has failed: the disk is full; 2 files could not come";
        assert_eq!(text(&failed), told);
        let done = HydrationStatus { state: HydrationState::Done, ..HydrationStatus::default() };
        assert_eq!(text(&done), "all of 4.00 MiB");
        let off = "2.00 MiB of 4.00 MiB; the rest comes when it is read";
        assert_eq!(text(&HydrationStatus::default()), off);
    }

    #[test]
    fn an_answer_of_a_supervisor_reads_back() {
        let hydration = HydrationStatus {
            state: HydrationState::Failed,
            reason: Some("a pack is damaged".to_owned()),
            rate_limit: Some(10),
            ..HydrationStatus::default()
        };
        let sent = status(1, hydration);
        let json = serde_json::to_value(&sent).unwrap();
        assert_eq!(json["hydration"]["state"], "failed");
        assert_eq!(json["hydration"]["seconds_left"], serde_json::Value::Null);
        assert_eq!(serde_json::from_value::<CloneStatus>(json).unwrap(), sent);
    }
}
