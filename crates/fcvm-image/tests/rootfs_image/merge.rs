//! How layers change each other: whiteouts, opaque directories, replacement, links, parents.

use crate::support::build_image;
use crate::support::reader::Image;
use crate::support::tarball::{Entry, tar};

fn merged(layers: &[&[Entry]]) -> Image {
    let layers: Vec<Vec<u8>> = layers.iter().map(|entries| tar(entries)).collect();
    build_image(&layers).read()
}

fn paths(image: &Image) -> Vec<String> {
    image.paths().into_iter().collect()
}

#[test]
fn no_layers_give_an_empty_root() {
    let image = merged(&[]);
    assert_eq!(image.entries.len(), 1);
    let root = image.at("");
    assert_eq!((root.permissions(), root.uid, root.nlink), (0o755, 0, 2));
}

#[test]
fn the_root_entry_sets_the_root_directory() {
    let root = Entry::dir("./")
        .mode(0o1711)
        .owner(70_000, 80_000)
        .xattr("user.r", "v");
    let image = merged(&[&[root, Entry::file("./a", "1")]]);
    let root = image.at("");
    assert_eq!(
        (root.permissions(), root.uid, root.gid),
        (0o1711, 70_000, 80_000)
    );
    assert_eq!(root.xattrs[b"user.r".as_slice()], b"v");
    assert_eq!(root.mtime, (1_600_000_000, 0));
}

#[test]
fn whiteouts_hide_lower_files_and_trees() {
    let lower = [
        Entry::dir("d"),
        Entry::file("d/gone", "1"),
        Entry::file("d/stays", "2"),
        Entry::dir("tree"),
        Entry::dir("tree/sub"),
        Entry::file("tree/sub/f", "3"),
    ];
    let upper = [
        Entry::file("d/.wh.gone", ""),
        Entry::file(".wh.tree", ""),
        Entry::file(".wh.never-there", ""),
        Entry::file("no/such/.wh.dir", ""),
        Entry::file("d/stays/.wh.below-a-file", ""),
    ];
    let image = merged(&[&lower, &upper]);
    assert_eq!(paths(&image), ["d", "d/stays"]);
}

#[test]
fn whiteout_and_recreate_in_one_layer_works_in_both_orders() {
    let lower = [
        Entry::dir("d").mode(0o700),
        Entry::file("d/old", "old"),
        Entry::file("f", "old"),
    ];
    let whiteouts = [Entry::file(".wh.d", ""), Entry::file(".wh.f", "")];
    let new = [
        Entry::dir("d").mode(0o711),
        Entry::file("d/new", "new"),
        Entry::file("f", "new"),
    ];
    let before: Vec<Entry> = whiteouts.iter().chain(&new).cloned().collect();
    let after: Vec<Entry> = new.iter().chain(&whiteouts).cloned().collect();
    for upper in [before, after] {
        let image = merged(&[&lower, &upper]);
        assert_eq!(paths(&image), ["d", "d/new", "f"]);
        assert_eq!(image.text("f"), "new");
        assert_eq!(image.at("d").permissions(), 0o711);
    }
}

#[test]
fn opaque_directories_hide_lower_layers_only_in_any_order() {
    let lower = [
        Entry::dir("d").mode(0o700),
        Entry::file("d/old", "old"),
        Entry::dir("d/sub").mode(0o700),
        Entry::file("d/sub/old", "old"),
        Entry::dir("d/implied").mode(0o700),
        Entry::file("d/implied/old", "old"),
    ];
    let marker = Entry::file("d/.wh..wh..opq", "");
    let content = [
        Entry::dir("d").mode(0o750),
        Entry::file("d/new", "new"),
        Entry::dir("d/sub").mode(0o751),
        Entry::file("d/implied/new", "new"),
    ];
    for position in 0..=content.len() {
        let mut upper = content.to_vec();
        upper.insert(position, marker.clone());
        let image = merged(&[&lower, &upper]);
        assert_eq!(
            paths(&image),
            ["d", "d/implied", "d/implied/new", "d/new", "d/sub"]
        );
        assert_eq!(image.at("d").permissions(), 0o750);
        assert_eq!(image.at("d/sub").permissions(), 0o751);
        assert_eq!(
            image.at("d/implied").permissions(),
            0o755,
            "marker at {position}"
        );
    }
}

