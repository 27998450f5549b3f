//! Whether the objects of an archive are what their names say, by their signed headers or by all of their bytes.
//!
//! Needs no private key: signature, identity, size and the digest of what is stored are outside of the encryption.
//! What is damaged and was superseded by something sound is in nobody's way, and no finding; nor are pieces that something
//! sound stands in for.

use futures::StreamExt;

use crate::catalog::{TimelineCoverage, WalCoverage};
use crate::pg::{TimelineId, WalSegmentName, WalSegmentNumber};
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{WalHeader, newest_wal, read_wal_header, verify_wal};
use crate::repo::{ClusterId, Error, ErrorKind, Repository};

use super::pieces::{DamagedPiece, Pieces};

/// How much of each object is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Its signed header.
    Headers,
    /// All of it, digested as it is stored.
    Bodies,
}

/// An object that is there and is not what its name says.
#[derive(Debug)]
pub struct DamagedFile {
    /// Its name in the archive.
    pub name: String,
    /// What is wrong.
    pub reason: String,
    /// The segment that readers cannot have as long as nothing supersedes it.
    pub segment: Option<WalSegmentName>,
}

/// An object that is damaged, and that readers pass over for another one.
#[derive(Debug)]
pub struct SupersededFile {
    /// Its name in the archive.
    pub name: String,
    /// The name of the one that they take.
    pub by: String,
    /// What is wrong.
    pub reason: String,
}

/// Objects that were looked at.
#[derive(Debug, Default)]
pub struct Examined {
    /// How many.
    pub objects: u64,
    /// Those that are not what their names say, by name.
    pub damaged: Vec<DamagedFile>,
    /// Those of which that does not matter any more.
    pub superseded: Vec<SupersededFile>,
}

impl Examined {
    /// Tells whether readers cannot have a segment that is there.
    pub fn is_damaged(&self, segment: WalSegmentName) -> bool {
        self.damaged.iter().any(|file| file.segment == Some(segment))
    }

    fn add(&mut self, pieces: Pieces, leaf: impl Fn(WalObjectName) -> String) {
        for DamagedPiece { name: piece, reason, by } in pieces.damaged() {
            let (segment, name) = (Some(piece.segment()), leaf(piece));
            match by.map(&leaf) {
                Some(by) => self.superseded.push(SupersededFile { name, by, reason }),
                None => self.damaged.push(DamagedFile { name, reason, segment }),
            }
        }
    }
}

/// Keys asked for at a time, as many as S3 gives.
const PAGE: usize = 1000;
/// Headers read at a time: some kilobytes each, so that the store's latency counts and not memory.
const HEADERS_MAX: usize = 32;
/// Bodies read at a time: up to 66 MiB each.
const BODIES_MAX: usize = 3;

/// Looks at every object of the WAL from `oldest` on.
///
/// # Errors
/// Where the store cannot tell.
pub async fn examine(
    repository: &Repository,
    cluster: ClusterId,
    coverage: &WalCoverage,
    oldest: WalSegmentNumber,
    depth: Depth,
) -> Result<Examined, Error> {
    let mut examined = Examined::default();
    for (timeline, held) in &coverage.timelines {
        examine_timeline(repository, cluster, (*timeline, held), oldest, depth, &mut examined).await?;
    }
    examined.damaged.sort_by(|a, b| a.name.cmp(&b.name));
    examined.superseded.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(examined)
}

async fn examine_timeline(
    repository: &Repository,
    cluster: ClusterId,
    (timeline, held): (TimelineId, &TimelineCoverage),
    oldest: WalSegmentNumber,
    depth: Depth,
    examined: &mut Examined,
) -> Result<(), Error> {
    let (layout, size) = (repository.layout(), cluster.segment_size);
    let prefix = layout.wal_timeline(cluster, timeline);
    let mut after = oldest.0.checked_sub(1).map(|before| {
        let before = WalSegmentName::new(timeline, WalSegmentNumber(before), size);
        layout.wal_object(cluster, WalObjectName::Segment(before))
    });
    let at_once = match depth {
        Depth::Headers => HEADERS_MAX,
        Depth::Bodies => BODIES_MAX,
    };
    // A segment's own object comes before its pieces, which serve nobody any more then.
    let (mut whole, mut pieces) = (None, Pieces::default());
    loop {
        let page = repository.store().list(&prefix, after.as_ref(), PAGE).await?;
        let names = page.iter().filter_map(|object| match layout.parse(&object.key) {
            Some(ObjectName::Wal(_, name)) => Some(name),
            _ => None,
        });
        // What stands before the oldest segment under a longer name sorts behind it.
        let names = names.filter(|name| name.segment().number(size).is_ok_and(|number| number >= oldest));
        let names = names.filter(|name| match name {
            WalObjectName::Segment(segment) => {
                whole = Some(*segment);
                true
            }
            WalObjectName::Piece { segment, .. } => whole != Some(*segment) && !held.forced.contains(segment),
            _ => true,
        });
        let names: Vec<WalObjectName> = names.collect();
        let looks =
            names.into_iter().map(|name| async move { (name, look(repository, cluster, name, depth).await) });
        let mut looks = futures::stream::iter(looks).buffered(at_once);
        while let Some((name, found)) = looks.next().await {
            examined.objects += 1;
            let wrong = judge(cluster, name, found)?;
            if let WalObjectName::Piece { segment, from, to } = name {
                pieces.add(segment, from..to, wrong);
                continue;
            }
            let Some(reason) = wrong else { continue };
            match superseded_by(repository, cluster, name, depth).await? {
                Some(by) => {
                    let (name, by) = (leaf(repository, cluster, name), leaf(repository, cluster, by));
                    examined.superseded.push(SupersededFile { name, by, reason });
                }
                None => {
                    let segment = is_form_of_segment(name).then(|| name.segment());
                    let name = leaf(repository, cluster, name);
                    examined.damaged.push(DamagedFile { name, reason, segment });
                }
            }
        }
        if page.len() < PAGE {
            break;
        }
        after = page.last().map(|object| object.key.clone());
    }
    examined.add(pieces, |name| leaf(repository, cluster, name));
    for segment in &held.forced {
        examine_forced(repository, cluster, *segment, oldest, examined).await?;
    }
    Ok(())
}

