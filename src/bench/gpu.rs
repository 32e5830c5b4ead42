//! A GPU under test: its events are the clock.

use super::{Bench, Clock, Image, Memory, Replay, Theirs};
use crate::device::cuda::{Cuda, Event, Modules};
use crate::device::{Lane, LaneKind};
use crate::error::{Error, Result};
use std::sync::Arc;

/// Events around what is issued on a stream.
struct GpuClock {
    cuda: Cuda,
    /// Pairs of timers; the first `used` were recorded since the last reading.
    timers: Vec<[Event; 2]>,
    used: usize,
}

/// GPU number `ordinal`, on a lane of its own.
///
/// # Errors
/// If there is no such GPU, or it cannot be used.
pub(super) fn open(ordinal: usize) -> Result<Bench> {
    let cuda = Cuda::new(ordinal)?;
    let name = cuda.context().name().map_err(|e| Error::Device(format!("asking GPU {ordinal} for its name: {e}")))?;
    let lane = Lane::new(Arc::new(cuda.clone()), LaneKind::Compute);
    Bench::new(lane, Box::new(GpuClock { cuda, timers: Vec::new(), used: 0 }), name)
}

impl Clock for GpuClock {
    fn start(&mut self) -> Result<()> {
        if self.used == self.timers.len() {
            self.timers.push([self.cuda.timer()?, self.cuda.timer()?]);
        }
        self.cuda.record(&self.timers[self.used][0])
    }

    fn stop(&mut self) -> Result<()> {
        self.cuda.record(&self.timers[self.used][1])?;
        self.used += 1;
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<f64>> {
        self.cuda.synchronize()?;
        let used = std::mem::take(&mut self.used);
        self.timers[..used].iter().map(|[start, stop]| start.elapsed_ms(stop)).collect()
    }

    fn capture(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Replay>> {
        let (graph, ()) = self.cuda.capture(&[], work)?;
        Ok(Some(Box::new(move || graph.replay())))
    }

    fn memory(&self) -> Option<Memory> {
        let usage = self.cuda.memory();
        Some(Memory { used: usage.used, peak: usage.peak })
    }

    fn reset_peak(&mut self) {
        self.cuda.reset_peak();
    }

    fn release_unused(&mut self) {
        self.cuda.release_unused();
    }

    fn architecture(&self) -> Option<(u32, u32)> {
        let (major, minor) = self.cuda.context().compute_capability().ok()?;
        Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
    }

    fn with_kernels(&self, image: &Image) -> Result<Theirs> {
        let modules: Arc<Modules> = Arc::new(self.cuda.modules().overlaid(&image.bytes, &image.name)?);
        let lane = Lane::new(Arc::new(self.cuda.with_modules(modules.clone())), LaneKind::Compute);
        Ok(Theirs { name: image.name.clone(), lane, asked: Box::new(move || modules.asked()) })
    }
}
