//! `walden key create` and `walden key list`: the files of `[encryption.keys]`.
//!
//! `create` writes four files into the current directory and shows the lines that make them known; it never
//! replaces a file. `list` says of every configured key which files this host has and what it can do with them.

use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::codec::{self, RecipientKey, VerifyKey, create_keys};
use crate::config::{self, Config, EncryptionConfig, KeyFile, KeyFiles, KeyRole};
use crate::disk::durable::{Create, create_file};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::{Align, TextStyle, TextTable};

/// Creates and lists the keys that encrypt and sign backups
#[derive(Debug, Args)]
pub struct Key {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(KeyCreate),
    List(KeyList),
}

/// Writes a new recipient and a new signer: ID.pem, ID.pub.pem, ID.sign.pem and ID.verify.pem, here
#[derive(Debug, Args)]
struct KeyCreate {
    /// The name of the key in the configuration, such as 2026-11
    #[arg(long)]
    id: String,

    /// The length of the RSA key: 3072, 4096 or 8192
    #[arg(long, value_name = "N", default_value_t = 3072)]
    bits: u32,
}

/// Shows the configured keys, their files and what this host can do with them
#[derive(Debug, Args)]
struct KeyList {}

impl Key {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        match &self.action {
            Action::Create(command) => command.run(context),
            Action::List(command) => command.run(context),
        }
    }
}

/// The longest name of a key; it is part of file names.
const ID_LEN_MAX: usize = 64;

impl KeyCreate {
    fn run(&self, context: &Context) -> Result<(), CommandError> {
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
struct CreatedKey {
    id: String,
    bits: u32,
    recipient: String,
    signer: String,
    public_key_file: PathBuf,
    private_key_file: PathBuf,
    signing_key_file: PathBuf,
    verify_key_file: PathBuf,
    configuration: String,
}

fn create_in(folder: &Path, id: &str, bits: u32) -> Result<CreatedKey, CommandError> {
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

impl KeyList {
    fn run(&self, context: &Context) -> Result<(), CommandError> {
        context.output.print(&KeyReport::of(context.config()?))
    }
}

/// What `key list` found.
#[derive(Debug, Serialize)]
struct KeyReport {
    encrypted: bool,
    signed: bool,
    keys: Vec<ListedKey>,
}

#[derive(Debug, Serialize)]
struct ListedKey {
    id: String,
    roles: Vec<&'static str>,
    recipient: Option<String>,
    signer: Option<String>,
    files: Vec<ListedFile>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ListedFile {
    key: &'static str,
    path: PathBuf,
    present: bool,
}

impl KeyReport {
    fn of(config: &Config) -> Self {
        let Some(encryption) = &config.encryption else {
            return Self { encrypted: false, signed: false, keys: Vec::new() };
        };
        Self {
            encrypted: !encryption.recipients.is_empty(),
            signed: encryption.signer.is_some(),
            keys: encryption.keys.iter().map(|(id, files)| ListedKey::of(id, files, encryption)).collect(),
        }
    }
}

impl ListedKey {
    fn of(id: &str, files: &KeyFiles, encryption: &EncryptionConfig) -> Self {
        let mut problems = Vec::new();
        let public = opened(files.public.as_ref(), KeyFile::public, &mut problems).map(|key| key.id());
        let private =
            opened(files.private.as_ref(), KeyFile::private, &mut problems).map(|key| key.recipient_id());
        let signing =
            opened(files.signing.as_ref(), KeyFile::signing, &mut problems).map(|key| key.signer_id());
        let verify = opened(files.verify.as_ref(), KeyFile::verify, &mut problems).map(|key| key.signer_id());
        if public.zip(private).is_some_and(|(public, private)| public != private) {
            problems.push("the public and the private key are not of one pair".to_owned());
        }
        if signing.zip(verify).is_some_and(|(signing, verify)| signing != verify) {
            problems.push("the signing and the verify key are not of one pair".to_owned());
        }
        let listed = |role: KeyRole| {
            let path = files.get(role)?.path.clone();
            Some(ListedFile { key: role.config_key(), present: path.exists(), path })
        };
        Self {
            id: id.to_owned(),
            roles: roles(id, encryption),
            recipient: public.or(private).map(|id| id.to_string()),
            signer: verify.or(signing).map(|id| id.to_string()),
            files: KeyRole::ALL.into_iter().filter_map(listed).collect(),
            problems,
        }
    }
}

/// Opens a file that this host has; one that is not there is no problem but another host's business.
fn opened<K>(
    file: Option<&KeyFile>,
    open: fn(&KeyFile) -> config::Result<K>,
    problems: &mut Vec<String>,
) -> Option<K> {
    let file = file.filter(|file| file.path.exists())?;
    open(file).map_err(|error| problems.push(error.to_string())).ok()
}

fn roles(id: &str, encryption: &EncryptionConfig) -> Vec<&'static str> {
    let among = |ids: &[String]| ids.iter().any(|other| other == id);
    let roles = [
        ("recipient", among(&encryption.recipients)),
        ("WAL recipient", among(&encryption.wal_recipients)),
        ("signer", encryption.signer.as_deref() == Some(id)),
        ("trusted signer", among(&encryption.trusted_signers)),
    ];
    roles.into_iter().filter(|(_, has)| *has).map(|(role, _)| role).collect()
}

impl Report for KeyReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        if !self.encrypted {
            writeln!(out, "Backups are not encrypted: no recipients are configured.")?;
        }
        if !self.signed {
            writeln!(out, "Backups are not signed by this host: no signer is configured.")?;
        }
        for key in &self.keys {
            writeln!(
                out,
                "\n{}: {}",
                key.id,
                if key.roles.is_empty() { "unused".to_owned() } else { key.roles.join(", ") }
            )?;
            let mut table = TextTable::new(&[("", Align::Left), ("", Align::Left), ("", Align::Left)]);
            for file in &key.files {
                let present = if file.present { "" } else { "not on this host" };
                table.row([file.key.to_owned(), file.path.display().to_string(), present.to_owned()]);
            }
            for (what, id) in [("recipient", &key.recipient), ("signer", &key.signer)] {
                table.row(id.iter().flat_map(|id| [what.to_owned(), id.clone()]));
            }
            table.write(out);
            for problem in &key.problems {
                writeln!(out, "problem: {problem}")?;
            }
        }
        Ok(())
    }
}
