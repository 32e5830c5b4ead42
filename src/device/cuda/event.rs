//! Events: points in a lane's work that other lanes wait for, and between which time is measured.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaEvent, sys};

use super::{Cuda, CudaError};
use crate::error::Result;

/// A point in a lane's work, set by [`Cuda::mark`]. [`Cuda::wait`] makes another lane's further work wait for it, without
/// the host. While a graph is captured the edge becomes one of the graph's.
#[derive(Debug)]
pub struct Event {
    event: Arc<CudaEvent>,
    timed: bool,
    /// Where it goes when nobody has it any more.
    home: Arc<Events>,
}

/// A lane's events that nobody has: those for edges alone, and those that measure time. They are set again: where eight
/// threads issue, the driver takes 15 µs to make and to destroy one, and 2 to set it.
#[derive(Debug, Default)]
pub(super) struct Events([Mutex<Vec<Arc<CudaEvent>>>; 2]);

impl Events {
    fn of(&self, timed: bool) -> MutexGuard<'_, Vec<Arc<CudaEvent>>> {
        // A list is whole after a panic too.
        self.0[usize::from(timed)].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.home.of(self.timed).push(self.event.clone());
    }
}

impl Event {
    /// Whether the GPU has passed it.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn is_done(&self) -> Result<bool> {
        let asked = self.event.context().bind_to_thread().and_then(|()| self.event.try_is_complete());
        Ok(asked.map_err(CudaError::driver("asking whether an event has happened"))?)
    }

    /// Waits, on the host, until the GPU has passed it.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.event.synchronize().map_err(CudaError::driver("waiting for an event"))?)
    }

    /// Milliseconds from this event to `later`, to about half a microsecond; waits for both. Both are timed.
    ///
    /// # Errors
    /// If one of them is not timed, or was set while a graph was captured.
    pub fn elapsed_ms(&self, later: &Event) -> Result<f64> {
        let action = "measuring the time between two events (both must be timed, and outside of a graph)";
        Ok(f64::from(self.event.elapsed_ms(&later.event).map_err(CudaError::driver(action))?))
    }
}

impl Cuda {
    /// An event behind everything issued on this lane so far. One that is not `timed` measures no time, which makes it the
    /// cheaper kind.
    ///
    /// # Errors
    /// If the driver has no event left.
    pub fn mark(&self, timed: bool) -> Result<Event> {
        let home = self.events();
        // Not under the lock: a thread that makes one holds no other up.
        let known = home.of(timed).pop();
        let event = known.map_or_else(
            || {
                let flags = timed.then_some(sys::CUevent_flags::CU_EVENT_DEFAULT);
                let event = self.context().new_event(flags).map_err(CudaError::driver("creating an event"))?;
                Ok::<_, CudaError>(Arc::new(event))
            },
            Ok,
        )?;
        event.record(self.stream()).map_err(CudaError::driver("recording an event"))?;
        Ok(Event { event, timed, home: home.clone() })
    }

    /// What is issued on this lane from here on runs after `event`.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn wait(&self, event: &Event) -> Result<()> {
        Ok(self.stream().wait(&event.event).map_err(CudaError::driver("making a lane wait for an event"))?)
    }
}
