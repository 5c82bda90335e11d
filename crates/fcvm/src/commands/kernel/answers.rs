//! `fcvm kernel config --interactive` and its options: a profile from a few answers.

use std::io::{BufRead as _, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use fcvm_kernel::build::{Answers, Features, GuestMemory, Hardware, Prefer, Purpose};

use crate::args::kernel::build::{
    AnswerArguments, FeaturesChoice, GuestMemoryChoice, HardwareChoice, PreferChoice, UseChoice,
    ZfsChoice,
};

/// Longest line that is read as an answer.
const LINE_MAX_BYTES: u64 = 256;

/// Writes the profile that the answers make to `path`, where nothing may be yet.
pub(super) fn save(
    arguments: &AnswerArguments,
    zfs: Option<ZfsChoice>,
    path: &Path,
) -> anyhow::Result<()> {
    // Before anybody is asked.
    if path.exists() {
        bail!(
            "{} is there already: give another --save-profile, or remove it",
            path.display()
        );
    }
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_suffix(".toml"))
        .with_context(|| format!("{} has to end with .toml", path.display()))?;
    let mut asked = Asked {
        interactive: arguments.interactive,
        command: "fcvm kernel config".to_owned(),
    };
    let answers = asked.answers(arguments, zfs)?;
    let command = format!("{} --save-profile ./{name}.toml", asked.command);
    let text = answers.profile_text(name, &command)?;
    // Nobody else's file is written over.
    std::fs::File::create_new(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// Asks, and keeps the options that give the same answers.
struct Asked {
    interactive: bool,
    command: String,
}

impl Asked {
    fn answers(
        &mut self,
        given: &AnswerArguments,
        zfs: Option<ZfsChoice>,
    ) -> anyhow::Result<Answers> {
        let used_for = self.ask(
            "use",
            "What is the kernel for?",
            given.used_for,
            UseChoice::Guest,
        )?;
        let purpose = match used_for {
            UseChoice::Guest => {
                refuse(given.prefer, "prefer", "host")?;
                refuse(given.guest_memory, "guest-memory", "host")?;
                refuse(given.hardware, "hardware", "host")?;
                let features = self.ask(
                    "features",
                    "How much shall the guest be able to do?",
                    given.features,
                    FeaturesChoice::Small,
                )?;
                Purpose::Guest(match features {
                    FeaturesChoice::Small => Features::Small,
                    FeaturesChoice::Full => Features::Full,
                })
            }
            UseChoice::Host => {
                refuse(given.features, "features", "guest")?;
                self.host(given)?
            }
        };
        let zfs = self.ask("zfs", "OpenZFS?", zfs, ZfsChoice::None)?;
        Ok(Answers {
            purpose,
            zfs: zfs == ZfsChoice::Builtin,
        })
    }

    fn host(&mut self, given: &AnswerArguments) -> anyhow::Result<Purpose> {
        let prefer = self.ask(
            "prefer",
            "What matters?",
            given.prefer,
            PreferChoice::Throughput,
        )?;
        let guest_memory = self.ask(
            "guest-memory",
            "How do guests get memory?",
            given.guest_memory,
            GuestMemoryChoice::Shared,
        )?;
        let hardware = self.ask(
            "hardware",
            "What does it run on?",
            given.hardware,
            HardwareChoice::All,
        )?;
        Ok(Purpose::Host {
            prefer: match prefer {
                PreferChoice::Latency => Prefer::Latency,
                PreferChoice::Throughput => Prefer::Throughput,
            },
            guest_memory: match guest_memory {
                GuestMemoryChoice::None => GuestMemory::None,
                GuestMemoryChoice::Shared => GuestMemory::Shared,
                GuestMemoryChoice::Reserved => GuestMemory::Reserved,
            },
            hardware: match hardware {
                HardwareChoice::All => Hardware::All,
                HardwareChoice::Common => Hardware::Common,
                HardwareChoice::Virtual => Hardware::Virtual,
            },
        })
    }

    /// The answer given by an option; else asked for, or the default.
    fn ask<T: ValueEnum>(
        &mut self,
        option: &str,
        question: &str,
        given: Option<T>,
        default: T,
    ) -> anyhow::Result<T> {
        let answer = match given {
            Some(given) => given,
            None if self.interactive => question_of(option, question, &default)?.unwrap_or(default),
            None => default,
        };
        self.command
            .push_str(&format!(" --{option} {}", name_of(&answer)));
        Ok(answer)
    }
}

/// An option that the kernel's use leaves without a meaning.
fn refuse<T>(given: Option<T>, option: &str, of: &str) -> anyhow::Result<()> {
    match given {
        Some(_) => bail!("--{option} is about a {of}'s kernel: add --use {of}, or leave it out"),
        None => Ok(()),
    }
}

fn name_of<T: ValueEnum>(value: &T) -> String {
    value
        .to_possible_value()
        .map_or(String::new(), |value| value.get_name().to_owned())
}

/// Asks until the answer is one; nothing stands for the default.
fn question_of<T: ValueEnum>(
    option: &str,
    question: &str,
    default: &T,
) -> anyhow::Result<Option<T>> {
    eprintln!("{question}");
    for value in T::value_variants() {
        let help = value.to_possible_value();
        let help = help.as_ref().and_then(|value| value.get_help());
        eprintln!(
            "  {:<12}{}",
            name_of(value),
            help.map_or(String::new(), ToString::to_string)
        );
    }
    loop {
        eprint!("[{}] ", name_of(default));
        let mut line = String::new();
        let mut input = std::io::stdin().lock().take(LINE_MAX_BYTES);
        let count = input.read_line(&mut line).context("cannot read answers")?;
        if count == 0 {
            bail!("the answers end before this question: add --{option}");
        }
        match line.trim() {
            "" => return Ok(None),
            answer => match T::from_str(answer, true) {
                Ok(value) => return Ok(Some(value)),
                Err(_) => eprintln!("'{answer}' is none of them"),
            },
        }
    }
}
