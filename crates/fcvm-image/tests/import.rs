//! Images from archives and directories, made by the tools that people use.

mod common;

use std::fs;

use common::{Scratch, all, run, tool_missing};
use fcvm_image::{ImportOptions, Platform, Silent, import};

fn options(name: Option<&str>) -> ImportOptions {
    ImportOptions {
        name: name.map(|name| name.parse().unwrap()),
        platform: Platform::host(),
    }
}

#[test]
fn a_directory_becomes_an_image() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let rootfs = scratch.rootfs("hello");
    let source = format!("dir:{}", rootfs.display()).parse().unwrap();
    let images = import(&store, &source, &options(Some("localhost/hello")), &Silent).unwrap();
    let image = store.resolve("hello").unwrap();
    assert_eq!(image.id, images[0].id);
    assert_eq!(image.names[0].to_string(), "localhost/hello:latest");
    assert_eq!(image.layers.len(), 1);
    assert_eq!(image.layers[0].digest, image.layers[0].diff_id);
    assert_eq!(store.resolve(&image.id.short()).unwrap().id, image.id);
    let root = store.root_image(&image, &Silent).unwrap();
    assert_eq!(
        fs::read(&root).unwrap()[1024..1028],
        [0xe2, 0xe1, 0xf5, 0xe0]
    );
}
