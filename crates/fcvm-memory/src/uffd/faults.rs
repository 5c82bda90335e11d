//! The fault loop of one clone: reads what happens in its memory, and fills in the pages it waits for.
//!
//! A page is the snapshot's until its range is given back (a balloon, `MADV_DONTNEED`), and zero from then
//! on. The kernel fills nothing while such a notice is on its way (`EAGAIN`), so that all notices are
//! noted before a page is tried again. A page that is there already (`EEXIST`, by another
//! processor's fault or the prefetch) needs a wake-up, since its waiter may have come after.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fcvm_types::memory::PageServiceStatistics;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::handshake::{GuestLayout, HUGE_PAGE_BYTES, Region};
use super::pages::PageSet;
use super::raw::{Event, EventBuffer, Userfault, Wake};
use super::source::MemorySource;
use super::working_set::{Recorder, WorkingSet};
use crate::{PAGE_BYTES, PageRun};

/// Pages that are brought ahead with one call, so that a fault does not wait long behind it: 1 MiB.
const PREFETCH_PAGES_MAX: u64 = 256;
/// Faults that are answered with one wake-up, where so many wait: waking a processor that sleeps costs
/// more than its page, and what the first waits longer the last waits less.
const WOKEN_TOGETHER_MAX: usize = 8;
/// How often events are read before the other descriptors are looked at.
const READS_MAX: usize = 32;
/// How often pages that come ahead are told of, at most.
pub(super) const PROGRESS_PERIOD: Duration = Duration::from_secs(1);
/// How long to wait for what makes a page possible again and no event tells: the thread that gave pages
/// back has to run.
const AGAIN_WAIT: Duration = Duration::from_micros(500);

/// Why a clone is served no longer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEnd {
    /// Its hypervisor has ended.
    Exited,
    /// The server was told to stop.
    Stopped,
    /// Its first message was refused.
    Refused(String),
    /// Its memory could not be served.
    Failed(String),
}

impl std::fmt::Display for SessionEnd {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited => formatter.write_str("it has ended"),
            Self::Stopped => formatter.write_str("the memory server was told to stop"),
            Self::Refused(reason) => write!(formatter, "refused: {reason}"),
            Self::Failed(reason) => write!(formatter, "its memory cannot be served: {reason}"),
        }
    }
}

/// What the loop tells while it runs.
#[derive(Debug)]
pub(super) enum Progress {
    /// So many pages of what was recorded have been brought.
    Prefetching(u64),
    /// All that was recorded has been brought: so many pages.
    Prefetched(u64),
    /// The recording is at its end.
    Recorded(WorkingSet),
}

/// A thread that waits for a page.
struct Fault {
    address: u64,
    since: Instant,
}

/// How a page was answered.
enum Filled {
    Data,
    Zero,
    Already,
}

/// Faults whose pages are there.
#[derive(Default)]
struct Answered {
    faults: Vec<(Fault, PageRun, Filled)>,
    /// Addresses at which they are still to be woken. Who waits for another page between them looks again in
    /// vain, and is told of once more.
    asleep: Range<u64>,
}

/// Pages to be brought ahead.
struct Prefetch {
    runs: Vec<PageRun>,
    /// Which run, and how many pages of it are done.
    index: usize,
    done: u64,
    /// Those that were brought, where hugepages hold several runs.
    placed: PageSet,
    started: Instant,
    /// When it was told last how far it has got, and after how long that is told again.
    told: Instant,
    period: Duration,
}

/// Serves one clone.
pub(super) struct FaultLoop<'a> {
    userfault: Userfault,
    layout: GuestLayout,
    source: &'a MemorySource,
    /// What was done, and where it is shown after each turn: to hold the lock while the kernel has something
    /// to do would leave it to the hypervisor for how long.
    statistics: PageServiceStatistics,
    shown: &'a Mutex<PageServiceStatistics>,
    /// Pages that were given back, and are zero now.
    removed: PageSet,
    waiting: VecDeque<Fault>,
    failed: Option<String>,
    prefetch: Option<Prefetch>,
    recorder: Option<Recorder>,
    /// A hugepage that has to be put together.
    huge: Vec<u8>,
}

