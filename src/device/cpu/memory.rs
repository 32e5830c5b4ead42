//! Allocation, copies and fills.

use super::Cpu;
use super::util::{Num, Real, float_type, input, output};
use crate::device::MemoryKernels;
use crate::error::{Result, shape_err};
use crate::rng::Counter;
use crate::tensor::{DType, Element, Layout, MAX_RANK, Place, Shape, Tensor};
use rayon::prelude::*;

impl MemoryKernels for Cpu {
    fn place(&self) -> Place {
        Place::Cpu
    }

    fn alloc(&self, shape: Shape, dtype: DType) -> Result<Tensor> {
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
            for_each_offset(dst, |at: *mut i32| {
                // SAFETY: the offsets of a layout lie inside its storage.
                unsafe { *at = value as i32 }
            });
            return Ok(());
        }
        float_type!("fill", dst.dtype(), T => {
            let value = T::put(Real::of(value));
            if dst.is_contiguous() {
                output::<T>(dst)?.fill(value);
            } else {
                // SAFETY: as above.
                for_each_offset(dst, |at: *mut T| unsafe { *at = value });
            }
        });
        Ok(())
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

/// A transfer between two host tensors is a copy of the bytes.
fn transfer(op: &str, src: &Tensor, dst: &Tensor) -> Result<()> {
    if src.shape() != dst.shape() || src.dtype() != dst.dtype() {
        shape_err!("{op}: from {src:?} to {dst:?}: shape and dtype must be the same");
    }
    Cpu.copy(src, dst)
}

/// `f` at every element's address, in row-major order of the shape.
fn for_each_offset<T: Element>(t: &Tensor, mut f: impl FnMut(*mut T)) {
    let base = t.ptr().cast::<T>();
    Walk::new(&[t.layout()]).for_each(|[at]| f(base.wrapping_add(at)));
}

fn strided_copy<S: Element, D: Element>(src: &Tensor, dst: &Tensor, f: impl Fn(S) -> D + Sync) -> Result<()> {
    if src.overlaps(dst) {
        shape_err!("copy: source {src:?} and destination share memory");
    }
    if src.is_contiguous() && dst.is_contiguous() {
        let from = input::<S>(src)?;
        output::<D>(dst)?.par_iter_mut().with_min_len(16 * 1024).zip(from).for_each(|(d, s)| *d = f(*s));
        return Ok(());
    }
    let (from, to) = (src.ptr().cast::<S>(), dst.ptr().cast::<D>());
    // SAFETY: the offsets of a layout lie inside its storage, and the two do not overlap.
    Walk::new(&[src.layout(), dst.layout()]).for_each(|[s, d]| unsafe { *to.add(d) = f(*from.add(s)) });
    Ok(())
}

/// Walks N layouts of one shape together, in row-major order, giving offsets relative to each layout's own first element.
struct Walk<const N: usize> {
    dims: [usize; MAX_RANK],
    strides: [[usize; MAX_RANK]; N],
    rank: usize,
}

impl<const N: usize> Walk<N> {
    fn new(layouts: &[&Layout; N]) -> Self {
        let shape = layouts[0].shape();
        let mut walk = Walk { dims: [1; MAX_RANK], strides: [[0; MAX_RANK]; N], rank: shape.len() };
        walk.dims[..shape.len()].copy_from_slice(shape);
        for (to, layout) in walk.strides.iter_mut().zip(layouts) {
            to[..shape.len()].copy_from_slice(layout.strides());
        }
        walk
    }

    fn for_each(&self, mut f: impl FnMut([usize; N])) {
        if self.dims.contains(&0) {
            return;
        }
        self.dimension(0, [0; N], &mut f);
    }

    fn dimension(&self, d: usize, mut at: [usize; N], f: &mut impl FnMut([usize; N])) {
        if d == self.rank {
            return f(at);
        }
        for _ in 0..self.dims[d] {
            self.dimension(d + 1, at, f);
            for n in 0..N {
                at[n] += self.strides[n][d];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
}
