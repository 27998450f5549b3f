//! `walden demo`: shows everything at once, on a scratch cluster, without any configuration.
//!
//! Progress goes to standard error, a line for each step as it begins and as it ends; standard output has the result
//! alone. A signal ends the demonstration like a failure: in order, with nothing left behind.

use std::fmt::{self, Write};
use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::instance::demo::{self, Audience, DemoError, DemoOptions, DemoReport, Step, StepReport};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::{Align, TextStyle, TextTable, duration, size};

/// Shows a backup, a mount and a clone on a scratch cluster of its own
///
/// Needs PostgreSQL's server programs and no configuration. Nothing outside its folder is touched, and the folder is
/// removed afterwards.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Where the scratch folder is made
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    dir: PathBuf,

    /// Leaves the folder with its configuration, repository and logs; nothing keeps running
    #[arg(long)]
    keep: bool,

    /// How much data: pgbench's scale, about 16 MB each
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    scale: u32,
}

impl Demo {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let binary = std::env::current_exe()
            .map_err(|error| CommandError::failed(format!("could not find the walden binary: {error}")))?;
        let options = DemoOptions { binary, parent: self.dir.clone(), scale: self.scale, keep: self.keep };
        let audience = StandardError { quiet: context.global.quiet };
        let report = context.block_on(async {
            let interrupted = interruption()?;
            Ok::<_, CommandError>(demo::run(&options, context.clock(), &audience, interrupted).await?)
        })??;
        context.output.print(&report)
    }
}

/// Resolves when a signal asks for the end.
fn interruption() -> Result<impl Future<Output = ()>, CommandError> {
    let listen = |kind| {
        signal(kind).map_err(|error| CommandError::failed(format!("could not listen for signals: {error}")))
    };
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

/// Tells on standard error how it goes.
struct StandardError {
    quiet: bool,
}

impl Audience for StandardError {
    fn begins(&self, step: Step) {
        self.tell(&format!("{} …", step.intention()));
    }

    fn done(&self, step: &StepReport) {
        self.tell(&format!("  {} ({})", step.what, duration(step.took())));
    }

    fn warned(&self, problem: &DemoError) {
        tracing::error!("{problem}");
    }
}

impl StandardError {
    fn tell(&self, line: &str) {
        if !self.quiet {
            eprintln!("demo: {line}");
        }
    }
}

impl From<DemoError> for CommandError {
    fn from(error: DemoError) -> Self {
        let hint = error.hint();
        Self { kind: ExitKind::Failed, error: error.into(), hint }
    }
}

impl Report for DemoReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        let mut table = TextTable::new(&[
            ("STEP", Align::Left),
            ("TIME", Align::Right),
            ("BYTES", Align::Right),
            ("REQUESTS", Align::Right),
            ("WHAT", Align::Left),
        ]);
        for step in &self.steps {
            table.row([
                step.step.name().to_owned(),
                duration(step.took()),
                step.bytes.map_or_else(String::new, size),
                step.requests.map_or_else(String::new, |requests| requests.to_string()),
                step.what.clone(),
            ]);
        }
        table.write(out);
        writeln!(
            out,
            "\nA clone of {} answered {} after it was asked for, for {} in {} requests to the store.",
            size(self.database_bytes),
            duration(std::time::Duration::from_secs_f64(self.clone.seconds_to_first_query)),
            size(self.clone.bytes_fetched),
            self.clone.requests
        )?;
        writeln!(out, "All {} tables of source and clone are equal.", self.tables)?;
        match &self.folder {
            Some(folder) => writeln!(
                out,
                "\nKept: {0}\nGo on with: walden --config {0}/walden.toml clone create again",
                folder.display()
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use crate::instance::demo::{BackupFigures, CloneFigures, MountFigures, WalFigures};

    use super::*;

    fn report() -> DemoReport {
        let step = |step, seconds, bytes, requests, what: &str| StepReport {
            step,
            seconds,
            bytes,
            requests,
            what: what.to_owned(),
        };
        DemoReport {
            ok: true,
            postgresql: "15.10".to_owned(),
            database_bytes: 320 << 20,
            backup: BackupFigures { seconds: 2.25, stored_bytes: 90 << 20, requests: None, transactions: 7 },
            wal: WalFigures { segments: 9, bytes: 9 << 24, stored_bytes: 30 << 20 },
            mount: MountFigures { seconds: 0.1, files: 1200, bytes: 330 << 20, wal_segments: 9 },
            clone: CloneFigures { seconds_to_first_query: 0.81249, bytes_fetched: 6 << 20, requests: 63 },
            tables: 5,
            checksums_equal: true,
            steps: vec![
                step(Step::Backup, 2.25, Some(90 << 20), None, "basebackup 1"),
                step(Step::Clone, 0.812, Some(6 << 20), Some(63), "answered"),
            ],
            folder: None,
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_step_and_the_sum_of_it_below() {
        let mut text = String::new();
        report().write_text(&mut text, &TextStyle { time_zone: TimeZone::UTC.into() }).unwrap();
        assert_eq!(
            text,
            "STEP      TIME     BYTES  REQUESTS  WHAT\n\
             backup   2.2 s  90.0 MiB            basebackup 1\n\
             clone   812 ms  6.00 MiB        63  answered\n\
             \n\
             A clone of 320 MiB answered 812 ms after it was asked for, for 6.00 MiB in 63 requests to the store.\n\
             All 5 tables of source and clone are equal.\n"
        );
    }

    #[test]
    fn the_document_has_the_promised_names() {
        let document = serde_json::to_value(report()).unwrap();
        assert_eq!(document["ok"], true);
        assert_eq!(document["backup"]["stored_bytes"], 90 << 20);
        assert_eq!(document["clone"]["seconds_to_first_query"], 0.812);
        assert_eq!((&document["tables"], &document["checksums_equal"]), (&5.into(), &true.into()));
        assert_eq!(document["steps"][0]["step"], "backup");
        assert!(document["wal"]["segments"].is_u64() && document["mount"]["files"].is_u64());
    }
}
