//! As the guest's process 1: an agent that ends at once, at which the kernel panics.

fn main() {}
