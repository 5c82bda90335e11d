//! The container's own passwd and group files, which the agent reads as process 1.

#![no_main]
// The agent is a program; its parser is compiled into this target from its source.
#![allow(dead_code)]

#[path = "../../crates/fc-agent/src/users.rs"]
mod users;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str, &str)| {
    let (spec, passwd, group) = input;
    if let Ok(identity) = users::resolve(spec, passwd, group) {
        assert!(!identity.home.is_empty());
        // The largest number means "unchanged" to the kernel.
        assert!(identity.uid != u32::MAX && identity.gid != u32::MAX, "{spec}");
        assert!(!identity.groups.contains(&u32::MAX));
    }
    for entry in users::passwd_entries(passwd) {
        assert!(!entry.name.contains(':'));
    }
});
