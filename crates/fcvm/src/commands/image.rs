//! `fcvm image`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use fcvm_image::import::{ImportOptions, Source};
use fcvm_image::progress::Progress;
use fcvm_image::pull::PullOptions;
use fcvm_image::{Digest, Image, ImageStore, Reference, StoreError};
use fcvm_types::ByteSize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::Format;
use crate::args::image::{
    BootstrapArguments, ImageCommand, ImageLsArguments, ImportArguments, PullArguments,
};
use crate::context::Context;
use crate::errors::{EXIT_FCVM_FAILED, one_line, printable};
use crate::output::{age, table};
use crate::progress::Shown;

pub(crate) async fn run(context: &Context, command: ImageCommand) -> anyhow::Result<u8> {
    match command {
        ImageCommand::Pull(arguments) => pull(context, &arguments).await,
        ImageCommand::Ls(arguments) => ls(context, &arguments),
        ImageCommand::Inspect { images } => inspect(context, &images),
        ImageCommand::Rm { force, all, images } => rm(context, force, all, &images),
        ImageCommand::Tag { image, name } => {
            let store = store(context)?;
            store.tag(&store.resolve(&image)?, &Reference::parse_local(&name)?)?;
            Ok(crate::EXIT_SUCCESS)
        }
        ImageCommand::Import(arguments) => import(context, &arguments),
        ImageCommand::Bootstrap(arguments) => bootstrap(context, &arguments),
    }
}

/// The image store.
pub(crate) fn store(context: &Context) -> anyhow::Result<ImageStore> {
    Ok(ImageStore::open(&context.data_dir.join("images"))?)
}

/// Tells whether a VM or a snapshot uses the image with this manifest. As in Podman, a VM that has ended
/// does too.
pub(crate) fn in_use(context: &Context) -> anyhow::Result<impl Fn(&Digest) -> bool> {
    let records = context.state()?.all()?;
    let snapshots = context.snapshots().list()?;
    // A start-up cache whose image is gone is of no use: it keeps none.
    let of_snapshots = snapshots
        .into_iter()
        .filter(|listed| !crate::warm::is_cache(&listed.tag))
        .filter_map(|listed| Some(listed.snapshot.ok()?.manifest().fields.image_digest.clone()));
    let used: Vec<String> = records
        .into_iter()
        .map(|record| record.image_digest)
        .chain(of_snapshots)
        .collect();
    Ok(move |digest: &Digest| used.contains(&digest.to_string()))
}

fn ls(context: &Context, arguments: &ImageLsArguments) -> anyhow::Result<u8> {
    let (images, damaged) = store(context)?.list()?;
    for error in damaged {
        eprintln!("Warning: {}", one_line(&error.into()));
    }
    if arguments.format == Format::Json {
        println!(
            "{}",
            serde_json::to_string_pretty(&images.iter().map(json_row).collect::<Vec<_>>())?
        );
        return Ok(crate::EXIT_SUCCESS);
    }
    let id = |image: &Image| {
        if arguments.no_trunc {
            image.id.to_string()
        } else {
            image.id.short()
        }
    };
    if arguments.quiet {
        images.iter().for_each(|image| println!("{}", id(image)));
        return Ok(crate::EXIT_SUCCESS);
    }
    let rows = images.iter().flat_map(|image| {
        let names = image
            .names
            .iter()
            .map(|name| (name.name(), name.tag().unwrap_or("<none>").to_owned()));
        let mut names: Vec<_> = names.collect();
        if names.is_empty() {
            names.push(("<none>".to_owned(), "<none>".to_owned()));
        }
        let created = created(image).map_or("-".to_owned(), |at| format!("{} ago", age(at)));
        let size = ByteSize::from_bytes(image.size_bytes).to_string();
        names
            .into_iter()
            .map(move |(name, tag)| vec![name, tag, id(image), created.clone(), size.clone()])
    });
    table(&["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"], rows);
    Ok(crate::EXIT_SUCCESS)
}

fn created(image: &Image) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(image.config.created().as_ref()?, &Rfc3339).ok()
}

fn json_row(image: &Image) -> Value {
    json!({
        "id": image.id.to_string(),
        "digest": image.manifest_digest.to_string(),
        "names": image.names.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "created_at": image.config.created(),
        "size_bytes": image.size_bytes,
        "architecture": image.config.architecture().to_string(),
        "os": image.config.os().to_string(),
    })
}

/// An image as `inspect` shows it.
fn details(image: &Image) -> Value {
    let mut value = json_row(image);
    let layers = image.layers.iter().map(|layer| {
        json!({
            "digest": layer.digest.to_string(),
            "diff_id": layer.diff_id.to_string(),
            "media_type": layer.media_type,
            "size_bytes": layer.size_bytes,
        })
    });
    value["layers"] = layers.collect();
    value["config"] = json!(image.config);
    value
}

