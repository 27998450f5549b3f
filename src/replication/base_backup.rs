//! BASE_BACKUP: the command in both of its grammars, and its answer cut into archives, manifest and end.
//!
//! ```text
//! 13, 14:  start · tablespaces · (copy an archive)… · copy the manifest · end
//! 15 on:   start · tablespaces · copy (n archive · d bytes… · m manifest · d bytes… · p progress) · end
//! ```
//! What comes out is the same for both. The server verifies page checksums while it reads, and reads a page again that
//! it caught half written; one that stays wrong makes it end the command with an error *behind* the end of the backup,
//! which is then whole as far as a damaged cluster can be: that is told, and is no error here. Nothing is waited for
//! without end; that a server is frozen its session tells sooner. Deliberately absent: what is in the archives. Whoever
//! drops a `BaseBackup` ends the backup on the server.

use std::fmt::{self, Debug};
use std::time::Duration;

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;

use super::wal_stream::{Row, Values, parsed, text_of, values};
use super::wire::{Incoming, refusal, unexpected};
use crate::pg::{Lsn, MajorVersion, Oid, TimelineId};
use crate::replication::{Error, ReplicationConnection};

/// How the server is to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// What the label says, one line.
    pub label: String,
    /// A checkpoint at once, or spread over time.
    pub fast: bool,
    /// Have locations of tablespaces in a file of their own: links in an archive have at most 99 bytes.
    pub tablespace_map: bool,
    /// Of relations only what has changed since the backup whose manifest was uploaded (17 and later).
    pub incremental: bool,
}

/// A tablespace whose files come in an archive of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupTablespace {
    /// Its oid.
    pub oid: Oid,
    /// Where its link points; relative to the data directory where it was created in place (16 and later).
    pub location: Vec<u8>,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseBackupPart {
    /// An archive begins: a tablespace's, or that of the data directory, which is the last.
    Archive(Option<Oid>),
    /// Bytes of the archive that began last.
    Content(Bytes),
    /// The manifest begins, behind all archives.
    Manifest,
    /// Bytes of the manifest.
    ManifestContent(Bytes),
    /// The backup is whole.
    End(BaseBackupEnd),
}

/// How a backup ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupEnd {
    /// The stop position.
    pub lsn: Lsn,
    /// Its timeline.
    pub timeline: TimelineId,
    /// What the server says of pages whose checksum is wrong, if there are any.
    pub damage: Option<String>,
}

/// A backup under way.
pub struct BaseBackup {
    connection: ReplicationConnection,
    reader: Reader,
    lsn: Lsn,
    timeline: TimelineId,
    tablespaces: Vec<BaseBackupTablespace>,
    received: u64,
    silence_max: Duration,
}

/// Nothing comes before the server's checkpoint is done, which is spread over `checkpoint_timeout` at most, a day.
const START_MAX: Duration = Duration::from_secs(25 * 3600);
/// The server sends what it reads, 32 KiB at a time. A disk that tries a sector again takes a minute or two for that, and
/// a file server that is started again some more: a walsender that is silent for longer hangs (failure 39).
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// No cluster has more tablespaces; the list is the server's word.
const TABLESPACES_MAX: usize = 100_000;
/// Bytes of the rows of an answer: those of so many tablespaces, each with the path of a link.
const ROW_BYTES_MAX: usize = 64 << 20;
/// SQLSTATE `data_corrupted`, by which the server ends a backup in which it has seen wrong checksums.
const DATA_CORRUPTED: &str = "XX001";
/// From here on the options stand in parentheses, and all archives come in one copy.
const PARENTHESISED_FROM: MajorVersion = MajorVersion::V15;

impl BaseBackupOptions {
    /// Returns the command as that version takes it. The server does not wait for its archive: that is the caller's
    /// question, with the caller's deadline.
    fn command(&self, version: MajorVersion) -> String {
        let label = self.label.replace('\'', "''");
        if version < PARENTHESISED_FROM {
            let fast = if self.fast { " FAST" } else { "" };
            let map = if self.tablespace_map { " TABLESPACE_MAP" } else { "" };
            return format!(
                "BASE_BACKUP LABEL '{label}'{fast} NOWAIT{map} MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
            );
        }
        let checkpoint = if self.fast { "fast" } else { "spread" };
        let map = if self.tablespace_map { ", TABLESPACE_MAP" } else { "" };
        let incremental = if self.incremental { ", INCREMENTAL" } else { "" };
        format!(
            "BASE_BACKUP (LABEL '{label}', CHECKPOINT '{checkpoint}', WAIT 0{map}{incremental}, MANIFEST 'yes', \
             MANIFEST_CHECKSUMS 'CRC32C', TARGET 'client')"
        )
    }
}

