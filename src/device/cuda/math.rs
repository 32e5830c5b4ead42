//! Elementwise operations, softmax, row sums and norms.

use super::args::{Args, suffix};
use super::backend::{Cuda, THREADS};
use crate::device::check::{apart, expect, in_place, same, same_or_acc};
use crate::device::{MathKernels, check};
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Up to this width a warp takes a row, a block above (`kernels/common/rows.cuh`).
const WARP_ROW_LIMIT: usize = 1024;

impl MathKernels for Cuda {
    fn gemm(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> {
        super::gemm::gemm(self, alpha, a, b, beta, c)
    }

    fn add(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        self.binary("add", a, b, out)
    }

    fn mul(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        self.binary("mul", a, b, out)
    }

    fn axpby(&self, alpha: f64, x: &Tensor, beta: f64, y: &Tensor) -> Result<()> {
        if x.shape() != y.shape() {
            shape_err!("axpby: x is {}, y is {}", x.shape(), y.shape());
        }
        self.row_major("axpby", &[x, y])?;
        apart("axpby", x, y)?;
        let name = format!("axpby_{}_{}", self.suffix("axpby", x)?, self.suffix("axpby", y)?);
        let args = Args::new().float(alpha).tensor(x).float(beta).tensor(y).size(x.elements());
        let narrow = if x.dtype().size() < y.dtype().size() { x } else { y };
        // SAFETY: the kernel's parameters; x and y hold that many elements and share none.
        unsafe { self.launch_vectors(&name, narrow, 1, x.elements(), args) }
    }

    fn sum_rows(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        let (rows, width) = x.rows();
        if out.elements() != width {
            shape_err!("sum_rows: rows of {width} into {}", out.shape());
        }
        same_or_acc("sum_rows", x, out)?;
        self.row_major("sum_rows", &[x, out])?;
        apart("sum_rows", x, out)?;
        let (from, to) = (self.suffix("sum_rows", x)?, self.suffix("sum_rows", out)?);
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let cut = RowSum::new(rows, width, 16 / x.dtype().size());
        let partial = self.allocate([cut.chunks, width].into(), DType::F32)?;
        let args = Args::new().tensor(x).size(rows).size(width).size(cut.chunk).int(cut.across as i32).tensor(&partial);
        let (name, grid) = (format!("sum_rows_partial_{from}"), (cut.tiles as u32, cut.chunks as u32));
        // SAFETY: the kernel's parameters; the grid covers x's columns and rows, and partial has a row per chunk.
        unsafe { self.launch(&name, grid, 256, 0, args, || format!("{x:?}"))? };
        let args = Args::new().tensor(&partial).size(cut.chunks).size(width).tensor(out);
        let (name, warps) = (format!("sum_rows_finish_{to}"), cut.chunks.min(32) as u32);
        // SAFETY: as above; out holds a row.
        unsafe { self.launch(&name, width.div_ceil(32) as u32, warps * 32, 0, args, || format!("{out:?}")) }
    }

    fn softmax(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        if x.shape() != y.shape() {
            shape_err!("softmax: x is {}, y is {}", x.shape(), y.shape());
        }
        same_or_acc("softmax", x, y)?;
        self.row_major("softmax", &[x, y])?;
        apart("softmax", x, y)?;
        let name = format!("softmax_forward_{}_{}", self.suffix("softmax", x)?, self.suffix("softmax", y)?);
        let (rows, cols) = x.rows();
        let args = Args::new().tensor(x).tensor(y).size(rows).size(cols);
        // SAFETY: the kernel's parameters; x and y hold (rows, cols) and share nothing.
        unsafe { self.launch_by_rows(&name, x, args) }
    }

    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        let name = self.rowwise("softmax_backward", "softmax_backward", y, &[dy], dx)?;
        let (rows, cols) = y.rows();
        let args = Args::new().tensor(y).tensor(dy).tensor(dx).size(rows).size(cols);
        // SAFETY: the kernel's parameters; all hold (rows, cols), dx shares nothing with the others.
        unsafe { self.launch_by_rows(&name, y, args) }
    }

    fn sigmoid(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let name = self.rowwise("sigmoid", "sigmoid_forward", x, &[], y)?;
        let args = Args::new().tensor(x).tensor(y).size(x.elements());
        // SAFETY: the kernel's parameters; x and y hold that many elements and share none.
        unsafe { self.launch_vectors(&name, x, 1, x.elements(), args) }
    }

