//! Somebody else's kernel in the place of ours: built, checked against the CPU, timed beside ours.

use super::kernels::{Case, KernelRow, Overrides, Role, Sizes};
use super::{Bench, Ceiling, Theirs, Work};
use crate::device::cpu::Cpu;
use crate::device::{Kernels, Lane};
use crate::error::{Error, Result, config_err, shape_err};
use crate::tensor::{DType, Tensor};

/// Shapes that results are checked on.
const SHAPES: u64 = 8;
/// What the oracle does in seconds: elements of all tensors, and FLOPs of products. With the large sizes shrunk to this,
/// elementwise work and rows still exceed what the largest grid takes in one pass, 2¹⁸ threads of up to eight elements.
const ORACLE_ELEMENTS: f64 = (32 << 20) as f64;
const ORACLE_FLOPS: f64 = 2e10;

/// Checks `cases` with somebody's kernels, and times those that are right beside ours, in turn; each row goes to `emit`.
///
/// # Errors
/// If an override fits no case, or none of somebody's kernels is one that a case launches; otherwise the first failure,
/// a wrong result among them, once the other cases are done: a row has it too.
pub fn run(
    bench: &mut Bench,
    theirs: &Theirs,
    cases: &[&Case],
    dtype: DType,
    overrides: &Overrides,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(KernelRow) -> Result<()>,
) -> Result<()> {
    let mut failure = None;
    for case in cases {
        let sizes = case.benchmarked(bench.is_cpu(), overrides)?;
        if let Err(error) = run_case(bench, theirs, case, &sizes, dtype, ceiling, emit) {
            let row = KernelRow::new(bench, case, &sizes, dtype, "eager");
            emit(KernelRow { implementation: theirs.name.clone(), error: Some(error.to_string()), ..row })?;
            failure = failure.or(Some(error));
        }
    }
    failure.map_or(Ok(()), Err)
}

fn run_case(
    bench: &mut Bench,
    theirs: &Theirs,
    case: &Case,
    sizes: &Sizes,
    dtype: DType,
    ceiling: &Ceiling,
    emit: &mut dyn FnMut(KernelRow) -> Result<()>,
) -> Result<()> {
    let ours = bench.lane().clone();
    let (theirs_lane, name) = (theirs.lane.clone(), &theirs.name);
    // What the case before has launched is not this one's.
    (theirs.asked)();
    let checked = check_with_timed(case, &*theirs_lane, sizes, dtype);
    let asked = (theirs.asked)();
    if !asked.iter().any(|(_, found)| *found) {
        let launched: Vec<&str> = asked.iter().map(|(entry, _)| entry.as_str()).collect();
        checked?;
        config_err!(
            "{name} has none of the entry points that {} launches in {dtype}: {}",
            case.name,
            if launched.is_empty() { "it launches no kernel of this crate".into() } else { launched.join(", ") }
        );
    }
    let (largest_error, compared) = checked?;
    let compared: Vec<String> = compared.iter().map(Sizes::to_string).collect();

    let tensors = case.tensors(&*ours, sizes, dtype)?;
    let our_work = || (case.run)(&*ours, sizes, &tensors);
    let their_work = || (case.run)(&*theirs_lane, sizes, &tensors);
    let mut works = vec![Work::new(our_work), Work::new(their_work)];
    let mut rows = vec![("fsmoe", "eager"), (name.as_str(), "eager")];
    let works_of: [(&str, &dyn Fn() -> Result<()>); 2] = [("fsmoe", &our_work), (name, &their_work)];
    for (name, work) in works_of {
        // A kernel that cannot be captured has its eager time all the same.
        if let Ok(Some(replay)) = bench.capture(work) {
            works.push(Work::new(replay));
            rows.push((name, "graph"));
        }
    }
    let spreads = bench.time(&mut works)?;
    drop(works);
    for ((implementation, mode), time) in rows.into_iter().zip(spreads) {
        let row = KernelRow::new(bench, case, sizes, dtype, mode).timed(case, sizes, dtype, ceiling, time);
        let is_theirs = implementation != "fsmoe";
        let replaced = asked.iter().filter(|(_, found)| *found).map(|(entry, _)| entry.clone()).collect();
        emit(KernelRow {
            implementation: implementation.to_owned(),
            replaces: is_theirs.then_some(replaced),
            largest_error: is_theirs.then_some(largest_error),
            compared: is_theirs.then(|| compared.clone()),
            ..row
        })?;
    }
    Ok(())
}