impl BaseBackup {
    /// Has the server begin, which takes as long as its checkpoint.
    ///
    /// # Errors
    /// `Sql` where the server refuses, `Lost` where it ends meanwhile.
    pub async fn start(
        mut connection: ReplicationConnection,
        version: MajorVersion,
        options: &BaseBackupOptions,
    ) -> Result<Self, Error> {
        connection.query(&options.command(version)).await?;
        let mut reader = Reader::new(version < PARENTHESISED_FROM);
        while reader.phase != Phase::Archives {
            let message = within(START_MAX, connection.wire.next()).await?;
            reader.take(message)?;
        }
        let (lsn, timeline) = reader.position.take().ok_or_else(no_position)?;
        let tablespaces = std::mem::take(&mut reader.tablespaces);
        let silence_max = SILENCE_MAX;
        Ok(Self { connection, reader, lsn, timeline, tablespaces, received: 0, silence_max })
    }

    /// Returns where the backup starts.
    pub fn started(&self) -> (Lsn, TimelineId) {
        (self.lsn, self.timeline)
    }

    /// Returns the tablespaces, in the order of their archives.
    pub fn tablespaces(&self) -> &[BaseBackupTablespace] {
        &self.tablespaces
    }

    /// Waits for what comes next; may be given up and called again. Nothing follows the end.
    ///
    /// # Errors
    /// What the server says; `Lost` where the connection ends, or nothing comes for long.
    pub async fn next(&mut self) -> Result<BaseBackupPart, Error> {
        loop {
            let message = within(self.silence_max, self.connection.wire.next()).await?;
            if let Incoming::CopyData(body) = &message {
                self.received += body.len() as u64;
            }
            if let Some(part) = self.reader.take(message)? {
                return Ok(part);
            }
        }
    }

    /// Returns how many bytes have been received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Returns the connection, for questions behind the end.
    pub fn into_connection(self) -> ReplicationConnection {
        self.connection
    }
}

impl Debug for BaseBackup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BaseBackup").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// Where in the answer we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The row with the start position.
    Start,
    /// The rows with the tablespaces.
    Tablespaces,
    /// Archives, and the manifest behind them.
    Archives,
    /// The row with the stop position; and everything up to the end of the command.
    End,
}

/// Reads the messages of an answer, whichever grammar they follow.
#[derive(Debug)]
struct Reader {
    one_copy_each: bool,
    phase: Phase,
    rows: Vec<Row>,
    row_bytes: usize,
    /// The start position, and later that of the stop.
    position: Option<(Lsn, TimelineId)>,
    tablespaces: Vec<BaseBackupTablespace>,
    /// What the copies hold in their order, as the rows have told: all the tablespaces and the data directory.
    archives: Vec<Option<Oid>>,
    /// How many have begun; one more where the manifest has.
    begun: usize,
    /// Within a copy.
    copying: bool,
    damage: Option<String>,
}

impl Reader {
    fn new(one_copy_each: bool) -> Self {
        Self {
            one_copy_each,
            phase: Phase::Start,
            rows: Vec::new(),
            row_bytes: 0,
            position: None,
            tablespaces: Vec::new(),
            archives: Vec::new(),
            begun: 0,
            copying: false,
            damage: None,
        }
    }

