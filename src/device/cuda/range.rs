//! Named ranges for profilers (NVTX): Nsight Systems shows them above the kernels.

use std::sync::OnceLock;

use cudarc::nvtx;

/// A range that a profiler shows; it ends when this goes.
#[must_use = "the range ends when it is dropped"]
#[derive(Debug)]
pub struct Range(#[expect(dead_code, reason = "kept for its end")] Option<nvtx::Range>);

/// Begins a range called `name`. Without NVTX's library, `libnvToolsExt.so`, this does nothing.
pub fn range(name: &str) -> Range {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: this runs the initialisers of a library made to be loaded at any time.
    let present = *PRESENT.get_or_init(|| unsafe { nvtx::sys::is_culib_present() });
    // A name that ends early is no reason to stop.
    Range(present.then(|| nvtx::scoped_range(name.split('\0').next().unwrap_or_default())))
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