impl<'a> FaultLoop<'a> {
    pub(super) fn new(
        userfault: Userfault,
        layout: GuestLayout,
        source: &'a MemorySource,
        shown: &'a Mutex<PageServiceStatistics>,
    ) -> Self {
        Self {
            userfault,
            layout,
            source,
            statistics: PageServiceStatistics::default(),
            shown,
            removed: PageSet::new(source.page_count()),
            waiting: VecDeque::new(),
            failed: None,
            prefetch: None,
            recorder: None,
            huge: Vec::new(),
        }
    }

    /// Brings these pages ahead, and tells after each period how far that has got.
    pub(super) fn prefetch(&mut self, set: &WorkingSet, period: Duration) {
        let now = Instant::now();
        self.prefetch = Some(Prefetch {
            runs: set.in_portions(),
            index: 0,
            done: 0,
            placed: PageSet::new(self.source.page_count()),
            started: now,
            told: now,
            period,
        });
    }

    /// Records what is asked for.
    pub(super) fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Serves until the hypervisor ends (`client`, a pidfd), `stop` can be read, or something fails.
    pub(super) fn run(
        mut self,
        client: BorrowedFd<'_>,
        stop: BorrowedFd<'_>,
        mut tell: impl FnMut(Progress),
    ) -> SessionEnd {
        let end = loop {
            let turned = self.turn(client, stop, &mut tell);
            lock(self.shown).clone_from(&self.statistics);
            match turned {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(Errno::SRCH) => break SessionEnd::Exited,
                Err(errno) => break SessionEnd::Failed(self.explain(errno)),
            }
        };
        if let Some(set) = self.recorder.and_then(|recorder| recorder.finish(false)) {
            tell(Progress::Recorded(set));
        }
        end
    }

    /// Why the kernel has refused a page.
    fn explain(&self, errno: Errno) -> String {
        let is_huge = |region: &Region| region.page_bytes == HUGE_PAGE_BYTES;
        match errno {
            Errno::NOMEM if self.layout.regions().iter().any(is_huge) => {
                "the host has no free page of 2 MiB any more (sysctl vm.nr_hugepages)".to_owned()
            }
            errno => std::io::Error::from(errno).to_string(),
        }
    }

    /// Waits, answers what has come, and brings a piece of what is to be brought ahead.
    fn turn(
        &mut self,
        client: BorrowedFd<'_>,
        stop: BorrowedFd<'_>,
        tell: &mut impl FnMut(Progress),
    ) -> Result<Option<SessionEnd>, Errno> {
        let [has_events, has_exited, is_stopped] = self.wait(client, stop)?;
        if is_stopped {
            return Ok(Some(SessionEnd::Stopped));
        }
        if has_exited {
            return Ok(Some(SessionEnd::Exited));
        }
        if has_events || !self.waiting.is_empty() {
            self.answer_all()?;
        }
        if let Some(reason) = self.failed.take() {
            return Ok(Some(SessionEnd::Failed(reason)));
        }
        if let Some(progress) = self.bring_piece()? {
            tell(progress);
        }
        let now = Instant::now();
        if let Some(recorder) = self.recorder.take_if(|recorder| recorder.until <= now)
            && let Some(set) = recorder.finish(true)
        {
            tell(Progress::Recorded(set));
        }
        Ok(None)
    }

