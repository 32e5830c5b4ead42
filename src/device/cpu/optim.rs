//! The optimizer's arithmetic.

use super::Cpu;
use super::math::{PIECE, same};
use super::util::{Num, Real, acc_type, float_type, input, output};
use crate::device::{AdamW, OptimKernels, check};
use crate::error::Result;
use crate::tensor::Tensor;
use rayon::prelude::*;

impl OptimKernels for Cpu {
    fn adamw(
        &self,
        settings: AdamW,
        grad_scale: &Tensor,
        weight: &Tensor,
        m: &Tensor,
        v: &Tensor,
        grad: &Tensor,
    ) -> Result<()> {
        check::adamw(settings, grad_scale, weight, m, v, grad)?;
        acc_type!("adamw", weight.dtype(), A => float_type!("adamw", grad.dtype(), G => {
            let scale = input::<A>(grad_scale)?[0];
            if scale == 0.0 {
                return Ok(());
            }
            let [beta1, new1, beta2, new2, eps, rate, root, _] = settings.scalars().map(|v| v as A);
            let keep = (1.0 - settings.lr * settings.weight_decay) as A;
            let (weight, m, v) = (output::<A>(weight)?, output::<A>(m)?, output::<A>(v)?);
            let pieces = weight.par_chunks_mut(PIECE).zip(m.par_chunks_mut(PIECE)).zip(v.par_chunks_mut(PIECE));
            pieces.zip(input::<G>(grad)?.par_chunks(PIECE)).with_min_len(8).for_each(|(((w, m), v), g)| {
                for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                    let g = scale * A::of(g.get().f64());
                    *m = beta1 * *m + new1 * g;
                    *v = beta2 * *v + new2 * g * g;
                    *w = keep * *w - rate * *m / (v.sqrt() * root + eps);
                }
            });
        }));
        Ok(())
    }

    fn clip_scale(&self, sum: &Tensor, pre_scale: f64, max_norm: f64, norm: &Tensor, scale: &Tensor) -> Result<()> {
        same("clip_scale", sum, &[norm, scale])?;
        acc_type!("clip_scale", sum.dtype(), A => {
            let length = input::<A>(sum)?[0].sqrt() * pre_scale as A;
            output::<A>(norm)?[0] = length;
            let clip = if length > max_norm as A { max_norm as A / length } else { 1.0 };
            output::<A>(scale)?[0] = if length.is_finite() { pre_scale as A * clip } else { 0.0 };
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::util::{FLOATS, close, random_tensor, same_on_any_thread_count, wide};
    use crate::device::{AdamWItem, MemoryKernels};
    use crate::tensor::DType;

    #[test]
    fn adamw_by_hand() {
        let t = |v: &[f64]| Tensor::from_slice(v, [v.len()]).unwrap();
        let (w, m, v) = (t(&[1.0, -2.0]), t(&[0.0, 0.1]), t(&[0.0, 0.04]));
        let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, step: 3 };
        Cpu.adamw(s, &t(&[0.5]), &w, &m, &v, &t(&[2.0, -4.0])).unwrap();
        for (i, (w0, m0, v0, g)) in [(1.0, 0.0, 0.0, 1.0), (-2.0f64, 0.1f64, 0.04f64, -2.0f64)].into_iter().enumerate()
        {
            let (m1, v1) = (0.9 * m0 + 0.1 * g, 0.99 * v0 + 0.01 * g * g);
            let (mh, vh) = (m1 / (1.0 - 0.9f64.powi(3)), v1 / (1.0 - 0.99f64.powi(3)));
            let want = w0 - 0.1 * 0.5 * w0 - 0.1 * mh / (vh.sqrt() + 1e-8);
            assert!((w.to_vec::<f64>().unwrap()[i] - want).abs() < 1e-14);
            assert!((m.to_vec::<f64>().unwrap()[i] - m1).abs() < 1e-15);
            assert!((v.to_vec::<f64>().unwrap()[i] - v1).abs() < 1e-15);
        }
    }

    #[test]
    fn clipping() {
        let scalar = || Tensor::host([1], DType::F64);
        let (sum, norm, scale) = (scalar(), scalar(), scalar());
        for (s, pre, max, want) in
            [(16.0, 0.5, 1.0, (2.0, 0.25)), (16.0, 0.5, 3.0, (2.0, 0.5)), (f64::NAN, 1.0, 1.0, (f64::NAN, 0.0))]
        {
            Cpu.fill(&sum, s).unwrap();
            Cpu.clip_scale(&sum, pre, max, &norm, &scale).unwrap();
            let got = (norm.to_vec::<f64>().unwrap()[0], scale.to_vec::<f64>().unwrap()[0]);
            assert!(got == want || (got.0.is_nan() && want.0.is_nan() && got.1 == want.1), "{got:?} {want:?}");
        }
    }

    /// A gradient that is not finite, which clip_scale gives the factor 0, does no harm.
    #[test]
    fn a_scale_of_zero_changes_nothing() {
        let t = |v: f64| Tensor::from_slice(&[v], [1]).unwrap();
        let (w, m, v) = (t(1.0), t(2.0), t(3.0));
        let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, step: 3 };
        Cpu.adamw(s, &t(0.0), &w, &m, &v, &t(f64::NAN)).unwrap();
        assert_eq!([w, m, v].map(|t| t.to_vec::<f64>().unwrap()[0]), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn many_tensors_are_one_after_the_other() {
        let t = |seed, dtype| random_tensor(seed, &[100], dtype);
        let s = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.5, step: 3 };
        let scale = Tensor::host(&[1][..], DType::F32);
        Cpu.fill(&scale, 0.5).unwrap();
        let scalars = Tensor::host(&[AdamW::SCALARS][..], DType::F32);
        Cpu.adamw_scalars(s, &scalars).unwrap();
        assert_eq!(wide(&scalars)[7], f64::from(0.1_f32));
        let (w, m, v, copy) = (t(1, DType::F32), t(2, DType::F32), t(3, DType::F32), t(9, DType::BF16));
        Cpu.fill(&v, 0.5).unwrap();
        let grad = t(4, DType::BF16);
        let item = AdamWItem { weight_decay: 0.25, weight: &w, m: &m, v: &v, grad: &grad, copy: Some(&copy) };
        Cpu.adamw_many(s, &scalars, &scale, &[item]).unwrap();
        let (w2, m2, v2) = (t(1, DType::F32), t(2, DType::F32), t(3, DType::F32));
        Cpu.fill(&v2, 0.5).unwrap();
        Cpu.adamw(AdamW { weight_decay: 0.25, ..s }, &scale, &w2, &m2, &v2, &grad).unwrap();
        assert_eq!([wide(&w), wide(&m), wide(&v)], [wide(&w2), wide(&m2), wide(&v2)]);
        close(&copy, &wide(&w2), 1e-2);
        let sum = Tensor::host(&[1][..], DType::F64);
        Cpu.fill(&sum, 1.0).unwrap();
        let x = |v: &[f64]| Tensor::from_slice(v, [v.len()]).unwrap();
        Cpu.sum_squares_many(&[&x(&[2.0]), &x(&[]), &x(&[1.0, 3.0])], &sum).unwrap();
        assert_eq!(wide(&sum), [15.0]);
    }

    #[test]
    fn adamw_takes_gradients_of_any_type_and_any_thread_count() {
        let n = 20_011;
        let s = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 10_000_000_000 };
        for (dtype, _) in FLOATS {
            let grad = random_tensor(4, &[n], dtype);
            let run = |acc: DType| {
                let (w, m, v) = (random_tensor(1, &[n], acc), random_tensor(2, &[n], acc), Tensor::host([n], acc));
                let scale = Tensor::host([1], acc);
                Cpu.fill(&v, 0.5).unwrap();
                Cpu.fill(&scale, 0.25).unwrap();
                Cpu.adamw(s, &scale, &w, &m, &v, &grad).unwrap();
                [wide(&w), wide(&m), wide(&v)].concat()
            };
            let worst = run(DType::F32).iter().zip(run(DType::F64)).fold(0.0_f64, |e, (a, b)| e.max((a - b).abs()));
            assert!(worst < 1e-6, "{dtype}: {worst:e}");
            same_on_any_thread_count(|| run(DType::F32));
        }
        let t = random_tensor(1, &[1], DType::F32);
        let e = Cpu.adamw(AdamW { step: 0, ..s }, &t, &t, &t, &t, &t).unwrap_err();
        assert!(e.to_string().contains("step 0"), "{e}");
    }
}
