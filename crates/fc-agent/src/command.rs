//! Which file a command line means, and which failure a refused `execve` is.

use std::ffi::CString;

use fcvm_wire::{Failure, FailureKind};
use rustix::io::Errno;

use crate::failure::{bad_request, reason};
use crate::sys;

/// Where commands are looked up when the environment has no PATH: Podman's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The value of a variable; the last entry of that name counts.
pub(crate) fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    environment.iter().rev().find_map(|entry| {
        entry
            .split_once('=')
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value)
    })
}

/// The files that a program name may mean, in the order in which they are tried.
fn candidates(program: &str, environment: &[String]) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    variable(environment, "PATH")
        .unwrap_or(DEFAULT_PATH)
        .split(':')
        .map(|directory| match directory {
            "" => format!("./{program}"),
            directory => format!("{}/{program}", directory.trim_end_matches('/')),
        })
        .collect()
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>, Failure> {
    strings
        .iter()
        .map(|string| CString::new(string.as_str()))
        .collect::<Result<_, _>>()
        .map_err(|_| bad_request("an argument or a variable holds a zero byte"))
}

/// A command ready to be executed.
pub(crate) struct Command {
    program: String,
    candidates: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Command {
    /// Prepares a command line.
    pub(crate) fn new(arguments: &[String], environment: &[String]) -> Result<Self, Failure> {
        let program = match arguments.first() {
            Some(program) if !program.is_empty() => program.clone(),
            _ => {
                return Err(Failure {
                    kind: FailureKind::CommandNotFound,
                    message: "exec: there is no command to run".into(),
                });
            }
        };
        Ok(Self {
            candidates: c_strings(&candidates(&program, environment))?,
            arguments: c_strings(arguments)?,
            environment: c_strings(environment)?,
            program,
        })
    }

    /// Replaces this process by the command; returns only where that fails. As `execvp(3)`: what
    /// cannot be executed is remembered while the search goes on.
    pub(crate) fn execute(&self) -> Failure {
        let mut refused = None;
        for candidate in &self.candidates {
            match sys::execve(candidate, &self.arguments, &self.environment) {
                Errno::NOENT | Errno::NOTDIR if exists(candidate) => {
                    return self.interpreter_missing();
                }
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCESS => refused = Some(Errno::ACCESS),
                errno => return self.not_executable(errno),
            }
        }
        match refused {
            Some(errno) => self.not_executable(errno),
            None => self.not_found(),
        }
    }

    fn not_found(&self) -> Failure {
        let program = &self.program;
        let message = if program.contains('/') {
            format!("exec: '{program}' does not exist in the container")
        } else {
            format!("exec: '{program}' was not found in the container's PATH")
        };
        Failure {
            kind: FailureKind::CommandNotFound,
            message,
        }
    }

    fn interpreter_missing(&self) -> Failure {
        let message = format!(
            "exec: '{}' needs an interpreter or a loader that the container does not have",
            self.program
        );
        Failure {
            kind: FailureKind::CommandNotFound,
            message,
        }
    }

    fn not_executable(&self, errno: Errno) -> Failure {
        let why = match errno {
            Errno::NOEXEC => "it is no program for this machine".to_owned(),
            errno => reason(errno).to_lowercase(),
        };
        Failure {
            kind: FailureKind::CommandNotExecutable,
            message: format!("exec: '{}' cannot be executed: {why}", self.program),
        }
    }
}

fn exists(path: &CString) -> bool {
    rustix::fs::stat(path.as_c_str()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(path: &str) -> Vec<String> {
        vec![
            "PATH=/ignored".into(),
            "EMPTY=".into(),
            format!("PATH={path}"),
        ]
    }

    #[test]
    fn a_name_is_tried_in_each_directory_of_the_path() {
        assert_eq!(
            candidates("ls", &environment("/a:/b/::/c")),
            ["/a/ls", "/b/ls", "./ls", "/c/ls"]
        );
    }

    #[test]
    fn a_name_with_a_slash_is_not_looked_up() {
        assert_eq!(candidates("./run", &environment("/a")), ["./run"]);
        assert_eq!(candidates("/bin/ls", &[]), ["/bin/ls"]);
    }

    #[test]
    fn without_a_path_the_usual_directories_are_searched() {
        let found = candidates("ls", &["PATHS=/x".to_owned()]);
        assert_eq!(found.first().unwrap(), "/usr/local/sbin/ls");
        assert_eq!(found.len(), 6);
    }

    #[test]
    fn variables_are_found_by_their_whole_name() {
        let environment = environment("/x");
        assert_eq!(variable(&environment, "PATH"), Some("/x"));
        assert_eq!(variable(&environment, "EMPTY"), Some(""));
        assert_eq!(variable(&environment, "PAT"), None);
    }

    #[test]
    fn an_empty_command_line_is_a_missing_command() {
        for arguments in [vec![], vec![String::new()]] {
            let failure = Command::new(&arguments, &[]).err().unwrap();
            assert_eq!(failure.kind, FailureKind::CommandNotFound);
        }
    }

    #[test]
    fn zero_bytes_are_refused() {
        let failure = Command::new(&["a\0b".to_owned()], &[]).err().unwrap();
        assert_eq!(failure.kind, FailureKind::BadRequest);
    }

    #[test]
    fn what_does_not_exist_and_what_is_no_program_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let kind = |program: &str| {
            let path = format!("PATH={}", directory.path().display());
            Command::new(&[program.to_owned()], &[path])
                .unwrap()
                .execute()
                .kind
        };
        std::fs::write(directory.path().join("text"), "no program\n").unwrap();
        std::fs::create_dir(directory.path().join("folder")).unwrap();
        assert_eq!(kind("absent"), FailureKind::CommandNotFound);
        assert_eq!(kind("/absent/program"), FailureKind::CommandNotFound);
        assert_eq!(kind("text"), FailureKind::CommandNotExecutable);
        assert_eq!(kind("folder"), FailureKind::CommandNotExecutable);
    }
}
