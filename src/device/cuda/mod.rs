//! NVIDIA GPUs, through the CUDA driver, loaded at run time: the same binary starts on a machine without one.
//!
//! - [`probe`](mod@probe) says what is there, and never fails;
//! - [`open`] opens a GPU;
//! - [`Modules`] loads the embedded kernels onto it;
//! - [`Cuda`] is a lane, which runs the operations of [`Kernels`](crate::device::Kernels), one family a file;
//! - its `hopper_` operations are the matrix products of all experts at once, on Hopper.

use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

mod args;
mod attention;
mod backend;
mod blas;
mod comm;
mod event;
mod expert;
mod gate;
mod gemm;
mod graph;
mod grouped;
mod hopper;
mod math;
mod memory;
mod model;
mod modules;
mod optim;
mod order;
mod pool;
pub mod probe;
mod ragged;
mod range;
mod selftest;
mod sort;
mod walk;

pub use backend::{Cuda, Share};
/// The CUDA driver's own types that this module's interface is made of.
pub use cudarc::driver::{CudaContext as Context, CudaSlice, CudaStream as Stream};
pub use event::Event;
pub use graph::Graph;
pub use hopper::{Blocks, ROW_TILE, RowScale};
pub use modules::{Function, Launch, Modules, fat_binary, kernels_embedded};
pub use pool::Usage;
pub use ragged::{RaggedProduct, RaggedWay};
pub use range::{Range, Recording, range};
pub use selftest::selftest;

/// What can go wrong on a GPU; every variant says what was being done.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library, `libcuda.so`, is not on this machine.
    #[error("no CUDA driver: libcuda.so cannot be loaded; install NVIDIA's driver, or run on the CPU")]
    NoDriver,
    /// This build of fsmoe has no kernels in it.
    #[error("no CUDA kernels in this build: {reason}; run scripts/install-cuda.sh and build again")]
    NoKernels {
        /// Why the build left them out.
        reason: &'static str,
    },
    /// A call of the driver failed.
    #[error("{action}: {name} ({code}){}", if .meaning.is_empty() { String::new() } else { format!(": {}", .meaning) })]
    Driver {
        /// What was being done, with names and shapes.
        action: String,
        /// The driver's name of the error, `CUDA_ERROR_OUT_OF_MEMORY` for instance.
        name: String,
        /// Its number.
        code: u32,
        /// The driver's sentence about it, if it has one.
        meaning: String,
    },
    /// A call of cuBLAS failed.
    #[error("{action}: {name}")]
    Blas {
        /// What was being done, with shapes.
        action: String,
        /// The library's name of the error.
        name: String,
    },
    /// No source file of the embedded kernels bears the name that this entry point's begins with.
    #[error(
        "no kernel file for '{name}': an entry point begins with its file's name, and the files are {}",
        .files.join(", ")
    )]
    NoKernelFile {
        /// The entry point asked for.
        name: String,
        /// The embedded kernel files.
        files: Vec<&'static str>,
    },
    /// An argument breaks a kernel's rule.
    #[error("{operation}: {rule}")]
    Argument {
        /// The operation, with its element type.
        operation: String,
        /// The offending value and the rule it broke.
        rule: String,
    },
    /// A kernel ran and gave a wrong answer.
    #[error("self-test {test}: at {index} the GPU gave {got}, the right answer is {expected}")]
    SelfTest {
        /// The test.
        test: &'static str,
        /// Where in its output.
        index: usize,
        /// The GPU's answer.
        got: String,
        /// The right one.
        expected: String,
    },
}

impl CudaError {
    /// For `map_err`: an error of the driver in the course of `action`.
    pub(crate) fn driver(action: impl Into<String>) -> impl FnOnce(DriverError) -> Self {
        let action = action.into();
        move |error| Self::Driver {
            action,
            name: format!("{:?}", error.0),
            code: error.0 as u32,
            meaning: error.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default(),
        }
    }
}

/// Whether the CUDA driver's library can be loaded. To be asked before any call that reaches the driver: cudarc's loader
/// panics where the library is missing.
#[must_use]
pub fn is_driver_present() -> bool {
    // SAFETY: this runs the initialisers of libcuda.so, a library that expects to be loaded by any thread at any time.
    unsafe { sys::is_culib_present() }
}

/// The number of GPUs that the process sees.
///
/// # Errors
///
/// [`CudaError::NoDriver`] where there is no driver, and [`CudaError::Driver`] when it does not start.
pub fn count() -> Result<usize, CudaError> {
    if !is_driver_present() {
        return Err(CudaError::NoDriver);
    }
    let count = result::init().and_then(|()| result::device::get_count());
    Ok(count.map_err(CudaError::driver("counting the GPUs"))?.max(0) as usize)
}

/// Opens GPU number `ordinal`: its primary context, which other CUDA libraries in the process share.
///
/// # Errors
///
/// [`CudaError::NoDriver`] where there is no driver, and [`CudaError::Driver`] when it has no such GPU or cannot use it.
pub fn open(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
    if !is_driver_present() {
        return Err(CudaError::NoDriver);
    }
    let context = CudaContext::new(ordinal).map_err(CudaError::driver(format!("opening GPU {ordinal}")))?;
    // cudarc would record an event per buffer and make every launch wait for those of other streams: dependencies
    // between lanes are explicit in fsmoe, and hidden ones would undo their overlap.
    //
    // SAFETY: no buffer exists yet, so none has half a history. From here on the order of streams is the caller's.
    unsafe { context.disable_event_tracking() };
    Ok(context)
}
