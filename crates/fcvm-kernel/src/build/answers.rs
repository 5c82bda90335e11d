//! A profile from the few answers that a person can give: which built-in profile, and which parts with it.

use super::profile::{Use, is_name};
use super::{BuildError, Result};

/// What matters to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefer {
    /// Short delays.
    Latency,
    /// Much work done.
    Throughput,
}

/// How much a guest's kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Features {
    /// What a container needs.
    Small,
    /// Also IPv6, nftables, BPF, 9p, bridges, 32-bit programs.
    Full,
}

/// How a host gives memory to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestMemory {
    /// It has no guests.
    None,
    /// As they ask for it.
    Shared,
    /// Set aside in huge pages.
    Reserved,
}

/// What a host runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hardware {
    /// All that the profiles know.
    All,
    /// NVMe, SATA, Intel's and Realtek's Ethernet.
    Common,
    /// A virtual machine.
    Virtual,
}

/// What the kernel is for; each use has questions of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A microVM's guest.
    Guest(Features),
    /// A host.
    Host {
        /// What matters.
        prefer: Prefer,
        /// How guests get memory.
        guest_memory: GuestMemory,
        /// What it runs on.
        hardware: Hardware,
    },
}

/// All answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answers {
    /// What the kernel is for.
    pub purpose: Purpose,
    /// OpenZFS is built in.
    pub zfs: bool,
}

impl Answers {
    fn used_for(&self) -> Use {
        match self.purpose {
            Purpose::Guest(_) => Use::Guest,
            Purpose::Host { .. } => Use::Host,
        }
    }

    /// The profiles and parts that together are the answers.
    fn includes(&self) -> Vec<&'static str> {
        let mut includes = Vec::new();
        match self.purpose {
            Purpose::Guest(Features::Small) => includes.push("guest-min"),
            Purpose::Guest(Features::Full) => includes.push("guest"),
            Purpose::Host {
                prefer,
                guest_memory,
                hardware,
            } => {
                includes.push(match prefer {
                    Prefer::Latency => "host-latency",
                    Prefer::Throughput => "host-full",
                });
                match guest_memory {
                    GuestMemory::None => includes.push("no-guests"),
                    GuestMemory::Shared => {}
                    GuestMemory::Reserved => includes.push("reserved-memory"),
                }
                match hardware {
                    Hardware::All => {}
                    Hardware::Common => includes.push("common-hardware"),
                    Hardware::Virtual => includes.push("virtual-hardware"),
                }
            }
        }
        if self.zfs {
            includes.push("zfs");
        }
        includes
    }

    /// The text of a profile's file of this name; `command` makes the same again.
    ///
    /// # Errors
    /// [`BuildError::Profile`] where the name cannot be part of a kernel's release.
    pub fn profile_text(&self, name: &str, command: &str) -> Result<String> {
        if !is_name(name) {
            return Err(BuildError::Profile {
                name: name.to_owned(),
                reason: "its name has to be letters, digits, '-', '_' and '.'".to_owned(),
            });
        }
        let includes = self.includes();
        let used_for = match self.used_for() {
            Use::Guest => "guest",
            Use::Host => "host",
        };
        Ok(format!(
            "# Made by: {command}\n\
             # 'fcvm kernel profiles ./{name}.toml' explains every line; add your own below, each with why and cost.\n\
             \n\
             summary = \"{}\"\n\
             use = \"{used_for}\"\n\
             include = [\"{}\"]\n\
             \n\
             [symbols.\"Kernel\"]\n\
             LOCALVERSION = {{ set = '\"-{name}\"', why = \"uname -r tells which kernel this is\", cost = \"none\" }}\n",
            includes.join(", "),
            includes.join("\", \""),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Profile;
    use super::*;

    /// Every combination.
    fn all() -> Vec<Answers> {
        let mut purposes = vec![
            Purpose::Guest(Features::Small),
            Purpose::Guest(Features::Full),
        ];
        for prefer in [Prefer::Latency, Prefer::Throughput] {
            for guest_memory in [
                GuestMemory::None,
                GuestMemory::Shared,
                GuestMemory::Reserved,
            ] {
                for hardware in [Hardware::All, Hardware::Common, Hardware::Virtual] {
                    purposes.push(Purpose::Host {
                        prefer,
                        guest_memory,
                        hardware,
                    });
                }
            }
        }
        let both = purposes
            .into_iter()
            .flat_map(|purpose| [false, true].map(|zfs| Answers { purpose, zfs }));
        both.collect()
    }

    #[test]
    fn every_combination_is_a_profile_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for (index, answers) in all().into_iter().enumerate() {
            let name = format!("mine-{index}");
            let path = directory.path().join(format!("{name}.toml"));
            let text = answers.profile_text(&name, "fcvm kernel config").unwrap();
            std::fs::write(&path, text).unwrap();
            let profile = Profile::load(path.to_str().unwrap()).unwrap();
            assert_eq!(profile.used_for, answers.used_for(), "{answers:?}");
            let value = |symbol: &str| {
                let found = profile.requests().find(|request| request.symbol == symbol);
                found.map(|request| request.value.clone())
            };
            assert_eq!(value("LOCALVERSION"), Some(format!("\"-{name}\"")));
            assert_eq!(value("ZLIB_DEFLATE").is_some(), answers.zfs, "{answers:?}");
            let values: Vec<String> = profile
                .requests()
                .filter(|request| request.symbol != "LOCALVERSION")
                .map(|request| format!("{}={}", request.symbol, request.value))
                .collect();
            assert!(seen.insert(values), "{answers:?} changes nothing");
        }
    }

    #[test]
    fn a_name_that_cannot_be_one_is_refused() {
        for name in ["", "a b", "a/b", "a\"b"] {
            assert!(all()[0].profile_text(name, "").is_err(), "{name}");
        }
    }
}
