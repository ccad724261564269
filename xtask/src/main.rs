//! Chores of the repository: `cargo xtask tidy`, `cargo xtask bench`.
fn main() {}
