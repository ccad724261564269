//! The trilith command line.
fn main() {}
