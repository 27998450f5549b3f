//! The options that say where recovery ends, shared by every command that recovers.
//!
//! At most one target. A time without a zone is meant in the zone of the environment and is shown with it before
//! anything starts. Deliberately absent: words such as "yesterday"; a target is exact or it is refused.

use clap::Args;
use jiff::Timestamp;
use jiff::civil::DateTime;

use crate::catalog::{RecoveryTarget, Target, TargetAction};
use crate::pg::{Lsn, TimelineId};

use super::context::Context;
use super::error::CommandError;

/// Where recovery ends; PostgreSQL's own terms.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Recovery target")]
pub(super) struct TargetArguments {
    /// A time such as '2026-11-20 10:15:00+01'; without a zone it is local time
    #[arg(long, value_name = "TIME", group = "recovery-target")]
    target_time: Option<String>,
    /// A position in the WAL
    #[arg(long, value_name = "LSN", group = "recovery-target")]
    target_lsn: Option<String>,
    /// A transaction
    #[arg(long, value_name = "XID", group = "recovery-target")]
    target_xid: Option<u64>,
    /// A restore point made by pg_create_restore_point
    #[arg(long, value_name = "NAME", group = "recovery-target")]
    target_name: Option<String>,
    /// As soon as the basebackup is consistent
    #[arg(long, value_name = "immediate", value_parser = ["immediate"], group = "recovery-target")]
    target: Option<String>,
    /// The timeline to follow; the newest that descends from the basebackup's where none is named
    #[arg(long, value_name = "N")]
    target_timeline: Option<u32>,
    /// What the server does at the target
    #[arg(long, value_name = "ACTION", value_parser = ["pause", "promote", "shutdown"])]
    target_action: Option<String>,
    /// Ends just before the target, a time, position or transaction, instead of just after it
    #[arg(long, requires = "recovery-target", conflicts_with_all = ["target_name", "target"])]
    target_exclusive: bool,
}

impl TargetArguments {
    /// Returns the target, with this action where none is named.
    pub(super) fn read(
        &self,
        context: &Context,
        action: TargetAction,
    ) -> Result<RecoveryTarget, CommandError> {
        let timeline = match self.target_timeline {
            Some(number) => {
                Some(TimelineId::new(number).ok_or_else(|| CommandError::usage("there is no timeline 0"))?)
            }
            None => None,
        };
        let action = match self.target_action.as_deref() {
            Some("pause") => TargetAction::Pause,
            Some("shutdown") => TargetAction::Shutdown,
            Some(_) => TargetAction::Promote,
            None => action,
        };
        Ok(RecoveryTarget {
            target: self.target(context)?,
            inclusive: !self.target_exclusive,
            timeline,
            action,
        })
    }

    fn target(&self, context: &Context) -> Result<Target, CommandError> {
        if let Some(text) = &self.target_time {
            let time = parse_time(text, context)?;
            if !context.global.quiet {
                eprintln!("recovery target time {}", context.output.style().time(time));
            }
            return Ok(Target::Time(time));
        }
        if let Some(text) = &self.target_lsn {
            let lsn: Lsn = text.parse().map_err(|error| CommandError::usage(format!("{error}")))?;
            return Ok(Target::Lsn(lsn));
        }
        Ok(match (&self.target_xid, &self.target_name, &self.target) {
            (Some(xid), _, _) => Target::Xid(xid.to_string()),
            (_, Some(name), _) => Target::Name(name.clone()),
            (_, _, Some(_)) => Target::Immediate,
            _ => Target::Latest,
        })
    }
}

/// Reads a time with a zone, or without one in the environment's.
fn parse_time(text: &str, context: &Context) -> Result<Timestamp, CommandError> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let local = text.parse::<DateTime>().ok().and_then(|time| {
        time.to_zoned(context.environment.time_zone.get()).ok().map(|zoned| zoned.timestamp())
    });
    // A text with a Z at its end or a name in brackets meant a zone; half of it must not be dropped in silence.
    local.filter(|_| !text.ends_with(['Z', 'z', ']'])).ok_or_else(|| {
        CommandError::usage(format!("\"{text}\" is not a time"))
            .hint("Write it as '2026-11-20 10:15:00+01' or, in local time, as '2026-11-20 10:15:00'.")
    })
}

#[cfg(test)]
mod tests {
    use crate::config::Environment;

    use super::super::context::GlobalOptions;
    use super::super::output::{Format, Output};
    use super::super::text::TextStyle;
    use super::*;

    fn context(zone: &str) -> Context {
        let time_zone = jiff::tz::TimeZone::get(zone).unwrap();
        let style = TextStyle { time_zone: time_zone.clone().into() };
        let output = Output::new(Format::Text, style, Box::new(std::io::sink()));
        let mut environment = Environment::of(0, &[]);
        environment.time_zone = time_zone.into();
        let global = GlobalOptions {
            config: None,
            site: None,
            output: None,
            json: false,
            verbose: 0,
            quiet: true,
            no_progress: true,
        };
        Context::new(global, environment, output)
    }

    /// Failure 27: a time parser that accepted "13am".
    #[test]
    fn a_time_is_exact_or_refused() {
        let context = context("Europe/Helsinki");
        for (text, expected) in [
            ("2026-11-20 10:15:00", "2026-11-20T08:15:00Z"),
            ("2026-11-20 10:15", "2026-11-20T08:15:00Z"),
            ("2026-11-20T10:15:00.25+01", "2026-11-20T09:15:00.25Z"),
            ("2026-11-20 10:15:00Z", "2026-11-20T10:15:00Z"),
        ] {
            assert_eq!(parse_time(text, &context).unwrap().to_string(), expected, "{text}");
        }
        for text in [
            "13am",
            "2026-11-20 13am",
            "2026-11-20 25:00",
            "yesterday",
            "",
            "2026-13-01 10:00",
            "10:15",
            "2026-11-20 10:15 CET",
            "2026-11-20 10:15:00[America/New_York]",
            "2026-11-20 10:15:00[u-ca=iso8601]",
        ] {
            assert!(parse_time(text, &context).is_err(), "{text:?}");
        }
    }
}
