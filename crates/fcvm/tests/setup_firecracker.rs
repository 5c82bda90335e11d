//! `fcvm setup firecracker` through the program; what is fetched and refused is tested with the library.

#![allow(missing_docs, reason = "a test program has no users")]

use std::process::Command;

#[test]
fn a_server_that_is_not_there_is_told_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_fcvm"))
        .arg("--data-dir")
        .arg(directory.path())
        .args(["setup", "firecracker", "--version", "1.13.1"])
        .args(["--server", "http://127.0.0.1:1/releases"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let line = String::from_utf8(output.stderr).unwrap();
    let address = "http://127.0.0.1:1/releases/download/v1.13.1/";
    assert!(
        line.contains(address) && line.lines().count() == 1,
        "{line}"
    );
    let firecracker = directory.path().join("firecracker");
    let left = std::fs::read_dir(firecracker).map_or(0, Iterator::count);
    assert_eq!(left, 0);
}
