//! `fcvm pool bench`: the pool beside what else could keep disks, in turns, in one directory.
//!
//! What the subjects are is in `subjects.rs`; the plot is drawn in `plot.rs`. Figures are medians of the rounds.

mod plot;
mod subjects;
mod targets;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use blockpool::{RECORD_BYTES, References};
use fcvm_types::ByteSize;
use serde_json::json;

use crate::args::Format;
use crate::args::pool::BenchArguments;
use crate::context::Context;
use crate::output::table;
use subjects::{Lab, Subject};

const BLOCK: usize = 4096;
/// Writes on their way at once.
const WRITERS: u64 = 8;
const FLUSHES: usize = 200;
/// Blocks whose references are counted.
const REFERENCES: u64 = 10_000_000;
/// Blocks of a sparse file whose clones are timed against its size.
const EXTENTS_MAX: u64 = 4096;

/// A figure of a subject, one value of each round.
struct Figure {
    subject: String,
    name: &'static str,
    unit: &'static str,
    values: Vec<f64>,
}

#[derive(Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, subject: &str, name: &'static str, unit: &'static str, value: f64) {
        let known = self
            .0
            .iter_mut()
            .find(|figure| figure.subject == subject && figure.name == name);
        match known {
            Some(figure) => figure.values.push(value),
            None => self.0.push(Figure {
                subject: subject.to_owned(),
                name,
                unit,
                values: vec![value],
            }),
        }
    }
}

/// Median, least and most.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    (sorted[last / 2], sorted[0], sorted[last])
}

fn seconds<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(f64, T)> {
    let begin = Instant::now();
    let result = work()?;
    Ok((begin.elapsed().as_secs_f64(), result))
}

/// Numbers without a pattern, the same at every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Different blocks in a random order.
fn offsets(size_bytes: u64, count: u64, seed: u64) -> Vec<u64> {
    let mut offsets: Vec<u64> = (0..size_bytes / BLOCK as u64)
        .map(|block| block * BLOCK as u64)
        .collect();
    let mut numbers = Numbers(seed);
    for index in (1..offsets.len()).rev() {
        offsets.swap(index, numbers.below(index as u64 + 1) as usize);
    }
    offsets.truncate(count as usize);
    offsets
}

/// A block at an address that direct I/O can use.
fn aligned(space: &mut Vec<u8>, byte: u8) -> &[u8] {
    space.clear();
    space.resize(2 * BLOCK, byte);
    let begin = space.as_ptr().align_offset(BLOCK);
    &space[begin..begin + BLOCK]
}

