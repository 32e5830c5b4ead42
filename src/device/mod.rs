//! Devices, the lanes that work is issued on, and the primitive operations.

mod check;
mod choice;
pub mod cpu;
pub mod cuda;
mod kernels;

pub use choice::DeviceChoice;
pub use kernels::*;

use crate::error::{Error, Result};
use crate::tensor::{DType, Place, Shape, Tensor};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

/// Which of a rank's three queues a lane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneKind {
    /// Gates, orders, expert GEMMs and everything that is not communication.
    Compute,
    /// Collectives among ranks of one node.
    IntraNode,
    /// Collectives that cross nodes.
    InterNode,
}

/// A queue on a device: what is issued on it runs in order. It offers every primitive operation through [`Kernels`].
///
/// A CPU lane runs an operation before its call returns. Cloning gives another handle to the same queue.
#[derive(Clone)]
pub struct Lane {
    kernels: Arc<dyn Kernels>,
    kind: LaneKind,
}

impl Lane {
    /// A lane over a backend's operations.
    pub fn new(kernels: Arc<dyn Kernels>, kind: LaneKind) -> Self {
        Lane { kernels, kind }
    }

    /// The compute lane of the host's processor.
    pub fn cpu() -> Self {
        Lane::new(Arc::new(cpu::Cpu), LaneKind::Compute)
    }

    /// A compute lane of GPU number `ordinal`.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, no kernels in this build, or no cuBLAS.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Lane::new(Arc::new(cuda::Cuda::new(ordinal)?), LaneKind::Compute))
    }

    /// The compute lane of the device of this place.
    ///
    /// # Errors
    /// As [`Lane::cuda`].
    pub fn at(place: Place) -> Result<Self> {
        match place {
            Place::Cpu => Ok(Lane::cpu()),
            Place::Cuda(ordinal) => Lane::cuda(ordinal),
        }
    }

    /// Which queue this is.
    pub fn kind(&self) -> LaneKind {
        self.kind
    }

    /// The device's name: the GPU's with its number, or the processor's with the threads it runs at once.
    ///
    /// # Errors
    /// If the device cannot be asked.
    pub fn name(&self) -> Result<String> {
        match self.device()? {
            Some(device) => Ok(format!("{} {}", self.place(), device.name)),
            None => {
                let threads = std::thread::available_parallelism().map_or(1, usize::from);
                Ok(format!("{}, {threads} threads", cpu::processor()))
            }
        }
    }

    /// Bytes of its device's memory, or the host's, that are free; none where the system does not say.
    ///
    /// # Errors
    /// If the device cannot be asked.
    pub fn free_memory(&self) -> Result<Option<u64>> {
        Ok(match self.device()? {
            Some(device) => Some(device.free_memory as u64),
            None => cpu::available_memory(),
        })
    }

    /// Another queue of the same device, with `share` of it where it is a GPU.
    ///
    /// # Errors
    /// If the driver has no stream left, or the share is of nothing.
    pub fn beside(&self, kind: LaneKind, share: cuda::Share) -> Result<Lane> {
        match self.as_cuda() {
            Some(cuda) => Ok(Lane::new(Arc::new(cuda.fork_with(share)?), kind)),
            None => Ok(Lane::new(self.kernels.clone(), kind)),
        }
    }

    /// Marks the end of what has been issued so far. Only a mark that is `timed` can tell its time.
    ///
    /// # Errors
    /// If the device fails.
    pub fn record(&self, timed: bool) -> Result<Mark> {
        let Some(cuda) = self.as_cuda() else { return Ok(Mark(Point::Past(Instant::now()))) };
        Ok(Mark(Point::Event(Arc::new(cuda.mark(timed)?))))
    }

    /// Holds what will be issued on this lane back until `mark` has been reached. Does not wait itself.
    ///
    /// # Errors
    /// If the device fails.
    pub fn wait(&self, mark: &Mark) -> Result<()> {
        match (self.as_cuda(), &mark.0) {
            (Some(cuda), Point::Event(event)) => cuda.wait(event),
            // What was issued on the host's processor has run.
            (_, Point::Past(_)) => Ok(()),
            (None, Point::Event(event)) => event.synchronize(),
        }
    }

    /// Waits until everything issued on this lane has run.
    ///
    /// # Errors
    /// Whatever went wrong on the device since.
    pub fn synchronize(&self) -> Result<()> {
        self.as_cuda().map_or(Ok(()), cuda::Cuda::synchronize)
    }

    /// A new tensor of unspecified content.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        self.kernels.alloc(shape.into(), dtype)
    }

    /// A new tensor of zeros.
    ///
    /// # Errors
    /// As [`Lane::empty`].
    pub fn zeros(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        self.full(shape, dtype, 0.0)
    }

    /// A new tensor, every element `value`.
    ///
    /// # Errors
    /// As [`Lane::empty`].
    pub fn full(&self, shape: impl Into<Shape>, dtype: DType, value: f64) -> Result<Tensor> {
        let t = self.empty(shape, dtype)?;
        self.kernels.fill(&t, value)?;
        Ok(t)
    }

    /// A new tensor of `like`'s shape and dtype, row-major, of unspecified content.
    ///
    /// # Errors
    /// As [`Lane::empty`].
    pub fn empty_like(&self, like: &Tensor) -> Result<Tensor> {
        self.empty(*like.shape(), like.dtype())
    }

    /// `t` itself if it is row-major, otherwise a row-major copy.
    ///
    /// # Errors
    /// As [`Lane::empty`].
    pub fn contiguous(&self, t: &Tensor) -> Result<Tensor> {
        if t.is_contiguous() { Ok(t.clone()) } else { self.cast(t, t.dtype()) }
    }

    /// A row-major copy of `t` as `dtype`.
    ///
    /// # Errors
    /// As [`Lane::empty`].
    pub fn cast(&self, t: &Tensor, dtype: DType) -> Result<Tensor> {
        let out = self.empty(*t.shape(), dtype)?;
        self.kernels.copy(t, &out)?;
        Ok(out)
    }

    /// A copy of a tensor of this device in host memory; waits for what has been issued on this lane.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn to_host(&self, t: &Tensor) -> Result<Tensor> {
        let t = self.contiguous(t)?;
        let out = Tensor::host(*t.shape(), t.dtype());
        self.kernels.download(&t, &out)?;
        Ok(out)
    }

    /// A copy of a contiguous host tensor on this device.
    ///
    /// # Errors
    /// If the device has no memory left, or the copy fails.
    pub fn to_device(&self, host: &Tensor) -> Result<Tensor> {
        let out = self.empty(*host.shape(), host.dtype())?;
        self.kernels.upload(host, &out)?;
        Ok(out)
    }

    /// The only element of a tensor of one float, as f64; waits for what has been issued on this lane.
    ///
    /// # Errors
    /// If the tensor has another number of elements.
    pub fn scalar(&self, t: &Tensor) -> Result<f64> {
        if t.elements() != 1 {
            crate::error::shape_err!("scalar() of a tensor of shape {}: it takes one element", t.shape());
        }
        let wide = self.cast(t, DType::F64)?;
        Ok(self.to_host(&wide)?.to_vec::<f64>()?[0])
    }
}

