//! The grouped products of rows whose segments only the device knows.

use fsmoe::device::{Gelu, GroupedKernels, RowWeights, Segments};
use fsmoe::tensor::DType;

use super::support::{In, Out, acc, compare, data, int};
use crate::support::uniform;

const BF16: DType = DType::BF16;
/// What segments are padded to.
const BLOCK: usize = 128;

/// Experts' rows, and how many of them tokens have.
pub(super) struct Rows {
    offsets: Vec<i32>,
    counts: Vec<i32>,
}

impl Rows {
    pub(super) fn new(counts: &[usize]) -> Self {
        let mut offsets = vec![0];
        for count in counts {
            offsets.push(offsets[offsets.len() - 1] + count.next_multiple_of(BLOCK) as i32);
        }
        Rows { offsets, counts: counts.iter().map(|c| *c as i32).collect() }
    }

    fn len(&self) -> usize {
        self.offsets[self.counts.len()] as usize
    }

    /// `values`, with zeros in the rows that no token has.
    fn padded(&self, cols: usize, mut values: Vec<f64>) -> Vec<f64> {
        for (e, count) in self.counts.iter().enumerate() {
            values[(self.offsets[e] + count) as usize * cols..self.offsets[e + 1] as usize * cols].fill(0.0);
        }
        values
    }

    fn rows(&self, seed: u64, cols: usize) -> In {
        data([self.len(), cols], self.padded(cols, uniform(seed, self.len() * cols)))
    }

    fn offsets(&self) -> In {
        int([self.offsets.len()], self.offsets.clone())
    }

    fn counts(&self) -> In {
        int([self.counts.len()], self.counts.clone())
    }

    fn out(&self, cols: usize) -> Out {
        Out::Data([self.len(), cols].into())
    }
}

