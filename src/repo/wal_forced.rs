//! Segments that take the place of another of their name: `wal push --force`.
//!
//! Nothing in the archive is rewritten. A superseding object stands beside what it replaces, and its signed header names
//! each object that was the newest when it was made. The newest is the one that no other names. Two that were made at
//! once both are: then the greater name counts, for every reader alike, until a further one names both. An object that
//! cannot be verified and that none names is never passed over, because what it replaces may be what nobody is to read;
//! a further superseding object mends that too. Deliberately absent: removing what was replaced (the sweep).

use bytes::Bytes;

use crate::codec::{Compression, Digest, Hasher};
use crate::pg::WalSegmentName;
use crate::repo::error::Error;
use crate::repo::forced_index::ForcedListing;
use crate::repo::header::Section;
use crate::repo::id::ClusterId;
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::raw_content::RawContent;
use crate::repo::repository::Repository;
use crate::repo::wal_object::{Archived, archive};
use crate::repo::wal_reading::{compare, read, read_header};
use crate::repo::wal_sealing::{Sealing, WalKey};
use crate::repo::wal_target::{WAL_OBJECT_BYTES_MAX, wal_target};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// Superseding objects of one segment: each is a person's decision.
const FORCED_MAX: usize = 64;
/// Keys asked for at a time, so that one request tells of the next thousand segments too.
const PAGE: usize = 1000;

/// A superseding object, and what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    name: WalObjectName,
    /// The salted digest of its content, which no two objects share; of all its bytes where it could not be verified.
    digest: Digest,
    /// What it replaces; nothing where it could not be verified, and then why.
    supersedes: Result<Vec<Superseded>, String>,
}

/// What a superseding object says of another that it replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Superseded {
    /// The salted digest of its content, or of all its bytes where it could not be verified.
    digest: Digest,
    /// The digits of its name; zeros for the segment's own object.
    name: [u8; 4],
}

/// What a segment is archived in the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// Whatever is not the same.
    Anything,
    /// What is damaged, not trusted or, as it seems, of a newer format, and nothing else.
    Damaged,
}

/// Archives a segment in the place of what stands under its name, which stays; where nothing stands, under the name itself.
///
/// # Errors
/// `Different` where readers get another segment that is sound, and only what is damaged may be replaced; where the
/// store fails. In no case is anything replaced by half.
pub async fn supersede_wal(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    replace: Replace,
    raw: &RawContent,
    key: &WalKey,
    compression: Compression,
) -> Result<Archived, Error> {
    let sealing = Sealing::new(repository, key, compression);
    let claims = read_claims(repository, cluster, segment).await?;
    let newest = newest_claims(claims.clone());
    let taken = if claims.is_empty() { Ok(WalObjectName::Segment(segment)) } else { decide(&newest) };
    // Where readers get none, nothing is compared: what some object holds is no help to them.
    if let Ok(name) = taken {
        match compare(repository, &wal_target(repository, cluster, name), raw).await {
            Err(error) if error.is_absent() && claims.is_empty() => {
                let target = wal_target(repository, cluster, name);
                return archive(repository, target, raw, &sealing, Vec::new()).await;
            }
            Err(error) if replace.allows(&error) => {}
            compared => return compared,
        }
    }
    // Of those that supersede each other none is the newest, and all are replaced.
    let replaced = if newest.is_empty() { &claims } else { &newest };
    let mut superseded: Vec<Superseded> = replaced.iter().map(Superseded::of).collect();
    if superseded.is_empty() {
        let standing = read_claim(repository, cluster, WalObjectName::Segment(segment)).await?;
        superseded.push(Superseded::of(&standing));
    }
    let name = forced_name(segment, &superseded, raw).await?;
    let target = wal_target(repository, cluster, name);
    archive(repository, target, raw, &sealing, vec![encode(&superseded)]).await
}

