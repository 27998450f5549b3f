//! Rows of an answer, read by column name into plain values, and the parameters of a statement.
//!
//! Few types on purpose: a statement casts what it wants to know to text, bigint or boolean, so that the server does
//! the conversion it knows best and no caller meets the wire format.

use std::error::Error as StdError;

use bytes::BytesMut;
use jiff::Timestamp;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use crate::replication::Error;

/// A value for `$1`, `$2`, … of a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Param<'a> {
    Text(&'a str),
    Int(i64),
    Bool(bool),
}

impl Param<'_> {
    pub(super) fn sql_type(self) -> Type {
        match self {
            Self::Text(_) => Type::TEXT,
            Self::Int(_) => Type::INT8,
            Self::Bool(_) => Type::BOOL,
        }
    }
}

impl ToSql for Param<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match self {
            Self::Text(value) => value.to_sql(ty, out),
            Self::Int(value) => value.to_sql(ty, out),
            Self::Bool(value) => value.to_sql(ty, out),
        }
    }

    fn accepts(ty: &Type) -> bool {
        [Type::TEXT, Type::INT8, Type::BOOL].contains(ty)
    }

    to_sql_checked!();
}

/// One row of an answer.
#[derive(Debug)]
pub struct Row(pub(super) tokio_postgres::Row);

impl Row {
    /// Returns a text column that must not be null.
    pub fn text(&self, column: &str) -> Result<String, Error> {
        self.required(column)
    }

    /// Returns a text column, or `None` where it is null.
    pub fn text_opt(&self, column: &str) -> Result<Option<String>, Error> {
        self.optional(column)
    }

    /// Returns a bigint column that must not be null.
    pub fn int(&self, column: &str) -> Result<i64, Error> {
        self.required(column)
    }

    /// Returns a bigint column, or `None` where it is null.
    pub fn int_opt(&self, column: &str) -> Result<Option<i64>, Error> {
        self.optional(column)
    }

    /// Returns a boolean column that must not be null.
    pub fn bool(&self, column: &str) -> Result<bool, Error> {
        self.required(column)
    }

    /// Returns a boolean column, or `None` where it is null.
    pub fn bool_opt(&self, column: &str) -> Result<Option<bool>, Error> {
        self.optional(column)
    }

    /// Returns a non-negative bigint column as an unsigned number.
    pub fn unsigned<T: TryFrom<i64>>(&self, column: &str) -> Result<T, Error> {
        let value = self.int(column)?;
        let refuse = |_| Error::Unexpected { detail: format!("column \"{column}\" holds {value}") };
        T::try_from(value).map_err(refuse)
    }

    /// Returns a text column parsed into a type that has a text form, such as an LSN.
    pub fn parsed<T: std::str::FromStr>(&self, column: &str) -> Result<T, Error> {
        let text = self.text(column)?;
        let refuse = |_| Error::Unexpected { detail: format!("column \"{column}\" holds \"{text}\"") };
        text.parse().map_err(refuse)
    }

    /// Returns a bigint column of microseconds since 1970 as a time.
    pub fn timestamp(&self, column: &str) -> Result<Timestamp, Error> {
        let value = self.int(column)?;
        let refuse = |_| Error::Unexpected { detail: format!("column \"{column}\" holds {value}") };
        Timestamp::from_microsecond(value).map_err(refuse)
    }

    fn required<'a, T: FromSql<'a>>(&'a self, column: &str) -> Result<T, Error> {
        let missing = || Error::Unexpected { detail: format!("column \"{column}\" is null") };
        self.optional(column)?.ok_or_else(missing)
    }

    fn optional<'a, T: FromSql<'a>>(&'a self, column: &str) -> Result<Option<T>, Error> {
        self.0.try_get(column).map_err(|error| Error::Unexpected { detail: error.to_string() })
    }
}
