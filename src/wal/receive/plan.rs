//! What receive decides: which server, from where, what becomes of the slot, and what is stored next. All of it pure.
//!
//! The rules are those of following a timeline: what is here must be part of the server's own history, a timeline that
//! ended is received up to its switch point, and the next one from the start of the segment the switch point is in,
//! because that is the segment the server archives under the new name.

use std::time::Duration;

use crate::pg::{Lsn, TimelineHistory, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::replication::{PhysicalSlot, SystemIdentity};
use crate::repo::ClusterId;
use crate::wal::spool::Position;

/// What one server said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerFacts {
    pub identity: SystemIdentity,
    pub segment_size: WalSegmentSize,
    /// The history of its timeline; the first has none. Of one that lacks the file this is what others tell, if they do.
    pub history: Option<TimelineHistory>,
    /// Whether it lacks the history file of its timeline, as after a basebackup without WAL: it sends that timeline alone.
    pub lacks_history: bool,
    pub standby: bool,
    /// Its cluster_name, by which a clone is known.
    pub cluster_name: String,
}

impl ServerFacts {
    /// Returns whose WAL it writes.
    pub(crate) fn cluster(&self) -> ClusterId {
        let Self { identity, segment_size, .. } = self;
        ClusterId { system_identifier: identity.system_identifier, segment_size: *segment_size }
    }
}

/// Why a server is not received from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("it is the clone \"{name}\", whose WAL must not be archived")]
    Clone { name: String },
    #[error("its WAL ends at {flushed} on timeline {timeline}, before {here}, which is received already")]
    Behind { timeline: TimelineId, flushed: Lsn, here: Lsn },
    #[error(
        "it is on timeline {timeline}, which does not descend from timeline {here}, received up to {lsn}"
    )]
    OtherBranch { timeline: TimelineId, here: TimelineId, lsn: Lsn },
    #[error("it has no history file of its timeline {timeline}")]
    NoHistory { timeline: TimelineId },
}

/// What the server tells of our slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotFacts {
    pub physical: bool,
    /// Who uses it, where somebody does.
    pub active: Option<String>,
    /// It keeps no WAL for us any more.
    pub lost: bool,
    pub restart: Option<Lsn>,
}

impl From<PhysicalSlot> for SlotFacts {
    /// Takes one that keeps nothing for lost. It may also be one that has kept nothing yet, which is of no more use.
    fn from(PhysicalSlot { restart }: PhysicalSlot) -> Self {
        Self { physical: true, active: None, lost: restart.is_none(), restart }
    }
}

/// What to do about our slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SlotStep {
    Create,
    Use,
    /// The server removed WAL that the slot should have kept: it is of no use any more.
    Replace,
    /// It is somebody else's.
    Refuse(String),
}

/// What to do where every server that answers and fits has removed what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RemovedStep {
    /// One that may have kept it may come back: this is why it cannot be asked.
    WaitFor(String),
    /// No server has it: go on behind it.
    JumpOver,
}

/// When the beginning of a segment that is still being written is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PieceRule {
    /// A piece is due this long after the one before it.
    pub interval: Duration,
    /// A piece is due when so many bytes wait.
    pub bytes: u32,
    /// A piece is due as soon as a byte waits: commits wait for it.
    pub at_once: bool,
}

/// What the store has of a segment that is in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct InStore {
    /// Bytes from its beginning on, in pieces or as a whole.
    pub bytes: u32,
    /// Whether it stands there under its own name.
    pub whole: bool,
}

/// What the uploader does next about a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upload {
    Segment(WalSegmentName),
    Piece { segment: WalSegmentName, from: u32, to: u32 },
}

impl Upload {
    /// Returns of which segment something is stored.
    pub(crate) fn segment(self) -> WalSegmentName {
        match self {
            Self::Segment(segment) | Self::Piece { segment, .. } => segment,
        }
    }

    /// Tells whether it is a piece.
    pub(crate) fn is_piece(self) -> bool {
        matches!(self, Self::Piece { .. })
    }
}

