//! What a command prints on standard output: one report, as text for people or as one JSON document.
//!
//! A report is a value that serializes and that can write itself as text; a command builds it whole and prints it
//! once. With JSON exactly one document appears, also when the command fails before it has printed: then it is
//! `{"error": …}`. A reader that goes away (`| head`) is no failure.

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use serde::Serialize;

use super::error::CommandError;
use super::exit::ExitPolicy;
use super::text::TextStyle;

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON document with stable field names.
    Json,
}

/// Something a command prints: JSON by its fields, text by its own words.
pub trait Report: Serialize {
    /// Writes it for people; the end of the last line is added if it is missing.
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result;
}

/// Standard output, or what stands for it in a test.
pub struct Output {
    format: Format,
    style: TextStyle,
    stdout: Mutex<Box<dyn Write + Send>>,
    used: AtomicBool,
    /// Whether its reader has gone away.
    gone: AtomicBool,
}

impl Output {
    /// Creates the output of one command.
    pub fn new(format: Format, style: TextStyle, stdout: Box<dyn Write + Send>) -> Self {
        let (used, gone) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { format, style, stdout: Mutex::new(stdout), used, gone }
    }

    /// Returns the form asked for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns how text shows sizes and times.
    pub fn style(&self) -> &TextStyle {
        &self.style
    }

    /// Prints the command's report; called once.
    pub fn print(&self, report: &impl Report) -> Result<(), CommandError> {
        self.used.store(true, Ordering::Relaxed);
        let mut text = match self.format {
            Format::Json => serde_json::to_string_pretty(report)
                .map_err(|error| CommandError::failed(format!("could not write JSON: {error}")))?,
            Format::Text => {
                let mut text = String::new();
                report
                    .write_text(&mut text, &self.style)
                    .map_err(|_| CommandError::failed("could not write the report as text"))?;
                text
            }
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        self.write(text.as_bytes())
    }

    /// Tells whether anybody may still read what is printed, for who would go on for ever.
    pub fn has_reader(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }

    /// Prints help, which is text whatever the form.
    pub(super) fn print_plain(&self, text: &str) -> Result<(), CommandError> {
        self.used.store(true, Ordering::Relaxed);
        self.write(text.as_bytes())
    }

    /// Leaves standard output to another program, such as psql, which says what it likes there.
    pub fn hand_over(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Prints a failure where JSON was asked for and nothing has been printed yet.
    pub(super) fn print_failure(&self, error: &CommandError, policy: ExitPolicy) {
        #[derive(Serialize)]
        struct Failure<'a> {
            error: FailureFields<'a>,
        }
        #[derive(Serialize)]
        struct FailureFields<'a> {
            kind: &'static str,
            message: String,
            hint: Option<&'a str>,
            exit_status: u8,
        }
        if self.format != Format::Json || self.used.swap(true, Ordering::Relaxed) {
            return;
        }
        let fields = FailureFields {
            kind: error.kind.name(),
            message: error.message(),
            hint: error.hint.as_deref(),
            exit_status: policy.status(Err(error.kind)),
        };
        if let Ok(mut text) = serde_json::to_string_pretty(&Failure { error: fields }) {
            text.push('\n');
            // The failure is on standard error as well; that standard output is gone changes nothing.
            let _ = self.write(text.as_bytes());
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), CommandError> {
        let mut stdout = self.stdout.lock().unwrap_or_else(PoisonError::into_inner);
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.gone.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(CommandError::failed(format!("could not write to standard output: {error}"))),
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("format", &self.format).finish_non_exhaustive()
    }
}

/// Writes `error: …` and `hint: …`, the form of every failure on standard error.
pub(super) fn write_failure(out: &mut dyn Write, message: &dyn Display, hint: Option<&str>) {
    // Where standard error is gone there is nobody left to tell.
    let _ = writeln!(out, "error: {message}");
    if let Some(hint) = hint {
        let _ = writeln!(out, "hint: {hint}");
    }
}
