//! Prints the shortest way in which each wrong scheme fails: `cargo run -p reference-schemes --example explain`.

use reference_schemes::Scheme;
use reference_schemes::brt::Brt;
use reference_schemes::checker::{Limits, World, search};
use reference_schemes::dedup::Dedup;
use reference_schemes::in_pointer::{InPointer, Told};
use reference_schemes::store::InPlace;

const LIMITS: Limits = Limits {
    file_count: 3,
    block_count: 1,
    value_count: 2,
    step_count: 6,
};

fn explain<S: Scheme>(title: &str, scheme: S, in_place: InPlace, is_exact: bool) {
    println!("{title}");
    let world = World::new(scheme, in_place, LIMITS, is_exact);
    match search(&world) {
        Ok(tried) => println!(
            "nothing goes wrong: {} states, {} steps from them\n",
            tried.state_count, tried.step_count
        ),
        Err(found) => println!("{}\n", found.explain(world)),
    }
}

fn main() {
    for (title, told) in [
        ("Count in the pointer, of the copy alone:", Told::Copy),
        ("Count in the pointer, of both:", Told::Both),
        ("Count in the pointer, relatives are told:", Told::Relatives),
    ] {
        explain(title, InPointer { told }, InPlace::SinceClone, false);
    }
    let title = "Block reference table, written in place where the count is one:";
    explain(title, Brt::default(), InPlace::ByCount, false);
    let title = "Block reference table, written in place since the last clone:";
    explain(title, Brt::default(), InPlace::SinceClone, true);
    explain("Dedup table:", Dedup::default(), InPlace::SinceClone, true);
}
