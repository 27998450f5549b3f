//! `walden restore`: a basebackup written to disk, set up to recover to a target or to follow a primary; with `--instant` its
//! server runs before everything is there.
//!
//! Basebackup, WAL and places are decided and shown before the first byte is written. What the command was told goes
//! with an unfinished restore, so `--resume` needs the directory and nothing else.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use crate::catalog::{RecoveryRequest, TargetAction, plan_for_target};
use crate::config::{KeyPurpose, SiteConfig};
use crate::disk::Owner;
use crate::disk::reading_rights::Reader;
use crate::instance::programs::{self, ProgramsError, libc_version};
use crate::repo::{Basebackup, Repository};
use crate::restore::plan::{Existing, RecoveryMode, RestoreOptions, RestorePlan, plan_restore};
use crate::restore::run::{CHECKPOINT_BYTES, Resources, read_unfinished};
use crate::restore::{self, take_sample, work_of};
use crate::storage::Location;

use super::clone::HydrateArguments;
use super::context::Context;
use super::error::CommandError;
use super::instant::{self, Resumption};
use super::instant_report::InstantReport;
use super::recovery_target::TargetArguments;
use super::restore_report::{Estimated, RestoreReport, Spent};

/// The options of [`TargetArguments`]: a standby has no target, and what is resumed has its own.
const TARGET_OPTIONS: [&str; 4] = ["recovery-target", "target_timeline", "target_action", "target_exclusive"];
/// What a restore cannot be beside being instant.
const NOT_INSTANT: [&str; 5] = ["resume", "standby", "delta", "force", "allow_unsigned"];

/// Writes a basebackup to disk, ready to recover to a target
#[derive(Debug, Args)]
pub struct Restore {
    /// latest, latest~1, an id, its unique prefix, a label; else the newest before the target
    #[arg(value_name = "BACKUP", conflicts_with = "resume")]
    backup: Option<String>,

    /// The data directory to be: absent or empty
    #[arg(long, value_name = "DIR")]
    target_dir: PathBuf,

    #[command(flatten)]
    target: TargetArguments,

    /// Where a tablespace goes; those that are not named go where they were
    #[arg(long, value_name = "OID|NAME=DIR", value_parser = parse_map, conflicts_with = "resume")]
    tablespace_map: Vec<(String, PathBuf)>,

    /// Where configuration goes that was outside the data directory, as on Debian
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    config_dir: Option<PathBuf>,

    /// Sets up a standby, which follows the archive and then its primary
    #[arg(long, requires = "primary_conninfo", conflicts_with_all = TARGET_OPTIONS, conflicts_with = "resume")]
    standby: bool,

    /// The primary's connection, in libpq's syntax
    #[arg(long, value_name = "CONNINFO", requires = "standby")]
    primary_conninfo: Option<String>,

    /// Makes an existing data directory of the cluster equal, fetching only files that differ
    #[arg(long, conflicts_with_all = ["resume", "force"])]
    delta: bool,

    /// Replaces what walden has restored there before
    #[arg(long, conflicts_with = "resume")]
    force: bool,

    /// Ends recovery before missing WAL that the target lies behind, instead of refusing
    #[arg(long, conflicts_with = "resume")]
    until_hole: bool,

    /// Goes on with a restore that was interrupted, as it was begun
    #[arg(long, conflicts_with_all = TARGET_OPTIONS)]
    resume: bool,

    /// Takes a basebackup that no trusted signer vouches for
    #[arg(long)]
    allow_unsigned: bool,

    /// Shows what would be written and about how long it would take, and writes nothing
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,

    /// Starts the server at once, brings the rest while it runs, and ends when that is there
    #[arg(long, conflicts_with_all = NOT_INSTANT)]
    instant: bool,

    /// With --instant: has sessions open their files anew once everything is local, by a database that it drops again
    #[arg(long)]
    cut_over: bool,

    #[command(flatten)]
    hydrate: HydrateArguments,

    /// With --resume of an instant restore: mounts, and leaves it to somebody else to start the server
    #[arg(long, requires = "resume")]
    no_start: bool,
}

