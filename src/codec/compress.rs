//! Compression of single bodies: zstd, snappy, lz4 or none, with contexts kept between calls.
//!
//! A body that does not get smaller is stored as `none`, so the codec is recorded with every frame. Inflating is
//! bounded: the caller says how long the raw bytes are, and a body that would give one byte more or less is
//! damaged. What zstd and snappy claim in their own headers is compared before anything is allocated.
//! Deliberately absent: streams and dictionaries (measured, not worth their format), and multi-threaded zstd.

use std::cell::RefCell;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// How a body is compressed, as recorded in a frame; a closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum CodecId {
    None = 0,
    Zstd = 1,
    Snappy = 2,
    Lz4 = 3,
}

impl CodecId {
    /// Returns the name used in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zstd => "zstd",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
        }
    }
}

impl TryFrom<u8> for CodecId {
    type Error = Error;

    fn try_from(byte: u8) -> Result<Self> {
        match byte {
            0 => Ok(Self::None),
            1 => Ok(Self::Zstd),
            2 => Ok(Self::Snappy),
            3 => Ok(Self::Lz4),
            other => Err(Error::UnknownCodec(other)),
        }
    }
}

impl fmt::Display for CodecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An algorithm and how hard it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    pub algorithm: CodecId,
    /// Used by zstd alone, -7 to 19 without 0; the others have one level, 0.
    #[serde(default)]
    pub level: i32,
}

impl Compression {
    /// The level for what is read at random: 2.5 % smaller than level 1 on real rows, four times as fast as 6.
    pub const ZSTD_LEVEL_DEFAULT: i32 = 3;
    /// The level for WAL: as small as level 1 makes it, and a third faster (decision 1902).
    pub const ZSTD_LEVEL_WAL: i32 = -1;
    /// Below it zstd stores more than lz4 does and is slower than that.
    pub const ZSTD_LEVEL_MIN: i32 = -7;
    /// Above it zstd needs windows that every reader would have to hold.
    pub const ZSTD_LEVEL_MAX: i32 = 19;

    /// Stores bytes as they are.
    pub const NONE: Self = Self { algorithm: CodecId::None, level: 0 };

    /// Compresses with zstd at `level`.
    pub const fn zstd(level: i32) -> Self {
        Self { algorithm: CodecId::Zstd, level }
    }

    /// Refuses a level that the algorithm does not have.
    pub fn validate(&self) -> Result<()> {
        let is_zstd = self.algorithm == CodecId::Zstd;
        let (min, max) = if is_zstd { (Self::ZSTD_LEVEL_MIN, Self::ZSTD_LEVEL_MAX) } else { (0, 0) };
        // To zstd itself 0 is another name for 3.
        if (min..=max).contains(&self.level) && !(is_zstd && self.level == 0) {
            return Ok(());
        }
        Err(Error::Level { codec: self.algorithm.name(), level: self.level, min, max })
    }
}

impl Default for Compression {
    fn default() -> Self {
        Self::zstd(Self::ZSTD_LEVEL_DEFAULT)
    }
}

/// Compresses one body after the other, keeping its context (about 1.3 MB for zstd 3) between them.
pub struct Compressor {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    snappy: snap::raw::Encoder,
}

impl Compressor {
    /// Creates a compressor; its context is allocated by the first body.
    pub fn new(compression: Compression) -> Self {
        Self { compression, zstd: None, snappy: snap::raw::Encoder::new() }
    }

    /// Lends this thread's own compressor to `work`: what a job on the CPU pool uses.
    ///
    /// A thread keeps one; a job that asks for another compression replaces it.
    pub fn on_this_thread<T>(compression: Compression, work: impl FnOnce(&mut Compressor) -> T) -> T {
        thread_local! {
            static LOCAL: RefCell<Option<Compressor>> = const { RefCell::new(None) };
        }
        LOCAL.with_borrow_mut(|local| match local {
            Some(compressor) if compressor.compression == compression => work(compressor),
            _ => work(local.insert(Compressor::new(compression))),
        })
    }

    /// Compresses `raw`; gives it back as `CodecId::None` where that is no longer.
    pub fn compress(&mut self, raw: &[u8]) -> Result<(CodecId, Vec<u8>)> {
        let codec = self.compression.algorithm;
        let stored = match codec {
            CodecId::None => return Ok((CodecId::None, raw.to_vec())),
            CodecId::Zstd => self.compress_zstd(raw),
            CodecId::Snappy => self.snappy.compress_vec(raw).map_err(|e| e.to_string()),
            CodecId::Lz4 => Ok(lz4_flex::block::compress(raw)),
        }
        .map_err(|reason| Error::NotCompressed {
            codec: codec.name(),
            raw_len: raw.len(),
            reason,
        })?;
        if stored.len() < raw.len() { Ok((codec, stored)) } else { Ok((CodecId::None, raw.to_vec())) }
    }