    fn sigmoid_backward(&self, y: &Tensor, dy: &Tensor, dx: &Tensor) -> Result<()> {
        let name = self.rowwise("sigmoid_backward", "sigmoid_backward", y, &[dy], dx)?;
        let args = Args::new().tensor(y).tensor(dy).tensor(dx).size(y.elements());
        // SAFETY: as above.
        unsafe { self.launch_vectors(&name, y, 1, y.elements(), args) }
    }

    fn normalise_sum(&self, x: &Tensor, scale: f64, eps: f64, y: &Tensor) -> Result<()> {
        let name = self.rowwise("normalise_sum", "normalise_sum_forward", x, &[], y)?;
        let (rows, cols) = x.rows();
        let args = Args::new().tensor(x).float(scale).float(eps).tensor(y).size(rows).size(cols);
        // SAFETY: the kernel's parameters; x and y hold (rows, cols) and share nothing.
        unsafe { self.launch_by_rows(&name, x, args) }
    }

    fn normalise_sum_backward(
        &self,
        x: &Tensor,
        y: &Tensor,
        scale: f64,
        eps: f64,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        let name = self.rowwise("normalise_sum_backward", "normalise_sum_backward", x, &[y, dy], dx)?;
        let (rows, cols) = x.rows();
        let args = Args::new().tensor(x).tensor(y).float(scale).float(eps).tensor(dy).tensor(dx);
        // SAFETY: the kernel's parameters; all hold (rows, cols), dx shares nothing with the others.
        unsafe { self.launch_by_rows(&name, x, args.size(rows).size(cols)) }
    }

    fn normalise_l2(&self, x: &Tensor, eps: f64, y: &Tensor, norm: &Tensor) -> Result<()> {
        let (rows, cols) = x.rows();
        if cols == 0 {
            shape_err!("normalise_l2 of {}: rows are empty", x.shape());
        }
        expect("normalise_l2", "norm", norm, &[rows], x.dtype().accumulate())?;
        self.row_major("normalise_l2", &[norm])?;
        [x, y].into_iter().try_for_each(|t| apart("normalise_l2", t, norm))?;
        let name = self.rowwise("normalise_l2", "normalise_l2_forward", x, &[], y)?;
        let args = Args::new().tensor(x).float(eps).tensor(y).tensor(norm).size(rows).size(cols);
        // SAFETY: the kernel's parameters; x and y hold (rows, cols), norm a value per row, and none share memory.
        unsafe { self.launch_by_rows(&name, x, args) }
    }

    fn normalise_l2_backward(&self, y: &Tensor, norm: &Tensor, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<()> {
        let (rows, cols) = y.rows();
        expect("normalise_l2_backward", "norm", norm, &[rows], y.dtype().accumulate())?;
        self.row_major("normalise_l2_backward", &[norm])?;
        apart("normalise_l2_backward", norm, dx)?;
        let name = self.rowwise("normalise_l2_backward", "normalise_l2_backward", y, &[dy], dx)?;
        let args = Args::new().tensor(y).tensor(norm).float(eps).tensor(dy).tensor(dx).size(rows).size(cols);
        // SAFETY: as in the forward.
        unsafe { self.launch_by_rows(&name, y, args) }
    }

    fn dot(&self, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        same("dot", a, &[b])?;
        expect("dot", "out", out, &[1], a.dtype().accumulate())?;
        self.row_major("dot", &[a, b, out])?;
        [a, b].into_iter().try_for_each(|t| apart("dot", t, out))?;
        let name = format!("dot_partial_{}", self.suffix("dot", a)?);
        let n = a.elements();
        if n == 0 {
            return Ok(());
        }
        // From the length alone: the order of additions must not depend on the GPU.
        let blocks = n.div_ceil(8192).min(1024);
        let partial = self.allocate([blocks].into(), DType::F32)?;
        let args = Args::new().tensor(a).tensor(b).size(n).tensor(&partial);
        // SAFETY: the kernel's parameters; a and b hold n elements, partial one per block.
        unsafe { self.launch(&name, blocks as u32, THREADS, 0, args, || format!("{a:?}"))? };
        let args = Args::new().tensor(&partial).size(blocks).tensor(out);
        // SAFETY: as above; out holds one.
        unsafe { self.launch("dot_finish", 1, 1024, 0, args, || format!("{blocks} partial sums")) }
    }
}

impl Cuda {
    fn binary(&self, op: &str, a: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
        check::binary(op, a, b, out)?;
        self.row_major(op, &[a, b, out])?;
        in_place(op, a, out)?;
        apart(op, b, out)?;
        let name = format!("binary_{op}_{}", self.suffix(op, a)?);
        let width = b.elements();
        if a.elements() == 0 {
            return Ok(());
        }
        let rows = a.elements() / width;
        let args = Args::new().tensor(a).tensor(b).tensor(out).size(rows).size(width);
        // SAFETY: the kernel's parameters; a and out hold (rows, width), b (width); out is a or apart, and apart from b.
        unsafe { self.launch_vectors(&name, a, 1, a.elements(), args) }
    }

