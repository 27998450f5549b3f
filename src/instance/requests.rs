//! What a running clone does when it is asked to: end its recovery, read its configuration again, become whole.
//! Each has a session of its own, for one that lasts can be ended by whoever may end sessions. Deliberately absent:
//! stopping and telling how it is, which are the supervisor's own.

use std::time::Duration;

use crate::control::{CloneState, Reply};
use crate::instance::cut_over;
use crate::instance::server::{Endpoint, Server};
use crate::replication::ErrorKind;

/// How long the supervisor, which answers nobody else meanwhile, waits for the server to drop a database.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// Ends a recovery that waits at its target or lets readers in, as this one does; returns before the server takes writes.
pub(super) async fn promote(endpoint: &Endpoint, state: CloneState) -> Reply {
    if state == CloneState::Running {
        return failed("it is not in recovery");
    }
    let session = match endpoint.connect().await {
        Ok(session) => session,
        Err(error) => return failed(&error.to_string()),
    };
    match session.simple("select pg_promote(false)").await {
        Ok(rows) if rows.first().and_then(|row| row.first()?.as_deref()) == Some("t") => Reply::Done,
        Ok(_) => failed("the server did not take the request to end its recovery"),
        // Its recovery may have ended just now.
        Err(error) => match session.simple("select pg_is_in_recovery()").await {
            Ok(rows) if rows.first().and_then(|row| row.first()?.as_deref()) == Some("f") => Reply::Done,
            _ => failed(&error.to_string()),
        },
    }
}

/// Has the server read its configuration files again.
pub(super) fn reload(server: &Server) -> Reply {
    match server.reload() {
        Ok(()) => Reply::Done,
        Err(errno) => failed(&format!("could not signal the server: {errno}")),
    }
}

/// Looks whether the clone may be stopped for good: it is writable and everything of it is local.
///
/// # Errors
/// The answer to whoever asked, while it may not.
pub(super) async fn may_be_finalized(
    endpoint: &Endpoint,
    state: CloneState,
    is_whole: bool,
) -> Result<(), Reply> {
    if state != CloneState::Running {
        return Err(failed("its recovery has not ended"));
    }
    if !is_whole {
        return Err(Reply::NotYet { message: "not everything of it is local".to_owned() });
    }
    let dropped = async {
        let session = endpoint.connect().await?;
        cut_over::drop_leftovers(&session).await
    };
    match tokio::time::timeout(DROP_WAIT, dropped).await {
        Ok(Err(error)) if error.kind() == ErrorKind::Retry => {
            Err(Reply::NotYet { message: error.to_string() })
        }
        Ok(dropped) => dropped.map_err(|error| failed(&error.to_string())),
        Err(_) => Err(Reply::NotYet { message: "the server does not let go of a database".to_owned() }),
    }
}

fn failed(message: &str) -> Reply {
    Reply::Failed { message: message.to_owned() }
}
