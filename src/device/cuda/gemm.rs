//! Batched matrix products over any strides, through cuBLAS.

use cudarc::cublas::{result, sys};

use super::backend::Cuda;
use super::blas::failed;
use crate::device::{MathKernels, MemoryKernels, check};
use crate::error::{Error, Result, shape_err};
use crate::tensor::{DType, Tensor};

/// A matrix as cuBLAS takes one: rows, or, turned, columns are contiguous and `ld` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    turned: bool,
    ld: usize,
}

impl Form {
    /// The form of the last two dimensions, if they have one.
    fn of(t: &Tensor) -> Option<Self> {
        let (rank, strides) = (t.rank(), t.layout().strides());
        Self::new([t.dim(rank - 2), t.dim(rank - 1)], [strides[rank - 2], strides[rank - 1]])
    }

    fn new([rows, cols]: [usize; 2], [row, col]: [usize; 2]) -> Option<Self> {
        // The stride of a dimension of one entry means nothing.
        let lead = |along: usize, along_stride: usize, across: usize, across_stride: usize| match across {
            _ if along != 1 && along_stride != 1 => None,
            1 => Some(along),
            _ => (across_stride >= along).then_some(across_stride),
        };
        let plain = lead(cols, col, rows, row).map(|ld| Form { turned: false, ld });
        plain.or_else(|| lead(rows, row, cols, col).map(|ld| Form { turned: true, ld }))
    }

    fn operation(self) -> sys::cublasOperation_t {
        if self.turned { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }
}

/// A batch dimension: its size, and its stride in a, b and c.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    size: usize,
    strides: [usize; 3],
}

/// The sizes of one product and the dimensions it is repeated over, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    m: usize,
    k: usize,
    n: usize,
    forms: [Form; 3],
    batches: Vec<Batch>,
}

impl Plan {
    /// Fewer, larger products: batch dimensions that follow each other in all three tensors are one, and a batch with
    /// one matrix b for all is rows of one product.
    fn new([m, k, n]: [usize; 3], forms: [Form; 3], lead: impl Iterator<Item = Batch>) -> Self {
        let mut batches: Vec<Batch> = Vec::new();
        for batch in lead.filter(|b| b.size != 1) {
            match batches.last_mut() {
                Some(outer) if (0..3).all(|i| outer.strides[i] == batch.strides[i] * batch.size) => {
                    *outer = Batch { size: outer.size * batch.size, ..batch };
                }
                _ => batches.push(batch),
            }
        }
        let mut plan = Plan { m, k, n, forms, batches };
        while plan.fold() {}
        plan
    }

    fn fold(&mut self) -> bool {
        let [a, _, c] = self.forms;
        let Some(&Batch { size, strides: [along_a, along_b, along_c] }) = self.batches.last() else { return false };
        if along_b != 0 || a.turned || c.turned {
            return false;
        }
        if self.m == 1 && along_a >= self.k && along_c >= self.n {
            (self.forms[0].ld, self.forms[2].ld) = (along_a, along_c);
        } else if self.m == 1 || along_a != self.m * a.ld || along_c != self.m * c.ld {
            return false;
        }
        self.m *= size;
        self.batches.pop();
        true
    }
}