impl Restore {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let began = context.clock().monotonic();
        let site = context.site()?;
        let is_for_instant = self.hydrate.are_given() || self.cut_over;
        if is_for_instant && !self.instant && !self.resume {
            return Err(CommandError::usage("--hydrate-rate, --no-hydrate and --cut-over are for --instant"));
        }
        if self.resume {
            let resumption = Resumption {
                target: &self.target_dir,
                no_start: self.no_start,
                hydrate: &self.hydrate,
                cut_over: self.cut_over,
            };
            if let Some(report) = context.block_on(instant::resume(context, resumption, began))?? {
                context.end_progress();
                return context.output.print(&report);
            }
            if self.no_start || is_for_instant {
                let message =
                    format!("\"{}\" holds no unfinished instant restore", self.target_dir.display());
                return Err(CommandError::failed(message));
            }
        }
        if self.instant && !self.dry_run {
            let report = context.block_on(self.run_instant(context, site, began))??;
            context.end_progress();
            return context.output.print(&report);
        }
        self.run_plain(context, site, began)
    }

    /// Begins a restore whose server runs before everything is there, and follows it.
    async fn run_instant(
        &self,
        context: &Context,
        site: &SiteConfig,
        began: Instant,
    ) -> Result<InstantReport, CommandError> {
        let repository = context.open_repository(site, KeyPurpose::Read).await?;
        let (basebackup, plan) = self.planned(context, site, &repository).await?;
        let options = instant::options_of(site, &self.hydrate, self.cut_over);
        instant::begin_and_follow(context, &basebackup, plan, &options, began).await
    }

    /// Writes everything, and starts nothing.
    fn run_plain(&self, context: &Context, site: &SiteConfig, began: Instant) -> Result<(), CommandError> {
        let (plan, outcome, estimated) = context.block_on(async {
            let repository = match self.allow_unsigned {
                true => context.open_repository_unsigned(site).await?,
                false => context.open_repository(site, KeyPurpose::Read).await?,
            };
            let (basebackup, mut plan) = match self.resume {
                true => self.resumed(&repository).await?,
                false => self.planned(context, site, &repository).await?,
            };
            if self.delta && instant::replaced(&self.target_dir)?.is_some() {
                // Its server may have written what is in no basebackup, and its pin would be nobody's.
                return Err(restore::Error::Unfinished { path: self.target_dir.clone() }.into());
            }
            if self.instant {
                let options = instant::options_of(site, &self.hydrate, self.cut_over);
                instant::check(&basebackup, &mut plan, &options).await?;
            }
            for warning in &plan.warnings {
                tracing::warn!("{warning}");
            }
            let limits = context.config()?.limits;
            let resources = Resources {
                pool: context.cpu_pool()?,
                transfers: limits.transfers,
                memory_bytes: limits.memory_bytes / 2,
                checkpoint_bytes: CHECKPOINT_BYTES,
            };
            if self.dry_run {
                let sample = take_sample(&basebackup, &resources).await?;
                let estimated = sample.map(|sample| Estimated::new(&work_of(&basebackup, &plan), &sample));
                return Ok::<_, CommandError>((plan, None, estimated));
            }
            if self.force
                && let Some(replaced) = instant::replaced(&self.target_dir)?
            {
                replaced.give_up(&repository).await?;
            }
            let monitor = context.monitor();
            let outcome = restore::restore(basebackup, &plan, self.resume, &resources, &*monitor).await;
            let outcome = outcome.map_err(|error| self.left_unfinished(&plan, error))?;
            Ok((plan, Some(outcome), None))
        })??;
        context.end_progress();
        let seconds = context.clock().monotonic().saturating_duration_since(began).as_secs_f64();
        let spent = Spent { traffic: context.traffic.snapshot(), seconds };
        context.output.print(&RestoreReport::new(&site.name, plan, outcome, estimated, spent))
    }

    /// Says how a restore that has begun goes on, beside what its error says, where going on can help.
    ///
    /// What is unfinished there may also be an older restore, which `--force` has not yet replaced: of that nothing is
    /// said, since `--resume` would complete something else than what was asked for.
    fn left_unfinished(&self, plan: &RestorePlan, error: restore::Error) -> CommandError {
        const GO_ON: &str = "Then go on with --resume: until it is complete no server starts there.";
        let begun = || read_unfinished(&self.target_dir).is_ok_and(|unfinished| unfinished == *plan);
        let goes_on = error.may_be_resumed() && begun();
        let error = CommandError::from(error);
        if !goes_on {
            return error;
        }
        let hint = match &error.hint {
            Some(hint) => format!("{hint} {GO_ON}"),
            None => format!("Put that right. {GO_ON}"),
        };
        error.hint(hint)
    }

    async fn resumed(&self, repository: &Repository) -> Result<(Basebackup, RestorePlan), CommandError> {
        let plan = read_unfinished(&self.target_dir)?;
        Ok((Basebackup::open(repository, plan.basebackup).await?, plan))
    }

    async fn planned(
        &self,
        context: &Context,
        site: &SiteConfig,
        repository: &Repository,
    ) -> Result<(Basebackup, RestorePlan), CommandError> {
        instant::refuse_served(context, &self.target_dir).await?;
        let is_replaced = self.force && !self.dry_run;
        instant::clear_dead(context, &self.target_dir, is_replaced).await?;
        let target = self.target.read(context, TargetAction::Pause)?;
        // A standby gets what the archive lacks from its primary.
        let until_hole = self.until_hole || self.standby;
        let request = RecoveryRequest { basebackup: self.backup.as_deref(), target: &target, until_hole };
        let planned = plan_for_target(repository, request).await?;
        let options = self.options(context, site)?;
        let missing = check_programs(site, planned.record.server.major)?;
        let basebackup = Basebackup::open(repository, planned.record.id).await?;
        let mut plan = plan_restore(&basebackup, planned, &options).await?;
        plan.warnings.extend(missing);
        plan.warnings.extend(self.warnings_of_fetching(context, options.owner)?);
        Ok((basebackup, plan))
    }

    /// Says what would keep the restored server, which runs as `owner`, from its WAL.
    fn warnings_of_fetching(&self, context: &Context, owner: Owner) -> Result<Vec<String>, CommandError> {
        let config = context.config()?;
        let mut warnings = Vec::new();
        if owner != Owner::current() {
            let reader = Reader::of(owner);
            for file in config.files_for_fetching().filter(|file| !reader.may_read(file)) {
                warnings.push(format!(
                    "\"{}\" cannot be read by user {}, as whom the restored server fetches WAL",
                    file.display(),
                    owner.user()
                ));
            }
        }
        if self.allow_unsigned {
            warnings.push(
                "--allow-unsigned is for the basebackup: the restored server fetches only WAL of trusted_signers"
                    .to_owned(),
            );
        }
        Ok(warnings)
    }

    fn options(&self, context: &Context, site: &SiteConfig) -> Result<RestoreOptions, CommandError> {
        let config = context.config()?;
        let mut apart_from = vec![
            (config.paths.clones.clone(), "the clones".to_owned()),
            (config.paths.state.clone(), "Walden's state".to_owned()),
        ];
        if let Location::File(path) = &site.storage.location {
            apart_from.push((path.clone(), "the repository".to_owned()));
        }
        Ok(RestoreOptions {
            target_directory: self.target_dir.clone(),
            tablespace_map: self.tablespace_map.clone(),
            configuration_directory: self.config_dir.clone(),
            existing: match (self.force, self.delta) {
                (true, _) => Existing::Replace,
                (_, true) => Existing::Delta,
                _ => Existing::Refuse,
            },
            is_instant: self.instant,
            mode: match &self.primary_conninfo {
                Some(primary_conninfo) => {
                    RecoveryMode::Standby { primary_conninfo: primary_conninfo.clone() }
                }
                None => RecoveryMode::Target,
            },
            restore_command: Some(restore_command(&config.file, &site.name)?),
            owner: owner_of(&self.target_dir)?,
            user: Owner::current(),
            apart_from,
            libc: libc_version(),
            source_directory: site.data_directory.clone(),
        })
    }
}

