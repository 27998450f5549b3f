//! Clones that were made for some time only, once it is over.
//!
//! The supervisor of one that runs ends and deletes it. One that does not run has nobody: it is deleted by the next
//! `clone list` or `clone create`, which say so; where they cannot, they warn and go on.

use std::time::Duration;

use jiff::Timestamp;

use crate::config::parse_duration;
use crate::instance::clone_folder::CloneFolder;
use crate::instance::expiry::is_over;

use super::super::context::Context;
use super::super::error::CommandError;
use super::delete::remove;
use super::is_supervised;

/// Deletes every clone of this host that does not run and whose time is over.
pub(super) fn delete_expired(context: &Context) -> Result<(), CommandError> {
    let now = context.clock().now();
    for folder in CloneFolder::list(&context.config()?.paths.clones)? {
        let Ok(spec) = folder.read_spec() else { continue };
        if !is_over(&spec, now) || folder.order_file().exists() {
            continue;
        }
        let deleted = match is_supervised(&folder) {
            Ok(true) => Ok(false),
            Ok(false) => delete_over(context, &folder),
            Err(error) => Err(error),
        };
        match deleted {
            Ok(true) => tracing::warn!("clone \"{}\" has expired and is deleted", spec.name),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("clone \"{}\" has expired and stays: {}", spec.name, error.message());
            }
        }
    }
    Ok(())
}

/// Deletes a clone that does not run and whose time is over; false where somebody has made it last since that was seen.
pub(in crate::cli) fn delete_over(context: &Context, folder: &CloneFolder) -> Result<bool, CommandError> {
    let lock = context.block_on_one_thread(folder.lock_to_work())??;
    if folder.order_file().exists() || !is_over(&folder.read_spec()?, context.clock().now()) {
        return Ok(false);
    }
    remove(context, folder, &lock)?;
    Ok(true)
}

/// Refuses to start what would be deleted at once.
pub(super) fn refuse_over(context: &Context, folder: &CloneFolder) -> Result<(), CommandError> {
    let spec = folder.read_spec()?;
    if !is_over(&spec, context.clock().now()) {
        return Ok(());
    }
    Err(CommandError::failed(format!("clone \"{}\" has expired", spec.name))
        .hint("\"walden clone duplicate\" makes another one like it was when it was made."))
}

/// Reads how long a clone is to live, and returns when that is over.
pub(super) fn end_of(text: &str, now: Timestamp) -> Result<Timestamp, CommandError> {
    let lifetime = parse_duration(text).map_err(|error| {
        let usage = CommandError::usage(format!("--expires {text}: {error}"));
        match error.hint() {
            Some(hint) => usage.hint(hint),
            None => usage,
        }
    })?;
    if lifetime == Duration::ZERO {
        return Err(CommandError::usage("--expires takes a time that a clone can live for, such as 2h"));
    }
    now.checked_add(lifetime)
        .map_err(|_| CommandError::usage(format!("--expires {text} is longer than time goes on")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_is_a_duration_and_not_nothing() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let end: Timestamp = "2026-11-21T14:00:00Z".parse().unwrap();
        assert_eq!(end_of("2h", now).unwrap(), end);
        for wrong in ["0s", "2", "soon"] {
            let error = end_of(wrong, now).unwrap_err();
            assert!(error.message().contains("--expires"), "{}", error.message());
        }
    }
}
