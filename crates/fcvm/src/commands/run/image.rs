//! The image of a run: found, pulled where the policy says so, converted where it is new.

use std::path::PathBuf;

use anyhow::bail;
use fcvm_image::bootstrap::ZFS_LABEL;
use fcvm_image::{Image, StoreError};
use fcvm_kernel::GuestKernel;

use super::process::ImageProcess;
use crate::args::run::{PullPolicy, StartArguments};
use crate::commands::image::{PullSettings, pull_one, store};
use crate::context::Context;
use crate::errors::printable;
use crate::progress::Shown;

/// The image that the command line names.
pub(super) async fn resolve(
    context: &Context,
    arguments: &StartArguments,
) -> anyhow::Result<Image> {
    let store = store(context)?;
    let missing = match store.resolve(&arguments.image) {
        Ok(image) if arguments.pull != PullPolicy::Always => return Ok(image),
        Ok(_) => None,
        Err(error @ StoreError::NotFound(_)) => Some(error),
        Err(error) => return Err(error.into()),
    };
    if let (PullPolicy::Never, Some(error)) = (arguments.pull, missing) {
        return Err(error.into());
    }
    let settings = PullSettings {
        tls_verify: arguments.tls_verify,
        cert_dir: None,
        credentials: None,
        authfile: None,
    };
    pull_one(
        context,
        &store,
        &arguments.image,
        settings,
        Shown::new(false),
    )
    .await
}

/// Fails where an image was made for another OpenZFS than the kernel has.
pub(super) fn check_zfs(image: &Image, kernel: &GuestKernel) -> anyhow::Result<()> {
    let labels = image
        .config
        .config()
        .as_ref()
        .and_then(|config| config.labels().as_ref());
    let Some(wanted) = labels.and_then(|labels| labels.get(ZFS_LABEL)) else {
        return Ok(());
    };
    if kernel.zfs.as_ref() == Some(wanted) {
        return Ok(());
    }
    bail!(
        "the image was made for OpenZFS {} and the kernel {} has {}: name a kernel with it (--kernel guest-zfs; \
         'fcvm kernel ls' lists them)",
        printable(wanted),
        kernel.version,
        kernel.zfs.as_deref().unwrap_or("none that is known"),
    )
}

/// The converted root image.
pub(super) fn root_image(context: &Context, image: &Image) -> anyhow::Result<PathBuf> {
    fcvm_image::Platform::host().check(&image.config)?;
    // Nothing that the user asked for: a bar where somebody waits, no lines.
    Ok(store(context)?.root_image(image, &*Shown::passing())?)
}

/// The part of the configuration that says what to run.
pub(super) fn process(image: &Image) -> ImageProcess {
    let Some(config) = image.config.config() else {
        return ImageProcess::default();
    };
    ImageProcess {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone(),
    }
}

/// The name shown for the VM: the image's first one, else what was typed.
pub(super) fn shown_name(image: &Image, typed: &str) -> String {
    image
        .names
        .first()
        .map_or_else(|| typed.to_owned(), ToString::to_string)
}

/// Digest of the manifest.
pub(super) fn digest(image: &Image) -> String {
    image.manifest_digest.to_string()
}
