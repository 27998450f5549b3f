//! The end of a clone that was made for some time only.
//!
//! Its supervisor ends it at that moment, unless somebody is connected: then as soon as nobody is. The time stands in the
//! clone's description and is read again and again, because finalize takes it away. Deleting is the caller's.

use std::time::Duration;

use jiff::Timestamp;

use crate::clock::Clock;
use crate::instance::clone_folder::{CloneFolder, CloneSpec};
use crate::instance::server::Endpoint;

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
                if !is_in_use(folder, &spec).await {
                    return;
                }
                if !is_told {
                    tracing::warn!("the clone has expired, and goes when nobody is connected to it");
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

/// Tells whether anybody but Walden is connected; who cannot be asked has nobody.
async fn is_in_use(folder: &CloneFolder, spec: &CloneSpec) -> bool {
    let endpoint =
        Endpoint { socket_directory: folder.run(), port: spec.port, superuser: spec.superuser.clone() };
    let Ok(session) = endpoint.connect().await else { return false };
    let sql = "select count(*) > 0 from pg_stat_activity \
               where backend_type = 'client backend' and application_name <> 'walden'";
    let rows = session.simple(sql).await.unwrap_or_default();
    rows.first().and_then(|row| row.first()?.as_deref()) == Some("t")
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
}
