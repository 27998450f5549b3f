//! The server's WAL summaries (PostgreSQL 17 and later): which blocks have changed since the last basebackup began.
//!
//! timelines and LSNs between the two starts → the summaries that cover them without a gap → [`ChangedBlocks`].
//!
//! A hint, never a must: where there is none, every page is read and compared, and the reason is said. The summaries
//! are asked for by SQL, so that it works for a server on another host, and are fetched through a cursor, so that no
//! number of changed blocks is in memory twice. The newest summary is written a moment after the checkpoint that a
//! basebackup begins with, so it is waited for, not long.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use crate::backup::changed_blocks::{ChangedBlocks, SummaryEntry, TooManyForks};
use crate::clock::Clock;
use crate::pg::{Fork, Lsn, MajorVersion, Oid, TimelineHistory, TimelineId};
use crate::replication::{Error, Param, Row, Session};

/// WAL of one timeline, from the first position on and up to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalSpan {
    /// Whose WAL it is.
    pub timeline: TimelineId,
    /// Its first byte.
    pub from: Lsn,
    /// One past its last.
    pub to: Lsn,
}

/// What the summaries have to say.
#[derive(Debug)]
pub enum Summaries {
    /// Everything that changed.
    Known(ChangedBlocks),
    /// Nothing that could be relied on: everything has to be read.
    None(NoSummaries),
}

/// Why there is no hint, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSummaries {
    /// The server is older than 17.
    TooOld(MajorVersion),
    /// It writes none.
    Off,
    /// It has none of the WAL from there on, and will never have.
    Gap { timeline: TimelineId, at: Lsn },
    /// It had not come further after some time.
    Behind { timeline: TimelineId, at: Lsn },
    /// It would not tell.
    Refused(String),
    /// There is too much of it.
    TooMuch(String),
}

/// Why there is no reading on.
#[derive(Debug)]
enum Failure {
    /// The server refused a statement, or the session has ended.
    Session(Error),
    /// A row cannot be understood: a later server's, with one fork more, say.
    Row(String),
    /// There is too much of it.
    TooMuch(TooManyForks),
}

/// Rows of a summary that are fetched at a time: some megabytes.
const ROWS: usize = 20_000;
/// One for each checkpoint: those of a year.
const SUMMARIES_MAX: usize = 200_000;
/// Between two looks, growing from the first to the last.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

impl WalSpan {
    /// Returns the WAL between two positions of a timeline's past, the oldest first; none where the first is not
    /// part of it, or comes behind the second: no list would say that nothing has changed.
    ///
    /// `history` is that of `timeline`, which the first timeline has none of; `from_timeline` is where the first
    /// position was.
    pub fn between(
        history: Option<&TimelineHistory>,
        (from_timeline, from): (TimelineId, Lsn),
        (timeline, to): (TimelineId, Lsn),
    ) -> Option<Vec<Self>> {
        if from > to {
            return None;
        }
        let mut spans = Vec::new();
        let mut begin = Some(from).filter(|_| from_timeline == timeline);
        for ancestor in history.into_iter().flat_map(TimelineHistory::ancestors) {
            if ancestor == from_timeline {
                begin = Some(from);
            }
            let left = history.and_then(|history| history.switch_of(ancestor));
            if let (Some(from), Some(left)) = (begin, left) {
                if ancestor == from_timeline && from > left {
                    return None;
                }
                let to = left.min(to);
                if from < to {
                    spans.push(Self { timeline: ancestor, from, to });
                }
                begin = Some(from.max(to));
            }
        }
        let from = begin?;
        if from < to {
            spans.push(Self { timeline, from, to });
        }
        Some(spans)
    }
}

/// Reads what has changed in the WAL of `spans`, which is waited for no longer than `patience`.
///
/// Opens and ends a transaction on the session. An error is the session's end, and nothing else.
pub async fn read_summaries(
    session: &Session,
    spans: &[WalSpan],
    clock: &dyn Clock,
    patience: Duration,
) -> Result<Summaries, Error> {
    if session.version() < MajorVersion::V17 {
        return Ok(Summaries::None(NoSummaries::TooOld(session.version())));
    }
    let read = async {
        let setting = "SELECT current_setting('summarize_wal') = 'on' AS enabled";
        if !session.query_one(setting, &[]).await?.bool("enabled")? {
            return Ok(Summaries::None(NoSummaries::Off));
        }
        let summaries = match wait_for_summaries(session, spans, clock, patience).await? {
            Ok(summaries) => summaries,
            Err(none) => return Ok(Summaries::None(none)),
        };
        let mut changed = ChangedBlocks::default();
        for summary in &summaries {
            read_contents(session, summary, &mut changed).await?;
        }
        Ok(Summaries::Known(changed))
    };
    unless_refused(read.await)
}

