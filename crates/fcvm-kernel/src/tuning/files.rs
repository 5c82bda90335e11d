//! A plan as configuration files.

use std::path::Path;

use super::{Place, Plan, Setting};
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
        ]
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
