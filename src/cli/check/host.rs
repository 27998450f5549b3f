//! What `check` finds on this host: the configuration as it is in force, folders, mounts, PostgreSQL's programs.
//! What only mounts and clones need is a warning: a host that backs up does without.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

use crate::config::{self, Config, OwnedFolder};
use crate::disk::{Owner, Space};
use crate::instance::programs;
use crate::site::Item;

use super::super::text::size;

/// Below this a state folder is as good as full: logs, and what is remembered between runs, need megabytes.
const STATE_FREE_MIN: u64 = 256 << 20;

/// Looks at what the configuration says of this host.
pub(super) fn check_host(config: &Config) -> Vec<Item> {
    let limits = config.limits;
    vec![
        Item::ok("configuration", format!("\"{}\"", config.file.display())),
        Item::ok(
            "limits",
            format!(
                "threads = {}, transfers = {}, memory = {}, rate = {}",
                limits.threads,
                limits.transfers,
                size(limits.memory_bytes),
                limits.rate.map_or_else(|| "none".to_owned(), |rate| format!("{}/s", size(rate.get())))
            ),
        ),
        check_folder("state folder", config.paths.open_state()),
        check_folder("run folder", config.paths.open_run()),
        check_folder("clones folder", config.paths.open_clones()),
        check_fuse(),
    ]
}

fn check_folder(name: &str, opened: config::Result<OwnedFolder>) -> Item {
    let folder = match opened {
        Ok(folder) => folder,
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| "Correct [paths] in the configuration.".to_owned());
            return Item::failed(name, error.to_string(), hint);
        }
    };
    let path = folder.path.display();
    match Space::at(&folder.path) {
        Ok(space) if space.free_bytes < STATE_FREE_MIN => {
            let detail = format!("\"{path}\", {} free", size(space.free_bytes));
            Item::warning(name, detail, "Make room, or put the folder elsewhere in [paths].")
        }
        Ok(space) => Item::ok(name, format!("\"{path}\", {} free", size(space.free_bytes))),
        Err(error) => Item::warning(name, error.to_string(), "See why the file system does not answer."),
    }
}

fn check_fuse() -> Item {
    let name = "mounts";
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        let detail = format!("could not open /dev/fuse: {error}");
        return Item::warning(
            name,
            detail,
            "Mounts and clones need it: load the kernel module fuse, or run as root.",
        );
    }
    if Owner::current().is_root() {
        return Item::ok(name, "/dev/fuse, by root");
    }
    match Command::new("fusermount3").arg("--version").output() {
        Ok(output) if output.status.success() => Item::ok(name, "/dev/fuse, by fusermount3"),
        _ => Item::warning(
            name,
            "fusermount3 is not there or does not run",
            "Mounts and clones by others than root need the package fuse3.",
        ),
    }
}

/// Looks for PostgreSQL's programs of the server's version, which clones need.
pub(super) fn check_programs(major: u32, configured: Option<&Path>) -> Item {
    let name = "programs";
    match programs::find(major, configured) {
        Ok(directory) => Item::ok(name, format!("PostgreSQL {major} in \"{}\"", directory.display())),
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| "See why it does not run.".to_owned());
            if configured.is_some() {
                return Item::failed(name, error.to_string(), hint);
            }
            Item::warning(name, format!("{error}; clones and restores cannot be started here"), hint)
        }
    }
}
