//! Docker archives: what `docker save`, `podman save` and `skopeo copy docker-archive:` write.
//!
//! `manifest.json` lists the images. Layers are usually plain tar, named by whatever the writing tool
//! chose, and shared between images through links. A manifest that refers to them is composed here;
//! the configuration, and with it the image's id, stays as it is.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::{Import, ImportError, Members, read_member};
use crate::compose;
use crate::digest::Digest;
use crate::format::{self, CONFIG_MAX_BYTES, FormatError, LAYERS_MAX_COUNT, MANIFEST_MAX_BYTES};
use crate::progress::one_line;
use crate::reference::{Reference, candidates};
use crate::store::Image;

const KIND: &str = "a Docker archive";
const IMAGES_MAX_COUNT: usize = 1024;

/// An image of a Docker archive.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerImage {
    /// Member that holds the configuration.
    config: PathBuf,
    /// Names, `null` for none.
    repo_tags: Option<Vec<String>>,
    /// Members that hold the layers, the bottom one first; `null` for none.
    layers: Option<Vec<PathBuf>>,
}

/// Reads the `manifest.json` of a Docker archive.
pub fn parse_docker_manifest(bytes: &[u8]) -> Result<Vec<DockerImage>, String> {
    let images: Vec<DockerImage> =
        serde_json::from_slice(bytes).map_err(|error| one_line(&error.to_string(), 200))?;
    if images.len() > IMAGES_MAX_COUNT {
        return Err(format!("it has more than {IMAGES_MAX_COUNT} images"));
    }
    for image in &images {
        let layers = image.layers();
        if layers.len() > LAYERS_MAX_COUNT {
            return Err(format!("an image has more than {LAYERS_MAX_COUNT} layers"));
        }
        let paths = layers.iter().chain([&image.config]);
        let is_plain = |path: &PathBuf| {
            path.components()
                .all(|component| matches!(component, Component::Normal(_)))
                && !path.as_os_str().is_empty()
        };
        if let Some(bad) = paths.into_iter().find(|path| !is_plain(path)) {
            return Err(format!(
                "'{}' names no member",
                one_line(&bad.to_string_lossy(), 100)
            ));
        }
    }
    Ok(images)
}

impl DockerImage {
    fn layers(&self) -> &[PathBuf] {
        self.layers.as_deref().unwrap_or_default()
    }

    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

impl Import<'_> {
    /// Imports the image of this name, or all.
    pub(super) fn docker(
        &self,
        members: &dyn Members,
        path: &Path,
        name: Option<&str>,
    ) -> Result<Vec<Image>, ImportError> {
        let unusable = |reason| ImportError::Unusable {
            path: path.to_owned(),
            kind: KIND,
            reason,
        };
        let name_of_list = Path::new("manifest.json");
        let list = match read_member(members, path, name_of_list, MANIFEST_MAX_BYTES) {
            Err(ImportError::Read { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                return Err(unusable("it has no member 'manifest.json'".into()));
            }
            other => other?,
        };
        let list = parse_docker_manifest(&list)
            .map_err(|reason| unusable(format!("its manifest.json is wrong: {reason}")))?;
        let chosen: Vec<&DockerImage> = match name {
            None => list.iter().collect(),
            Some(name) => vec![select(&list, path, name)?],
        };
        if chosen.is_empty() {
            return Err(unusable("it is empty".into()));
        }
        if chosen.len() > 1 && self.options.name.is_some() {
            return Err(ImportError::OneNameForSeveral {
                path: path.to_owned(),
            });
        }
        chosen
            .into_iter()
            .map(|image| self.docker_image(members, path, image))
            .collect()
    }

    fn docker_image(
        &self,
        members: &dyn Members,
        path: &Path,
        image: &DockerImage,
    ) -> Result<Image, ImportError> {
        let format_error = |error| ImportError::Format {
            path: path.to_owned(),
            error,
        };
        let config = read_member(members, path, &image.config, CONFIG_MAX_BYTES)?;
        let parsed = format::parse_config(&config).map_err(format_error)?;
        self.options.platform.check(&parsed)?;
        let diff_ids = format::diff_ids(&parsed).map_err(format_error)?;
        if diff_ids.len() != image.layers().len() {
            let (layers, diff_ids) = (image.layers().len(), diff_ids.len());
            return Err(format_error(FormatError::LayerCount { layers, diff_ids }));
        }
        let names: Vec<Reference> = match &self.options.name {
            Some(name) => vec![name.clone()],
            None => image
                .tags()
                .iter()
                .map(|tag| tag.parse())
                .collect::<Result<_, _>>()?,
        };
        let ingest = self.store.begin()?;
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (name, diff_id) in image.layers().iter().zip(diff_ids) {
            let size_bytes = self.layer(&ingest, members, (path, name), &diff_id, None)?;
            layers.push((diff_id, size_bytes));
        }
        ingest.put(&config)?;
        let manifest = compose::manifest((Digest::of(&config), config.len() as u64), &layers);
        Ok(ingest.finish(&manifest, &names)?)
    }
}

fn select<'l>(
    list: &'l [DockerImage],
    path: &Path,
    name: &str,
) -> Result<&'l DockerImage, ImportError> {
    let wanted = candidates(name);
    let matches = |tag: &String| {
        tag == name
            || tag
                .parse::<Reference>()
                .is_ok_and(|tag| wanted.contains(&tag))
    };
    let found = list.iter().find(|image| image.tags().iter().any(matches));
    found.ok_or_else(|| {
        let tags: Vec<&str> = list
            .iter()
            .flat_map(|image| image.tags())
            .map(String::as_str)
            .collect();
        ImportError::NoSuchImage {
            path: path.to_owned(),
            name: one_line(name, 200),
            available: if tags.is_empty() {
                "no names".into()
            } else {
                one_line(&tags.join(", "), 300)
            },
        }
    })
}
