//! For profilers: named ranges (NVTX), which Nsight Systems shows above the kernels, and the part of a run to record.

use std::fmt::Display;
use std::sync::OnceLock;

use cudarc::driver::Profiler;
use cudarc::nvtx;

use super::{Cuda, CudaError};
use crate::error::Result;

/// A range that a profiler shows; it ends when this goes.
#[must_use = "the range ends when it is dropped"]
#[derive(Debug)]
pub struct Range(#[expect(dead_code, reason = "kept for its end")] Option<nvtx::Range>);

/// Begins a range called `name` on this thread: of what is issued until it goes. Without NVTX's library, `libnvToolsExt.so`,
/// which Nsight Systems and CUDA up to 12 bring, this does nothing.
pub fn range(name: impl Display) -> Range {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: this runs the initialisers of a library made to be loaded at any time.
    let present = *PRESENT.get_or_init(|| unsafe { nvtx::sys::is_culib_present() });
    // A name that ends early is no reason to stop.
    Range(present.then(|| nvtx::scoped_range(name.to_string().split('\0').next().unwrap_or_default())))
}

/// A part of a run that a profiler records; it ends when this goes.
#[must_use = "the recording ends when it is dropped"]
pub struct Recording(Profiler);

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recording")
    }
}

impl Cuda {
    /// What is issued from here on is recorded by a profiler that was told to wait for it, `ncu --profile-from-start off`
    /// or `nsys profile -c cudaProfilerApi`; without one this does nothing.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn record_profile(&self) -> Result<Recording> {
        self.bind()?;
        Ok(Recording(Profiler::new().map_err(CudaError::driver("starting the profiler"))?))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ranges_need_no_library() {
        let outer = super::range("step");
        drop(super::range("for\0ward"));
        drop(outer);
    }
}
