//! The fcvm command line.
fn main() {}
