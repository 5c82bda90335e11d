//! What the tests of several crates do alike. No product code: a dependency of tests only.
//!
//! Programs are put in place by another process. A test's own descriptor that is open for writing
//! would be inherited, until its exec, by whatever another test starts meanwhile, and running the
//! program would fail with "Text file busy".

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes an executable file, most often a script that stands in for a program; one of that name is
/// replaced.
///
/// # Panics
///
/// Where it cannot be written.
pub fn write_program(path: &Path, text: &str) {
    let mut install = install(Path::new("/proc/self/fd/0"), path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("install of the coreutils can be run");
    let mut input = install.stdin.take().expect("it has an input");
    input.write_all(text.as_bytes()).expect("install reads");
    drop(input);
    let status = install.wait().expect("install ends");
    assert!(status.success(), "{} cannot be written", path.display());
}

/// Copies an executable file; one of that name is replaced.
///
/// # Panics
///
/// Where it cannot be copied.
pub fn copy_program(from: &Path, to: &Path) {
    let status = install(from, to)
        .status()
        .expect("install of the coreutils can be run");
    assert!(status.success(), "{} cannot be copied", from.display());
}

fn install(from: &Path, to: &Path) -> Command {
    let mut install = Command::new("install");
    install.args(["-m", "755", "--"]).args([from, to]);
    install
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// While other threads start processes all the time: with `fs::write` a round fails now and then.
    #[test]
    fn a_program_can_be_run_as_soon_as_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for thread in 0..8 {
                let directory = &directory;
                scope.spawn(move || {
                    for round in 0..25 {
                        let path = directory.path().join(format!("{thread}-{round}"));
                        write_program(&path, "#!/bin/sh\nexit 7\n");
                        assert_eq!(Command::new(&path).status().unwrap().code(), Some(7));
                        let copy = path.with_extension("copy");
                        copy_program(&path, &copy);
                        assert_eq!(Command::new(&copy).status().unwrap().code(), Some(7));
                    }
                });
            }
        });
    }
}
