//! Allocation, copies and fills.

use super::Cpu;
use super::util::{Num, Real, Shared, distinct, float_type, input, on_host, output};
use crate::device::{CommKernels, MemoryKernels};
use crate::error::{Result, shape_err};
use crate::rng::Counter;
use crate::tensor::{DType, Element, Layout, Place, Shape, Tensor};
use rayon::prelude::*;

/// Tensors of so many bytes are refused where the system has fewer: it would give the addresses, and later end the process.
const ASKED_FROM: usize = 256 << 20;

/// Bytes that the system says a process can still have; none where it does not say.
pub fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

impl CommKernels for Cpu {}

impl MemoryKernels for Cpu {
    fn place(&self) -> Place {
        Place::Cpu
    }

    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor> {
        let bytes = shape.bytes(dtype)?;
        // Asked only where it may matter: the system is slow to say.
        if bytes >= ASKED_FROM
            && let Some(free) = available_memory()
            && bytes as u64 > free
        {
            let gib = |n: u64| n as f64 / f64::from(1 << 30);
            shape_err!(
                "a tensor of shape {shape} in {dtype}: {:.1} GiB, and {:.1} GiB are available",
                gib(bytes as u64),
                gib(free)
            );
        }
        Ok(Tensor::host(shape, dtype))
    }

    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        if src.shape() != dst.shape() {
            shape_err!("copy: from shape {} to {}", src.shape(), dst.shape());
        }
        match (src.dtype(), dst.dtype()) {
            (DType::I32, DType::I32) => strided_copy::<i32, i32>(src, dst, |v| v),
            (DType::I32, d) | (d, DType::I32) => shape_err!("copy: between i32 and {d}"),
            (s, d) => float_type!("copy", s, S => float_type!("copy", d, D => {
                // Through f64, which holds every value of the other types.
                strided_copy::<S, D>(src, dst, |v| D::put(Real::of(v.get().f64())))
            })),
        }
    }

    fn fill(&self, dst: &Tensor, value: f64) -> Result<()> {
        if dst.dtype() == DType::I32 {
            return strided_fill(dst, value as i32);
        }
        float_type!("fill", dst.dtype(), T => strided_fill(dst, T::put(Real::of(value))))
    }

    fn download(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        transfer("download", src, dst)
    }

    fn upload(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        transfer("upload", src, dst)
    }

    fn normal(&self, rng: Counter, first: u64, out: &Tensor) -> Result<()> {
        float_type!("normal", out.dtype(), T => {
            output::<T>(out)?.par_iter_mut().enumerate().with_min_len(1024).for_each(|(i, v)| {
                *v = T::put(Real::of(rng.normal(first + i as u64)));
            });
        });
        Ok(())
    }
}

/// Elements below which a copy stays on the thread it is called on.
const SERIAL: usize = 16 * 1024;

/// A transfer between two host tensors is a copy of the bytes.
fn transfer(op: &str, src: &Tensor, dst: &Tensor) -> Result<()> {
    if src.shape() != dst.shape() || src.dtype() != dst.dtype() {
        shape_err!("{op}: from {src:?} to {dst:?}: shape and dtype must be the same");
    }
    Cpu.copy(src, dst)
}

fn strided_copy<S: Element, D: Element>(src: &Tensor, dst: &Tensor, f: impl Fn(S) -> D + Sync) -> Result<()> {
    if src.overlaps(dst) {
        shape_err!("copy: source {src:?} and destination share memory");
    }
    if src.is_contiguous() && dst.is_contiguous() {
        let (from, to) = (input::<S>(src)?, output::<D>(dst)?);
        if to.len() <= SERIAL {
            to.iter_mut().zip(from).for_each(|(d, s)| *d = f(*s));
        } else {
            to.par_iter_mut().with_min_len(SERIAL).zip(from).for_each(|(d, s)| *d = f(*s));
        }
        return Ok(());
    }
    on_host("copy", &[src, dst])?;
    distinct("copy", dst)?;
    let rows = Rows::new([src.layout(), dst.layout()]);
    let (from, to) = (Shared(src.ptr().cast::<S>()), Shared(dst.ptr().cast::<D>()));
    let (width, [ss, ds]) = (rows.width, rows.steps);
    rows.for_each(|[s, d]| {
        let (from, to) = (from.at(s), to.at(d));
        for i in 0..width {
            // SAFETY: the offsets of a layout lie inside its storage, on the host; the two do not overlap, and rows of
            // `dst` have no element in common.
            unsafe { *to.add(i * ds) = f(*from.add(i * ss)) }
        }
    });
    Ok(())
}

/// Fills any layout.
fn strided_fill<T: Element>(dst: &Tensor, value: T) -> Result<()> {
    if dst.is_contiguous() {
        output::<T>(dst)?.fill(value);
        return Ok(());
    }
    on_host("fill", &[dst])?;
    distinct("fill", dst)?;
    let rows = Rows::new([dst.layout()]);
    let to = Shared(dst.ptr().cast::<T>());
    let (width, [step]) = (rows.width, rows.steps);
    rows.for_each(|[at]| {
        for i in 0..width {
            // SAFETY: as in `strided_copy`.
            unsafe { *to.at(at).add(i * step) = value }
        }
    });
    Ok(())
}

/// The rows (runs of the last dimension) of N layouts of one shape: where each begins, relative to the first element.
struct Rows<const N: usize> {
    count: usize,
    width: usize,
    /// Each layout's stride inside a row.
    steps: [usize; N],
    /// Size and strides of the dimensions that number the rows.
    lead: Vec<(usize, [usize; N])>,
}

