//! Launches the kernels of `kernels/expert/`: GELU and SwiGLU, forward and backward.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, sys};
use half::{bf16, f16};

use super::{CudaError, Launch, Modules};
use crate::device::Gelu;

/// Threads of a block; the kernels take any number.
const THREADS: u32 = 256;
/// Blocks of [`THREADS`] that fill a multiprocessor's 2048 threads. A larger grid would only start threads that find
/// nothing left to do: each walks the data in steps of the grid.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;

mod sealed {
    use crate::device::Gelu;

    /// The kernels' entry points, one per element type.
    #[derive(Clone, Copy, Debug)]
    pub enum Operation {
        GeluForward(Gelu),
        GeluBackward(Gelu),
        SwigluForward,
        SwigluBackward,
    }

    pub trait Sealed {
        fn entry_point(operation: Operation) -> &'static str;
    }
}
use sealed::Operation;

/// An element type that the kernels are compiled for: `bf16`, `f16` or `f32`.
pub trait Element: DeviceRepr + sealed::Sealed {}

macro_rules! element {
    ($type:ty, $suffix:literal) => {
        impl Element for $type {}
        impl sealed::Sealed for $type {
            fn entry_point(operation: Operation) -> &'static str {
                match operation {
                    Operation::GeluForward(Gelu::Erf) => concat!("gelu_forward_", $suffix),
                    Operation::GeluForward(Gelu::Tanh) => concat!("gelu_tanh_forward_", $suffix),
                    Operation::GeluBackward(Gelu::Erf) => concat!("gelu_backward_", $suffix),
                    Operation::GeluBackward(Gelu::Tanh) => concat!("gelu_tanh_backward_", $suffix),
                    Operation::SwigluForward => concat!("swiglu_forward_", $suffix),
                    Operation::SwigluBackward => concat!("swiglu_backward_", $suffix),
                }
            }
        }
    };
}
element!(bf16, "bf16");
element!(f16, "f16");
element!(f32, "f32");

/// A row-major matrix in device memory: row i begins `i * stride` elements into `data`.
#[derive(Debug)]
pub struct Matrix<'a, T> {
    /// The elements.
    pub data: CudaView<'a, T>,
    /// From one row to the next, in elements.
    pub stride: usize,
}

/// A row-major matrix in device memory that is written to.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    /// The elements.
    pub data: CudaViewMut<'a, T>,
    /// From one row to the next, in elements.
    pub stride: usize,
}

/// SwiGLU's two inputs, each (rows, cols).
#[derive(Debug)]
pub enum GateUp<'a, T> {
    /// One (rows, 2·cols) matrix, as one matrix product leaves it: a row's first half is its gate.
    Halves(Matrix<'a, T>),
    /// Two matrices.
    Apart {
        /// What the sigmoid is taken of.
        gate: Matrix<'a, T>,
        /// What it is multiplied with.
        up: Matrix<'a, T>,
    },
}

/// The gradients of SwiGLU's two inputs, each (rows, cols).
#[derive(Debug)]
pub enum GateUpMut<'a, T> {
    /// One (rows, 2·cols) matrix: a row's first half is the gate's gradient.
    Halves(MatrixMut<'a, T>),
    /// Two matrices.
    Apart {
        /// The gate's gradient.
        gate: MatrixMut<'a, T>,
        /// The gradient of what it is multiplied with.
        up: MatrixMut<'a, T>,
    },
}

/// Where a kernel finds a matrix: the address of its first element and its row stride.
#[derive(Clone, Copy)]
struct Operand {
    address: sys::CUdeviceptr,
    stride: usize,
}

/// A (rows, cols) elementwise operation about to be launched: checks its operands.
#[derive(Clone, Copy)]
struct Shape {
    operation: &'static str,
    rows: usize,
    cols: usize,
}

impl Shape {
    fn error(&self, rule: String) -> CudaError {
        CudaError::Argument { operation: self.operation.into(), rule }
    }

    /// `width` columns from `address` on must lie within `length` elements, row after row.
    fn check(&self, name: &str, width: usize, stride: usize, length: usize) -> Result<(), CudaError> {
        let Self { rows, cols, .. } = self;
        if stride < width {
            return Err(self.error(format!("the row stride of {name} is {stride}, less than its {width} columns")));
        }
        let needed = rows.checked_sub(1).map_or(Some(0), |r| r.checked_mul(stride)?.checked_add(width));
        match needed {
            Some(needed) if needed <= length => Ok(()),
            _ => Err(self.error(format!(
                "{name} has {length} elements, too few for {rows} rows of {width} at a stride of {stride} \
                 (rows {rows}, cols {cols})"
            ))),
        }
    }

    fn input<T>(&self, stream: &CudaStream, name: &str, width: usize, m: &Matrix<'_, T>) -> Result<Operand, CudaError> {
        self.check(name, width, m.stride, m.data.len())?;
        Ok(Operand { address: m.data.device_ptr(stream).0, stride: m.stride })
    }

