//! What receiving WAL by streaming rests on at a server: the right to replicate, the slot, and what the slot may keep.
//! Nothing is created: the receiver makes its slot itself.

use crate::backup::ServerFacts;
use crate::replication::{ConnectOptions, Error as SessionError, Param, ReplicationConnection, Session};
use crate::site::item::{Item, describe};

/// What pg_replication_slots says of ours.
struct Slot {
    physical: bool,
    active: bool,
    lost: bool,
}

/// Looks at everything, a line each.
pub(super) async fn check_receiving(
    connection: &ConnectOptions,
    session: &Session,
    facts: &ServerFacts,
    slot: &str,
) -> Vec<Item> {
    vec![
        check_replication(connection).await,
        match ask_slot(session, slot).await {
            Ok(found) => judge_slot(found.as_ref(), slot, facts.identity.in_recovery),
            Err(error) => Item::warning("slot", describe(&error), "The message says what to mend."),
        },
        match session
            .query_one(
                "SELECT setting::bigint AS megabytes FROM pg_settings WHERE name = 'max_slot_wal_keep_size'",
                &[],
            )
            .await
            .and_then(|row| row.int_opt("megabytes"))
        {
            Ok(megabytes) => judge_keep_size(megabytes.unwrap_or(-1)),
            Err(error) => Item::warning(KEEP_SIZE, describe(&error), "The message says what to mend."),
        },
    ]
}

const KEEP_SIZE: &str = "max_slot_wal_keep_size";

/// Looks whether the role may replicate.
pub(super) async fn check_replication(connection: &ConnectOptions) -> Item {
    let asked = async {
        let mut connection = ReplicationConnection::connect(connection).await?;
        connection.identify().await.map(|identity| (connection.user().to_owned(), identity.timeline))
    };
    match asked.await {
        Ok((user, timeline)) => {
            Item::ok("replication", format!("user \"{user}\" may replicate, from timeline {timeline}"))
        }
        Err(error) => Item::failed(
            "replication",
            describe(&error),
            "Give the role REPLICATION, and pg_hba.conf a line `host replication ROLE ADDRESS METHOD`.",
        ),
    }
}

async fn ask_slot(session: &Session, slot: &str) -> Result<Option<Slot>, SessionError> {
    let sql = "SELECT slot_type = 'physical' AS physical, active AS active, wal_status = 'lost' AS lost \
               FROM pg_replication_slots WHERE slot_name = $1";
    let Some(row) = session.query(sql, &[Param::Text(slot)]).await?.pop() else { return Ok(None) };
    Ok(Some(Slot {
        physical: row.bool("physical")?,
        active: row.bool("active")?,
        lost: row.bool_opt("lost")?.unwrap_or(false),
    }))
}

fn judge_slot(found: Option<&Slot>, name: &str, standby: bool) -> Item {
    let start = "Start `walden daemon` or `walden wal receive`.";
    match found {
        None if standby => Item::ok("slot", format!("\"{name}\" is made once this standby is promoted")),
        None => {
            Item::warning("slot", format!("there is no slot \"{name}\": nothing was received yet"), start)
        }
        Some(Slot { physical: false, .. }) => {
            let hint = "Name another one as slot in [sites.NAME.archive].";
            Item::failed("slot", format!("\"{name}\" is a logical slot"), hint)
        }
        Some(Slot { lost: true, .. }) => {
            let detail = format!("\"{name}\" was lost: the server removed WAL that was not received");
            Item::failed("slot", detail, "Take a new basebackup; the receiver makes the slot anew.")
        }
        Some(Slot { active: true, .. }) => Item::ok("slot", format!("\"{name}\" is in use")),
        Some(_) if standby => {
            let hint = "Drop it with pg_drop_replication_slot: it keeps WAL on this standby for good.";
            Item::warning("slot", format!("\"{name}\" is left over on a standby"), hint)
        }
        Some(_) => {
            Item::warning("slot", format!("\"{name}\" keeps WAL that nobody receives at the moment"), start)
        }
    }
}

fn judge_keep_size(megabytes: i64) -> Item {
    if megabytes >= 0 {
        return Item::ok(KEEP_SIZE, format!("{megabytes} MB"));
    }
    let hint = "Set it below the free space of pg_wal's volume: a lost slot costs a basebackup, a full volume the server.";
    Item::warning(KEEP_SIZE, "no limit: pg_wal grows while nobody receives", hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::Status;

    #[test]
    fn a_slot_is_judged_by_what_it_is_for() {
        let slot = |physical, active, lost| Some(Slot { physical, active, lost });
        for (found, standby, expected) in [
            (None, false, Status::Warning),
            (None, true, Status::Ok),
            (slot(true, true, false), false, Status::Ok),
            (slot(true, false, false), false, Status::Warning),
            (slot(true, false, false), true, Status::Warning),
            (slot(true, false, true), false, Status::Failed),
            (slot(false, true, false), false, Status::Failed),
        ] {
            assert_eq!(judge_slot(found.as_ref(), "walden_main", standby).status, expected);
        }
        assert_eq!(judge_keep_size(-1).status, Status::Warning);
        assert_eq!(judge_keep_size(1024).status, Status::Ok);
    }
}
