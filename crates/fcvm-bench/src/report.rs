//! What was measured: samples, what they are compared with, targets; as a table and as JSON.

use std::fmt;

use comfy_table::{Table, presets::ASCII_MARKDOWN};
use serde::Serialize;

use crate::conditions::Conditions;

/// A figure that must not be exceeded, or must be reached: by the median, or by what comes of it and the other median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// The median itself.
    Median(f64),
    /// The median divided by that of what it is compared with.
    Ratio(f64),
    /// The median minus that of what it is compared with.
    Difference(f64),
    /// The median at least.
    AtLeast(f64),
    /// The median and the quantile of 0.99.
    Quantiles { median: f64, p99: f64 },
}

/// Samples of one thing.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Samples {
    name: String,
    median: f64,
    p90: f64,
    p99: f64,
    min: f64,
    max: f64,
    samples: Vec<f64>,
}

impl Samples {
    pub(crate) fn new(name: impl Into<String>, samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| quantile(&sorted, share);
        Self {
            name: name.into(),
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            min: at(0.0),
            max: at(1.0),
            samples,
        }
    }
}

/// A quantile by linear interpolation between the two samples next to it.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let position = share * last as f64;
    let below = sorted[position.floor() as usize];
    let above = sorted[position.ceil() as usize];
    below + (above - below) * position.fract()
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Measure {
    part: &'static str,
    unit: &'static str,
    #[serde(flatten)]
    measured: Samples,
    compared_with: Option<Samples>,
    target: Option<Target>,
    met: Option<bool>,
}

impl Measure {
    pub(crate) fn new(part: &'static str, unit: &'static str, measured: Samples) -> Self {
        Self {
            part,
            unit,
            measured,
            compared_with: None,
            target: None,
            met: None,
        }
    }

    /// What the samples are compared with: taken alternately with them, in the same run.
    pub(crate) fn against(mut self, other: Samples) -> Self {
        self.compared_with = Some(other);
        self
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        let other = self
            .compared_with
            .as_ref()
            .map_or(f64::NAN, |other| other.median);
        self.met = Some(match target {
            Target::Median(limit) => self.measured.median <= limit,
            Target::AtLeast(limit) => self.measured.median >= limit,
            Target::Ratio(limit) => self.measured.median / other <= limit,
            Target::Difference(limit) => self.measured.median - other <= limit,
            Target::Quantiles { median, p99 } => {
                self.measured.median <= median && self.measured.p99 <= p99
            }
        });
        self
    }

    fn row(&self) -> Vec<String> {
        let spread = |samples: &Samples| match samples.samples.len() {
            1 => number(samples.median),
            _ => format!(
                "{} ({} - {})",
                number(samples.median),
                number(samples.min),
                number(samples.max)
            ),
        };
        let compared = match (&self.compared_with, self.target) {
            (None, _) => String::new(),
            (Some(other), Some(Target::Difference(_))) => {
                format!("{:+.0}", self.measured.median - other.median)
            }
            (Some(other), _) => format!("x {:.3}", self.measured.median / other.median),
        };
        let target = match self.target {
            None => String::new(),
            Some(Target::Median(limit)) => format!("<= {}", number(limit)),
            Some(Target::AtLeast(limit)) => format!(">= {}", number(limit)),
            Some(Target::Ratio(limit)) => format!("<= x {limit:.3}"),
            Some(Target::Difference(limit)) => format!("<= {limit:+.0}"),
            Some(Target::Quantiles { median, p99 }) => {
                format!("<= {}, p99 <= {}", number(median), number(p99))
            }
        };
        let verdict = match self.met {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        vec![
            self.measured.name.clone(),
            self.unit.to_owned(),
            spread(&self.measured),
            number(self.measured.p90),
            number(self.measured.p99),
            self.measured.samples.len().to_string(),
            self.compared_with
                .as_ref()
                .map_or_else(String::new, |other| {
                    format!("{}: {}", other.name, spread(other))
                }),
            compared,
            target,
            verdict.to_owned(),
        ]
    }
}

/// Three significant digits or so.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// All that a run of the bench found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Layout of this document.
    version: u32,
    pub(crate) conditions: Conditions,
    measures: Vec<Measure>,
    skipped: Vec<String>,
}

impl Report {
    pub(crate) fn new(conditions: Conditions) -> Self {
        Self {
            version: 1,
            conditions,
            measures: Vec::new(),
            skipped: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, measure: Measure) {
        self.measures.push(measure);
    }

    /// Something was not measured, and why.
    pub(crate) fn skip(&mut self, reason: String) {
        eprintln!("skipped: {reason}");
        self.skipped.push(reason);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}", self.conditions)?;
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN).set_header([
            "measured",
            "unit",
            "median (min - max)",
            "p90",
            "p99",
            "n",
            "compared with",
            "comes to",
            "target",
            "verdict",
        ]);
        for measure in &self.measures {
            table.add_row(measure.row());
        }
        writeln!(f, "{table}")?;
        for reason in &self.skipped {
            writeln!(f, "skipped: {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_samples() {
        let samples = Samples::new("x", vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((samples.min, samples.median, samples.max), (1.0, 2.5, 4.0));
        assert!((samples.p90 - 3.7).abs() < 1e-9);
    }

    #[test]
    fn targets_judge_medians() {
        let measure = |target| {
            Measure::new("boot", "ms", Samples::new("a", vec![90.0, 110.0, 100.0]))
                .against(Samples::new("b", vec![80.0]))
                .target(target)
                .met
        };
        assert_eq!(measure(Target::Median(100.0)), Some(true));
        assert_eq!(measure(Target::Median(99.0)), Some(false));
        assert_eq!(measure(Target::AtLeast(100.0)), Some(true));
        assert_eq!(measure(Target::AtLeast(101.0)), Some(false));
        assert_eq!(measure(Target::Ratio(1.25)), Some(true));
        assert_eq!(measure(Target::Ratio(1.2)), Some(false));
        assert_eq!(measure(Target::Difference(20.0)), Some(true));
        assert_eq!(measure(Target::Difference(19.0)), Some(false));
        let quantiles = |median, p99| measure(Target::Quantiles { median, p99 });
        assert_eq!(quantiles(100.0, 110.0), Some(true));
        assert_eq!(quantiles(100.0, 109.0), Some(false));
        assert_eq!(quantiles(99.0, 110.0), Some(false));
        let alone =
            Measure::new("boot", "ms", Samples::new("a", vec![1.0])).target(Target::Ratio(9.0));
        assert_eq!(
            alone.met,
            Some(false),
            "nothing to compare with is not a success"
        );
    }
}
