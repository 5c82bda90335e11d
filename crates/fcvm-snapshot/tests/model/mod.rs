//! Random lines of snapshots against their bytes.

use proptest::prelude::*;

use crate::lab::{Lab, PAGE, fields, memory_of, pages_over, read_all, tag};

const PAGES: u64 = 700;

#[derive(Debug, Clone)]
struct Step {
    is_whole: bool,
    /// Page, and what fills it: 0 often.
    writes: std::collections::BTreeMap<u64, u8>,
    /// Runs, so that entries of the most pages come up too.
    run: (u64, u64, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let writes = proptest::collection::btree_map(0..PAGES, 0..4_u8, 0..12);
    (any::<bool>(), writes, (0..PAGES, 0..400_u64, 0..3_u8)).prop_map(|(is_whole, writes, run)| {
        Step {
            is_whole,
            writes,
            run,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn lines_hold_what_was_written(
        first in proptest::collection::btree_map(0..PAGES, 0..4_u8, 0..40),
        steps in proptest::collection::vec(step(), 1..6),
    ) {
        let lab = Lab::new();
        let mut model = vec![0; PAGES as usize * PAGE];
        for (page, fill) in first {
            model[page as usize * PAGE..][..PAGE].fill(fill);
        }
        lab.whole("s0", &model, None);
        let mut expected = vec![model.clone()];
        for (index, step) in steps.iter().enumerate() {
            let parent = lab.store.open(&tag(&format!("s{index}"))).unwrap();
            let memory = memory_of(&model);
            let (start, count, fill) = step.run;
            let mut over: std::collections::BTreeMap<u64, u8> =
                (start..(start + count).min(PAGES)).map(|page| (page, fill)).collect();
            over.extend(&step.writes);
            let pages: Vec<(u64, [u8; PAGE])> =
                over.iter().map(|(page, fill)| (*page, [*fill; PAGE])).collect();
            let file = pages_over(&memory, &pages);
            let mut changed = 0;
            for (page, bytes) in &pages {
                let place = &mut model[*page as usize * PAGE..][..PAGE];
                changed += u64::from(place != bytes);
                place.copy_from_slice(bytes);
            }
            let mut draft = lab.store.begin(&tag(&format!("s{}", index + 1))).unwrap();
            if step.is_whole {
                draft.write_memory_whole(&memory, Some(&file)).unwrap();
            } else {
                draft.write_memory_difference(&memory, &file, &parent).unwrap();
            }
            draft.write_state(&[]).unwrap();
            let made = draft.finish(fields()).unwrap();
            let stored = made.manifest().memory.page_count;
            let not_zero = model.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0));
            prop_assert_eq!(stored, if step.is_whole { not_zero.count() as u64 } else { changed });
            expected.push(model.clone());
        }
        for (index, bytes) in expected.iter().enumerate() {
            let snapshot = lab.store.open(&tag(&format!("s{index}"))).unwrap();
            snapshot.verify().unwrap();
            prop_assert!(read_all(&snapshot.load_memory(|_, _| ()).unwrap()) == *bytes);
        }
    }
}
