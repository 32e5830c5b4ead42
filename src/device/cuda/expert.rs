//! Activations of the expert FFNs.

use super::args::Args;
use super::backend::{Cuda, THREADS};
use crate::device::check::{self, apart, side_by_side};
use crate::device::{ExpertKernels, Gelu, RowWeights};
use crate::error::{Result, shape_err};
use crate::tensor::Tensor;

impl ExpertKernels for Cuda {
    fn gelu(&self, form: Gelu, x: &Tensor, y: &Tensor) -> Result<()> {
        check::same("gelu", x, &[y])?;
        self.row_major("gelu", &[x, y])?;
        apart("gelu", x, y)?;
        let name = format!("{}_forward_{}", stem(form), self.suffix("gelu", x)?);
        let args = Args::new().tensor(x).tensor(y).size(x.elements());
        // SAFETY: the kernel's parameters; x and y hold that many elements and share none.
        unsafe { self.launch_vectors(&name, x, 1, x.elements(), args) }
    }

    fn gelu_backward(&self, form: Gelu, x: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        check::same("gelu_backward", x, &[dy, dx])?;
        self.row_major("gelu_backward", &[x, dy, dx])?;
        apart("gelu_backward", x, dx)?;
        check::in_place("gelu_backward", dy, dx)?;
        let name = format!("{}_backward_{}", stem(form), self.suffix("gelu_backward", x)?);
        let args = Args::new().tensor(dy).tensor(x).tensor(dx).size(x.elements());
        // SAFETY: as above; dx is dy itself or apart from both.
        unsafe { self.launch_vectors(&name, x, 1, x.elements(), args) }
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, y: &Tensor) -> Result<()> {
        let strides = self.strided("swiglu", y, [gate, up])?;
        [gate, up].into_iter().try_for_each(|x| apart("swiglu", x, y))?;
        let width = y.rows().1;
        let args = Args::new().tensor(gate).size(strides[0]).tensor(up).size(strides[1]).tensor(y).size(width);
        let name = format!("swiglu_forward_{}", self.suffix("swiglu", y)?);
        // SAFETY: the kernel's parameters; every tensor has (rows, width) at its stride, and y is apart from the others.
        unsafe { self.launch_rows(&name, y, strides.iter().all(|s| *s == width), args) }
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor, d_gate: &Tensor, d_up: &Tensor) -> Result<()> {
        let op = "swiglu_backward";
        let strides = self.strided(op, dy, [gate, up, d_gate, d_up])?;
        for out in [d_gate, d_up] {
            check::distinct(op, out)?;
            [gate, up, dy].into_iter().try_for_each(|x| apart(op, x, out))?;
        }
        if d_gate.overlaps(d_up) && !side_by_side(d_gate, d_up) {
            shape_err!("{op}: d_gate and d_up share memory");
        }
        let width = dy.rows().1;
        let mut args = Args::new().tensor(dy).size(width);
        for (t, stride) in [gate, up, d_gate, d_up].into_iter().zip(strides) {
            args = args.tensor(t).size(stride);
        }
        let name = format!("swiglu_backward_{}", self.suffix(op, dy)?);
        // SAFETY: as in the forward; no two elements that are written are one.
        unsafe { self.launch_rows(&name, dy, strides.iter().all(|s| *s == width), args) }
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
        self.weighted(op, &[x, dy], weights, &[dx, act])?;
        let name = format!("weighted_{}_backward_{}", stem(form), self.suffix(op, x)?);
        let args = Args::new().tensor(x).tensor(dy).optional(weights.map(|w| w.weights)).tensor(dx).tensor(act);
        let (args, (rows, cols)) = (args.optional(weights.map(|w| w.d_weights)), x.rows());
        // SAFETY: the kernel's parameters: (rows, cols) all, weights (rows), outputs apart from everything else.
        unsafe { self.launch_by_rows(&name, x, args.size(rows).size(cols)) }
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
        self.weighted(op, &[gate, up, dy], weights, &[d_gate, d_up, act])?;
        let name = format!("weighted_swiglu_backward_{}", self.suffix(op, gate)?);
        let args = Args::new().tensor(gate).tensor(up).tensor(dy).optional(weights.map(|w| w.weights));
        let args = args.tensor(d_gate).tensor(d_up).tensor(act).optional(weights.map(|w| w.d_weights));
        let (rows, cols) = gate.rows();
        // SAFETY: as above.
        unsafe { self.launch_by_rows(&name, gate, args.size(rows).size(cols)) }
    }
}

fn stem(form: Gelu) -> &'static str {
    match form {
        Gelu::Erf => "gelu",
        Gelu::Tanh => "gelu_tanh",
    }
}

impl Cuda {
    /// The checks of the weighted backwards.
    fn weighted(
        &self,
        op: &str,
        inputs: &[&Tensor],
        weights: Option<RowWeights<'_>>,
        outputs: &[&Tensor],
    ) -> Result<()> {
        check::weighted(op, inputs, weights, outputs)?;
        self.row_major(op, inputs)?;
        self.row_major(op, outputs)?;
        weights.map_or(Ok(()), |w| self.row_major(op, &[w.weights, w.d_weights]))
    }

    /// The row strides of matrices of `like`'s shape and dtype, `like` itself being contiguous.
    fn strided<const N: usize>(&self, op: &str, like: &Tensor, others: [&Tensor; N]) -> Result<[usize; N]> {
        self.row_major(op, &[like])?;
        self.on_device(op, &others)?;
        check::strided_rows(op, like, &others)?;
        let width = like.rows().1;
        Ok(others.map(|t| if t.is_contiguous() { width } else { t.layout().strides()[0] }))
    }

    /// Launches an elementwise kernel over `like`'s rows, whose sizes end its parameters. Without gaps between rows they
    /// are one, with one ragged end instead of one per row.
    ///
    /// # Safety
    /// As [`Cuda::launch`], `args` being without the sizes.
    unsafe fn launch_rows(&self, name: &str, like: &Tensor, gapless: bool, args: Args) -> Result<()> {
        let (rows, cols) = if gapless { (1, like.elements()) } else { like.rows() };
        // SAFETY: the caller's promise.
        unsafe { self.launch_vectors(name, like, rows, cols, args.size(rows).size(cols)) }
    }

    /// Launches an elementwise kernel that walks (rows, cols) elements of `like`'s type in 16-byte vectors.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    pub(super) unsafe fn launch_vectors(
        &self,
        name: &str,
        like: &Tensor,
        rows: usize,
        cols: usize,
        args: Args,
    ) -> Result<()> {
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let blocks = self.blocks(rows * cols.div_ceil(16 / like.dtype().size()));
        // SAFETY: the caller's promise.
        unsafe { self.launch(name, blocks, THREADS, 0, args, || format!("({rows}, {cols}) of {like:?}")) }
    }
}
