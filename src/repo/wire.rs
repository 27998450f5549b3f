//! How integers, byte strings and lists stand in our binary structures.
//!
//! Little-endian fixed integers where a record has a fixed size, LEB128 varints elsewhere, byte strings with
//! a varint length in front. The reader trusts nothing: every length is checked against what is left and
//! every count against a limit the caller names, so that no attacker's number is ever allocated.
//! Deliberately absent: serde. A format that is to be read for ever is written down field by field.

use thiserror::Error;

/// What is wrong with bytes that should have been one of our structures.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The bytes end inside a field.
    #[error("ends early: {wanted} bytes wanted, {left} left")]
    Short { wanted: usize, left: usize },
    /// A varint has more than ten bytes or more than 64 bits.
    #[error("has an overlong integer")]
    Overlong,
    /// A field holds a value its meaning does not allow.
    #[error("has {field} {value}, at most {max} is allowed")]
    OutOfRange { field: &'static str, value: u64, max: u64 },
    /// A field holds bytes its meaning does not allow.
    #[error("has an invalid {field}")]
    Invalid { field: &'static str },
    /// Bytes are left after the last field.
    #[error("has {left} bytes too many")]
    Trailing { left: usize },
}

/// Appends fields to a growing buffer.
#[derive(Debug, Default, Clone)]
pub struct WireWriter {
    bytes: Vec<u8>,
}

impl WireWriter {
    /// Creates an empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends a fixed 16-bit integer.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a fixed 32-bit integer.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a fixed 64-bit integer.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends an unsigned LEB128 integer.
    pub fn varint(&mut self, mut value: u64) -> &mut Self {
        while value >= 0x80 {
            self.bytes.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.u8(value as u8)
    }

    /// Appends a signed integer, small magnitudes first (zigzag).
    pub fn zigzag(&mut self, value: i64) -> &mut Self {
        self.varint(((value << 1) ^ (value >> 63)) as u64)
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a length and that many bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.varint(bytes.len() as u64).raw(bytes)
    }

    /// Returns how many bytes have been written.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns whether nothing has been written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns the bytes.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields from the front of a slice.
#[derive(Debug, Clone)]
pub struct WireReader<'a> {
    rest: &'a [u8],
}

impl<'a> WireReader<'a> {
    /// Creates a reader over `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Takes one byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// Takes a fixed 16-bit integer.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Takes a fixed 32-bit integer.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Takes a fixed 64-bit integer.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Takes an unsigned LEB128 integer.
    pub fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(WireError::Overlong);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Overlong)
    }

    /// Takes a varint that counts or measures something and may be at most `max`.
    pub fn bounded(&mut self, field: &'static str, max: u64) -> Result<u64, WireError> {
        let value = self.varint()?;
        if value > max {
            return Err(WireError::OutOfRange { field, value, max });
        }
        Ok(value)
    }

    /// Takes a varint that fits 32 bits.
    pub fn small(&mut self, field: &'static str) -> Result<u32, WireError> {
        Ok(self.bounded(field, u64::from(u32::MAX))? as u32)
    }

    /// Takes a count of records of at least `record_bytes_min` each: never more than the bytes that are left can
    /// hold, so that whoever makes room for them all makes room for little more than was read.
    pub fn count_of(&mut self, field: &'static str, record_bytes_min: usize) -> Result<usize, WireError> {
        let value = self.varint()?;
        let max = (self.rest.len() / record_bytes_min) as u64;
        if value > max {
            return Err(WireError::OutOfRange { field, value, max });
        }
        Ok(value as usize)
    }

    /// Takes a count of records of at least one byte each.
    pub fn count(&mut self, field: &'static str) -> Result<usize, WireError> {
        self.count_of(field, 1)
    }

    /// Takes a zigzag integer.
    pub fn zigzag(&mut self) -> Result<i64, WireError> {
        let value = self.varint()?;
        Ok(((value >> 1) as i64) ^ -((value & 1) as i64))
    }

    /// Takes a fixed number of bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let bytes = self.raw(N)?;
        Ok(bytes.try_into().expect("raw returns as many bytes as asked"))
    }

    /// Takes `len` bytes.
    pub fn raw(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        if len > self.rest.len() {
            return Err(WireError::Short { wanted: len, left: self.rest.len() });
        }
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    /// Takes a length and that many bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.varint()?;
        self.raw(usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// Returns how many bytes are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// Ends the reading, which must have taken everything.
    pub fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(WireError::Trailing { left }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fields_come_back_as_they_were_written(a: u64, b: i64, c: Vec<u8>, d: u32) {
            let mut writer = WireWriter::new();
            writer.varint(a).zigzag(b).bytes(&c).u32(d);
            let bytes = writer.finish();
            let mut reader = WireReader::new(&bytes);
            prop_assert_eq!(reader.varint().unwrap(), a);
            prop_assert_eq!(reader.zigzag().unwrap(), b);
            prop_assert_eq!(reader.bytes().unwrap(), &c[..]);
            prop_assert_eq!(reader.u32().unwrap(), d);
            reader.finish().unwrap();
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let mut reader = WireReader::new(&bytes);
            while reader.left() > 0 {
                if reader.bytes().is_err() || reader.varint().is_err() || reader.zigzag().is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn an_overlong_integer_is_refused() {
        assert_eq!(WireReader::new(&[0xff; 10]).varint(), Err(WireError::Overlong));
        assert_eq!(WireReader::new(&[0x80; 3]).varint(), Err(WireError::Short { wanted: 1, left: 0 }));
    }

    #[test]
    fn a_count_cannot_exceed_the_bytes_behind_it() {
        let mut writer = WireWriter::new();
        writer.varint(1 << 40).raw(&[0; 8]);
        let bytes = writer.finish();
        assert!(matches!(WireReader::new(&bytes).count("file"), Err(WireError::OutOfRange { .. })));
        let three = [&[3][..], &[0; 11]].concat();
        let refused = WireReader::new(&three).count_of("chunk", 4);
        assert_eq!(refused, Err(WireError::OutOfRange { field: "chunk", value: 3, max: 2 }));
        assert_eq!(WireReader::new(&three).count_of("chunk", 3), Ok(3));
    }
}
