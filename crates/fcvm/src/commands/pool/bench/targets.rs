//! What the figures were meant to be, and whether they are.

use super::{Figure, spread};

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
enum Bound {
    /// No more than that.
    Most(f64),
    /// No less than that.
    Least(f64),
    /// At least so much of what that subject has under that name.
    Part(f64, &'static str, &'static str),
}

const FIRST: &str = "first write, 4 KiB random";
const SECOND: &str = "second write";
const FLUSH: &str = "write and fdatasync";
const MOUNT: &str = "pool, mounted";

/// Subject, figure, bound.
const TARGETS: [(&str, &str, Bound); 12] = [
    ("pool", "clone, contiguous", Bound::Most(1.0)),
    ("pool", "clone after the rewrites", Bound::Most(10.0)),
    ("pool", FIRST, Bound::Part(0.5, "pool", SECOND)),
    (MOUNT, FIRST, Bound::Least(60.0)),
    (
        MOUNT,
        SECOND,
        Bound::Part(0.9, "bare FUSE to pwrite", SECOND),
    ),
    ("pool", FLUSH, Bound::Part(0.95, "raw file", FLUSH)),
    (MOUNT, FLUSH, Bound::Part(0.95, "raw file", FLUSH)),
    ("pool", "removal of a diverged clone", Bound::Least(1000.0)),
    (
        "pool",
        "longest write of another meanwhile",
        Bound::Most(50.0),
    ),
    (
        "pool",
        "open after a crash, 100 GiB logical",
        Bound::Most(1000.0),
    ),
    (
        "pool",
        "memory of a reference, 10 million",
        Bound::Most(4.1),
    ),
    ("pool", "disk of a reference, 10 million", Bound::Most(5.0)),
];

/// What a figure was to be, and whether it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    pub(super) is_most: bool,
    pub(super) target: f64,
    pub(super) is_met: bool,
}

/// The verdict on one of all figures; none where nothing was promised, or what it is held against was not measured.
pub(super) fn verdict(figure: &Figure, all: &[Figure]) -> Option<Verdict> {
    let is_it = |(subject, name, _): &&(&str, &str, Bound)| {
        *subject == figure.subject && *name == figure.name
    };
    let (_, _, bound) = TARGETS.iter().find(is_it)?;
    let (is_most, target) = match *bound {
        Bound::Most(most) => (true, most),
        Bound::Least(least) => (false, least),
        Bound::Part(part, subject, name) => {
            let mut others = all.iter();
            let other = others.find(|other| other.subject == subject && other.name == name)?;
            (false, part * spread(&other.values).0)
        }
    };
    let (median, _, _) = spread(&figure.values);
    let is_met = if is_most {
        median <= target
    } else {
        median >= target
    };
    Some(Verdict {
        is_most,
        target,
        is_met,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_held_against_bounds_and_against_others() {
        let figure = |subject: &str, name, value| Figure {
            subject: subject.to_owned(),
            name,
            unit: "",
            values: vec![value],
        };
        let all = [
            figure("pool", "clone, contiguous", 2.0),
            figure("raw file", FLUSH, 100.0),
            figure(MOUNT, FLUSH, 96.0),
            figure("plain copy", SECOND, 1.0),
            figure(MOUNT, SECOND, 1.0),
        ];
        let met: Vec<_> = all
            .iter()
            .map(|figure| verdict(figure, &all).map(|verdict| verdict.is_met))
            .collect();
        assert_eq!(met, [Some(false), None, Some(true), None, None]);
    }
}
