//! A directory becomes an image of one layer.
//!
//! GNU tar packs it: hard links, holes, devices and extended attributes are its trade. Members come in
//! the order of their names, so the same tree gives the same layer.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::thread;

use super::{Import, ImportError};
use crate::compose::{self, Description};
use crate::format::LAYER_MAX_BYTES;
use crate::progress::one_line;
use crate::store::{CopyError, Image};
use crate::tool::{Tool, explain};

impl Import<'_> {
    pub(super) fn directory(&self, dir: &Path) -> Result<Image, ImportError> {
        let read_error = |source| ImportError::Read {
            path: dir.to_owned(),
            source,
        };
        std::fs::read_dir(dir).map_err(read_error)?;
        let ingest = self.store.begin()?;
        let mut layer = ingest.writer(LAYER_MAX_BYTES)?;
        let name = one_line(&dir.file_name().unwrap_or_default().to_string_lossy(), 40);
        let task = self.progress.start(&name, None);
        let (status, lines) = thread::scope(|scope| {
            let report = |line: &str| self.progress.message(line);
            let started = Tool::start(scope, &mut command(dir), report);
            let (tool, mut output) = started.map_err(ImportError::StartTar)?;
            let copied = layer.copy_from(&mut output, &|bytes| task.advance(bytes));
            drop(output);
            match copied {
                Ok(()) => tool.wait().map_err(read_error),
                Err(CopyError::Store(error)) => Err(error.into()),
                Err(CopyError::Source(error)) => Err(read_error(error)),
            }
        })?;
        // 1: a file changed while it was read.
        if !matches!(status.code(), Some(0)) {
            return Err(ImportError::Tar {
                dir: dir.to_owned(),
                reason: explain(&lines),
            });
        }
        let layer = layer.commit(None)?;
        task.finish("packed");
        let image = Description {
            layer,
            platform: &self.options.platform,
            command: "sh",
            created_by: format!("import of a directory named {name}"),
            labels: HashMap::new(),
            names: self.options.name.as_slice(),
        };
        Ok(compose::finish(ingest, image)?)
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new("tar");
    command.env("LC_ALL", "C.UTF-8").args([
        "--create",
        "--format=pax",
        // Without the times of reading and the process id that tar adds by itself.
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--numeric-owner",
        "--sort=name",
        "--sparse",
        "--xattrs",
        "--xattrs-include=*",
        // What an ordinary user cannot read is left out, with a warning.
        "--ignore-failed-read",
        "--file=-",
    ]);
    command.arg("--directory").arg(dir).arg(".");
    command
}
