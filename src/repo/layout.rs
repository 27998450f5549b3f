//! Where every object of a site stands: the only file that builds and parses object keys.
//!
//! A site is one folder of the store. Everything below it is built here from typed names and parsed back into
//! them, and the two are inverse. Keys never hold anything a user typed except the site's prefix.

use crate::codec::{DataKeyId, RecipientId};
use crate::pg::{TimelineId, WalSegmentName};
use crate::repo::id::{BasebackupId, ClusterId, HeadId, PackId};
use crate::storage::ObjectKey;

/// Builds and parses the keys of one site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    site: ObjectKey,
}

/// What stands in a folder of the WAL archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalObjectName {
    /// A complete segment.
    Segment(WalSegmentName),
    /// A `.partial`, named after its content: two standbys may leave one timeline with different ones.
    Partial { segment: WalSegmentName, digest: [u8; 4] },
    /// The backup history file of an exclusive or non-exclusive backup.
    BackupHistory { segment: WalSegmentName, offset: u32 },
    /// The bytes `from..to` of a segment that was still being written when they came.
    Piece { segment: WalSegmentName, from: u32, to: u32 },
    /// A segment that takes the place of another of its name; the digest is of what it replaces and of its content.
    Forced { segment: WalSegmentName, digest: [u8; 4] },
    /// One part of a large segment; the salt is drawn anew at each attempt to store the segment.
    Part { segment: WalSegmentName, salt: [u8; 4], number: u32 },
}

/// What an object key of a site means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectName {
    /// `site.json`
    Site,
    /// `basebackups/<id>/begin`
    Begin(BasebackupId),
    /// `basebackups/<id>/backup.json`
    Outcome(BasebackupId),
    /// `basebackups/<id>/expired`
    Expired(BasebackupId),
    /// `basebackups/<id>/manifest`
    Manifest(BasebackupId),
    /// `basebackups/<id>/refs`
    Refs(BasebackupId),
    /// `basebackups/<id>/packs/<n>-<8 hex of salt>`
    Pack(PackId, [u8; 4]),
    /// `clusters/<c>/accepted`
    Accepted(ClusterId),
    /// `clusters/<c>/wal/<tli>/<log>/…`
    Wal(ClusterId, WalObjectName),
    /// `clusters/<c>/history/<tli>.history`
    History(ClusterId, TimelineId),
    /// `clusters/<c>/heads/<tli>/<time>-<random>`
    Head(ClusterId, TimelineId, HeadId),
}

impl Layout {
    /// Creates the layout of the site that stands in the folder `site` of the store.
    pub fn new(site: ObjectKey) -> Self {
        Self { site }
    }

    /// `site.json`
    pub fn site(&self) -> ObjectKey {
        self.key("site.json")
    }

    /// `basebackups/`, the folder whose sub-folders are the ids.
    pub fn basebackups(&self) -> String {
        format!("{}/basebackups/", self.site)
    }

    /// The id that a sub-folder of [`Layout::basebackups`] is named after.
    pub fn parse_basebackup_folder(&self, folder: &str) -> Option<BasebackupId> {
        folder.strip_prefix(&self.basebackups())?.trim_end_matches('/').parse().ok()
    }

    /// `basebackups/<id>/begin`, the intent.
    pub fn begin(&self, id: BasebackupId) -> ObjectKey {
        self.key(&format!("basebackups/{id}/begin"))
    }

    /// `basebackups/<id>/backup.json`, the outcome.
    pub fn outcome(&self, id: BasebackupId) -> ObjectKey {
        self.key(&format!("basebackups/{id}/backup.json"))
    }

    /// `basebackups/<id>/expired`, the mark of retention.
    pub fn expired(&self, id: BasebackupId) -> ObjectKey {
        self.key(&format!("basebackups/{id}/expired"))
    }

    /// `basebackups/<id>/manifest`
    pub fn manifest(&self, id: BasebackupId) -> ObjectKey {
        self.key(&format!("basebackups/{id}/manifest"))
    }

