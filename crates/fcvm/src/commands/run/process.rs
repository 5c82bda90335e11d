//! The container's first process, made of the image's configuration and the flags by Podman's rules.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_types::guest::{ProcessPlan, Rlimit};

use super::capabilities;
use crate::args::run::RunArguments;
use crate::attach::terminal_size;

/// The part of an image's configuration that says what to run (OCI image spec, `config`).
#[derive(Debug, Clone, Default)]
pub(crate) struct ImageProcess {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) user: String,
    pub(crate) stop_signal: Option<String>,
}

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Podman's default for containers of root.
const DEFAULT_NOFILE: u64 = 1_048_576;

/// Makes the plan.
pub(crate) fn plan(
    image: ImageProcess,
    arguments: &RunArguments,
    hostname: &str,
) -> anyhow::Result<ProcessPlan> {
    let args = command_line(
        &image,
        arguments.start.entrypoint.as_deref(),
        &arguments.start.command,
    )?;
    let mut env = vec![
        DEFAULT_PATH.to_owned(),
        "container=fcvm".to_owned(),
        format!("HOSTNAME={hostname}"),
    ];
    if arguments.tty {
        terminal_environment(&mut env);
    }
    for entry in image.env.into_iter().chain(environment(
        &arguments.start.env_file,
        &arguments.start.env,
    )?) {
        set(&mut env, entry);
    }
    let mut no_new_privileges = false;
    for option in &arguments.start.security_opt {
        match option.as_str() {
            "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true" => {
                no_new_privileges = true
            }
            "no-new-privileges:false" | "no-new-privileges=false" => no_new_privileges = false,
            other => bail!("--security-opt {other} is unknown: no-new-privileges is what there is"),
        }
    }
    Ok(ProcessPlan {
        args,
        env,
        cwd: arguments.start.workdir.clone().unwrap_or(image.working_dir),
        user: arguments.start.user.clone().unwrap_or(image.user),
        terminal: arguments.tty.then(terminal_size),
        stdin: arguments.interactive,
        capabilities: capabilities::resolve(
            &arguments.start.cap_add,
            &arguments.start.cap_drop,
            arguments.start.privileged,
        )?,
        rlimits: rlimits(&arguments.start.ulimit)?,
        no_new_privileges,
    })
}

/// Entrypoint and command: an entrypoint on the command line also removes the image's command.
fn command_line(
    image: &ImageProcess,
    entrypoint: Option<&str>,
    command: &[String],
) -> anyhow::Result<Vec<String>> {
    let mut args = match entrypoint {
        None => image.entrypoint.clone(),
        Some("") => Vec::new(),
        Some(text) if text.trim_start().starts_with('[') => serde_json::from_str(text)
            .with_context(|| format!("--entrypoint {text} is no JSON list of texts"))?,
        Some(text) => vec![text.to_owned()],
    };
    if !command.is_empty() {
        args.extend_from_slice(command);
    } else if entrypoint.is_none() {
        args.extend_from_slice(&image.cmd);
    }
    if args.is_empty() {
        bail!("the image says no command to run: write one after the image's name");
    }
    Ok(args)
}

/// TERM, as the outer terminal has it.
pub(crate) fn terminal_environment(env: &mut Vec<String>) {
    let term = std::env::var("TERM").unwrap_or_default();
    set(
        env,
        format!("TERM={}", if term.is_empty() { "xterm" } else { &term }),
    );
}

/// Sets a variable: the last one wins.
pub(crate) fn set(env: &mut Vec<String>, entry: String) {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let wanted = name(&entry);
    match env.iter_mut().find(|other| name(other) == wanted) {
        Some(other) => *other = entry,
        None => env.push(entry),
    }
}

/// Variables of the files, then of the flags; a bare name takes the host's value.
pub(crate) fn environment(files: &[PathBuf], flags: &[String]) -> anyhow::Result<Vec<String>> {
    let mut env = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the environment file {}", file.display()))?;
        parse_file(file, &text, &mut env)?;
    }
    for flag in flags {
        if flag.is_empty() || flag.starts_with('=') {
            bail!("'{flag}' is no environment variable: write NAME=value");
        }
        env.extend(with_host_value(flag));
    }
    Ok(env)
}

