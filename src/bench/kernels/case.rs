//! What a case is: an operation's sizes, what it is given, and the work it must do.

use crate::device::Kernels;
use crate::error::{Result, config_err};
use crate::rng::{Counter, Purpose};
use crate::tensor::{DType, Shape, Tensor};
use std::ops::Index;

/// No operation's sizes have a larger product: what is made of them is counted in whole numbers.
const MOST: f64 = (1u64 << 60) as f64;

/// A size of a case, by its letter in docs/architecture.md.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// The letter.
    pub name: &'static str,
    /// On a GPU.
    pub gpu: usize,
    /// On a processor.
    pub cpu: usize,
    /// The largest that random shapes have when results are checked.
    pub checked: usize,
}

/// The sizes of one run of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes(Vec<(&'static str, usize)>);

impl Index<&str> for Sizes {
    type Output = usize;
    /// # Panics
    /// If the case has no such size: a mistake in its definition, which a test of all cases would find.
    fn index(&self, name: &str) -> &usize {
        match self.0.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => value,
            None => panic!("a case uses size {name}, which it does not have: {:?}", self.0),
        }
    }
}

impl Sizes {
    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, usize)> + '_ {
        self.0.iter().copied()
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<String> = self.iter().map(|(name, value)| format!("{name}={value}")).collect();
        f.pad(&parts.join(","))
    }
}

/// Overrides of sizes, `T=4096,M=1024`; a name that no chosen case has is an error there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(Vec<(String, usize)>);

impl std::str::FromStr for Overrides {
    type Err = crate::Error;
    fn from_str(s: &str) -> Result<Self> {
        let part = |part: &str| match part.split_once('=').map(|(name, value)| (name.trim(), value.trim().parse())) {
            Some((name, Ok(value))) if value > 0 => Ok((name.to_owned(), value)),
            _ => config_err!("shape {part:?}: it is SIZE=NUMBER, the number at least 1, with commas between several"),
        };
        let parts = s.split(',').map(str::trim).filter(|_| !s.trim().is_empty());
        parts.map(part).collect::<Result<_>>().map(Overrides)
    }
}

impl Overrides {
    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

/// A tensor's type, in the terms of the `Kernels` traits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The type under test.
    Data,
    /// The type it is accumulated in.
    Acc,
    /// i32.
    Int,
}

/// What an operation does with a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// Reads it.
    In(Values),
    /// Writes it, whatever it held.
    Out,
    /// Adds to it.
    Add(Values),
}

/// What a tensor holds beforehand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values {
    /// Standard normal deviates.
    Normal,
    /// Uniform numbers of a range.
    Uniform(f64, f64),
    /// Uniform integers of 0..n.
    Below(usize),
    /// What the case's setup writes.
    Setup,
}

/// One tensor of a case.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// Its type.
    pub kind: Kind,
    /// Its shape.
    pub shape: Shape,
    /// What is done with it.
    pub role: Role,
}

impl Arg {
    fn new(kind: Kind, shape: impl Into<Shape>, role: Role) -> Self {
        Arg { kind, shape: shape.into(), role }
    }

    /// An input of normal deviates.
    pub fn data(shape: impl Into<Shape>) -> Self {
        Self::new(Kind::Data, shape, Role::In(Values::Normal))
    }

    /// The same in the accumulation type.
    pub fn acc(shape: impl Into<Shape>) -> Self {
        Self::new(Kind::Acc, shape, Role::In(Values::Normal))
    }

    /// An input of integers of 0..n.
    pub fn below(n: usize, shape: impl Into<Shape>) -> Self {
        Self::new(Kind::Int, shape, Role::In(Values::Below(n)))
    }

    /// An input that the setup makes.
    pub fn made(kind: Kind, shape: impl Into<Shape>) -> Self {
        Self::new(kind, shape, Role::In(Values::Setup))
    }

    /// An output.
    pub fn out(kind: Kind, shape: impl Into<Shape>) -> Self {
        Self::new(kind, shape, Role::Out)
    }

    /// What is added to.
    pub fn add(kind: Kind, shape: impl Into<Shape>) -> Self {
        Self::new(kind, shape, Role::Add(Values::Normal))
    }

    /// The same with other values.
    pub fn of(self, values: Values) -> Self {
        let role = match self.role {
            Role::In(_) => Role::In(values),
            Role::Add(_) => Role::Add(values),
            Role::Out => Role::Out,
        };
        Arg { role, ..self }
    }

    /// Its type when `dtype` is under test.
    pub fn dtype(&self, dtype: DType) -> DType {
        match self.kind {
            Kind::Data => dtype,
            Kind::Acc => dtype.accumulate(),
            Kind::Int => DType::I32,
        }
    }