/// What one piece may hold: what is in memory for it, and lost time where it fails.
const PIECE_BYTES_MAX: u32 = 16 << 20;
/// Ends that are tried for a piece in whose place there is another: more of those is no accident, and each costs requests.
const PIECE_ENDS_MAX: usize = 8;
/// A server that may have kept what the others have removed is waited for so long: a restart takes minutes, and so does a
/// failover. Commits that wait for us wait meanwhile.
const UNHEARD_WAIT: Duration = Duration::from_secs(10 * 60);
/// What a clone's server is called; `instance` gives it that name.
const CLONE_NAME_PREFIX: &str = "walden:";
/// The spool is filled again when there is half as much room again as made it pause.
const RESUME_NUMERATOR: u64 = 3;
const RESUME_DENOMINATOR: u64 = 2;

/// Decides from where to receive of a server; `here` is where what was received ends.
///
/// `slot` is what the server kept for us, for the first time of all.
pub(crate) fn plan_start(
    server: &ServerFacts,
    here: Option<Position>,
    slot: Option<Lsn>,
) -> Result<Position, Unfit> {
    refuse_clone(server)?;
    let start = follow(server, here, slot)?;
    let timeline = server.identity.timeline;
    // A server that cannot tell of a timeline before its own does not send it.
    let is_sent = !server.lacks_history || start.timeline == timeline;
    if is_sent { Ok(start) } else { Err(Unfit::NoHistory { timeline }) }
}

/// Refuses the server of a clone.
pub(crate) fn refuse_clone(server: &ServerFacts) -> Result<(), Unfit> {
    match server.cluster_name.strip_prefix(CLONE_NAME_PREFIX) {
        Some(name) => Err(Unfit::Clone { name: name.to_owned() }),
        None => Ok(()),
    }
}

fn follow(server: &ServerFacts, here: Option<Position>, slot: Option<Lsn>) -> Result<Position, Unfit> {
    let SystemIdentity { timeline, flushed, .. } = server.identity;
    let is_untold = server.lacks_history && server.history.is_none();
    let Some(here) = here else {
        if is_untold {
            return Err(Unfit::NoHistory { timeline });
        }
        let lsn = segment_start(slot.unwrap_or(flushed), server.segment_size);
        let timeline = server.history.as_ref().map_or(timeline, |history| history.timeline_at(lsn));
        return Ok(Position { timeline, lsn });
    };
    if here.timeline == timeline {
        let behind = Unfit::Behind { timeline, flushed, here: here.lsn };
        return if here.lsn > flushed { Err(behind) } else { Ok(here) };
    }
    if is_untold && timeline > here.timeline {
        return Err(Unfit::NoHistory { timeline });
    }
    let other = Unfit::OtherBranch { timeline, here: here.timeline, lsn: here.lsn };
    // A primary that was left behind, or its standby.
    let Some(history) = server.history.as_ref().filter(|_| timeline > here.timeline) else {
        return Err(other);
    };
    let left = history.switches.iter().rev().find(|left| left.timeline <= here.timeline).ok_or(other)?;
    if left.timeline == here.timeline && here.lsn < left.lsn {
        return Ok(here);
    }
    // Where `left` is an earlier timeline than ours, the cluster was recovered to a point in the past: a new branch,
    // from where it leaves what was received.
    let after = history.switches.iter().find(|left| left.timeline > here.timeline);
    let next = after.map_or(timeline, |left| left.timeline);
    Ok(Position { timeline: next, lsn: segment_start(left.lsn, server.segment_size) })
}

/// Returns the first position of the segment that holds a position.
pub(crate) fn segment_start(lsn: Lsn, size: WalSegmentSize) -> Lsn {
    WalSegmentNumber::containing(lsn, size).start_lsn(size)
}

/// Decides what to do about the slot; `is_refused` says that the server would not stream from it.
pub(crate) fn plan_slot(slot: Option<&SlotFacts>, is_refused: bool) -> SlotStep {
    match slot {
        None => SlotStep::Create,
        Some(slot) if !slot.physical => SlotStep::Refuse("it is a logical slot".into()),
        Some(SlotFacts { active: Some(who), .. }) => SlotStep::Refuse(format!("it is in use by {who}")),
        Some(slot) if slot.lost || is_refused => SlotStep::Replace,
        Some(_) => SlotStep::Use,
    }
}

/// Decides from where on the server hears how far we are: not before `slot`, the position of the slot that is used, for that
/// would set it back to what may be gone. One ahead of the server's own WAL remained from before a rewind, and commits
/// would wait until the server has come as far.
pub(crate) fn plan_least_report(slot: Option<Lsn>, flushed: Lsn) -> Lsn {
    slot.filter(|slot| *slot <= flushed).unwrap_or(Lsn::ZERO)
}

