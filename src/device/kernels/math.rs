//! Matrix products, elementwise operations, softmax, row sums and norms.

use crate::error::Result;
use crate::tensor::Tensor;

/// Matrix products, elementwise operations, softmax, row sums and norms.
pub trait MathKernels: Send + Sync {
    /// `c = alpha·a·b + beta·c`, batched over the leading dimensions.
    ///
    /// a: (…, m, k), b: (…, k, n), c: (…, m, n), rank 2 or more. Any strides: transposed operands (`t()`) take no copy.
    /// Leading dimensions of a and b are those of c, or absent (rank 2: the same matrix for every batch), or have
    /// stride 0. a and b share a float dtype; c has it too, or acc. With `beta` 0, c is not read.
    fn gemm(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()>;

    /// `out = a + b`. b's shape is a's, or a's last dimensions (then it is repeated). `out` may be `a` itself.
    fn add(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()>;

    /// `out = a · b`, elementwise; shapes as in [`MathKernels::add`]. `out` may be `a` itself.
    fn mul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()>;

    /// `y = alpha·x + beta·y`, same shape; dtypes may differ (both floats). With `beta` 0, y is not read.
    fn axpby(&self, alpha: f64, x: &Tensor, beta: f64, y: &Tensor) -> Result<()>;

    /// `out += Σ_r x[r]` for x as rows (R, N), out (N) of x's type or acc; summed in acc over r ascending in fixed blocks.
    fn sum_rows(&self, x: &Tensor, out: &Tensor) -> Result<()>;

    /// `y = softmax(x)` over the last dimension; same shape; y has x's type or acc.
    fn softmax(&self, x: &Tensor, y: &Tensor) -> Result<()>;

    /// `dx = y·(dy − Σ dy·y)` over the last dimension.
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()>;

    /// `y = 1 / (1 + e^−x)`.
    fn sigmoid(&self, x: &Tensor, y: &Tensor) -> Result<()>;

    /// `dx = dy·y·(1 − y)`.
    fn sigmoid_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()>;

    /// L1 normalisation of non-negative rows: `y[r] = scale·x[r] / (Σ_j x[r,j] + eps)`; x, y: (R, N).
    fn normalise_sum(&self, x: &Tensor, scale: f64, eps: f64, y: &Tensor) -> Result<()>;

    /// `dx` of [`MathKernels::normalise_sum`] from x, its output y and dy.
    fn normalise_sum_backward(
        &self,
        x: &Tensor,
        y: &Tensor,
        scale: f64,
        eps: f64,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<()>;

    /// L2 normalisation of rows: `y[r] = x[r] / max(‖x[r]‖, eps)`, `norm[r] = max(‖x[r]‖, eps)`; x, y: (R, N), norm: (R) acc.
    fn normalise_l2(&self, x: &Tensor, eps: f64, y: &Tensor, norm: &Tensor) -> Result<()>;

    /// `dx[r] = (dy[r] − y[r]·(y[r]·dy[r])) / norm[r]` (the row's norm above eps; at eps, `dy[r] / eps`).
    fn normalise_l2_backward(&self, y: &Tensor, norm: &Tensor, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<()>;

    /// `out[0] += Σ a·b` over all elements, out: (1) acc; fixed blocks, ascending.
    fn dot(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()>;
}