    /// Bytes that must be moved for it.
    pub fn bytes(&self, dtype: DType) -> f64 {
        let once = (self.shape.elements() * self.dtype(dtype).size()) as f64;
        if matches!(self.role, Role::Add(_)) { 2.0 * once } else { once }
    }

    /// Whether the operation writes it.
    pub fn is_written(&self) -> bool {
        !matches!(self.role, Role::In(_))
    }

    /// What it holds beforehand, on the host; outputs and what the setup makes are poisoned: NaN, or an integer that is
    /// no index. Long tensors repeat a random stretch.
    ///
    /// # Errors
    /// If `dtype` cannot hold the values.
    pub fn values(&self, dtype: DType, stream: u64) -> Result<Tensor> {
        const POISON: i32 = -0x5555_5556;
        let (dtype, n) = (self.dtype(dtype), self.shape.elements());
        let rng = Counter { seed: 17, purpose: Purpose::Test, step: stream };
        let drawn = n.min(STRETCH);
        let numbers = |f: &dyn Fn(u64) -> f64| (0..drawn as u64).map(f).collect::<Vec<f64>>();
        let numbers = match self.role {
            Role::In(Values::Normal) | Role::Add(Values::Normal) => numbers(&|i| rng.normal(i)),
            Role::In(Values::Uniform(from, to)) | Role::Add(Values::Uniform(from, to)) => {
                numbers(&|i| from + (to - from) * rng.uniform(i))
            }
            Role::In(Values::Below(m)) | Role::Add(Values::Below(m)) => numbers(&|i| rng.below(i, m as u64) as f64),
            _ if dtype == DType::I32 => vec![f64::from(POISON); drawn],
            _ => vec![f64::NAN; drawn],
        };
        let stretch = if dtype == DType::I32 {
            Tensor::from_slice(&numbers.iter().map(|v| *v as i32).collect::<Vec<_>>(), [drawn])?
        } else {
            crate::device::Lane::cpu().cast(&Tensor::from_slice(&numbers, [drawn])?, dtype)?
        };
        let whole = Tensor::host(self.shape, dtype);
        let (from, bytes) = (drawn * dtype.size(), n * dtype.size());
        for at in (0..bytes).step_by(from.max(1)) {
            // SAFETY: both are host tensors that nothing else knows of; the source has `from` bytes, and the destination
            // at least min(from, bytes - at) from `at` on.
            unsafe { std::ptr::copy_nonoverlapping(stretch.ptr(), whole.ptr().add(at), from.min(bytes - at)) };
        }
        Ok(whole)
    }
}

/// How much of a long tensor is random: a prime, so that rows of usual widths do not repeat soon.
const STRETCH: usize = 262_147;

/// An operation, with what is needed to run it on any device.
#[derive(Clone, Copy)]
pub struct Case {
    /// The operation's name: the method's of the `Kernels` traits.
    pub name: &'static str,
    /// Its family: the trait's.
    pub family: &'static str,
    /// Its sizes.
    pub sizes: &'static [Size],
    /// Makes random sizes legal.
    pub fix: fn(&mut Fix<'_>),
    /// Its tensors.
    pub args: fn(&Sizes) -> Vec<Arg>,
    /// Writes the inputs that other operations make.
    pub setup: fn(&dyn Kernels, &Sizes, &[Tensor]) -> Result<()>,
    /// Runs it.
    pub run: fn(&dyn Kernels, &Sizes, &[Tensor]) -> Result<()>,
    /// The FLOPs of its matrix products; what elementwise operations compute is hidden behind what they move.
    pub flops: fn(&Sizes) -> f64,
}

/// Sizes being made legal.
pub struct Fix<'a>(&'a mut Sizes);

impl Fix<'_> {
    /// Size `name`.
    pub fn get(&self, name: &str) -> usize {
        self.0[name]
    }

    /// Sets size `name`.
    pub fn set(&mut self, name: &str, value: usize) {
        if let Some(size) = self.0.0.iter_mut().find(|(n, _)| *n == name) {
            size.1 = value.max(1);
        }
    }

    /// Takes from size `name` what exceeds `most`.
    pub fn at_most(&mut self, name: &str, most: usize) {
        self.set(name, self.get(name).min(most));
    }
}

