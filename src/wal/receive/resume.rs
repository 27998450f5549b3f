//! Where receiving goes on when the spool holds nothing: at the first WAL that the archive lacks and a recovery needs.
//!
//! Segments are stored side by side, so that the newest one in the archive says nothing of those before it. Holes are
//! looked for from the slot's position on, because the server was never told that anything behind it is durable, and from
//! the newest basebackup on, where that is older. WAL behind a hole is received again with it, and found to be there
//! when it is stored. What no server has of a hole any more is told as a gap, and what is missing next is asked for.

use std::collections::{BTreeMap, VecDeque};

use crate::catalog::{TimelineCoverage, WalCoverage, basebackups};
use crate::pg::{Lsn, TimelineId, WalSegmentNumber, WalSegmentSize};
use crate::repo::Repository;
use crate::wal::Error;
use crate::wal::left_out::RecoveryStart;
use crate::wal::receive::Receiver;
use crate::wal::receive::plan::{ServerFacts, plan_start, segment_start};
use crate::wal::receive::server::Candidate;
use crate::wal::spool::Position;

/// What the archive has on the way of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resume {
    /// What it lacks of what is wanted, the oldest first.
    holes: VecDeque<Hole>,
    /// Behind all that it has.
    end: Place,
}

/// WAL that is not in the archive, with some behind it that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hole {
    pub at: Place,
    pub to: Lsn,
}

/// A segment to go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Where it begins: the spool gets all of it, and may end anywhere in it when the connection does.
    pub start: Position,
    /// Up to where its beginning is archived in pieces.
    pub stored: Lsn,
}

/// A timeline on the way of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    timeline: TimelineId,
    from: Lsn,
    /// Where it was left; nothing for the server's own.
    to: Option<Lsn>,
}

impl Resume {
    /// Returns where to go on.
    pub(super) fn next_place(&self) -> Place {
        self.holes.front().map_or(self.end, |hole| hole.at)
    }

    /// Gives up the hole that begins in the segment at a position, and returns what is lost; nothing where none does.
    ///
    /// `kept` is where a segment begins from which on a server has WAL still: what of the hole is behind that stays.
    pub(super) fn give_up(&mut self, at: Position, kept: Option<Lsn>) -> Option<Hole> {
        let hole = self.holes.front_mut().filter(|hole| hole.at.start == at)?;
        let Some(lsn) = kept.filter(|kept| at.lsn < *kept && *kept < hole.to) else {
            return self.holes.pop_front();
        };
        let lost = Hole { to: lsn, ..*hole };
        hole.at = Place { start: Position { lsn, ..at }, stored: lsn };
        Some(lost)
    }
}

impl Place {
    /// Returns up to where everything is archived.
    pub(super) fn end(self) -> Position {
        Position { lsn: self.stored, ..self.start }
    }
}

impl Stretch {
    fn holds(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.timeline == timeline && self.from <= lsn && self.to.is_none_or(|to| lsn < to)
    }
}

