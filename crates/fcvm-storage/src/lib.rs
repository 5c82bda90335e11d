//! Disks of VMs.