/// [`MathKernels::gemm`].
pub(super) fn gemm(cuda: &Cuda, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> {
    cuda.on_device("gemm", &[a, b, c])?;
    let sizes @ [m, k, n] = check::gemm(a, b, c)?;
    cuda.suffix("gemm", a)?;
    if c.elements() == 0 {
        return Ok(());
    }
    if k == 0 {
        // beta·c alone, by a product of zeros.
        let zeros = |shape: [usize; 2]| -> Result<Tensor> {
            let t = cuda.allocate(shape.into(), a.dtype())?;
            cuda.fill(&t, 0.0)?;
            Ok(t)
        };
        return cuda.gemm(0.0, &zeros([m, 1])?, &zeros([1, n])?, beta, c);
    }
    let Some(form) = Form::of(c) else {
        let whole = cuda.allocate(*c.shape(), c.dtype())?;
        if beta != 0.0 {
            cuda.copy(c, &whole)?;
        }
        cuda.gemm(alpha, a, b, beta, &whole)?;
        return cuda.copy(&whole, c);
    };
    if form.turned {
        // cᵀ = bᵀ·aᵀ.
        return cuda.gemm(alpha, &b.t()?, &a.t()?, beta, &c.t()?);
    }
    let (a, a_form) = formed(cuda, a)?;
    let (b, b_form) = formed(cuda, b)?;
    let lead = c.rank() - 2;
    let stride = |t: &Tensor, d: usize| if t.rank() == 2 { 0 } else { t.layout().strides()[d] };
    let batches = (0..lead).map(|d| Batch { size: c.dim(d), strides: [&a, &b, c].map(|t| stride(t, d)) });
    let plan = Plan::new(sizes, [a_form, b_form, form], batches);
    run(cuda, &plan, alpha, &a, &b, beta, c)
}

/// The tensor, or a row-major copy where cuBLAS cannot take it.
fn formed(cuda: &Cuda, t: &Tensor) -> Result<(Tensor, Form)> {
    if let Some(form) = Form::of(t) {
        return Ok((t.clone(), form));
    }
    let copy = cuda.allocate(*t.shape(), t.dtype())?;
    cuda.copy(t, &copy)?;
    let ld = t.dim(t.rank() - 1);
    Ok((copy, Form { turned: false, ld }))
}

fn run(cuda: &Cuda, plan: &Plan, alpha: f64, a: &Tensor, b: &Tensor, beta: f64, c: &Tensor) -> Result<()> {
    cuda.bind()?;
    // One call takes the dimension with the most matrices; the rest are loops.
    let mut loops = plan.batches.clone();
    let most = (0..loops.len()).max_by_key(|&i| loops[i].size);
    let batch = most.map_or(Batch { size: 1, strides: [0; 3] }, |i| loops.remove(i));
    let calls: usize = loops.iter().map(|l| l.size).product();
    for call in 0..calls {
        let (mut left, mut offsets) = (call, [0; 3]);
        for l in loops.iter().rev() {
            (0..3).for_each(|i| offsets[i] += left % l.size * l.strides[i]);
            left /= l.size;
        }
        let at = |t: &Tensor, i: usize| t.ptr().wrapping_add(offsets[i] * t.dtype().size());
        product(cuda, plan, batch, alpha, [at(a, 0), at(b, 1), at(c, 2)], [a, b, c], beta)?;
    }
    Ok(())
}

/// `c = a·b + beta·c` for every [a, b, c], matrices of one dtype whose sizes may differ, in one call of cuBLAS.
pub(super) fn grouped(cuda: &Cuda, items: &[[Tensor; 3]], beta: f64) -> Result<()> {
    let formed = |item: &[Tensor; 3]| {
        let forms = [Form::of(&item[0])?, Form::of(&item[1])?, Form::of(&item[2])?];
        // Of no rows the product is zero, which the single call knows.
        (!forms[2].turned && item[0].dim(1) > 0).then_some(forms)
    };
    let (mut plans, mut grouped) = (Vec::new(), Vec::new());
    for item @ [a, b, c] in items {
        match formed(item) {
            Some(forms) => (plans.push(forms), grouped.push(item)),
            None => (cuda.gemm(1.0, a, b, beta, c)?, ()),
        };
    }
    let items = grouped;
    let Some([a, b, c]) = items.first() else { return Ok(()) };
    let types = [data_type(a), data_type(b), data_type(c)];
    for [a, b, c] in &items {
        cuda.on_device("gemm", &[a, b, c])?;
        check::gemm(a, b, c)?;
        cuda.suffix("gemm", a)?;
    }
    let say = || format!("gemm of {} experts, the first {a:?} by {b:?} into {c:?}", items.len());
    let int = |n: usize| -> Result<i32> {
        match i32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => shape_err!("{}: {n} is more than the 2³¹ − 1 that cuBLAS counts to", say()),
        }
    };
    let ints = |of: &dyn Fn(usize) -> usize| (0..items.len()).map(|i| int(of(i))).collect::<Result<Vec<i32>>>();
    let operations = |n: usize| plans.iter().map(|p| p[n].operation()).collect::<Vec<_>>();
    // The pointers of b, of a and of c, on the device, two i32 each.
    let pointers: Vec<i32> = [1, 0, 2]
        .iter()
        .flat_map(|&n| items.iter().map(move |item| item[n].ptr() as u64))
        .flat_map(|at| [at as u32 as i32, (at >> 32) as u32 as i32])
        .collect();
    let on_device = cuda.allocate([pointers.len()].into(), DType::I32)?;
    cuda.copy_from_host(&Tensor::from_slice(&pointers, [pointers.len()])?, &on_device)?;
    let list = |n: usize| on_device.ptr().wrapping_add(n * items.len() * 8);
    let (one, beta) = (vec![1.0_f32; items.len()], vec![beta as f32; items.len()]);
    let (op_b, op_a) = (operations(1), operations(0));
    let (n, m, k) = (ints(&|i| items[i][1].dim(1))?, ints(&|i| items[i][0].dim(0))?, ints(&|i| items[i][0].dim(1))?);
    let [lead_a, lead_b, lead_c] = [0, 1, 2].map(|at| ints(&|i| plans[i][at].ld));
    let (lead_a, lead_b, lead_c) = (lead_a?, lead_b?, lead_c?);
    let each = vec![1_i32; items.len()];
    cuda.bind()?;
    // SAFETY: as in `product`, for every matrix; the lists on the host have an entry for each group, of one matrix, and are
    // read before the call returns; those on the device are memory of this lane's.
    let done = unsafe {
        sys::cublasGemmGroupedBatchedEx(
            cuda.blas().handle(),
            op_b.as_ptr(),
            op_a.as_ptr(),
            n.as_ptr(),
            m.as_ptr(),
            k.as_ptr(),
            one.as_ptr().cast(),
            list(0).cast_const().cast(),
            types[1],
            lead_b.as_ptr(),
            list(1).cast_const().cast(),
            types[0],
            lead_a.as_ptr(),
            beta.as_ptr().cast(),
            list(2).cast(),
            types[2],
            lead_c.as_ptr(),
            int(items.len())?,
            each.as_ptr(),
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        )
    };
    done.result().map_err(|error| -> Error { failed(say())(error) })
}