/// A point in a lane's work; see [`Lane::record`].
#[derive(Clone, Debug)]
pub struct Mark(Point);

#[derive(Clone, Debug)]
enum Point {
    /// On the host's processor: everything before it had run by then.
    Past(Instant),
    Event(Arc<cuda::Event>),
}

impl Mark {
    /// A point in time on the host's processor.
    pub fn at(time: Instant) -> Self {
        Mark(Point::Past(time))
    }

    /// Seconds from this point to `later`; waits until both have been reached.
    ///
    /// # Errors
    /// If one of them is not timed, they are not of one device, or the device fails.
    pub fn seconds_to(&self, later: &Mark) -> Result<f64> {
        match (&self.0, &later.0) {
            (Point::Past(a), Point::Past(b)) => Ok(b.saturating_duration_since(*a).as_secs_f64()),
            (Point::Event(a), Point::Event(b)) => {
                b.synchronize()?;
                Ok(a.elapsed_ms(b)? / 1e3)
            }
            _ => Err(Error::Device("the time between points of two devices".into())),
        }
    }
}

impl Deref for Lane {
    type Target = dyn Kernels;
    fn deref(&self) -> &Self::Target {
        &*self.kernels
    }
}

/// Where this lane's tensors lie, for messages.
impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place: Place = self.kernels.place();
        write!(f, "Lane({:?} on {place})", self.kind)
    }
}
