//! Object stores behind one narrow trait.
