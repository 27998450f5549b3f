//! What can be known of a command line that does not parse.
//!
//! A mistyped option must not decide how a mistake is reported: `wal fetch` with a wrong option still has to stop
//! recovery, and a script that asked for JSON still gets JSON. So the raw words are looked at before clap sees them.
//! Where the words leave a doubt, the answer is the one that cannot lose data.

use std::ffi::OsString;

use crate::config::nearest;

use super::exit::ExitPolicy;

const WAL: &str = "wal";
const FETCH: &str = "fetch";
/// What else may follow `wal`, in this release or a later one.
const OTHER_WAL_COMMANDS: [&str; 5] = ["push", "receive", "list", "check", "cleanup"];

/// Says by which policy a command line fails that may not even parse.
pub(super) fn exit_policy(arguments: &[OsString]) -> ExitPolicy {
    let words: Vec<&str> = words(arguments).iter().copied().skip_while(|word| *word != WAL).skip(1).collect();
    let known = words.iter().copied().find(|word| *word == FETCH || OTHER_WAL_COMMANDS.contains(word));
    let meant = known.or_else(|| {
        let commands = || OTHER_WAL_COMMANDS.into_iter().chain([FETCH]);
        words.iter().find_map(|word| nearest(word, commands()))
    });
    if meant == Some(FETCH) { ExitPolicy::RestoreCommand } else { ExitPolicy::Usual }
}

/// Says whether JSON is asked for, as far as the words tell.
pub(super) fn wants_json(arguments: &[OsString]) -> bool {
    let words = all_words(arguments);
    let pairs = words.windows(2).any(|pair| pair == ["--output", "json"]);
    pairs || words.contains(&"--json") || words.contains(&"--output=json")
}

/// Returns the words that are no options; the value of an option may be among them.
fn words(arguments: &[OsString]) -> Vec<&str> {
    all_words(arguments).into_iter().filter(|word| !word.starts_with('-')).collect()
}

/// Returns the words up to `--`, without the program's name.
fn all_words(arguments: &[OsString]) -> Vec<&str> {
    let words = arguments.iter().skip(1).filter_map(|word| word.to_str());
    words.take_while(|word| *word != "--").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn wal_fetch_is_recognized_whatever_is_wrong_with_it() {
        for line in [
            "walden wal fetch 000000010000000000000001 pg_wal/RECOVERYXLOG",
            "walden --config /etc/walden.toml wal fetch a b",
            "walden --confg /etc/walden.toml wal fetch a b",
            "walden --site wal wal fetch a b",
            "walden wal --confg /etc/walden.toml fetch a b",
            "walden wal fetch",
            "walden wal fetch a b c --nonsense",
            "walden wal ftech a b",
            "walden -q wal fetch --json",
        ] {
            assert_eq!(exit_policy(&arguments(line)), ExitPolicy::RestoreCommand, "{line}");
        }
        for line in [
            "walden",
            "walden wal",
            "walden wal push fetch",
            "walden wal push pg_wal/000000010000000000000001 --fetch",
            "walden wal pusch pg_wal/000000010000000000000001",
            "walden fetch wal",
            "walden list",
            "walden clone psql x -- wal fetch",
        ] {
            assert_eq!(exit_policy(&arguments(line)), ExitPolicy::Usual, "{line}");
        }
    }

    #[test]
    fn json_is_recognized_in_all_its_forms() {
        for line in ["walden --json list", "walden lst --output json", "walden list --output=json --x"] {
            assert!(wants_json(&arguments(line)), "{line}");
        }
        for line in ["walden list", "walden list --output text", "walden clone psql x -- --json"] {
            assert!(!wants_json(&arguments(line)), "{line}");
        }
    }
}
