//! Random layers against a plain model of the merge rules: a map from paths to objects, in which
//! all whiteouts of a layer are applied before its other members.

use std::collections::BTreeMap;

use fcvm_image::rootfs::Limits;
use proptest::prelude::*;

use crate::support::reader::Image;
use crate::support::tarball::{Entry, seal, tar};
use crate::support::{fsck, try_build};

/// A member in terms of the model; paths are lists of one-letter names.
#[derive(Clone, Debug)]
enum Step {
    File(Vec<&'static str>, u16),
    Dir(Vec<&'static str>, u16),
    Symlink(Vec<&'static str>),
    HardLink(Vec<&'static str>, Vec<&'static str>),
    Whiteout(Vec<&'static str>),
    Opaque(Vec<&'static str>),
}

impl Step {
    fn entry(&self) -> Entry {
        let joined = |path: &[&str]| path.join("/");
        match self {
            Self::File(path, tag) => {
                // Every third file is too large for its inode's block.
                let data = vec![
                    *tag as u8;
                    if tag % 3 == 0 {
                        5000
                    } else {
                        usize::from(tag % 7)
                    }
                ];
                Entry::file(joined(path), data).mode(u32::from(*tag))
            }
            Self::Dir(path, tag) => Entry::dir(joined(path)).mode(u32::from(*tag)),
            Self::Symlink(path) => Entry::symlink(joined(path), "nowhere"),
            Self::HardLink(path, target) => Entry::hard_link(joined(path), joined(target)),
            Self::Whiteout(path) => {
                let (name, parent) = path.split_last().unwrap();
                let mut path: Vec<String> = parent.iter().map(|name| name.to_string()).collect();
                path.push(format!(".wh.{name}"));
                Entry::file(path.join("/"), "")
            }
            Self::Opaque(path) => Entry::file(format!("{}/.wh..wh..opq", joined(path)), ""),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Object {
    Dir(u16),
    /// Number of the file, so that its names can be told to be links; 0 for symbolic links.
    File {
        number: usize,
        entry: Content,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Content {
    kind: u8,
    mode: u32,
    data: Vec<u8>,
}

type Path = Vec<&'static str>;
type Model = BTreeMap<Path, Object>;

const IMPLIED: u16 = 0o755;

/// Why a case says nothing about the rules.
enum Outcome {
    Refused,
    /// The case is left out: its answer depends on whether a whiteout comes first, or a path leads
    /// through a symbolic link.
    Ambiguous,
}

fn apply(model: &mut Model, steps: &[Step], files: &mut usize) -> Result<(), Outcome> {
    let hidden = hide(model, steps);
    for step in steps {
        let (path, object) = match step {
            Step::Whiteout(_) | Step::Opaque(_) => continue,
            Step::Dir(path, mode) => (path, Object::Dir(*mode)),
            Step::HardLink(path, target) => match model.get(target) {
                Some(file @ Object::File { .. }) => (path, file.clone()),
                _ if hidden.contains_key(target) => return Err(Outcome::Ambiguous),
                _ => return Err(Outcome::Refused),
            },
            Step::File(path, _) | Step::Symlink(path) => {
                *files += 1;
                let Entry {
                    kind, mode, data, ..
                } = step.entry();
                (
                    path,
                    Object::File {
                        number: *files,
                        entry: Content { kind, mode, data },
                    },
                )
            }
        };
        for depth in 1..path.len() {
            let parent = path[..depth].to_vec();
            match model.get(&parent) {
                Some(Object::Dir(_)) => {}
                // Links on the way are followed; the tests in `merge` cover that.
                Some(Object::File { entry, .. }) if entry.kind == b'2' => {
                    return Err(Outcome::Ambiguous);
                }
                Some(_) => return Err(Outcome::Refused),
                None if matches!(hidden.get(&parent), Some(Object::File { .. })) => {
                    return Err(Outcome::Ambiguous);
                }
                None => drop(model.insert(parent, Object::Dir(IMPLIED))),
            }
        }
        let both_directories = matches!(
            (&object, model.get(path)),
            (Object::Dir(_), Some(Object::Dir(_)))
        );
        if !both_directories {
            model.retain(|other, _| !other.starts_with(path));
        }
        model.insert(path.clone(), object);
    }
    Ok(())
}

/// Applies all whiteouts of a layer to what lower layers hold; returns what they removed.
fn hide(model: &mut Model, steps: &[Step]) -> Model {
    let mut hidden = Model::new();
    for step in steps {
        let (prefix, inclusive) = match step {
            Step::Whiteout(path) => (path, true),
            Step::Opaque(path) => (path, false),
            _ => continue,
        };
        let hides = |path: &Path| path.starts_with(prefix) && (inclusive || path != prefix);
        hidden.extend(
            model
                .iter()
                .filter(|(path, _)| hides(path))
                .map(|(p, o)| (p.clone(), o.clone())),
        );
        model.retain(|path, _| !hides(path));
    }
    hidden
}

fn path() -> impl Strategy<Value = Path> {
    proptest::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (path(), 1u16..0o777).prop_map(|(path, tag)| Step::File(path, tag)),
        4 => (path(), 1u16..0o777).prop_map(|(path, tag)| Step::Dir(path, tag)),
        1 => path().prop_map(Step::Symlink),
        2 => (path(), path()).prop_map(|(path, target)| Step::HardLink(path, target)),
        3 => path().prop_map(Step::Whiteout),
        2 => path().prop_map(Step::Opaque),
    ]
}

fn matches_model(image: &Image, model: &Model) -> Result<(), TestCaseError> {
    let expected: Vec<String> = model.keys().map(|path| path.join("/")).collect();
    let mut expected_paths = expected.clone();
    expected_paths.sort();
    prop_assert_eq!(
        image.paths().into_iter().collect::<Vec<_>>(),
        expected_paths
    );
    let mut nids = BTreeMap::new();
    for (path, object) in model {
        let found = image.at(path.join("/"));
        match object {
            Object::Dir(mode) => {
                prop_assert_eq!(
                    (found.kind(), found.permissions()),
                    (0o4, *mode),
                    "{:?}",
                    path
                );
            }
            Object::File { number, entry } => {
                let symlink = entry.kind == b'2';
                prop_assert_eq!(found.kind(), if symlink { 0o12 } else { 0o10 });
                prop_assert_eq!(u32::from(found.permissions()), entry.mode);
                if !symlink {
                    prop_assert_eq!(&found.content, &entry.data);
                }
                // The same file has the same inode, different files have different ones.
                prop_assert_eq!(*nids.entry(*number).or_insert(found.nid), found.nid);
            }
        }
    }
    let mut distinct: Vec<u64> = nids.values().copied().collect();
    distinct.sort_unstable();
    distinct.dedup();
    prop_assert_eq!(distinct.len(), nids.len());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_layers_merge_as_the_model_says(
        layers in proptest::collection::vec(proptest::collection::vec(step(), 0..12), 1..4),
    ) {
        let mut model = Model::new();
        let mut files = 0;
        let mut refused = false;
        for steps in &layers {
            match apply(&mut model, steps, &mut files) {
                Ok(()) => {}
                Err(Outcome::Refused) => refused = true,
                Err(Outcome::Ambiguous) => return Ok(()),
            }
            if refused {
                break;
            }
        }
        let layers: Vec<Vec<u8>> = layers
            .iter()
            .map(|steps| tar(&steps.iter().map(Step::entry).collect::<Vec<_>>()))
            .collect();
        match try_build(&layers, &Limits::default()) {
            Ok(image) => {
                prop_assert!(!refused, "the model refuses these layers");
                fsck(&image.path);
                matches_model(&image.read(), &model)?;
            }
            Err(error) => prop_assert!(refused, "{error}"),
        }
    }

    /// Damage that the digest does not show, as a hostile registry can make it: an error or a
    /// sound image, never anything else.
    #[test]
    fn damaged_layers_give_an_error_or_a_sound_image(
        steps in proptest::collection::vec(step(), 1..8),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        reseal in any::<bool>(),
    ) {
        let mut entries: Vec<Entry> = steps.iter().map(Step::entry).collect();
        entries.push(
            Entry::file("sparse", vec![1; 30])
                .xattr("user.x", "value")
                .pax("GNU.sparse.size", "90000")
                .pax("GNU.sparse.map", "5,10,40000,20"),
        );
        let mut layer = tar(&entries);
        for (position, value) in damage {
            let at = position.index(layer.len());
            layer[at] = value;
            if reseal {
                let block: &mut [u8] = &mut layer[at / 512 * 512..][..512];
                seal(block.try_into().unwrap());
            }
        }
        if let Ok(image) = try_build(&[layer], &Limits::default()) {
            fsck(&image.path);
            image.read();
        }
    }
}
