//! Has every session of a server open its files again, so that those which are whole by now are opened as local ones.
//!
//! A file of the mount is passed through from the first open after its last missing page came. PostgreSQL keeps files
//! open as long as it can; creating and dropping a database makes every one of its processes let go of them (the
//! barrier PROCSIGNAL_BARRIER_SMGRRELEASE of DROP DATABASE, 15 and later). The database is never left behind: each
//! attempt ends with dropping whatever bears such a name, its own and those of attempts that were killed.
//! Deliberately absent: when, and whether again; who hydrates knows.

use crate::replication::{self, ErrorKind, Session};

/// What came of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutOver {
    /// Every process of the server has let go of its files.
    Done,
    /// The server is older than the means: files are opened again by new sessions, or after a restart.
    Unsupported,
    /// Somebody is in the way; it may be tried again.
    Waits {
        /// What the server says.
        because: String,
        /// Whether the attempt has written a database, or had it dropped up to the last step: a production server does not
        /// want that every few seconds.
        is_costly: bool,
    },
}

/// An attempt that came to nothing.
struct Failed {
    error: replication::Error,
    is_costly: bool,
}

/// What the databases are called, before random digits.
pub const PREFIX: &str = "walden_cutover_";
/// Digits after the prefix: what has others is somebody's own.
const DIGITS: usize = 16;
/// The first version whose DROP DATABASE has the barrier.
const MAJOR_MIN: u32 = 15;
/// A process that does not come to the barrier, in a long system call for example, holds nobody up for longer.
const STATEMENT_TIMEOUT: &str = "60s";
/// Another session is where this has to be alone, which is known before anything is written: ERRCODE_OBJECT_IN_USE,
/// ERRCODE_LOCK_NOT_AVAILABLE.
const ELSEWHERE_IN_USE: [&str; 2] = ["55006", "55P03"];
/// ERRCODE_QUERY_CANCELED, by the timeout.
const CANCELED: &str = "57014";

/// Makes every process of the server open its files again, by a session that does nothing else; `random` tells this
/// attempt's database apart.
///
/// # Errors
/// What the server refuses for another reason than somebody in the way, and a session that is lost.
pub async fn cut_over(session: &Session, random: [u8; DIGITS / 2]) -> Result<CutOver, replication::Error> {
    if session.version().number() < MAJOR_MIN {
        return Ok(CutOver::Unsupported);
    }
    set_up(session).await?;
    match create_and_drop(session, &name(random)).await {
        Ok(()) => Ok(CutOver::Done),
        Err(Failed { error, is_costly }) if is_in_the_way(&error) => {
            Ok(CutOver::Waits { because: error.to_string(), is_costly })
        }
        Err(Failed { error, .. }) => Err(error),
    }
}

/// Drops what attempts have left that were killed; for before a clone becomes something else.
pub async fn drop_leftovers(session: &Session) -> Result<(), replication::Error> {
    set_up(session).await?;
    drop_all(session).await
}

/// Has the session write, where the source's settings or the role's keep sessions from that, and wait for nobody for long.
async fn set_up(session: &Session) -> Result<(), replication::Error> {
    let writes = "set default_transaction_read_only = off";
    session.simple(&format!("{writes}; set statement_timeout = '{STATEMENT_TIMEOUT}'")).await.map(drop)
}

async fn drop_all(session: &Session) -> Result<(), replication::Error> {
    // One whose DROP was cut off is there, and lets nobody in (datconnlimit -2).
    let sql = format!("select datname from pg_database where datname ~ '^{PREFIX}[0-9a-f]{{{DIGITS}}}$'");
    for row in session.simple(&sql).await? {
        let Some(name) = row.into_iter().next().flatten() else { continue };
        session.simple(&format!("drop database if exists {name}")).await?;
    }
    Ok(())
}

async fn create_and_drop(session: &Session, name: &str) -> Result<(), Failed> {
    // One of an earlier attempt that cannot be dropped costs as much again.
    drop_all(session).await.map_err(|error| Failed { error, is_costly: true })?;
    // Whoever goes through all databases, such as pg_dumpall, passes over one that lets nobody in.
    let sql = format!("create database {name} template template0 allow_connections false");
    let created = session.simple(&sql).await;
    // Whatever became of it: cut off at the end, it may be there all the same.
    let dropped = drop_all(session).await;
    outcome(created.map(drop), dropped)
}

/// Returns what came of an attempt.
fn outcome(
    created: Result<(), replication::Error>,
    dropped: Result<(), replication::Error>,
) -> Result<(), Failed> {
    let was_refused_at_once = created.as_ref().is_err_and(|error| is_one_of(error, &ELSEWHERE_IN_USE));
    let is_costly = !was_refused_at_once || dropped.is_err();
    created.and(dropped).map_err(|error| Failed { error, is_costly })
}

fn name(random: [u8; DIGITS / 2]) -> String {
    format!("{PREFIX}{}", hex::encode(random))
}

fn is_in_the_way(error: &replication::Error) -> bool {
    let waits = error.kind() == ErrorKind::Retry && error.sqlstate().is_some();
    waits || is_one_of(error, &ELSEWHERE_IN_USE) || is_one_of(error, &[CANCELED])
}

fn is_one_of(error: &replication::Error, states: &[&str]) -> bool {
    error.sqlstate().is_some_and(|state| states.contains(&state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(sqlstate: &str) -> replication::Error {
        replication::Error::Sql {
            sqlstate: sqlstate.to_owned(),
            message: "source database \"template0\" is being accessed by other users".to_owned(),
            detail: None,
            hint: None,
        }
    }

    #[test]
    fn a_name_needs_no_quotes_and_has_as_many_digits_as_are_looked_for() {
        let name = name([0, 1, 2, 3, 4, 5, 6, 0xff]);
        assert_eq!(name, "walden_cutover_00010203040506ff");
        assert_eq!(name.len(), PREFIX.len() + DIGITS);
    }

    #[test]
    fn only_who_is_met_before_anything_was_written_costs_nothing() {
        let is_costly = |created, dropped| outcome(created, dropped).err().map(|failed| failed.is_costly);
        assert_eq!(is_costly(Ok(()), Ok(())), None);
        assert_eq!(is_costly(Err(refused("55006")), Ok(())), Some(false), "somebody is in template0");
        assert_eq!(is_costly(Err(refused(CANCELED)), Ok(())), Some(true), "it was copied for a minute");
        assert_eq!(
            is_costly(Err(refused("53100")), Ok(())),
            Some(true),
            "it was copied until the disk was full"
        );
        assert_eq!(is_costly(Ok(()), Err(refused(CANCELED))), Some(true), "a process comes to no barrier");
        assert_eq!(is_costly(Err(refused("55006")), Err(refused(CANCELED))), Some(true));
    }

    #[test]
    fn somebody_in_the_way_is_waited_for_and_everything_else_is_an_error() {
        for state in ["55006", "55P03", "57014", "53300"] {
            assert!(is_in_the_way(&refused(state)), "{state}");
        }
        for state in ["42501", "25001"] {
            assert!(!is_in_the_way(&refused(state)), "{state}");
        }
        assert!(!is_in_the_way(&replication::Error::Lost { detail: "it ended".to_owned() }));
    }
}