impl Receiver<'_> {
    /// Finds out where to go on, for a spool that holds nothing; waits for the store. Nowhere where nothing is archived.
    ///
    /// `kept` is what the slot keeps. Where that is not known, the basebackup alone says what is wanted.
    pub(super) async fn look_into_archive(
        &mut self,
        candidate: &Candidate,
        kept: Option<Lsn>,
    ) -> Result<(), Error> {
        let mut known = self.shared.repository.subscribe();
        let repository = match known.wait_for(Option::is_some).await {
            Ok(repository) => repository.clone(),
            Err(_) => None,
        };
        let Some(repository) = repository else { return Ok(()) };
        let facts = &candidate.facts;
        let wanted = kept.into_iter().chain(newest_basebackup(&repository, facts).await?).min();
        let archived = load(&repository, facts, wanted).await?;
        let Some(resume) = plan_resume(facts, &archived, wanted) else { return Ok(()) };
        let next = resume.next_place();
        if let Some(Hole { at, to }) = resume.holes.front() {
            tracing::warn!("the archive lacks WAL from {} to {to}: it is asked for again", at.stored);
        }
        // A commit that was not told before we were ended may wait for no other WAL than this.
        let end = next.end();
        self.shared.durable.send_if_modified(|known| known.is_none() && known.insert(end) == &end);
        (self.here, self.resume) = (Some(next.start), Some(resume));
        Ok(())
    }

    /// Looks whether the archive has come to have what was found to be missing at `here`, and goes on behind that, if so:
    /// another host may have received until now.
    pub(super) async fn look_again(&mut self, candidate: &Candidate, here: Position) -> Result<bool, Error> {
        let repository = self.shared.repository.borrow().clone();
        let Some(repository) = repository else { return Ok(false) };
        // On the server's way: what is spooled may end beyond where that left its timeline.
        let Ok(here) = plan_start(&candidate.facts, Some(here), None) else { return Ok(false) };
        let wanted = Some(here.lsn);
        let archived = load(&repository, &candidate.facts, wanted).await?;
        let resume = plan_resume(&candidate.facts, &archived, wanted);
        let Some(resume) = resume.filter(|resume| resume.next_place().start > here) else { return Ok(false) };
        let before = self.resume.replace(resume.clone());
        self.go_on_at(before.map(|before| before.next_place()), resume.next_place());
        Ok(true)
    }

    /// Takes the hole of the archive that begins at `here` for lost, as far as to `kept` where that is within it, and
    /// returns what is; goes on at what is missing next.
    pub(super) fn give_up_hole(&mut self, here: Position, kept: Option<Lsn>) -> Option<Hole> {
        let resume = self.resume.as_mut()?;
        let hole = resume.give_up(here, kept)?;
        let next = resume.next_place();
        self.go_on_at(Some(hole.at), next);
        Some(hole)
    }

    /// Goes on at another place of the archive, which is what is known to be stored as well: commits may wait for that.
    fn go_on_at(&mut self, before: Option<Place>, next: Place) {
        self.shared.durable.send_if_modified(|known| {
            let ends_there = known.is_some() && *known == before.map(Place::end);
            if ends_there {
                *known = Some(next.end());
            }
            ends_there
        });
        (self.here, self.removed) = (Some(next.start), Vec::new());
    }
}

/// Lists what is archived on the way of a server, as far back as is wanted, or else to the newest timeline of which
/// there is anything.
async fn load(
    repository: &Repository,
    facts: &ServerFacts,
    wanted: Option<Lsn>,
) -> Result<BTreeMap<TimelineId, TimelineCoverage>, Error> {
    let (mut archived, mut is_found) = (BTreeMap::new(), false);
    for Stretch { timeline, from, .. } in way_of(facts).into_iter().rev() {
        let all = WalSegmentNumber(0);
        let held = WalCoverage::load_timeline(repository, facts.cluster(), timeline, all).await?;
        is_found |= end_of(&held, facts.segment_size).is_some();
        archived.insert(timeline, held);
        if is_found && wanted.is_none_or(|wanted| from <= wanted) {
            break;
        }
    }
    Ok(archived)
}

/// Returns where the recovery from the newest basebackup begins, among those on the way of a server.
async fn newest_basebackup(repository: &Repository, facts: &ServerFacts) -> Result<Option<Lsn>, Error> {
    let listed = basebackups::list(repository).await?;
    let way = way_of(facts);
    let starts = listed.complete.iter().map(|listed| RecoveryStart::of(&listed.record));
    let on_way = starts.filter(|start| {
        start.cluster == facts.cluster() && way.iter().any(|stretch| stretch.holds(start.timeline, start.lsn))
    });
    Ok(on_way.map(|start| start.lsn).max())
}

/// Lists the timelines whose WAL is part of what a server has, oldest first.
fn way_of(facts: &ServerFacts) -> Vec<Stretch> {
    let (mut way, mut from) = (Vec::new(), Lsn::ZERO);
    if let Some(history) = &facts.history {
        for switch in &history.switches {
            let to = history.switch_of(switch.timeline);
            way.push(Stretch { timeline: switch.timeline, from, to });
            from = switch.lsn;
        }
    }
    way.push(Stretch { timeline: facts.identity.timeline, from, to: None });
    // A cluster that was recovered to before a timeline began left nothing of it.
    way.retain(|stretch| stretch.to.is_none_or(|to| stretch.from < to));
    way
}