impl<const N: usize> Rows<N> {
    fn new(layouts: [&Layout; N]) -> Self {
        let dims = (0..layouts[0].shape().len()).map(|d| (layouts[0].shape()[d], layouts.map(|l| l.strides()[d])));
        let mut lead: Vec<_> = dims.collect();
        let (width, steps) = lead.pop().unwrap_or((1, [0; N]));
        Rows { count: lead.iter().map(|d| d.0).product(), width, steps, lead }
    }

    /// `f` for every row, in parallel where that pays.
    fn for_each(&self, f: impl Fn([usize; N]) + Sync + Send) {
        let fewest = SERIAL.div_ceil(self.width.max(1));
        (0..self.count).into_par_iter().with_min_len(fewest).for_each(|mut row| {
            let mut at = [0; N];
            for (size, strides) in self.lead.iter().rev() {
                for n in 0..N {
                    at[n] += row % size * strides[n];
                }
                row /= size;
            }
            f(at);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::util::{random_tensor, wide};
    use crate::rng::Purpose;

    #[test]
    fn copies_between_layouts_and_types() {
        let data: Vec<f64> = (0..24).map(f64::from).collect();
        let t = Tensor::from_slice(&data, [2, 3, 4]).unwrap();
        let turned = t.transpose(0, 2).unwrap().narrow(0, 1, 2).unwrap(); // (2, 3, 2)
        let out = Tensor::host([2, 3, 2], DType::BF16);
        Cpu.copy(&turned, &out).unwrap();
        let got: Vec<f32> = out.to_vec::<half::bf16>().unwrap().iter().map(|v| v.to_f32()).collect();
        assert_eq!(got, [1., 13., 5., 17., 9., 21., 2., 14., 6., 18., 10., 22.]);

        let wide = Tensor::host_zeros([3, 5], DType::F32);
        Cpu.copy(&t.index(0).unwrap().narrow(1, 0, 2).unwrap(), &wide.narrow(1, 2, 2).unwrap()).unwrap();
        assert_eq!(wide.to_vec::<f32>().unwrap()[5..10], [0., 0., 4., 5., 0.]);
        assert!(Cpu.copy(&t, &out).is_err(), "another shape");
        assert!(Cpu.copy(&t.narrow(0, 0, 1).unwrap(), &t.narrow(0, 0, 1).unwrap()).is_err(), "the same memory");
    }

    #[test]
    fn fills_views_only() {
        let t = Tensor::host_zeros([2, 3], DType::F64);
        Cpu.fill(&t.narrow(1, 1, 1).unwrap(), 7.0).unwrap();
        assert_eq!(t.to_vec::<f64>().unwrap(), [0., 7., 0., 0., 7., 0.]);
    }

    #[test]
    fn normals_are_addressed_by_index() {
        let rng = Counter { seed: 1, purpose: Purpose::Test, step: 0 };
        let (all, tail) = (Tensor::host([5000], DType::F64), Tensor::host([9], DType::F64));
        Cpu.normal(rng, 0, &all).unwrap();
        Cpu.normal(rng, 4001, &tail).unwrap();
        assert_eq!(all.to_vec::<f64>().unwrap()[4001..4010], tail.to_vec::<f64>().unwrap());
    }

    #[test]
    fn large_strided_copies_and_fills_agree_with_indexing() {
        let t = random_tensor(1, &[70, 30, 50], DType::F32);
        let (turned, out) = (t.transpose(0, 2).unwrap(), Tensor::host([50, 30, 70], DType::F64));
        Cpu.copy(&turned, &out).unwrap();
        let (from, to) = (wide(&t), out.to_vec::<f64>().unwrap());
        assert!((0..to.len()).all(|i| to[i] == from[i % 70 * 1500 + i / 70 % 30 * 50 + i / 2100]));
        Cpu.fill(&turned.narrow(0, 1, 49).unwrap(), 9.0).unwrap();
        let filled = t.to_vec::<f32>().unwrap();
        assert!((0..filled.len()).all(|i| (filled[i] == 9.0) == (i % 50 != 0)));
    }

    #[test]
    fn outputs_that_repeat_elements_and_foreign_memory_are_refused() {
        let t = Tensor::host_zeros([4], DType::F32);
        let view = |strides: &[usize]| {
            Tensor::new(t.storage().clone(), Layout::strided([2, 3].into(), strides, 0).unwrap(), DType::F32).unwrap()
        };
        assert!(Cpu.fill(&view(&[1, 1]), 1.0).unwrap_err().to_string().contains("overlap"));
        assert!(Cpu.copy(&Tensor::host([2, 3], DType::F32), &view(&[0, 1])).is_err());
        Cpu.copy(&view(&[0, 1]), &Tensor::host([2, 3], DType::F32)).unwrap();

        let kept: std::sync::Arc<dyn std::any::Any + Send + Sync> = std::sync::Arc::new(());
        // SAFETY: the address is never used: that is what is tested.
        let far = unsafe { crate::tensor::Storage::from_raw(std::ptr::null_mut(), 64, Place::Cuda(0), kept) };
        let far = Tensor::new(far, Layout::contiguous([2, 4].into()), DType::F32).unwrap();
        let turned = far.t().unwrap();
        assert!(Cpu.fill(&turned, 0.0).unwrap_err().to_string().contains("cuda:0"));
        assert!(Cpu.copy(&turned, &Tensor::host([4, 2], DType::F32)).is_err());
    }
}
