//! The matrix products of all experts' FFNs in one launch each, on Hopper (`kernels/expert/grouped_*.cu`).
//!
//! The rows of all experts lie in one bf16 buffer of a size fixed beforehand. `offsets`, (E + 1) i32 on the device, says
//! where each expert's rows begin: multiples of [`ROW_TILE`], what is left of a segment being rows of zeros, so that its
//! outputs are zero too and a gradient summed over rows needs no mask. Rows past the last offset are neither read nor
//! written. The host never learns the offsets: a step has no synchronisation here and can be captured in a graph.
//!
//! Weights are as Hugging Face has them, [out, in] for each expert. All widths are multiples of 8.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::args::Args;
use super::{Cuda, CudaError, Launch};
use crate::device::Gelu;
use crate::error::{Result, shape_err};
use crate::tensor::{DType, Tensor};

/// Every expert's rows begin at a multiple of this.
pub const ROW_TILE: usize = 128;

/// Columns of the boxes that an epilogue's inputs come in.
const INPUT_COLS: usize = 32;
/// Of the dimension that is summed over, per stage of the pipeline.
const DEPTH: usize = 64;
/// A producer warpgroup and two consumers.
const THREADS: u32 = 384;
/// Blocks of a cluster.
const CLUSTER: u32 = 2;
/// Dynamic shared memory: all that a block may have.
const SHARED: u32 = 227 << 10;

/// The shape that a kernel was compiled for: the numbers of `grouped_gemm.cuh`.
#[derive(Clone, Copy)]
struct Compiled {
    /// Columns of a tile, in the rows of all its weights.
    cols: usize,
    /// Weights side by side in a tile.
    weights: usize,
    /// Whether the second operand's own dimension is the contiguous one, not the one summed over.
    transposed: bool,
}

impl Compiled {
    /// Columns of the output that a tile covers.
    fn width(self) -> usize {
        self.cols / self.weights
    }

    /// Of the compiled widths the one that spends the least on `n` columns, sums over `depth`.
    fn choose(widths: &[Width], n: usize, depth: usize, weights: usize, transposed: bool) -> Self {
        let cost = |width: &&Width| n.div_ceil(width.cols / weights) * width.at(depth);
        let cols = widths.iter().min_by_key(cost).map_or(0, |width| width.cols);
        Compiled { cols, weights, transposed }
    }
}

/// A width of tiles that a kernel is compiled for, the last part of its entry point's name.
struct Width {
    cols: usize,
    /// What a tile takes, in the time of one column's products: its columns; what every tile takes; and, where the second
    /// operand comes in boxes of 64 columns that do not divide the tile, some of what is loaded for nothing and of what it
    /// costs that the boxes begin within lines of memory. Fitted to measurements on an H200.
    cost: usize,
    /// What comes on top where no other tile is multiplied while a tile's results are written, times the depth of the sums.
    pause: usize,
}

impl Width {
    fn at(&self, depth: usize) -> usize {
        self.cost + self.pause / depth.max(1)
    }
}

const fn width(cols: usize, cost: usize) -> Width {
    Width { cols, cost, pause: 0 }
}

/// 256 columns, of which both consumers take a half of the rows.
const WIDE: Width = Width { cols: 256, cost: 271, pause: 62_000 };

const LINEAR: [Width; 2] = [width(208, 224), width(192, 208)];
const LINEAR_GELU: [Width; 1] = [width(208, 224)];
const LINEAR_SWIGLU: [Width; 2] = [width(208, 224), width(192, 208)];
const DATA: [Width; 2] = [width(208, 230), width(192, 208)];
const DATA_PAIRS: [Width; 2] = [width(192, 208), WIDE];
const DATA_GELU: [Width; 2] = [width(192, 208), width(128, 139)];
const DATA_SWIGLU: [Width; 2] = [width(192, 208), width(128, 141)];
const WEIGHT: [Width; 3] = [width(192, 208), width(208, 230), WIDE];