/// Decides whether to wait for a server that cannot be asked, which was begun so long ago.
pub(crate) fn plan_removed(unheard: Option<String>, waited: Duration) -> RemovedStep {
    match unheard.filter(|_| waited < UNHEARD_WAIT) {
        Some(unheard) => RemovedStep::WaitFor(unheard),
        None => RemovedStep::JumpOver,
    }
}

/// Decides whether to stop filling the spool.
pub(crate) fn plan_pause(paused: bool, free_bytes: u64, free_bytes_min: u64) -> bool {
    let enough = free_bytes_min.saturating_mul(RESUME_NUMERATOR) / RESUME_DENOMINATOR;
    if paused { free_bytes < enough } else { free_bytes < free_bytes_min }
}

/// Decides what to store of one segment; nothing where it can wait.
///
/// `length` bytes of it are spooled, and the last piece is `age` old. `open` is the segment that is being received.
pub(crate) fn plan_upload(
    (segment, length): (WalSegmentName, u32),
    stored: InStore,
    age: Duration,
    open: bool,
    size: WalSegmentSize,
    rule: PieceRule,
) -> Option<Upload> {
    let waiting = length.saturating_sub(stored.bytes);
    if length == size.bytes() {
        // Commits wait for its last bytes, and those are there sooner than all of it.
        let rest_first = rule.at_once && stored.bytes > 0 && waiting > 0;
        if !rest_first {
            return (!stored.whole).then_some(Upload::Segment(segment));
        }
    } else if waiting == 0 || (open && !rule.at_once && age < rule.interval && waiting < rule.bytes) {
        return None;
    }
    let to = stored.bytes + waiting.min(PIECE_BYTES_MAX);
    Some(Upload::Piece { segment, from: stored.bytes, to })
}

/// Decides how to store a piece where something may stand in its place that nobody can use: one that ends a little earlier
/// has another name, and the rest comes after it. Where that leads nowhere it waits for more bytes, or goes with the whole.
///
/// `is_taken` tells of the end of a piece with the same beginning whether such a one stands there.
pub(crate) fn plan_around(upload: Upload, is_whole: bool, is_taken: impl Fn(u32) -> bool) -> Option<Upload> {
    let Upload::Piece { segment, from, to } = upload else { return Some(upload) };
    let mut ends = (from + 1..=to).rev().take(PIECE_ENDS_MAX);
    match ends.find(|end| !is_taken(*end)) {
        Some(to) => Some(Upload::Piece { segment, from, to }),
        None => is_whole.then_some(Upload::Segment(segment)),
    }
}

/// Decides whether a segment may leave the spool: nothing more comes of it, and the store has it. The newest stays,
/// because it tells the next start where receiving ended, on which timeline.
pub(crate) fn may_leave(length: u32, stored: InStore, open: bool, size: WalSegmentSize) -> bool {
    let all = if length == size.bytes() { stored.whole } else { stored.bytes >= length };
    !open && all
}

