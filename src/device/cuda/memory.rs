//! Allocation, copies and fills.

use cudarc::driver::{result, sys};
use half::{bf16, f16};

use super::args::Args;
use super::backend::{Cuda, THREADS};
use super::{CudaError, walk};
use crate::device::{DeviceInfo, MemoryKernels, check};
use crate::error::{Result, shape_err};
use crate::rng::Counter;
use crate::tensor::{DType, Place, Shape, Tensor};

impl MemoryKernels for Cuda {
    fn place(&self) -> Place {
        Place::Cuda(self.ordinal())
    }

    fn device(&self) -> Result<Option<DeviceInfo>> {
        self.bind()?;
        let name = self.context().name().map_err(CudaError::driver("asking for the GPU's name"))?;
        let (free, total) = result::mem_get_info().map_err(CudaError::driver("asking for the GPU's memory"))?;
        let usage = self.memory();
        let free_memory = free + (usage.reserved - usage.used);
        Ok(Some(DeviceInfo { name, total_memory: total, free_memory, peak_memory: usage.peak }))
    }

    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor> {
        self.allocate(shape, dtype)
    }

    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.on_device("copy", &[src, dst])?;
        if src.shape() != dst.shape() {
            shape_err!("copy: from shape {} to {}", src.shape(), dst.shape());
        }
        if src.overlaps(dst) {
            shape_err!("copy: source {src:?} and destination share memory");
        }
        check::distinct("copy", dst)?;
        let (from, to) = match (src.dtype(), dst.dtype()) {
            (s, d) if s == d => (bits_of(s), bits_of(d)),
            (DType::I32, d) | (d, DType::I32) => shape_err!("copy: between i32 and {d}"),
            (s, d) => (s.name(), d.name()),
        };
        if src.elements() == 0 {
            return Ok(());
        }
        let mut dims = walk::dims([src.layout(), dst.layout()]);
        let same = src.dtype() == dst.dtype();
        if let (true, [whole]) = (same, &dims[..])
            && whole.strides == [1, 1]
        {
            return self.copy_bytes(src, dst);
        }
        let say = || format!("{src:?} with strides {:?} to {dst:?}", src.layout().strides());
        // `dims` leaves at least one.
        let Some(inner) = dims.pop() else { return Ok(()) };
        if let Some(turned) = dims.iter().position(|d| same && inner.strides[1] == 1 && d.strides[0] == 1) {
            let rows = dims.remove(turned);
            let batches: usize = dims.iter().map(|d| d.size).product();
            let tiles = (batches * rows.size.div_ceil(32) * inner.size.div_ceil(32)) as u64;
            let args = Args::new()
                .tensor(src)
                .size(inner.strides[0])
                .tensor(dst)
                .size(rows.strides[1])
                .structure(&walk::words(&dims))
                .size(batches)
                .size(rows.size)
                .size(inner.size);
            let blocks = tiles.min(u64::from(self.blocks(usize::MAX)) * 4) as u32;
            // SAFETY: the kernel's parameters; the dimensions are those of both layouts, which lie inside their storage,
            // and no two of dst's elements are one.
            return unsafe { self.launch(&format!("copy_tiles_{from}"), blocks, 256, 0, args, say) };
        }
        let rows: usize = dims.iter().map(|d| d.size).product();
        let words = walk::words(&dims);
        if inner.strides == [1, 1] {
            let width = 16 / src.dtype().size().min(dst.dtype().size());
            let blocks = self.blocks(rows * inner.size.div_ceil(width));
            let args = Args::new().tensor(src).tensor(dst).structure(&words).size(rows).size(inner.size);
            // SAFETY: as above.
            return unsafe { self.launch(&format!("copy_rows_{from}_{to}"), blocks, THREADS, 0, args, say) };
        }
        let args = Args::new()
            .tensor(src)
            .size(inner.strides[0])
            .tensor(dst)
            .size(inner.strides[1])
            .structure(&words)
            .size(rows)
            .size(inner.size);
        let blocks = self.blocks(rows * inner.size);
        // SAFETY: as above.
        unsafe { self.launch(&format!("copy_any_{from}_{to}"), blocks, THREADS, 0, args, say) }
    }

    fn fill(&self, dst: &Tensor, value: f64) -> Result<()> {
        self.on_device("fill", &[dst])?;
        check::distinct("fill", dst)?;
        if dst.elements() == 0 {
            return Ok(());
        }
        // f64 through f32 to the 16-bit types, as on the host.
        let bits = match dst.dtype() {
            DType::F64 => value.to_bits(),
            DType::F32 => (value as f32).to_bits().into(),
            DType::BF16 => bf16::from_f32(value as f32).to_bits().into(),
            DType::F16 => f16::from_f32(value as f32).to_bits().into(),
            DType::I32 => u64::from(value as i32 as u32),
        };
        let mut dims = walk::dims([dst.layout()]);
        let size = dst.dtype().size();
        if let [whole] = &dims[..]
            && whole.strides == [1]
            && size <= 4
        {
            return self.set_bytes(dst, bits);
        }
        let Some(inner) = dims.pop() else { return Ok(()) };
        let rows: usize = dims.iter().map(|d| d.size).product();
        let args = Args::new()
            .tensor(dst)
            .size(inner.strides[0])
            .structure(&walk::words(&dims))
            .size(rows)
            .size(inner.size)
            .bits(bits);
        let (name, blocks) = (format!("fill_{}", bits_of(dst.dtype())), self.blocks(rows * inner.size));
        // SAFETY: the kernel's parameters; the dimensions are those of the layout, which lies inside its storage.
        unsafe { self.launch(&name, blocks, THREADS, 0, args, || format!("{dst:?}")) }
    }

    fn download(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.copy_to_host(src, dst)
    }

    fn upload(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.copy_from_host(src, dst)
    }

    fn normal(&self, rng: Counter, first: u64, out: &Tensor) -> Result<()> {
        self.row_major("normal", &[out])?;
        let name = format!("normal_{}", self.suffix("normal", out)?);
        let n = out.elements();
        if n == 0 {
            return Ok(());
        }
        let [key0, key1, tag0, tag1] = rng.key();
        let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let args = Args::new().tensor(out).size(n).bits(first).bits(join(key0, key1)).bits(join(tag0, tag1));
        // SAFETY: the kernel's parameters; out holds n elements.
        unsafe { self.launch(&name, self.blocks(n / 2 + 1), THREADS, 0, args, || format!("{out:?}")) }
    }
}