#[test]
fn whiteouts_do_not_reach_over_to_the_next_layer() {
    let layers: [&[Entry]; 3] = [
        &[Entry::dir("d"), Entry::file("d/a", "1")],
        &[Entry::file("d/.wh..wh..opq", ""), Entry::file("d/b", "2")],
        &[Entry::dir("d"), Entry::file("d/a", "3")],
    ];
    let image = merged(&layers);
    assert_eq!(paths(&image), ["d", "d/a", "d/b"]);
    assert_eq!(image.text("d/a"), "3");
}

#[test]
fn directories_keep_children_when_metadata_changes() {
    let lower = [
        Entry::dir("d").mode(0o755).xattr("user.old", "1"),
        Entry::file("d/f", "x"),
    ];
    let upper = [Entry::dir("d/")
        .mode(0o2770)
        .owner(1, 2)
        .xattr("user.new", "2")];
    let image = merged(&[&lower, &upper]);
    let directory = image.at("d");
    assert_eq!(
        (directory.permissions(), directory.uid, directory.gid),
        (0o2770, 1, 2)
    );
    assert_eq!(directory.xattrs.keys().collect::<Vec<_>>(), [b"user.new"]);
    assert_eq!(image.text("d/f"), "x");
}

#[test]
fn files_directories_and_links_replace_each_other() {
    let image = merged(&[
        &[
            Entry::file("a", "file"),
            Entry::dir("b"),
            Entry::file("b/x", "x"),
            Entry::symlink("c", "b"),
        ],
        &[
            Entry::dir("a"),
            Entry::file("a/y", "y"),
            Entry::file("b", "now a file"),
            Entry::dir("c"),
        ],
        &[Entry::file("a", "file again"), Entry::file("c/z", "z")],
    ]);
    assert_eq!(paths(&image), ["a", "b", "c", "c/z"]);
    assert_eq!(image.text("a"), "file again");
    assert_eq!(image.text("b"), "now a file");
    assert_eq!(image.at("c").kind(), 0o4);
}

#[test]
fn of_equal_members_the_last_counts() {
    let image = merged(&[&[
        Entry::file("f", "first").mode(0o600),
        Entry::file("./f", vec![b'x'; 10_000]),
        Entry::file("f", "last").mode(0o640),
        Entry::dir("d"),
        Entry::file("d/lost", ""),
        Entry::file("d", "no directory"),
    ]]);
    assert_eq!(paths(&image), ["d", "f"]);
    assert_eq!(image.text("f"), "last");
    assert_eq!(image.at("f").permissions(), 0o640);
}

#[test]
fn hard_links_join_names_across_layers() {
    let big = vec![7u8; 20_000];
    let lower = [
        Entry::file("a", &big).owner(5, 6),
        Entry::hard_link("b", "a"),
    ];
    let upper = [
        Entry::hard_link("./d/c", "./b"),
        Entry::file(".wh.a", ""),
        Entry::symlink("s", "nowhere"),
        Entry::hard_link("s2", "s"),
        Entry::hard_link("b", "d/c"),
    ];
    let image = merged(&[&lower, &upper]);
    assert_eq!(paths(&image), ["b", "d", "d/c", "s", "s2"]);
    let (b, c) = (image.at("b"), image.at("d/c"));
    assert_eq!((b.nid, b.nlink, b.uid), (c.nid, 2, 5));
    assert_eq!(c.content, big);
    assert_eq!(image.at("s").nid, image.at("s2").nid);
}