/// Looks for what no object shows by itself: several that supersede a segment, and none of them the newest.
async fn examine_forced(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    oldest: WalSegmentNumber,
    examined: &mut Examined,
) -> Result<(), Error> {
    let is_needed = segment.number(cluster.segment_size).is_ok_and(|number| number >= oldest);
    if !is_needed || examined.is_damaged(segment) {
        return Ok(());
    }
    match newest_wal(repository, cluster, segment).await {
        Err(error) if is_of_the_object(&error) => {
            let (name, reason) = (segment.to_string(), error.to_string());
            examined.damaged.push(DamagedFile { name, reason, segment: Some(segment) });
            Ok(())
        }
        newest => newest.map(drop),
    }
}

/// Returns the object that readers take instead of one that is damaged, if there is one and it is sound.
async fn superseded_by(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    depth: Depth,
) -> Result<Option<WalObjectName>, Error> {
    if !is_form_of_segment(name) {
        return Ok(None);
    }
    let newest = match newest_wal(repository, cluster, name.segment()).await {
        Err(error) if is_of_the_object(&error) => return Ok(None),
        newest => newest?,
    };
    if newest == name {
        return Ok(None);
    }
    match look(repository, cluster, newest, depth).await {
        Err(error) if error.is_absent() => Ok(None),
        found => Ok(judge(cluster, newest, found)?.is_none().then_some(newest)),
    }
}

/// Tells whether an error is the object's and not the store's. What seems to be of a later release is a finding as well:
/// no recovery by this one goes on behind it, and one bit that flipped looks the same.
fn is_of_the_object(error: &Error) -> bool {
    error.kind() == ErrorKind::Damaged || matches!(error, Error::NewerFormat { .. })
}

/// Tells whether an object is all of a segment: its own, or one that supersedes another.
fn is_form_of_segment(name: WalObjectName) -> bool {
    matches!(name, WalObjectName::Segment(_) | WalObjectName::Forced { .. })
}

fn leaf(repository: &Repository, cluster: ClusterId, name: WalObjectName) -> String {
    let key = repository.layout().wal_object(cluster, name);
    key.as_str().rsplit('/').next().unwrap_or_default().to_owned()
}

async fn look(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
    depth: Depth,
) -> Result<Option<WalHeader>, Error> {
    match (name, depth) {
        // A part is no object by itself: its segment names and verifies it.
        (WalObjectName::Part { .. }, _) => Ok(None),
        (_, Depth::Headers) => read_wal_header(repository, cluster, name).await.map(Some),
        (_, Depth::Bodies) => verify_wal(repository, cluster, name).await.map(Some),
    }
}

/// Says what is wrong with an object, if anything is.
fn judge(
    cluster: ClusterId,
    name: WalObjectName,
    found: Result<Option<WalHeader>, Error>,
) -> Result<Option<String>, Error> {
    let header = match found {
        Ok(Some(header)) => header,
        Ok(None) => return Ok(None),
        Err(error) => {
            return match error.kind() {
                _ if is_of_the_object(&error) => Ok(Some(error.to_string())),
                // Expired between the listing and now.
                ErrorKind::Absent => Ok(None),
                _ => Err(error),
            };
        }
    };
    let segment_size = u64::from(cluster.segment_size.bytes());
    let expected = match name {
        WalObjectName::Segment(_) | WalObjectName::Forced { .. } => segment_size,
        WalObjectName::Piece { from, to, .. } => u64::from(to.saturating_sub(from)),
        WalObjectName::Partial { .. } => segment_size,
        WalObjectName::BackupHistory { .. } | WalObjectName::Part { .. } => return Ok(None),
    };
    let size = header.raw_size;
    Ok((size != expected).then(|| format!("it holds {size} bytes, and {expected} are expected")))
}
