//! Freezing a VM whose memory only its hypervisor has mapped: Firecracker writes it out, while the VM stands still.
//!
//! What is written is made little. A VM that booted has nothing but zeros where the host has no memory for it; one
//! that began with saved memory, or was saved before, gets a copy of that ahead, and only what was written since
//! is written over it.

use std::fs::File;

use anyhow::Context as _;
use fcvm_hypervisor::firecracker::{FirecrackerVm, SavedMemory};
use fcvm_hypervisor::{DeviceState, Pause};
use fcvm_memory::page_file::seal;

use super::{DiskPlan, Frozen, Preparation, Way};
use crate::owner::machine::Baseline;
use crate::owner::vm::RunningVm;

/// Where the memory goes.
pub(super) struct Target {
    file: File,
    /// What is to be written of it.
    saved: SavedMemory,
}

/// Copies what the VM began with, over which the difference is to be written.
fn over(base: &File, file: &File) -> anyhow::Result<SavedMemory> {
    fcvm_storage::clone_file(base, file).context("cannot copy the VM's memory")?;
    Ok(SavedMemory::Difference)
}

impl RunningVm {
    /// Makes a file ready for the memory, while the VM runs.
    pub(super) fn save_target(&self, file: File) -> anyhow::Result<Target> {
        let saved = match &*self.foundation.baseline.borrow() {
            Baseline::Zero => SavedMemory::Difference,
            Baseline::Known(base) => over(base, &file)?,
            Baseline::Stored(store, base) => {
                let stored = store.referenced(base);
                match stored.and_then(|snapshot| snapshot.load_memory(|_, _| {}).ok()) {
                    Some(base) => over(&base, &file)?,
                    // It has been removed, or damaged: the VM has all that it needs.
                    None => SavedMemory::Full,
                }
            }
            Baseline::Unknown => SavedMemory::Full,
        };
        Ok(Target { file, saved })
    }

    /// Saves the VM. Whether that succeeds or not, it goes on; where its agent does not come back it is lost.
    pub(super) async fn save(
        &self,
        machine: &FirecrackerVm,
        preparation: Preparation,
    ) -> anyhow::Result<Frozen> {
        let mut watch = crate::owner::Stopwatch::new(Vec::new());
        self.link.park().await?;
        watch.lap("park");
        let saved = self.save_parked(machine, preparation, &mut watch).await;
        if saved.is_err() {
            // Saving would have ended it.
            self.link.hang_up();
        }
        let going_on = async {
            machine.resume().await?;
            self.link.come_back().await
        };
        if let Err(error) = going_on.await {
            tracing::error!(target: "vm", "the VM cannot go on: {error:#}");
            machine.kill();
            return Err(saved.err().unwrap_or(error));
        }
        // The end of the pause.
        watch.lap("resume");
        let mut frozen = saved?;
        frozen.timings_us = watch.laps;
        Ok(frozen)
    }

    async fn save_parked(
        &self,
        machine: &FirecrackerVm,
        preparation: Preparation,
        watch: &mut crate::owner::Stopwatch,
    ) -> anyhow::Result<Frozen> {
        let Way::Save(Target { file, saved }) = preparation.way else {
            anyhow::bail!("the VM's memory cannot be frozen in that way");
        };
        machine.pause().await.context("cannot pause the VM")?;
        watch.lap("stop");
        let saved = async {
            let state = self.save_memory(machine, &file, saved).await?;
            seal(&file)?;
            watch.lap("save");
            if let Some(DiskPlan::Copy {
                store, prepared, ..
            }) = preparation.disk
            {
                store.freeze(prepared)?;
            }
            watch.lap("disk");
            Ok((state, file.try_clone()?))
        };
        let saved: anyhow::Result<(DeviceState, File)> = saved.await;
        let mut baseline = self.foundation.baseline.borrow_mut();
        let is_kept = !matches!(*baseline, Baseline::Zero);
        let state = match saved {
            Ok((state, base)) if is_kept => {
                *baseline = Baseline::Known(base);
                state
            }
            Ok((state, _)) => state,
            Err(error) => {
                if is_kept {
                    // It may have taken the marks off pages that were written.
                    *baseline = Baseline::Unknown;
                }
                return Err(error);
            }
        };
        Ok(Frozen {
            state,
            memory: file.into(),
            difference: None,
            timings_us: Vec::new(),
            left: None,
        })
    }

    async fn save_memory(
        &self,
        machine: &FirecrackerVm,
        file: &File,
        saved: SavedMemory,
    ) -> anyhow::Result<DeviceState> {
        let booted = matches!(*self.foundation.baseline.borrow(), Baseline::Zero);
        // What the host has swapped out it does not have in memory.
        let is_swapped = || -> anyhow::Result<bool> {
            let usage = fcvm_memory::usage(machine.identity().pid)?;
            Ok(booted && usage.swapped_bytes > 0)
        };
        if !is_swapped()? {
            let state = machine.save(file, saved).await?;
            if !is_swapped()? {
                return Ok(state);
            }
        }
        Ok(machine.save(file, SavedMemory::Full).await?)
    }
}
