//! `fcvm cp` into a container: the agent unpacks an archive that it was sent. Whatever is in it, nothing
//! outside of its directory changes.

#![no_main]
// The agent is a program; its unpacker is compiled into this target from its source.
#![allow(dead_code)]

#[path = "../../crates/fc-agent/src/failure.rs"]
mod failure;
#[path = "../src/scratch.rs"]
mod scratch;
#[path = "../src/tar_input.rs"]
mod tar_input;

#[path = "../../crates/fc-agent/src/helper"]
mod helper {
    mod archive {
        use std::path::Path;

        /// In the agent it tells kinds of errors apart.
        pub(super) fn path_failure(path: &Path, error: &std::io::Error) -> fcvm_wire::Failure {
            crate::failure::guest(format!("{}: {error}", path.display()))
        }
    }
    mod unpack;

    /// Unpacks an archive into a directory.
    pub fn run(directory: &str, archive: std::fs::File) -> bool {
        unpack::write(directory, false, Some(archive)).is_ok()
    }
}

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::MetadataExt;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let scratch = scratch::directory();
    let inside = scratch.path().join("inside");
    let outside = scratch.path().join("outside");
    fs::create_dir(&inside).expect("a directory");
    fs::write(&outside, "kept").expect("a file");
    let before = fs::metadata(&outside).expect("it is there");
    let mut archive = tempfile::tempfile_in(scratch.path()).expect("a file without a name");
    archive.write_all(&tar_input::with_valid_checksums(input)).expect("room for the archive");
    archive.rewind().expect("a file can be read again");
    helper::run(inside.to_str().expect("a path of letters"), archive);
    let after = fs::symlink_metadata(&outside).expect("it is still there");
    assert_eq!((after.ino(), after.mode()), (before.ino(), before.mode()));
    assert_eq!(fs::read(&outside).expect("it can be read"), b"kept");
    assert_eq!(fs::read_dir(scratch.path()).expect("the directory").count(), 2);
    // A member may have closed a directory to its owner.
    open_all(&inside);
});

fn open_all(directory: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = fs::set_permissions(directory, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_all(&entry.path());
        }
    }
}
