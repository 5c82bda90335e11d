//! The relay of Ethernet frames between passt and the hypervisor, against one socket pair between the
//! two: what it costs that a VM's network outlives its hypervisor.
//!
//! The two sides are threads of this program that write and read as passt and QEMU do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use fcvm_network::FrameRelay;

use crate::report::{Measure, Report, Samples};

/// Ethernet frames: what fills a 64 KiB buffer, as passt makes of TCP where the guest's MTU allows
/// it, and what fits 1,500 bytes of MTU.
const FRAME_BYTES: [usize; 2] = [65_534, 1_514];
/// Bytes of one throughput sample.
const STREAM_BYTES: usize = 128 << 20;
/// Round trips of one latency sample.
const ROUND_TRIPS: usize = 2_000;
/// What QEMU reads at once (NET_BUFSIZE of include/net/net.h there).
const QEMU_READ_BYTES: usize = 4096 + 65_536;
/// What passt reads at once, less than its 8 MiB but more than a socket holds.
const PASST_READ_BYTES: usize = 1 << 20;
/// Frames that passt sends with one system call fill about so much.
const PASST_WRITE_BYTES: usize = 256 << 10;

/// The two sides of a link.
struct Link {
    passt: UnixStream,
    hypervisor: UnixStream,
    /// What is between them, if anything.
    _relay: Option<FrameRelay>,
}

impl Link {
    fn direct() -> anyhow::Result<Self> {
        let (passt, hypervisor) = UnixStream::pair()?;
        Ok(Self {
            passt,
            hypervisor,
            _relay: None,
        })
    }

    fn relayed() -> anyhow::Result<Self> {
        let (passt, uplink) = UnixStream::pair()?;
        let mut relay = FrameRelay::new()?;
        let (connection, hypervisor) = relay.connect()?;
        ensure!(relay.activate(connection), "the relay lost its connection");
        relay.start(uplink.into())?;
        Ok(Self {
            passt,
            hypervisor: hypervisor.into(),
            _relay: Some(relay),
        })
    }
}

pub(crate) fn measure(rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("relay: {rounds} rounds of throughput and round trips");
    for frame_bytes in FRAME_BYTES {
        let mut frame = u32::try_from(frame_bytes)?.to_be_bytes().to_vec();
        frame.resize(4 + frame_bytes, 0x5a);
        let batch = frame.repeat((PASST_WRITE_BYTES / frame.len()).max(1));
        let mut compare = |what: &str,
                           unit: &'static str,
                           sample: &dyn Fn(&Link) -> anyhow::Result<f64>|
         -> anyhow::Result<()> {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                ours.push(sample(&Link::relayed()?)?);
                theirs.push(sample(&Link::direct()?)?);
            }
            let name = format!("relay, {what}, frames of {frame_bytes} bytes");
            let measure = Measure::new("relay", unit, Samples::new(name, ours));
            report.add(measure.against(Samples::new("one socket pair", theirs)));
            Ok(())
        };
        compare("to the guest", "MB/s", &|link| {
            stream(&link.passt, &batch, &link.hypervisor, QEMU_READ_BYTES)
        })?;
        compare("from the guest", "MB/s", &|link| {
            stream(&link.hypervisor, &frame, &link.passt, PASST_READ_BYTES)
        })?;
        compare("round trip p50", "us", &|link| {
            Ok(round_trips(link, &frame)?[ROUND_TRIPS / 2])
        })?;
        compare("round trip p99", "us", &|link| {
            Ok(round_trips(link, &frame)?[ROUND_TRIPS * 99 / 100])
        })?;
    }
    Ok(())
}

/// Megabytes (10^6 bytes) per second of a stream that is written in pieces of `piece`.
fn stream(
    mut from: &UnixStream,
    piece: &[u8],
    mut to: &UnixStream,
    read_bytes: usize,
) -> anyhow::Result<f64> {
    let pieces = STREAM_BYTES / piece.len();
    let total = pieces * piece.len();
    let started = Instant::now();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let writer = scope.spawn(move || (0..pieces).try_for_each(|_| from.write_all(piece)));
        let mut buffer = vec![0; read_bytes];
        let mut received = 0;
        while received < total {
            let count = to.read(&mut buffer)?;
            ensure!(count > 0, "the stream ended after {received} bytes");
            received += count;
        }
        writer.join().ok().context("the writer failed")??;
        Ok(())
    })?;
    Ok(total as f64 / 1e6 / started.elapsed().as_secs_f64())
}

/// Microseconds of round trips of one frame, the shortest first.
fn round_trips(link: &Link, frame: &[u8]) -> anyhow::Result<Vec<f64>> {
    let (mut passt, mut hypervisor) = (&link.passt, &link.hypervisor);
    let mut times = std::thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let echo = scope.spawn(move || -> std::io::Result<()> {
            let mut buffer = vec![0; frame.len()];
            for _ in 0..ROUND_TRIPS {
                hypervisor.read_exact(&mut buffer)?;
                hypervisor.write_all(&buffer)?;
            }
            Ok(())
        });
        let mut buffer = vec![0; frame.len()];
        let mut times = Vec::with_capacity(ROUND_TRIPS);
        for _ in 0..ROUND_TRIPS {
            let started = Instant::now();
            passt.write_all(frame)?;
            passt.read_exact(&mut buffer)?;
            times.push(microseconds(started.elapsed()));
        }
        echo.join().ok().context("the echo failed")??;
        Ok(times)
    })?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