/// Decides where to go on, by what is archived of the timelines of a server's way; nothing where nothing is.
///
/// `wanted` is the oldest position that matters. Without it the newest WAL does.
fn plan_resume(
    facts: &ServerFacts,
    archived: &BTreeMap<TimelineId, TimelineCoverage>,
    wanted: Option<Lsn>,
) -> Option<Resume> {
    let size = facts.segment_size;
    let ends = |stretch: &Stretch| archived.get(&stretch.timeline).and_then(|held| end_of(held, size));
    let way = way_of(facts);
    let newest = way.iter().rposition(|stretch| ends(stretch).is_some())?;
    let end = place_of(way[newest].timeline, ends(&way[newest])?, size);
    let nothing = TimelineCoverage::default();
    let mut holes = VecDeque::new();
    for (index, stretch) in way[..=newest].iter().enumerate() {
        let Some(wanted) = wanted.filter(|wanted| stretch.to.is_none_or(|to| *wanted < to)) else { continue };
        let first = WalSegmentNumber::containing(wanted.max(stretch.from), size);
        // The segment of the switch point is archived under the next timeline's name; what is behind the end is to come.
        let switch = stretch.to.map(|to| WalSegmentNumber::containing(to, size));
        let last = (index == newest).then(|| WalSegmentNumber::containing(end.stored, size));
        let Some(until) = switch.into_iter().chain(last).min() else { continue };
        let held = archived.get(&stretch.timeline).unwrap_or(&nothing);
        holes.extend(holes_of(stretch.timeline, held, first, until, size));
    }
    Some(Resume { holes, end })
}

/// Lists what is missing of a timeline from one segment to before another.
pub(super) fn holes_of(
    timeline: TimelineId,
    held: &TimelineCoverage,
    first: WalSegmentNumber,
    until: WalSegmentNumber,
    size: WalSegmentSize,
) -> Vec<Hole> {
    let (mut holes, mut next) = (Vec::new(), first);
    while next < until {
        let Some(missing) = held.first_missing(next, WalSegmentNumber(until.0 - 1)) else { break };
        let behind = held.runs().iter().map(|(first, _)| *first).find(|first| *first > missing);
        next = behind.map_or(until, |behind| behind.min(until));
        let stored = held.pieces.get(&missing).map_or(0, |reach| reach.contiguous);
        let stored = missing.start_lsn(size) + u64::from(stored);
        holes.push(Hole { at: place_of(timeline, stored, size), to: next.start_lsn(size) });
    }
    holes
}

fn place_of(timeline: TimelineId, stored: Lsn, size: WalSegmentSize) -> Place {
    Place { start: Position { timeline, lsn: segment_start(stored, size) }, stored }
}

/// Returns the position behind the newest WAL of a timeline; nothing where there is none.
fn end_of(held: &TimelineCoverage, size: WalSegmentSize) -> Option<Lsn> {
    let whole = held.last().map(|last| last.next().start_lsn(size));
    let pieces = held.pieces.last_key_value();
    let pieces = pieces.map(|(number, reach)| number.start_lsn(size) + u64::from(reach.contiguous));
    whole.max(pieces)
}

#[cfg(test)]
mod tests {
    use crate::pg::{SystemIdentifier, TimelineHistory};
    use crate::replication::SystemIdentity;

    use super::*;

