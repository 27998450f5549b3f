//! A standalone basebackup: the WAL from its start to its stop, copied from the server's own `pg_wal`.
//!
//! ```text
//! hold (a temporary slot) ─ start ─ follow: whole segments as they come, the slot moves on ─ stop ─ finish: the rest
//! ```
//! No archive has to take part, neither now nor when it is restored. The slot keeps the server from recycling what has
//! not been copied, and goes with the session; it moves on with the copy, so that a long basebackup does not fill the disk
//! of a busy server. That what was copied is the WAL that was wanted is seen by its pages, not believed. A standby cannot
//! end a segment: of its last one the beginning is carried, up to the stop position.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::oneshot;

use crate::backup::carried_files::{CarriedFiles, SegmentFile};
use crate::backup::error::Error;
use crate::backup::live_directory::read_histories;
use crate::backup::origin::Origin;
use crate::backup::run::blocking;
use crate::backup::source::{SourceError, Started, Stopped};
use crate::codec::Compression;
use crate::pg::{Lsn, TimelineHistory, TimelineId, WalSegmentName, WalSegmentNumber};
use crate::replication::{Error as SessionError, Param, Session};
use crate::repo::carried_wal::{CarriedSegments, CarriedWal};
use crate::repo::documents::BackupRecord;
use crate::repo::entry::{Entry, TreePath};
use crate::repo::{BasebackupId, BasebackupWriter, ClusterId, NamedChunks};

/// Copies the WAL of a server while a basebackup is taken from it.
pub(super) struct WalCarrier {
    files: CarriedFiles,
    slot: String,
    /// `pg_wal` of the source.
    folder: PathBuf,
    cluster: ClusterId,
    in_recovery: bool,
    ancestry: Ancestry,
    /// The next segment to be copied.
    next: WalSegmentNumber,
    segments: Vec<CarriedSegments>,
    /// Where the WAL ends that has been copied.
    end: Lsn,
    at: Timestamp,
}

/// Which timeline a position of the WAL is on.
#[derive(Debug)]
struct Ancestry {
    timeline: TimelineId,
    history: Option<(TimelineHistory, Bytes)>,
}

/// What a basebackup carries.
pub(super) struct Carried {
    /// What stands in `data/pg_wal`.
    entries: Vec<Entry>,
    /// The chunks they stand in.
    named: NamedChunks,
    /// What the record says of them.
    wal: CarriedWal,
}

/// Between two looks at how far the server has come. Nothing is lost in between: the slot holds it.
const POLL: Duration = Duration::from_secs(1);
/// Looks for what a server has just said that it wrote, or replayed.
const LAST_LOOKS: u32 = 50;
const FOLDER: &str = "data/pg_wal";

/// Keeps the server from removing WAL for as long as the session lasts; returns the name of the slot.
///
/// # Errors
/// `WalNotHeld` where the server makes no slot for this role.
pub(super) async fn hold_wal(session: &Session, id: BasebackupId) -> Result<String, Error> {
    let name = slot_name(id);
    let sql =
        "SELECT slot_name::text AS name FROM pg_create_physical_replication_slot($1::text::name, true, true)";
    match session.query_one(sql, &[Param::Text(&name)]).await {
        Ok(_) => Ok(name),
        Err(SessionError::Sql { message, .. }) => Err(Error::WalNotHeld { message }),
        Err(error) => Err(SourceError::from(error).into()),
    }
}

/// Slots are named with lower-case letters, digits and `_`.
fn slot_name(id: BasebackupId) -> String {
    let id = id.to_string().to_ascii_lowercase();
    format!("walden_{}", id.replace(|c: char| !c.is_ascii_alphanumeric(), "_"))
}

/// Lets a copy run its course, and WAL be copied beside it where it is to be carried.
pub(super) async fn carrying<T>(
    carrier: Option<&mut WalCarrier>,
    session: &Session,
    copying: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(carrier) = carrier else { return copying.await };
    let (running, ended) = oneshot::channel();
    let copying = async move {
        let copied = copying.await;
        drop(running);
        copied
    };
    let (copied, ()) = futures::future::try_join(copying, carrier.follow(session, ended)).await?;
    Ok(copied)
}