/// Makes no hint of a refusal and of what cannot be understood. What ends the session stays an error, and so does an
/// answer that is none: behind it the session and the server do not understand each other.
fn unless_refused(read: Result<Summaries, Failure>) -> Result<Summaries, Error> {
    let none = match read {
        Ok(summaries) => return Ok(summaries),
        // A role without the right, or a summary that was removed in between.
        Err(Failure::Session(Error::Sql { message: why, .. }) | Failure::Row(why)) => {
            NoSummaries::Refused(why)
        }
        Err(Failure::TooMuch(too_many)) => NoSummaries::TooMuch(too_many.to_string()),
        Err(Failure::Session(error)) => return Err(error),
    };
    Ok(Summaries::None(none))
}

/// Decides which of the summaries that are there cover the spans, or where the first gap is.
pub fn plan_summaries(available: &[WalSpan], spans: &[WalSpan]) -> Result<Vec<WalSpan>, NoSummaries> {
    let mut chosen = Vec::new();
    for (n, span) in spans.iter().enumerate() {
        let of_timeline = available.iter().filter(|summary| summary.timeline == span.timeline);
        let mut overlapping: Vec<&WalSpan> =
            of_timeline.filter(|summary| summary.to > span.from && summary.from < span.to).collect();
        overlapping.sort_by_key(|summary| (summary.from, summary.to));
        let mut covered = span.from;
        for summary in &overlapping {
            if summary.from > covered {
                return Err(NoSummaries::Gap { timeline: span.timeline, at: covered });
            }
            if summary.to > covered {
                covered = summary.to;
                chosen.push(**summary);
            }
        }
        if covered < span.to {
            // Summaries are written in the order of the WAL: where there is one of a later timeline, no more come of
            // this one. Right behind a promotion its last one may still be to come.
            let later = &spans[n + 1..];
            let is_past =
                available.iter().any(|summary| later.iter().any(|it| it.timeline == summary.timeline));
            let (timeline, at) = (span.timeline, covered);
            return Err(if is_past {
                NoSummaries::Gap { timeline, at }
            } else {
                NoSummaries::Behind { timeline, at }
            });
        }
    }
    Ok(chosen)
}

async fn wait_for_summaries(
    session: &Session,
    spans: &[WalSpan],
    clock: &dyn Clock,
    patience: Duration,
) -> Result<Result<Vec<WalSpan>, NoSummaries>, Failure> {
    let began = clock.monotonic();
    let mut pause = POLL.0;
    loop {
        let planned = plan_summaries(&available(session, spans).await?, spans);
        let left = patience.saturating_sub(clock.monotonic().duration_since(began));
        if !matches!(planned, Err(NoSummaries::Behind { .. })) || left.is_zero() {
            return Ok(planned);
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(POLL.1);
    }
}

async fn available(session: &Session, spans: &[WalSpan]) -> Result<Vec<WalSpan>, Failure> {
    let sql = "SELECT tli::bigint AS timeline, start_lsn::text AS start, end_lsn::text AS stop \
               FROM pg_available_wal_summaries() \
               WHERE tli = $1 AND end_lsn > $2::pg_lsn AND start_lsn < $3::pg_lsn \
               ORDER BY start_lsn, end_lsn LIMIT $4";
    let mut found = Vec::new();
    for span in spans {
        let (from, to) = (span.from.to_string(), span.to.to_string());
        let params = [
            Param::Int(span.timeline.get().into()),
            Param::Text(&from),
            Param::Text(&to),
            Param::Int(SUMMARIES_MAX as i64),
        ];
        for row in session.query(sql, &params).await? {
            // Whatever is wrong with it, the answer has come whole.
            found.push(summary(&row).map_err(|error| Failure::Row(error.to_string()))?);
        }
    }
    Ok(found)
}

fn summary(row: &Row) -> Result<WalSpan, Error> {
    let timeline = row.unsigned::<u32>("timeline")?;
    let timeline = TimelineId::new(timeline)
        .ok_or_else(|| Error::Unexpected { detail: objection("timeline", &timeline) })?;
    Ok(WalSpan { timeline, from: row.parsed("start")?, to: row.parsed("stop")? })
}

/// Takes in one summary, some rows at a time.
async fn read_contents(
    session: &Session,
    summary: &WalSpan,
    changed: &mut ChangedBlocks,
) -> Result<(), Failure> {
    let WalSpan { timeline, from, to } = summary;
    // All of it are numbers and LSNs of our own types.
    let declare = format!(
        "BEGIN; DECLARE walden_summary NO SCROLL CURSOR FOR \
         SELECT reltablespace::bigint, reldatabase::bigint, relfilenode::bigint, relforknumber::bigint, \
         relblocknumber::bigint, is_limit_block FROM pg_wal_summary_contents({timeline}, '{from}', '{to}')"
    );
    let fetch = format!("FETCH FORWARD {ROWS} FROM walden_summary");
    let read = async {
        session.simple(&declare).await?;
        loop {
            let rows = session.simple(&fetch).await?;
            for row in &rows {
                let entry = entry(row).map_err(Failure::Row)?;
                changed.insert(&entry).map_err(Failure::TooMuch)?;
            }
            if rows.len() < ROWS {
                return Ok(());
            }
        }
    };
    let outcome = read.await;
    // A transaction that failed ends the same way, and keeps no snapshot from what comes behind it.
    session.simple("ROLLBACK").await?;
    outcome
}

/// Reads a row; returns what is wrong with it where it cannot be understood.
fn entry(row: &[Option<String>]) -> Result<SummaryEntry, String> {
    let field = |at: usize| row.get(at).and_then(Option::as_deref);
    let fork = number(field(3), "relforknumber")?;
    Ok(SummaryEntry {
        tablespace: Oid(number(field(0), "reltablespace")?),
        database: Oid(number(field(1), "reldatabase")?),
        relfilenode: Oid(number(field(2), "relfilenode")?),
        fork: Fork::from_number(fork).ok_or_else(|| objection("relforknumber", &fork))?,
        block: number(field(4), "relblocknumber")?,
        is_limit: match field(5) {
            Some("t") => true,
            Some("f") => false,
            other => return Err(objection("is_limit_block", &other.unwrap_or("null"))),
        },
    })
}

fn number<T: FromStr>(text: Option<&str>, column: &str) -> Result<T, String> {
    let text = text.unwrap_or("null");
    text.parse().map_err(|_| objection(column, &text))
}

fn objection(column: &str, value: &dyn Display) -> String {
    format!("column \"{column}\" of a WAL summary holds {value}")
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Session(error)
    }
}

