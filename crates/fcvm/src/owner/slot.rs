//! The machine of a VM, which a fork may replace by its successor.

use std::cell::RefCell;
use std::rc::Rc;

use fcvm_hypervisor::qemu::QemuVm;
use fcvm_hypervisor::{Pause, Vm, VmEvent, VmExit};
use fcvm_types::record::ProcessIdentity;

/// The present machine.
pub(super) struct MachineSlot(RefCell<Rc<Vm>>);

impl MachineSlot {
    pub(super) fn new(machine: Vm) -> Self {
        Self(RefCell::new(Rc::new(machine)))
    }

    /// The machine as it is now.
    pub(super) fn get(&self) -> Rc<Vm> {
        Rc::clone(&self.0.borrow())
    }

    /// Replaces the machine. The old one must still be alive: its end is nobody's loss then.
    pub(super) fn replace(&self, successor: QemuVm) -> Rc<Vm> {
        self.0.replace(Rc::new(Vm::Qemu(successor)))
    }

    /// Waits for the end of the VM's machine, which a successor is not.
    pub(super) async fn wait_exit(&self) -> VmExit {
        loop {
            let machine = self.get();
            let exit = machine.wait_exit().await;
            if Rc::ptr_eq(&machine, &self.get()) {
                return exit;
            }
        }
    }

    /// The next event of the machine; `None` when there will be no more.
    pub(super) async fn next_event(&self) -> Option<VmEvent> {
        loop {
            let machine = self.get();
            match machine.next_event().await {
                None if !Rc::ptr_eq(&machine, &self.get()) => {}
                event => return event,
            }
        }
    }

    pub(super) fn kill(&self) {
        self.get().kill();
    }

    pub(super) fn identity(&self) -> ProcessIdentity {
        self.get().identity()
    }

    pub(super) async fn pause(&self) -> Result<(), fcvm_hypervisor::HypervisorError> {
        self.get().pause().await
    }

    pub(super) async fn resume(&self) -> Result<(), fcvm_hypervisor::HypervisorError> {
        self.get().resume().await
    }
}
