//! `walden clone create`: decides what the clone stands on, makes its folder, starts it, waits for its first answer.
//!
//! It returns when recovery has ended at the target, so that what the next command sees is the target.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::Args;

use crate::catalog::host::Host;
use crate::config::{KeyPurpose, OwnedFolder};
use crate::disk::Owner;
use crate::instance::clone_folder::{CloneFolder, HydrateSpec};
use crate::instance::create::{CreateOptions, create, default_action};
use crate::instance::programs::libc_version;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::recovery_target::TargetArguments;
use super::delete::take_back;
use super::expired::{delete_expired, end_of};
use super::hydrate_arguments::HydrateArguments;
use super::start::{HandedOver, start};
use super::status::StatusReport;

/// Makes a writable clone and starts PostgreSQL on it
#[derive(Debug, Args)]
pub(super) struct CloneCreate {
    /// The name of the clone: letters, digits, - and _
    name: String,

    /// The basebackup: latest, latest~1, an id, its unique prefix, a label; else the newest before the target
    #[arg(long, value_name = "BACKUP")]
    backup: Option<String>,

    #[command(flatten)]
    target: TargetArguments,

    /// The port in the name of the clone's socket
    #[arg(long, value_name = "P", default_value_t = 5432)]
    port: u16,

    /// Makes the clone without starting it
    #[arg(long)]
    no_start: bool,

    /// Lets sessions in before the target is reached
    #[arg(long)]
    read_early: bool,

    /// Ends recovery before missing WAL that the target lies behind, instead of refusing
    #[arg(long)]
    until_hole: bool,

    /// Preloads a library of an extension, without which its WAL cannot be replayed
    #[arg(long, value_name = "LIBRARY")]
    preload: Vec<String>,

    #[command(flatten)]
    hydrate: HydrateArguments,

    /// Deletes the clone after this time, such as 2h, or as soon as nobody is connected then
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
}

impl CloneCreate {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let asked_at = context.clock().monotonic();
        let (site, config) = (context.site()?, context.config()?);
        let target = self.target.read(context, default_action())?;
        let clones = config.paths.open_clones()?;
        let folder = CloneFolder::new(&clones.path, &self.name)
            .map_err(|error| CommandError::usage(error.to_string()))?;
        let owner = clone_owner(&clones)?;
        let expires = self.expires.as_deref();
        delete_expired(context)?;
        let options = CreateOptions {
            site: site.name.clone(),
            basebackup: self.backup.clone(),
            target,
            until_hole: self.until_hole,
            port: self.port,
            read_early: self.read_early,
            bin_directory: site.bin_directory.clone(),
            owner,
            user: Owner::current(),
            host: Host::here(libc_version()),
            preload: self.preload.clone(),
            hydrate: self.hydrate.change(HydrateSpec::default()),
            expires_at: expires.map(|text| end_of(text, context.clock().now())).transpose()?,
        };
        let started = context.block_on(async {
            let repository = context.open_repository(site, KeyPurpose::Read).await?;
            create(&repository, &folder, &options).await?;
            let_through(&config.paths.state, owner)?;
            let_through(&clones.path, owner)?;
            if self.no_start {
                return Ok(Ok(()));
            }
            let started = start(context, &folder, &site.name, HandedOver::of(context, asked_at)).await;
            Ok::<_, CommandError>(started)
        })??;
        if let Err(error) = started {
            return Err(take_back(context, &folder, error));
        }
        let status = context.block_on(super::status_of(&folder))??;
        context.output.print(&StatusReport(status))
    }
}

/// Whom PostgreSQL runs as: the owner of the clones folder, and `postgres` where that is root.
fn clone_owner(clones: &OwnedFolder) -> Result<Owner, CommandError> {
    if !clones.owner.is_root() {
        return Ok(clones.owner);
    }
    match nix::unistd::User::from_name("postgres") {
        Ok(Some(user)) => Ok(Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() }),
        _ => Err(CommandError::failed(
            "there is no user postgres on this host, and PostgreSQL does not run as root",
        )
        .hint("Give the clones folder to the user that is to run PostgreSQL.")),
    }
}

/// Lets the clone's owner pass through a folder of root's; to list it stays root's alone.
fn let_through(folder: &Path, owner: Owner) -> Result<(), CommandError> {
    let Ok(metadata) = std::fs::metadata(folder) else { return Ok(()) };
    let belongs_to = Owner::of(folder)?;
    if !Owner::current().is_root()
        || belongs_to.uid == owner.uid
        || metadata.permissions().mode() & 0o001 != 0
    {
        return Ok(());
    }
    let mode = metadata.permissions().mode() | 0o111;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode & 0o7777))
        .map_err(|error| CommandError::failed(format!("could not open \"{}\": {error}", folder.display())))
}
