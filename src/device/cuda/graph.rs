//! CUDA graphs: work that is issued once and replayed with one call.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaGraph, sys};

use super::pool::{Pool, Usage};
use super::{Cuda, CudaError};
use crate::error::{Error, Result};

/// Work captured by [`Cuda::capture`].
///
/// Its nodes hold addresses. Those of tensors that were allocated during the capture stay the graph's own as long as it
/// lives, also when their tensors have gone; tensors from before that the work reads or writes are the caller's to keep.
pub struct Graph {
    exec: Mutex<Exec>,
    /// Memory of the captured work, one pool per lane; after `exec`, which is to go first.
    pools: Vec<Arc<Pool>>,
    lane: Cuda,
}

struct Exec(CudaGraph);

// SAFETY: a graph may be used from any thread that has its context current, which cudarc sees to; the mutex around it
// keeps two threads from using it at once.
unsafe impl Send for Exec {}

impl Graph {
    /// Puts the captured work on the lane it was captured on.
    ///
    /// # Errors
    /// Whatever went wrong on the GPU since.
    pub fn replay(&self) -> Result<()> {
        let exec = self.exec.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(exec.0.launch().map_err(CudaError::driver("replaying a CUDA graph"))?)
    }

    /// The lane it was captured on and is replayed on.
    #[must_use]
    pub fn lane(&self) -> &Cuda {
        &self.lane
    }

    /// The memory that the graph keeps.
    #[must_use]
    pub fn memory(&self) -> Usage {
        self.pools.iter().fold(Usage::default(), |sum, pool| sum + pool.usage())
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph(cuda:{}, {:?})", self.lane.ordinal(), self.memory())
    }
}

impl Cuda {
    /// Runs `work`, whose operations on this lane are not executed but recorded, and returns the graph of them with what
    /// `work` returned.
    ///
    /// `others` are further lanes that `work` issues on: each must wait for an event of this lane first, and this lane
    /// for an event of each at the end. Tensors allocated meanwhile, on this lane or the others, lie in memory of the
    /// graph's own, used again within it in stream order as in eager work. `work` must neither wait for the GPU nor copy
    /// from or to the host; run it once eagerly before, so that libraries have set themselves up.
    ///
    /// # Errors
    /// That of `work`; or the driver's, if something in it cannot be captured or a lane was not joined.
    pub fn capture<R>(&self, others: &[&Cuda], work: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        // Loading code is no work of a stream's, but may wait for the device.
        self.modules().load_all()?;
        let capture = Capture::begin(self, others)?;
        let done = work();
        let (graph, pools) = capture.end();
        // If both failed, the operation's error says what could not be captured, the driver's only that something could not.
        let done = done?;
        let graph = graph?.ok_or_else(|| Error::Device("capturing a CUDA graph: the driver returned none".into()))?;
        graph.upload().map_err(CudaError::driver("preparing a CUDA graph"))?;
        Ok((Graph { exec: Mutex::new(Exec(graph)), pools, lane: self.clone() }, done))
    }
}

/// A capture in progress. Ends it and gives the lanes their own memory again also when the work panics.
struct Capture<'a> {
    lane: &'a Cuda,
    /// Each lane with its own pool, which the graph's takes the place of.
    lanes: Vec<(&'a Cuda, Arc<Pool>)>,
    capturing: bool,
}

impl<'a> Capture<'a> {
    fn begin(lane: &'a Cuda, others: &[&'a Cuda]) -> Result<Self> {
        let exchange = |lane: &'a Cuda| (lane, lane.exchange_pool(Pool::of_graph(lane.context().clone())));
        // Relaxed: a thread that captures may allocate from the driver. No other lane's work is affected.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        lane.stream().begin_capture(mode).map_err(CudaError::driver("beginning to capture a CUDA graph"))?;
        let lanes = std::iter::once(lane).chain(others.iter().copied()).map(exchange).collect();
        Ok(Capture { lane, lanes, capturing: true })
    }

    fn end(mut self) -> (Result<Option<CudaGraph>>, Vec<Arc<Pool>>) {
        self.capturing = false;
        let action =
            "capturing a CUDA graph (its work must not wait for the GPU, and lanes that took part must be joined)";
        let no_flags = sys::CUgraphInstantiate_flags(0);
        let graph = self.lane.stream().end_capture(no_flags).map_err(|e| CudaError::driver(action)(e).into());
        (graph, self.restore())
    }

    /// The graph's pools.
    fn restore(&mut self) -> Vec<Arc<Pool>> {
        self.lanes.drain(..).map(|(lane, own)| lane.exchange_pool(own)).collect()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.capturing {
            // A panic is on its way; the graph so far is of no use.
            drop(self.lane.stream().end_capture(sys::CUgraphInstantiate_flags(0)));
        }
        self.restore();
    }
}