impl Case {
    /// The sizes a benchmark runs with.
    ///
    /// # Errors
    /// If overrides break the operation's rules.
    pub fn benchmarked(&self, cpu: bool, overrides: &Overrides) -> Result<Sizes> {
        let size = |size: &Size| {
            let given = overrides.0.iter().rev().find(|(name, _)| name == size.name).map(|(_, value)| *value);
            (size.name, given.unwrap_or(if cpu { size.cpu } else { size.gpu }))
        };
        let sizes = Sizes(self.sizes.iter().map(size).collect());
        let product: f64 = sizes.iter().map(|(_, size)| size as f64).product();
        if product > MOST {
            config_err!(
                "{} with {sizes}: {product:.1e} is the product of its sizes, and at most {MOST:.1e}",
                self.name
            );
        }
        let mut fixed = sizes.clone();
        (self.fix)(&mut Fix(&mut fixed));
        if fixed != sizes {
            let changed = sizes.iter().zip(fixed.iter()).filter(|(given, fixed)| given != fixed);
            let changed: Vec<String> =
                changed.map(|((name, given), (_, fixed))| format!("{name} = {given} must be {fixed} there")).collect();
            config_err!("{} with {sizes}: {}", self.name, changed.join(", "));
        }
        Ok(sizes)
    }

    /// Bytes of all its tensors.
    pub fn memory(&self, sizes: &Sizes, dtype: DType) -> f64 {
        let of = |arg: Arg| arg.shape.elements() as f64 * arg.dtype(dtype).size() as f64;
        (self.args)(sizes).into_iter().map(of).sum()
    }

    /// Random sizes to check results with: the first are all ones.
    pub fn random(&self, round: u64) -> Sizes {
        let rng = Counter { seed: 23, purpose: Purpose::Test, step: round };
        let size = |(i, size): (usize, &Size)| {
            let most = if round == 0 { 1 } else { size.checked };
            (size.name, 1 + rng.below(i as u64, most as u64) as usize)
        };
        let mut sizes = Sizes(self.sizes.iter().enumerate().map(size).collect());
        (self.fix)(&mut Fix(&mut sizes));
        sizes
    }

    /// The largest size halved, the sizes being made legal; the same where no size can be less.
    pub(in crate::bench) fn halved(&self, sizes: &Sizes) -> Sizes {
        let mut by_size: Vec<(&str, usize)> = sizes.0.clone();
        by_size.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
        let halves = by_size.into_iter().map(|(name, size)| {
            let mut half = sizes.clone();
            let mut fix = Fix(&mut half);
            fix.set(name, size / 2);
            (self.fix)(&mut fix);
            half
        });
        let less = |other: &Sizes| other.0.iter().zip(&sizes.0).all(|(a, b)| a.1 <= b.1) && other != sizes;
        halves.into_iter().find(less).unwrap_or_else(|| sizes.clone())
    }

    /// The sizes nearest to `wanted`, in the order of [`Case::sizes`], that are legal: k at most 16, E at most 1,024.
    ///
    /// # Panics
    /// If there are fewer numbers than sizes.
    pub fn legal(&self, wanted: &[usize]) -> Sizes {
        let size = |(i, size): (usize, &Size)| {
            let most = match size.name {
                "k" => 16,
                "E" => 1024,
                _ => usize::MAX,
            };
            (size.name, wanted[i].clamp(1, most))
        };
        let mut sizes = Sizes(self.sizes.iter().enumerate().map(size).collect());
        (self.fix)(&mut Fix(&mut sizes));
        sizes
    }

    /// The least bytes that a run moves: what it reads and writes, once, and what it adds to, twice.
    pub fn bytes(&self, sizes: &Sizes, dtype: DType) -> f64 {
        (self.args)(sizes).iter().map(|arg| arg.bytes(dtype)).sum()
    }

    /// Its tensors on `kernels`' device, filled and set up. Outputs are poisoned where they are small; what large ones
    /// hold is nobody's affair when they are timed, and would take longer to upload than the benchmark takes.
    ///
    /// # Errors
    /// If the device fails or has no memory left.
    pub fn tensors(&self, kernels: &dyn Kernels, sizes: &Sizes, dtype: DType) -> Result<Vec<Tensor>> {
        let tensors = (self.args)(sizes)
            .iter()
            .enumerate()
            .map(|(i, arg)| {
                let tensor = kernels.alloc(arg.shape, arg.dtype(dtype))?;
                let made = matches!(arg.role, Role::Out | Role::In(Values::Setup));
                if !made || arg.shape.elements() <= STRETCH {
                    kernels.upload(&arg.values(dtype, i as u64)?, &tensor)?;
                }
                Ok(tensor)
            })
            .collect::<Result<Vec<_>>>()?;
        (self.setup)(kernels, sizes, &tensors)?;
        Ok(tensors)
    }
}
