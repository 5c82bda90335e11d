//! Starting `make` and other programs, and what their output says about a failure.

use std::path::Path;
use std::process::{Command, Stdio};

use super::source::Source;
use super::{BuildError, Result};

/// How `make` is started.
#[derive(Debug, Clone, Default)]
pub struct Make {
    /// With clang and lld in place of gcc and ld: what make's `LLVM=` takes, `1` or `-16`.
    pub llvm: Option<String>,
}

impl Make {
    /// `make` on a source, with nothing of the caller's environment that changes a kernel.
    pub(crate) fn command(&self, source: &Source, output: &Path) -> Command {
        let mut command = Command::new("make");
        command
            .arg("--directory")
            .arg(&source.tree)
            .arg(format!("O={}", output.display()))
            .stdin(Stdio::null())
            // The same inputs make the same bytes, whoever builds, when and where.
            .env("LC_ALL", "C")
            .env("KBUILD_BUILD_USER", "fcvm")
            .env("KBUILD_BUILD_HOST", "fcvm")
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 +0000")
            .env("KBUILD_BUILD_VERSION", "1");
        for name in [
            "ARCH",
            "CROSS_COMPILE",
            "CC",
            "KCFLAGS",
            "KBUILD_OUTPUT",
            "KCONFIG_CONFIG",
            "LLVM",
            "LOCALVERSION",
            "MAKEFLAGS",
            "MAKELEVEL",
            "MFLAGS",
        ] {
            command.env_remove(name);
        }
        if let Some(llvm) = &self.llvm {
            command.arg(format!("LLVM={llvm}"));
        }
        command
    }
}

/// Runs a program to its end and returns what it wrote on standard output.
pub(crate) fn fetch_output(action: &str, command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| BuildError::Failed {
        action: action.to_owned(),
        reason: format!("cannot start '{program}': {source}"),
        log: None,
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(BuildError::Failed {
        action: action.to_owned(),
        reason: first_error(&String::from_utf8_lossy(&said)),
        log: None,
    })
}

/// The first line that tells of an error of its own, not one of make's that repeat it.
pub(crate) fn first_error(text: &str) -> String {
    const LINE_MAX_CHARS: usize = 300;
    const SIGNS: [&str; 11] = [
        "error:",
        "fatal:",
        "Error:",
        "undefined reference",
        "No space left on device",
        "not found",
        "Not found",
        "can't open",
        "No such file",
        "Killed",
        "cannot find",
    ];
    let is_makes_own = |line: &str| line.starts_with("make") && line.contains("***");
    // `7 | int x = y;`: a compiler shows the line that it speaks of.
    let is_quoted = |line: &str| {
        let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
        rest.trim_start().starts_with('|')
    };
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let found = lines()
        // A compiler's warning may say anything.
        .filter(|line| !line.contains("warning:") && !is_makes_own(line) && !is_quoted(line))
        .find(|line| SIGNS.iter().any(|sign| line.contains(sign)))
        .or_else(|| lines().find(|line| is_makes_own(line)))
        .or_else(|| lines().next_back())
        .unwrap_or("it gave no reason");
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    found.chars().take(LINE_MAX_CHARS).map(shown).collect()
}

/// Programs and headers that a build needs, with Debian's packages.
const NEEDED: [(&str, &str); 8] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("xz", "xz-utils"),
];

/// The LLVM without a version in its programs' names.
pub(crate) const PLAIN_LLVM: &str = "1";

/// The newest LLVM whose programs are all there, as make's `LLVM=` takes it: distributions have several beside each
/// other, and the one without a version in its names is the oldest of them.
pub(crate) fn newest_llvm(search_path: &std::ffi::OsStr) -> String {
    let directories: Vec<_> = std::env::split_paths(search_path).collect();
    let has = |name: String| {
        directories
            .iter()
            .any(|directory| directory.join(&name).is_file())
    };
    let versions = directories
        .iter()
        .filter_map(|directory| std::fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_prefix("clang-")?.parse::<u32>().ok()
        });
    versions
        .filter(|version| {
            ["ld.lld", "llvm-ar", "llvm-objcopy"]
                .iter()
                .all(|program| has(format!("{program}-{version}")))
        })
        .max()
        .map_or(PLAIN_LLVM.to_owned(), |version| format!("-{version}"))
}

/// Fails where something is missing that the build will ask for, with the packages that have it.
///
/// `search_path` is the caller's `PATH`; `values` the configuration, where there is one already.
///
/// # Errors
/// [`BuildError::Missing`].
pub fn check_tools(
    search_path: &std::ffi::OsStr,
    llvm: bool,
    extra: &[(&'static str, &'static str)],
    headers: bool,
) -> Result<()> {
    let has = |name: &str| {
        std::env::split_paths(search_path).any(|directory| directory.join(name).is_file())
    };
    let mut wanted: Vec<(&str, &str)> = NEEDED.to_vec();
    if llvm && newest_llvm(search_path) == PLAIN_LLVM {
        wanted.extend([("clang", "clang"), ("ld.lld", "lld"), ("llvm-ar", "llvm")]);
    }
    wanted.extend_from_slice(extra);
    let mut missing: Vec<(&str, &str)> = wanted
        .into_iter()
        .filter(|(program, _)| !has(program))
        .collect();
    if headers {
        let header = |name: &str| {
            [
                "/usr/include",
                "/usr/include/x86_64-linux-gnu",
                "/usr/local/include",
            ]
            .iter()
            .any(|directory| Path::new(directory).join(name).is_file())
        };
        for (name, package) in [("gelf.h", "libelf-dev"), ("openssl/bio.h", "libssl-dev")] {
            if !header(name) {
                missing.push((name, package));
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let join = |words: Vec<&str>, by: &str| words.join(by);
    Err(BuildError::Missing {
        missing: join(missing.iter().map(|(program, _)| *program).collect(), ", "),
        packages: join(missing.iter().map(|(_, package)| *package).collect(), " "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_real_error_is_told_not_makes_echo() {
        let log = "  CC      fs/a.o\n\
                   fs/a.c:3:1: warning: error: is a word in a warning\n\
                   \x20   3 | #warning error: is a word in a warning\n\
                   fs/a.c:7:5: error: 'x' undeclared\n\
                   make[3]: *** [scripts/Makefile.build:250: fs/a.o] Error 1\n\
                   make: *** [Makefile:1] Error 2\n";
        assert_eq!(first_error(log), "fs/a.c:7:5: error: 'x' undeclared");
        assert_eq!(
            first_error("make: *** No rule to make target 'x'.  Stop.\n"),
            "make: *** No rule to make target 'x'.  Stop."
        );
        assert_eq!(first_error(""), "it gave no reason");
    }

    #[test]
    fn the_newest_whole_llvm_is_taken() {
        let bin = tempfile::tempdir().unwrap();
        let path = bin.path().as_os_str();
        assert_eq!(newest_llvm(path), "1");
        // 19 has no linker, and 9 is less than 16.
        for name in ["clang-9", "clang-16", "clang-19", "clang-cpp-16"] {
            std::fs::write(bin.path().join(name), "").unwrap();
        }
        for version in ["9", "16"] {
            for program in ["ld.lld", "llvm-ar", "llvm-objcopy"] {
                std::fs::write(bin.path().join(format!("{program}-{version}")), "").unwrap();
            }
        }
        assert_eq!(newest_llvm(path), "-16");
    }

    #[test]
    fn what_is_missing_is_told_with_its_package() {
        let error = check_tools("/nonexistent".as_ref(), false, &[], false).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("flex") && message.contains("xz-utils"),
            "{message}"
        );
    }
}