/// The kernels' `Maps`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Maps {
    a: [sys::CUtensorMap; 2],
    b: [sys::CUtensorMap; 2],
    inputs: [sys::CUtensorMap; 2],
}

/// The kernels' `RowTilesArgs`.
#[repr(C)]
struct RowTiles {
    offsets: u64,
    counts: u64,
    experts: i32,
    cols: i32,
    steps: i32,
}

/// The kernels' `WeightTilesArgs`.
#[repr(C)]
struct WeightTiles {
    offsets: u64,
    counts: u64,
    experts: i32,
    rows: i32,
    all_rows: i32,
    cols: i32,
    past_end: i32,
}

/// The kernels' `PlainArgs`.
#[repr(C)]
struct Plain {
    d: u64,
    rows: i32,
    cols: i32,
}

/// The kernels' `WeightArgs`.
#[repr(C)]
struct Weight {
    d: [u64; 2],
    rows: i32,
    cols: i32,
    accumulate: i32,
}

/// The kernels' `ForwardArgs`.
#[repr(C)]
struct Forward {
    pre: [u64; 2],
    act: u64,
    rows: i32,
    cols: i32,
}

/// The kernels' `BackwardArgs`.
#[repr(C)]
struct Backward {
    pre: [u64; 2],
    d_pre: [u64; 2],
    act: u64,
    weight: u64,
    partial: u64,
    rows: i32,
    cols: i32,
}

/// What scales the rows in a backward with an activation.
#[derive(Clone, Copy, Debug)]
pub struct RowScale<'a> {
    /// (R) f32: each row's combine weight.
    pub weight: &'a Tensor,
    /// ([`Cuda::hopper_partials_swiglu`] or [`Cuda::hopper_partials_gelu`], R) f32: receives, for every row, shares of the gradient of its weight;
    /// [`Cuda::hopper_partials_sum`] adds them up.
    pub partial: &'a Tensor,
}

/// Where every expert's rows lie. Made of `offsets` alone, too: `(&offsets).into()`.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// (E + 1) i32: multiples of [`ROW_TILE`], the last no more than the buffer has rows.
    pub offsets: &'a Tensor,
    /// (E) i32: how many of its rows an expert has really, the rest filling its last tile. Where this is known, half tiles
    /// of filling are not multiplied (their results are zeros all the same).
    pub counts: Option<&'a Tensor>,
}

impl<'a> From<&'a Tensor> for Blocks<'a> {
    fn from(offsets: &'a Tensor) -> Self {
        Blocks { offsets, counts: None }
    }
}

fn address(t: Option<&Tensor>) -> u64 {
    t.map_or(0, |t| t.ptr() as u64)
}

/// A contiguous (z, y, x) bf16 tensor, copied in boxes of `cols` x by `rows` y, swizzled over the bytes of a box's row: 64 x
/// or [`INPUT_COLS`].
fn map(t: &Tensor, [z, y, x]: [usize; 3], [rows, cols]: [usize; 2]) -> Result<sys::CUtensorMap> {
    let size = [x as u64, y as u64, z as u64];
    let stride = [2 * x as u64, 2 * (x * y) as u64];
    let (of_box, step) = ([cols as u32, rows as u32, 1], [1; 3]);
    let swizzle = if cols == 64 {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
    } else {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B
    };
    let mut map = MaybeUninit::zeroed();
    // SAFETY: the arrays are as long as a rank of 3 needs, and the call writes no more than the map; the driver is loaded,
    // `t` being on a GPU.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            t.ptr().cast(),
            size.as_ptr(),
            stride.as_ptr(),
            of_box.as_ptr(),
            step.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map_err(CudaError::driver(format!("describing {t:?} to the copy engine")))?;
    // SAFETY: zeroed, and filled by the call.
    Ok(unsafe { map.assume_init() })
}

fn data_swiglu(hidden: usize) -> Compiled {
    Compiled::choose(&DATA_SWIGLU, hidden, 1, 1, true)
}

