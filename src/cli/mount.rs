//! `walden mount DIR`: a site as read-only files, served until it is unmounted.
//!
//! The command returns once the mount can be used; what serves it is a process of its own (`detached`), or this one
//! with `--foreground`. Whatever ends that process orderly unmounts first, so that no dead mount point is left.

use std::ffi::OsString;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::config::{KeyPurpose, SiteConfig};
use crate::disk::Owner;
use crate::mount::site_tree::SiteTree;
use crate::mount::{self, MountError, MountOptions, Mounted};
use crate::storage::Location;

use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::TextStyle;

/// Mounts the basebackups and the WAL archive as read-only files
#[derive(Debug, Args)]
#[command(after_help = "Root's mounts show everything as owned by the owner of DIR, and let other users in.")]
pub struct Mount {
    /// An empty directory
    dir: PathBuf,

    /// Serves in this process, until it is stopped or DIR is unmounted
    #[arg(long)]
    foreground: bool,

    /// Lets other users in as well; needs user_allow_other in /etc/fuse.conf, or root
    #[arg(long)]
    allow_other: bool,
}

/// What `mount` did, as the serving process tells it.
#[derive(Debug, Serialize, Deserialize)]
struct MountReport {
    mounted: PathBuf,
    site: String,
    process: u32,
    log: Option<PathBuf>,
}

/// One call of the store is repeated for this long; whoever reads decides how long to go on waiting.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// How long retention is told that nothing is read any more; leases also end by themselves.
const END_OF_LEASES_MAX: Duration = Duration::from_secs(10);

impl Mount {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        if self.foreground {
            return serve(context, &self.dir, self.allow_other);
        }
        let dir = detached::absolute(&self.dir)?;
        let name = dir.display().to_string().trim_matches('/').replace('/', "-");
        let log = detached::log_file(context, &format!("mount-{name}"))?;
        let mut arguments: Vec<OsString> = vec!["serve".into(), dir.into()];
        arguments.extend(self.allow_other.then(|| "--allow-other".into()));
        let document = detached::start(context, &arguments, &log)?;
        let report: MountReport = serde_json::from_value(document).map_err(|error| {
            CommandError::failed(format!("the background process said something else: {error}"))
        })?;
        context.output.print(&MountReport { log: Some(log), ..report })
    }
}

impl Report for MountReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        write!(
            out,
            "Mounted site {} on {}, served by process {}",
            self.site,
            self.mounted.display(),
            self.process
        )?;
        match &self.log {
            Some(log) => writeln!(out, "; its log is {}.", log.display()),
            None => writeln!(out, "."),
        }
    }
}

/// Mounts the site on `dir`, tells so, and serves until somebody unmounts it or a signal asks to stop.
pub(super) fn serve(context: &Context, dir: &Path, allow_other: bool) -> Result<(), CommandError> {
    let site = context.site()?;
    let dir = mount_point(dir)?;
    refuse_inside_repository(&dir, site)?;
    context.block_on(async {
        let mut signals = Signals::listen()?;
        let repository = context.open_repository_within(site, KeyPurpose::Read, CALL_DEADLINE).await?;
        let repository = repository.with_cpu_pool(context.cpu_pool()?);
        let tree = SiteTree::open(repository, context.clock(), owner_of(&dir)?).await?;
        let mut options = MountOptions::new(format!("walden:{}", site.name), true);
        options.allow_other |= allow_other;
        options.must_not_cover = must_not_cover(context, site)?;
        let mounted = mount::mount(tree.tree(), &dir, &options, &tokio::runtime::Handle::current())?;
        context.output.print(&MountReport {
            mounted: dir.clone(),
            site: site.name.clone(),
            process: std::process::id(),
            log: None,
        })?;
        let mut ended = watch(mounted);
        tokio::select! {
            _ = &mut ended => {}
            () = tree.keep_leases() => {}
            () = signals.stop() => stop(&dir),
        }
        // Killed here, the leases would die by themselves.
        let _ = tokio::time::timeout(END_OF_LEASES_MAX, tree.end_leases()).await;
        Ok(())
    })?
}