    /// `basebackups/<id>/refs`
    pub fn refs(&self, id: BasebackupId) -> ObjectKey {
        self.key(&format!("basebackups/{id}/refs"))
    }

    /// `basebackups/<id>/packs/`
    pub fn packs(&self, id: BasebackupId) -> String {
        format!("{}/basebackups/{id}/packs/", self.site)
    }

    /// `basebackups/<id>/packs/<n>-<8 hex of salt>`
    pub fn pack(&self, pack: PackId, salt: &[u8; 32]) -> ObjectKey {
        let PackId { origin, number } = pack;
        self.key(&format!("basebackups/{origin}/packs/{number}-{}", hex::encode(&salt[..4])))
    }

    /// `keys/<data key id>/<recipient>`, a copy of a data key wrapped later for one more recipient.
    pub fn rewrapped_key(&self, key: DataKeyId, recipient: RecipientId) -> ObjectKey {
        self.key(&format!("keys/{key}/{recipient}"))
    }

    /// `leases/<id>/<random>/<n>`
    pub fn lease(&self, id: BasebackupId, random: &[u8; 8], n: u32) -> ObjectKey {
        self.key(&format!("leases/{id}/{}/{n}", hex::encode(random)))
    }

    /// `leases/<id>/<random>/end`
    pub fn lease_end(&self, id: BasebackupId, random: &[u8; 8]) -> ObjectKey {
        self.key(&format!("leases/{id}/{}/end", hex::encode(random)))
    }

    /// `pins/<id>/<random>`
    pub fn pin(&self, id: BasebackupId, random: &[u8; 8]) -> ObjectKey {
        self.key(&format!("pins/{id}/{}", hex::encode(random)))
    }

    /// `pins/<id>/<random>.end`
    pub fn pin_end(&self, id: BasebackupId, random: &[u8; 8]) -> ObjectKey {
        self.key(&format!("pins/{id}/{}.end", hex::encode(random)))
    }

    /// `probe/<random>`
    pub fn probe(&self, random: &[u8; 8]) -> ObjectKey {
        self.key(&format!("probe/{}", hex::encode(random)))
    }

    /// `clusters/`, the folder whose sub-folders are the clusters.
    pub fn clusters(&self) -> String {
        format!("{}/clusters/", self.site)
    }

    /// The cluster that a sub-folder of [`Layout::clusters`] is named after.
    pub fn parse_cluster_folder(&self, folder: &str) -> Option<ClusterId> {
        folder.strip_prefix(&self.clusters())?.trim_end_matches('/').parse().ok()
    }

    /// `clusters/<c>/accepted`: the site is of this cluster.
    pub fn accepted(&self, cluster: ClusterId) -> ObjectKey {
        self.key(&format!("clusters/{cluster}/accepted"))
    }

    /// `clusters/<c>/history/`
    pub fn histories(&self, cluster: ClusterId) -> String {
        format!("{}/clusters/{cluster}/history/", self.site)
    }

    /// `clusters/<c>/history/<tli>.history`
    pub fn history(&self, cluster: ClusterId, timeline: TimelineId) -> ObjectKey {
        self.key(&format!("clusters/{cluster}/history/{}.history", timeline.hex8()))
    }

    /// `clusters/<c>/heads/<tli>/`
    pub fn heads(&self, cluster: ClusterId, timeline: TimelineId) -> String {
        format!("{}/clusters/{cluster}/heads/{}/", self.site, timeline.hex8())
    }

    /// `clusters/<c>/heads/<tli>/<time>-<random>`
    pub fn head(&self, cluster: ClusterId, timeline: TimelineId, id: HeadId) -> ObjectKey {
        self.key(&format!("clusters/{cluster}/heads/{}/{id}", timeline.hex8()))
    }

    /// `clusters/<c>/wal/`, below it one folder for each timeline.
    pub fn wal(&self, cluster: ClusterId) -> String {
        format!("{}/clusters/{cluster}/wal/", self.site)
    }