/// Writes a block at each offset, several at once; how many a second.
fn write_parts<T: Sync>(
    target: &T,
    offsets: &[u64],
    write: impl Fn(&T, &[u8], u64) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<f64> {
    let part = offsets.len().div_ceil(WRITERS as usize).max(1);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = offsets
            .chunks(part)
            .map(|offsets| {
                let write = &write;
                scope.spawn(move || {
                    let mut space = Vec::new();
                    let block = aligned(&mut space, 0xa5);
                    offsets
                        .iter()
                        .try_for_each(|offset| write(target, block, *offset))
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(done) => done,
                Err(_) => bail!("a writer ended"),
            })
    })?;
    Ok(offsets.len() as f64 / begin.elapsed().as_secs_f64())
}

fn write_all(path: &Path, offsets: &[u64]) -> anyhow::Result<f64> {
    let file = subjects::open_direct(path)?;
    write_parts(&file, offsets, |file, block, at| {
        Ok(file.write_all_at(block, at)?)
    })
    .with_context(|| format!("cannot write {}", path.display()))
}

/// `fcvm pool bench`.
pub(crate) fn run(context: &Context, arguments: &BenchArguments) -> anyhow::Result<u8> {
    let directory = match &arguments.directory {
        Some(directory) => directory.clone(),
        None => context.data_dir.clone(),
    };
    let size_bytes = arguments.clone_size.bytes() / RECORD_BYTES * RECORD_BYTES;
    if size_bytes < 1 << 20 {
        bail!("--clone-size must be 1 MiB or more");
    }
    let rewrites = arguments.rewrites.min(size_bytes / BLOCK as u64);
    let lab = Lab::new(context, &directory, size_bytes)?;
    let mut figures = Figures::default();
    for round in 0..arguments.rounds.max(1) {
        let offsets = offsets(size_bytes, rewrites, round + 1);
        for subject in lab.subjects() {
            measure_clones(&lab, subject, &offsets, &mut figures)
                .with_context(|| subject.name().to_owned())?;
        }
        measure_bare(&lab, &offsets, &mut figures)?;
        measure_flushes(&lab, &offsets, &mut figures)?;
        measure_removal(&lab, &offsets, &mut figures)?;
    }
    let open_s = lab.open_after_crash()?;
    figures.add(
        "pool",
        "open after a crash, 100 GiB logical",
        "ms",
        open_s * 1e3,
    );
    measure_references(&mut figures)?;
    let curves = match &arguments.plot {
        Some(path) => Some((path, measure_sizes(&lab)?)),
        None => None,
    };
    if let Some((path, curves)) = &curves {
        std::fs::write(path, plot::draw(curves))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    show(
        &lab,
        &directory,
        arguments,
        &figures,
        curves.as_ref().map(|(_, curves)| &curves[..]),
    )?;
    Ok(crate::EXIT_SUCCESS)
}

fn measure_clones(
    lab: &Lab,
    subject: Subject,
    offsets: &[u64],
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let name = subject.name();
    let (clone_s, clone) = seconds(|| lab.clone(subject, "base", "clone"))?;
    figures.add(name, "clone, contiguous", "ms", clone_s * 1e3);
    let (first, second) = match subject {
        Subject::Overlay => (lab.overlay_writes(offsets)?, lab.overlay_writes(offsets)?),
        Subject::Pool => {
            let object = lab.pool().open_object(&"set/clone".parse()?)?;
            let write = || {
                write_parts(&object, offsets, |object, block, at| {
                    Ok(object.write_at(block, at)?)
                })
            };
            (write()?, write()?)
        }
        _ => (write_all(&clone, offsets)?, write_all(&clone, offsets)?),
    };
    figures.add(name, "first write, 4 KiB random", "k/s", first / 1e3);
    figures.add(name, "second write", "k/s", second / 1e3);
    // An overlay of an overlay is a clone, too.
    let (again_s, again) = seconds(|| lab.clone(subject, "clone", "again"))?;
    figures.add(name, "clone after the rewrites", "ms", again_s * 1e3);
    drop(again);
    let (remove_s, ()) = seconds(|| lab.remove(subject, "again"))?;
    figures.add(name, "removal of that", "ms", remove_s * 1e3);
    lab.remove(subject, "clone")
}

/// A plain file, and the same behind the least FUSE file system.
fn measure_bare(lab: &Lab, offsets: &[u64], figures: &mut Figures) -> anyhow::Result<()> {
    let raw = write_all(&lab.raw(), offsets)?;
    figures.add("raw file", "second write", "k/s", raw / 1e3);
    if let Some(bare) = lab.bare() {
        let bare = write_all(&bare, offsets)?;
        figures.add("bare FUSE to pwrite", "second write", "k/s", bare / 1e3);
    }
    Ok(())
}

/// Writes a block at each offset, each with a flush; how many a second.
fn flushes(
    offsets: &[u64],
    write: impl Fn(&[u8], u64) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let offsets = &offsets[..offsets.len().min(FLUSHES)];
    let (spent_s, ()) = seconds(|| {
        offsets
            .iter()
            .try_for_each(|offset| write(&[1; BLOCK], *offset))
    })?;
    Ok(offsets.len() as f64 / spent_s)
}

/// The first pass over a clone has new places to write, the second one has not.
fn measure_flushes(lab: &Lab, offsets: &[u64], figures: &mut Figures) -> anyhow::Result<()> {
    let mut twice = |name: &str, write: &dyn Fn(&[u8], u64) -> anyhow::Result<()>| {
        for figure in ["first write and fdatasync", "write and fdatasync"] {
            figures.add(name, figure, "/s", flushes(offsets, write)?);
        }
        anyhow::Ok(())
    };
    let in_file = |file: File| {
        move |bytes: &[u8], at| {
            file.write_all_at(bytes, at)?;
            Ok(file.sync_data()?)
        }
    };
    let open = |path: &Path| File::options().write(true).open(path);
    twice("raw file", &in_file(open(&lab.raw())?))?;
    let name = "set/flushed".parse()?;
    let object = lab.pool().clone_object(&"set/base".parse()?, &name)?;
    twice("pool", &|bytes, at| {
        object.write_at(bytes, at)?;
        Ok(object.flush()?)
    })?;
    lab.pool().destroy(&name, false)?;
    if lab.has_mount() {
        let clone = lab.clone(Subject::PoolMount, "base", "flushed")?;
        twice("pool, mounted", &in_file(open(&clone)?))?;
        std::fs::remove_file(clone)?;
    }
    Ok(())
}

/// Bytes of the reference table for each block, where neighbours are shared.
fn measure_references(figures: &mut Figures) -> anyhow::Result<()> {
    let mut references = References::default();
    for address in 0..REFERENCES {
        references.add(address)?;
    }
    let mut leaf_count = 0;
    while let Some(leaf) = references.first_dirty() {
        leaf_count += u64::from(references.save_leaf(leaf).is_some());
        references.set_clean(leaf);
    }
    // A leaf is a page, and 254 of them have an inner one.
    let disk_bytes = (leaf_count + leaf_count.div_ceil(254)) * BLOCK as u64;
    for (name, bytes) in [
        (
            "memory of a reference, 10 million",
            references.memory_bytes(),
        ),
        ("disk of a reference, 10 million", disk_bytes),
    ] {
        figures.add("pool", name, "B", bytes as f64 / REFERENCES as f64);
    }
    Ok(())
}

/// How quickly a clone that has diverged goes, and how long others wait meanwhile.
fn measure_removal(lab: &Lab, offsets: &[u64], figures: &mut Figures) -> anyhow::Result<()> {
    let pool = lab.pool();
    let doomed = pool.clone_object(&"set/base".parse()?, &"set/doomed".parse()?)?;
    for offset in offsets {
        doomed.write_at(&[2; BLOCK], *offset)?;
    }
    let blocks = pool.object_space(&[doomed.id()])?[0].referenced_bytes as f64 / BLOCK as f64;
    let other = pool.create_object(&"set/other".parse()?, 1 << 20)?;
    pool.checkpoint()?;
    let is_over = AtomicBool::new(false);
    let (begun, has_begun) = mpsc::channel();
    let (spent_s, longest_s) = std::thread::scope(|scope| {
        let (is_over, other) = (&is_over, &other);
        let writer = scope.spawn(move || {
            let mut longest_s: f64 = 0.0;
            let mut at = 0;
            while !is_over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                if other.write_at(&[3; BLOCK], at).is_err() {
                    return f64::NAN;
                }
                longest_s = longest_s.max(begin.elapsed().as_secs_f64());
                // Nobody listens but for the first.
                let _ = begun.send(());
                at = (at + BLOCK as u64) % (1 << 20);
            }
            longest_s
        });
        // It fails where the writer has failed, which its figure says.
        let _ = has_begun.recv();
        let removed = seconds(|| Ok(pool.destroy(&"set/doomed".parse()?, false)?));
        is_over.store(true, Ordering::Relaxed);
        let longest_s = writer.join().unwrap_or(f64::NAN);
        removed.map(|(spent_s, _)| (spent_s, longest_s))
    })?;
    figures.add(
        "pool",
        "removal of a diverged clone",
        "k blocks/s",
        blocks / spent_s / 1e3,
    );
    figures.add(
        "pool",
        "longest write of another meanwhile",
        "ms",
        longest_s * 1e3,
    );
    pool.destroy(&"set/other".parse()?, false)?;
    Ok(pool.checkpoint()?)
}

/// Milliseconds of a clone against the size of a sparse file.
fn measure_sizes(lab: &Lab) -> anyhow::Result<Vec<plot::Curve>> {
    let mut curves = Vec::new();
    for subject in lab
        .subjects()
        .into_iter()
        .filter(|subject| subject.shares())
    {
        let mut points = Vec::new();
        for shift in (20..=40).step_by(2) {
            let size_bytes = 1_u64 << shift;
            let extents = (size_bytes / RECORD_BYTES).min(EXTENTS_MAX);
            lab.make_sparse(subject, "sparse", size_bytes, extents)?;
            let mut spent = Vec::new();
            for _ in 0..5 {
                let (clone_s, _) = seconds(|| lab.clone(subject, "sparse", "copy"))?;
                spent.push(clone_s * 1e3);
                lab.remove(subject, "copy")?;
            }
            points.push((size_bytes as f64, spread(&spent).0));
            lab.remove(subject, "sparse")?;
        }
        curves.push(plot::Curve {
            name: subject.name().to_owned(),
            points,
        });
    }
    Ok(curves)
}

fn row(figure: &Figure, all: &[Figure]) -> Vec<String> {
    let (median, least, most) = spread(&figure.values);
    let number = |value: f64| match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.4}"),
    };
    let verdict = targets::verdict(figure, all);
    let target = verdict.as_ref().map_or_else(String::new, |verdict| {
        let sign = if verdict.is_most { "<=" } else { ">=" };
        format!("{sign} {}", number(verdict.target))
    });
    let verdict = verdict.map_or("", |verdict| if verdict.is_met { "met" } else { "missed" });
    vec![
        figure.name.to_owned(),
        figure.subject.clone(),
        number(median),
        figure.unit.to_owned(),
        format!("{} to {}", number(least), number(most)),
        target,
        verdict.to_owned(),
    ]
}