/// Returns up to where all that was received is in the store: from `before`, the end of what left the spool, over its
/// segments, oldest first.
pub(crate) fn durable_in_store(
    spooled: impl IntoIterator<Item = (WalSegmentName, InStore)>,
    before: Option<Position>,
    size: WalSegmentSize,
) -> Option<Position> {
    let mut durable = before;
    for (segment, stored) in spooled {
        let start = segment.start_lsn(size).ok().filter(|_| stored.bytes > 0);
        let Some(start) = start else { break };
        durable = Some(Position { timeline: segment.timeline(), lsn: start + u64::from(stored.bytes) });
        if stored.bytes < size.bytes() {
            break;
        }
    }
    durable
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: WalSegmentSize = WalSegmentSize::DEFAULT;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: tli(timeline), lsn: Lsn(lsn) }
    }

    fn server(timeline: u32, flushed: u64, history: &str) -> ServerFacts {
        ServerFacts {
            identity: SystemIdentity {
                system_identifier: "7301234567890123456".parse().unwrap(),
                timeline: tli(timeline),
                flushed: Lsn(flushed),
            },
            segment_size: SIZE,
            history: (timeline > 1).then(|| TimelineHistory::parse(tli(timeline), history).unwrap()),
            lacks_history: false,
            standby: false,
            cluster_name: String::new(),
        }
    }

    const THREE: &str = "1\t0/5000100\tx\n2\t0/8000000\ty\n";

    #[test]
    fn receiving_goes_on_where_it_ended_and_follows_the_servers_history() {
        for (history, timeline, flushed, here, expected) in [
            ("", 1, 0x500_0000, Some(at(1, 0x410_0028)), Ok(at(1, 0x410_0028))),
            ("", 1, 0x500_0000, Some(at(1, 0x500_0000)), Ok(at(1, 0x500_0000))),
            // Before the switch point the old timeline is received to its end.
            (THREE, 3, 0x900_0000, Some(at(1, 0x500_00FF)), Ok(at(1, 0x500_00FF))),
            // From then on, and where the old server had gone further, the next one from the start of the segment.
            (THREE, 3, 0x900_0000, Some(at(1, 0x500_0100)), Ok(at(2, 0x500_0000))),
            (THREE, 3, 0x900_0000, Some(at(1, 0x700_0000)), Ok(at(2, 0x500_0000))),
            (THREE, 3, 0x900_0000, Some(at(2, 0x500_0000)), Ok(at(2, 0x500_0000))),
            (THREE, 3, 0x900_0000, Some(at(2, 0x800_0000)), Ok(at(3, 0x800_0000))),
            // A cluster that was recovered to a point before ours, and promoted there.
            ("1\t0/5000100\tx\n", 3, 0x900_0000, Some(at(2, 0x600_0000)), Ok(at(3, 0x500_0000))),
            (
                "1\t0/5000100\tx\n3\t0/6000100\ty\n",
                4,
                0x900_0000,
                Some(at(2, 0x700_0000)),
                Ok(at(3, 0x500_0000)),
            ),
            // For the first time of all: where the server stands.
            ("", 1, 0x512_3456, None, Ok(at(1, 0x500_0000))),
            (THREE, 3, 0x900_0001, None, Ok(at(3, 0x900_0000))),
        ] {
            assert_eq!(plan_start(&server(timeline, flushed, history), here, None), expected, "{here:?}");
        }
        assert_eq!(
            plan_start(&server(3, 0x900_0000, THREE), None, Some(Lsn(0x612_3456))),
            Ok(at(2, 0x600_0000))
        );
    }

    #[test]
    fn a_server_that_is_not_on_our_way_is_refused() {
        let behind = plan_start(&server(1, 0x400_0000, ""), Some(at(1, 0x400_0001)), None);
        assert!(matches!(behind, Err(Unfit::Behind { .. })), "{behind:?}");
        // The old primary, back after the failover.
        let old = plan_start(&server(1, 0x900_0000, ""), Some(at(2, 0x600_0000)), None);
        assert!(matches!(old, Err(Unfit::OtherBranch { .. })), "{old:?}");
        let clone = ServerFacts { cluster_name: "walden:try".into(), ..server(1, 0, "") };
        assert_eq!(plan_start(&clone, None, None), Err(Unfit::Clone { name: "try".into() }));
    }

    #[test]
    fn a_server_without_the_history_of_its_timeline_is_received_from_on_that_timeline_alone() {
        let told = ServerFacts { lacks_history: true, ..server(3, 0x900_0000, THREE) };
        let untold = ServerFacts { history: None, ..told.clone() };
        let unknown = Err(Unfit::NoHistory { timeline: tli(3) });
        for server in [&told, &untold] {
            assert_eq!(plan_start(server, Some(at(3, 0x880_0000)), None), Ok(at(3, 0x880_0000)));
            // It would not send it, wherever it knows the way from.
            assert_eq!(plan_start(server, Some(at(2, 0x7FF_FFFF)), None), unknown);
            assert_eq!(plan_start(server, Some(at(1, 0x500_0100)), None), unknown);
            assert_eq!(plan_start(server, None, Some(Lsn(0x612_3456))), unknown);
            let behind = plan_start(server, Some(at(4, 0x900_0000)), None);
            assert!(matches!(behind, Err(Unfit::OtherBranch { .. })), "{behind:?}");
        }
        // Whether the timeline before is over here only its history says.
        assert_eq!(plan_start(&told, Some(at(2, 0x800_0000)), None), Ok(at(3, 0x800_0000)));
        assert_eq!(plan_start(&untold, Some(at(2, 0x800_0000)), None), unknown);
        assert_eq!(plan_start(&told, None, Some(Lsn(0x812_3456))), Ok(at(3, 0x800_0000)));
        assert_eq!(plan_start(&untold, None, None), unknown);
        let clone = ServerFacts { cluster_name: "walden:try".into(), ..untold };
        assert_eq!(plan_start(&clone, None, None), Err(Unfit::Clone { name: "try".into() }));
    }

    #[test]
    fn a_slot_is_created_used_replaced_or_left_alone() {
        let slot = SlotFacts { physical: true, active: None, lost: false, restart: Some(Lsn(1)) };
        let plan = |slot: &SlotFacts| plan_slot(Some(slot), false);
        assert_eq!(plan_slot(None, false), SlotStep::Create);
        assert_eq!(plan_slot(None, true), SlotStep::Create, "somebody removed it since");
        assert_eq!(plan(&slot), SlotStep::Use);
        assert_eq!(plan_slot(Some(&slot), true), SlotStep::Replace);
        assert_eq!(plan(&SlotFacts { lost: true, ..slot.clone() }), SlotStep::Replace);
        let used = SlotFacts { active: Some("standby2".into()), lost: true, ..slot.clone() };
        assert_eq!(plan(&used), SlotStep::Refuse("it is in use by standby2".into()));
        let logical = SlotFacts { physical: false, ..slot.clone() };
        // The server refuses to stream from it, and it is somebody else's.
        assert!(matches!(plan_slot(Some(&logical), true), SlotStep::Refuse(_)));
        // What a role is told that may only replicate.
        assert_eq!(SlotFacts::from(PhysicalSlot { restart: Some(Lsn(1)) }), slot);
        assert_eq!(plan(&PhysicalSlot { restart: None }.into()), SlotStep::Replace);
    }

    #[test]
    fn wal_is_given_up_when_no_server_can_have_it_or_one_does_not_come_back() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let unheard = || Some("it does not answer".to_owned());
        let wait = RemovedStep::WaitFor("it does not answer".into());
        assert_eq!(plan_removed(None, Duration::ZERO), RemovedStep::JumpOver);
        assert_eq!(plan_removed(unheard(), Duration::ZERO), wait);
        assert_eq!(plan_removed(unheard(), minutes(9)), wait);
        assert_eq!(plan_removed(unheard(), minutes(10)), RemovedStep::JumpOver);
    }

    #[test]
    fn the_server_hears_of_nothing_before_the_slot_unless_that_is_ahead_of_it() {
        assert_eq!(plan_least_report(None, Lsn(500)), Lsn::ZERO);
        assert_eq!(plan_least_report(Some(Lsn(300)), Lsn(500)), Lsn(300));
        assert_eq!(plan_least_report(Some(Lsn(500)), Lsn(500)), Lsn(500));
        assert_eq!(plan_least_report(Some(Lsn(501)), Lsn(500)), Lsn::ZERO);
    }

    #[test]
    fn a_full_volume_pauses_until_there_is_half_as_much_again() {
        assert!(!plan_pause(false, 100, 100));
        assert!(plan_pause(false, 99, 100));
        assert!(plan_pause(true, 149, 100));
        assert!(!plan_pause(true, 150, 100));
        assert!(!plan_pause(false, 0, 0), "no threshold, no pause");
    }

    #[test]
    fn pieces_are_stored_when_they_are_due_and_segments_when_they_are_whole() {
        let segment: WalSegmentName = "000000010000000000000005".parse().unwrap();
        let rule = PieceRule { interval: Duration::from_secs(2), bytes: 1000, at_once: false };
        let at_once = PieceRule { at_once: true, ..rule };
        let plan = |length, bytes, seconds, open, rule| {
            let stored = InStore { bytes, whole: false };
            plan_upload((segment, length), stored, Duration::from_secs(seconds), open, SIZE, rule)
        };
        let piece = |from, to| Some(Upload::Piece { segment, from, to });
        let full = 16 << 20;
        assert_eq!(plan(full, 500, 0, true, rule), Some(Upload::Segment(segment)));
        // Failure 4: an idle server's segment is never called whole, and nothing is stored again and again.
        assert_eq!(plan(500, 500, 3600, true, rule), None);
        assert_eq!(plan(0, 0, 3600, true, rule), None);
        assert_eq!(plan(501, 500, 1, true, rule), None);
        assert_eq!(plan(501, 500, 2, true, rule), piece(500, 501));
        assert_eq!(plan(1500, 500, 0, true, rule), piece(500, 1500));
        assert_eq!(plan(501, 500, 0, true, at_once), piece(500, 501));
        // A spool that was lost begins the segment again, of which the store has more.
        assert_eq!(plan(100, 500, 3600, true, at_once), None);
        // The last segment of a timeline that ended.
        assert_eq!(plan(501, 500, 0, false, rule), piece(500, 501));
        assert_eq!(plan(500, 500, 0, false, rule), None);
        // Commits wait for the end of a segment that was begun in pieces, not for all of it once more.
        assert_eq!(plan(full, 500, 0, true, at_once), piece(500, full));
        assert_eq!(plan(full, full, 0, true, at_once), Some(Upload::Segment(segment)));
        assert_eq!(plan(full, 0, 0, true, at_once), Some(Upload::Segment(segment)));
        let whole = InStore { bytes: full, whole: true };
        assert_eq!(plan_upload((segment, full), whole, Duration::ZERO, true, SIZE, at_once), None);
        // A large segment goes in pieces that memory can hold.
        let large = WalSegmentSize::MAX;
        let first = plan_upload((segment, 99 << 20), InStore::default(), Duration::ZERO, true, large, rule);
        assert_eq!(first, piece(0, PIECE_BYTES_MAX));
    }

    #[test]
    fn a_piece_that_nobody_can_use_is_gone_round() {
        let segment: WalSegmentName = "000000010000000000000005".parse().unwrap();
        let piece = |from, to| Upload::Piece { segment, from, to };
        let plan =
            |upload, is_whole, taken: &[u32]| plan_around(upload, is_whole, |end| taken.contains(&end));
        assert_eq!(plan(piece(100, 200), false, &[]), Some(piece(100, 200)));
        assert_eq!(plan(piece(100, 200), false, &[150]), Some(piece(100, 200)));
        assert_eq!(plan(piece(100, 200), true, &[200]), Some(piece(100, 199)));
        assert_eq!(plan(piece(100, 200), false, &[199, 200]), Some(piece(100, 198)));
        // There is no other piece of one byte.
        assert_eq!(plan(piece(199, 200), false, &[200]), None);
        assert_eq!(plan(piece(199, 208), false, &[200]), Some(piece(199, 208)));
        assert_eq!(plan(piece(199, 200), true, &[200]), Some(Upload::Segment(segment)));
        let all: Vec<u32> = (100..=200).collect();
        assert_eq!(plan(piece(100, 200), false, &all), None);
        assert_eq!(plan(Upload::Segment(segment), true, &all), Some(Upload::Segment(segment)));
    }

    #[test]
    fn a_segment_leaves_the_spool_when_the_store_has_it_and_another_follows() {
        let full = SIZE.bytes();
        let stored = |bytes, whole| InStore { bytes, whole };
        assert!(may_leave(full, stored(full, true), false, SIZE));
        assert!(!may_leave(full, stored(full, true), true, SIZE), "the newest says where receiving ended");
        assert!(!may_leave(full, stored(full, false), false, SIZE), "in pieces only");
        assert!(may_leave(500, stored(500, false), false, SIZE), "the end of a timeline");
        assert!(!may_leave(500, stored(499, false), false, SIZE));
    }

    #[test]
    fn what_is_in_the_store_ends_where_the_first_gap_is() {
        let five: WalSegmentName = "000000020000000000000005".parse().unwrap();
        let six: WalSegmentName = "000000020000000000000006".parse().unwrap();
        let before = Some(at(1, 0x500_0100));
        let durable = |first, second| {
            let stored = |bytes| InStore { bytes, whole: false };
            durable_in_store([(five, stored(first)), (six, stored(second))], before, SIZE)
        };
        assert_eq!(durable_in_store([], before, SIZE), before);
        // A segment on a new timeline begins before the old one ended: nothing of the new one is stored yet.
        assert_eq!(durable(0, 9), before);
        assert_eq!(durable(0x28, 9), Some(at(2, 0x500_0028)));
        assert_eq!(durable(16 << 20, 0), Some(at(2, 0x600_0000)));
        assert_eq!(durable(16 << 20, 9), Some(at(2, 0x600_0009)));
        assert_eq!(durable_in_store([(five, InStore::default())], None, SIZE), None);
    }
}