    fn output<T>(
        &self,
        stream: &CudaStream,
        name: &str,
        width: usize,
        m: &mut MatrixMut<'_, T>,
    ) -> Result<Operand, CudaError> {
        self.check(name, width, m.stride, m.data.len())?;
        Ok(Operand { address: m.data.device_ptr_mut(stream).0, stride: m.stride })
    }

    /// The second half of a matrix of twice the width.
    fn second_half<T>(&self, first: Operand) -> Operand {
        Operand { address: first.address + (self.cols * size_of::<T>()) as sys::CUdeviceptr, ..first }
    }
}

/// The activation kernels on one GPU. They are put on a stream and return before they have run.
#[derive(Clone, Debug)]
pub struct Activations {
    modules: Arc<Modules>,
}

impl Activations {
    /// The activations among `modules`.
    #[must_use]
    pub fn new(modules: Arc<Modules>) -> Self {
        Self { modules }
    }

    /// y = GELU(x), elementwise.
    ///
    /// # Errors
    ///
    /// [`CudaError::Argument`] when x and y differ in length, [`CudaError::Driver`] when the launch fails.
    pub fn gelu_forward<T: Element>(
        &self,
        stream: &CudaStream,
        form: Gelu,
        x: &impl DevicePtr<T>,
        y: &mut impl DevicePtrMut<T>,
    ) -> Result<(), CudaError> {
        let operation = T::entry_point(Operation::GeluForward(form));
        let n = x.len();
        same_length(operation, n, "y", y.len())?;
        let (x, _x) = x.device_ptr(stream);
        let (y, _y) = y.device_ptr_mut(stream);
        let mut arguments = Arguments::default();
        arguments.pointer(x);
        arguments.pointer(y);
        arguments.size(n);
        // SAFETY: x and y hold n elements each, and the borrows keep them apart.
        unsafe { self.launch::<T>(stream, Shape { operation, rows: 1, cols: n }, arguments) }
    }

    /// dx = dy · GELU′(x), elementwise.
    ///
    /// # Errors
    ///
    /// [`CudaError::Argument`] when the lengths differ, [`CudaError::Driver`] when the launch fails.
    pub fn gelu_backward<T: Element>(
        &self,
        stream: &CudaStream,
        form: Gelu,
        dy: &impl DevicePtr<T>,
        x: &impl DevicePtr<T>,
        dx: &mut impl DevicePtrMut<T>,
    ) -> Result<(), CudaError> {
        let operation = T::entry_point(Operation::GeluBackward(form));
        let n = x.len();
        same_length(operation, n, "dy", dy.len())?;
        same_length(operation, n, "dx", dx.len())?;
        let (dy, _dy) = dy.device_ptr(stream);
        let (x, _x) = x.device_ptr(stream);
        let (dx, _dx) = dx.device_ptr_mut(stream);
        let mut arguments = Arguments::default();
        arguments.pointer(dy);
        arguments.pointer(x);
        arguments.pointer(dx);
        arguments.size(n);
        // SAFETY: dy, x and dx hold n elements each, and the borrows keep dx apart from the others.
        unsafe { self.launch::<T>(stream, Shape { operation, rows: 1, cols: n }, arguments) }
    }

    /// out = silu(gate) · up, elementwise over (rows, cols), with silu(z) = z / (1 + e⁻ᶻ).
    ///
    /// # Errors
    ///
    /// [`CudaError::Argument`] when a matrix is too short for its stride, [`CudaError::Driver`] when the launch fails.
    pub fn swiglu_forward<T: Element>(
        &self,
        stream: &CudaStream,
        rows: usize,
        cols: usize,
        inputs: &GateUp<'_, T>,
        out: &mut MatrixMut<'_, T>,
    ) -> Result<(), CudaError> {
        let shape = Shape { operation: T::entry_point(Operation::SwigluForward), rows, cols };
        let [gate, up] = gate_up(&shape, stream, inputs)?;
        let out = shape.output(stream, "out", cols, out)?;
        // SAFETY: each operand was checked to hold (rows, cols), and the borrow of out keeps it apart from the others.
        unsafe { self.launch_matrices::<T>(stream, shape, &[gate, up, out]) }
    }

    /// The gradients of both inputs of SwiGLU, given `dout`, that of its (rows, cols) output: with s the sigmoid of gate,
    /// d_up = dout · gate · s, d_gate = dout · up · s · (1 + gate · (1 − s)).
    ///
    /// # Errors
    ///
    /// [`CudaError::Argument`] when a matrix is too short for its stride, [`CudaError::Driver`] when the launch fails.
    pub fn swiglu_backward<T: Element>(
        &self,
        stream: &CudaStream,
        rows: usize,
        cols: usize,
        dout: &Matrix<'_, T>,
        inputs: &GateUp<'_, T>,
        gradients: &mut GateUpMut<'_, T>,
    ) -> Result<(), CudaError> {
        let shape = Shape { operation: T::entry_point(Operation::SwigluBackward), rows, cols };
        let dout = shape.input(stream, "dout", cols, dout)?;
        let [gate, up] = gate_up(&shape, stream, inputs)?;
        let [dgate, dup] = match gradients {
            GateUpMut::Halves(both) => {
                let dgate = shape.output(stream, "d_gate_up", twice(&shape)?, both)?;
                [dgate, shape.second_half::<T>(dgate)]
            }
            GateUpMut::Apart { gate, up } => {
                [shape.output(stream, "d_gate", cols, gate)?, shape.output(stream, "d_up", cols, up)?]
            }
        };
        // SAFETY: each operand was checked to hold (rows, cols); the borrows keep the gradients apart from the inputs,
        // and the two halves of one matrix share no element, its stride being at least twice cols.
        unsafe { self.launch_matrices::<T>(stream, shape, &[dout, gate, up, dgate, dup]) }
    }