    /// `clusters/<c>/wal/<tli>/`, below it one folder for each log.
    pub fn wal_timeline(&self, cluster: ClusterId, timeline: TimelineId) -> String {
        format!("{}/clusters/{cluster}/wal/{}/", self.site, timeline.hex8())
    }

    /// `clusters/<c>/wal/<tli>/<log>/`
    pub fn wal_log(&self, cluster: ClusterId, timeline: TimelineId, log: u32) -> String {
        format!("{}/clusters/{cluster}/wal/{}/{log:08X}/", self.site, timeline.hex8())
    }

    /// The timeline that a sub-folder of [`Layout::wal`] is named after.
    pub fn parse_timeline_folder(&self, cluster: ClusterId, folder: &str) -> Option<TimelineId> {
        parse_hex8(folder.strip_prefix(&self.wal(cluster))?.trim_end_matches('/')).and_then(TimelineId::new)
    }

    /// The log number that a sub-folder of [`Layout::wal_timeline`] is named after.
    pub fn parse_log_folder(&self, cluster: ClusterId, timeline: TimelineId, folder: &str) -> Option<u32> {
        parse_hex8(folder.strip_prefix(&self.wal_timeline(cluster, timeline))?.trim_end_matches('/'))
    }

    /// `clusters/<c>/wal/<tli>/<log>/<24 hex>…`
    pub fn wal_object(&self, cluster: ClusterId, name: WalObjectName) -> ObjectKey {
        let segment = name.segment();
        let leaf = match name {
            WalObjectName::Segment(segment) => segment.to_string(),
            WalObjectName::Partial { segment, digest } => {
                format!("{segment}.partial.{}", hex::encode(digest))
            }
            WalObjectName::BackupHistory { segment, offset } => {
                format!("{segment}.{offset:08X}.backup")
            }
            WalObjectName::Piece { segment, from, to } => format!("{segment}.{from:08X}-{to:08X}.piece"),
            WalObjectName::Forced { segment, digest } => format!("{segment}.forced.{}", hex::encode(digest)),
            WalObjectName::Part { segment, salt, number } => {
                format!("{segment}.{}.{number}.part", hex::encode(salt))
            }
        };
        let (timeline, log) = (segment.timeline().hex8(), segment.log());
        self.key(&format!("clusters/{cluster}/wal/{timeline}/{log:08X}/{leaf}"))
    }

    /// A key that sorts before every superseding object of a segment, and behind what else of it sorts before those.
    pub fn before_forced(&self, cluster: ClusterId, segment: WalSegmentName) -> ObjectKey {
        let (timeline, log) = (segment.timeline().hex8(), segment.log());
        self.key(&format!("clusters/{cluster}/wal/{timeline}/{log:08X}/{segment}.forced"))
    }

    /// Returns what `key` means, or nothing for a key of another site, a later version or a stranger.
    pub fn parse(&self, key: &ObjectKey) -> Option<ObjectName> {
        let path = key.as_str().strip_prefix(self.site.as_str())?.strip_prefix('/')?;
        let parts: Vec<&str> = path.split('/').collect();
        let name = match parts[..] {
            ["site.json"] => ObjectName::Site,
            ["basebackups", id, leaf] => {
                let id = id.parse().ok()?;
                match leaf {
                    "begin" => ObjectName::Begin(id),
                    "backup.json" => ObjectName::Outcome(id),
                    "expired" => ObjectName::Expired(id),
                    "manifest" => ObjectName::Manifest(id),
                    "refs" => ObjectName::Refs(id),
                    _ => return None,
                }
            }
            ["basebackups", id, "packs", leaf] => {
                let (number, salt) = leaf.split_once('-')?;
                let pack = PackId { origin: id.parse().ok()?, number: parse_number(number)? };
                ObjectName::Pack(pack, parse_hex4(salt)?)
            }
            ["clusters", cluster, "accepted"] => ObjectName::Accepted(cluster.parse().ok()?),
            ["clusters", cluster, "history", leaf] => {
                let timeline = TimelineId::new(parse_hex8(leaf.strip_suffix(".history")?)?)?;
                ObjectName::History(cluster.parse().ok()?, timeline)
            }
            ["clusters", cluster, "heads", timeline, id] => {
                let timeline = TimelineId::new(parse_hex8(timeline)?)?;
                ObjectName::Head(cluster.parse().ok()?, timeline, id.parse().ok()?)
            }
            ["clusters", cluster, "wal", _, _, leaf] => {
                ObjectName::Wal(cluster.parse().ok()?, WalObjectName::parse(leaf)?)
            }
            _ => return None,
        };
        Some(name)
    }