impl WalCarrier {
    /// Prepares to carry what follows the start of a basebackup, whose session holds `slot`.
    pub(super) async fn new(
        slot: String,
        origin: &Origin,
        started: &Started,
        writer: Arc<BasebackupWriter>,
        compression: Compression,
    ) -> Result<Self, Error> {
        let (directory, timeline) = (origin.data_directory.clone(), started.timeline);
        let histories = blocking(move || read_histories(&directory)).await?;
        let history = histories.into_iter().find(|(history, _)| history.timeline == timeline);
        Ok(Self {
            files: CarriedFiles::new(writer, compression),
            slot,
            folder: origin.data_directory.join("pg_wal"),
            cluster: origin.cluster,
            in_recovery: origin.facts.identity.in_recovery,
            ancestry: Ancestry { timeline, history },
            next: WalSegmentNumber::containing(started.lsn, origin.cluster.segment_size),
            segments: Vec::new(),
            end: started.lsn,
            at: started.at,
        })
    }

    /// Copies segments as the server completes them, until the other end of `ended` is gone.
    ///
    /// Not to be dropped half-way unless the whole basebackup is: what is on its way would be missing.
    async fn follow(&mut self, session: &Session, mut ended: oneshot::Receiver<()>) -> Result<(), Error> {
        loop {
            let written = self.written(session).await?;
            self.copy_whole(session, written).await?;
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                _ = &mut ended => return Ok(()),
            }
        }
    }

    /// Copies what is left up to the stop of the basebackup; the session must still be there, for it holds the rest.
    pub(super) async fn finish(mut self, session: &Session, stopped: &Stopped) -> Result<Carried, Error> {
        let last = WalSegmentNumber::ending_at(stopped.lsn, self.cluster.segment_size);
        self.catch_up(session, stopped.lsn, last).await?;
        if self.next == last && self.in_recovery {
            self.copy_segment(stopped.lsn).await?;
        }
        if self.end < stopped.lsn {
            let (end, stop) = (self.end, stopped.lsn);
            let detail =
                format!("the basebackup ended at {stop}, and the server has written no WAL behind {end}");
            return Err(SourceError::from(SessionError::Unexpected { detail }).into());
        }
        self.push_history().await?;
        // What a data directory has in pg_wal is not copied, this folder neither.
        self.files.push_directory(TreePath::new(format!("{FOLDER}/archive_status"))?, self.at);
        let (entries, named) = self.files.finish().await?;
        Ok(Carried { entries, named, wal: CarriedWal { segments: self.segments, end: self.end } })
    }

    /// Copies whole segments up to `last`, as far as there are any. A primary has ended that one when it stopped, and a standby
    /// has come as far as it said, or is at the record that it said it by; both write it in a moment at the latest.
    async fn catch_up(&mut self, session: &Session, stop: Lsn, last: WalSegmentNumber) -> Result<(), Error> {
        for look in 0..LAST_LOOKS {
            let written = self.written(session).await?;
            self.copy_whole(session, written.min(last.next().start_lsn(self.cluster.segment_size))).await?;
            if self.next > last || (self.in_recovery && written >= stop) {
                break;
            }
            tracing::debug!(look, "the server has not written its last segment yet");
            tokio::time::sleep(POLL / 5).await;
        }
        Ok(())
    }

    /// Asks how far the WAL has been written.
    async fn written(&self, session: &Session) -> Result<Lsn, Error> {
        let function = if self.in_recovery { "pg_last_wal_replay_lsn" } else { "pg_current_wal_flush_lsn" };
        let row = session.query_one(&format!("SELECT {function}()::text AS lsn"), &[]).await;
        let row = row.map_err(SourceError::from)?;
        Ok(row.parsed("lsn").map_err(SourceError::from)?)
    }

    /// Copies the segments that end at `written` or before it, and lets the server have them.
    async fn copy_whole(&mut self, session: &Session, written: Lsn) -> Result<(), Error> {
        let size = self.cluster.segment_size;
        while self.next.next().start_lsn(size) <= written {
            self.copy_segment(self.next.next().start_lsn(size)).await?;
            let sql = "SELECT end_lsn::text AS lsn \
                       FROM pg_replication_slot_advance($1::text::name, $2::text::pg_lsn)";
            let params = [Param::Text(&self.slot), Param::Text(&self.end.to_string())];
            session.query_one(sql, &params).await.map_err(SourceError::from)?;
        }
        Ok(())
    }

    /// Copies the next segment, whose WAL ends at `end`.
    async fn copy_segment(&mut self, end: Lsn) -> Result<(), Error> {
        let (cluster, start) = (self.cluster, self.next.start_lsn(self.cluster.segment_size));
        let timeline = self.ancestry.timeline_of(end);
        let name = WalSegmentName::new(timeline, self.next, cluster.segment_size);
        let segment = SegmentFile { path: self.folder.join(name.to_string()), name, start, end, cluster };
        self.files.push_segment(CarriedWal::path_of(name)?, &segment, self.at).await?;
        // A server that is started from it does not archive it: whoever wrote it did, or could have. The beginning of a
        // segment goes on in that server, which has to archive the whole.
        if end == self.next.next().start_lsn(cluster.segment_size) {
            let done = TreePath::new(format!("{FOLDER}/archive_status/{name}.done"))?;
            self.files.push_bytes(done, Bytes::new(), self.at).await?;
        }
        match self.segments.last_mut() {
            Some(range) if range.last.timeline() == timeline => range.last = name,
            _ => self.segments.push(CarriedSegments { first: name, last: name }),
        }
        (self.next, self.end) = (self.next.next(), end);
        Ok(())
    }

    /// Adds the history without which a server does not know the way to its timeline.
    async fn push_history(&mut self) -> Result<(), Error> {
        let Some((history, bytes)) = self.ancestry.history.take() else { return Ok(()) };
        let path = TreePath::new(format!("{FOLDER}/{}.history", history.timeline.hex8()))?;
        self.files.push_bytes(path, bytes, self.at).await
    }
}