fn parse_file(file: &Path, text: &str, env: &mut Vec<String>) -> anyhow::Result<()> {
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with('=') {
            bail!(
                "line {} of {} has no name before '='",
                number + 1,
                file.display()
            );
        }
        env.extend(with_host_value(line));
    }
    Ok(())
}

fn with_host_value(entry: &str) -> Option<String> {
    if entry.contains('=') {
        return Some(entry.to_owned());
    }
    std::env::var(entry)
        .ok()
        .map(|value| format!("{entry}={value}"))
}

/// `--ulimit NAME=SOFT[:HARD]`; -1 is unlimited.
fn rlimits(texts: &[String]) -> anyhow::Result<Vec<Rlimit>> {
    const NAMES: [&str; 15] = [
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    let mut limits = vec![Rlimit {
        name: "nofile".to_owned(),
        soft: DEFAULT_NOFILE,
        hard: DEFAULT_NOFILE,
    }];
    for text in texts {
        let refuse = || {
            format!("'{text}' is no limit: write NAME=SOFT[:HARD], for example nofile=1024:4096")
        };
        let (name, values) = text.split_once('=').with_context(refuse)?;
        if !NAMES.contains(&name) {
            bail!("'{name}' is no resource limit: {} are", NAMES.join(", "));
        }
        let value = |text: &str| {
            if text == "-1" || text == "unlimited" {
                Ok(u64::MAX)
            } else {
                text.parse().with_context(refuse)
            }
        };
        let (soft, hard) = match values.split_once(':') {
            Some((soft, hard)) => (value(soft)?, value(hard)?),
            None => (value(values)?, value(values)?),
        };
        if soft > hard {
            bail!("the soft limit of {name} is above the hard one");
        }
        limits.retain(|limit| limit.name != name);
        limits.push(Rlimit {
            name: name.to_owned(),
            soft,
            hard,
        });
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn entrypoint_and_command_follow_podman() {
        let image = ImageProcess {
            entrypoint: own(&["/entry", "-x"]),
            cmd: own(&["serve"]),
            ..Default::default()
        };
        let line =
            |entrypoint, command: &[&str]| command_line(&image, entrypoint, &own(command)).unwrap();
        assert_eq!(line(None, &[]), ["/entry", "-x", "serve"]);
        assert_eq!(line(None, &["debug"]), ["/entry", "-x", "debug"]);
        assert_eq!(line(Some("/bin/sh"), &[]), ["/bin/sh"]);
        assert_eq!(
            line(Some("/bin/sh"), &["-c", "id"]),
            ["/bin/sh", "-c", "id"]
        );
        assert_eq!(line(Some("[\"a\", \"b c\"]"), &["d"]), ["a", "b c", "d"]);
        assert_eq!(line(Some(""), &["ls"]), ["ls"]);
        assert!(command_line(&image, Some(""), &[]).is_err());
        assert!(command_line(&image, Some("[1]"), &[]).is_err());
        assert!(command_line(&ImageProcess::default(), None, &[]).is_err());
    }

    #[test]
    fn the_last_value_of_a_variable_wins() {
        let mut env = own(&["A=1", "B=2"]);
        set(&mut env, "A=3=4".to_owned());
        set(&mut env, "C=".to_owned());
        assert_eq!(env, ["A=3=4", "B=2", "C="]);
    }

    #[test]
    fn environment_files() {
        let mut env = Vec::new();
        parse_file(
            Path::new("f"),
            "# comment\n\nA=1 # kept\n  B=x=y\nFCVM_TEST_NOT_SET\n",
            &mut env,
        )
        .unwrap();
        assert_eq!(env, ["A=1 # kept", "B=x=y"]);
        assert!(parse_file(Path::new("f"), "=x", &mut env).is_err());
        assert!(environment(&[], &own(&["=x"])).is_err());
    }

    #[test]
    fn limits() {
        let limits = rlimits(&own(&["nofile=10:20", "core=-1"])).unwrap();
        assert_eq!(limits.len(), 2);
        assert_eq!((limits[0].soft, limits[0].hard), (10, 20));
        assert_eq!(limits[1].soft, u64::MAX);
        for bad in ["nofile", "nofile=x", "nofile=5:4", "wings=1"] {
            assert!(rlimits(&own(&[bad])).is_err(), "{bad}");
        }
    }
}