    fn take(&mut self, message: Incoming) -> Result<Option<BaseBackupPart>, Error> {
        match message {
            Incoming::CopyData(body) if self.copying => return self.copied(body),
            Incoming::CopyDone if self.copying => {
                self.copying = false;
                if !self.one_copy_each && self.begun <= self.archives.len() {
                    return Err(unexpected("a backup that ends before its manifest".into()));
                }
            }
            Incoming::Other(Message::CopyOutResponse(_)) if self.may_copy() => {
                self.copying = true;
                return if self.one_copy_each { self.begin_next().map(Some) } else { Ok(None) };
            }
            Incoming::Other(Message::ErrorResponse(answer)) => {
                let error = refusal(answer.fields());
                let is_damage = error.sqlstate() == Some(DATA_CORRUPTED) && self.position.is_some();
                if self.phase != Phase::End || !is_damage {
                    return Err(error);
                }
                self.damage = Some(error.to_string());
            }
            Incoming::Other(Message::RowDescription(_)) if !self.copying => {
                if self.phase == Phase::Archives && self.begun > self.archives.len() {
                    self.phase = Phase::End;
                }
            }
            Incoming::Other(Message::DataRow(row)) if !self.copying && self.rows.len() < TABLESPACES_MAX => {
                self.row_bytes += row.buffer().len();
                if self.row_bytes > ROW_BYTES_MAX {
                    return Err(unexpected("a base backup with too long a list of tablespaces".into()));
                }
                self.rows.push(values(&row)?);
            }
            Incoming::Other(Message::CommandComplete(_)) if !self.copying => self.end_rows()?,
            Incoming::Other(Message::ReadyForQuery(_)) if self.phase == Phase::End => {
                let (lsn, timeline) = self.position.take().ok_or_else(no_position)?;
                let damage = self.damage.take();
                return Ok(Some(BaseBackupPart::End(BaseBackupEnd { lsn, timeline, damage })));
            }
            _ => return Err(unexpected("a message that does not belong into a base backup".into())),
        }
        Ok(None)
    }

    fn may_copy(&self) -> bool {
        let limit = if self.one_copy_each { self.archives.len() + 1 } else { 1 };
        self.phase == Phase::Archives && !self.copying && self.begun < limit
    }

    /// Begins what the next copy of the old grammar holds.
    fn begin_next(&mut self) -> Result<BaseBackupPart, Error> {
        self.begun += 1;
        Ok(match self.archives.get(self.begun - 1) {
            Some(archive) => BaseBackupPart::Archive(*archive),
            None => BaseBackupPart::Manifest,
        })
    }

    fn copied(&mut self, mut body: Bytes) -> Result<Option<BaseBackupPart>, Error> {
        if self.one_copy_each {
            return self.content(body).map(Some);
        }
        if body.is_empty() {
            return Err(unexpected("an empty message in a base backup".into()));
        }
        let letter = body.get_u8();
        match letter {
            b'n' => self.begin_named(&body).map(Some),
            b'd' => self.content(body).map(Some),
            b'm' if self.begun == self.archives.len() => {
                self.begun += 1;
                Ok(Some(BaseBackupPart::Manifest))
            }
            b'p' if body.len() == 8 => Ok(None),
            _ => {
                let (letter, length) = (letter.escape_ascii(), body.len());
                Err(unexpected(format!("a message '{letter}' with {length} bytes in a base backup")))
            }
        }
    }

    fn content(&self, bytes: Bytes) -> Result<BaseBackupPart, Error> {
        match self.begun {
            0 => Err(unexpected("bytes before the first archive of a base backup".into())),
            begun if begun > self.archives.len() => Ok(BaseBackupPart::ManifestContent(bytes)),
            _ => Ok(BaseBackupPart::Content(bytes)),
        }
    }

    /// Begins an archive of the new grammar, which names it: `base.tar`, or `16384.tar` for a tablespace.
    fn begin_named(&mut self, body: &[u8]) -> Result<BaseBackupPart, Error> {
        let name = body.split(|byte| *byte == 0).next().unwrap_or_default();
        let archive = match name.strip_suffix(b".tar") {
            Some(b"base") => Some(None),
            Some(oid) => Oid::from_name(oid).map(Some),
            None => None,
        };
        let shown = || name.escape_ascii().to_string();
        let archive = archive.ok_or_else(|| unexpected(format!("an archive \"{}\"", shown())))?;
        if self.archives.get(self.begun) != Some(&archive) {
            return Err(unexpected(format!("archive \"{}\" where another one was announced", shown())));
        }
        self.begun += 1;
        Ok(BaseBackupPart::Archive(archive))
    }