#[test]
fn a_hard_link_outlives_its_target_and_breaks_when_replaced() {
    let image = merged(&[
        &[Entry::file("t", "shared"), Entry::hard_link("l", "t")],
        &[Entry::file("t", "new"), Entry::hard_link("m", "l")],
    ]);
    assert_eq!(
        (image.text("t"), image.text("l")),
        ("new".into(), "shared".into())
    );
    assert_eq!(image.at("t").nlink, 1);
    assert_eq!(
        (image.at("l").nlink, image.at("m").nid),
        (2, image.at("l").nid)
    );
    // A link that takes the place of the directory that holds its target.
    let image = merged(&[&[
        Entry::dir("d"),
        Entry::file("d/f", "kept"),
        Entry::hard_link("d", "d/f"),
    ]]);
    assert_eq!(paths(&image), ["d"]);
    assert_eq!(image.text("d"), "kept");
}

#[test]
fn parents_may_be_symbolic_links_of_lower_layers() {
    let lower = [
        Entry::dir("usr"),
        Entry::dir("usr/lib"),
        Entry::file("usr/lib/old", "old"),
        Entry::symlink("lib", "usr/lib"),
        Entry::symlink("abs", "/usr"),
        Entry::dir("deep"),
        Entry::symlink("deep/up", "../usr/./lib//"),
        Entry::symlink("dangling", "usr/made/here"),
    ];
    let upper = [
        Entry::file("lib/new", "1"),
        Entry::file("abs/lib/abs", "2"),
        Entry::file("deep/up/up", "3"),
        Entry::file("lib/.wh.old", ""),
        Entry::file("dangling/f", "4"),
        Entry::hard_link("lib/hard", "lib/new"),
    ];
    let image = merged(&[&lower, &upper]);
    assert_eq!(image.text("usr/lib/new"), "1");
    assert_eq!(image.text("usr/lib/abs"), "2");
    assert_eq!(image.text("usr/lib/up"), "3");
    assert_eq!(image.text("usr/made/here/f"), "4");
    assert_eq!(image.at("usr/lib/hard").nid, image.at("usr/lib/new").nid);
    assert!(image.get("usr/lib/old").is_none());
    assert_eq!(image.at("lib").kind(), 0o12, "the link itself stays");
}

#[test]
fn missing_parents_are_made() {
    let image = merged(&[&[Entry::file("a/b/c", "x")]]);
    assert_eq!(paths(&image), ["a", "a/b", "a/b/c"]);
    let made = image.at("a/b");
    assert_eq!(
        (made.permissions(), made.uid, made.gid, made.mtime),
        (0o755, 0, 0, (0, 0))
    );
}

#[test]
fn bookkeeping_of_aufs_is_left_out() {
    let image = merged(&[&[
        Entry::dir(".wh..wh.plnk"),
        Entry::file(".wh..wh.plnk/12.34", "x"),
        Entry::file(".wh..wh.aufs", ""),
        Entry::file("f", "x"),
    ]]);
    assert_eq!(paths(&image), ["f"]);
}

#[test]
fn blocks_of_replaced_files_are_used_again_and_the_rest_is_zero() {
    let secret = b"SECRET-".repeat(10_000);
    let layers = [
        tar(&[
            Entry::file("a", &secret),
            Entry::file("b", &secret),
            Entry::file("c", vec![1; 5000]),
        ]),
        tar(&[Entry::file("a", vec![2; 60_000]), Entry::file(".wh.b", "")]),
    ];
    let image = build_image(&layers);
    let bytes = image.bytes();
    assert!(
        !bytes.windows(7).any(|window| window == b"SECRET-"),
        "deleted content is in the image"
    );
    let read = image.read();
    assert_eq!(read.at("a").content, vec![2; 60_000]);
    assert_eq!(read.at("c").content, vec![1; 5000]);
    // Superblock, 18 + 18 + 2 blocks of the lower layer, metadata: nothing was added for `a`.
    assert!(
        bytes.len() <= 4096 * (1 + 18 + 18 + 2 + 1),
        "{} bytes",
        bytes.len()
    );
}
