//! Shell completions and manual pages, generated from the arguments.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory;

use crate::args::Arguments;

pub(crate) fn completion(shell: clap_complete::Shell) -> anyhow::Result<u8> {
    clap_complete::generate(
        shell,
        &mut Arguments::command(),
        "fcvm",
        &mut std::io::stdout(),
    );
    Ok(crate::EXIT_SUCCESS)
}

pub(crate) fn man(directory: &Path) -> anyhow::Result<u8> {
    clap_mangen::generate_to(Arguments::command(), directory)
        .with_context(|| format!("cannot write manual pages into {}", directory.display()))?;
    Ok(crate::EXIT_SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
