//! `walden key list`: what is configured, which files this host has, and what it can do with them.
//!
//! A file that is not here is no problem but another host's business; one that is here and cannot be used is a
//! problem, and so are two files that do not belong together.

use std::fmt::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::config::{self, Config, EncryptionConfig, KeyFiles, KeyRole, NamedFile};

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::{Align, TextStyle, TextTable};

/// Shows the configured keys, their files and what this host can do with them
#[derive(Debug, Args)]
pub(super) struct KeyList {}

impl KeyList {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
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
        let public = opened(files.public.as_ref(), config::open_public, &mut problems).map(|key| key.id());
        let private =
            opened(files.private.as_ref(), config::open_private, &mut problems).map(|key| key.recipient_id());
        let signing =
            opened(files.signing.as_ref(), config::open_signing, &mut problems).map(|key| key.signer_id());
        let verify =
            opened(files.verify.as_ref(), config::open_verify, &mut problems).map(|key| key.signer_id());
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
    file: Option<&NamedFile>,
    open: fn(&NamedFile) -> config::Result<K>,
    problems: &mut Vec<String>,
) -> Option<K> {
    let file = file.filter(|file| file.path.exists())?;
    open(file).map_err(|error| problems.push(error.to_string())).ok()
}

fn roles(id: &str, encryption: &EncryptionConfig) -> Vec<&'static str> {
    let among = |ids: &[String]| ids.iter().any(|other| other == id);
    let roles = [
        ("recipient", among(&encryption.recipients)),
        ("wal_recipient", among(&encryption.wal_recipients)),
        ("signer", encryption.signer.as_deref() == Some(id)),
        ("trusted_signer", among(&encryption.trusted_signers)),
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
        for (position, key) in self.keys.iter().enumerate() {
            let roles = if key.roles.is_empty() { "unused".to_owned() } else { key.roles.join(", ") };
            let gap = if position == 0 { "" } else { "\n" };
            writeln!(out, "{gap}{}: {}", key.id, roles.replace('_', " "))?;
            let mut table = TextTable::new(&[("", Align::Left), ("", Align::Left), ("", Align::Left)]);
            for file in &key.files {
                let present = if file.present { "" } else { "not on this host" };
                table.row([file.key.to_owned(), file.path.display().to_string(), present.to_owned()]);
            }
            for (what, id) in [("recipient", &key.recipient), ("signer", &key.signer)] {
                if let Some(id) = id {
                    table.row([what.to_owned(), id.clone()]);
                }
            }
            table.write(out);
            for problem in &key.problems {
                writeln!(out, "problem: {problem}")?;
            }
        }
        Ok(())
    }
}
