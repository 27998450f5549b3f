//! `--hydrate-rate` and `--no-hydrate`: how what a clone has not read comes, at its creation and at every start.
//! What is said once is remembered with the clone, until something else is said.

use std::num::NonZeroU64;

use clap::Args;

use crate::config::parse_size;
use crate::instance::clone_folder::HydrateSpec;

/// How the rest of the basebackup comes.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct HydrateArguments {
    /// The most that is fetched in the background in a second, such as 50MiB; none for no limit
    #[arg(long, value_name = "R", value_parser = parse_rate, conflicts_with = "no_hydrate")]
    hydrate_rate: Option<HydrateRate>,

    /// Fetches nothing in the background, only what is read
    #[arg(long)]
    no_hydrate: bool,
}

/// A rate, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HydrateRate(Option<NonZeroU64>);

impl HydrateArguments {
    /// Tells whether anything was said.
    pub(in crate::cli) fn are_given(&self) -> bool {
        self.no_hydrate || self.hydrate_rate.is_some()
    }

    /// Returns what is to be done, where something else than `before` was asked for.
    pub(in crate::cli) fn change(&self, before: HydrateSpec) -> HydrateSpec {
        match self.hydrate_rate {
            _ if self.no_hydrate => HydrateSpec { in_background: false, ..before },
            Some(HydrateRate(rate)) => HydrateSpec { in_background: true, rate },
            None => before,
        }
    }
}

fn parse_rate(text: &str) -> Result<HydrateRate, String> {
    if text == "none" {
        return Ok(HydrateRate(None));
    }
    let bytes = parse_size(text).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    })?;
    match NonZeroU64::new(bytes) {
        Some(rate) => Ok(HydrateRate(Some(rate))),
        None => Err("nothing would ever come; --no-hydrate says so".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(rate: Option<&str>, no_hydrate: bool) -> HydrateArguments {
        HydrateArguments { hydrate_rate: rate.map(|rate| parse_rate(rate).unwrap()), no_hydrate }
    }

    #[test]
    fn what_is_not_said_stays_and_a_rate_turns_it_on() {
        let limited = HydrateSpec { in_background: true, rate: NonZeroU64::new(10 << 20) };
        let off = HydrateSpec { in_background: false, ..limited };
        assert_eq!(asked(Some("10MiB"), false).change(HydrateSpec::default()), limited);
        assert_eq!(asked(None, false).change(limited), limited);
        assert_eq!(asked(None, true).change(limited), off);
        assert_eq!(asked(Some("none"), false).change(off), HydrateSpec::default());
    }

    #[test]
    fn a_rate_is_a_size_and_not_nothing() {
        assert!(parse_rate("0B").unwrap_err().contains("--no-hydrate"));
        assert!(parse_rate("10").unwrap_err().contains("512MiB"));
        assert!(parse_rate("10MB").is_err());
    }
}