/// Returns the object that a reader of a segment takes, by what the archive lists now: its own, or the one that
/// supersedes it. Whether that one can be read is told when it is.
///
/// # Errors
/// `Damaged` where it cannot be decided between several.
pub async fn newest_wal(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<WalObjectName, Error> {
    let forced = newest_forced(repository, cluster, segment).await?;
    Ok(forced.unwrap_or(WalObjectName::Segment(segment)))
}

/// Decides about a segment that something else stands in the place of, or seems to: what is newest counts.
pub(super) async fn settle(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
    raw: &RawContent,
    standing: Result<Archived, Error>,
) -> Result<Archived, Error> {
    if standing.as_ref().is_err_and(|error| !is_replaceable(error)) {
        return standing;
    }
    match newest_forced(repository, cluster, segment).await? {
        Some(name) => compare(repository, &wal_target(repository, cluster, name), raw).await,
        None => standing,
    }
}

/// Reads the newest object of a segment.
///
/// What stands under the segment's own name is read at once; whether another supersedes it is known from a listing, or
/// is asked for meanwhile.
pub(super) async fn read_segment(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Bytes, Error> {
    let target = wal_target(repository, cluster, WalObjectName::Segment(segment));
    let now = repository.clock().monotonic();
    let known = repository.forced_index().is_forced(cluster, segment, now);
    let (is_forced, standing) = match known {
        Some(true) => (true, None),
        Some(false) => (false, Some(read(repository, &target).await)),
        None => {
            let (listed, standing) =
                futures::join!(look(repository, cluster, segment), read(repository, &target));
            (listed?, Some(standing))
        }
    };
    match standing {
        Some(Ok(bytes)) if !is_forced => return Ok(bytes),
        // What was known may be old: somebody may have mended it since.
        Some(Err(error)) if !is_forced && (known.is_none() || !is_replaceable(&error)) => return Err(error),
        _ => {}
    }
    match (newest_forced(repository, cluster, segment).await?, standing) {
        (Some(name), _) => read(repository, &wal_target(repository, cluster, name)).await,
        (None, Some(standing)) => standing,
        (None, None) => read(repository, &target).await,
    }
}

/// Tells whether anything supersedes a segment, by what is known of the last moments or else by a listing.
pub async fn is_superseded(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<bool, Error> {
    let now = repository.clock().monotonic();
    match repository.forced_index().is_forced(cluster, segment, now) {
        Some(known) => Ok(known),
        None => look(repository, cluster, segment).await,
    }
}

/// Lists what supersedes a segment and those behind it, remembers that, and says whether anything supersedes this one.
async fn look(repository: &Repository, cluster: ClusterId, segment: WalSegmentName) -> Result<bool, Error> {
    let layout = repository.layout();
    let listed_at = repository.clock().monotonic();
    let folder = layout.wal_log(cluster, segment.timeline(), segment.log());
    let after = layout.before_forced(cluster, segment);
    let page = repository.store().list(&folder, Some(&after), PAGE).await?;
    let names = page.iter().filter_map(|object| match layout.parse(&object.key) {
        Some(ObjectName::Wal(_, name)) => Some(name),
        _ => None,
    });
    let (mut forced, mut last) = (Vec::new(), segment);
    for name in names {
        last = last.max(name.segment());
        forced.extend(matches!(name, WalObjectName::Forced { .. }).then(|| name.segment()));
    }
    let is_forced = forced.contains(&segment);
    // Of the last one there may be more on the next page.
    let is_whole = page.len() < PAGE;
    repository.forced_index().note(ForcedListing {
        cluster,
        timeline: segment.timeline(),
        segments: segment..=last,
        but_last: !is_whole && last != segment,
        forced,
        listed_at: Some(listed_at),
    });
    Ok(is_forced)
}

/// Returns the object that a reader takes instead of the segment's own, if there is one.
pub(super) async fn newest_forced(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Option<WalObjectName>, Error> {
    let names = list_forced(repository, cluster, segment).await?;
    if let [] | [_] = names[..] {
        // A single one is verified when it is read.
        return Ok(names.first().copied());
    }
    let claims = read_claims(repository, cluster, segment).await?;
    let damaged = |detail| Error::damaged(format!("WAL segment {segment}"), detail);
    decide(&newest_claims(claims)).map(Some).map_err(damaged)
}

/// Decides which of the newest a reader takes, or says why none.
fn decide(newest: &[Claim]) -> Result<WalObjectName, String> {
    if let Some(detail) = newest.iter().find_map(|claim| claim.supersedes.as_ref().err()) {
        return Err(format!("what supersedes it cannot be verified: {detail}"));
    }
    pick(newest).ok_or_else(|| "what supersedes it supersedes each other".to_owned())
}

async fn list_forced(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Vec<WalObjectName>, Error> {
    let layout = repository.layout();
    let folder = layout.wal_log(cluster, segment.timeline(), segment.log());
    let after = layout.before_forced(cluster, segment);
    let page = repository.store().list(&folder, Some(&after), FORCED_MAX + 1).await?;
    let names = page.iter().map_while(|object| match layout.parse(&object.key) {
        Some(ObjectName::Wal(_, name @ WalObjectName::Forced { .. })) => Some(name),
        _ => None,
    });
    let names: Vec<WalObjectName> = names.filter(|name| name.segment() == segment).collect();
    if names.len() > FORCED_MAX {
        let detail = format!("it was superseded more than {FORCED_MAX} times");
        return Err(Error::damaged(format!("WAL segment {segment}"), detail));
    }
    Ok(names)
}

async fn read_claims(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<Vec<Claim>, Error> {
    let mut claims = Vec::new();
    for name in list_forced(repository, cluster, segment).await? {
        claims.push(read_claim(repository, cluster, name).await?);
    }
    Ok(claims)
}

/// Reads what an object says of itself; one that cannot be verified is known by the digest of its bytes as they are.
async fn read_claim(
    repository: &Repository,
    cluster: ClusterId,
    name: WalObjectName,
) -> Result<Claim, Error> {
    let target = wal_target(repository, cluster, name);
    let said = read_header(repository, &target).await.and_then(|(header, wal)| match name {
        WalObjectName::Forced { .. } => {
            let supersedes = decode(header.section(Section::Supersedes, &target.object)?);
            let supersedes = supersedes.map_err(|error| target.damaged_header(error))?;
            Ok((wal.content_digest, supersedes))
        }
        _ => Ok((wal.content_digest, Vec::new())),
    });
    match said {
        Ok((digest, supersedes)) => Ok(Claim { name, digest, supersedes: Ok(supersedes) }),
        Err(error) if error.is_unusable() => {
            let bytes = repository.store().get(&target.key, WAL_OBJECT_BYTES_MAX).await?;
            Ok(Claim { name, digest: Digest::of(&bytes), supersedes: Err(error.to_string()) })
        }
        Err(error) => Err(error),
    }
}

/// Keeps those that no other supersedes.
///
/// Digest or name will do: the name alone remains of what was damaged after it was replaced, or was misread when the
/// other was made, and a name is used once.
fn newest_claims(claims: Vec<Claim>) -> Vec<Claim> {
    let is_named = |claim: &Claim| {
        let this = Superseded::of(claim);
        let mut others = claims.iter().filter_map(|other| other.supersedes.as_ref().ok()).flatten();
        others.any(|other| other.digest == this.digest || other.name == this.name)
    };
    claims.iter().filter(|claim| !is_named(claim)).cloned().collect()
}

/// Decides between those that nothing supersedes: they were made at the same time, and any rule will do that all follow.
fn pick(newest: &[Claim]) -> Option<WalObjectName> {
    newest.iter().map(|claim| claim.name).max()
}

fn is_replaceable(error: &Error) -> bool {
    matches!(error, Error::Different { .. }) || error.is_unusable()
}

/// Names a superseding object after what it replaces and what it holds: the same content may come back later, and is
/// another object then.
async fn forced_name(
    segment: WalSegmentName,
    superseded: &[Superseded],
    raw: &RawContent,
) -> Result<WalObjectName, Error> {
    let mut hasher = Hasher::new();
    superseded.iter().for_each(|superseded| {
        hasher.update(superseded.digest.as_bytes());
    });
    let Digest([a, b, c, d, ..]) = raw.apart(move |raw| raw.digest(hasher)).await?;
    Ok(WalObjectName::Forced { segment, digest: [a, b, c, d] })
}

impl Replace {
    fn allows(self, error: &Error) -> bool {
        match self {
            Self::Anything => is_replaceable(error),
            Self::Damaged => error.is_unusable(),
        }
    }
}

impl Superseded {
    fn of(claim: &Claim) -> Self {
        let name = match claim.name {
            WalObjectName::Forced { digest, .. } => digest,
            _ => [0; 4],
        };
        Self { digest: claim.digest, name }
    }
}

fn encode(superseded: &[Superseded]) -> (Section, WireWriter) {
    let mut section = WireWriter::new();
    section.varint(superseded.len() as u64);
    superseded.iter().for_each(|superseded| {
        section.raw(superseded.digest.as_bytes()).raw(&superseded.name);
    });
    (Section::Supersedes, section)
}

fn decode(mut section: WireReader<'_>) -> Result<Vec<Superseded>, WireError> {
    let count = section.bounded("count of superseded objects", FORCED_MAX as u64)?;
    let mut read = || Ok(Superseded { digest: Digest(section.array()?), name: section.array()? });
    let superseded = (0..count).map(|_| read()).collect::<Result<_, _>>()?;
    section.finish().map(|()| superseded)
}

#[cfg(test)]
mod tests;
