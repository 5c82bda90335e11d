//! The guest's process 1.
fn main() {}