/// The name of a type in kernels that move bits.
fn bits_of(dtype: DType) -> &'static str {
    match dtype.size() {
        2 => "b16",
        4 => "b32",
        _ => "b64",
    }
}

impl Cuda {
    /// `dst = src`: one stretch of memory each, of one length.
    fn copy_bytes(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        self.bind()?;
        let bytes = src.elements() * src.dtype().size();
        let stream = self.stream().cu_stream();
        // SAFETY: both lie inside their storage on this device and do not overlap.
        unsafe { result::memcpy_dtod_async(dst.ptr() as u64, src.ptr() as u64, bytes, stream) }
            .map_err(CudaError::driver(format!("copying {src:?}")))?;
        Ok(())
    }

    /// Every element of one stretch of memory, of 2 or 4 bytes each.
    fn set_bytes(&self, dst: &Tensor, bits: u64) -> Result<()> {
        self.bind()?;
        let (at, n, stream) = (dst.ptr() as u64, dst.elements(), self.stream().cu_stream());
        // SAFETY: dst holds n elements of that size on this device, aligned to it.
        let status = unsafe {
            match dst.dtype().size() {
                2 => sys::cuMemsetD16Async(at, bits as u16, n, stream),
                _ => sys::cuMemsetD32Async(at, bits as u32, n, stream),
            }
        };
        status.result().map_err(CudaError::driver(format!("filling {dst:?}")))?;
        Ok(())
    }
}