/// Whom everything will belong to: the caller, or where that is root the owner of the directory, or `postgres`.
fn owner_of(target: &Path) -> Result<Owner, CommandError> {
    let user = Owner::current();
    if !user.is_root() {
        return Ok(user);
    }
    let existing = std::path::absolute(target).ok().and_then(|path| {
        path.ancestors().find(|ancestor| ancestor.exists()).and_then(|path| Owner::of(path).ok())
    });
    if let Some(owner) = existing.filter(|owner| !owner.is_root()) {
        return Ok(owner);
    }
    match nix::unistd::User::from_name("postgres") {
        Ok(Some(user)) => Ok(Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() }),
        _ => Err(CommandError::failed(
            "there is no user postgres on this host, and PostgreSQL does not run as root",
        )
        .hint("Make the directory, and give it to the user that is to run PostgreSQL.")),
    }
}

/// Refuses programs of another major version; says where there are none.
fn check_programs(site: &SiteConfig, major: u32) -> Result<Option<String>, CommandError> {
    match programs::find(major, site.bin_directory.as_deref()) {
        Ok(_) => Ok(None),
        Err(error @ ProgramsError::NotFound { .. }) => Ok(Some(error.to_string())),
        Err(error) => {
            let hint = error.hint();
            let refused = CommandError::failed(error.to_string());
            Err(match hint {
                Some(hint) => refused.hint(hint),
                None => refused,
            })
        }
    }
}

