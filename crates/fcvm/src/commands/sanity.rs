//! `fcvm test sanity`: does this installation work, from a start to a stop?

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::args::system::TestCommand;
use crate::context::Context;
use crate::state::random;

pub(crate) async fn run(context: &Context, command: TestCommand) -> anyhow::Result<u8> {
    let TestCommand::Sanity { image } = command;
    let image = match image {
        Some(image) => image,
        None => super::image::any_name(context)?.context(
            "there is no image to test with: make one with 'fcvm image bootstrap debian:bookworm', or name one with --image",
        )?,
    };
    let name = format!("sanity-{:08x}", u32::from_le_bytes(random()?));
    println!("Testing with {image} as VM {name}");
    let vm = Vm {
        context,
        name: &name,
    };
    let result = vm.steps(&image);
    if result.is_err() {
        // The error of the step is the one to tell.
        let _ = vm.fcvm(&["rm", "-f", &name]);
    }
    result?;
    println!("All steps passed");
    Ok(crate::EXIT_SUCCESS)
}

struct Vm<'a> {
    context: &'a Context,
    name: &'a str,
}

impl Vm<'_> {
    fn steps(&self, image: &str) -> anyhow::Result<()> {
        let name = self.name;
        step("start a VM", || {
            self.fcvm(&[
                "run",
                "-d",
                "--name",
                name,
                "--stop-timeout",
                "1",
                image,
                "sleep",
                "3600",
            ])
            .map(drop)
        })?;
        step("list it", || {
            let listed = self.fcvm(&["ls", "--format", "json"])?;
            ensure!(listed.contains(name), "'fcvm ls' does not show it");
            Ok(())
        })?;
        step("run a command in it", || {
            let said = self.fcvm(&["exec", name, "echo", "hello"])?;
            ensure!(said == "hello\n", "it said {said:?} in place of hello");
            Ok(())
        })?;
        step("pass an exit code", || {
            let status = self
                .command(&["exec", name, "sh", "-c", "exit 42"])
                .status()?;
            ensure!(
                status.code() == Some(42),
                "the exit code was {status} in place of 42"
            );
            Ok(())
        })?;
        step("copy a file in and out", || self.copy())?;
        step("stop and remove it", || {
            self.fcvm(&["stop", name])?;
            self.fcvm(&["rm", name]).map(drop)
        })
    }

    fn copy(&self) -> anyhow::Result<()> {
        let bytes: [u8; 4096] = random()?;
        let directory = self.context.data_dir.join(format!("tmp-{}", self.name));
        std::fs::create_dir(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let copied = self.copy_through(&directory, &bytes);
        std::fs::remove_dir_all(&directory)?;
        ensure!(copied? == bytes, "the file came back different");
        Ok(())
    }

    fn copy_through(&self, directory: &Path, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (there, back) = (directory.join("there"), directory.join("back"));
        std::fs::write(&there, bytes)?;
        let inside = format!("{}:/tmp/sanity", self.name);
        self.fcvm(&["cp", &there.to_string_lossy(), &inside])?;
        self.fcvm(&["cp", &inside, &back.to_string_lossy()])?;
        Ok(std::fs::read(back)?)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        // The program that runs can always name its own file on Linux with /proc.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("--data-dir")
            .arg(&self.context.data_dir)
            .arg("--runtime-dir")
            .arg(&self.context.runtime_dir);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn fcvm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self
            .command(arguments)
            .output()
            .context("cannot run this program again")?;
        if !output.status.success() {
            bail!(
                "{}",
                String::from_utf8_lossy(&output.stderr)
                    .trim()
                    .trim_start_matches("Error: ")
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn step(what: &str, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    print!("  {what:<28}");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = act();
    match &result {
        Ok(()) => println!("ok    {:>6} ms", start.elapsed().as_millis()),
        Err(_) => println!("FAILED"),
    }
    result.with_context(|| format!("the step '{what}' failed"))
}