impl Display for NoSummaries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooOld(version) => write!(f, "PostgreSQL {version} has no WAL summaries, 17 has"),
            Self::Off => f.write_str("the server writes no WAL summaries (summarize_wal is off)"),
            Self::Gap { timeline, at } => {
                write!(f, "the server has no WAL summary from {at} on of timeline {timeline}")
            }
            Self::Behind { timeline, at } => {
                write!(f, "the server's WAL summaries of timeline {timeline} have only come to {at}")
            }
            Self::Refused(message) => write!(f, "the server does not tell its WAL summaries: {message}"),
            Self::TooMuch(message) => f.write_str(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn span(timeline: u32, from: u64, to: u64) -> WalSpan {
        WalSpan { timeline: tli(timeline), from: Lsn(from), to: Lsn(to) }
    }

    #[test]
    fn summaries_cover_the_wal_between_two_starts_or_there_is_a_gap() {
        // As `pg_available_wal_summaries` of 18 had them: in no order, each where the one before ended.
        let available = [span(1, 300, 400), span(1, 100, 200), span(1, 200, 300), span(2, 250, 350)];
        let plan = |spans: &[WalSpan]| plan_summaries(&available, spans);
        assert_eq!(plan(&[span(1, 100, 300)]), Ok(vec![available[1], available[2]]));
        assert_eq!(plan(&[span(1, 150, 250)]), Ok(vec![available[1], available[2]]));
        assert_eq!(plan(&[span(1, 120, 250), span(2, 250, 350)]).unwrap().len(), 3);
        assert_eq!(plan(&[]), Ok(vec![]));
        let gap = |timeline, at| NoSummaries::Gap { timeline: tli(timeline), at: Lsn(at) };
        assert_eq!(plan(&[span(1, 50, 300)]), Err(gap(1, 50)));
        assert_eq!(plan(&[span(1, 100, 500), span(2, 500, 600)]), Err(gap(1, 400)));
        let behind = NoSummaries::Behind { timeline: tli(2), at: Lsn(350) };
        assert_eq!(plan(&[span(1, 100, 250), span(2, 250, 360)]), Err(behind));
        // Promoted a moment ago: the summaries of the timeline that it left have not all come, nor any of the next one.
        let behind = NoSummaries::Behind { timeline: tli(1), at: Lsn(400) };
        assert_eq!(plan(&[span(1, 100, 450), span(3, 450, 500)]), Err(behind));
        let hole = [span(1, 100, 200), span(1, 201, 300)];
        assert_eq!(plan_summaries(&hole, &[span(1, 100, 300)]), Err(gap(1, 200)));
        // Summaries that overlap, as after a crash of the summarizer, and one within another.
        let twice = [span(1, 100, 200), span(1, 150, 300), span(1, 160, 170)];
        assert_eq!(plan_summaries(&twice, &[span(1, 100, 300)]), Ok(vec![twice[0], twice[1]]));
    }

    #[test]
    fn the_wal_between_two_starts_follows_the_timelines() {
        let history = TimelineHistory::parse(tli(4), "1\t0/100\tx\n3\t0/200\ty\n").unwrap();
        let between = |from: (u32, u64), to| {
            WalSpan::between(Some(&history), (tli(from.0), Lsn(from.1)), (tli(4), Lsn(to)))
        };
        let all = vec![span(1, 0x80, 0x100), span(3, 0x100, 0x200), span(4, 0x200, 0x300)];
        assert_eq!(between((1, 0x80), 0x300), Some(all.clone()));
        assert_eq!(between((3, 0x100), 0x300), Some(all[1..].to_vec()));
        assert_eq!(between((4, 0x200), 0x300), Some(all[2..].to_vec()));
        assert_eq!(between((1, 0x80), 0x90), Some(vec![span(1, 0x80, 0x90)]));
        // Behind the point at which it was left, and of another branch.
        assert_eq!(between((1, 0x101), 0x300), None);
        assert_eq!(between((2, 0x80), 0x300), None);
        let first = |from, to| WalSpan::between(None, (tli(1), Lsn(from)), (tli(1), Lsn(to)));
        assert_eq!(first(1, 2), Some(vec![span(1, 1, 2)]));
        assert_eq!(first(2, 2), Some(vec![]));
        // After pg_resetwal, say.
        assert_eq!(first(2, 1), None);
    }

    /// Recorded from 18: rows as psql shows them, of an update, a truncation by vacuum, a dropped relation and a
    /// database made by copying files.
    #[test]
    fn rows_become_entries() {
        let rows = [
            ("1663|5|16392|0|310|f", (16_392, Fork::Main, 310, false)),
            ("1663|5|16406|0|222|t", (16_406, Fork::Main, 222, true)),
            ("1663|5|16406|2|0|f", (16_406, Fork::VisibilityMap, 0, false)),
            ("1663|5|16403|3|0|t", (16_403, Fork::Init, 0, true)),
            ("1663|16409|0|0|0|t", (0, Fork::Main, 0, true)),
        ];
        let fields = |row: &str| row.split('|').map(|field| Some(field.to_owned())).collect::<Vec<_>>();
        for (row, (relfilenode, fork, block, is_limit)) in rows {
            let entry = entry(&fields(row)).unwrap();
            assert_eq!(
                (entry.relfilenode.0, entry.fork, entry.block, entry.is_limit),
                (relfilenode, fork, block, is_limit)
            );
            assert_eq!(entry.tablespace, Oid::DEFAULT_TABLESPACE);
        }
        for row in
            ["", "1663|5|16392|0|310", "1663|5|16392|9|310|f", "1663|5|16392|0|4294967296|f", "1|1|1|0|-1|f"]
        {
            let refused = entry(&fields(row)).unwrap_err();
            let read =
                unless_refused(Err(Failure::Row(refused))).unwrap_or_else(|error| panic!("{row}: {error}"));
            let Summaries::None(NoSummaries::Refused(why)) = read else { panic!("{row}: {read:?}") };
            assert!(why.contains("of a WAL summary holds"), "{row}: {why}");
        }
    }

    #[test]
    fn a_refusal_is_no_hint_and_what_leaves_the_session_in_doubt_is_an_error() {
        let of_session = |error: Error| unless_refused(Err(error.into()));
        let lost = of_session(Error::Lost { detail: "gone".to_owned() });
        assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
        // What the client says of messages that no server sends: nobody knows what comes next.
        let strange = of_session(Error::Unexpected { detail: "unexpected message from server".to_owned() });
        assert!(matches!(strange, Err(Error::Unexpected { .. })), "{strange:?}");
        let (sqlstate, message) = ("42501".to_owned(), "permission denied".to_owned());
        let refused = of_session(Error::Sql { sqlstate, message, detail: None, hint: None });
        let Ok(Summaries::None(NoSummaries::Refused(why))) = refused else { panic!("{refused:?}") };
        assert_eq!(why, "permission denied");
        let many = unless_refused(Err(Failure::TooMuch(TooManyForks { forks: 7 })));
        assert!(
            matches!(&many, Ok(Summaries::None(NoSummaries::TooMuch(why))) if why.contains('7')),
            "{many:?}"
        );
    }

    #[test]
    fn reasons_name_the_facts() {
        let reason = NoSummaries::Gap { timeline: tli(2), at: Lsn(0x16_B374_D848) };
        assert_eq!(reason.to_string(), "the server has no WAL summary from 16/B374D848 on of timeline 2");
        assert!(NoSummaries::TooOld(MajorVersion::V15).to_string().contains("PostgreSQL 15"));
    }
}
