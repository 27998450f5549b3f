//! `docs/cli.md`, written from clap, so that what is documented is what there is.
//!
//! `WALDEN_UPDATE_DOCS=1 cargo nextest run reference` writes the document; without it the test compares.

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, Command, CommandFactory};

use super::CommandLine;

const INTRODUCTION: &str = "\
# Command line

<!-- Written from src/cli by a test; change it there and run it with WALDEN_UPDATE_DOCS=1. -->

Reports go to standard output: text for people, or with `--output json` exactly one JSON document with stable field names;
a command that fails before it has printed one prints `{\"error\": {\"kind\", \"message\", \"hint\", \"exit_status\"}}`.
Failures go to standard error as `error: …` and `hint: …`, log lines and progress as well. `WALDEN_LOG` takes a log
filter such as `walden::storage=debug`.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | the command line or the configuration is wrong |
| 3 | stored data is damaged, or nobody trusted vouches for it |
| 4 | the store or the server does not answer |

`wal fetch` is PostgreSQL's restore_command and exits by its rules whatever goes wrong, a mistyped option and a broken
configuration included: 0 restored, 1 proven absent, 200 anything else; where `standby.signal` is present 1 instead of 200.
The history that a server asks for when it ends its recovery, without a signal file by then, is 1 too where the server has it
itself and the store cannot tell; where it has not, the store is waited for.
";

fn reference() -> String {
    let mut command = CommandLine::command().term_width(110);
    command.build();
    let mut text = INTRODUCTION.to_owned();
    text.push_str("\n## Global options\n\nBefore or after the name of a command.\n\n");
    write_arguments(&mut text, command.get_arguments().filter(|argument| argument.is_global_set())).unwrap();
    for below in command.get_subcommands_mut() {
        write_command(&mut text, below, "walden").unwrap();
    }
    text
}

fn write_command(out: &mut String, command: &mut Command, above: &str) -> std::fmt::Result {
    if command.is_hide_set() {
        return Ok(());
    }
    let name = format!("{above} {}", command.get_name());
    if command.has_subcommands() {
        return command.get_subcommands_mut().try_for_each(|below| write_command(out, below, &name));
    }
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string);
    writeln!(out, "\n## `{name}`\n\n{}\n", about.unwrap_or_default())?;
    writeln!(out, "```\n{}\n```\n", command.render_usage().to_string().trim_start_matches("Usage: "))?;
    write_arguments(out, command.get_arguments().filter(|argument| !argument.is_global_set()))
}

fn write_arguments<'a>(out: &mut String, arguments: impl Iterator<Item = &'a Arg>) -> std::fmt::Result {
    let shown = |argument: &&Arg| {
        !argument.is_hide_set() && argument.get_id() != "help" && argument.get_id() != "version"
    };
    let mut rows = arguments.filter(shown).peekable();
    if rows.peek().is_some() {
        writeln!(out, "| argument | meaning |\n|---|---|")?;
    }
    for argument in rows {
        let short = argument.get_short().map_or_else(String::new, |short| format!("-{short}, "));
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let defaults: Vec<_> =
            argument.get_default_values().iter().filter_map(|value| value.to_str()).collect();
        let default = if defaults.is_empty() || !argument.get_action().takes_values() {
            String::new()
        } else {
            format!(" (default: {})", defaults.join(" "))
        };
        // Clap shows `-v, --verbose...`; the short name is not part of what it prints for the argument.
        let shown = argument.to_string();
        writeln!(out, "| `{short}{}` | {help}{default} |", shown.trim_end_matches("..."))?;
    }
    Ok(())
}

#[test]
fn the_document_is_the_command_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    if std::env::var_os("WALDEN_UPDATE_DOCS").is_some() {
        std::fs::write(&path, reference()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == reference(),
        "docs/cli.md is not what the command line is: run this test with WALDEN_UPDATE_DOCS=1"
    );
}

#[test]
fn every_command_and_argument_says_what_it_is() {
    fn check(command: &Command, above: &str) {
        let name = format!("{above} {}", command.get_name());
        assert!(command.get_about().is_some(), "{name} says nothing");
        for argument in command.get_arguments() {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty() && !help.ends_with('.'), "{name} {argument}: {help:?}");
        }
        command.get_subcommands().for_each(|below| check(below, &name));
    }
    let mut command = CommandLine::command();
    command.build();
    check(&command, "");
}
