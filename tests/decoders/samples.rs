//! The decoders, each with valid samples: bytes of real servers, and objects of the golden repository.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use walden::catalog::RecoveryPlan;
use walden::codec::{
    CodecId, Compression, Compressor, Decompressor, RecipientKey, RecipientPrivateKey, SigningKey, VerifyKey,
};
use walden::config::{Config, Environment};
use walden::pg::{
    ArchiveFileName, BackupLabel, ControlFile, Crc32c, DataPath, Lsn, MajorVersion, PageHeader,
    PostmasterPid, RelationMap, SegmentHeader, SystemIdentifier, TimelineHistory, TimelineId, WalPageHeader,
    WalRecordStream, WalSegmentName, WalSegmentSize, WalStep, parse_tablespace_map,
};
use walden::repo::documents::{BackupRecord, Begin, Expired, SiteRecord};
use walden::repo::entry::TreePath;
use walden::repo::layout::Layout;
use walden::repo::lease::Pin;
use walden::repo::manifest::{ManifestContent, ManifestStart, OutsideLink, Tablespace};
use walden::repo::page_map::MapBlock;
use walden::repo::{BasebackupId, ClusterId, Refs};
use walden::storage::{Location, ObjectKey};

/// A decoder of bytes from outside.
pub struct Decoder {
    pub name: &'static str,
    pub samples: Vec<Vec<u8>>,
    pub decode: fn(&[u8]),
    /// What the caller says beforehand that the output may be.
    pub declared: usize,
    /// Makes a checksum right again after damage, so that the damage gets behind it.
    pub repair: fn(&mut [u8]),
}

/// A plan as restore writes it.
pub const PLAN: &str = r#"{"format":1,"cluster":"7710459600104976879-1","basebackup":"20261120T101500Z-3fa9",
    "spans":[{"timeline":1,"first":"000000010000000000000009","last":"00000001000000000000000C","history":false},
             {"timeline":2,"first":"00000002000000000000000C","last":null,"history":true}],"standby":false}"#;

/// What the decompressors are told that comes out.
const RAW_LEN: usize = 100_000;

pub fn decoders() -> Vec<Decoder> {
    let mut all = pg();
    all.extend(codec());
    all.extend(repo());
    all.extend(texts());
    all.extend(crate::state::decoders());
    all
}

pub fn decoder(name: &'static str, samples: Vec<Vec<u8>>, decode: fn(&[u8])) -> Decoder {
    Decoder { name, samples, decode, declared: 0, repair: |_| {} }
}

