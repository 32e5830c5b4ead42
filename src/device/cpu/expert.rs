//! Activations of the expert FFNs.

use super::Cpu;
use super::math::{PIECE, apart, same};
use super::util::{Num, Real, Shared, distinct, float_type, for_rows, in_place, input, on_host, output, sum};
use crate::device::check::{side_by_side, strided_rows, weighted};
use crate::device::{ExpertKernels, Gelu, GroupedKernels, RowWeights};
use crate::error::{Result, shape_err};
use crate::tensor::{Element, Tensor};
use rayon::prelude::*;
use std::ops::Range;

impl GroupedKernels for Cpu {}

impl ExpertKernels for Cpu {
    fn gelu(&self, form: Gelu, x: &Tensor, y: &Tensor) -> Result<()> {
        same("gelu", x, &[y])?;
        float_type!("gelu", x.dtype(), T => {
            let x = input::<T>(x)?;
            for_rows(output::<T>(y)?, PIECE, |r, y| {
                let x = &x[r * PIECE..][..y.len()];
                match form {
                    Gelu::Erf => y.iter_mut().zip(x).for_each(|(y, x)| *y = T::put(x.get() * normal_cdf(x.get()))),
                    Gelu::Tanh => y.iter_mut().zip(x).for_each(|(y, x)| *y = T::put(x.get() * tanh_cdf(x.get()).0)),
                }
            });
        });
        Ok(())
    }

