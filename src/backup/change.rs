//! Full or incremental, and why; and which files need not be read.
//!
//! Pure: from what is known of the last basebackup and what is true today to a value that is printed. What speaks
//! against building upon the last basebackup is named, never guessed around: the next one is full. The rule of ctime
//! stands here as well: a file is passed over only where any write to it would have shown. Deliberately absent: how
//! the facts are gathered (`known_parent`), and the comparison of pages (`gather`).

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::backup::data_directory::SourceFile;
use crate::backup::state::{KnownFile, StateFacts};
use crate::codec::Digest;
use crate::pg::TimelineId;
use crate::repo::{BasebackupId, ClusterId};

/// What a basebackup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Everything is read and stored.
    Full(Reason),
    /// Only pages that differ from those of an earlier basebackup are stored.
    Incremental(Incremental),
}

/// What an incremental basebackup builds upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incremental {
    /// The basebackup whose chunks are named.
    pub parent: BasebackupId,
    /// Whether every file is read, however unchanged it looks.
    pub read_all: bool,
    /// Whether it goes on with a full one that was killed.
    pub resumes: bool,
}

/// Why a basebackup is full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The user wants it so.
    Asked,
    /// This host remembers no basebackup of the site.
    NoState,
    /// What this host remembers cannot be used.
    StateUnusable(String),
    /// The basebackup that is remembered is not in the repository, or has no outcome.
    ParentAbsent(BasebackupId),
    /// It was given up.
    ParentAbandoned(BasebackupId),
    /// Retention has marked it.
    ParentExpired(BasebackupId),
    /// The one in the repository is not the one that is remembered, or cannot be read.
    ParentDiffers { parent: BasebackupId, detail: String },
    /// The server is another cluster, after pg_upgrade or a new initdb.
    OtherCluster { was: ClusterId },
    /// The server is on a timeline that does not come out of the one of the last basebackup.
    OtherTimeline { was: TimelineId, is: TimelineId },
    /// Page checksums were switched.
    OtherChecksums { are_on: bool },
    /// Chunks of the last basebackup are sealed for others than today's recipients.
    OtherSealing,
    /// Chunks have another number of pages.
    OtherChunkSize { was: u32, is: u32 },
}

/// What is true of the server, the repository and this release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Today {
    /// The site.
    pub site: Uuid,
    /// The server's cluster.
    pub cluster: ClusterId,
    /// The server's timeline.
    pub timeline: TimelineId,
    /// Whether its pages have checksums.
    pub has_checksums: bool,
    /// Cipher and recipients.
    pub sealing: Digest,
    /// Pages of a chunk.
    pub chunk_pages: u32,
}

/// What the repository says of the basebackup that is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Complete, with this digest of its `backup.json`.
    Complete(Digest),
    /// There is no outcome.
    Absent,
    /// Given up.
    Abandoned,
    /// Marked by retention.
    Expired,
    /// Its record is damaged or nobody vouches for it.
    Unreadable(String),
}

/// So many basebackups may pass files over by their ctime; the next one reads everything.
pub const PASSING_OVER_MAX: u32 = 6;
/// ctime comes from a clock that ticks, and the file systems of some are coarse: what changed so shortly before the
/// last basebackup began may have changed once more, unseen.
const CTIME_MARGIN: SignedDuration = SignedDuration::from_secs(2);

/// Decides whether what is remembered can be built upon.
///
/// `descends` says whether the server's timeline passes the end of the remembered basebackup.
pub fn judge(
    facts: &StateFacts,
    today: &Today,
    descends: bool,
    standing: &Standing,
) -> Result<Incremental, Reason> {
    let parent = facts.basebackup;
    if facts.site != today.site {
        return Err(Reason::StateUnusable(format!("it is of site {}", facts.site)));
    }
    if facts.cluster != today.cluster {
        return Err(Reason::OtherCluster { was: facts.cluster });
    }
    match standing {
        Standing::Absent => return Err(Reason::ParentAbsent(parent)),
        Standing::Abandoned => return Err(Reason::ParentAbandoned(parent)),
        Standing::Expired => return Err(Reason::ParentExpired(parent)),
        Standing::Unreadable(detail) => {
            return Err(Reason::ParentDiffers { parent, detail: detail.clone() });
        }
        Standing::Complete(digest) if *digest != facts.backup_json => {
            let detail = "its backup.json is not the one that was written".to_owned();
            return Err(Reason::ParentDiffers { parent, detail });
        }
        Standing::Complete(_) => {}
    }
    if facts.timeline != today.timeline && !descends {
        return Err(Reason::OtherTimeline { was: facts.timeline, is: today.timeline });
    }
    if facts.has_checksums != today.has_checksums {
        return Err(Reason::OtherChecksums { are_on: today.has_checksums });
    }
    if facts.sealing != today.sealing {
        return Err(Reason::OtherSealing);
    }
    if facts.chunk_pages != today.chunk_pages {
        return Err(Reason::OtherChunkSize { was: facts.chunk_pages, is: today.chunk_pages });
    }
    Ok(Incremental { parent, read_all: facts.since_read_all >= PASSING_OVER_MAX, resumes: false })
}

