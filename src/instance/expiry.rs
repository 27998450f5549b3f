//! The end of a clone that was made for some time only.
//!
//! Its supervisor ends it at that moment, unless somebody is connected: then as soon as nobody is. Where that cannot be told
//! somebody may be. The time stands in the clone's description and is read again and again, because finalize takes it
//! away. Deleting is the caller's.

use std::time::Duration;

use jiff::Timestamp;

use crate::clock::Clock;
use crate::instance::clone_folder::{CloneFolder, CloneSpec};
use crate::instance::server::Endpoint;
use crate::replication;

/// How often the description, and whether somebody is connected, are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Tells whether a clone's time is over.
pub fn is_over(spec: &CloneSpec, now: Timestamp) -> bool {
    spec.expires_at.is_some_and(|at| at <= now)
}

/// Resolves when a clone's time is over and nobody is connected to it; never for one without an end.
pub async fn over(folder: &CloneFolder, clock: &dyn Clock) {
    let mut is_told = false;
    loop {
        let now = clock.now();
        let pause = match folder.read_spec() {
            Ok(spec) if is_over(&spec, now) => {
                let doubt = match is_in_use(folder, &spec).await {
                    Ok(false) => return,
                    Ok(true) => String::new(),
                    Err(error) => format!(", which cannot be told now: {error}"),
                };
                if !is_told {
                    tracing::warn!("the clone has expired, and goes when nobody is connected to it{doubt}");
                    is_told = true;
                }
                LOOK
            }
            Ok(CloneSpec { expires_at: Some(at), .. }) => time_left(at, now).min(LOOK),
            // One that cannot be read now may be later.
            Ok(_) | Err(_) => LOOK,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Returns the time until `at`, which is no more than zero once it has passed.
fn time_left(at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default()
}

/// Tells whether anybody but Walden is connected; a base backup of it, or a standby, is somebody too.
///
/// # Errors
/// What keeps it from being told, such as sessions that have taken every connection there is.
async fn is_in_use(folder: &CloneFolder, spec: &CloneSpec) -> Result<bool, replication::Error> {
    let endpoint = Endpoint::of_clone(folder.run(), spec.port, spec.superuser.clone());
    let session = match endpoint.connect().await {
        Err(error) if lets_nobody_in(&error) => return Ok(false),
        connected => connected?,
    };
    let sql = "select count(*) > 0 from pg_stat_activity \
               where backend_type in ('client backend', 'walsender') and application_name <> 'walden'";
    let rows = session.simple(sql).await?;
    Ok(rows.first().and_then(|row| row.first()?.as_deref()) != Some("f"))
}

/// Tells whether a server that gave this answer has sessions of nobody: it is not there, starts, recovers or stops.
fn lets_nobody_in(error: &replication::Error) -> bool {
    matches!(error, replication::Error::Unreachable { .. } | replication::Error::NotAccepting { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_ends_at_nothing() {
        let at: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let before: Timestamp = "2026-11-21T11:59:30Z".parse().unwrap();
        assert_eq!(time_left(at, before), Duration::from_secs(30));
        assert_eq!(time_left(before, at), Duration::ZERO);
    }

    #[test]
    fn only_a_server_that_is_not_there_or_lets_nobody_in_has_sessions_of_nobody() {
        let (address, message) = (String::new, String::new);
        let refused = |sqlstate: &str| replication::Error::Sql {
            sqlstate: sqlstate.to_owned(),
            message: message(),
            detail: None,
            hint: None,
        };
        for nobody in [
            replication::Error::Unreachable { address: address(), detail: message() },
            replication::Error::NotAccepting { address: address(), message: message() },
        ] {
            assert!(lets_nobody_in(&nobody), "{nobody:?}");
        }
        for somebody in [
            refused("53300"),
            replication::Error::Lost { detail: message() },
            replication::Error::AuthenticationFailed {
                address: address(),
                user: "postgres".to_owned(),
                message: message(),
            },
        ] {
            assert!(!lets_nobody_in(&somebody), "{somebody:?}");
        }
    }
}