/// max|a − b| / max|b| must stay below this for a tensor of `dtype`. The right values are of the same rounded inputs, so
/// that what is computed and written in f32 is held to f32's, whatever its inputs' type.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-11,
        DType::F32 | DType::I32 => 1e-5,
        DType::F16 => 2e-3,
        DType::BF16 => 1e-2,
    }
}

/// Checks a case's results on `kernels` against the CPU's in f64, on random shapes, the smallest first, outputs poisoned
/// beforehand, inputs rounded to `dtype`. Returns the largest error, relative to the largest right value of its tensor.
///
/// # Errors
/// [`Error::Numeric`] with the first element that is wrong, or if two runs of one input differ; otherwise what running
/// it gave.
pub fn check(case: &Case, kernels: &dyn Kernels, dtype: DType) -> Result<f64> {
    check_shapes(case, kernels, &small(case), dtype)
}

/// The same, and then on the shape that is timed, or [`within_the_oracle`]'s in its place. Returns the shapes as well.
///
/// # Errors
/// As [`check`].
pub fn check_with_timed(case: &Case, kernels: &dyn Kernels, timed: &Sizes, dtype: DType) -> Result<(f64, Vec<Sizes>)> {
    let mut shapes = small(case);
    shapes.push(within_the_oracle(case, timed));
    Ok((check_shapes(case, kernels, &shapes, dtype)?, shapes))
}

/// Different random shapes.
fn small(case: &Case) -> Vec<Sizes> {
    let mut shapes: Vec<Sizes> = Vec::new();
    for sizes in (0..SHAPES).map(|round| case.random(round)) {
        if !shapes.contains(&sizes) {
            shapes.push(sizes);
        }
    }
    shapes
}

fn check_shapes(case: &Case, kernels: &dyn Kernels, shapes: &[Sizes], dtype: DType) -> Result<f64> {
    shapes.iter().try_fold(0.0, |worst, sizes| Ok(f64::max(worst, check_shape(case, kernels, sizes, dtype)?)))
}

/// `timed`, or with its largest sizes halved until the CPU does it in seconds: still many times what one pass of the
/// largest grid covers, so that a kernel that does not go round its grid is found out.
pub fn within_the_oracle(case: &Case, timed: &Sizes) -> Sizes {
    let too_much = |sizes: &Sizes| {
        let elements: f64 = (case.args)(sizes).iter().map(|arg| arg.shape.elements() as f64).sum();
        elements > ORACLE_ELEMENTS || (case.flops)(sizes) > ORACLE_FLOPS
    };
    let mut sizes = timed.clone();
    while too_much(&sizes) {
        let smaller = case.halved(&sizes);
        if smaller == sizes {
            break;
        }
        sizes = smaller;
    }
    sizes
}

/// [`check`] on one shape.
///
/// # Errors
/// As [`check`].
pub fn check_shape(case: &Case, kernels: &dyn Kernels, sizes: &Sizes, dtype: DType) -> Result<f64> {
    let host = Lane::cpu();
    let args = (case.args)(sizes);
    // Inputs made by other operations are made in f64, then rounded as the others are.
    let wide = case.tensors(&Cpu, sizes, DType::F64)?;
    let rounded = |n: usize| -> Result<Tensor> {
        // Also where it is large: memory given again may hold the right results of the run before.
        if args[n].role == Role::Out {
            return args[n].values(dtype, n as u64);
        }
        let to = args[n].dtype(dtype);
        if to == DType::I32 { Ok(wide[n].clone()) } else { host.cast(&wide[n], to) }
    };
    let inputs = (0..args.len()).map(rounded).collect::<Result<Vec<_>>>()?;
    let widen = |t: &Tensor| if t.dtype() == DType::I32 { Ok(t.clone()) } else { host.cast(t, DType::F64) };
    let run = || -> Result<Vec<Tensor>> {
        let mut tensors = Vec::new();
        for input in &inputs {
            let tensor = kernels.alloc(*input.shape(), input.dtype())?;
            kernels.upload(input, &tensor)?;
            tensors.push(tensor);
        }
        (case.run)(kernels, sizes, &tensors)?;
        let mut results = Vec::new();
        for (tensor, arg) in tensors.iter().zip(&args) {
            let result = Tensor::host(*tensor.shape(), tensor.dtype());
            if arg.is_written() {
                kernels.download(tensor, &result)?;
            }
            results.push(result);
        }
        Ok(results)
    };
    let (first, second) = (run()?, run()?);
    // Only now: an integer tensor is the oracle's own, whose run overwrites it.
    let right = inputs.iter().map(widen).collect::<Result<Vec<_>>>()?;
    (case.run)(&Cpu, sizes, &right)?;
    let mut worst = 0.0;
    for (n, arg) in args.iter().enumerate().filter(|(_, arg)| arg.is_written()) {
        let what = format!("{} in {dtype} with {sizes}: tensor {n} {}", case.name, arg.shape);
        if bytes(&first[n])? != bytes(&second[n])? {
            return Err(Error::Numeric(format!("{what}: two runs on the same inputs differ")));
        }
        // Between an expert's products what a weight's gradient is summed from is rounded to the data's type.
        let rounded_between = case.family == "grouped" && first[n].dtype() != DType::I32;
        let allowed = tolerance(if rounded_between { dtype } else { first[n].dtype() });
        worst = f64::max(worst, compare(&what, &first[n], &right[n], allowed)?);
    }
    Ok(worst)
}