    fn key(&self, path: &str) -> ObjectKey {
        self.site.join(path).expect("typed names make valid keys")
    }
}

impl WalObjectName {
    /// Returns the segment that the object is, or is part of, or is about.
    pub fn segment(&self) -> WalSegmentName {
        match *self {
            Self::Segment(segment)
            | Self::Partial { segment, .. }
            | Self::BackupHistory { segment, .. }
            | Self::Piece { segment, .. }
            | Self::Forced { segment, .. }
            | Self::Part { segment, .. } => segment,
        }
    }

    fn parse(leaf: &str) -> Option<Self> {
        let (segment, suffix) = leaf.split_at_checked(24)?;
        let segment: WalSegmentName = segment.parse().ok()?;
        if suffix.is_empty() {
            return Some(Self::Segment(segment));
        }
        if let Some(digest) = suffix.strip_prefix(".partial.") {
            return Some(Self::Partial { segment, digest: parse_hex4(digest)? });
        }
        if let Some(digest) = suffix.strip_prefix(".forced.") {
            return Some(Self::Forced { segment, digest: parse_hex4(digest)? });
        }
        if let Some(part) = suffix.strip_suffix(".part") {
            let (salt, number) = part.strip_prefix('.')?.split_once('.')?;
            return Some(Self::Part { segment, salt: parse_hex4(salt)?, number: parse_number(number)? });
        }
        if let Some(range) = suffix.strip_suffix(".piece") {
            let (from, to) = range.strip_prefix('.')?.split_once('-')?;
            let (from, to) = (parse_hex8(from)?, parse_hex8(to)?);
            return (from < to).then_some(Self::Piece { segment, from, to });
        }
        let offset = parse_hex8(suffix.strip_prefix('.')?.strip_suffix(".backup")?)?;
        Some(Self::BackupHistory { segment, offset })
    }
}

fn parse_number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn parse_hex4(text: &str) -> Option<[u8; 4]> {
    let bytes: [u8; 4] = hex::decode(text).ok()?.try_into().ok()?;
    (hex::encode(bytes) == text).then_some(bytes)
}

