//! Whether the objects of an archive are what their names say, by their signed headers or by all of their bytes.
//!
//! Needs no private key: signature, identity, size and the digest of what is stored are outside of the encryption.

use futures::StreamExt;

use crate::catalog::{TimelineCoverage, WalCoverage};
use crate::pg::{TimelineId, WalSegmentName, WalSegmentNumber};
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{WalHeader, read_wal_header, verify_wal};
use crate::repo::{ClusterId, Error, ErrorKind, Repository};

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
}

/// Objects that were looked at.
#[derive(Debug, Default)]
pub struct Examined {
    /// How many.
    pub objects: u64,
    /// Those that are not what their names say, by name.
    pub damaged: Vec<DamagedFile>,
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
    loop {
        let page = repository.store().list(&prefix, after.as_ref(), PAGE).await?;
        let names = page.iter().filter_map(|object| match layout.parse(&object.key) {
            Some(ObjectName::Wal(_, name)) => Some(name),
            _ => None,
        });
        // What stands before the oldest segment under a longer name sorts behind it.
        let names = names.filter(|name| name.segment().number(size).is_ok_and(|number| number >= oldest));
        // Pieces of a segment that is there as a whole serve nobody any more.
        let names = names.filter(|name| !is_superseded_piece(*name, held, cluster));
        let looks = names.map(|name| async move { (name, look(repository, cluster, name, depth).await) });
        let mut looks = futures::stream::iter(looks).buffered(at_once);
        while let Some((name, found)) = looks.next().await {
            examined.objects += 1;
            if let Some(reason) = judge(cluster, name, found)? {
                let key = layout.wal_object(cluster, name);
                let leaf = key.as_str().rsplit('/').next().unwrap_or_default().to_owned();
                examined.damaged.push(DamagedFile { name: leaf, reason });
            }
        }
        if page.len() < PAGE {
            return Ok(());
        }
        after = page.last().map(|object| object.key.clone());
    }
}

fn is_superseded_piece(name: WalObjectName, held: &TimelineCoverage, cluster: ClusterId) -> bool {
    let WalObjectName::Piece { segment, .. } = name else { return false };
    let Ok(number) = segment.number(cluster.segment_size) else { return false };
    held.contains(number) && !held.pieces.contains_key(&number)
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
                ErrorKind::Damaged => Ok(Some(error.to_string())),
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
