//! OCI image layouts, in a directory or in an archive.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};

use super::{Import, ImportError, Members, read_member};
use crate::digest::Digest;
use crate::format::{
    self, CONFIG_MAX_BYTES, Document, FormatError, MANIFEST_MAX_BYTES, descriptor_digest,
};
use crate::progress::one_line;
use crate::reference::Reference;
use crate::store::{Image, NAME_ANNOTATION, layout_blob};

const KIND: &str = "an OCI image layout";
/// containerd and buildkit keep the full name here and only the tag in the standard's annotation.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// An index leads to an index leads to an image: real layouts are not deeper.
const MAX_DEPTH: usize = 4;

/// A layout in a directory.
pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn open(dir: &Path) -> Result<Self, ImportError> {
        std::fs::read_dir(dir).map_err(|source| ImportError::Read {
            path: dir.to_owned(),
            source,
        })?;
        Ok(Self(dir.to_owned()))
    }
}

impl Members for Directory {
    fn open(&self, name: &Path) -> Result<(Box<dyn Read + '_>, u64), io::Error> {
        let file = File::open(self.0.join(name))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not a regular file",
            ));
        }
        Ok((Box::new(file), metadata.len()))
    }
}

impl Import<'_> {
    /// Imports one image of a layout.
    pub(super) fn layout(
        &self,
        members: &dyn Members,
        path: &Path,
        name: Option<&str>,
    ) -> Result<Image, ImportError> {
        let format_error = |error| ImportError::Format {
            path: path.to_owned(),
            error,
        };
        self.check_version(members, path)?;
        let index = read_member(members, path, Path::new("index.json"), MANIFEST_MAX_BYTES)?;
        let index = format::parse_index(&index).map_err(format_error)?;
        let entry = select(&index, path, name)?;
        let names = match &self.options.name {
            Some(name) => vec![name.clone()],
            None => names(entry),
        };
        let bytes = self.manifest(members, path, entry)?;
        let manifest = format::parse_manifest(&bytes).map_err(format_error)?;

        let ingest = self.store.begin()?;
        let config = blob(members, path, manifest.config(), CONFIG_MAX_BYTES)?;
        let parsed = format::parse_config(&config).map_err(format_error)?;
        format::check_layers(&manifest, &parsed).map_err(format_error)?;
        self.options.platform.check(&parsed)?;
        for layer in manifest.layers() {
            let digest = descriptor_digest("image manifest", layer).map_err(format_error)?;
            let blob = layout_blob(&digest);
            self.layer(&ingest, members, (path, &blob), &digest, Some(layer.size()))?;
        }
        ingest.put(&config)?;
        Ok(ingest.finish(&bytes, &names)?)
    }

    fn check_version(&self, members: &dyn Members, path: &Path) -> Result<(), ImportError> {
        let unusable = |reason: String| ImportError::Unusable {
            path: path.to_owned(),
            kind: KIND,
            reason,
        };
        let name = Path::new("oci-layout");
        let bytes = match read_member(members, path, name, 4096) {
            Err(ImportError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(unusable("it has no file 'oci-layout'".into()));
            }
            other => other?,
        };
        let layout = oci_spec::image::OciLayout::from_reader(bytes.as_slice());
        let layout = layout.map_err(|error| unusable(one_line(&error.to_string(), 200)))?;
        match layout.image_layout_version().as_str() {
            "1.0.0" => Ok(()),
            other => Err(unusable(format!(
                "its version is '{}'",
                one_line(other, 50)
            ))),
        }
    }

    /// The manifest that an entry leads to, through indexes where it has several platforms.
    fn manifest(
        &self,
        members: &dyn Members,
        path: &Path,
        entry: &Descriptor,
    ) -> Result<Vec<u8>, ImportError> {
        let format_error = |error| ImportError::Format {
            path: path.to_owned(),
            error,
        };
        let mut entry = entry.clone();
        for _ in 0..MAX_DEPTH {
            let bytes = blob(members, path, &entry, MANIFEST_MAX_BYTES)?;
            match format::parse_document(&bytes).map_err(format_error)? {
                Document::Manifest(_) => return Ok(bytes),
                Document::Index(index) => {
                    entry = self.options.platform.select(&index)?.clone();
                }
            }
        }
        let (document, reason) = ("image index", "indexes lead to indexes without end".into());
        Err(format_error(FormatError::Malformed { document, reason }))
    }
}

/// Reads a small blob and verifies it.
fn blob(
    members: &dyn Members,
    path: &Path,
    descriptor: &Descriptor,
    limit_bytes: u64,
) -> Result<Vec<u8>, ImportError> {
    let expected =
        descriptor_digest("image manifest", descriptor).map_err(|error| ImportError::Format {
            path: path.to_owned(),
            error,
        })?;
    let name = layout_blob(&expected);
    let bytes = read_member(members, path, &name, limit_bytes)?;
    let actual = Digest::of(&bytes);
    if actual != expected {
        let what = path.join(name).display().to_string();
        return Err(crate::StoreError::DigestMismatch {
            what,
            expected,
            actual,
        }
        .into());
    }
    Ok(bytes)
}

/// The entry of this name, or the only one.
fn select<'i>(
    index: &'i ImageIndex,
    path: &Path,
    name: Option<&str>,
) -> Result<&'i Descriptor, ImportError> {
    let entries = index.manifests();
    let annotated = |entry: &'i Descriptor| {
        let annotations = entry.annotations().as_ref()?;
        annotations.get(NAME_ANNOTATION).map(String::as_str)
    };
    let available = || {
        let names: Vec<&str> = entries.iter().filter_map(annotated).collect();
        if names.is_empty() {
            "no names".into()
        } else {
            one_line(&names.join(", "), 300)
        }
    };
    let path = path.to_owned();
    match (name, entries.as_slice()) {
        (Some(name), _) => {
            let found = entries.iter().find(|entry| {
                annotated(entry) == Some(name)
                    || entry.annotations().as_ref().is_some_and(|annotations| {
                        annotations.get(CONTAINERD_NAME).map(String::as_str) == Some(name)
                    })
            });
            found.ok_or_else(|| ImportError::NoSuchImage {
                path,
                name: one_line(name, 200),
                available: available(),
            })
        }
        (None, [entry]) => Ok(entry),
        (None, []) => Err(ImportError::Unusable {
            path,
            kind: KIND,
            reason: "it is empty".into(),
        }),
        (None, _) => Err(ImportError::SeveralImages {
            path,
            available: available(),
        }),
    }
}

/// The full name that the layout has for an image. A mere tag is no name: of what would it be?
fn names(entry: &Descriptor) -> Vec<Reference> {
    let Some(annotations) = entry.annotations() else {
        return Vec::new();
    };
    [CONTAINERD_NAME, NAME_ANNOTATION]
        .iter()
        .filter_map(|key| annotations.get(*key))
        .filter(|name| name.contains(['/', ':']))
        .find_map(|name| name.parse().ok())
        .into_iter()
        .collect()
}