fn data_gelu(hidden: usize) -> Compiled {
    Compiled::choose(&DATA_GELU, hidden, 1, 1, true)
}

fn width_of(t: Option<&Tensor>) -> usize {
    t.and_then(|t| t.shape().dims().last().copied()).unwrap_or(0)
}

/// (R, K) rows, as the first operand.
fn rows_map(t: &Tensor) -> Result<sys::CUtensorMap> {
    map(t, [1, t.dim(0), t.dim(1)], [64, 64])
}

impl Cuda {
    /// Whether this GPU runs the grouped products: Hopper, compute capability 9.0.
    #[must_use]
    pub fn has_hopper(&self) -> bool {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        matches!((self.context().attribute(MAJOR), self.context().attribute(MINOR)), (Ok(9), Ok(0)))
    }

    /// `y = x·wᵀ` for every expert's rows: x (R, K), w (E, N, K), y (R, N).
    ///
    /// # Errors
    /// If a shape, dtype or device does not fit, or the launch fails.
    pub fn hopper_linear<'a>(&self, rows: impl Into<Blocks<'a>>, x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
        let op = "grouped_linear";
        let g = Problem::new(self, op, rows.into(), x, width_of(Some(y)), &[w], false)?;
        g.rows(self, &[("y", Some(y))])?;
        let compiled = Compiled::choose(&LINEAR, g.n, g.k, 1, false);
        let args = Plain { d: address(Some(y)), rows: g.r as i32, cols: g.n as i32 };
        g.launch(self, op, compiled, &[x], &[w], &[], args)
    }

    /// `pre = x·wᵀ`, `act = gelu(pre)`: x (R, K), w (E, N, K), pre and act (R, N). Without `pre` only act is written.
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    pub fn hopper_linear_gelu<'a>(
        &self,
        form: Gelu,
        rows: impl Into<Blocks<'a>>,
        x: &Tensor,
        w: &Tensor,
        pre: Option<&Tensor>,
        act: &Tensor,
    ) -> Result<()> {
        let op = match form {
            Gelu::Erf => "grouped_linear_gelu",
            Gelu::Tanh => "grouped_linear_gelu_tanh",
        };
        let g = Problem::new(self, op, rows.into(), x, width_of(Some(act)), &[w], false)?;
        g.rows(self, &[("pre", pre), ("act", Some(act))])?;
        let compiled = Compiled::choose(&LINEAR_GELU, g.n, g.k, 1, false);
        let args = Forward { pre: [address(pre), 0], act: address(Some(act)), rows: g.r as i32, cols: g.n as i32 };
        g.launch(self, op, compiled, &[x], &[w], &[], args)
    }

    /// `gate = x·w1ᵀ`, `up = x·w3ᵀ`, `act = silu(gate)·up`: x (R, K), w1 and w3 (E, N, K), the rest (R, N). Without
    /// `gate_up` only act is written.
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    pub fn hopper_linear_swiglu<'a>(
        &self,
        rows: impl Into<Blocks<'a>>,
        x: &Tensor,
        w1: &Tensor,
        w3: &Tensor,
        gate_up: Option<(&Tensor, &Tensor)>,
        act: &Tensor,
    ) -> Result<()> {
        let op = "grouped_linear_swiglu";
        let g = Problem::new(self, op, rows.into(), x, width_of(Some(act)), &[w1, w3], false)?;
        let (gate, up) = gate_up.unzip();
        g.rows(self, &[("gate", gate), ("up", up), ("act", Some(act))])?;
        let compiled = Compiled::choose(&LINEAR_SWIGLU, g.n, g.k, 2, false);
        let args =
            Forward { pre: [address(gate), address(up)], act: address(Some(act)), rows: g.r as i32, cols: g.n as i32 };
        g.launch(self, op, compiled, &[x], &[w1, w3], &[], args)
    }

    /// `dx = Σ dy·w` over one or two pairs of dy (R, N) and w (E, N, K), dx (R, K): one sum, rounded once.
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    pub fn hopper_data<'a>(
        &self,
        rows: impl Into<Blocks<'a>>,
        pairs: &[(&Tensor, &Tensor)],
        dx: &Tensor,
    ) -> Result<()> {
        let (dys, ws): (Vec<&Tensor>, Vec<&Tensor>) = pairs.iter().copied().unzip();
        let op = match pairs.len() {
            1 => "grouped_data",
            2 => "grouped_data_pairs",
            n => shape_err!("grouped_data of {n} pairs: there must be 1 or 2"),
        };
        let g = Problem::new(self, op, rows.into(), dys[0], width_of(Some(dx)), &ws, true)?;
        if dys[1..].iter().any(|dy| dy.shape() != dys[0].shape() || dy.dtype() != DType::BF16) {
            shape_err!("{op}: dy {:?} and {:?} must be bf16 of one shape", dys[0], dys[1]);
        }
        self.row_major(op, &dys)?;
        g.rows(self, &[("dx", Some(dx))])?;
        let widths = if pairs.len() == 1 { &DATA } else { &DATA_PAIRS };
        let compiled = Compiled::choose(widths, g.n, g.k * pairs.len(), 1, true);
        let args = Plain { d: address(Some(dx)), rows: g.r as i32, cols: g.n as i32 };
        g.launch(self, op, compiled, &dys, &ws, &[], args)
    }

    /// The rows of [`RowScale::partial`] for [`Cuda::hopper_data_swiglu`] at an inner width of `hidden`.
    #[must_use]
    pub fn hopper_partials_swiglu(hidden: usize) -> usize {
        hidden.div_ceil(data_swiglu(hidden).width())
    }

    /// The rows of [`RowScale::partial`] for [`Cuda::hopper_data_gelu`] at an inner width of `hidden`.
    #[must_use]
    pub fn hopper_partials_gelu(hidden: usize) -> usize {
        hidden.div_ceil(data_gelu(hidden).width())
    }

    /// The gradient of every row's combine weight from the shares that [`RowScale::partial`] received: (P, R) to (R),
    /// added in order. Rows past the last offset get zero.
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    pub fn hopper_partials_sum(&self, offsets: &Tensor, partial: &Tensor, d_weight: &Tensor) -> Result<()> {
        let op = "grouped_partials_sum";
        self.row_major(op, &[offsets, partial, d_weight])?;
        if partial.rank() != 2
            || d_weight.shape().dims() != [partial.dim(1)]
            || [partial, d_weight].iter().any(|t| t.dtype() != DType::F32)
            || offsets.rank() != 1
            || offsets.dtype() != DType::I32
            || offsets.elements() == 0
        {
            shape_err!("{op} of {partial:?} by {offsets:?} to {d_weight:?}: f32 (P, R), i32 (E + 1) and f32 (R)");
        }
        let (tiles, rows) = (partial.dim(0), partial.dim(1));
        let args = Args::new()
            .tensor(offsets)
            .int((offsets.elements() - 1) as i32)
            .tensor(partial)
            .int(tiles as i32)
            .tensor(d_weight)
            .int(rows as i32);
        // SAFETY: the kernel's parameters; the shapes were checked.
        unsafe { self.launch(op, self.blocks(rows), 256, 0, args, || format!("({tiles}, {rows})")) }
    }

    /// SwiGLU's backward at the end of the product that it starts from. With d = dy·w2 for an output gradient dy (R, M)
    /// that no combine weight has scaled yet, w2 (E, M, H), and v each row's weight (1 without `scale`): `d_gate =
    /// v·d·up·silu'(gate)`, `d_up = v·d·silu(gate)`, `act = v·silu(gate)·up`, the operand of w2's gradient, and the
    /// shares of v's gradient, d·silu(gate)·up summed over the row. The rest (R, H).
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    #[allow(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    pub fn hopper_data_swiglu<'a>(
        &self,
        rows: impl Into<Blocks<'a>>,
        dy: &Tensor,
        w2: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        scale: Option<RowScale<'_>>,
        d_gate: &Tensor,
        d_up: &Tensor,
        act: Option<&Tensor>,
    ) -> Result<()> {
        let compiled = data_swiglu(width_of(Some(gate)));
        self.data_act(
            "grouped_data_swiglu",
            rows.into(),
            compiled,
            dy,
            w2,
            [Some(gate), Some(up)],
            scale,
            [Some(d_gate), Some(d_up)],
            act,
        )
    }

    /// GELU's backward likewise: `d_pre = v·d·gelu'(pre)`, `act = v·gelu(pre)`, and the shares of v's gradient.
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    #[allow(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    pub fn hopper_data_gelu<'a>(
        &self,
        form: Gelu,
        rows: impl Into<Blocks<'a>>,
        dy: &Tensor,
        w2: &Tensor,
        pre: &Tensor,
        scale: Option<RowScale<'_>>,
        d_pre: &Tensor,
        act: Option<&Tensor>,
    ) -> Result<()> {
        let op = match form {
            Gelu::Erf => "grouped_data_gelu",
            Gelu::Tanh => "grouped_data_gelu_tanh",
        };
        self.data_act(
            op,
            rows.into(),
            data_gelu(width_of(Some(pre))),
            dy,
            w2,
            [Some(pre), None],
            scale,
            [Some(d_pre), None],
            act,
        )
    }

    #[allow(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    fn data_act(
        &self,
        op: &str,
        rows: Blocks<'_>,
        compiled: Compiled,
        dy: &Tensor,
        w2: &Tensor,
        pre: [Option<&Tensor>; 2],
        scale: Option<RowScale<'_>>,
        d_pre: [Option<&Tensor>; 2],
        act: Option<&Tensor>,
    ) -> Result<()> {
        let hidden = width_of(pre[0]);
        let g = Problem::new(self, op, rows, dy, hidden, &[w2], true)?;
        g.rows(self, &[("gate", pre[0]), ("up", pre[1])])?;
        g.rows(self, &[("d_gate", d_pre[0]), ("d_up", d_pre[1]), ("act", act)])?;
        if let Some(RowScale { weight, partial }) = scale {
            self.row_major(op, &[weight, partial])?;
            let tiles = hidden.div_ceil(compiled.width());
            if weight.shape().dims() != [g.r]
                || partial.shape().dims() != [tiles, g.r]
                || [weight, partial].iter().any(|t| t.dtype() != DType::F32)
            {
                shape_err!("{op}: weight {weight:?}, partial {partial:?}: f32 ({}) and ({tiles}, {})", g.r, g.r);
            }
        }
        let args = Backward {
            pre: pre.map(address),
            d_pre: d_pre.map(address),
            act: address(act),
            weight: address(scale.map(|s| s.weight)),
            partial: address(scale.map(|s| s.partial)),
            rows: g.r as i32,
            cols: g.n as i32,
        };
        let inputs: Vec<&Tensor> = pre.into_iter().flatten().collect();
        g.launch(self, op, compiled, &[dy], &[w2], &inputs, args)
    }

    /// `dw = dyᵀ·x` over each expert's rows, or `dw +=` it, for one or two pairs of dy (R, N) and dw (E, N, K) that share
    /// x (R, K).
    ///
    /// # Errors
    /// As [`Cuda::hopper_linear`].
    pub fn hopper_weight<'a>(
        &self,
        rows: impl Into<Blocks<'a>>,
        pairs: &[(&Tensor, &Tensor)],
        x: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let op = "grouped_weight";
        let (dys, dws): (Vec<&Tensor>, Vec<&Tensor>) = pairs.iter().copied().unzip();
        if pairs.is_empty() || pairs.len() > 2 {
            shape_err!("{op} of {} pairs: there must be 1 or 2", pairs.len());
        }
        // Checked as the forward product that it is the gradient of.
        let g = Problem::new(self, op, rows.into(), x, width_of(Some(dys[0])), &dws, false)?;
        for &dy in &dys {
            g.rows(self, &[("dy", Some(dy))])?;
        }
        let tiles = g.n.div_ceil(ROW_TILE);
        // The tiles' number is known here: what counts is how often the GPU is filled with them.
        let multiprocessors = self.multiprocessors() as usize;
        let depth = g.r / g.e;
        let waves = |cols: usize| (g.e * tiles * pairs.len() * g.k.div_ceil(cols)).div_ceil(multiprocessors);
        let cost = |w: &&Width| waves(w.cols) * w.at(depth);
        let cols = WEIGHT.iter().min_by_key(cost).map_or(0, |w| w.cols);
        let compiled = Compiled { cols, weights: 1, transposed: true };
        let blank = rows_map(x)?;
        let mut maps = Maps { a: [blank; 2], b: [blank; 2], inputs: [blank; 2] };
        for (map, dy) in maps.a.iter_mut().zip(&dys) {
            *map = rows_map(dy)?;
        }
        let schedule = WeightTiles {
            offsets: g.offsets,
            counts: g.counts,
            experts: g.e as i32,
            rows: tiles as i32,
            all_rows: (tiles * pairs.len()) as i32,
            cols: g.k.div_ceil(compiled.width()) as i32,
            past_end: g.r as i32,
        };
        let args = Weight {
            d: [address(dws.first().copied()), address(dws.get(1).copied())],
            rows: g.n as i32,
            cols: g.k as i32,
            accumulate: i32::from(accumulate),
        };
        g.put(self, op, compiled, maps, schedule, args)
    }
}