    fn compress_zstd(&mut self, raw: &[u8]) -> Result<Vec<u8>, String> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            empty => {
                let fresh = zstd::bulk::Compressor::new(self.compression.level).map_err(|e| e.to_string())?;
                empty.insert(fresh)
            }
        };
        zstd.compress(raw).map_err(|e| e.to_string())
    }
}

/// Inflates one body after the other, keeping its context between them.
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    snappy: snap::raw::Decoder,
}

impl Decompressor {
    /// Creates a decompressor; its context is allocated by the first body.
    pub fn new() -> Self {
        Self { zstd: None, snappy: snap::raw::Decoder::new() }
    }

    /// Lends this thread's own decompressor to `work`: what a job on the CPU pool uses.
    pub fn on_this_thread<T>(work: impl FnOnce(&mut Decompressor) -> T) -> T {
        thread_local! {
            static LOCAL: RefCell<Decompressor> = RefCell::new(Decompressor::new());
        }
        LOCAL.with_borrow_mut(work)
    }

    /// Inflates `stored` to exactly `raw_len` bytes.
    ///
    /// Allocates `raw_len` bytes and no more, so the caller holds it against a limit first. Anything that would
    /// inflate to another length, or has bytes left over, is `Error::Damaged`.
    pub fn decompress(&mut self, codec: CodecId, stored: &[u8], raw_len: usize) -> Result<Vec<u8>> {
        check_claim(codec, stored, raw_len).map_err(damaged(codec, stored, raw_len))?;
        let mut raw = vec![0; raw_len];
        self.inflate(codec, stored, &mut raw).map_err(damaged(codec, stored, raw_len))?;
        Ok(raw)
    }

    /// Inflates `stored` to where it belongs, which it fills exactly; else as [`Decompressor::decompress`].
    pub fn decompress_into(&mut self, codec: CodecId, stored: &[u8], raw: &mut [u8]) -> Result<()> {
        let raw_len = raw.len();
        let inflated = check_claim(codec, stored, raw_len).and_then(|()| self.inflate(codec, stored, raw));
        inflated.map_err(damaged(codec, stored, raw_len))
    }

    /// Inflates what claims to be as long as `raw`.
    fn inflate(&mut self, codec: CodecId, stored: &[u8], raw: &mut [u8]) -> Result<(), String> {
        let len = match codec {
            CodecId::None => {
                raw.copy_from_slice(stored);
                stored.len()
            }
            CodecId::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    empty => empty.insert(zstd::bulk::Decompressor::new().map_err(|e| e.to_string())?),
                };
                zstd.decompress_to_buffer(stored, raw).map_err(|e| e.to_string())?
            }
            CodecId::Snappy => self.snappy.decompress(stored, raw).map_err(|e| e.to_string())?,
            CodecId::Lz4 => lz4_flex::block::decompress_into(stored, raw).map_err(|e| e.to_string())?,
        };
        if len == raw.len() { Ok(()) } else { Err(format!("it gave {len} bytes")) }
    }
}

/// Compares what a body says of its own length, where it says anything, before anything is allocated or written.
fn check_claim(codec: CodecId, stored: &[u8], raw_len: usize) -> Result<(), String> {
    match codec {
        CodecId::None if stored.len() == raw_len => Ok(()),
        CodecId::None => Err("the length differs".to_owned()),
        CodecId::Zstd => {
            match zstd::zstd_safe::get_frame_content_size(stored) {
                Ok(Some(claimed)) if claimed == raw_len as u64 => {}
                Ok(Some(claimed)) => return Err(format!("its header says {claimed} bytes")),
                Ok(None) | Err(_) => return Err("its header is not one that Walden writes".to_owned()),
            }
            // A second frame behind the first would be inflated too; one body is one frame.
            match zstd::zstd_safe::find_frame_compressed_size(stored) {
                Ok(len) if len == stored.len() => Ok(()),
                _ => Err("it is not one whole frame".to_owned()),
            }
        }
        CodecId::Snappy => match snap::raw::decompress_len(stored) {
            Ok(claimed) if claimed == raw_len => Ok(()),
            Ok(claimed) => Err(format!("its header says {claimed} bytes")),
            Err(error) => Err(error.to_string()),
        },
        CodecId::Lz4 => Ok(()),
    }
}

