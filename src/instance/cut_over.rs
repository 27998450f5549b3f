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
    },
}

/// What the databases are called, before random digits.
pub const PREFIX: &str = "walden_cutover_";
/// Digits after the prefix: what has others is somebody's own.
const DIGITS: usize = 16;
/// The first version whose DROP DATABASE has the barrier.
const MAJOR_MIN: u32 = 15;
/// A process that does not come to the barrier, in a long system call for example, holds nobody up for longer.
const STATEMENT_TIMEOUT: &str = "60s";
/// Another session is where this has to be alone: ERRCODE_OBJECT_IN_USE, ERRCODE_LOCK_NOT_AVAILABLE,
/// ERRCODE_QUERY_CANCELED.
const IN_THE_WAY: [&str; 3] = ["55006", "55P03", "57014"];

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
        Err(error) if is_in_the_way(&error) => Ok(CutOver::Waits { because: error.to_string() }),
        Err(error) => Err(error),
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

async fn create_and_drop(session: &Session, name: &str) -> Result<(), replication::Error> {
    drop_all(session).await?;
    // Whoever goes through all databases, such as pg_dumpall, passes over one that lets nobody in.
    let sql = format!("create database {name} template template0 allow_connections false");
    let created = session.simple(&sql).await;
    // Whatever became of it: cut off at the end, it may be there all the same.
    let dropped = drop_all(session).await;
    created.and(dropped)
}

fn name(random: [u8; DIGITS / 2]) -> String {
    format!("{PREFIX}{}", hex::encode(random))
}

fn is_in_the_way(error: &replication::Error) -> bool {
    let waits = error.kind() == ErrorKind::Retry && error.sqlstate().is_some();
    waits || error.sqlstate().is_some_and(|state| IN_THE_WAY.contains(&state))
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
