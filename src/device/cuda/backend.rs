//! One lane of a GPU: a stream, its memory, its cuBLAS handle. Every family of [`Kernels`](crate::device::Kernels) is
//! implemented on it in a file of its own.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, result};

use super::args::{Args, suffix};
use super::blas::Blas;
use super::event::Events;
use super::pool::{Pool, Usage};
use super::{CudaError, Launch, Modules, open};
use crate::error::{Error, Result, config_err, shape_err};
use crate::tensor::{DType, Layout, Place, Shape, Tensor};

/// Threads of a block of the elementwise kernels, which take any number.
pub(super) const THREADS: u32 = 256;

/// A GPU's operations on one stream, in order. Cloning gives another handle to the same stream.
///
/// An operation returns when it has been put on the stream. Memory of a tensor that has gone is used again by what is
/// issued on the same stream next; whoever uses a tensor on two streams keeps it until both are done with it.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

struct Inner {
    context: Arc<CudaContext>,
    modules: Arc<Modules>,
    stream: Arc<CudaStream>,
    /// What tensors are allocated from: the lane's own pool, or a graph's while it is captured.
    pool: Mutex<Arc<Pool>>,
    blas: Blas,
    events: Arc<Events>,
    share: Share,
    /// Lanes that this one spreads independent work over, made when first asked for.
    sides: OnceLock<Vec<Cuda>>,
}

/// How a lane shares its GPU with others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// As many streaming multiprocessors are all that its grids are sized for, as far as kernels choose their grid; none:
    /// all that there are.
    pub multiprocessors: Option<u32>,
    /// Where blocks of several lanes are waiting, this lane's begin first.
    pub urgent: bool,
}