fn damaged(codec: CodecId, stored: &[u8], raw_len: usize) -> impl Fn(String) -> Error {
    let stored_len = stored.len();
    move |reason| Error::Damaged { codec: codec.name(), stored_len, raw_len, reason }
}

impl Default for Decompressor {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::ErrorKind;

    const ALL: [Compression; 6] = [
        Compression::NONE,
        Compression::zstd(1),
        Compression::zstd(3),
        Compression::zstd(19),
        Compression { algorithm: CodecId::Snappy, level: 0 },
        Compression { algorithm: CodecId::Lz4, level: 0 },
    ];

    fn inflate(codec: CodecId, stored: &[u8], raw_len: usize) -> Result<Vec<u8>> {
        Decompressor::new().decompress(codec, stored, raw_len)
    }

    fn assert_damaged(result: Result<Vec<u8>>) {
        let error = result.expect_err("damaged bytes were inflated");
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::Damaged);
    }

    /// Text-like bytes that every codec makes smaller.
    fn rows(len: usize) -> Vec<u8> {
        (0_u32..).flat_map(|n| format!("({n}, 'customer {}')\n", n % 17).into_bytes()).take(len).collect()
    }

    #[test]
    fn every_codec_makes_rows_smaller_and_gives_them_back() {
        for compression in ALL {
            let mut compressor = Compressor::new(compression);
            let mut decompressor = Decompressor::new();
            // Twice and in changing sizes, because the contexts are used again.
            for len in [65_536, 8192, 131_072, 100, 65_536] {
                let raw = rows(len);
                let (codec, stored) = compressor.compress(&raw).unwrap();
                assert_eq!(codec, compression.algorithm, "{len} bytes");
                assert!(codec == CodecId::None || stored.len() < raw.len());
                assert_eq!(decompressor.decompress(codec, &stored, len).unwrap(), raw);
            }
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_stored_as_it_is() {
        let noise: Vec<u8> = {
            use crate::codec::{RandomExt, SeededRandom};
            SeededRandom::new(1).array::<4096>().to_vec()
        };
        for compression in ALL {
            let mut compressor = Compressor::new(compression);
            for raw in [&noise[..], b"", b"x"] {
                assert_eq!(
                    compressor.compress(raw).unwrap(),
                    (CodecId::None, raw.to_vec()),
                    "{compression:?}"
                );
            }
        }
    }

    #[test]
    fn a_body_that_says_it_inflates_to_more_is_refused_by_its_header() {
        let zeros = vec![0; 16 << 20];
        for compression in &ALL[1..] {
            let (codec, stored) = Compressor::new(*compression).compress(&zeros).unwrap();
            assert!(stored.len() < 1 << 20, "{compression:?} is not a bomb");
            for raw_len in [0, 1, 65_536, zeros.len() - 1, zeros.len() + 1] {
                assert_damaged(inflate(codec, &stored, raw_len));
            }
        }
    }

    #[test]
    fn a_zstd_body_that_lies_about_its_length_is_stopped_while_inflating() {
        let (codec, mut stored) = Compressor::new(Compression::zstd(3)).compress(&vec![0; 1 << 20]).unwrap();
        // Magic, descriptor (single segment, 4 bytes of content size), content size.
        assert_eq!(stored[4] & 0b1110_0000, 0b1010_0000);
        stored[5..9].copy_from_slice(&70_000_u32.to_le_bytes());
        assert_damaged(inflate(codec, &stored, 70_000));
    }

    #[test]
    fn a_snappy_body_that_lies_about_its_length_is_stopped_while_inflating() {
        let algorithm = CodecId::Snappy;
        let (codec, stored) =
            Compressor::new(Compression { algorithm, level: 0 }).compress(&[0; 300]).unwrap();
        // The length is a varint of two bytes; 200 takes two as well.
        assert_eq!(stored[..2], [0xac, 0x02]);
        let lying = [&[0xc8, 0x01], &stored[2..]].concat();
        assert_damaged(inflate(codec, &lying, 200));
    }

    #[test]
    fn a_zstd_body_is_one_whole_frame_with_its_length() {
        let raw = rows(10_000);
        let (codec, stored) = Compressor::new(Compression::zstd(3)).compress(&raw).unwrap();

        let empty_frame = zstd::bulk::compress(b"", 3).unwrap();
        assert_damaged(inflate(codec, &[&stored[..], &empty_frame].concat(), raw.len()));
        assert_damaged(inflate(codec, &[&stored[..], &stored].concat(), raw.len() * 2));
        assert_damaged(inflate(codec, &[&stored[..], b"x"].concat(), raw.len()));
        assert_damaged(inflate(codec, &stored[..stored.len() - 1], raw.len()));

        let mut streamed = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
        streamed.write_all(&raw).unwrap();
        assert_damaged(inflate(codec, &streamed.finish().unwrap(), raw.len()));
    }

    #[test]
    fn a_body_for_another_codec_is_damaged() {
        let raw = rows(10_000);
        for compression in &ALL[1..] {
            let (codec, stored) = Compressor::new(*compression).compress(&raw).unwrap();
            for other in [CodecId::None, CodecId::Zstd, CodecId::Snappy, CodecId::Lz4] {
                if other != codec {
                    assert_damaged(inflate(other, &stored, raw.len()));
                }
            }
        }
    }

    #[test]
    fn a_thread_keeps_its_contexts_and_takes_another_compression() {
        let raw = rows(5000);
        for compression in [Compression::zstd(1), Compression::zstd(1), ALL[4], Compression::zstd(3)] {
            let (codec, stored) =
                Compressor::on_this_thread(compression, |compressor| compressor.compress(&raw)).unwrap();
            assert_eq!(codec, compression.algorithm);
            let back = Decompressor::on_this_thread(|d| d.decompress(codec, &stored, raw.len())).unwrap();
            assert_eq!(back, raw);
        }
    }

    #[test]
    fn the_list_of_codecs_is_closed() {
        for byte in 0..=u8::MAX {
            match CodecId::try_from(byte) {
                Ok(codec) => assert_eq!(codec as u8, byte),
                Err(error) => assert_eq!(error, Error::UnknownCodec(byte)),
            }
        }
        assert!(CodecId::try_from(3).is_ok());
        assert!(CodecId::try_from(4).is_err());
    }

    #[test]
    fn the_configuration_names_algorithms_as_postgresql_does() {
        let parsed: Compression = serde_json::from_str(r#"{"algorithm": "zstd", "level": 7}"#).unwrap();
        assert_eq!(parsed, Compression::zstd(7));
        let parsed: Compression = serde_json::from_str(r#"{"algorithm": "snappy"}"#).unwrap();
        assert_eq!(parsed, ALL[4]);
        assert!(serde_json::from_str::<Compression>(r#"{"algorithm": "gzip"}"#).is_err());
        assert!(serde_json::from_str::<Compression>(r#"{"algorithm": "lz4", "levels": 1}"#).is_err());
    }

    #[test]
    fn a_level_that_does_nothing_is_refused() {
        for compression in ALL {
            compression.validate().unwrap();
        }
        let snappy = Compression { algorithm: CodecId::Snappy, level: 3 };
        assert_eq!(
            snappy.validate().unwrap_err().hint().unwrap(),
            "Leave the level out: this algorithm has none."
        );
        for level in [i32::MIN, -8, 0, 20, i32::MAX] {
            let error = Compression::zstd(level).validate().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FixInput);
            assert_eq!(error.hint().unwrap(), "Choose a level from -7 to 19, and not 0.");
        }
    }

    fn any_compression() -> impl Strategy<Value = Compression> {
        prop::sample::select(&ALL[..])
    }

    fn any_raw() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2000),
            // Few different bytes in runs: compressible.
            prop::collection::vec((0_u8..4, 1_usize..200), 0..60)
                .prop_map(|runs| runs.iter().flat_map(|&(byte, len)| vec![byte; len]).collect()),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_come_back(compression in any_compression(), raw in any_raw()) {
            let (codec, stored) = Compressor::new(compression).compress(&raw).unwrap();
            prop_assert!(stored.len() <= raw.len());
            prop_assert_eq!(inflate(codec, &stored, raw.len()).unwrap(), raw);
        }

        #[test]
        fn arbitrary_bytes_never_inflate_to_another_length(
            codec in 0_u8..4, stored in any_raw(), raw_len in 0_usize..100_000
        ) {
            let codec = CodecId::try_from(codec).unwrap();
            if let Ok(raw) = inflate(codec, &stored, raw_len) {
                prop_assert_eq!(raw.len(), raw_len);
            }
        }

        #[test]
        fn altered_bodies_never_inflate_to_another_length(
            compression in any_compression(), raw in any_raw(), at in any::<prop::sample::Index>(), flip in 1_u8..=255
        ) {
            let (codec, mut stored) = Compressor::new(compression).compress(&raw).unwrap();
            if !stored.is_empty() {
                let at = at.index(stored.len());
                stored[at] ^= flip;
            }
            if let Ok(inflated) = inflate(codec, &stored, raw.len()) {
                prop_assert_eq!(inflated.len(), raw.len());
            }
        }
    }
}
