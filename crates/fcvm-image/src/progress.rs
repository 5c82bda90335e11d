//! How long work tells its caller where it is. Drawing bars is the caller's business.

/// Receives the progress of a pull, an import, a bootstrap or a conversion.
///
/// Calls come from several threads, and often: an implementation that draws limits its own rate.
pub trait Progress: Send + Sync {
    /// A piece of work begins. `name` is short and stays the same on every run (a digest's first
    /// characters, `root image`); `total_bytes` is absent where the size is not known beforehand.
    fn start(&self, name: &str, total_bytes: Option<u64>) -> Box<dyn Task>;

    /// A line worth showing once, without control characters or a line end.
    fn message(&self, text: &str);
}

/// One piece of work. Dropped without [`finish`](Self::finish), it has failed or was given up.
pub trait Task: Send + Sync {
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);

    /// The work is done; `outcome` is a word or two: `done`, `already here`.
    fn finish(&self, outcome: &str);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _name: &str, _total_bytes: Option<u64>) -> Box<dyn Task> {
        Box::new(Self)
    }

    fn message(&self, _text: &str) {}
}

impl Task for Silent {
    fn advance(&self, _bytes: u64) {}

    fn finish(&self, _outcome: &str) {}
}

/// `text` on one line: control characters become spaces, and it is cut at `max_chars`.
///
/// For text from registries, archives and tools that goes into messages.
pub(crate) fn one_line(text: &str, max_chars: usize) -> String {
    let mut shown: String = text
        .trim()
        .chars()
        .take(max_chars)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.trim().chars().nth(max_chars).is_some() {
        shown.push_str("...");
    }
    shown
}