/// A product `(R, K) · (E, …) -> (R, N)` whose operands fit.
struct Problem {
    op: String,
    offsets: u64,
    counts: u64,
    e: usize,
    r: usize,
    n: usize,
    k: usize,
}

impl Problem {
    /// Rows `x` (R, K) and `weights`, each (E, N, K), or (E, K, N) if `transposed`.
    fn new(
        cuda: &Cuda,
        op: &str,
        Blocks { offsets, counts }: Blocks<'_>,
        x: &Tensor,
        n: usize,
        weights: &[&Tensor],
        transposed: bool,
    ) -> Result<Self> {
        if !cuda.has_hopper() {
            shape_err!(
                "{op}: it needs a GPU of compute capability 9.0, which {} is not",
                crate::tensor::Place::Cuda(cuda.ordinal())
            );
        }
        cuda.row_major(op, &[offsets, x])?;
        cuda.row_major(op, weights)?;
        if offsets.rank() != 1 || offsets.dtype() != DType::I32 || offsets.elements() < 2 {
            shape_err!("{op}: offsets {offsets:?} must be (E + 1) i32 for at least one expert");
        }
        if x.rank() != 2 {
            shape_err!("{op}: rows {x:?} must be a matrix");
        }
        let (e, r, k) = (offsets.elements() - 1, x.dim(0), x.dim(1));
        if let Some(counts) = counts {
            cuda.row_major(op, &[counts])?;
            if counts.shape().dims() != [e] || counts.dtype() != DType::I32 {
                shape_err!("{op}: counts {counts:?} must be ({e}) i32");
            }
        }
        let right = if transposed { [e, k, n] } else { [e, n, k] };
        if let Some(w) = weights.iter().find(|w| w.shape().dims() != right) {
            shape_err!("{op}: weight {w:?} must be of shape {right:?} for rows {x:?} and {n} columns");
        }
        if let Some(t) = weights.iter().chain([&x]).find(|t| t.dtype() != DType::BF16) {
            shape_err!("{op}: {t:?} must be bf16");
        }
        if n == 0 || k == 0 || !n.is_multiple_of(8) || !k.is_multiple_of(8) {
            shape_err!("{op}: {x:?} to {n} columns: widths must be multiples of 8");
        }
        if r == 0 || r > i32::MAX as usize - ROW_TILE {
            shape_err!("{op}: {r} rows: between 1 and 2^31 - 129");
        }
        if let Some(t) = weights.iter().chain([&x]).find(|t| !(t.ptr() as usize).is_multiple_of(16)) {
            shape_err!("{op}: {t:?} must begin on a 16-byte boundary");
        }
        Ok(Problem { op: op.to_owned(), offsets: address(Some(offsets)), counts: address(counts), e, r, n, k })
    }