fn data(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

/// Objects of the golden repository whose key ends so.
fn objects(part: &str) -> Vec<Vec<u8>> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1/repository")];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.retain(|path| path.to_string_lossy().ends_with(part));
    assert!(!files.is_empty(), "the golden repository has no {part}");
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn pg() -> Vec<Decoder> {
    let majors = ["13", "14", "15", "16", "17", "18"];
    let starts: Vec<Vec<u8>> = majors.iter().map(|major| data(&format!("wal/{major}-start"))).collect();
    let label =
        b"START WAL LOCATION: 0/900028 (file 000000010000000000000009)\nCHECKPOINT LOCATION: 0/900060\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-20 10:15:00 UTC\nLABEL: x\n\
        START TIMELINE: 1\n";
    let pid = b"4711\n/srv/data\n1763633700\n5432\n/run/postgresql\nlocalhost\n  5432001   32768\nready   \n";
    vec![
        Decoder {
            repair: repair_control,
            ..decoder(
                "pg_control",
                majors.iter().map(|major| data(&format!("pg_control/{major}"))).collect(),
                |bytes| {
                    let _ = ControlFile::parse(bytes);
                },
            )
        },
        decoder("backup_label", vec![label.to_vec()], |bytes| {
            let _ = BackupLabel::parse(&text(bytes));
        }),
        decoder("tablespace_map", vec![b"16400 /srv/one\\\ntwo\n16401 /srv/two\n".to_vec()], |bytes| {
            let _ = parse_tablespace_map(bytes);
        }),
        decoder("timeline history", vec![b"1\t0/D00000\tx\n\n# y\n2\t0/E00000\tz\n".to_vec()], |bytes| {
            let _ = TimelineHistory::parse(TimelineId::new(3).unwrap(), &text(bytes));
        }),
        decoder("postmaster.pid", vec![pid.to_vec()], |bytes| {
            let _ = PostmasterPid::parse(&text(bytes));
        }),
        Decoder {
            repair: repair_map,
            ..decoder("relation map", relation_maps(), |bytes| {
                let _ = RelationMap::parse(bytes);
            })
        },
        decoder("page", vec![data("page/heap-2-blocks")[..8192].to_vec()], |bytes| {
            let _ = (PageHeader::parse(bytes), walden::pg::page::verify(bytes, 0, Lsn(0)));
        }),
        decoder("head of a WAL page", starts.iter().map(|start| start[..64].to_vec()).collect(), |bytes| {
            let _ = WalPageHeader::parse(bytes);
            if let Ok(header) = SegmentHeader::parse(bytes, "x") {
                let name = "000000010000000000000009".parse().unwrap();
                let _ =
                    (header.check(name, bytes.len() as u64), header.check_cluster(name, header_cluster()));
            }
        }),
        decoder("WAL records", starts.clone(), read_records),
        decoder("the last page of WAL", [starts, vec![full_page()]].concat(), read_last_page),
    ]
}

/// Writes the checksum of all that stands before it.
fn repair_at(bytes: &mut [u8], at: usize) {
    if bytes.len() >= at + 4 {
        let crc = Crc32c::of(&bytes[..at]).0;
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// From 18 on the checksum stands four bytes later.
fn repair_control(bytes: &mut [u8]) {
    let late = bytes.get(8..12) == Some(&1800u32.to_le_bytes());
    repair_at(bytes, if late { 292 } else { 288 });
}

/// The checksum is behind the room for mappings, of which there is more from 16 on.
fn repair_map(bytes: &mut [u8]) {
    let at = if bytes.len() >= 524 { 520 } else { 504 };
    repair_at(bytes, at);
}

/// Maps of two catalogs, as a server up to 15 and one from 16 on writes them.
fn relation_maps() -> Vec<Vec<u8>> {
    [512, 524]
        .map(|len| {
            let words = [0x0059_2717u32, 2, 1259, 1259, 1249, 16_500];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(len, 0);
            repair_map(&mut bytes);
            assert_eq!(RelationMap::parse(&bytes).unwrap().mappings.len(), 2);
            bytes
        })
        .to_vec()
}

/// Two pages, of which the second is one record to its end.
fn full_page() -> Vec<u8> {
    let body = [&[0xfe][..], &(8168u32 - 24 - 5).to_le_bytes(), &[7; 8168 - 24 - 5]].concat();
    let mut header = [&8168u32.to_le_bytes()[..], &[0; 12], &[0x20, 0, 0, 0]].concat();
    let crc = Crc32c::of(&[&body[..], &header[..]].concat()).0;
    header.extend_from_slice(&crc.to_le_bytes());
    let page = [&0xd110u16.to_le_bytes()[..], &[0, 0, 1, 0, 0, 0], &[0; 16]].concat();
    let bytes = [&[0; 8192][..], &page, &header, &body].concat();
    assert_eq!(bytes.len(), 16_384);
    let mut stream = WalRecordStream::new(Lsn(8192), WalSegmentSize::MIN, 8192);
    let mut page = bytes[8192..].to_vec();
    page[8..16].copy_from_slice(&8192u64.to_le_bytes());
    stream.push(Lsn(8192), page.into()).unwrap();
    assert!(matches!(stream.next_record(), Ok(WalStep::Record(_))), "the sample is one record");
    bytes
}

/// The second page of some WAL, as the last one that there can be.
fn read_last_page(bytes: &[u8]) {
    let Some(page) = bytes.get(8192..16384) else { return };
    let mut page = page.to_vec();
    let last = Lsn(u64::MAX - 8191);
    page[8..16].copy_from_slice(&last.0.to_le_bytes());
    let mut stream = WalRecordStream::new(last, WalSegmentSize::MIN, 8192);
    stream.push(last, page.into()).unwrap();
    while let Ok(WalStep::Record(_)) | Err(_) = stream.next_record() {}
}

fn header_cluster() -> SystemIdentifier {
    "7710459600104976879".parse().unwrap()
}

/// Reads from where the bytes say that they are, and from the last positions there are.
fn read_records(bytes: &[u8]) {
    let address = bytes.get(8..16).map_or(0, |a| u64::from_le_bytes(a.try_into().unwrap()));
    for start in [Lsn(address), Lsn(0x90_0000), Lsn(u64::MAX - 100)] {
        let mut stream = WalRecordStream::new(start, WalSegmentSize::MIN, 8192);
        if stream.push(stream.wanted(), Bytes::copy_from_slice(bytes)).is_err() {
            continue;
        }
        // A record is at least 24 bytes, so this many steps read them all.
        for _ in 0..=bytes.len() / 24 + 1 {
            match stream.next_record() {
                Ok(WalStep::Record(record)) => {
                    let _ = record.payload();
                }
                Ok(WalStep::NeedBytes | WalStep::End(_)) => break,
                Err(_) => {}
            }
        }
    }
}

fn codec() -> Vec<Decoder> {
    let raw: Vec<u8> = (0..RAW_LEN).map(|n| (n / 100) as u8).collect();
    let compress = |algorithm| {
        let level = if algorithm == CodecId::Zstd { 3 } else { 0 };
        let stored = Compressor::new(Compression { algorithm, level }).compress(&raw).unwrap();
        assert_eq!(stored.0, algorithm);
        vec![stored.1]
    };
    let inflating = |name, algorithm, decode| {
        // Zstandard's context stands beside what comes out.
        Decoder { declared: 2 * RAW_LEN, ..decoder(name, compress(algorithm), decode) }
    };
    let key = |name| vec![data(&format!("golden-1/keys/{name}"))];
    vec![
        inflating("zstd", CodecId::Zstd, |bytes| inflate(CodecId::Zstd, bytes)),
        inflating("snappy", CodecId::Snappy, |bytes| inflate(CodecId::Snappy, bytes)),
        inflating("lz4", CodecId::Lz4, |bytes| inflate(CodecId::Lz4, bytes)),
        decoder("recipient's public key", key("test.pub.pem"), |bytes| {
            let _ = RecipientKey::from_pem(&text(bytes));
        }),
        decoder("recipient's private key", key("test.pem"), |bytes| {
            let _ = RecipientPrivateKey::from_pem(&text(bytes));
        }),
        decoder("signing key", key("test.sign.pem"), |bytes| {
            let _ = SigningKey::from_pem(&text(bytes));
        }),
        decoder("verify key", key("test.verify.pem"), |bytes| {
            let _ = VerifyKey::from_pem(&text(bytes));
        }),
    ]
}

fn inflate(codec: CodecId, bytes: &[u8]) {
    let _ = Decompressor::new().decompress(codec, bytes, RAW_LEN);
}

fn repo() -> Vec<Decoder> {
    let content = ManifestContent {
        tablespaces: vec![Tablespace { oid: 16400, location: b"/srv/one".to_vec(), name: "one".to_owned() }],
        links: vec![OutsideLink { path: TreePath::new("data/log").unwrap(), target: b"/var/log".to_vec() }],
        ..ManifestContent::default()
    };
    let start = content.into_frames(Compression::NONE).unwrap().swap_remove(0).body;
    // No packs, no chunks, one extent of three zero pages.
    let zeros = vec![0, 0, 1, 3, 0];
    assert!(MapBlock::decode(&zeros).is_ok());
    let documents = |part: &str| {
        let first_line = |bytes: Vec<u8>| bytes.split(|byte| *byte == b'\n').next().unwrap().to_vec();
        objects(part).into_iter().map(first_line).collect()
    };
    vec![
        decoder("start frame of a manifest", vec![start], |bytes| {
            let _ = ManifestStart::decode(bytes);
        }),
        decoder("map block", vec![zeros], |bytes| {
            let _ = MapBlock::decode(bytes);
        }),
        decoder("refs", objects("/refs"), |bytes| {
            let _ = Refs::decode(bytes, "refs");
        }),
        decoder("site.json", objects("/site.json"), |bytes| {
            let _ = serde_json::from_slice::<SiteRecord>(bytes);
        }),
        decoder("begin", documents("/begin"), |bytes| {
            let _ = serde_json::from_slice::<Begin>(bytes);
        }),
        decoder("backup.json", documents("/backup.json"), |bytes| {
            let _ = serde_json::from_slice::<BackupRecord>(bytes);
        }),
        decoder("expired", vec![br#"{"id":"20261120T101500Z-3fa9","reason":"x"}"#.to_vec()], |bytes| {
            let _ = serde_json::from_slice::<Expired>(bytes);
        }),
        decoder(
            "pin of a clone",
            vec![br#"{"id":"20261120T101500Z-3fa9","random":"0011223344556677"}"#.to_vec()],
            |bytes| {
                let _ = serde_json::from_slice::<Pin>(bytes);
            },
        ),
    ]
}

fn texts() -> Vec<Decoder> {
    let keys = [
        "main/basebackups/20261120T101500Z-3fa9/packs/7-aabbccdd",
        "main/clusters/7710459600104976879-1/wal/00000001/00000000/000000010000000000000009.00000028.backup",
        "main/clusters/7710459600104976879-1/history/00000002.history",
    ];
    let names =
        ["000000010000000000000009", "20261120T101500Z-3fa9", "7710459600104976879-1", "0/900028", "15"];
    let bytes = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let toml = "[storage]\nurl = \"s3://bucket/prefix\"\n[limits]\nmemory = \"1GB\"\n[sites.main]\n\
                connection = \"host=/run/postgresql\"\n";
    assert!(serde_json::from_str::<RecoveryPlan>(PLAN).is_ok());
    vec![
        decoder("object key", bytes(&keys), |bytes| {
            if let Ok(key) = ObjectKey::parse(&text(bytes)) {
                let _ = Layout::new(ObjectKey::parse("main").unwrap()).parse(&key);
            }
        }),
        decoder("names and positions", bytes(&names), |bytes| {
            let text = text(bytes);
            let _ =
                (text.parse::<ArchiveFileName>(), text.parse::<BasebackupId>(), text.parse::<ClusterId>());
            let _ = (text.parse::<Lsn>(), text.parse::<TimelineId>(), text.parse::<SystemIdentifier>());
            let _ = (MajorVersion::parse_pg_version(&text), DataPath::new(bytes), TreePath::new(bytes));
            if let Ok(name) = text.parse::<WalSegmentName>() {
                for size in [WalSegmentSize::MIN, WalSegmentSize::MAX] {
                    let _ = (name.number(size), name.start_lsn(size), name.end_lsn(size), name.next(size));
                }
            }
        }),
        decoder("where a repository is", bytes(&["file:///srv/walden", "s3://bucket/prefix"]), |bytes| {
            let _ = Location::parse(&text(bytes));
        }),
        decoder("walden.plan.json", bytes(&[PLAN]), |bytes| {
            if let Ok(plan) = serde_json::from_slice::<RecoveryPlan>(bytes) {
                // The names of a span are counted through, however many it says that there are.
                for name in plan.segments().take(100) {
                    let _ = plan.contains(ArchiveFileName::Segment(name));
                }
            }
        }),
        decoder("configuration", bytes(&[toml]), |bytes| {
            let environment = Environment::of_process();
            let _ = Config::parse(&text(bytes), Path::new("/etc/walden.toml"), &environment);
        }),
    ]
}