    fn end_rows(&mut self) -> Result<(), Error> {
        let rows = std::mem::take(&mut self.rows);
        match self.phase {
            Phase::Start => {
                self.position = Some(position(&rows)?);
                self.phase = Phase::Tablespaces;
            }
            Phase::Tablespaces => {
                for row in rows {
                    let archive = tablespace(row)?;
                    self.archives.push(archive.as_ref().map(|tablespace| tablespace.oid));
                    self.tablespaces.extend(archive);
                }
                let unnamed = self.archives.iter().filter(|archive| archive.is_none()).count();
                if unnamed != 1 || self.archives.last() != Some(&None) {
                    return Err(unexpected(
                        "a base backup whose last archive is not the data directory's".into(),
                    ));
                }
                self.phase = Phase::Archives;
            }
            // The command itself is complete as well.
            Phase::End if rows.is_empty() => {}
            Phase::End => self.position = Some(position(&rows)?),
            Phase::Archives => return Err(unexpected("a base backup without its end".into())),
        }
        Ok(())
    }
}

/// Waits for a message, but not for ever.
async fn within(
    patience: Duration,
    message: impl Future<Output = Result<Incoming, Error>>,
) -> Result<Incoming, Error> {
    let silent = || format!("the server has sent nothing of the base backup for {} s", patience.as_secs());
    let message = tokio::time::timeout(patience, message).await;
    message.unwrap_or_else(|_| Err(Error::Lost { detail: silent() }))
}

fn no_position() -> Error {
    unexpected("a base backup without a position".into())
}

/// Reads the one row of a position: LSN and timeline.
fn position(rows: &[Row]) -> Result<(Lsn, TimelineId), Error> {
    let [row] = rows else {
        return Err(unexpected(format!("{} rows where a position was expected", rows.len())));
    };
    let row: Values = text_of(row.clone());
    Ok((parsed(&row, 0, "recptr")?, parsed(&row, 1, "tli")?))
}