/// Waits on a thread of its own until the mount has ended; the process may end before that thread.
fn watch(mut mounted: Mounted) -> oneshot::Receiver<()> {
    let (told, ended) = oneshot::channel();
    thread::spawn(move || {
        mounted.wait();
        let _ = told.send(());
    });
    ended
}

/// Takes the mount away, whoever holds it: this process is about to end.
fn stop(dir: &Path) {
    match mount::unmount(dir) {
        Ok(()) | Err(MountError::NotMounted { .. }) => {}
        Err(error) => {
            tracing::warn!("{error}; detaching it");
            if let Err(error) = mount::mounting::detach(dir) {
                tracing::error!("{error}");
            }
        }
    }
}

/// The signals that ask to stop.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> Result<Self, CommandError> {
        let listen = |kind| {
            signal(kind)
                .map_err(|error| CommandError::failed(format!("could not listen to signals: {error}")))
        };
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn stop(&mut self) {
        let Self([terminate, interrupt, hangup]) = self;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Resolves the mount point; a mount whose process has died is taken off it first (failure 38).
fn mount_point(dir: &Path) -> Result<PathBuf, CommandError> {
    if mount::mounting::is_dead(dir) {
        tracing::warn!("detaching the mount on \"{}\", whose process has died", dir.display());
        mount::mounting::detach(dir)?;
    }
    dir.canonicalize().map_err(|error| {
        let message = format!("could not find the directory \"{}\": {error}", dir.display());
        CommandError::usage(message).hint("Create it first: an empty directory.")
    })
}

/// Returns who everything in the mount belongs to: whoever mounts, or for root the owner of the directory.
fn owner_of(dir: &Path) -> Result<Owner, CommandError> {
    let caller = Owner::current();
    Ok(if caller.is_root() { Owner::of(dir)? } else { caller })
}

/// Lists what the mount reads itself (failure 33).
fn must_not_cover(context: &Context, site: &SiteConfig) -> Result<Vec<PathBuf>, CommandError> {
    let paths = &context.config()?.paths;
    let mut folders = vec![paths.state.clone(), paths.run.clone(), paths.clones.clone()];
    if let Location::File(repository) = &site.storage.location {
        folders.push(repository.clone());
    }
    Ok(folders)
}

/// Refuses a mount point in the repository: its listings would find the mount.
fn refuse_inside_repository(dir: &Path, site: &SiteConfig) -> Result<(), CommandError> {
    let Location::File(repository) = &site.storage.location else { return Ok(()) };
    if repository.canonicalize().is_ok_and(|repository| dir.starts_with(repository)) {
        let message = format!("\"{}\" lies in the repository that is to be mounted", dir.display());
        return Err(CommandError::usage(message).hint("Choose a directory elsewhere."));
    }
    Ok(())
}

impl From<MountError> for CommandError {
    fn from(error: MountError) -> Self {
        let (kind, hint) = match &error {
            MountError::Io { .. } => (ExitKind::Failed, None),
            MountError::NotADirectory { .. } | MountError::NotEmpty { .. } => {
                (ExitKind::Usage, Some("Choose an empty directory."))
            }
            MountError::WouldCover { .. } => (ExitKind::Usage, Some("Choose a directory elsewhere.")),
            MountError::AlreadyMounted { .. } => (
                ExitKind::Usage,
                Some("walden unmount takes it away; another directory can be mounted as well."),
            ),
            MountError::NotMounted { .. } => (ExitKind::Failed, None),
            MountError::Busy { .. } => {
                (ExitKind::Failed, Some("End or move what holds it, then unmount again."))
            }
            MountError::Fusermount { .. } => {
                (ExitKind::Failed, Some("--allow-other needs user_allow_other in /etc/fuse.conf."))
            }
        };
        Self { kind, hint: hint.map(str::to_owned), error: error.into() }
    }
}