/// Rows of the experts, model width, inner width: whole tiles and parts of them, experts without rows, more experts than
/// the kernels keep segments of, widths that fill no tile.
fn cases() -> Vec<(Rows, usize, usize)> {
    let many: Vec<usize> = (0..1024).map(|e| if e % 341 == 7 { e / 4 } else { 0 }).collect();
    vec![
        (Rows::new(&[128]), 128, 128),
        (Rows::new(&[250, 0, 300]), 200, 72),
        (Rows::new(&[0, 1, 600, 0, 0, 256]), 328, 520),
        (Rows::new(&[64, 65, 1, 449]), 64, 424),
        (Rows::new(&many), 96, 8),
    ]
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_hopper_forward() {
    cases().iter().for_each(|(r, m, h)| forward(r, *m, *h));
}

pub(super) fn forward(r: &Rows, m: usize, h: usize) {
    let (e, what) = (r.counts.len(), format!("{} rows, {m} to {h}", r.len()));
    let w = |seed, n: usize, k: usize| data([e, n, k], uniform(seed, e * n * k));
    let inputs = || [r.offsets(), r.counts(), r.rows(1, m), w(2, h, m), w(3, h, m)];
    compare!(&format!("grouped_linear, {what}"), BF16, inputs(), [r.out(h)], |k, i, o| {
        k.grouped_linear(Segments::Device { offsets: &i[0], counts: None }, &i[2], &i[3], &o[0])
    });
    compare!(&format!("grouped_swiglu, {what}"), BF16, inputs(), [r.out(h), r.out(h), r.out(h)], |k, i, o| {
        let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
        k.grouped_swiglu(segments, &i[2], &i[3], &i[4], &o[0], &o[1], &o[2])
    });
    for form in [Gelu::Erf, Gelu::Tanh] {
        compare!(&format!("grouped_gelu {form:?}, {what}"), BF16, inputs(), [r.out(h), r.out(h)], |k, i, o| {
            let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
            k.grouped_gelu(form, segments, &i[2], &i[3], &o[0], &o[1])
        });
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_hopper_data() {
    cases().iter().for_each(|(r, m, h)| data_gradient(r, *m, *h));
}

pub(super) fn data_gradient(r: &Rows, m: usize, h: usize) {
    let (e, what) = (r.counts.len(), format!("{} rows, {h} to {m}", r.len()));
    let w = |seed| data([e, h, m], uniform(seed, e * h * m));
    let inputs = || [r.offsets(), r.counts(), r.rows(1, h), w(2), r.rows(3, h), w(4)];
    compare!(&format!("grouped_linear_data, {what}"), BF16, inputs(), [r.out(m)], |k, i, o| {
        let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
        k.grouped_linear_data(segments, &[(&i[2], &i[3])], &o[0])
    });
    compare!(&format!("grouped_linear_data of two, {what}"), BF16, inputs(), [r.out(m)], |k, i, o| {
        let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
        k.grouped_linear_data(segments, &[(&i[2], &i[3]), (&i[4], &i[5])], &o[0])
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_hopper_backward() {
    cases().iter().for_each(|(r, m, h)| backward(r, *m, *h));
}

pub(super) fn backward(r: &Rows, m: usize, h: usize) {
    let (e, what) = (r.counts.len(), format!("{} rows, {m} to {h}", r.len()));
    let weights = || acc([r.len()], r.padded(1, uniform(9, r.len())));
    let w = || data([e, m, h], uniform(2, e * h * m));
    let inputs = || [r.offsets(), r.counts(), r.rows(1, m), w(), r.rows(3, h), r.rows(4, h), weights()];
    let d_weights = || Out::Acc([r.len()].into());
    compare!(
        &format!("grouped_swiglu_backward, {what}"),
        BF16,
        inputs(),
        [r.out(h), r.out(h), r.out(h), d_weights()],
        |k, i, o| {
            let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
            let weights = RowWeights { weights: &i[6], d_weights: &o[3] };
            let (dy, w, gate, up) = (&i[2], &i[3], &i[4], &i[5]);
            k.grouped_swiglu_backward(segments, dy, w, gate, up, Some(weights), &o[0], &o[1], &o[2])
        }
    );
    compare!(
        &format!("grouped_swiglu_backward without weights, {what}"),
        BF16,
        inputs(),
        [r.out(h), r.out(h), r.out(h)],
        |k, i, o| {
            let segments = Segments::Device { offsets: &i[0], counts: None };
            k.grouped_swiglu_backward(segments, &i[2], &i[3], &i[4], &i[5], None, &o[0], &o[1], &o[2])
        }
    );
    for form in [Gelu::Erf, Gelu::Tanh] {
        compare!(
            &format!("grouped_gelu_backward {form:?}, {what}"),
            BF16,
            inputs(),
            [r.out(h), r.out(h), d_weights()],
            |k, i, o| {
                let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
                let weights = RowWeights { weights: &i[6], d_weights: &o[2] };
                k.grouped_gelu_backward(form, segments, &i[2], &i[3], &i[4], Some(weights), &o[0], &o[1])
            }
        );
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_hopper_weight() {
    cases().iter().for_each(|(r, m, h)| weight(r, *m, *h));
}

pub(super) fn weight(r: &Rows, m: usize, h: usize) {
    let (e, what) = (r.counts.len(), format!("{} rows, ({h}, {m})", r.len()));
    let inputs = || [r.offsets(), r.counts(), r.rows(1, h), r.rows(2, h), r.rows(3, m)];
    let dw = |seed| Out::Add(data([e, h, m], uniform(seed, e * h * m)));
    for (first, second) in [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0)] {
        compare!(
            &format!("grouped_linear_weight, beta {first} and {second}, {what}"),
            BF16,
            inputs(),
            [dw(4), dw(5)],
            |k, i, o| {
                let segments = Segments::Device { offsets: &i[0], counts: Some(&i[1]) };
                k.grouped_linear_weight(segments, &[(&i[2], &o[0], first), (&i[3], &o[1], second)], &i[4])
            }
        );
    }
}
