//! What collectives among ranks that share a GPU are made of, on the GPU; and host memory that its copy engines reach.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::CudaError;
use super::args::{Args, suffix};
use super::backend::Cuda;
use crate::device::kernels::{check_pairs, check_parts};
use crate::device::{CommKernels, MathKernels, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Place, Storage, Tensor};

/// Threads of a block of these kernels.
const THREADS: u32 = 1024;
/// Bytes that a block has under way at a time.
const PART: usize = 128 << 10;
/// How many stretches, or parts, one launch takes.
const MOST: usize = 64;

impl CommKernels for Cuda {
    fn copy_many(&self, pairs: &[(Tensor, Tensor)]) -> Result<()> {
        check_pairs(pairs)?;
        let pairs: Vec<_> = pairs.iter().filter(|(_, to)| to.elements() > 0).collect();
        for some in pairs.chunks(MOST) {
            let mut words = [0u64; 3 * MOST];
            let mut bytes = 0;
            for ((from, to), word) in some.iter().zip(words.chunks_exact_mut(3)) {
                self.on_device("copy_many", &[from, to])?;
                let length = to.elements() * to.dtype().size();
                word.copy_from_slice(&[from.ptr() as u64, to.ptr() as u64, length as u64]);
                bytes += length;
            }
            let args = Args::new().structure(&words).size(some.len());
            let say = || format!("{} pairs, {bytes} bytes", some.len());
            // SAFETY: the kernel's parameters; every stretch lies inside its tensor, on this device.
            unsafe { self.launch("copy_many", self.comm_blocks(bytes), THREADS, 0, args, say) }?;
        }
        Ok(())
    }

    fn sum_parts(&self, parts: &[Tensor], out: &Tensor) -> Result<()> {
        check_parts(parts, out)?;
        let name = if out.dtype() == DType::F64 { Some("f64") } else { suffix(out.dtype()) };
        let (n, Some(suffix)) = (out.elements(), name) else {
            return self.sum_one_by_one(parts, out);
        };
        if parts.len() > MOST {
            return self.sum_one_by_one(parts, out);
        }
        if n == 0 {
            return Ok(());
        }
        self.on_device("sum_parts", &[out])?;
        let mut words = [0u64; MOST];
        for (part, word) in parts.iter().zip(&mut words) {
            self.on_device("sum_parts", &[part])?;
            *word = part.ptr() as u64;
        }
        let args = Args::new().structure(&words).size(parts.len()).size(n).tensor(out);
        let blocks = self.comm_blocks(n * out.dtype().size());
        // SAFETY: the kernel's parameters; every part and out hold n elements on this device.
        unsafe { self.launch(&format!("sum_parts_{suffix}"), blocks, THREADS, 0, args, || format!("{out:?}")) }
    }

    fn as_cuda(&self) -> Option<&Cuda> {
        Some(self)
    }
}

impl Cuda {
    /// More parts than a launch takes, or a type that only conversions have.
    fn sum_one_by_one(&self, parts: &[Tensor], out: &Tensor) -> Result<()> {
        let sum = self.allocate(*out.shape(), out.dtype().accumulate())?;
        for (i, part) in parts.iter().enumerate() {
            self.axpby(1.0, &part.reshape(*out.shape())?, if i == 0 { 0.0 } else { 1.0 }, &sum)?;
        }
        self.copy(&sum, out)
    }

    /// As many blocks of a collective's kernels run at once where ranks share a GPU, on whatever lane: schedules that have a
    /// collective on different lanes get the same collective.
    pub const COMM_BLOCKS: u32 = 2;

    /// A block per part, and no more than a collective's share.
    fn comm_blocks(&self, bytes: usize) -> u32 {
        let most = match self.share().multiprocessors {
            Some(share) => share.min(Self::COMM_BLOCKS),
            None => self.multiprocessors(),
        };
        u32::try_from(bytes.div_ceil(PART)).unwrap_or(u32::MAX).clamp(1, most)
    }

    /// Host memory of `bytes` bytes that the GPU's copy engines read and write, of unspecified content.
    ///
    /// # Errors
    /// If the host has no memory left.
    pub fn pinned(&self, bytes: usize) -> Result<Storage> {
        self.bind()?;
        // SAFETY: a plain allocation, owned by what is made below.
        let ptr = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }
            .map_err(CudaError::driver(format!("allocating {bytes} bytes of pinned host memory")))?;
        let owner = Arc::new(Pinned { context: self.context().clone(), ptr: ptr.cast() });
        // SAFETY: the driver gave as many bytes at this address, which `owner` keeps.
        Ok(unsafe { Storage::from_raw(ptr.cast(), bytes, Place::Cpu, owner) })
    }

    /// `host = t`, contiguous, on this lane: returns before it has happened.
    ///
    /// # Errors
    /// If `t` is not contiguous or the memory, which must be [pinned](Cuda::pinned), is shorter.
    pub fn copy_to_pinned(&self, t: &Tensor, host: &Storage, offset: usize) -> Result<()> {
        let bytes = self.pinned_range(t, host, offset)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let to = host.ptr().wrapping_add(offset).cast();
        // SAFETY: both hold as many bytes; who reads the host's waits for an event behind this.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to, t.ptr() as u64, bytes, self.stream().cu_stream()) }
            .result()
            .map_err(CudaError::driver(format!("copying {t:?} to pinned memory")))?;
        Ok(())
    }

    /// `t = host`, contiguous, on this lane: returns before it has happened.
    ///
    /// # Errors
    /// As [`Cuda::copy_to_pinned`].
    pub fn copy_from_pinned(&self, host: &Storage, offset: usize, t: &Tensor) -> Result<()> {
        let bytes = self.pinned_range(t, host, offset)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let from = host.ptr().wrapping_add(offset).cast_const().cast();
        // SAFETY: as above.
        unsafe { sys::cuMemcpyHtoDAsync_v2(t.ptr() as u64, from, bytes, self.stream().cu_stream()) }
            .result()
            .map_err(CudaError::driver(format!("copying pinned memory to {t:?}")))?;
        Ok(())
    }

    fn pinned_range(&self, t: &Tensor, host: &Storage, offset: usize) -> Result<usize> {
        self.row_major("copy of pinned memory", &[t])?;
        let bytes = t.elements() * t.dtype().size();
        if host.place() != Place::Cpu || offset + bytes > host.bytes() {
            shape_err!("{t:?} beside bytes {offset}.. of {} of host memory: it holds as many", host.bytes());
        }
        Ok(bytes)
    }
}

/// Pinned host memory.
struct Pinned {
    context: Arc<CudaContext>,
    ptr: *mut u8,
}

// SAFETY: an address; whoever uses the memory orders that use by events.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: the driver's own address, freed once; freeing waits for the device's work.
        self.context.record_err(unsafe { result::free_host(self.ptr.cast()) });
    }
}
