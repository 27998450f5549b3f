//! What a sealed or signed object is, in the bytes that its key or its signature is bound to.
//!
//! An object that was moved, renamed or swapped with another has another identity, and so neither opens nor
//! verifies. The store's URL and the site's name are left out on purpose: a repository can be copied whole.

use uuid::Uuid;

use crate::pg::TimelineId;
use crate::repo::id::ClusterId;

/// The kinds of objects that are sealed or signed; numbers are part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ObjectKind {
    /// The index of a basebackup.
    Manifest = 1,
    /// The list of packs that a basebackup names.
    Refs = 2,
    /// Sealed chunks.
    Pack = 3,
    /// A WAL segment, a partial segment or a backup history file.
    Wal = 4,
    /// A timeline history file.
    History = 5,
    /// The intent of a basebackup.
    Begin = 16,
    /// The outcome of a basebackup.
    Outcome = 17,
    /// The mark that a basebackup has expired.
    Expired = 18,
    /// How far the archive of a timeline was known to reach.
    Head = 19,
}

/// The identity of an object: domain, kind, site, cluster, timeline, name and part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is.
    pub kind: ObjectKind,
    /// The site, by the uuid in `site.json`.
    pub site: Uuid,
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The timeline, where it has one.
    pub timeline: Option<TimelineId>,
    /// The basebackup's id or the file's name in the archive.
    pub name: String,
    /// Which part of the named thing: the pack's number, for example; else empty.
    pub part: String,
}

const DOMAIN: &[u8] = b"walden/1";

impl Identity {
    /// Returns the identity's bytes: each field with its length (32 bits, little-endian) in front.
    pub fn encode(&self) -> Vec<u8> {
        let system_identifier = self.cluster.system_identifier.0.to_le_bytes();
        let segment_size = self.cluster.segment_size.bytes().to_le_bytes();
        let timeline = self.timeline.map_or(0, |timeline| timeline.get()).to_le_bytes();
        let fields: [&[u8]; 8] = [
            DOMAIN,
            &[self.kind as u8],
            self.site.as_bytes(),
            &system_identifier,
            &segment_size,
            &timeline,
            self.name.as_bytes(),
            self.part.as_bytes(),
        ];
        let mut bytes = Vec::with_capacity(128);
        for field in fields {
            bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            kind: ObjectKind::Pack,
            site: Uuid::from_bytes([7; 16]),
            cluster: "7301234567890123456-16".parse().unwrap(),
            timeline: TimelineId::new(1),
            name: "20261120T101500Z-3fa9".to_owned(),
            part: "3".to_owned(),
        }
    }

    #[test]
    fn every_field_changes_the_identity() {
        let mut seen = vec![identity().encode()];
        let variants: [fn(&mut Identity); 6] = [
            |i| i.kind = ObjectKind::Manifest,
            |i| i.site = Uuid::from_bytes([8; 16]),
            |i| i.cluster = "7301234567890123456-32".parse().unwrap(),
            |i| i.timeline = TimelineId::new(2),
            |i| i.name.push('0'),
            |i| i.part.push('0'),
        ];
        for change in variants {
            let mut identity = identity();
            change(&mut identity);
            assert!(!seen.contains(&identity.encode()));
            seen.push(identity.encode());
        }
    }

    #[test]
    fn a_byte_cannot_move_from_one_field_to_the_next() {
        let (mut a, mut b) = (identity(), identity());
        (a.name, a.part) = ("ab".to_owned(), "c".to_owned());
        (b.name, b.part) = ("a".to_owned(), "bc".to_owned());
        assert_ne!(a.encode(), b.encode());
    }
}