fn inspect(context: &Context, images: &[String]) -> anyhow::Result<u8> {
    let store = store(context)?;
    let values = images
        .iter()
        .map(|name| Ok(details(&store.resolve(name)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    println!("{}", serde_json::to_string_pretty(&values)?);
    Ok(crate::EXIT_SUCCESS)
}

/// For `fcvm inspect`: the image, where there is one of that name.
pub(crate) fn inspect_value(context: &Context, name: &str) -> anyhow::Result<Option<Value>> {
    if !context.data_dir.join("images").is_dir() {
        return Ok(None);
    }
    match store(context)?.resolve(name) {
        Ok(image) => Ok(Some(details(&image))),
        Err(StoreError::NotFound(_) | StoreError::Reference(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The name of an image, for a test that needs any.
pub(crate) fn any_name(context: &Context) -> anyhow::Result<Option<String>> {
    let (images, _) = store(context)?.list()?;
    Ok(images.first().map(Image::display_name))
}

fn rm(context: &Context, force: bool, all: bool, images: &[String]) -> anyhow::Result<u8> {
    let store = store(context)?;
    let used = in_use(context)?;
    let in_use = |digest: &Digest| !force && used(digest);
    let mut code = crate::EXIT_SUCCESS;
    let names: Vec<String> = if all {
        let (images, damaged) = store.list()?;
        for error in damaged {
            eprintln!("Error: {}", one_line(&error.into()));
            code = EXIT_FCVM_FAILED;
        }
        images.iter().map(|image| image.id.to_string()).collect()
    } else {
        images.to_vec()
    };
    for name in &names {
        match store.remove(name, &in_use, force || all) {
            Ok(removed) => {
                removed
                    .untagged
                    .iter()
                    .for_each(|name| println!("Untagged: {name}"));
                if let Some(id) = removed.image {
                    println!("Deleted: {id}");
                }
            }
            Err(error) => {
                eprintln!("Error: {}", one_line(&error.into()));
                code = EXIT_FCVM_FAILED;
            }
        }
    }
    Ok(code)
}

async fn pull(context: &Context, arguments: &PullArguments) -> anyhow::Result<u8> {
    let store = store(context)?;
    for name in &arguments.images {
        let options = PullSettings {
            tls_verify: arguments.tls_verify,
            cert_dir: arguments.cert_dir.clone(),
            credentials: arguments.creds.clone(),
            authfile: arguments.authfile.clone(),
        };
        let image = pull_one(context, &store, name, options, Shown::new(arguments.quiet)).await?;
        println!("{}", image.id);
    }
    Ok(crate::EXIT_SUCCESS)
}

/// What `pull` and `run --pull` say of a registry.
pub(crate) struct PullSettings {
    pub(crate) tls_verify: bool,
    pub(crate) cert_dir: Option<PathBuf>,
    pub(crate) credentials: Option<String>,
    pub(crate) authfile: Option<PathBuf>,
}

/// Pulls an image from its registry.
pub(crate) async fn pull_one(
    context: &Context,
    store: &ImageStore,
    name: &str,
    settings: PullSettings,
    progress: Arc<Shown>,
) -> anyhow::Result<Image> {
    let reference: Reference = name.parse()?;
    let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"];
    let certificates = system.map(|directory| PathBuf::from(directory).join(reference.registry()));
    let options = PullOptions {
        tls_verify: settings.tls_verify,
        certificate_dirs: settings.cert_dir.into_iter().chain(certificates).collect(),
        credential: settings
            .credentials
            .as_deref()
            .map(str::parse)
            .transpose()?,
        credential_files: settings
            .authfile
            .into_iter()
            .chain(context.credential_files.iter().cloned())
            .collect(),
        https_proxy: context.proxies.https.clone(),
        http_proxy: context.proxies.http.clone(),
        no_proxy: context.proxies.none.clone(),
        ..PullOptions::default()
    };
    Ok(fcvm_image::pull::pull(store, &reference, &options, &*progress).await?)
}

fn import(context: &Context, arguments: &ImportArguments) -> anyhow::Result<u8> {
    let source: Source = arguments.source.parse()?;
    let options = ImportOptions {
        name: arguments
            .name
            .as_deref()
            .map(Reference::parse_local)
            .transpose()?,
        platform: fcvm_image::Platform::host(),
    };
    let progress = Shown::new(false);
    for image in fcvm_image::import::import(&store(context)?, &source, &options, &*progress)? {
        println!("{}", image.id);
    }
    Ok(crate::EXIT_SUCCESS)
}

fn bootstrap(context: &Context, arguments: &BootstrapArguments) -> anyhow::Result<u8> {
    let Some(suite) = arguments.source.strip_prefix("debian:") else {
        bail!(
            "'{}' cannot be made here: write debian:SUITE, for example debian:bookworm",
            printable(&arguments.source)
        );
    };
    let mut options = fcvm_image::bootstrap::BootstrapOptions::new(suite);
    let Some(program) = context.find_program("mmdebstrap") else {
        bail!("mmdebstrap is missing: install the package mmdebstrap");
    };
    options.program = program;
    options.include.clone_from(&arguments.include);
    options.zfs = match arguments.zfs.as_deref() {
        Some("") => Some(super::kernel::build::zfs_for_suite(context, suite)?),
        version => version.map(str::to_owned),
    };
    options.sources.clone_from(&arguments.mirror);
    options.name = arguments
        .tag
        .as_deref()
        .map(Reference::parse_local)
        .transpose()?;
    let progress: Arc<Shown> = Shown::new(false);
    let image =
        fcvm_image::bootstrap::bootstrap(&store(context)?, &options, &*progress as &dyn Progress)?;
    println!("{}", image.id);
    Ok(crate::EXIT_SUCCESS)
}
