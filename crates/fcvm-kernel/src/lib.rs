//! Guest kernels and the initramfs that carries the agent.
