//! What `walden restore --instant` prints once it is followed to its end.
//!
//! The names of the fields are a promise, kept in `docs/instant.md`.

use std::fmt::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::control::{RestoreStatus, RestoredServer, RestoredSetting, RestoredTablespace};

use super::output::Report;
use super::text::{TextStyle, duration, size};

/// The report; field names are stable.
#[derive(Debug, Serialize)]
pub(super) struct InstantReport {
    state: State,
    site: String,
    basebackup: String,
    target_directory: PathBuf,
    tablespaces: Vec<RestoredTablespace>,
    timeline: u32,
    target: Option<String>,
    server: RestoredServer,
    server_pid: Option<u32>,
    supervisor_pid: u32,
    answered_after_seconds: Option<f64>,
    plain_after_seconds: Option<f64>,
    cut_over: Option<String>,
    requests: u64,
    bytes_fetched: u64,
    hydrated_bytes: u64,
    total_bytes: u64,
    settings: Vec<RestoredSetting>,
    config_settings: Vec<RestoredSetting>,
    command_line_settings: Vec<RestoredSetting>,
    warnings: Vec<String>,
}

/// How far a restore has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It is mounted, and no server of it answers.
    Mounted,
    /// Its server answers, and not everything is there.
    Answering,
    /// It is an ordinary data directory.
    Plain,
}

impl InstantReport {
    /// Creates the report of a restore that is as `status` says.
    pub(super) fn of(status: &RestoreStatus) -> Self {
        let state = match (status.is_plain, status.server.answers()) {
            (true, _) => State::Plain,
            (false, true) => State::Answering,
            (false, false) => State::Mounted,
        };
        let RestoreStatus { site, basebackup, target_directory, tablespaces, target, warnings, .. } =
            status.clone();
        let RestoreStatus { settings, config_settings, command_line_settings, .. } = status.clone();
        Self {
            state,
            site,
            basebackup,
            target_directory,
            tablespaces,
            timeline: status.timeline,
            target,
            server: status.server,
            server_pid: status.server_pid,
            supervisor_pid: status.supervisor_pid,
            answered_after_seconds: status.answered_after_seconds,
            plain_after_seconds: status.plain_after_seconds,
            cut_over: status.cut_over.clone(),
            requests: status.requests,
            bytes_fetched: status.bytes_fetched,
            hydrated_bytes: status.hydrated_bytes,
            total_bytes: status.total_bytes,
            settings,
            config_settings,
            command_line_settings,
            warnings,
        }
    }
}

impl Report for InstantReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        writeln!(out, "basebackup {} to \"{}\"", self.basebackup, self.target_directory.display())?;
        for RestoredTablespace { oid, name, directory } in &self.tablespaces {
            writeln!(out, "tablespace {oid} \"{name}\" to \"{}\"", directory.display())?;
        }
        let after = |seconds: Option<f64>| {
            let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            seconds.map_or("an unknown time".to_owned(), duration)
        };
        if let Some(seconds) = self.answered_after_seconds {
            writeln!(out, "answered after {}; the server is {}", after(Some(seconds)), self.server)?;
        } else if self.state == State::Mounted {
            writeln!(out, "no server has answered; it is {}", self.server)?;
        }
        match self.state {
            State::Plain => {
                let after = after(self.plain_after_seconds);
                writeln!(
                    out,
                    "an ordinary data directory after {after}; the mount goes when the server stops"
                )?;
            }
            State::Answering | State::Mounted => writeln!(
                out,
                "{} of {} are local; process {} serves the rest",
                size(self.hydrated_bytes),
                size(self.total_bytes),
                self.supervisor_pid
            )?,
        }
        if let Some(cut_over) = &self.cut_over {
            writeln!(out, "sessions opening their files anew: {cut_over}")?;
        }
        writeln!(out, "{} fetched by {} requests", size(self.bytes_fetched), self.requests)
    }
}