    const SIZE: WalSegmentSize = WalSegmentSize::DEFAULT;
    const SEGMENT: u64 = 16 << 20;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: tli(timeline), lsn: Lsn(lsn) }
    }

    fn server(timeline: u32, history: &str) -> ServerFacts {
        let history = (!history.is_empty()).then(|| TimelineHistory::parse(tli(timeline), history).unwrap());
        let identity = SystemIdentity {
            system_identifier: SystemIdentifier(7),
            timeline: tli(timeline),
            flushed: Lsn(0x900_0000),
        };
        ServerFacts {
            identity,
            segment_size: SIZE,
            history,
            lacks_history: false,
            standby: false,
            cluster_name: String::new(),
        }
    }

    fn held(whole: &[u64], pieces: &[(u64, u32)]) -> TimelineCoverage {
        let mut held = TimelineCoverage::default();
        whole.iter().for_each(|number| held.push(WalSegmentNumber(*number)));
        pieces.iter().for_each(|(number, to)| held.push_piece(WalSegmentNumber(*number), 0, *to, SIZE));
        held
    }

    /// Returns from and to of each hole, and the end.
    fn planned(
        server: &ServerFacts,
        archived: &[(u32, TimelineCoverage)],
        wanted: Option<u64>,
    ) -> Option<(Vec<(Position, u64)>, Position)> {
        let archived = archived.iter().map(|(timeline, held)| (tli(*timeline), held.clone())).collect();
        let resume = plan_resume(server, &archived, wanted.map(Lsn))?;
        Some((resume.holes.iter().map(|hole| (hole.at.end(), hole.to.0)).collect(), resume.end.end()))
    }

    #[test]
    fn what_the_archive_lacks_from_the_wanted_position_on_is_asked_for_in_order() {
        let first = server(1, "");
        let hole = |from: u64, to: u64| (at(1, from * SEGMENT), to * SEGMENT);
        let plan = |whole: &[u64], pieces: &[(u64, u32)], wanted| {
            planned(&first, &[(1, held(whole, pieces))], wanted).unwrap()
        };
        assert_eq!(planned(&first, &[], Some(SEGMENT)), None);
        assert_eq!(planned(&first, &[(1, held(&[], &[]))], Some(SEGMENT)), None);
        let six = at(1, 6 * SEGMENT);
        assert_eq!(plan(&[1, 2, 3, 4, 5], &[], Some(SEGMENT)), (vec![], six));
        // The receiver was ended with 3 on its way and 4 and 5 stored; the server was told of nothing behind 2.
        assert_eq!(plan(&[1, 2, 4, 5], &[], Some(3 * SEGMENT + 28)), (vec![hole(3, 4)], six));
        // It was told of what was in a spool that is lost: that is not wanted, unless a basebackup needs it.
        assert_eq!(plan(&[1, 2, 4, 5], &[], Some(4 * SEGMENT)), (vec![], six));
        assert_eq!(plan(&[1, 2, 4, 5], &[], Some(9 * SEGMENT)), (vec![], six));
        assert_eq!(plan(&[1, 2, 4, 5], &[], None), (vec![], six));
        assert_eq!(plan(&[1, 2, 5], &[], Some(SEGMENT)), (vec![hole(3, 5)], six));
        assert_eq!(plan(&[2, 4, 5], &[], Some(SEGMENT)), (vec![hole(1, 2), hole(3, 4)], six));
    }

    #[test]
    fn pieces_prove_the_beginning_of_a_segment_and_that_those_before_it_were_written() {
        let first = server(1, "");
        let plan = |whole: &[u64], pieces: &[(u64, u32)]| {
            planned(&first, &[(1, held(whole, pieces))], Some(SEGMENT)).unwrap()
        };
        assert_eq!(plan(&[1, 2], &[(3, 100)]), (vec![], at(1, 3 * SEGMENT + 100)));
        let hole = (at(1, 3 * SEGMENT + 100), 4 * SEGMENT);
        assert_eq!(plan(&[1, 2], &[(3, 100), (4, 500)]), (vec![hole], at(1, 4 * SEGMENT + 500)));
        assert_eq!(plan(&[1, 2, 4], &[(3, 100)]), (vec![hole], at(1, 5 * SEGMENT)));
        assert_eq!(plan(&[], &[(1, 7)]), (vec![], at(1, SEGMENT + 7)));
    }

    #[test]
    fn holes_are_looked_for_on_the_way_of_the_server_and_nowhere_else() {
        let second = server(2, "1\t0/5000100\tx\n");
        let plan = |server: &ServerFacts, one: &[u64], two: &[u64], wanted: u64| {
            let archived = [(1, held(one, &[])), (2, held(two, &[]))];
            planned(server, &archived, Some(wanted * SEGMENT)).unwrap()
        };
        let seven = at(2, 7 * SEGMENT);
        // The segment of the switch point is there on the new timeline.
        assert_eq!(plan(&second, &[2, 3, 4], &[5, 6], 2), (vec![], seven));
        assert_eq!(plan(&second, &[2, 4], &[5, 6], 2), (vec![(at(1, 3 * SEGMENT), 4 * SEGMENT)], seven));
        assert_eq!(plan(&second, &[2, 4], &[5, 6], 6), (vec![], seven));
        assert_eq!(plan(&second, &[2, 3, 4], &[6], 2), (vec![(at(2, 5 * SEGMENT), 6 * SEGMENT)], seven));
        let both = vec![(at(1, 4 * SEGMENT), 5 * SEGMENT), (at(2, 5 * SEGMENT), 6 * SEGMENT)];
        assert_eq!(plan(&second, &[2, 3], &[6], 2), (both, seven));
        // The old primary went on for a while: what it wrote leads nowhere, and the new timeline is to come.
        let (holes, end) = plan(&second, &[2, 3, 4, 5, 7], &[], 2);
        assert_eq!((holes, end), (vec![], at(1, 8 * SEGMENT)));
        assert_eq!(plan_start(&second, Some(end), None), Ok(at(2, 5 * SEGMENT)));
        // Recovered to a point before timeline 2 began.
        let third = server(3, "1\t0/3000000\tx\n2\t0/3000000\ty\n");
        assert_eq!(plan(&third, &[1, 2], &[3, 5], 1), (vec![], at(1, 3 * SEGMENT)));
    }

    #[test]
    fn a_hole_that_is_given_up_makes_room_for_the_next_and_at_last_for_the_end() {
        let archived = [(tli(1), held(&[1, 3, 5], &[]))].into_iter().collect();
        let mut resume = plan_resume(&server(1, ""), &archived, Some(Lsn(SEGMENT))).unwrap();
        let [second, fourth, sixth] = [2, 4, 6].map(|number| at(1, number * SEGMENT));
        assert_eq!((resume.next_place().start, resume.give_up(fourth, None)), (second, None));
        assert_eq!(resume.give_up(second, None).unwrap().to, Lsn(3 * SEGMENT));
        assert_eq!((resume.next_place().start, resume.give_up(second, None)), (fourth, None));
        assert!(resume.give_up(fourth, None).is_some());
        assert_eq!((resume.next_place().start, resume.give_up(sixth, None)), (sixth, None));
    }

    #[test]
    fn of_a_hole_no_more_is_given_up_than_what_the_servers_have_removed() {
        let archived = [(tli(1), held(&[1, 7, 9], &[(2, 700)]))].into_iter().collect();
        let plan = || plan_resume(&server(1, ""), &archived, Some(Lsn(SEGMENT))).unwrap();
        let [second, fifth, eighth] = [2, 5, 8].map(|number| at(1, number * SEGMENT));
        let mut resume = plan();
        let lost = resume.give_up(second, Some(fifth.lsn)).unwrap();
        assert_eq!((lost.at.end(), lost.to), (at(1, 2 * SEGMENT + 700), fifth.lsn));
        assert_eq!(resume.next_place(), Place { start: fifth, stored: fifth.lsn });
        // That one was removed since.
        let lost = resume.give_up(fifth, None).unwrap();
        assert_eq!((lost.at.end(), lost.to), (fifth, Lsn(7 * SEGMENT)));
        assert_eq!(resume.next_place().start, eighth);
        // They have what follows the hole alone, or say of WAL that they have it and do not.
        for kept in [1, 2, 7, 8].map(|number| Lsn(number * SEGMENT)) {
            let mut resume = plan();
            assert_eq!(resume.give_up(second, Some(kept)).unwrap().to, Lsn(7 * SEGMENT), "{kept}");
            assert_eq!(resume.next_place().start, eighth);
        }
    }

    #[test]
    fn a_segment_that_is_there_in_part_is_received_from_its_beginning() {
        let archived = [(tli(1), held(&[1, 3], &[(2, 700), (4, 500)]))].into_iter().collect();
        let mut resume = plan_resume(&server(1, ""), &archived, Some(Lsn(SEGMENT))).unwrap();
        let second = Place { start: at(1, 2 * SEGMENT), stored: Lsn(2 * SEGMENT + 700) };
        assert_eq!(resume.next_place(), second);
        assert_eq!(resume.give_up(second.end(), None), None);
        assert_eq!(resume.give_up(second.start, None), Some(Hole { at: second, to: Lsn(3 * SEGMENT) }));
        assert_eq!(resume.next_place(), Place { start: at(1, 4 * SEGMENT), stored: Lsn(4 * SEGMENT + 500) });
    }
}
