//! A GPU under test: its own events are the clock.

use super::{Bench, Clock, Image, Memory, Replay, Theirs};
use crate::device::cuda::{Cuda, Event};
use crate::device::{Lane, LaneKind};
use crate::error::Result;
use std::sync::Arc;

/// GPU number `ordinal`.
///
/// # Errors
/// If there is no such GPU, or it cannot be used.
pub(super) fn open(ordinal: usize) -> Result<Bench> {
    let cuda = Cuda::new(ordinal)?;
    let name = format!("cuda:{ordinal} {}", cuda.name()?);
    let (major, minor) = cuda.compute_capability()?;
    let clock = GpuClock { cuda: cuda.clone(), architecture: (major as u32, minor as u32), events: Vec::new() };
    Bench::new(lane(&cuda), Box::new(clock), name)
}

fn lane(cuda: &Cuda) -> Lane {
    Lane::new(Arc::new(cuda.clone()), LaneKind::Compute)
}

/// Times by events on the stream.
struct GpuClock {
    cuda: Cuda,
    architecture: (u32, u32),
    /// Starts and stops since the last reading, in turn.
    events: Vec<Event>,
}

impl GpuClock {
    fn mark(&mut self) -> Result<()> {
        self.events.push(self.cuda.mark(true)?);
        Ok(())
    }
}

impl Clock for GpuClock {
    fn start(&mut self) -> Result<()> {
        self.mark()
    }

    fn stop(&mut self) -> Result<()> {
        self.mark()
    }

    fn read(&mut self) -> Result<Vec<f64>> {
        self.cuda.synchronize()?;
        let events = std::mem::take(&mut self.events);
        events.chunks_exact(2).map(|pair| pair[0].elapsed_ms(&pair[1])).collect()
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
        Some(self.architecture)
    }

    fn with_kernels(&self, image: &Image) -> Result<Theirs> {
        let modules = Arc::new(self.cuda.modules().with_image(&image.name, &image.bytes)?);
        let cuda = self.cuda.with_modules(modules.clone())?;
        Ok(Theirs { name: image.name.clone(), lane: lane(&cuda), asked: Box::new(move || modules.asked()) })
    }
}
