//! Networks of VMs: rootless user-mode networking and published ports.
