//! Lines on the guest's console, which the host keeps as the VM's console log.
//!
//! What a workload can cause is limited in number, so that it cannot fill the host's log.

use std::sync::atomic::{AtomicU32, Ordering};

/// Lines that a workload may cause in the life of a VM.
const LIMITED_LINES: u32 = 200;

static LIMITED: AtomicU32 = AtomicU32::new(0);

/// Writes one line. The kernel opens /dev/console for process 1 as its standard output.
pub(crate) fn line(text: &str) {
    let text = format!("fc-agent: {text}\n");
    let _ = rustix::io::write(rustix::stdio::stdout(), text.as_bytes());
}

/// Writes one line whose cause is in the workload's hands.
pub(crate) fn limited(text: &str) {
    let count = LIMITED.fetch_add(1, Ordering::Relaxed);
    if count < LIMITED_LINES {
        line(text);
    } else if count == LIMITED_LINES {
        line("further messages of this kind are left out");
    } else {
        LIMITED.store(LIMITED_LINES + 1, Ordering::Relaxed);
    }
}