    /// Launches a kernel whose parameters are `operands`, each an address and a stride, then rows and cols.
    ///
    /// # Safety
    ///
    /// As [`Self::launch`].
    unsafe fn launch_matrices<T: Element>(
        &self,
        stream: &CudaStream,
        mut shape: Shape,
        operands: &[Operand],
    ) -> Result<(), CudaError> {
        // Without gaps between rows the matrices are vectors, with one ragged end instead of one per row.
        if operands.iter().all(|operand| operand.stride == shape.cols) {
            shape = Shape { rows: shape.rows.min(1), cols: shape.rows * shape.cols, ..shape };
        }
        let mut arguments = Arguments::default();
        for operand in operands {
            arguments.pointer(operand.address);
            arguments.size(operand.stride);
        }
        arguments.size(shape.rows);
        arguments.size(shape.cols);
        // SAFETY: the caller's promise.
        unsafe { self.launch::<T>(stream, shape, arguments) }
    }

    /// # Safety
    ///
    /// `arguments` must be the parameters of the kernel `shape.operation`, and the memory they name be valid for it.
    unsafe fn launch<T: Element>(
        &self,
        stream: &CudaStream,
        shape: Shape,
        mut arguments: Arguments,
    ) -> Result<(), CudaError> {
        let Shape { operation, rows, cols } = shape;
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let vectors = rows as u64 * cols.div_ceil(16 / size_of::<T>()) as u64;
        let most = u64::from(self.modules.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR);
        let blocks = vectors.div_ceil(u64::from(THREADS)).min(most) as u32;
        let launch = Launch { grid: (blocks, 1, 1), block: (THREADS, 1, 1), shared: 0 };
        // SAFETY: the caller's promise.
        unsafe {
            self.modules.function(operation)?.launch(
                stream,
                launch,
                &mut arguments.pointers(),
                &format!("({rows}, {cols})"),
            )
        }
    }
}

fn gate_up<T>(shape: &Shape, stream: &CudaStream, inputs: &GateUp<'_, T>) -> Result<[Operand; 2], CudaError> {
    match inputs {
        GateUp::Halves(both) => {
            let gate = shape.input(stream, "gate_up", twice(shape)?, both)?;
            Ok([gate, shape.second_half::<T>(gate)])
        }
        GateUp::Apart { gate, up } => {
            Ok([shape.input(stream, "gate", shape.cols, gate)?, shape.input(stream, "up", shape.cols, up)?])
        }
    }
}

fn twice(shape: &Shape) -> Result<usize, CudaError> {
    shape.cols.checked_mul(2).ok_or_else(|| shape.error(format!("{} columns are too many to double", shape.cols)))
}

fn same_length(operation: &str, n: usize, name: &str, length: usize) -> Result<(), CudaError> {
    if length == n {
        return Ok(());
    }
    let rule = format!("{name} has {length} elements and x has {n}; they must have the same number");
    Err(CudaError::Argument { operation: operation.into(), rule })
}

/// The values of a kernel's parameters, all of them 8 bytes wide here: device addresses and 64-bit sizes.
#[derive(Default)]
struct Arguments {
    values: [u64; 12],
    count: usize,
}

impl Arguments {
    fn pointer(&mut self, address: sys::CUdeviceptr) {
        self.values[self.count] = address;
        self.count += 1;
    }

    fn size(&mut self, size: usize) {
        self.pointer(size as u64);
    }

    /// Pointers to the values, as a launch takes them.
    fn pointers(&mut self) -> Vec<*mut c_void> {
        self.values[..self.count].iter_mut().map(|value| (value as *mut u64).cast()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_must_hold_its_rows() {
        let shape = Shape { operation: "swiglu_forward_f32", rows: 3, cols: 5 };
        assert!(shape.check("up", 5, 7, 19).is_ok());
        assert!(Shape { rows: 0, ..shape }.check("up", 5, 7, 0).is_ok());
        let short = shape.check("up", 5, 7, 18).unwrap_err().to_string();
        assert!(short.contains("up has 18 elements") && short.contains("3 rows of 5 at a stride of 7"), "{short}");
        let narrow = shape.check("out", 5, 4, 100).unwrap_err().to_string();
        assert!(narrow.contains("stride of out is 4") && narrow.contains("5 columns"), "{narrow}");
        let huge = Shape { rows: usize::MAX, ..shape }.check("gate", 5, 7, 100).unwrap_err();
        assert!(matches!(huge, CudaError::Argument { .. }));
    }
}
