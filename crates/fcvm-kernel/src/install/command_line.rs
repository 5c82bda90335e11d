//! Kernel command lines: the running one for another kernel, the one for rescue, and whether a root can be
//! found.

/// Why a command line does not lead to a root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineError {
    /// There is no root.
    #[error("the command line has no root=: say one with --command-line")]
    NoRoot,
    /// Only a program in an initramfs can find it.
    #[error(
        "root={0} needs an initramfs (the kernel itself finds /dev/NAME, PARTUUID= and PARTLABEL=): put initrd.img beside the kernel"
    )]
    NeedsInitramfs(String),
    /// A line break or a quote that would end the entry.
    #[error("the command line has a character that a boot entry cannot hold: {0:?}")]
    Character(char),
}

/// Words that the boot loader adds, which belong to one start.
const OF_THE_LOADER: [&str; 2] = ["BOOT_IMAGE", "initrd"];
/// Words that a rescue must not inherit: a wrong one of them may be why it is needed.
const TUNING: [&str; 15] = [
    "quiet",
    "splash",
    "rw",
    "ro",
    "hugepages",
    "hugepagesz",
    "default_hugepagesz",
    "nohz_full",
    "rcu_nocbs",
    "rcu_nocb_poll",
    "isolcpus",
    "irqaffinity",
    "threadirqs",
    "preempt",
    "panic",
];

fn name(word: &str) -> &str {
    word.split_once('=').map_or(word, |(name, _)| name)
}

/// The running command line, for the next kernel.
pub fn running(proc_cmdline: &str) -> String {
    let words = proc_cmdline.split_ascii_whitespace();
    let kept: Vec<&str> = words
        .filter(|word| !OF_THE_LOADER.contains(&name(word)))
        .collect();
    kept.join(" ")
}

/// The command line of a rescue entry: read-only, without tuning, pools not imported by themselves, a shell.
pub fn for_rescue(command_line: &str) -> String {
    let words = command_line.split_ascii_whitespace();
    let mut kept: Vec<&str> = words
        .filter(|word| {
            !TUNING.contains(&name(word))
                && !name(word).starts_with("zfs.")
                && !name(word).starts_with("rcutree.")
        })
        .collect();
    kept.extend([
        "ro",
        "systemd.unit=emergency.target",
        "zfs.zfs_autoimport_disable=1",
    ]);
    kept.join(" ")
}

/// Checks that the kernel can find its root.
pub fn check_root(command_line: &str, has_initramfs: bool) -> Result<(), CommandLineError> {
    if let Some(bad) = command_line
        .chars()
        .find(|c| c.is_control() || "'\\{};$`".contains(*c))
    {
        return Err(CommandLineError::Character(bad));
    }
    let root = command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("root="))
        .next_back()
        .ok_or(CommandLineError::NoRoot)?;
    let itself = ["/dev/", "PARTUUID=", "PARTLABEL="]
        .iter()
        .any(|beginning| root.starts_with(beginning))
        && !root.starts_with("/dev/mapper/")
        && !root.starts_with("/dev/disk/");
    if itself || has_initramfs {
        Ok(())
    } else {
        Err(CommandLineError::NeedsInitramfs(root.to_owned()))
    }
}