/// Reads a row of the list of archives: oid, location and size, of which the data directory has neither of the first two.
fn tablespace(row: Row) -> Result<Option<BaseBackupTablespace>, Error> {
    let mut columns = row.into_iter();
    let (oid, location) = (columns.next().flatten(), columns.next().flatten());
    match (oid, location) {
        (None, None) => Ok(None),
        (Some(oid), Some(location)) => {
            let oid = Oid::from_name(&oid)
                .ok_or_else(|| unexpected(format!("a tablespace \"{}\"", oid.escape_ascii())))?;
            Ok(Some(BaseBackupTablespace { oid, location: location.to_vec() }))
        }
        _ => Err(unexpected("half a tablespace".into())),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::super::wire::{Wire, take_message};
    use super::*;

    fn message(letter: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![letter];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn row(values: &[Option<&str>]) -> Vec<u8> {
        let mut body = (values.len() as u16).to_be_bytes().to_vec();
        for value in values {
            match value {
                Some(text) => {
                    body.extend((text.len() as u32).to_be_bytes());
                    body.extend(text.as_bytes());
                }
                None => body.extend((-1i32).to_be_bytes()),
            }
        }
        message(b'D', &body)
    }

    fn result_set(rows: &[Vec<u8>]) -> Vec<u8> {
        let description = message(b'T', &0u16.to_be_bytes());
        [description, rows.concat(), message(b'C', b"SELECT\0")].concat()
    }

    fn error(sqlstate: &str) -> Vec<u8> {
        let text = format!("SERROR\0VERROR\0C{sqlstate}\0Mchecksum verification failure\0\0");
        message(b'E', text.as_bytes())
    }

    #[test]
    fn rows_are_bounded_by_their_bytes() {
        let long = row(&[Some("l".repeat(1_000_000).as_str())]);
        let mut reader = Reader::new(false);
        let mut take = || {
            let message = take_message(&mut BytesMut::from(&long[..]))?.expect("it is whole");
            reader.take(message)
        };
        let taken = (0..100).take_while(|_| take().is_ok()).count();
        assert_eq!(taken, ROW_BYTES_MAX / 1_000_004);
    }

    /// As the server sends it, with one tablespace.
    fn answer(old: bool, last: &[u8]) -> Vec<u8> {
        let copy = message(b'H', &[0, 0, 0]);
        let done = message(b'c', b"");
        let data = |bytes: &[u8]| message(b'd', bytes);
        let copies = if old {
            let of = |bytes: &[u8]| [copy.clone(), data(bytes), done.clone()].concat();
            [of(b"one"), of(b"two"), of(b"{}")].concat()
        } else {
            let parts: [&[u8]; 7] = [
                b"n16400.tar\0/space\0",
                b"done",
                b"p\0\0\0\0\0\0\0\x09",
                b"nbase.tar\0\0",
                b"dtwo",
                b"m",
                b"d{}",
            ];
            [copy, parts.map(data).concat(), done].concat()
        };
        [
            result_set(&[row(&[Some("0/2000028"), Some("1")])]),
            result_set(&[row(&[Some("16400"), Some("/space"), None]), row(&[None, None, None])]),
            copies,
            result_set(&[row(&[Some("0/2000100"), Some("1")])]),
            last.to_vec(),
            message(b'Z', b"I"),
        ]
        .concat()
    }

    /// A server that goes on sending is waited for as long as it takes; one that stops within an archive is not.
    #[tokio::test]
    async fn failure_39_a_walsender_that_falls_silent_is_given_up() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let options =
            BaseBackupOptions { label: "x".into(), fast: true, tablespace_map: false, incremental: false };
        let whole = answer(false, &message(b'C', b"BASE_BACKUP\0"));
        let archive = whole.windows(9).position(|bytes| bytes == b"nbase.tar").unwrap();
        let (sent, kept_back) = whole.split_at(archive + 11);
        theirs.write_all(sent).await.unwrap();
        let connection = ReplicationConnection::over(Wire::new(Box::new(ours)));
        let mut base = BaseBackup::start(connection, MajorVersion::V15, &options).await.unwrap();
        base.silence_max = Duration::from_millis(100);
        let mut parts = Vec::new();
        let error = loop {
            match base.next().await {
                Ok(part) => parts.push(part),
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, Error::Lost { detail } if detail.contains("sent nothing")), "{error}");
        // Not a byte is lost by that: were it asked again, all of the rest would come.
        theirs.write_all(kept_back).await.unwrap();
        base.silence_max = SILENCE_MAX;
        while parts.len() < expected(None).len() {
            parts.push(base.next().await.unwrap());
        }
        assert_eq!(parts, expected(None));
    }

    /// Feeds the bytes in pieces of these sizes and returns what came out.
    fn read(old: bool, stream: &[u8], cuts: &[usize]) -> Result<Vec<BaseBackupPart>, Error> {
        let (mut reader, mut incoming, mut parts) = (Reader::new(old), BytesMut::new(), Vec::new());
        let (mut rest, mut cuts) = (stream, cuts.iter().cycle());
        while !rest.is_empty() {
            let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            incoming.extend_from_slice(now);
            rest = later;
            while let Some(message) = take_message(&mut incoming)? {
                parts.extend(reader.take(message)?);
            }
        }
        Ok(parts)
    }

    fn expected(damage: Option<&str>) -> Vec<BaseBackupPart> {
        let bytes = Bytes::from_static;
        vec![
            BaseBackupPart::Archive(Some(Oid(16_400))),
            BaseBackupPart::Content(bytes(b"one")),
            BaseBackupPart::Archive(None),
            BaseBackupPart::Content(bytes(b"two")),
            BaseBackupPart::Manifest,
            BaseBackupPart::ManifestContent(bytes(b"{}")),
            BaseBackupPart::End(BaseBackupEnd {
                lsn: Lsn(0x200_0100),
                timeline: TimelineId::FIRST,
                damage: damage.map(str::to_owned),
            }),
        ]
    }

    #[test]
    fn each_version_is_asked_in_its_own_grammar() {
        let options =
            BaseBackupOptions { label: "it's".into(), fast: true, tablespace_map: false, incremental: false };
        assert_eq!(
            options.command(MajorVersion::V14),
            "BASE_BACKUP LABEL 'it''s' FAST NOWAIT MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
        );
        assert_eq!(
            options.command(MajorVersion::V15),
            "BASE_BACKUP (LABEL 'it''s', CHECKPOINT 'fast', WAIT 0, MANIFEST 'yes', \
             MANIFEST_CHECKSUMS 'CRC32C', TARGET 'client')"
        );
        let changes = BaseBackupOptions { incremental: true, ..options.clone() };
        assert!(changes.command(MajorVersion::V17).contains("WAIT 0, INCREMENTAL, MANIFEST"));
        let mapped = BaseBackupOptions { fast: false, tablespace_map: true, ..options };
        assert!(mapped.command(MajorVersion::V13).contains("'it''s' NOWAIT TABLESPACE_MAP MANIFEST"));
        assert!(mapped.command(MajorVersion::V18).contains("'spread', WAIT 0, TABLESPACE_MAP, MANIFEST"));
    }

    #[test]
    fn wrong_checksums_of_the_source_are_told_behind_the_end_and_are_an_error_before() {
        for old in [true, false] {
            let damaged = answer(old, &error(DATA_CORRUPTED));
            assert_eq!(read(old, &damaged, &[7]).unwrap(), expected(Some("checksum verification failure")));
            let refused = answer(old, &error("58030"));
            assert!(matches!(read(old, &refused, &[7]), Err(Error::Sql { .. })));
            let start = result_set(&[row(&[Some("0/2000028"), Some("1")])]);
            let early = [start, error(DATA_CORRUPTED)].concat();
            assert!(matches!(read(old, &early, &[7]), Err(Error::Sql { .. })));
        }
    }

    #[test]
    fn what_no_server_sends_is_refused() {
        let start = result_set(&[row(&[Some("0/2000028"), Some("1")])]);
        let base = result_set(&[row(&[None, None, None])]);
        let copy = message(b'H', &[0, 0, 0]);
        let data = |bytes: &[u8]| message(b'd', bytes);
        let refused = |old: bool, parts: &[Vec<u8>]| {
            let read = read(old, &parts.concat(), &[1000]);
            assert!(matches!(read, Err(Error::Unexpected { .. })), "{read:?}");
        };
        for old in [true, false] {
            refused(old, &[data(b"dx")]);
            refused(old, &[start.clone(), copy.clone()]);
            refused(old, &[start.clone(), result_set(&[])]);
            refused(old, &[start.clone(), result_set(&[row(&[Some("16400"), None, None])])]);
            refused(old, &[result_set(&[row(&[Some("there"), Some("1")])])]);
            refused(old, &[start.clone(), base.clone(), result_set(&[]), message(b'Z', b"I")]);
        }
        for wrong in [&b""[..], b"nother.tar\0\0", b"n16400.tar\0/x\0", b"dbytes", b"m", b"p123", b"?"] {
            refused(false, &[start.clone(), base.clone(), copy.clone(), data(wrong)]);
        }
        let whole = [start.clone(), base.clone(), copy.clone(), data(b"nbase.tar\0\0")];
        refused(false, &[whole.concat(), message(b'c', b"")]);
        let twice = [copy.clone(), message(b'c', b"")].concat();
        refused(true, &[start, base, twice.clone(), twice.clone(), twice]);
    }

    proptest! {
        #[test]
        fn a_recorded_answer_comes_out_whole_however_it_was_cut(
            old: bool, cuts in proptest::collection::vec(1usize..60, 1..100),
        ) {
            let complete = message(b'C', b"BASE_BACKUP\0");
            prop_assert_eq!(read(old, &answer(old, &complete), &cuts).unwrap(), expected(None));
        }

        #[test]
        fn an_answer_that_ends_anywhere_never_has_an_end(old: bool, kept in 0usize..2000) {
            let whole = answer(old, &message(b'C', b"BASE_BACKUP\0"));
            let kept = kept.min(whole.len() - 1);
            let parts = read(old, &whole[..kept], &[kept.max(1)]).unwrap();
            prop_assert!(!parts.iter().any(|part| matches!(part, BaseBackupPart::End(_))));
            prop_assert!(expected(None).starts_with(&parts));
        }

        #[test]
        fn any_bytes_in_a_copy_are_parts_or_refused(old: bool, bodies: Vec<Vec<u8>>) {
            let mut stream = result_set(&[row(&[Some("0/2000028"), Some("1")])]);
            stream.extend(result_set(&[row(&[None, None, None])]));
            stream.extend(message(b'H', &[0, 0, 0]));
            bodies.iter().for_each(|body| stream.extend(message(b'd', body)));
            let _ = read(old, &stream, &[100]);
        }
    }
}