fn parse_hex8(text: &str) -> Option<u32> {
    let number = u32::from_str_radix(text, 16).ok()?;
    (format!("{number:08X}") == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(ObjectKey::parse("prefix/main").unwrap())
    }

    #[test]
    fn every_key_is_parsed_back_into_its_name() {
        let layout = layout();
        let id: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let segment: WalSegmentName = "00000002000000A0000000FF".parse().unwrap();
        let timeline = TimelineId::new(2).unwrap();
        let pack = PackId { origin: id, number: 17 };
        let mut salt = [0; 32];
        salt[..4].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
        let partial = WalObjectName::Partial { segment, digest: [1, 2, 3, 4] };
        let label = WalObjectName::BackupHistory { segment, offset: 0x28 };
        let piece = WalObjectName::Piece { segment, from: 0xAB_CDEF, to: 0x100_0000 };
        let forced = WalObjectName::Forced { segment, digest: [0xde, 0xad, 0xbe, 0xef] };
        let part = WalObjectName::Part { segment, salt: [9, 0, 0, 1], number: 15 };
        let head: HeadId = "20261120T101500Z-3fa9".parse().unwrap();
        for (key, name) in [
            (layout.site(), ObjectName::Site),
            (layout.begin(id), ObjectName::Begin(id)),
            (layout.outcome(id), ObjectName::Outcome(id)),
            (layout.expired(id), ObjectName::Expired(id)),
            (layout.manifest(id), ObjectName::Manifest(id)),
            (layout.refs(id), ObjectName::Refs(id)),
            (layout.pack(pack, &salt), ObjectName::Pack(pack, [0xde, 0xad, 0xbe, 0xef])),
            (layout.accepted(cluster), ObjectName::Accepted(cluster)),
            (layout.history(cluster, timeline), ObjectName::History(cluster, timeline)),
            (
                layout.wal_object(cluster, WalObjectName::Segment(segment)),
                ObjectName::Wal(cluster, WalObjectName::Segment(segment)),
            ),
            (layout.wal_object(cluster, partial), ObjectName::Wal(cluster, partial)),
            (layout.wal_object(cluster, label), ObjectName::Wal(cluster, label)),
            (layout.wal_object(cluster, piece), ObjectName::Wal(cluster, piece)),
            (layout.wal_object(cluster, forced), ObjectName::Wal(cluster, forced)),
            (layout.wal_object(cluster, part), ObjectName::Wal(cluster, part)),
            (layout.head(cluster, timeline, head), ObjectName::Head(cluster, timeline, head)),
        ] {
            assert_eq!(layout.parse(&key), Some(name), "{key}");
        }
    }

    #[test]
    fn keys_stand_where_the_format_says() {
        let layout = layout();
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let segment = WalObjectName::Segment("00000002000000A0000000FF".parse().unwrap());
        assert_eq!(
            layout.wal_object(cluster, segment).as_str(),
            "prefix/main/clusters/7301234567890123456-16/wal/00000002/000000A0/00000002000000A0000000FF"
        );
        let piece = WalObjectName::Piece { segment: segment.segment(), from: 0, to: 0x28 };
        let leaf = layout.wal_object(cluster, piece);
        assert!(leaf.as_str().ends_with("/00000002000000A0000000FF.00000000-00000028.piece"), "{leaf}");
        let part = WalObjectName::Part { segment: segment.segment(), salt: [1, 2, 3, 0xff], number: 0 };
        let leaf = layout.wal_object(cluster, part);
        assert!(leaf.as_str().ends_with("/00000002000000A0000000FF.010203ff.0.part"), "{leaf}");
        let forced = WalObjectName::Forced { segment: segment.segment(), digest: [1, 2, 3, 0xff] };
        let leaf = layout.wal_object(cluster, forced);
        assert!(leaf.as_str().ends_with("/00000002000000A0000000FF.forced.010203ff"), "{leaf}");
    }

    #[test]
    fn strangers_are_not_understood() {
        for key in [
            "prefix/other/site.json",
            "prefix/mainx/site.json",
            "prefix/main/basebackups/latest/begin",
            "prefix/main/basebackups/20261120T101500Z-3fa9/packs/01-deadbeef",
            "prefix/main/basebackups/20261120T101500Z-3fa9/packs/1-DEADBEEF",
            "prefix/main/clusters/7301234567890123456-16/wal/00000002/000000A0/00000002000000A0000000FF.tmp",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.00000028-00000028.piece",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.0000002a-0000002B.piece",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.forced.010203FF",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.forced",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.010203ff.00.part",
            "prefix/main/clusters/1-16/wal/00000002/000000A0/00000002000000A0000000FF.010203ff.part",
            "prefix/main/clusters/1-16/heads/00000000/20261120T101500Z-3fa9",
            "prefix/main/clusters/1-16/heads/00000001/newest",
        ] {
            assert_eq!(layout().parse(&ObjectKey::parse(key).unwrap()), None, "{key}");
        }
    }
}