    /// Waits for something to do; says what can be read: events, the pidfd, the notice to stop.
    fn wait(&self, client: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Result<[bool; 3], Errno> {
        let limit = if !self.waiting.is_empty() {
            Some(AGAIN_WAIT)
        } else if self.prefetch.is_some() {
            Some(Duration::ZERO)
        } else {
            let until = self.recorder.as_ref().map(|recorder| recorder.until);
            until.map(|until| until.saturating_duration_since(Instant::now()))
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut polled = [
            PollFd::new(&self.userfault, PollFlags::IN),
            PollFd::from_borrowed_fd(client, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(polled.map(|one| !one.revents().is_empty()))
    }

    /// Answers the faults that wait, until there is none for now.
    fn answer_all(&mut self) -> Result<(), Errno> {
        let mut events = EventBuffer::new();
        for _ in 0..READS_MAX {
            let count = self.read(&mut events)?;
            let is_held_up = self.answer_waiting(&mut events)?;
            if count == 0 || is_held_up || self.failed.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Reads events: notices take effect at once, faults wait for their turn. A fault that came before a
    /// notice may see either: the guest has two processors at one page then.
    fn read(&mut self, events: &mut EventBuffer) -> Result<usize, Errno> {
        let Self {
            userfault,
            layout,
            statistics,
            removed,
            waiting,
            failed,
            ..
        } = self;
        let mut now = None;
        userfault.read(events, |event| match event {
            Event::Fault { address } => {
                let since = *now.get_or_insert_with(Instant::now);
                waiting.push_back(Fault { address, since });
            }
            Event::Removed { start, end } => {
                statistics.removed_pages += remove(layout, removed, start, end);
            }
            Event::Other { event } => {
                *failed = Some(format!("it moves or copies its memory (event {event:#x})"));
            }
        })
    }

    /// Answers what waits; says whether something has to wait for the hypervisor.
    fn answer_waiting(&mut self, events: &mut EventBuffer) -> Result<bool, Errno> {
        while !self.waiting.is_empty() && self.failed.is_none() {
            let mut answered = Answered::default();
            let is_held_up = self.answer_some(events, &mut answered);
            if answered.asleep.start < answered.asleep.end {
                let Range { start, end } = answered.asleep;
                self.userfault.wake(start, end - start)?;
            }
            let now = Instant::now();
            for (fault, run, filled) in answered.faults {
                let waited = now.duration_since(fault.since);
                count(&mut self.statistics, run, &filled, waited);
            }
            if is_held_up? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Answers the first of those that wait, and leaves to wake who waits in `answered.asleep`.
    fn answer_some(
        &mut self,
        events: &mut EventBuffer,
        answered: &mut Answered,
    ) -> Result<bool, Errno> {
        let together = self.waiting.len().min(WOKEN_TOGETHER_MAX);
        for _ in 0..together {
            let Some(fault) = self.waiting.pop_front() else {
                break;
            };
            let Some(region) = self.layout.at_address(fault.address).copied() else {
                let told = format!("it waits at {:#x}, in no region", fault.address);
                self.failed = Some(told);
                break;
            };
            let run = page_of(&region, fault.address);
            let wake = match together > 1 && region.page_bytes == PAGE_BYTES {
                true => Wake::Later,
                false => Wake::Now,
            };
            match self.fill(&region, run, wake) {
                Ok(filled) => {
                    self.note(run, &filled);
                    if wake == Wake::Later {
                        answered.leave_asleep(address_of(&region, run), run.bytes());
                    }
                    answered.faults.push((fault, run, filled));
                }
                Err(Errno::AGAIN) => {
                    self.statistics.retries += 1;
                    self.waiting.push_front(fault);
                    return Ok(self.read(events)? == 0);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(false)
    }

    fn note(&mut self, run: PageRun, filled: &Filled) {
        if let Some(recorder) = &mut self.recorder
            && !matches!(filled, Filled::Already)
            && !self.removed.contains(run.first)
        {
            recorder.note(run);
        }
    }

    /// Fills the page that `run` is.
    fn fill(&mut self, region: &Region, run: PageRun, wake: Wake) -> Result<Filled, Errno> {
        let address = address_of(region, run);
        let is_removed = self.removed.contains(run.first);
        let (bytes, filled) = if region.page_bytes == HUGE_PAGE_BYTES {
            // The kernel has no zero page of this size: one is copied.
            let filled = match is_removed {
                true => Filled::Zero,
                false => Filled::Data,
            };
            let bytes = huge_page(self.source, &mut self.huge, run, is_removed);
            (Some(bytes), filled)
        } else if is_removed {
            (None, Filled::Zero)
        } else {
            match self.source.pages(run).0 {
                Some(bytes) => (Some(bytes), Filled::Data),
                None => (None, Filled::Zero),
            }
        };
        let done = match bytes {
            Some(bytes) => self.userfault.copy(address, bytes, wake),
            None => self.userfault.zero(address, region.page_bytes, wake),
        };
        match done {
            Ok(_) => Ok(filled),
            // There, or unmapped since: whoever waits looks again.
            Err(Errno::EXIST | Errno::NOENT) => {
                if wake == Wake::Now {
                    self.userfault.wake(address, region.page_bytes)?;
                }
                Ok(Filled::Already)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Brings some pages with one call; says how far that is, where it is time to.
    fn bring_piece(&mut self) -> Result<Option<Progress>, Errno> {
        let Some(mut prefetch) = self.prefetch.take() else {
            return Ok(None);
        };
        if let Some(run) = prefetch.rest() {
            let brought = self.bring(&mut prefetch, run);
            let mut progress = None;
            match brought {
                Ok(pages) => {
                    prefetch.advance(pages);
                    if prefetch.told.elapsed() >= prefetch.period {
                        prefetch.told = Instant::now();
                        let pages = self.statistics.prefetched_pages;
                        progress = Some(Progress::Prefetching(pages));
                    }
                }
                // What came in between is read before the next try.
                Err(Errno::AGAIN) => {
                    self.statistics.retries += 1;
                    std::thread::yield_now();
                }
                Err(errno) => return Err(errno),
            }
            self.prefetch = Some(prefetch);
            return Ok(progress);
        }
        self.statistics.prefetch_us +=
            u64::try_from(prefetch.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(Some(Progress::Prefetched(self.statistics.prefetched_pages)))
    }

    /// Brings the first pages of a run; says how many of it are done with.
    fn bring(&mut self, prefetch: &mut Prefetch, run: PageRun) -> Result<u64, Errno> {
        let Some(region) = self.layout.at_offset(run.offset()).copied() else {
            return Ok(run.count);
        };
        let (is_removed, count) = self.removed.uniform(run);
        if is_removed {
            return Ok(count);
        }
        if region.page_bytes == HUGE_PAGE_BYTES {
            return self.bring_huge(prefetch, &region, run);
        }
        let end = (region.offset + region.bytes) / PAGE_BYTES;
        let wanted = PageRun {
            first: run.first,
            count: count.min(PREFETCH_PAGES_MAX).min(end - run.first),
        };
        let (bytes, count) = self.source.pages(wanted);
        let address = address_of(&region, run);
        let done = match bytes {
            Some(bytes) => self.userfault.copy(address, bytes, Wake::Now),
            None => self.userfault.zero(address, count * PAGE_BYTES, Wake::Now),
        };
        match done {
            Ok(bytes) => {
                self.statistics.prefetched_pages += bytes / PAGE_BYTES;
                Ok(bytes / PAGE_BYTES)
            }
            Err(Errno::EXIST | Errno::NOENT) => {
                self.statistics.prefetch_late_pages += 1;
                Ok(1)
            }
            Err(errno) => Err(errno),
        }
    }

    fn bring_huge(
        &mut self,
        prefetch: &mut Prefetch,
        region: &Region,
        run: PageRun,
    ) -> Result<u64, Errno> {
        let address = address_of(region, run);
        let huge = page_of(region, address);
        let done = huge.first + huge.count - run.first;
        if !prefetch.placed.contains(huge.first) {
            let pages = match self.fill(region, huge, Wake::Now)? {
                Filled::Already => &mut self.statistics.prefetch_late_pages,
                Filled::Data | Filled::Zero => &mut self.statistics.prefetched_pages,
            };
            *pages += huge.count;
            prefetch.placed.insert(huge);
        }
        Ok(done.min(run.count))
    }
}

impl Answered {
    fn leave_asleep(&mut self, address: u64, bytes: u64) {
        let Range { start, end } = &mut self.asleep;
        if start == end {
            *start = address;
        }
        *start = address.min(*start);
        *end = (address + bytes).max(*end);
    }
}

impl Prefetch {
    /// What is left of the run that is being brought.
    fn rest(&self) -> Option<PageRun> {
        let run = self.runs.get(self.index)?;
        Some(PageRun {
            first: run.first + self.done,
            count: run.count - self.done,
        })
    }

    fn advance(&mut self, pages: u64) {
        self.done += pages;
        if self
            .runs
            .get(self.index)
            .is_none_or(|run| self.done >= run.count)
        {
            (self.index, self.done) = (self.index + 1, 0);
        }
    }
}

fn count(
    statistics: &mut PageServiceStatistics,
    run: PageRun,
    filled: &Filled,
    duration: Duration,
) {
    statistics.faults += 1;
    match filled {
        Filled::Data => statistics.fault_bytes += run.bytes(),
        Filled::Zero => statistics.zero_faults += 1,
        Filled::Already => statistics.repeated_faults += 1,
    }
    let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    statistics.latency.record(nanoseconds);
}

/// The bytes of a hugepage: the source's own where it has all, otherwise put together in `room`.
fn huge_page<'a>(
    source: &'a MemorySource,
    room: &'a mut Vec<u8>,
    run: PageRun,
    is_removed: bool,
) -> &'a [u8] {
    if !is_removed
        && let (Some(bytes), count) = source.pages(run)
        && count == run.count
    {
        return bytes;
    }
    room.resize(HUGE_PAGE_BYTES as usize, 0);
    if is_removed {
        room.fill(0);
        return room;
    }
    let mut page = 0;
    while page < run.count {
        let rest = PageRun {
            first: run.first + page,
            count: run.count - page,
        };
        let (bytes, count) = source.pages(rest);
        let start = (page * PAGE_BYTES) as usize;
        let target = &mut room[start..start + (count * PAGE_BYTES) as usize];
        match bytes {
            Some(bytes) => target.copy_from_slice(bytes),
            None => target.fill(0),
        }
        page += count;
    }
    room
}

/// Nothing is left half-changed by whoever panicked with it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pages of the memory that are the page at an address of a region.
fn page_of(region: &Region, address: u64) -> PageRun {
    let within = (address - region.address) / region.page_bytes * region.page_bytes;
    PageRun {
        first: (region.offset + within) / PAGE_BYTES,
        count: region.page_bytes / PAGE_BYTES,
    }
}

fn address_of(region: &Region, run: PageRun) -> u64 {
    region.address + (run.offset() - region.offset)
}

/// Notes that a range reads as zeros: the pages that are wholly in it. Says how many pages that are.
fn remove(layout: &GuestLayout, removed: &mut PageSet, start: u64, end: u64) -> u64 {
    let mut pages = 0;
    for region in layout.regions() {
        let from = start.max(region.address) - region.address;
        let to = end
            .min(region.address + region.bytes)
            .saturating_sub(region.address);
        let from = from.div_ceil(region.page_bytes) * region.page_bytes;
        let to = to / region.page_bytes * region.page_bytes;
        if from < to {
            let run = PageRun {
                first: (region.offset + from) / PAGE_BYTES,
                count: (to - from) / PAGE_BYTES,
            };
            removed.insert(run);
            pages += run.count;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;
    use std::sync::mpsc::channel;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::page_file::{anonymous_file, seal};
    use crate::uffd::{Faults, GuestMemory};

    const PAGES: u64 = 8;

    fn source() -> MemorySource {
        let file = anonymous_file("fcvm-test", PAGES * PAGE_BYTES).unwrap();
        file.write_all_at(&7_u64.to_ne_bytes(), PAGE_BYTES).unwrap();
        seal(&file).unwrap();
        MemorySource::new(&file).unwrap()
    }

    #[test]
    fn a_page_comes_while_others_look_at_the_statistics() {
        let all = Userfault::create(Faults::All);
        let Ok(userfault) = all.or_else(|_| Userfault::create(Faults::OfUserMode)) else {
            println!("skipped: this user may not use userfaultfd");
            return;
        };
        let memory = GuestMemory::anonymous(PAGES * PAGE_BYTES, false).unwrap();
        memory.register(&userfault).unwrap();
        let region = Region {
            address: memory.address(),
            bytes: memory.bytes(),
            offset: 0,
            page_bytes: PAGE_BYTES,
        };
        let message = serde_json::to_vec(&[region]).unwrap();
        let layout = GuestLayout::parse(&message, memory.bytes()).unwrap();
        let source = source();
        let shown = Mutex::default();
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (never, stop) = (event(), event());
        std::thread::scope(|scope| {
            let faults = FaultLoop::new(userfault, layout, &source, &shown);
            let serving = scope.spawn(|| faults.run(never.as_fd(), stop.as_fd(), |_| {}));
            let looking = lock(&shown);
            let (sender, found) = channel();
            let touched = &memory;
            scope.spawn(move || {
                let _ = sender.send(touched.word(PAGE_BYTES).load(Ordering::Relaxed));
            });
            let found = found.recv_timeout(Duration::from_secs(60));
            drop(looking);
            rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
            assert_eq!(serving.join().unwrap(), SessionEnd::Stopped);
            assert_eq!(found, Ok(7));
        });
        assert_eq!(lock(&shown).faults, 1);
    }
}
