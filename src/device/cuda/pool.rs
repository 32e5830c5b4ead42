//! Device memory that is kept and used again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, result, sys};

use super::CudaError;
use crate::tensor::{Place, Storage};

/// Blocks are multiples of this: the driver's own alignment, and wide enough for every vector load and tensor map.
const GRANULE: usize = 512;
/// From this size on blocks are whole multiples of it, so that requests of almost one size share blocks.
const LARGE: usize = 2 << 20;

/// The memory of one lane. A block whose last tensor is gone goes back to the pool and is handed out again at once:
/// the lane's stream runs what used it before what will. Work on another stream that touches it must be ordered
/// before the tensor goes (see [`super::Cuda`]).
///
/// In a steady state nothing is allocated: a step asks for the sizes that the step before gave back. Nothing is
/// returned to the driver before the pool goes, except to satisfy a request that finds the device full.
#[derive(Debug)]
pub(super) struct Pool {
    context: Arc<CudaContext>,
    state: Mutex<State>,
    /// The memory is a graph's: the addresses are in its nodes, and a block is kept whether a tensor has it or not.
    kept: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Blocks nobody uses, by size.
    free: BTreeMap<usize, Vec<sys::CUdeviceptr>>,
    usage: Usage,
}

/// Bytes of device memory that a lane holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In tensors now.
    pub used: usize,
    /// The most that was in tensors at one time since [`super::Cuda::reset_peak`].
    pub peak: usize,
    /// Taken from the driver: tensors, and blocks kept for the next ones.
    pub reserved: usize,
    /// Calls of the driver's allocator so far.
    pub driver_allocations: usize,
}

impl std::ops::Add for Usage {
    type Output = Usage;
    fn add(self, other: Usage) -> Usage {
        Usage {
            used: self.used + other.used,
            peak: self.peak + other.peak,
            reserved: self.reserved + other.reserved,
            driver_allocations: self.driver_allocations + other.driver_allocations,
        }
    }
}

/// What a tensor's storage owns: gives the block back.
struct Block {
    pool: Arc<Pool>,
    ptr: sys::CUdeviceptr,
    bytes: usize,
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.usage.used -= self.bytes;
        state.free.entry(self.bytes).or_default().push(self.ptr);
    }
}

fn rounded(bytes: usize) -> usize {
    let granule = if bytes >= LARGE { LARGE } else { GRANULE };
    bytes.max(1).next_multiple_of(granule)
}

impl Pool {
    pub(super) fn new(context: Arc<CudaContext>) -> Arc<Self> {
        Arc::new(Pool { context, state: Mutex::default(), kept: false })
    }

    /// The memory of a graph on one lane: nothing goes back to the driver before the pool does.
    pub(super) fn of_graph(context: Arc<CudaContext>) -> Arc<Self> {
        Arc::new(Pool { context, state: Mutex::default(), kept: true })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while the lock is held leaves lists that are whole all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn usage(&self) -> Usage {
        self.lock().usage
    }

    pub(super) fn reset_peak(&self) {
        let usage = &mut self.lock().usage;
        usage.peak = usage.used;
    }

    /// `bytes` of device memory, of unspecified content.
    pub(super) fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Storage, CudaError> {
        let size = rounded(bytes);
        let ptr = match self.take(size) {
            Some(ptr) => ptr,
            None => self.ask_driver(size)?,
        };
        let owner = {
            let mut state = self.lock();
            state.usage.used += size;
            state.usage.peak = state.usage.peak.max(state.usage.used);
            Arc::new(Block { pool: self.clone(), ptr, bytes: size })
        };
        // SAFETY: the driver gave a block of at least `bytes` at this address, which `owner` keeps.
        Ok(unsafe { Storage::from_raw(ptr as *mut u8, bytes, Place::Cuda(self.context.ordinal()), owner) })
    }

    /// A free block of exactly this size. Step after step asks for the same sizes, so a looser fit would only break up
    /// blocks that are about to be asked for.
    fn take(&self, size: usize) -> Option<sys::CUdeviceptr> {
        let mut state = self.lock();
        let blocks = state.free.get_mut(&size)?;
        let ptr = blocks.pop();
        if blocks.is_empty() {
            state.free.remove(&size);
        }
        ptr
    }

    fn ask_driver(&self, size: usize) -> Result<sys::CUdeviceptr, CudaError> {
        let action = || format!("allocating {size} bytes of device memory ({:?})", self.usage());
        self.context.bind_to_thread().map_err(CudaError::driver(action()))?;
        // SAFETY: a plain allocation; the block is owned by this pool from here on.
        let first = unsafe { result::malloc_sync(size) };
        let ptr = match first {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && !self.kept => {
                self.release();
                // SAFETY: as above.
                unsafe { result::malloc_sync(size) }.map_err(CudaError::driver(action()))?
            }
            other => other.map_err(CudaError::driver(action()))?,
        };
        let usage = &mut self.lock().usage;
        usage.reserved += size;
        usage.driver_allocations += 1;
        Ok(ptr)
    }

    /// Gives the blocks that nobody uses back to the driver, which waits for the device first.
    pub(super) fn release(&self) {
        if !self.kept {
            self.free_unused();
        }
    }

    fn free_unused(&self) {
        let (free, context) = (std::mem::take(&mut self.lock().free), &self.context);
        context.record_err(context.bind_to_thread());
        for (size, blocks) in free {
            for ptr in blocks {
                // SAFETY: the block came from the driver, no tensor has it, and freeing waits for the device's work.
                context.record_err(unsafe { result::free_sync(ptr) });
                self.lock().usage.reserved -= size;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.free_unused();
    }
}
