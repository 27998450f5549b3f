//! `walden clone psql`: becomes psql, connected to a clone, as the user that PostgreSQL runs as.
//! The socket is in a folder that only that user may enter; so root steps down first.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use super::super::context::Context;
use super::super::error::CommandError;
use super::existing;

/// Connects to a clone with psql
#[derive(Debug, Args)]
pub(super) struct ClonePsql {
    /// The name of the clone
    name: String,
    /// Arguments of psql; the database is postgres where none is named
    #[arg(last = true, value_name = "PSQL ARGUMENT")]
    arguments: Vec<OsString>,
}

impl ClonePsql {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        let spec = folder.read_spec()?;
        context.output.hand_over();
        let own = spec.bin_directory.join("psql");
        let program = if own.is_file() { own } else { PathBuf::from("psql") };
        let mut command = Command::new(&program);
        command
            .env("PGHOST", folder.run())
            .env("PGPORT", spec.port.to_string())
            .env("PGUSER", &spec.superuser);
        command.env("PGDATABASE", "postgres").args(&self.arguments);
        for inherited in ["PGHOSTADDR", "PGSERVICE", "PGPASSWORD", "PGSSLMODE"] {
            command.env_remove(inherited);
        }
        if context.environment.is_root() {
            command.uid(spec.owner.0).gid(spec.owner.1);
        }
        let error = command.exec();
        Err(CommandError::failed(format!("could not run \"{}\": {error}", program.display()))
            .hint("Install PostgreSQL's client programs."))
    }
}
