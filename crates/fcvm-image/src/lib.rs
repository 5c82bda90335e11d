//! OCI images: references, registries, the content store, and layers to one root image.