    fn gelu_backward(&self, form: Gelu, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        same("gelu_backward", x, &[dy, dx])?;
        float_type!("gelu_backward", x.dtype(), T => {
            let x = input::<T>(x)?;
            if !in_place("gelu_backward", dy, dx)? {
                // One path for both cases: the gradient is then scaled in place.
                output::<T>(dx)?.copy_from_slice(input::<T>(dy)?);
            }
            for_rows(output::<T>(dx)?, PIECE, |r, d| {
                let x = &x[r * PIECE..][..d.len()];
                match form {
                    Gelu::Erf => d.iter_mut().zip(x).for_each(|(d, x)| *d = T::put(d.get() * erf_slope(x.get()))),
                    Gelu::Tanh => d.iter_mut().zip(x).for_each(|(d, x)| *d = T::put(d.get() * tanh_slope(x.get()))),
                }
            });
        });
        Ok(())
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()> {
        strided_rows("swiglu", y, &[gate, up])?;
        on_host("swiglu", &[gate, up])?;
        let width = y.rows().1;
        float_type!("swiglu", y.dtype(), T => {
            let (gate, up) = (Strided::<T>::new(gate), Strided::<T>::new(up));
            for_rows(output::<T>(y)?, width, |r, y| {
                for ((y, g), u) in y.iter_mut().zip(gate.row(r)).zip(up.row(r)) {
                    let g = g.get();
                    *y = T::put(g * g.sigmoid() * u.get());
                }
            });
        });
        Ok(())
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor, d_gate: &Tensor, d_up: &Tensor) -> Result<()> {
        strided_rows("swiglu_backward", dy, &[gate, up, d_gate, d_up])?;
        on_host("swiglu_backward", &[gate, up, d_gate, d_up])?;
        let (rows, width) = dy.rows();
        for out in [d_gate, d_up] {
            distinct("swiglu_backward", out)?;
            [gate, up, dy].into_iter().try_for_each(|x| apart("swiglu_backward", x, out))?;
        }
        if d_gate.overlaps(d_up) && !side_by_side(d_gate, d_up) {
            shape_err!("swiglu_backward: d_gate and d_up share memory");
        }
        float_type!("swiglu_backward", dy.dtype(), T => {
            let (gate, up, dy) = (Strided::<T>::new(gate), Strided::<T>::new(up), input::<T>(dy)?);
            let row = |r: usize, d_gate: &mut [T], d_up: &mut [T]| {
                let inputs = gate.row(r).iter().zip(up.row(r)).zip(&dy[r * width..][..width]);
                for ((dg, du), ((g, u), dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
                    let (g, u, dy) = (g.get(), u.get(), dy.get());
                    let s = g.sigmoid();
                    *dg = T::put(dy * u * s * (1.0 + g * (1.0 - s)));
                    *du = T::put(dy * g * s);
                }
            };
            let (d_gate, d_up) = (Strided::<T>::new(d_gate), Strided::<T>::new(d_up));
            (0..rows).into_par_iter().with_min_len((4 * PIECE).div_ceil(width.max(1))).for_each(|r| {
                // SAFETY: a row belongs to one task; rows of an output, and the two outputs, have no element in common
                // (checked).
                let (dg, du) = unsafe { (d_gate.row_mut(r), d_up.row_mut(r)) };
                row(r, dg, du);
            });
        });
        Ok(())
    }

    fn gelu_backward_weighted(
        &self,
        form: Gelu,
        x: &Tensor,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
        dx: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let op = "gelu_backward_weighted";
        weighted(op, &[x, dy], weights, &[dx, act])?;
        float_type!("gelu_backward_weighted", x.dtype(), T => {
            let (x, dy, width) = (input::<T>(x)?, input::<T>(dy)?, x.rows().1);
            weighted_rows::<T, _>(weights, [dx, act], |r, weight, [dx, act]| {
                let (x, dy) = (&x[r * width..][..width], &dy[r * width..][..width]);
                sum_of_parts(width, |part, products| {
                    let inputs = x[part.clone()].iter().zip(&dy[part.clone()]);
                    let outputs = dx[part.clone()].iter_mut().zip(&mut act[part]).zip(products);
                    let one = |((dx, act), product): ((&mut T, &mut T), &mut _), dy, (value, slope)| {
                        *product = dy * value;
                        *dx = T::put(weight * dy * slope);
                        *act = T::put(weight * value);
                    };
                    // Two loops: a choice in the inner one would keep it from vectorising.
                    match form {
                        Gelu::Erf => outputs.zip(inputs).for_each(|(out, (x, dy))| {
                            let x = x.get();
                            one(out, dy.get(), (x * normal_cdf(x), erf_slope(x)));
                        }),
                        Gelu::Tanh => outputs.zip(inputs).for_each(|(out, (x, dy))| {
                            let x = x.get();
                            one(out, dy.get(), (x * tanh_cdf(x).0, tanh_slope(x)));
                        }),
                    }
                })
            })
        })
    }

    fn swiglu_backward_weighted(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        weights: Option<RowWeights<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: &Tensor,
    ) -> Result<()> {
        let op = "swiglu_backward_weighted";
        weighted(op, &[gate, up, dy], weights, &[d_gate, d_up, act])?;
        float_type!("swiglu_backward_weighted", gate.dtype(), T => {
            let (g, u, dy, width) = (input::<T>(gate)?, input::<T>(up)?, input::<T>(dy)?, gate.rows().1);
            weighted_rows::<T, _>(weights, [d_gate, d_up, act], |r, weight, [d_gate, d_up, act]| {
                let [g, u, dy] = [g, u, dy].map(|t| &t[r * width..][..width]);
                sum_of_parts(width, |part, products| {
                    let inputs = g[part.clone()].iter().zip(&u[part.clone()]).zip(&dy[part.clone()]);
                    let outputs = d_gate[part.clone()].iter_mut().zip(&mut d_up[part.clone()]).zip(&mut act[part]);
                    for ((((dg, du), act), product), ((g, u), dy)) in outputs.zip(products).zip(inputs) {
                        let (g, u, dy) = (g.get(), u.get(), dy.get());
                        let s = g.sigmoid();
                        let (value, d) = (g * s * u, weight * dy);
                        *product = dy * value;
                        *dg = T::put(d * u * s * (1.0 + g * (1.0 - s)));
                        *du = T::put(d * g * s);
                        *act = T::put(weight * value);
                    }
                })
            })
        })
    }
}

/// The sum of what `part` writes for every element of a row, given a range of elements and as many places. A sum inside
/// of the loop that makes its terms would keep that loop from vectorising.
#[inline(always)]
fn sum_of_parts<A: Real>(width: usize, mut part: impl FnMut(Range<usize>, &mut [A])) -> A {
    const PART: usize = 256;
    let mut terms = [A::zero(); PART];
    let mut total = A::zero();
    for start in (0..width).step_by(PART) {
        let terms = &mut terms[..PART.min(width - start)];
        part(start..start + terms.len(), terms);
        total += sum([&*terms], |[term]| term);
    }
    total
}

/// `row(r, weight, outputs' rows)` for every row, in parallel; what it returns is the gradient of the row's weight.
fn weighted_rows<T: Num, const N: usize>(
    weights: Option<RowWeights<'_>>,
    outputs: [&Tensor; N],
    row: impl Fn(usize, T::Acc, [&mut [T]; N]) -> T::Acc + Sync + Send,
) -> Result<()> {
    let (rows, width) = outputs[0].rows();
    let given = weights.map(|w| input::<T::Acc>(w.weights)).transpose()?;
    let written = weights.map(|w| output::<T::Acc>(w.d_weights)).transpose()?.map(|d| Shared(d.as_mut_ptr()));
    for out in outputs {
        output::<T>(out)?;
    }
    let outputs = outputs.map(Strided::<T>::new);
    (0..rows).into_par_iter().with_min_len((4 * PIECE).div_ceil(width.max(1))).for_each(|r| {
        let weight = given.map_or(T::Acc::of(1.0), |w| w[r]);
        // SAFETY: a row belongs to one task; the outputs have no element in common (checked by the callers).
        let sum = row(r, weight, outputs.each_ref().map(|out| unsafe { out.row_mut(r) }));
        if let Some(d) = &written {
            // SAFETY: r is below the length, which is that of the rows (checked), and belongs to this task.
            unsafe { *d.at(r) = sum }
        }
    });
    Ok(())
}

/// Φ(x), the normal distribution function.
fn normal_cdf<A: Real>(x: A) -> A {
    A::of(0.5) * (A::one() + (x * A::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
}

/// Φ(x) + x·φ(x).
fn erf_slope<A: Real>(x: A) -> A {
    let density = (x * x * A::of(-0.5)).fast_exp() * A::of(0.398_942_280_401_432_7);
    normal_cdf(x) + x * density
}

/// The tanh form's ½(1 + tanh u) = sigmoid(2u), and du/dx.
#[inline(always)]
fn tanh_cdf<A: Real>(x: A) -> (A, A) {
    let (root, cubic) = (A::of(0.797_884_560_802_865_4), A::of(0.044715));
    let u = root * (x + cubic * x * x * x);
    ((u + u).sigmoid(), root * (A::one() + A::of(3.0) * cubic * x * x))
}

#[inline(always)]
fn tanh_slope<A: Real>(x: A) -> A {
    let (cdf, du) = tanh_cdf(x);
    cdf + x * A::of(2.0) * cdf * (A::one() - cdf) * du
}

/// A matrix whose rows are contiguous, with a stride between them.
struct Strided<T> {
    at: *mut T,
    width: usize,
    stride: usize,
}

// SAFETY: rows are read, or written by one thread at a time; see `row` and `row_mut`.
unsafe impl<T: Sync> Sync for Strided<T> {}
// SAFETY: as for Sync.
unsafe impl<T: Send> Send for Strided<T> {}

impl<T: Element> Strided<T> {
    fn new(t: &Tensor) -> Self {
        let width = t.rows().1;
        let stride = if t.is_contiguous() { width } else { t.layout().strides()[0] };
        Strided { at: t.ptr().cast(), width, stride }
    }

    fn row(&self, r: usize) -> &[T] {
        // SAFETY: inside the tensor (callers pass r below its rows), and inputs are not written during an operation.
        unsafe { std::slice::from_raw_parts(self.at.add(r * self.stride), self.width) }
    }

    /// # Safety
    /// No other reference to row `r` may live.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row_mut(&self, r: usize) -> &mut [T] {
        // SAFETY: inside the tensor; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(r * self.stride), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::util::{FLOATS, close, random_tensor, same_on_any_thread_count, wide};
    use crate::device::{MathKernels, MemoryKernels};
    use crate::tensor::DType;

    #[test]
    fn known_values() {
        let x = Tensor::from_slice(&[-3.0f64, -0.5, 0.0, 1.0, 2.5], [5]).unwrap();
        let y = Tensor::host([5], DType::F64);
        let near = |want: [f64; 5]| {
            let got = y.to_vec::<f64>().unwrap();
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?}");
        };
        Cpu.gelu(Gelu::Erf, &x, &y).unwrap();
        near([-0.00404969409489, -0.154268769362993, 0.0, 0.841344746068543, 2.48447583668556]);
        Cpu.gelu(Gelu::Tanh, &x, &y).unwrap();
        near([-0.003637392081773, -0.154285990174856, 0.0, 0.841191990608277, 2.484915733910001]);
    }

    #[test]
    fn halves_of_a_wider_buffer() {
        let both = Tensor::from_slice(&(0..24).map(|i| f64::from(i) * 0.1 - 1.0).collect::<Vec<_>>(), [3, 8]).unwrap();
        let (gate, up) = (both.narrow(1, 0, 4).unwrap(), both.narrow(1, 4, 4).unwrap());
        let (y, dy) = (Tensor::host([3, 4], DType::F64), Tensor::from_slice(&[1.0f64; 12], [3, 4]).unwrap());
        Cpu.swiglu(&gate, &up, &y).unwrap();
        let d = Tensor::host([3, 8], DType::F64);
        Cpu.swiglu_backward(&gate, &up, &dy, &d.narrow(1, 0, 4).unwrap(), &d.narrow(1, 4, 4).unwrap()).unwrap();
        let (d_gate, d_up) = (Tensor::host([3, 4], DType::F64), Tensor::host([3, 4], DType::F64));
        Cpu.swiglu_backward(&gate, &up, &dy, &d_gate, &d_up).unwrap();
        let (v, y, d) = (both.to_vec::<f64>().unwrap(), y.to_vec::<f64>().unwrap(), d.to_vec::<f64>().unwrap());
        let (d_gate, d_up) = (d_gate.to_vec::<f64>().unwrap(), d_up.to_vec::<f64>().unwrap());
        for r in 0..3 {
            for j in 0..4 {
                let (g, u) = (v[r * 8 + j], v[r * 8 + 4 + j]);
                let silu = g / (1.0 + (-g).exp());
                assert!((y[r * 4 + j] - silu * u).abs() < 1e-14);
                assert!((d[r * 8 + 4 + j] - silu).abs() < 1e-14);
                // By the quotient rule on g / (1 + e^−g).
                let slope = ((1.0 + (-g).exp()) + g * (-g).exp()) / (1.0 + (-g).exp()).powi(2);
                assert!((d[r * 8 + j] - u * slope).abs() < 1e-14);
                assert_eq!((d[r * 8 + j], d[r * 8 + 4 + j]), (d_gate[r * 4 + j], d_up[r * 4 + j]));
            }
        }
    }

    #[test]
    fn every_type_agrees_with_f64_also_in_place() {
        for (dtype, bound) in &FLOATS[1..] {
            let [x, u, dy] = [1, 2, 3].map(|seed| random_tensor(seed, &[37, 61], *dtype));
            let run = |dtype: DType| {
                let [x, u, dy] = [&x, &u, &dy].map(|t| {
                    let out = Tensor::host(*t.shape(), dtype);
                    Cpu.copy(t, &out).unwrap();
                    // Far enough from 0 for the tails.
                    Cpu.axpby(4.0, t, 0.0, &out).unwrap();
                    out
                });
                let out = [(); 7].map(|()| Tensor::host([37, 61], dtype));
                for (i, form) in [Gelu::Erf, Gelu::Tanh].into_iter().enumerate() {
                    Cpu.gelu(form, &x, &out[2 * i]).unwrap();
                    Cpu.gelu_backward(form, &x, &dy, &out[2 * i + 1]).unwrap();
                }
                Cpu.swiglu(&x, &u, &out[4]).unwrap();
                Cpu.swiglu_backward(&x, &u, &dy, &out[5], &out[6]).unwrap();
                Cpu.gelu_backward(Gelu::Tanh, &x, &dy, &dy).unwrap();
                assert_eq!(wide(&dy), wide(&out[3]));
                out
            };
            for (got, want) in run(*dtype).iter().zip(run(DType::F64)) {
                close(got, &wide(&want), *bound);
            }
        }
    }

    /// Rows of more than one part: the gradients of weighted dy, the weighted activation, and dy · activation for each row.
    #[test]
    fn weighted_backwards_are_put_together_from_plain_ones() {
        let (rows, width) = (3, 600);
        let [x, up, dy] = [1, 2, 3].map(|seed| random_tensor(seed, &[rows, width], DType::F64));
        let weights = Tensor::from_slice(&[0.5f64, -2.0, 0.0], [rows]).unwrap();
        let new = || Tensor::host([rows, width], DType::F64);
        let (w, near) = (wide(&weights), |got: &Tensor, want: Vec<f64>| close(got, &want, 1e-13));
        let weighted = |t: &Tensor| wide(t).iter().enumerate().map(|(i, v)| w[i / width] * v).collect::<Vec<_>>();
        let dots = |y: &Tensor| -> Vec<f64> {
            let products: Vec<f64> = wide(&dy).iter().zip(wide(y)).map(|(d, y)| d * y).collect();
            products.chunks(width).map(|row| row.iter().sum()).collect()
        };
        let (y, d, d_up, act, d_weights) = (new(), new(), new(), new(), Tensor::host([rows], DType::F64));
        let of_rows = || Some(RowWeights { weights: &weights, d_weights: &d_weights });
        let [plain, plain_up] = [(); 2].map(|()| new());

        for form in [Gelu::Erf, Gelu::Tanh] {
            Cpu.gelu_backward_weighted(form, &x, &dy, of_rows(), &d, &act).unwrap();
            Cpu.gelu(form, &x, &y).unwrap();
            Cpu.gelu_backward(form, &x, &dy, &plain).unwrap();
            near(&d, weighted(&plain));
            near(&act, weighted(&y));
            near(&d_weights, dots(&y));
        }
        Cpu.swiglu_backward_weighted(&x, &up, &dy, of_rows(), &d, &d_up, &act).unwrap();
        Cpu.swiglu(&x, &up, &y).unwrap();
        Cpu.swiglu_backward(&x, &up, &dy, &plain, &plain_up).unwrap();
        near(&d, weighted(&plain));
        near(&d_up, weighted(&plain_up));
        near(&act, weighted(&y));
        near(&d_weights, dots(&y));
    }

    #[test]
    fn gradients_that_share_elements_are_refused() {
        let (x, buffer) = (random_tensor(1, &[3, 4], DType::F32), Tensor::host([3, 8], DType::F32));
        let part = |start| buffer.narrow(1, start, 4).unwrap();
        assert!(Cpu.swiglu_backward(&x, &x, &x, &part(0), &part(3)).is_err());
        assert!(Cpu.swiglu_backward(&x, &x, &x, &part(0), &part(0)).is_err());
        Cpu.swiglu_backward(&x, &x, &x, &part(4), &part(0)).unwrap();
        assert!(Cpu.gelu_backward(Gelu::Tanh, &x, &x, &x.reshape([4, 3]).unwrap()).is_err());
    }

    #[test]
    fn the_thread_count_changes_no_bit_and_nothing_is_something() {
        let x = random_tensor(1, &[300, 101], DType::F32);
        same_on_any_thread_count(|| {
            let out = [(); 2].map(|()| Tensor::host([300, 101], DType::F32));
            Cpu.swiglu_backward(&x, &x, &x, &out[0], &out[1]).unwrap();
            out.iter().flat_map(wide).collect()
        });
        for shape in [[0, 3], [3, 0]] {
            let t = || Tensor::host(shape, DType::F32);
            Cpu.swiglu_backward(&t(), &t(), &t(), &t(), &t()).unwrap();
            Cpu.gelu(Gelu::Erf, &t(), &t()).unwrap();
        }
    }
}
