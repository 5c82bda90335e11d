//! The download of one layer, as often as it takes.

use std::time::Duration;

use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use tokio::sync::Semaphore;

use super::PullError;
use super::client::{Failure, Registry};
use crate::digest::Digest;
use crate::progress::{Progress, Task};
use crate::store::{ImageStore, Ingest, Partial, StoreError};

/// Tries in a row that bring nothing.
const TRIES_MAX_COUNT: u32 = 5;
/// Tries altogether, for a server that breaks off after every byte.
const TRIES_IN_ALL_MAX_COUNT: u32 = 200;
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LOCK_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A layer to be fetched.
pub(super) struct LayerPull<'p> {
    pub(super) store: &'p ImageStore,
    pub(super) registry: &'p Registry,
    pub(super) digest: Digest,
    pub(super) size_bytes: u64,
    pub(super) progress: &'p dyn Progress,
}

/// Repeats a request while its failure may pass. `request` is told which try it is, from 0.
pub(super) async fn retried<T>(
    request: impl AsyncFn(u32) -> Result<T, Failure>,
) -> Result<T, PullError> {
    let mut tries = 0;
    loop {
        match request(tries).await {
            Ok(value) => return Ok(value),
            Err(failure) => wait(failure, &mut tries).await?,
        }
    }
}

/// Waits before the next try, longer every time. Gives the error back when there is to be none.
async fn wait(failure: Failure, tries: &mut u32) -> Result<(), PullError> {
    *tries += 1;
    match failure {
        Failure::Transient { error, after } if *tries < TRIES_MAX_COUNT => {
            tracing::debug!(target: "image", "try {tries} failed: {error}");
            let wait = after.unwrap_or(FIRST_WAIT * 2_u32.pow(*tries - 1));
            if wait > LONGEST_WAIT {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            Ok(())
        }
        failure => Err(failure.into()),
    }
}

impl LayerPull<'_> {
    pub(super) async fn run(self, ingest: &Ingest, parallel: &Semaphore) -> Result<(), PullError> {
        let task = self
            .progress
            .start(&self.digest.short(), Some(self.size_bytes));
        if ingest.has(&self.digest, self.size_bytes) {
            task.finish("already here");
            return Ok(());
        }
        let _turn = parallel.acquire().await;
        let mut partial = self.partial().await?;
        if ingest.has(&self.digest, self.size_bytes) {
            partial.discard()?;
            task.finish("already here");
            return Ok(());
        }
        if partial.size_bytes() > self.size_bytes {
            partial.restart()?;
        }
        let resumed_bytes = partial.size_bytes();
        task.advance(resumed_bytes);
        self.fetch(&mut partial, &*task).await?;
        if resumed_bytes > 0 && !partial.is_whole() {
            // What an earlier try left was wrong: once more from the beginning.
            partial.restart()?;
            self.fetch(&mut partial, &*task).await?;
        }
        let what = format!("layer {}", self.digest.short());
        blocking(move || partial.commit(&what)).await?;
        task.finish(if resumed_bytes > 0 {
            "done, resumed"
        } else {
            "done"
        });
        Ok(())
    }

    /// Reads what is here, once no other process fetches the same layer.
    async fn partial(&self) -> Result<Partial, PullError> {
        let mut is_told = false;
        loop {
            let (store, digest) = (self.store.clone(), self.digest);
            if let Some(partial) = blocking(move || store.try_partial(&digest)).await? {
                return Ok(partial);
            }
            if !is_told {
                let layer = self.digest.short();
                let text =
                    format!("another fcvm process is fetching layer {layer}; waiting for it");
                self.progress.message(&text);
                is_told = true;
            }
            // Waiting for the lock itself could not be given up, and would hold up the end of the
            // runtime.
            tokio::time::sleep(LOCK_WAIT).await;
        }
    }

    /// Fetches until all bytes are here.
    async fn fetch(&self, partial: &mut Partial, task: &dyn Task) -> Result<(), PullError> {
        let mut tries = 0;
        let mut tries_in_all = 0;
        while partial.size_bytes() < self.size_bytes {
            let before_bytes = partial.size_bytes();
            let Err(failure) = self.fetch_rest(partial, task).await else {
                continue;
            };
            if partial.size_bytes() > before_bytes && tries_in_all < TRIES_IN_ALL_MAX_COUNT {
                tries = 0;
            }
            tries_in_all += 1;
            wait(failure, &mut tries).await?;
        }
        Ok(())
    }

    /// One request. Ends well when the server says that this was all.
    async fn fetch_rest(&self, partial: &mut Partial, task: &dyn Task) -> Result<(), Failure> {
        let offset_bytes = partial.size_bytes();
        let mut response = self.registry.blob(&self.digest, offset_bytes).await?;
        if !continues_at(&response, offset_bytes) {
            if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && offset_bytes == 0 {
                let reason = "it does not serve the beginning of a layer".to_owned();
                return Err(Failure::Lasting(self.registry.protocol(reason)));
            }
            partial.restart().map_err(lasting)?;
            if response.status() != StatusCode::OK {
                return Ok(());
            }
        }
        loop {
            let chunk = response
                .chunk()
                .await
                .map_err(|error| self.registry.broken(&error))?;
            let Some(chunk) = chunk else { break };
            if chunk.len() as u64 > self.size_bytes - partial.size_bytes() {
                partial.restart().map_err(lasting)?;
                let what = format!("layer {}", self.digest.short());
                let expected_bytes = self.size_bytes;
                return Err(lasting(StoreError::SizeMismatch {
                    what,
                    expected_bytes,
                }));
            }
            if let Err(error) = partial.append(&chunk) {
                // A full disk is better off without half a layer.
                let _ = partial.restart();
                return Err(lasting(error));
            }
            task.advance(chunk.len() as u64);
        }
        if partial.size_bytes() < self.size_bytes {
            let reason = format!("layer {} ends too early", self.digest.short());
            let error = self.registry.protocol(reason);
            return Err(Failure::Transient { error, after: None });
        }
        Ok(())
    }
}

fn lasting(error: StoreError) -> Failure {
    Failure::Lasting(error.into())
}

/// The answer begins where the file ends.
fn continues_at(response: &Response, offset_bytes: u64) -> bool {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range = response.headers().get(CONTENT_RANGE);
            let range = range.and_then(|value| value.to_str().ok());
            let start = range
                .and_then(|text| text.strip_prefix("bytes "))
                .and_then(|text| text.split('-').next())
                .and_then(|text| text.parse::<u64>().ok());
            start == Some(offset_bytes)
        }
        StatusCode::OK => offset_bytes == 0,
        _ => false,
    }
}

/// Runs work that waits for the disk where it holds nobody up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, PullError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(PullError::Setup {
            reason: error.to_string(),
        }),
    }
}