    /// Checks an operation on contiguous tensors of `first`'s shape and dtype whose output is apart from them; the name
    /// of its kernel.
    fn rowwise(&self, op: &str, kernel: &str, first: &Tensor, others: &[&Tensor], out: &Tensor) -> Result<String> {
        same(op, first, others)?;
        same(op, first, &[out])?;
        self.row_major(op, others)?;
        self.row_major(op, &[first, out])?;
        apart(op, first, out)?;
        others.iter().try_for_each(|t| apart(op, t, out))?;
        match suffix(first.dtype()) {
            Some(suffix) => Ok(format!("{kernel}_{suffix}")),
            None => self.suffix(op, first).map(String::from),
        }
    }

    /// Launches a kernel that gives every row of `like` a warp or a block.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    pub(super) unsafe fn launch_by_rows(&self, name: &str, like: &Tensor, args: Args) -> Result<()> {
        let (rows, cols) = like.rows();
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        // Kernels of 256 threads: eight warps.
        let wanted = if cols <= WARP_ROW_LIMIT { rows.div_ceil(8) } else { rows };
        let blocks = wanted.min(self.blocks(usize::MAX) as usize) as u32;
        // SAFETY: the caller's promise.
        unsafe { self.launch(name, blocks, THREADS, 0, args, || format!("{like:?}")) }
    }
}

/// How the sum of rows is cut: from the shape and the type alone, so that the order of additions is.
#[derive(Debug, PartialEq, Eq)]
struct RowSum {
    /// Threads of a block side by side, a power of two up to 32; the others of its 256 take other rows.
    across: usize,
    /// Blocks side by side.
    tiles: usize,
    /// Rows of a block.
    chunk: usize,
    /// Blocks one below the other.
    chunks: usize,
}

impl RowSum {
    /// For rows of `width`; `vector` elements are 16 bytes.
    fn new(rows: usize, width: usize, vector: usize) -> Self {
        let vectors = if width.is_multiple_of(vector) { width / vector } else { width };
        let across = vectors.next_power_of_two().min(32);
        let tiles = vectors.div_ceil(across);
        // About four blocks per multiprocessor of the GPUs in view, each with a few rows per thread at least.
        let least = 4 * 256 / across;
        let chunks = 512_usize.div_ceil(tiles).min(rows.div_ceil(least)).max(1);
        let chunk = rows.div_ceil(chunks);
        RowSum { across, tiles, chunk, chunks: rows.div_ceil(chunk) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_rows_cover_every_element_once() {
        for rows in [1, 2, 31, 1000, 8192, 1 << 20] {
            for width in [1, 2, 7, 8, 100, 128, 1001, 6400, 100_000] {
                for vector in [4, 8] {
                    let cut = RowSum::new(rows, width, vector);
                    let vectors = if width % vector == 0 { width / vector } else { width };
                    assert!(cut.across.is_power_of_two() && 256 % cut.across == 0, "{cut:?}");
                    assert!(cut.tiles * cut.across >= vectors && (cut.tiles - 1) * cut.across < vectors, "{cut:?}");
                    assert!(cut.chunks * cut.chunk >= rows && (cut.chunks - 1) * cut.chunk < rows, "{cut:?}");
                    assert!(cut.chunks <= 512 && cut.chunks >= 1, "{cut:?}");
                }
            }
        }
        assert_eq!(RowSum::new(8192, 6400, 8), RowSum { across: 32, tiles: 25, chunk: 391, chunks: 21 });
        assert_eq!(RowSum::new(1 << 20, 1, 8), RowSum { across: 1, tiles: 1, chunk: 2048, chunks: 512 });
    }
}
