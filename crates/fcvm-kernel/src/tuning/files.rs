//! A plan as configuration files.

use std::path::Path;

use super::{KernelThread, Place, Plan, Setting};
use crate::install::beneath;
use crate::{Result, files};

/// A file of a plan, below the root directory.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PlannedFile {
    /// Relative path.
    pub path: &'static str,
    /// All of it.
    pub content: String,
}

const HEADER: &str = "# Written by 'fcvm kernel tune'; a later run replaces this file.\n";

impl Plan {
    /// The words of the kernel's command line, settings of a built-in ZFS among them.
    pub fn command_line(&self, zfs_built_in: bool) -> String {
        let word = |setting: &Setting| match setting.place {
            Place::CommandLine => Some(setting.assignment()),
            Place::ZfsModule if zfs_built_in => Some(format!("zfs.{}", setting.assignment())),
            _ => None,
        };
        let words: Vec<String> = self.settings.iter().filter_map(word).collect();
        words.join(" ")
    }

    /// What to write below a root directory. A place without settings has an empty list and still its file,
    /// so that what an earlier plan set does not stay.
    pub fn files(&self, zfs_built_in: bool) -> Vec<PlannedFile> {
        vec![
            self.file("etc/sysctl.d/90-fcvm.conf", Place::Sysctl, |setting| {
                format!("{} = {}", setting.name, setting.value)
            }),
            self.file(
                "etc/modprobe.d/fcvm-zfs.conf",
                Place::ZfsModule,
                |setting| format!("options zfs {}", setting.assignment()),
            ),
            self.file("etc/tmpfiles.d/fcvm-tuning.conf", Place::Sysfs, |setting| {
                format!("w {} - - - - {}", setting.name, setting.value)
            }),
            PlannedFile {
                path: "etc/fcvm/kernel-command-line",
                content: format!("{}\n", self.command_line(zfs_built_in)),
            },
            PlannedFile {
                path: "etc/systemd/system/fcvm-kernel-threads.service",
                content: self.threads_service(),
            },
        ]
    }

    /// A service that gives kernel threads their policy, priority and processors; those of a pool, once it is imported.
    fn threads_service(&self) -> String {
        let mut text = format!(
            "{HEADER}\n[Unit]\nDescription=Policy and processors of kernel threads\nAfter=zfs.target\n\n\
             [Service]\nType=oneshot\n"
        );
        for thread in &self.cpus.threads {
            text += &format!(
                "\n# {}\nExecStart=/bin/sh -c '{}'\n",
                thread.reason,
                thread.script()
            );
        }
        text + "\n[Install]\nWantedBy=multi-user.target\n"
    }

    fn file(
        &self,
        path: &'static str,
        place: Place,
        line: impl Fn(&Setting) -> String,
    ) -> PlannedFile {
        let mut content = HEADER.to_owned();
        for setting in self
            .settings
            .iter()
            .filter(|setting| setting.place == place)
        {
            content += &format!("\n# {}\n{}\n", setting.reason, line(setting));
        }
        PlannedFile { path, content }
    }
}

impl KernelThread {
    /// What a shell does to all of them, as systemd quotes it. One that ended meanwhile, or that the kernel binds
    /// itself, is passed over.
    fn script(&self) -> String {
        let mut actions = match self.policy {
            "fifo" => format!("chrt --fifo --pid {} $$pid", self.priority),
            _ => format!(
                "chrt --other --pid 0 $$pid; renice --priority {} --pid $$pid",
                self.priority
            ),
        };
        if let Some(cpus) = &self.cpus {
            actions += &format!("; taskset --cpu-list --pid {cpus} $$pid");
        }
        // Process 2 is the parent of the kernel's threads, and of nothing else.
        format!(
            "for pid in $$(pgrep --parent 2 \"{}\"); do {actions}; done; true",
            self.pattern
        )
    }
}

impl PlannedFile {
    /// Whether the file below `root` is this one already.
    pub fn is_written(&self, root: &Path) -> bool {
        std::fs::read(root.join(self.path)).is_ok_and(|bytes| bytes == self.content.as_bytes())
    }

    /// Writes it below `root`, whole or not at all; directories are made where missing.
    pub fn write(&self, root: &Path) -> Result<()> {
        let path = beneath(root, Path::new(self.path))?;
        files::create_dir(path.parent().unwrap_or(root))?;
        files::write_atomically(&path, self.content.as_bytes())?;
        files::make_readable(&path)
    }
}
