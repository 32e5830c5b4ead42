//! Events: points in a lane's work that other lanes wait for, and between which time is measured.

use cudarc::driver::{CudaEvent, sys};

use super::{Cuda, CudaError};
use crate::error::Result;

/// A point in a lane's work.
///
/// [`Cuda::record`] sets it behind what has been issued on a lane so far; [`Cuda::wait`] makes another lane's further
/// work wait for it, without the host. Before it is recorded for the first time, waiting for it waits for nothing. While
/// a graph is captured the edge becomes one of the graph's.
#[derive(Debug)]
pub struct Event(CudaEvent);

impl Event {
    /// Whether the GPU has passed it.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn is_done(&self) -> Result<bool> {
        let asked = self.0.context().bind_to_thread().and_then(|()| self.0.try_is_complete());
        Ok(asked.map_err(CudaError::driver("asking whether an event has happened"))?)
    }

    /// Waits, on the host, until the GPU has passed it.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.0.synchronize().map_err(CudaError::driver("waiting for an event"))?)
    }

    /// Milliseconds from this event to `later`, to about half a microsecond; waits for both. Both are timers.
    ///
    /// # Errors
    /// If one of them is no timer, was not recorded, or was recorded into a graph.
    pub fn elapsed_ms(&self, later: &Event) -> Result<f64> {
        let action = "measuring the time between two events (both must be timers that were recorded)";
        Ok(f64::from(self.0.elapsed_ms(&later.0).map_err(CudaError::driver(action))?))
    }
}

impl Cuda {
    /// A new event for edges between lanes, not yet recorded. It measures no time, which makes it the cheaper kind.
    ///
    /// # Errors
    /// If the driver has none left.
    pub fn event(&self) -> Result<Event> {
        let event = self.context().new_event(None);
        Ok(Event(event.map_err(CudaError::driver("creating an event"))?))
    }

    /// A new event that measures time, not yet recorded.
    ///
    /// # Errors
    /// If the driver has none left.
    pub fn timer(&self) -> Result<Event> {
        let event = self.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Event(event.map_err(CudaError::driver("creating an event that measures time"))?))
    }

    /// Sets `event` behind everything issued on this lane so far. Waits for it that are issued already stand for where it
    /// was.
    ///
    /// # Errors
    /// If the event is of another GPU.
    pub fn record(&self, event: &Event) -> Result<()> {
        Ok(event.0.record(self.stream()).map_err(CudaError::driver("recording an event"))?)
    }

    /// What is issued on this lane from here on runs after `event`, as it is recorded now.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn wait(&self, event: &Event) -> Result<()> {
        Ok(self.stream().wait(&event.0).map_err(CudaError::driver("making a lane wait for an event"))?)
    }
}
