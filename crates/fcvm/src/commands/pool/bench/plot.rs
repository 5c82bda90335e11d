//! A plot of milliseconds against sizes, both logarithmic, as SVG.

use std::fmt::Write as _;

/// Points of one subject: bytes and milliseconds.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const COLOURS: [&str; 6] = [
    "#0b6e4f", "#1f77b4", "#d62728", "#9467bd", "#8c564b", "#7f7f7f",
];

/// The plot as a document.
pub(super) fn draw(curves: &[Curve]) -> String {
    let all = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(
            (f64::INFINITY, f64::NEG_INFINITY),
            |(least, most), value| (least.min(value), most.max(value)),
        )
    };
    let sizes = bounds(&mut all().map(|(size, _)| size.log2()));
    let times = bounds(&mut all().map(|(_, time)| time.max(1e-6).log10()));
    let times = (times.0.floor(), times.1.ceil().max(times.0.floor() + 1.0));
    let x = |size: f64| {
        LEFT + (size.log2() - sizes.0) / (sizes.1 - sizes.0).max(1.0) * (WIDTH - LEFT - RIGHT)
    };
    let y = |time: f64| {
        let part = (time.max(1e-6).log10() - times.0) / (times.1 - times.0);
        HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">Cost of a clone against the size of a sparse file</text>\n"
    );
    let mut decade = times.0;
    while decade <= times.1 {
        let at = y(10_f64.powf(decade));
        let label = 10_f64.powf(decade);
        // Writing to a text does not fail.
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label} ms</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0
        );
        decade += 1.0;
    }
    for (shift, label) in [
        (20, "1 MiB"),
        (26, "64 MiB"),
        (30, "1 GiB"),
        (36, "64 GiB"),
        (40, "1 TiB"),
    ] {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            x(2_f64.powi(shift)),
            HEIGHT - BOTTOM + 20.0
        );
    }
    for (index, curve) in curves.iter().enumerate() {
        let at = |(size, time): &(f64, f64)| (x(*size), y(*time));
        line(&mut svg, curve, COLOURS[index % COLOURS.len()], at);
    }
    svg.push_str("</svg>\n");
    svg
}

/// One subject's line, with its name at the end.
fn line(svg: &mut String, curve: &Curve, colour: &str, at: impl Fn(&(f64, f64)) -> (f64, f64)) {
    let places: Vec<(f64, f64)> = curve.points.iter().map(at).collect();
    let points: Vec<String> = places
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let last = places.last().map_or(TOP, |(_, y)| *y);
    let _ = writeln!(
        svg,
        "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
        points.join(" "),
        WIDTH - RIGHT + 8.0,
        last + 4.0,
        curve.name
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_line_for_each_subject() {
        let curve = |name: &str| Curve {
            name: name.to_owned(),
            points: vec![(1048576.0, 0.01), (1e12, 5.0)],
        };
        let drawn = draw(&[curve("one"), curve("two")]);
        assert_eq!(drawn.matches("<polyline").count(), 2);
        assert!(!drawn.contains("NaN") && drawn.ends_with("</svg>\n"));
    }
}