    /// Fails unless each tensor there is is bf16 (R, N).
    fn rows(&self, cuda: &Cuda, tensors: &[(&str, Option<&Tensor>)]) -> Result<()> {
        for (name, t) in tensors.iter().filter_map(|(name, t)| Some((name, (*t)?))) {
            cuda.row_major(&self.op, &[t])?;
            if t.shape().dims() != [self.r, self.n] || t.dtype() != DType::BF16 {
                shape_err!("{}: {name} {t:?} must be bf16 ({}, {})", self.op, self.r, self.n);
            }
            if !(t.ptr() as usize).is_multiple_of(16) {
                shape_err!("{}: {name} {t:?} must begin on a 16-byte boundary", self.op);
            }
        }
        Ok(())
    }

    /// Launches a kernel whose tiles are of rows: `a` (R, K) each, `b` the weights, `inputs` (R, N) what the epilogue
    /// reads.
    fn launch<T>(
        &self,
        cuda: &Cuda,
        op: &str,
        compiled: Compiled,
        a: &[&Tensor],
        b: &[&Tensor],
        inputs: &[&Tensor],
        args: T,
    ) -> Result<()> {
        let blank = rows_map(a[0])?;
        let mut maps = Maps { a: [blank; 2], b: [blank; 2], inputs: [blank; 2] };
        for (map, t) in maps.a.iter_mut().zip(a) {
            *map = rows_map(t)?;
        }
        for (out, w) in maps.b.iter_mut().zip(b) {
            // A K-major tile comes as two halves, an MN-major one in boxes of 64 columns.
            let rows = if compiled.transposed { 64 } else { compiled.cols / 2 };
            *out = map(w, [w.dim(0), w.dim(1), w.dim(2)], [rows, 64])?;
        }
        for (out, t) in maps.inputs.iter_mut().zip(inputs) {
            *out = map(t, [1, t.dim(0), t.dim(1)], [64, INPUT_COLS])?;
        }
        let schedule = RowTiles {
            offsets: self.offsets,
            counts: self.counts,
            experts: self.e as i32,
            cols: self.n.div_ceil(compiled.width()) as i32,
            steps: (self.k.div_ceil(DEPTH) * a.len()) as i32,
        };
        self.put(cuda, op, compiled, maps, schedule, args)
    }

    /// One block per multiprocessor, whatever the experts' rows.
    fn put<S, T>(
        &self,
        cuda: &Cuda,
        op: &str,
        compiled: Compiled,
        mut maps: Maps,
        mut schedule: S,
        mut args: T,
    ) -> Result<()> {
        let function = cuda.modules().function(&format!("{op}_bf16_{}", compiled.cols))?;
        let grid = (cuda.multiprocessors() / CLUSTER * CLUSTER).max(CLUSTER);
        let launch = Launch { grid: (grid, 1, 1), block: (THREADS, 1, 1), shared: SHARED };
        let mut pointers: [*mut c_void; 3] =
            [(&raw mut maps).cast(), (&raw mut schedule).cast(), (&raw mut args).cast()];
        // SAFETY: the kernels' three parameters, of these layouts; the tensors' shapes were checked, and their memory is
        // used in the order of the stream.
        unsafe {
            function.launch_with(cuda.stream(), launch, &mut pointers, || {
                format!("{} experts' rows of ({}, {}), {} columns", self.e, self.r, self.k, self.n)
            })
        }?;
        Ok(())
    }
}