/// Returns whether `file` is as it was when it became `known`, in a basebackup that began at `last_start`.
pub fn is_untouched(file: &SourceFile, known: &KnownFile, last_start: Timestamp) -> bool {
    let Some(identity) = file.identity else {
        return false;
    };
    // Inode 0 stands for a file of a source without inodes.
    let same = known.inode != 0 && (known.inode, known.device) == (identity.inode, identity.device);
    let settled = is_settled(known, last_start);
    same && settled && known.changed == identity.changed && known.size == file.size
}

/// Returns whether any write to `known` that came after it was read shows in its ctime; it was read by a basebackup that
/// began at `last_start`, or by one before.
pub fn is_settled(known: &KnownFile, last_start: Timestamp) -> bool {
    known.changed.saturating_add(CTIME_MARGIN).is_ok_and(|settled| settled <= last_start)
}

impl Decision {
    /// Returns the basebackup that is built upon.
    pub fn parent(&self) -> Option<BasebackupId> {
        match self {
            Self::Full(_) => None,
            Self::Incremental(incremental) => Some(incremental.parent),
        }
    }

    /// Returns whether one that was killed is gone on with.
    pub fn resumes(&self) -> bool {
        matches!(self, Self::Incremental(Incremental { resumes: true, .. }))
    }