fn bytes(t: &Tensor) -> Result<&[u8]> {
    if !t.is_contiguous() {
        shape_err!("{t:?} must be contiguous to be compared byte by byte");
    }
    // SAFETY: a contiguous host tensor that nothing writes to while the comparison borrows it.
    Ok(unsafe { std::slice::from_raw_parts(t.ptr().cast_const(), t.elements() * t.dtype().size()) })
}

/// max|got − right| / max|right|; integers must be equal. An element that is the right value rounded to its type is right,
/// also where that type has few digits left. Where all of `right` are zero there is no ratio: what terms of order one leave
/// of each other is compared with one. Both are on the host, of one shape.
///
/// # Errors
/// [`Error::Numeric`] with the first element that is off by more than `tolerance`.
pub fn compare(what: &str, got: &Tensor, right: &Tensor, tolerance: f64) -> Result<f64> {
    let wrong = |at: usize, got: String, right: String, by: String| {
        Err(Error::Numeric(format!("{what}: element {at} is {got}, should be {right}{by}")))
    };
    if got.dtype() == DType::I32 {
        let (got, right) = (got.to_vec::<i32>()?, right.to_vec::<i32>()?);
        return match got.iter().zip(&right).position(|(a, b)| a != b) {
            Some(at) => wrong(at, got[at].to_string(), right[at].to_string(), String::new()),
            None => Ok(0.0),
        };
    }
    let cpu = Lane::cpu();
    let wide = |t: &Tensor| cpu.cast(t, DType::F64)?.to_vec::<f64>();
    let rounded = wide(&cpu.cast(right, got.dtype())?)?;
    let (got, right) = (wide(got)?, wide(right)?);
    let largest = right.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    let largest = if largest == 0.0 { 1.0 } else { largest };
    let mut worst = 0.0_f64;
    for (at, (a, b)) in got.iter().zip(&right).enumerate() {
        let error = if a == b || *a == rounded[at] { 0.0 } else { (a - b).abs() / largest };
        // A NaN, which a poisoned element left behind, is not within anything.
        if error.is_nan() || error > tolerance {
            let by = format!(": off by {error:.1e} of the largest, {largest:.3e}, where {tolerance:.0e} is allowed");
            return wrong(at, a.to_string(), b.to_string(), by);
        }
        worst = worst.max(error);
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::super::kernels::{cases, named};
    use super::*;

    /// Every case runs on random shapes, writes all its outputs, and gives in f32 what it gives in f64.
    #[test]
    fn every_case_agrees_with_itself_in_f32() {
        for case in cases() {
            let error = check(case, &Cpu, DType::F32).unwrap_or_else(|e| panic!("{e}"));
            assert!(error < 1e-5, "{}: {error:e}", case.name);
        }
    }

    /// What is compared in the place of the timed shape takes the CPU seconds, and a GPU more than one pass.
    #[test]
    fn the_large_shape_is_within_the_oracle_and_beyond_a_pass() {
        for case in cases() {
            let timed = case.benchmarked(false, &"".parse().unwrap()).unwrap();
            let sizes = within_the_oracle(case, &timed);
            let elements: usize = (case.args)(&sizes).iter().map(|arg| arg.shape.elements()).sum();
            assert!(
                elements as f64 <= ORACLE_ELEMENTS && (case.flops)(&sizes) <= ORACLE_FLOPS,
                "{}: {sizes}",
                case.name
            );
            let most = (case.args)(&timed).iter().map(|arg| arg.shape.elements()).max().unwrap();
            // 132 multiprocessors of 2048 threads; a product's tiles are counted by hand.
            if (case.flops)(&sizes) == 0.0 && most > 132 * 2048 {
                let largest = (case.args)(&sizes).iter().map(|arg| arg.shape.elements()).max().unwrap();
                assert!(largest > 2 * 132 * 2048 || sizes == timed, "{}: {sizes}, {largest} elements", case.name);
            }
            assert_eq!(within_the_oracle(case, &case.random(3)), case.random(3), "{}", case.name);
        }
        let swiglu = named(Some("swiglu")).unwrap()[0];
        let sizes = within_the_oracle(swiglu, &swiglu.benchmarked(false, &"".parse().unwrap()).unwrap());
        assert!(sizes["R"] * sizes["H"] > 8 * 132 * 2048, "eight elements a thread: {sizes}");
    }

    /// A kernel that is right on every small shape, and leaves out what one pass of its grid does not reach.
    #[test]
    fn what_lacks_a_loop_over_its_grid_is_caught_on_the_timed_shape() {
        let case = *named(Some("gelu")).unwrap()[0];
        let run: fn(&dyn Kernels, &Sizes, &[Tensor]) -> Result<()> = |k, _, t| {
            let n = t[0].elements();
            let reached = if t[0].dtype() == DType::F64 { n } else { n.min(1 << 17) };
            let (x, y) = (t[0].reshape([n])?, t[1].reshape([n])?);
            k.gelu(crate::device::Gelu::Erf, &x.narrow(0, 0, reached)?, &y.narrow(0, 0, reached)?)
        };
        let lacking = Case { run, ..case };
        check(&lacking, &Cpu, DType::F32).unwrap();
        let timed = case.benchmarked(true, &"".parse().unwrap()).unwrap();
        let message = check_with_timed(&lacking, &Cpu, &timed, DType::F32).unwrap_err().to_string();
        assert!(message.contains(&format!("with {timed}")) && message.contains("is NaN"), "{message}");
        let (_, shapes) = check_with_timed(&case, &Cpu, &timed, DType::F32).unwrap();
        assert_eq!(shapes.last(), Some(&timed));
    }

    #[test]
    fn the_other_types_too() {
        for (name, dtype) in [("swiglu_backward", DType::BF16), ("rms_norm", DType::F16), ("attention", DType::BF16)] {
            check(named(Some(name)).unwrap()[0], &Cpu, dtype).unwrap();
        }
    }

    fn broken(name: &str, run: fn(&dyn Kernels, &Sizes, &[Tensor]) -> Result<()>) -> String {
        // The oracle is the CPU's operation too, so the break shows only where data is rounded: in f32, not in f64.
        let case = Case { run, ..*named(Some(name)).unwrap()[0] };
        check(&case, &Cpu, DType::F32).unwrap_err().to_string()
    }

    #[test]
    fn wrong_results_are_named() {
        // An element that is not written.
        let message = broken("gelu", |k, _, t| {
            if t[0].dtype() == DType::F64 {
                return k.copy(&t[0], &t[1]);
            }
            let n = t[0].elements();
            let (x, y) = (t[0].reshape([n])?, t[1].reshape([n])?);
            k.copy(&x.narrow(0, 0, n - 1)?, &y.narrow(0, 0, n - 1)?)
        });
        assert!(message.contains("gelu in f32 with R=1,H=1") && message.contains("element 0 is NaN"), "{message}");

        // A wrong value.
        let message = broken("add", |k, _, t| {
            k.add(&t[0], &t[1], &t[2])?;
            if t[0].dtype() == DType::F64 { Ok(()) } else { k.fill(&t[2].narrow(0, t[2].dim(0) - 1, 1)?, 7.0) }
        });
        assert!(message.contains("element 0 is 7, should be") && message.contains("allowed"), "{message}");

        // A wrong index.
        let message = broken("top_k", |k, _, t| {
            k.top_k(&t[0], None, None, &t[1])?;
            if t[0].dtype() == DType::F64 { Ok(()) } else { k.fill(&t[1].narrow(0, 0, 1)?, -3.0) }
        });
        assert!(message.contains("top_k in f32") && message.contains("element 0 is -3, should be 0"), "{message}");
    }
}