impl Cuda {
    /// A first lane on GPU number `ordinal`.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, no kernels in this build, or no cuBLAS.
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = open(ordinal)?;
        let modules = Arc::new(Modules::new(&context)?);
        Self::on(context, modules, Share::default())
    }

    /// Another lane on the same GPU: a stream and memory of its own.
    ///
    /// # Errors
    /// If the driver has no stream left.
    pub fn fork(&self) -> Result<Self> {
        self.fork_with(self.0.share)
    }

    /// [`Cuda::fork`] with another share of the GPU.
    ///
    /// # Errors
    /// As [`Cuda::fork`], and if the share is of no multiprocessor.
    pub fn fork_with(&self, share: Share) -> Result<Self> {
        if share.multiprocessors == Some(0) {
            config_err!("a lane with 0 multiprocessors: it has at least 1");
        }
        Self::on(self.0.context.clone(), self.0.modules.clone(), share)
    }

    /// Its share of the GPU.
    #[must_use]
    pub fn share(&self) -> Share {
        self.0.share
    }

    /// The multiprocessors that grids are sized for.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        let all = self.0.modules.multiprocessors();
        self.0.share.multiprocessors.map_or(all, |n| n.min(all))
    }

    /// This lane with other kernels: the same stream and memory.
    ///
    /// # Errors
    /// If cuBLAS makes no further handle.
    pub fn with_modules(&self, modules: Arc<Modules>) -> Result<Self> {
        let (context, stream, pool) = (self.0.context.clone(), self.0.stream.clone(), self.pool());
        let blas = Blas::new(&stream, &pool, self.0.share.multiprocessors)?;
        let (pool, events, share) = (Mutex::new(pool), self.0.events.clone(), self.0.share);
        Ok(Cuda(Arc::new(Inner { context, modules, stream, pool, blas, events, share, sides: OnceLock::new() })))
    }

    fn on(context: Arc<CudaContext>, modules: Arc<Modules>, share: Share) -> Result<Self> {
        context.bind_to_thread().map_err(CudaError::driver("making the GPU's context current"))?;
        let stream = if share.urgent {
            let (_, most_urgent) = result::stream::get_priority_range()
                .map_err(CudaError::driver("asking for the priorities of streams"))?;
            context.new_stream_with_priority(most_urgent)
        } else {
            context.new_stream()
        };
        let stream = stream.map_err(CudaError::driver("creating a stream"))?;
        let pool = Pool::new(context.clone());
        let blas = Blas::new(&stream, &pool, share.multiprocessors)?;
        let (pool, events) = (Mutex::new(pool), Arc::default());
        Ok(Cuda(Arc::new(Inner { context, modules, stream, pool, blas, events, share, sides: OnceLock::new() })))
    }

    /// The GPU's number.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.0.context.ordinal()
    }

    /// The GPU's name.
    ///
    /// # Errors
    /// If the driver does not tell.
    pub fn name(&self) -> Result<String> {
        Ok(self.0.context.name().map_err(CudaError::driver("asking for the GPU's name"))?)
    }

    /// The GPU's compute capability, major and minor.
    ///
    /// # Errors
    /// If the driver does not tell.
    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        Ok(self.0.context.compute_capability().map_err(CudaError::driver("asking for the GPU's compute capability"))?)
    }

    /// The GPU's context.
    #[must_use]
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// The embedded kernels on this GPU.
    #[must_use]
    pub fn modules(&self) -> &Arc<Modules> {
        &self.0.modules
    }

    /// The stream.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.0.stream
    }

    /// `n` further lanes of this one's own; as many at every call.
    pub(super) fn sides(&self, n: usize) -> Result<&[Cuda]> {
        if self.0.sides.get().is_none() {
            let made = (0..n).map(|_| self.fork()).collect::<Result<Vec<_>>>()?;
            // Of two threads that make them at once one's are dropped again.
            let _ = self.0.sides.set(made);
        }
        Ok(self.0.sides.get().map_or(&[], Vec::as_slice))
    }

    pub(super) fn events(&self) -> &Arc<Events> {
        &self.0.events
    }

    pub(super) fn blas(&self) -> &Blas {
        &self.0.blas
    }

    fn pool(&self) -> Arc<Pool> {
        // What is locked is one pointer, whole after a panic too.
        self.0.pool.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Allocates from `pool` from here on; returns the pool so far.
    pub(super) fn exchange_pool(&self, pool: Arc<Pool>) -> Arc<Pool> {
        std::mem::replace(&mut self.0.pool.lock().unwrap_or_else(PoisonError::into_inner), pool)
    }

    /// The memory this lane holds, without that of graphs captured on it.
    #[must_use]
    pub fn memory(&self) -> Usage {
        self.pool().usage()
    }

    /// Starts measuring [`Usage::peak`] anew.
    pub fn reset_peak(&self) {
        self.pool().reset_peak();
    }

    /// Gives memory that no tensor has back to the driver; waits for the GPU.
    pub fn release_unused(&self) {
        self.pool().release();
    }

    /// Waits until everything issued on this lane has run.
    ///
    /// # Errors
    /// Whatever went wrong on the device since.
    pub fn synchronize(&self) -> Result<()> {
        self.0.stream.synchronize().map_err(CudaError::driver("waiting for the GPU"))?;
        Ok(())
    }

    /// A new row-major tensor of unspecified content.
    pub(super) fn allocate(&self, shape: Shape, dtype: DType) -> Result<Tensor> {
        let storage = self.pool().alloc(shape.bytes(dtype)?)?;
        Tensor::new(storage, Layout::contiguous(shape), dtype)
    }

    /// `dst = src`, contiguous, from host memory; returns when `src` may be written again.
    pub(super) fn copy_from_host(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.transferable("upload", src, dst)?;
        self.on_device("upload", &[dst])?;
        if dst.elements() == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: a contiguous host tensor of bytes that any pattern is valid for; the copy from pageable memory has
        // read them when the call returns.
        let bytes = unsafe { std::slice::from_raw_parts(src.ptr().cast_const(), src.elements() * src.dtype().size()) };
        // SAFETY: dst is as long, on this device.
        unsafe { result::memcpy_htod_async(dst.ptr() as u64, bytes, self.0.stream.cu_stream()) }
            .map_err(CudaError::driver(format!("copying {src:?} to the GPU")))?;
        Ok(())
    }

    /// `dst = src`, contiguous, to host memory; returns when it has happened.
    pub(super) fn copy_to_host(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.transferable("download", src, dst)?;
        self.on_device("download", &[src])?;
        if dst.elements() == 0 {
            return Ok(());
        }
        self.bind()?;
        let length = dst.elements() * dst.dtype().size();
        // SAFETY: as in `copy_from_host`; nothing else uses dst while it is written, and the stream is waited for.
        let bytes = unsafe { std::slice::from_raw_parts_mut(dst.ptr(), length) };
        // SAFETY: src is as long, on this device.
        unsafe { result::memcpy_dtoh_async(bytes, src.ptr() as u64, self.0.stream.cu_stream()) }
            .map_err(CudaError::driver(format!("copying {src:?} from the GPU")))?;
        self.synchronize()
    }

    fn transferable(&self, op: &str, src: &Tensor, dst: &Tensor) -> Result<()> {
        if src.shape() != dst.shape() || src.dtype() != dst.dtype() {
            shape_err!("{op}: from {src:?} to {dst:?}: shape and dtype must be the same");
        }
        if !src.is_contiguous() || !dst.is_contiguous() {
            shape_err!("{op}: from {src:?} to {dst:?}: both must be contiguous");
        }
        let host = if op == "upload" { src } else { dst };
        if host.place() != Place::Cpu {
            shape_err!("{op}: {host:?} must be in host memory");
        }
        Ok(())
    }

    /// Makes the GPU's context the calling thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        self.0.context.bind_to_thread().map_err(CudaError::driver("making the GPU's context current"))?;
        Ok(())
    }

    /// Fails unless every tensor lies on this GPU.
    pub(super) fn on_device(&self, op: &str, tensors: &[&Tensor]) -> Result<()> {
        let here = Place::Cuda(self.ordinal());
        match tensors.iter().find(|t| t.place() != here) {
            Some(t) => shape_err!("{op}: {t:?} is not on {here}, where the operation runs"),
            None => Ok(()),
        }
    }

    /// Fails unless every tensor lies on this GPU, row-major without gaps.
    pub(super) fn row_major(&self, op: &str, tensors: &[&Tensor]) -> Result<()> {
        self.on_device(op, tensors)?;
        match tensors.iter().find(|t| !t.is_contiguous()) {
            Some(t) => shape_err!("{op}: {t:?} with strides {:?} must be contiguous", t.layout().strides()),
            None => Ok(()),
        }
    }

    /// The suffix of the entry points for `t`'s type.
    pub(super) fn suffix(&self, op: &str, t: &Tensor) -> Result<&'static str> {
        match suffix(t.dtype()) {
            Some(suffix) => Ok(suffix),
            None => shape_err!("{op} of {t:?}: the GPU's kernels take bf16, f16 and f32"),
        }
    }

    /// Blocks of [`THREADS`] for `items` independent items, no more than fill the GPU: kernels walk the rest in steps of
    /// the grid.
    pub(super) fn blocks(&self, items: usize) -> u32 {
        // 2048 threads per multiprocessor.
        let most = u64::from(self.multiprocessors() * (2048 / THREADS));
        (items as u64).div_ceil(u64::from(THREADS)).clamp(1, most) as u32
    }

    /// Puts the kernel `name` on the stream.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters in number, order and type, and the memory they name hold what it reads
    /// and writes.
    pub(super) unsafe fn launch(
        &self,
        name: &str,
        grid: impl Into<Grid>,
        block: u32,
        shared: usize,
        mut args: Args,
        shape: impl FnOnce() -> String,
    ) -> Result<()> {
        let launch = Launch { grid: grid.into().0, block: (block, 1, 1), shared: shared as u32 };
        let function = self.0.modules.function(name)?;
        // SAFETY: the caller's promise.
        unsafe { function.launch_with(&self.0.stream, launch, &mut args.pointers(), shape) }?;
        Ok(())
    }
}

/// Blocks of a launch: in x, or in x, y and z.
pub(super) struct Grid(pub(super) (u32, u32, u32));

impl From<u32> for Grid {
    fn from(x: u32) -> Self {
        Grid((x, 1, 1))
    }
}

impl From<(u32, u32)> for Grid {
    fn from((x, y): (u32, u32)) -> Self {
        Grid((x, y, 1))
    }
}

impl From<(u32, u32, u32)> for Grid {
    fn from(grid: (u32, u32, u32)) -> Self {
        Grid(grid)
    }
}

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Argument { .. } => Error::Shape(error.to_string()),
            error => Error::Device(error.to_string()),
        }
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({}, {:?})", self.ordinal(), self.memory())
    }
}
