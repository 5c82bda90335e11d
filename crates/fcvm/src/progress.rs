//! Progress of long work on stderr: bars on a terminal, one line per finished piece elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use fcvm_image::progress::{Progress, Task};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::errors::printable;

/// Shows the progress of images.
#[derive(Clone)]
pub(crate) struct Shown {
    bars: Option<MultiProgress>,
    /// Nothing stays on the screen or in a file.
    quiet: bool,
}

impl Shown {
    /// On stderr, unless `quiet`.
    pub(crate) fn new(quiet: bool) -> Arc<Self> {
        let bars = (!quiet && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Arc::new(Self { bars, quiet })
    }

    /// Bars on a terminal while the work goes on, and nothing else.
    pub(crate) fn passing() -> Arc<Self> {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Arc::new(Self { bars, quiet: true })
    }

    fn line(&self, text: &str) {
        match &self.bars {
            _ if self.quiet => {}
            // A terminal that is gone needs no line.
            Some(bars) => drop(bars.println(text)),
            None => eprintln!("{text}"),
        }
    }
}

impl Progress for Shown {
    fn start(&self, name: &str, total_bytes: Option<u64>) -> Box<dyn Task> {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(total_bytes.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
            let template = match total_bytes {
                Some(_) => "{prefix:<24} {bar:24} {bytes:>10}/{total_bytes} {bytes_per_sec}",
                None => "{prefix:<24} {spinner} {bytes:>10} {elapsed}",
            };
            // The templates are constants that parse.
            bar.set_style(
                ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_prefix(printable(name));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Box::new(Piece {
            name: printable(name),
            bar,
            shown: self.clone(),
        })
    }

    fn message(&self, text: &str) {
        self.line(&printable(text));
    }
}

struct Piece {
    name: String,
    bar: Option<ProgressBar>,
    shown: Shown,
}

impl Task for Piece {
    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&self, outcome: &str) {
        match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                self.shown.line(&format!("{:<24} {outcome}", self.name));
            }
            None => self.shown.line(&format!("{}: {outcome}", self.name)),
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // Given up: the bar must not stay on the screen.
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }
}