    /// Returns why the basebackup is full.
    pub fn reason(&self) -> Option<&Reason> {
        match self {
            Self::Full(reason) => Some(reason),
            Self::Incremental(_) => None,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(reason) => write!(f, "full: {reason}"),
            Self::Incremental(Incremental { parent, resumes: true, .. }) => {
                write!(f, "full, going on with {parent}, which was killed")
            }
            Self::Incremental(Incremental { parent, read_all: true, .. }) => {
                write!(f, "incremental to {parent}, reading every file")
            }
            Self::Incremental(Incremental { parent, .. }) => write!(f, "incremental to {parent}"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => write!(f, "as asked for"),
            Self::NoState => write!(f, "this host remembers no basebackup of the site"),
            Self::StateUnusable(detail) => write!(f, "what this host remembers cannot be used: {detail}"),
            Self::ParentAbsent(parent) => write!(f, "basebackup {parent} is not complete in the repository"),
            Self::ParentAbandoned(parent) => write!(f, "basebackup {parent} was given up"),
            Self::ParentExpired(parent) => write!(f, "basebackup {parent} has expired"),
            Self::ParentDiffers { parent, detail } => {
                write!(f, "basebackup {parent} cannot be built upon: {detail}")
            }
            Self::OtherCluster { was } => write!(f, "the last basebackup is of cluster {was}"),
            Self::OtherTimeline { was, is } => {
                write!(f, "timeline {is} does not come out of timeline {was} behind the last basebackup")
            }
            Self::OtherChecksums { are_on: true } => write!(f, "data checksums were switched on"),
            Self::OtherChecksums { are_on: false } => write!(f, "data checksums were switched off"),
            Self::OtherSealing => write!(f, "the last basebackup has other recipients, or another cipher"),
            Self::OtherChunkSize { was, is } => {
                write!(f, "the last basebackup has {was} pages in a chunk, and now it is {is}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backup::data_directory::FileIdentity;
    use crate::backup::state::{HashKey, KnownContent};
    use crate::codec::SeededRandom;
    use crate::pg::{Crc32c, Lsn};
    use crate::repo::entry::TreePath;

    use super::*;

    fn cluster(identifier: u64) -> ClusterId {
        format!("{identifier}-16").parse().unwrap()
    }

    fn facts() -> StateFacts {
        StateFacts {
            site: Uuid::from_u128(1),
            basebackup: "20261120T101500Z-3fa9".parse().unwrap(),
            backup_json: Digest::of(b"backup.json"),
            cluster: cluster(7_301_234_567_890_123_456),
            timeline: TimelineId::FIRST,
            start_lsn: Lsn(0x0200_0028),
            stop_lsn: Lsn(0x0200_0100),
            started_at: "2026-11-20T10:15:00Z".parse().unwrap(),
            has_checksums: true,
            sealing: Digest::of(b"sealing"),
            chunk_pages: 8,
            hash_key: HashKey::generate(&SeededRandom::new(1)),
            since_read_all: 0,
        }
    }

    fn today() -> Today {
        let StateFacts { site, cluster, timeline, has_checksums, sealing, chunk_pages, .. } = facts();
        Today { site, cluster, timeline, has_checksums, sealing, chunk_pages }
    }

    #[test]
    fn the_same_as_last_time_is_incremental_and_each_seventh_reads_everything() {
        let complete = Standing::Complete(facts().backup_json);
        for (since_read_all, read_all) in [(0, false), (5, false), (6, true), (7, true)] {
            let facts = StateFacts { since_read_all, ..facts() };
            let judged = judge(&facts, &today(), false, &complete);
            assert_eq!(
                judged,
                Ok(Incremental { parent: facts.basebackup, read_all, resumes: false }),
                "{since_read_all}"
            );
        }
    }

    #[test]
    fn whatever_differs_makes_it_full_and_is_named() {
        let complete = Standing::Complete(facts().backup_json);
        let second = TimelineId::new(2).unwrap();
        for (today, standing, said) in [
            (Today { site: Uuid::from_u128(2), ..today() }, &complete, "of site"),
            (Today { cluster: cluster(7), ..today() }, &complete, "of cluster 7301234567890123456-16"),
            (today(), &Standing::Absent, "20261120T101500Z-3fa9 is not complete"),
            (today(), &Standing::Abandoned, "given up"),
            (today(), &Standing::Expired, "expired"),
            (today(), &Standing::Unreadable("a flipped bit".to_owned()), "a flipped bit"),
            (today(), &Standing::Complete(Digest::of(b"another")), "not the one that was written"),
            (Today { timeline: second, ..today() }, &complete, "timeline 2 does not come out of timeline 1"),
            (Today { has_checksums: false, ..today() }, &complete, "checksums were switched off"),
            (
                Today { sealing: Digest::of(b"others"), ..today() },
                &complete,
                "other recipients, or another cipher",
            ),
            (Today { chunk_pages: 16, ..today() }, &complete, "8 pages in a chunk, and now it is 16"),
        ] {
            let reason = judge(&facts(), &today, false, standing).unwrap_err();
            assert!(Decision::Full(reason.clone()).to_string().contains(said), "{reason}: {said}");
        }
        let descendant = Today { timeline: second, ..today() };
        assert!(judge(&facts(), &descendant, true, &complete).is_ok());
    }

    #[test]
    fn a_file_is_passed_over_only_where_a_write_would_show() {
        let start: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
        let at = |text: &str| FileIdentity { device: 1, inode: 9, changed: text.parse().unwrap() };
        let file = |identity| SourceFile {
            path: TreePath::new("data/base/5/1").unwrap(),
            root: 0,
            size: 8192,
            mode: 0o600,
            modified: start,
            identity,
        };
        let known = |identity: FileIdentity| KnownFile {
            path: TreePath::new("data/base/5/1").unwrap(),
            size: 8192,
            inode: identity.inode,
            device: identity.device,
            changed: identity.changed,
            crc: Some(Crc32c::default()),
            damaged_pages: 0,
            content: KnownContent::Inline(bytes::Bytes::new()),
        };
        let settled = at("2026-11-20T10:14:58Z");
        assert!(is_untouched(&file(Some(settled)), &known(settled), start));
        // A write in the last two seconds, or later, may have been followed by one that left the same ctime.
        for text in ["2026-11-20T10:14:58.000000001Z", "2026-11-20T10:15:00Z", "2026-11-20T11:00:00Z"] {
            assert!(!is_untouched(&file(Some(at(text))), &known(at(text)), start), "{text}");
        }
        for other in [
            FileIdentity { inode: 10, ..settled },
            FileIdentity { device: 2, ..settled },
            at("2026-11-20T10:14:57Z"),
        ] {
            assert!(!is_untouched(&file(Some(other)), &known(settled), start), "{other:?}");
        }
        assert!(!is_untouched(&file(None), &known(FileIdentity { inode: 0, ..settled }), start));
        let nothing = FileIdentity { inode: 0, ..settled };
        assert!(!is_untouched(&file(Some(nothing)), &known(nothing), start));
        let longer = SourceFile { size: 16_384, ..file(Some(settled)) };
        assert!(!is_untouched(&longer, &known(settled), start));
    }
}
