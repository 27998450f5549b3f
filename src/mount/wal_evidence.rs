//! Whether a segment that is not in the archive was ever written, by what else the archive holds.
//!
//! A later segment of its timeline, a head, or a timeline that left this one behind it proves that it was: it is
//! missing. Pieces prove it too; where nothing shows that there was more than they hold, the archive ends in them.
//! Deliberately absent: the plan of a recovery, which decides all of this beforehand.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::catalog::TimelineTree;
use crate::catalog::timeline_tree::list_histories;
use crate::pg::{Lsn, TimelineId, WalSegmentName};
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{HistoryBranch, newest_head, read_history_branch};
use crate::repo::{ClusterId, Error, Repository};

/// Whether a segment that is not in the archive was ever written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Absence {
    /// Nothing shows that it was.
    Proven,
    /// Its beginning is there in pieces, up to here, and nothing shows that there was more.
    EndsIn(Lsn),
    /// Something shows that it was written, or more of it than there is.
    Hole { evidence: String },
}

/// What looks for it, in the archive of one cluster.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Branch points read so far; they never change.
    branches: Mutex<HashMap<TimelineId, HistoryBranch>>,
}

/// What the archive holds of a timeline from a segment on that is not there itself.
#[derive(Debug, Default)]
struct Rest {
    /// How many bytes of the segment its pieces hold, without a gap.
    piece_bytes: u32,
    /// A later segment or piece.
    later: Option<String>,
}

/// Keys asked for at a time.
const PAGE: usize = 1000;

impl Evidence {
    /// Looks at everything that may show that a segment was written.
    pub(super) async fn look(
        &self,
        repository: &Repository,
        cluster: ClusterId,
        segment: WalSegmentName,
    ) -> Result<Absence, Error> {
        // In a site that is gone everything is absent, and nothing proven.
        repository.store().head(&repository.layout().site()).await?;
        let rest = rest_of(repository, cluster, segment).await?;
        if let Some(evidence) = rest.later {
            return Ok(Absence::Hole { evidence });
        }
        let size = cluster.segment_size;
        let (Ok(start), Ok(end)) = (segment.start_lsn(size), segment.end_lsn(size)) else {
            return Ok(Absence::Proven);
        };
        let reached = start + u64::from(rest.piece_bytes);
        let head = newest_head(repository, cluster, segment.timeline()).await?;
        if let Some(head) = head.filter(|head| reached < head.end) {
            let evidence = format!("the archive reached {} on {}", head.end, head.written_at);
            return Ok(Absence::Hole { evidence });
        }
        let tree = self.timelines(repository, cluster).await?;
        let mut switched_at = None;
        for timeline in tree.timelines() {
            let way = tree.way_to(timeline);
            let left = way.iter().find(|stretch| stretch.timeline == segment.timeline());
            let Some(switch) = left.and_then(|stretch| stretch.end).filter(|switch| start < *switch) else {
                continue;
            };
            // What was left inside of the segment goes on in the other timeline's segment of this number.
            if end <= switch || (rest.piece_bytes > 0 && reached < switch) {
                let evidence = format!("timeline {timeline} goes through it and left it at {switch}");
                return Ok(Absence::Hole { evidence });
            }
            switched_at = switched_at.into_iter().chain([switch]).min();
        }
        Ok(match rest.piece_bytes {
            0 => Absence::Proven,
            // Whoever comes here follows no timeline but this one, or has nothing of the other one's segment.
            _ => Absence::EndsIn(switched_at.map_or(reached, |switch| reached.min(switch))),
        })
    }

    /// Returns the timelines as the archive has them now, reading only the histories that are new.
    async fn timelines(&self, repository: &Repository, cluster: ClusterId) -> Result<TimelineTree, Error> {
        let mut branches = Vec::new();
        for timeline in list_histories(repository, cluster).await? {
            let known = self.branches.lock().expect("no holder of this lock panics").get(&timeline).copied();
            let branch = match known {
                Some(branch) => branch,
                None => read_history_branch(repository, cluster, timeline).await?,
            };
            self.branches.lock().expect("no holder of this lock panics").insert(timeline, branch);
            branches.push((timeline, branch));
        }
        Ok(TimelineTree::new(branches))
    }
}

async fn rest_of(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Rest, Error> {
    let layout = repository.layout();
    let folder = layout.wal_timeline(cluster, segment.timeline());
    let mut after = layout.wal_object(cluster, WalObjectName::Segment(segment));
    let (mut pieces, mut rest) = (Vec::new(), Rest::default());
    loop {
        let page = repository.store().list(&folder, Some(&after), PAGE).await?;
        for object in &page {
            rest.later = match layout.parse(&object.key) {
                Some(ObjectName::Wal(_, WalObjectName::Segment(later))) if later > segment => {
                    Some(format!("{later} is there"))
                }
                Some(ObjectName::Wal(_, WalObjectName::Piece { segment: later, from, to }))
                    if later >= segment =>
                {
                    pieces.push((from, to));
                    (later > segment).then(|| format!("pieces of {later} are there"))
                }
                _ => continue,
            };
            if rest.later.is_some() {
                return Ok(rest);
            }
        }
        match page.last() {
            Some(last) if page.len() == PAGE => after = last.key.clone(),
            _ => break,
        }
    }
    pieces.sort_unstable();
    for (from, to) in pieces {
        if from > rest.piece_bytes {
            rest.later =
                Some(format!("a piece from byte {from} of it is there, and none from {}", rest.piece_bytes));
            break;
        }
        rest.piece_bytes = rest.piece_bytes.max(to);
    }
    Ok(rest)
}