fn show(
    lab: &Lab,
    directory: &Path,
    arguments: &BenchArguments,
    figures: &Figures,
    curves: Option<&[plot::Curve]>,
) -> anyhow::Result<()> {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    if arguments.format == Format::Json {
        let rows: Vec<_> = figures
            .0
            .iter()
            .map(|figure| {
                let (median, least, most) = spread(&figure.values);
                let verdict = targets::verdict(figure, &figures.0);
                let verdict = verdict.map(|verdict| {
                    let bound = if verdict.is_most { "most" } else { "least" };
                    json!({ "bound": bound, "value": verdict.target, "is_met": verdict.is_met })
                });
                json!({ "subject": figure.subject, "name": figure.name, "unit": figure.unit,
                        "median": median, "least": least, "most": most, "target": verdict })
            })
            .collect();
        let curves = curves.map(|curves| {
            let points =
                |curve: &plot::Curve| json!({ "subject": curve.name, "points": curve.points });
            curves.iter().map(points).collect::<Vec<_>>()
        });
        let value = json!({
            "directory": directory, "clone_bytes": arguments.clone_size.bytes(),
            "rewrites": arguments.rewrites, "rounds": arguments.rounds, "load": load,
            "left_out": lab.left_out(), "figures": rows, "clone_ms_by_bytes": curves,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let mut rows: Vec<Vec<String>> = figures
        .0
        .iter()
        .map(|figure| row(figure, &figures.0))
        .collect();
    let order: Vec<String> = rows.iter().map(|row| row[0].clone()).collect();
    rows.sort_by_key(|row| order.iter().position(|name| *name == row[0]));
    println!(
        "{} clones, {} rewrites, {} rounds, in {}; load of this machine at the end: {load}",
        ByteSize::from_bytes(arguments.clone_size.bytes()),
        arguments.rewrites,
        arguments.rounds,
        directory.display()
    );
    table(
        &[
            "FIGURE", "OF", "MEDIAN", "UNIT", "SPREAD", "TARGET", "VERDICT",
        ],
        rows.into_iter(),
    );
    lab.left_out()
        .iter()
        .for_each(|reason| println!("left out: {reason}"));
    Ok(())
}
