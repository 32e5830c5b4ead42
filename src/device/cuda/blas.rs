//! cuBLAS: a handle per lane, with a workspace of its own.

use std::sync::Arc;

use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::CudaStream;

use super::CudaError;
use super::pool::Pool;
use crate::error::{Error, Result};
use crate::tensor::Storage;

/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A cuBLAS handle bound to one stream.
pub(super) struct Blas {
    handle: CudaBlas,
    /// Without one of the caller's cuBLAS would allocate, which graph capture forbids, and two lanes could share it.
    _workspace: Storage,
}

impl Blas {
    /// A handle whose products take `multiprocessors` of the GPU, or all.
    pub(super) fn new(stream: &Arc<CudaStream>, pool: &Arc<Pool>, multiprocessors: Option<u32>) -> Result<Self> {
        // SAFETY: this runs the initialisers of libcublas.so, which expects to be loaded by any thread at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device("cuBLAS (libcublas.so) cannot be loaded; install CUDA's libraries".into()));
        }
        let handle = CudaBlas::new(stream.clone()).map_err(failed("creating a cuBLAS handle"))?;
        let workspace = pool.alloc(WORKSPACE)?;
        // SAFETY: the handle is valid; the workspace lives as long as it.
        unsafe { sys::cublasSetWorkspace_v2(*handle.handle(), workspace.ptr().cast(), WORKSPACE) }
            .result()
            .map_err(failed("giving cuBLAS its workspace"))?;
        // 16-bit results are rounded once: no partial sums in their type.
        let math = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is valid.
        unsafe { sys::cublasSetMathMode(*handle.handle(), math) }
            .result()
            .map_err(failed("setting cuBLAS's precision"))?;
        if let Some(n) = multiprocessors {
            // SAFETY: the handle is valid.
            unsafe { sys::cublasSetSmCountTarget(*handle.handle(), i32::try_from(n).unwrap_or(i32::MAX)) }
                .result()
                .map_err(failed(format!("telling cuBLAS to take {n} multiprocessors")))?;
        }
        Ok(Blas { handle, _workspace: workspace })
    }

    pub(super) fn handle(&self) -> sys::cublasHandle_t {
        *self.handle.handle()
    }
}

/// For `map_err`: an error of cuBLAS in the course of `action`.
pub(super) fn failed(action: impl Into<String>) -> impl FnOnce(result::CublasError) -> Error {
    let action = action.into();
    move |error| CudaError::Blas { action, name: format!("{:?}", error.0) }.into()
}
