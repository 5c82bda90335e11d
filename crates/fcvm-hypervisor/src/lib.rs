//! Hypervisors behind small capability traits.