impl Carried {
    /// Adds it to what a basebackup consists of.
    pub(super) fn add_to(self, record: &mut BackupRecord, named: &mut NamedChunks, entries: &mut Vec<Entry>) {
        record.wal = Some(self.wal);
        named.join(self.named);
        entries.extend(self.entries);
    }
}

impl Ancestry {
    /// Returns the timeline under whose name a segment stands whose WAL ends at `end`: the segment with a switch point is
    /// read from the one that was switched to.
    fn timeline_of(&self, end: Lsn) -> TimelineId {
        let of_last_byte = |(history, _): &(TimelineHistory, Bytes)| history.timeline_at(Lsn(end.0 - 1));
        self.history.as_ref().map_or(self.timeline, of_last_byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_a_name_that_a_server_takes() {
        let id = "20261120T101500Z-3fa9".parse().unwrap();
        assert_eq!(slot_name(id), "walden_20261120t101500z_3fa9");
    }

    /// A standby's basebackup may begin before the timeline that its primary was promoted to.
    #[test]
    fn a_segment_stands_under_the_name_of_the_timeline_that_ends_in_it() {
        let timeline = TimelineId::new(2).unwrap();
        let history =
            TimelineHistory::parse(timeline, "1\t0/5000100\tno recovery target specified\n").unwrap();
        let ancestry = Ancestry { timeline, history: Some((history, Bytes::new())) };
        let of = |end| ancestry.timeline_of(Lsn(end)).get();
        assert_eq!([of(0x500_0000), of(0x600_0000), of(0x500_0200), of(0x700_0000)], [1, 2, 2, 2]);
        let alone = Ancestry { timeline, history: None };
        assert_eq!(alone.timeline_of(Lsn(0x500_0000)), timeline);
    }
}
