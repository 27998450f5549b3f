//! The wire to PostgreSQL: the one SQL session all use.
