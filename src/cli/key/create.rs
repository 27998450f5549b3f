//! `walden key create`: four files in the current directory, and the lines that make them known.
//!
//! A file is never replaced, and half of a key is never left behind. The lines name the files in full, so that they
//! work wherever the configuration file is.

use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::codec::{self, RecipientKey, VerifyKey, create_keys};
use crate::config::KeyRole;
use crate::disk::durable::{Create, create_file};

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::exit::ExitKind;
use super::super::output::Report;
use super::super::text::{Align, TextStyle, TextTable};

/// Writes a new recipient and a new signer into the current directory
///
/// The files are ID.pem and ID.pub.pem (the recipient) and ID.sign.pem and ID.verify.pem (the signer).
#[derive(Debug, Args)]
pub(super) struct KeyCreate {
    /// The name of the key in the configuration, such as 2026-11
    #[arg(long)]
    id: String,

    /// The length of the RSA key: 3072, 4096 or 8192
    #[arg(long, value_name = "N", default_value_t = 3072)]
    bits: u32,
}

/// The longest name of a key; it is part of file names.
const ID_LEN_MAX: usize = 64;

impl KeyCreate {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if self.id.is_empty()
            || self.id.starts_with(['.', '-'])
            || !self.id.chars().all(plain)
            || self.id.len() > ID_LEN_MAX
        {
            let hint = format!(
                "Take letters, digits, _, - and ., at most {ID_LEN_MAX}, and begin with a letter or a digit."
            );
            return Err(CommandError::usage(format!("\"{}\" is not a name for a key", self.id)).hint(hint));
        }
        let folder = std::env::current_dir().map_err(|error| {
            CommandError::failed(format!("could not find the current directory: {error}"))
        })?;
        let report = create_in(&folder, &self.id, self.bits)?;
        context.output.print(&report)
    }
}

/// What `key create` made.
#[derive(Debug, Serialize)]
pub(super) struct CreatedKey {
    id: String,
    bits: u32,
    recipient: String,
    signer: String,
    public_key_file: PathBuf,
    private_key_file: PathBuf,
    signing_key_file: PathBuf,
    verify_key_file: PathBuf,
    pub(super) configuration: String,
}

pub(super) fn create_in(folder: &Path, id: &str, bits: u32) -> Result<CreatedKey, CommandError> {
    let file = |role: KeyRole| folder.join(format!("{id}.{}", extension(role)));
    // Looked at first, because an RSA key of 8192 bits takes a while; `create_file` refuses as well.
    if let Some(path) = KeyRole::ALL.map(file).into_iter().find(|path| path.symlink_metadata().is_ok()) {
        return Err(exists(&path));
    }
    let keys = create_keys(bits).map_err(usage_of_bits)?;
    let content = |role: KeyRole| match role {
        KeyRole::Public => keys.public_pem.as_str(),
        KeyRole::Private => keys.private_pem.as_str(),
        KeyRole::Signing => keys.sign_pem.as_str(),
        KeyRole::Verify => keys.verify_pem.as_str(),
    };
    let mut written = Vec::new();
    for role in KeyRole::ALL {
        let mode = if role.is_secret() { 0o600 } else { 0o644 };
        if let Err(error) = create_file(&file(role), content(role).as_bytes(), Create { mode, owner: None }) {
            // Half of a key is worth nothing, and would be in the way of the next attempt.
            written.iter().for_each(|path| drop(std::fs::remove_file(path)));
            return Err(error.into());
        }
        written.push(file(role));
    }
    Ok(CreatedKey {
        id: id.to_owned(),
        bits,
        recipient: RecipientKey::from_pem(&keys.public_pem)?.id().to_string(),
        signer: VerifyKey::from_pem(&keys.verify_pem)?.signer_id().to_string(),
        public_key_file: file(KeyRole::Public),
        private_key_file: file(KeyRole::Private),
        signing_key_file: file(KeyRole::Signing),
        verify_key_file: file(KeyRole::Verify),
        configuration: configuration_lines(id, file),
    })
}

fn extension(role: KeyRole) -> &'static str {
    match role {
        KeyRole::Public => "pub.pem",
        KeyRole::Private => "pem",
        KeyRole::Signing => "sign.pem",
        KeyRole::Verify => "verify.pem",
    }
}

/// Writes the section that makes the key known; as complete as a host that does everything needs it.
fn configuration_lines(id: &str, file: impl Fn(KeyRole) -> PathBuf) -> String {
    let mut lines =
        format!("[encryption]\nrecipients = [\"{id}\"]\nsigner = \"{id}\"\ntrusted_signers = [\"{id}\"]\n");
    lines.push_str(&format!("\n[encryption.keys.\"{id}\"]\n"));
    for role in KeyRole::ALL {
        lines.push_str(&format!("{} = {:?}\n", role.config_key(), file(role).display().to_string()));
    }
    lines
}

fn usage_of_bits(error: codec::Error) -> CommandError {
    match error {
        codec::Error::KeyLength { .. } => CommandError { kind: ExitKind::Usage, ..error.into() },
        other => other.into(),
    }
}

fn exists(path: &Path) -> CommandError {
    CommandError::failed(format!("\"{}\" exists already", path.display()))
        .hint("A key is never replaced: choose another --id, or another directory.")
}

impl Report for CreatedKey {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        let mut files = TextTable::new(&[("FILE", Align::Left), ("WHAT", Align::Left)]);
        for (file, what) in [
            (
                &self.private_key_file,
                "the recipient's private key: where backups are read, and in a safe place",
            ),
            (&self.public_key_file, "the recipient's public key: where backups are written"),
            (&self.signing_key_file, "the signer's private key: where backups are written or expired"),
            (&self.verify_key_file, "the signer's public key: where backups are read"),
        ] {
            files.row([file.display().to_string(), what.to_owned()]);
        }
        files.write(out);
        writeln!(
            out,
            "\nWithout the recipient's private key nobody reads the backups: keep a copy elsewhere."
        )?;
        writeln!(out, "\nFor the configuration file, as far as this host needs it:\n\n{}", self.configuration)
    }
}