/// Returns the command by which the restored server asks for WAL: absolute paths, as its shell wants them.
fn restore_command(configuration: &Path, site: &str) -> Result<String, CommandError> {
    let failed =
        |error: std::io::Error| CommandError::failed(format!("could not find this program: {error}"));
    let binary = std::env::current_exe().map_err(failed)?;
    let configuration = std::path::absolute(configuration).map_err(failed)?;
    let word = |text: &str| {
        // A percent sign would be taken for a placeholder, and a quote ends a word.
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
        let escaped = text.replace('%', "%%");
        if plain { text.to_owned() } else { format!("'{}'", escaped.replace('\'', r"'\''")) }
    };
    let path = |path: &Path| {
        let text = path.to_str();
        text.map(word).ok_or_else(|| {
            CommandError::failed(format!("\"{}\" cannot stand in a configuration file", path.display()))
        })
    };
    let (binary, configuration) = (path(&binary)?, path(&configuration)?);
    Ok(format!("{binary} --config {configuration} --site {} wal fetch %f %p", word(site)))
}

fn parse_map(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, directory)) if !name.is_empty() && directory.starts_with('/') => {
            Ok((name.to_owned(), PathBuf::from(directory)))
        }
        Some((name, directory)) if !name.is_empty() && !directory.is_empty() => {
            Err("the directory is not an absolute path".to_owned())
        }
        _ => Err("it is not OID=DIR or NAME=DIR".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_command_survives_the_shell_and_the_placeholders() {
        let plain = restore_command(Path::new("/etc/walden/walden.toml"), "main").unwrap();
        assert!(plain.ends_with(" --config /etc/walden/walden.toml --site main wal fetch %f %p"), "{plain}");
        let odd = restore_command(Path::new("/etc/my 100% o'clock.toml"), "main").unwrap();
        assert!(odd.contains(r"--config '/etc/my 100%% o'\''clock.toml' --site"), "{odd}");
    }

    #[test]
    fn a_tablespace_is_mapped_to_an_absolute_path() {
        assert_eq!(parse_map("fast=/srv/x=y"), Ok(("fast".to_owned(), PathBuf::from("/srv/x=y"))));
        for bad in ["fast", "=/srv", "fast=", "fast=srv"] {
            assert!(parse_map(bad).is_err(), "{bad}");
        }
    }
}
