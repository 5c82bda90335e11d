//! How a VM is named on the command line: name, unambiguous id prefix, or owner's PID.

use anyhow::bail;
use fcvm_types::record::VmRecord;

use super::{Entry, StateStore};

impl StateStore {
    /// The VM that a text names.
    pub(crate) fn find(&self, text: &str) -> anyhow::Result<VmRecord> {
        let mut unreadable = None;
        let mut records = Vec::new();
        for entry in self.entries(false)? {
            match entry {
                Entry::Vm(record) => records.push(*record),
                Entry::Unreadable { directory, reason }
                    if !text.is_empty() && directory.starts_with(text) =>
                {
                    unreadable = Some((directory, reason));
                }
                Entry::Unreadable { .. } => {}
            }
        }
        if let Some(at) = records
            .iter()
            .position(|record| record.name.as_str() == text)
        {
            return Ok(records.swap_remove(at));
        }
        if let Some((directory, reason)) = unreadable {
            bail!(
                "the state record of VM {} {reason}; 'fcvm rm -f {0}' removes it",
                &directory[..12]
            );
        }
        if let Ok(pid) = text.parse::<i32>()
            && let Some(at) = records.iter().position(|record| {
                record.owner.pid == pid && fcvm_process::is_running(record.owner)
            })
        {
            return Ok(records.swap_remove(at));
        }
        let mut matching = records
            .into_iter()
            .filter(|record| !text.is_empty() && record.id.as_str().starts_with(text));
        match (matching.next(), matching.next()) {
            (Some(record), None) => Ok(record),
            (Some(first), Some(second)) => bail!(
                "'{text}' is the beginning of more than one VM id ({}, {}): write more of it",
                first.id.short(),
                second.id.short()
            ),
            (None, _) => bail!("no VM is called '{text}': 'fcvm ls -a' lists them"),
        }
    }
}
