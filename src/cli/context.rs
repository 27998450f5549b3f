//! What every command is given: the global options, the environment, and what follows from both.
//!
//! The configuration is read when a command first asks for it, because some commands (`demo`, `key create`) need
//! none and must work where it is broken.

use std::cell::OnceCell;
use std::future::Future;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, Args};

use crate::clock::{Clock, SystemClock};
use crate::config::{Config, Environment, SiteConfig};
use crate::monitor::{Monitor, VoidMonitor};
use crate::storage::Traffic;

use super::error::CommandError;
use super::exit::ExitKind;
use super::output::{Format, Output};
use super::progress::TerminalMonitor;

/// Options of every command, before or after its name.
#[derive(Debug, Clone, Args)]
pub struct GlobalOptions {
    /// The configuration file; else WALDEN_CONFIG, ./walden.toml, /etc/walden/walden.toml
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,

    /// The site; else WALDEN_SITE, else the only one that is configured
    #[arg(long, global = true, value_name = "NAME", help_heading = "Global options")]
    pub site: Option<String>,

    /// The form of what is printed on standard output
    #[arg(long, global = true, value_enum, value_name = "FORM", help_heading = "Global options")]
    pub output: Option<Format>,

    /// The same as --output json
    #[arg(long, global = true, conflicts_with = "output", help_heading = "Global options")]
    pub json: bool,

    /// Says more on standard error; twice: even more
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,

    /// Says only errors on standard error
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,

    /// Shows no progress, also on a terminal
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_progress: bool,
}

impl GlobalOptions {
    /// Returns the form of what is printed.
    pub fn format(&self) -> Format {
        if self.json { Format::Json } else { self.output.unwrap_or(Format::Text) }
    }
}

/// What a command works with.
#[derive(Debug)]
pub struct Context {
    /// The global options.
    pub global: GlobalOptions,
    /// The environment of the process.
    pub environment: Environment,
    /// Where the report goes.
    pub output: Output,
    /// What this command asks of stores.
    pub traffic: Arc<Traffic>,
    config: OnceCell<Config>,
    progress: OnceCell<Option<Arc<TerminalMonitor>>>,
}

impl Context {
    /// Creates the context of one command.
    pub fn new(global: GlobalOptions, environment: Environment, output: Output) -> Self {
        Self {
            global,
            environment,
            output,
            traffic: Arc::default(),
            config: OnceCell::new(),
            progress: OnceCell::new(),
        }
    }

    /// Returns the configuration, read at the first call.
    pub fn config(&self) -> Result<&Config, CommandError> {
        if let Some(config) = self.config.get() {
            return Ok(config);
        }
        let config = Config::load(self.global.config.as_deref(), &self.environment)?;
        Ok(self.config.get_or_init(|| config))
    }

    /// Returns the site that was chosen, or the only one.
    pub fn site(&self) -> Result<&SiteConfig, CommandError> {
        let name = match &self.global.site {
            Some(name) => Some(name.clone()),
            None => self.environment.site()?,
        };
        Ok(self.config()?.site(name.as_deref())?)
    }

    /// Returns the clock.
    pub fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(SystemClock)
    }

    /// Returns whom engines report to: a line on a terminal, or nobody.
    pub fn monitor(&self) -> Arc<dyn Monitor> {
        let shown = !self.global.no_progress && !self.global.quiet && std::io::stderr().is_terminal();
        let terminal =
            self.progress.get_or_init(|| shown.then(|| Arc::new(TerminalMonitor::new(self.clock()))));
        match terminal {
            Some(monitor) => monitor.clone(),
            None => Arc::new(VoidMonitor),
        }
    }

    /// Wipes the line of progress for good: before a failure is told, or another program takes the terminal.
    pub fn end_progress(&self) {
        if let Some(Some(monitor)) = self.progress.get() {
            monitor.stop();
        }
    }

    /// Runs a future on this thread, for commands that wait for one thing at a time and must start quickly.
    pub fn block_on_one_thread<T>(&self, future: impl Future<Output = T>) -> Result<T, CommandError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| no_runtime(&error))?;
        let outcome = runtime.block_on(future);
        // What was given up may have left a thread that waits for a store; nobody waits for that.
        runtime.shutdown_background();
        Ok(outcome)
    }

    /// Runs a future on a runtime with a worker for each core.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> Result<T, CommandError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        Ok(runtime.map_err(|error| no_runtime(&error))?.block_on(future))
    }

    /// Runs the future of a process that lives long, and ends soon when it is told to: a thread that still waits then,
    /// for a store or a disk that hangs, would otherwise keep the process.
    pub fn block_on_service<T>(&self, future: impl Future<Output = T>) -> Result<T, CommandError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|error| no_runtime(&error))?;
        let outcome = runtime.block_on(future);
        runtime.shutdown_timeout(THREADS_WAIT);
        Ok(outcome)
    }
}

/// What the documents promise of a service that is told to end, whatever hangs. Its waits are to add up to less.
pub(super) const ENDING_MAX: Duration = Duration::from_secs(5);
/// How long threads are waited for at the end of a service, which has waited for what counts before.
pub(super) const THREADS_WAIT: Duration = Duration::from_millis(500);

fn no_runtime(error: &std::io::Error) -> CommandError {
    CommandError::new(ExitKind::Failed, format!("could not start the async runtime: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::text::TextStyle;
    use super::*;

    const TWO_SITES: &str = "[storage]\nurl = \"memory://\"\n[sites.a]\n[sites.b]\n";

    fn context(site: Option<&str>, variables: &[(&str, &str)], config: PathBuf) -> Context {
        let global = GlobalOptions {
            config: Some(config),
            site: site.map(str::to_owned),
            output: None,
            json: false,
            verbose: 0,
            quiet: false,
            no_progress: true,
        };
        let environment = Environment::of(0, variables);
        let style = TextStyle { time_zone: environment.time_zone.clone() };
        Context::new(global, environment, Output::new(Format::Text, style, Box::new(std::io::sink())))
    }

    #[test]
    fn the_site_of_the_command_line_comes_before_that_of_the_environment() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), TWO_SITES).unwrap();
        let site = |site, variables: &[(&str, &str)]| {
            let context = context(site, variables, file.path().to_owned());
            context.site().map(|site| site.name.clone()).map_err(|error| error.message())
        };
        let environment = [("WALDEN_SITE", "b")];
        assert_eq!(site(Some("a"), &environment), Ok("a".to_owned()));
        assert_eq!(site(None, &environment), Ok("b".to_owned()));
        assert_eq!(site(None, &[]), Err("there are 2 sites, and none was chosen: a, b".to_owned()));
        assert_eq!(site(Some("c"), &environment), Err("unknown site \"c\"".to_owned()));
    }

    #[test]
    fn futures_run_on_either_runtime_and_panics_come_through() {
        let context = context(None, &[], PathBuf::from("/nonexistent"));
        assert_eq!(context.block_on(async { tokio::spawn(async { 7 }).await.unwrap() }).unwrap(), 7);
        assert_eq!(context.block_on_one_thread(async { 7 }).unwrap(), 7);
        assert!(context.progress.get().is_none());
        context.monitor().count("retry", 1);
        context.end_progress();
    }
}