fn data_type(t: &Tensor) -> sys::cudaDataType {
    match t.dtype() {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

/// One call of cuBLAS, whose matrices are column-major: a row-major matrix is its transpose there, and cᵀ = bᵀ·aᵀ.
fn product(
    cuda: &Cuda,
    plan: &Plan,
    batch: Batch,
    alpha: f64,
    [a_at, b_at, c_at]: [*mut u8; 3],
    [a, b, c]: [&Tensor; 3],
    beta: f64,
) -> Result<()> {
    let say = || format!("gemm: {a:?} by {b:?} into {c:?}, strides {:?}", [a, b, c].map(|t| t.layout().strides()));
    let int = |n: usize| -> Result<i32> {
        match i32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => shape_err!("{}: {n} is more than the 2³¹ − 1 that cuBLAS counts to", say()),
        }
    };
    let [a_form, b_form, c_form] = plan.forms;
    let (alpha, beta) = (alpha as f32, beta as f32);
    // SAFETY: the forms and strides are those of the tensors, which lie inside their storage on this device; c shares no
    // memory with the others; the factors are read before the call returns.
    let done = unsafe {
        result::gemm_strided_batched_ex(
            cuda.blas().handle(),
            b_form.operation(),
            a_form.operation(),
            int(plan.n)?,
            int(plan.m)?,
            int(plan.k)?,
            (&raw const alpha).cast(),
            b_at.cast_const().cast(),
            data_type(b),
            int(b_form.ld)?,
            batch.strides[1] as i64,
            a_at.cast_const().cast(),
            data_type(a),
            int(a_form.ld)?,
            batch.strides[0] as i64,
            (&raw const beta).cast(),
            c_at.cast(),
            data_type(c),
            int(c_form.ld)?,
            batch.strides[2] as i64,
            int(batch.size)?,
            // f32 in full, not TF32; 16-bit types by tensor cores that accumulate in f32.
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            // cuBLAS's own choice, which is the same for the same sizes.
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(|error| -> Error { failed(say())(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(turned: bool, ld: usize) -> Form {
        Form { turned, ld }
    }

    #[test]
    fn forms_of_plain_turned_and_degenerate_matrices() {
        assert_eq!(Form::new([3, 5], [5, 1]), Some(form(false, 5)));
        assert_eq!(Form::new([3, 5], [9, 1]), Some(form(false, 9)));
        assert_eq!(Form::new([3, 5], [1, 3]), Some(form(true, 3)));
        assert_eq!(Form::new([3, 5], [2, 7]), None, "neither rows nor columns are contiguous");
        assert_eq!(Form::new([3, 5], [0, 1]), None, "a row repeated");
        // One row, one column: strides along dimensions of one entry say nothing.
        assert_eq!(Form::new([1, 5], [77, 1]), Some(form(false, 5)));
        assert_eq!(Form::new([1, 5], [77, 4]), Some(form(true, 4)));
        assert_eq!(Form::new([5, 1], [4, 77]), Some(form(false, 4)));
        assert_eq!(Form::new([1, 1], [0, 0]), Some(form(false, 1)));
    }

    fn batch(size: usize, strides: [usize; 3]) -> Batch {
        Batch { size, strides }
    }

    #[test]
    fn batches_merge_and_fold_into_rows() {
        let forms = [form(false, 7), form(false, 3), form(false, 3)];
        // (2, 4) batches of (5, 7)·(7, 3), all contiguous.
        let lead = [batch(2, [140, 84, 60]), batch(4, [35, 21, 15])];
        let plan = Plan::new([5, 7, 3], forms, lead.into_iter());
        assert_eq!((plan.m, plan.batches), (5, vec![batch(8, [35, 21, 15])]));
        // The same with one b: 40 rows.
        let lead = [batch(2, [140, 0, 60]), batch(4, [35, 0, 15])];
        let plan = Plan::new([5, 7, 3], forms, lead.into_iter());
        assert_eq!((plan.m, plan.batches), (40, vec![]));
        // A gap between a's matrices: no rows of one matrix.
        let plan = Plan::new([5, 7, 3], forms, [batch(4, [36, 0, 15])].into_iter());
        assert_eq!((plan.m, plan.batches), (5, vec![batch(4, [36, 0, 15])]));
        // One row per batch: any stride is a leading dimension.
        let plan = Plan::new([1, 7, 3], forms, [batch(4, [11, 0, 5])].into_iter());
        assert_eq!((plan.m, plan.forms[0].ld, plan.forms[2].ld, plan.batches.len()), (4, 11, 5, 0));
        // Heads of an attention: two dimensions that do not follow each other.
        let lead = [batch(2, [1000, 1000, 300]), batch(8, [10, 10, 30])];
        assert_eq!(Plan::new([5, 7, 3], forms, lead.into_iter()).batches.len(), 2);
    }
}
