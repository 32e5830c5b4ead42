//! What this machine has for CUDA, for `fsmoe doctor`.

use std::ffi::{CStr, c_int, c_void};
use std::fmt;

use cudarc::cublas::sys as cublas;
use cudarc::driver::{result, sys};
use serde::Serialize;

use super::{CudaError, Modules, is_driver_present, kernels_embedded, open, selftest};

/// The oldest GPUs that the embedded kernels run on: Ampere.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Something that is there, or the reason why it is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding<T> {
    /// It is there.
    Found(T),
    /// It is not, and why.
    Missing(String),
}

impl<T> Finding<T> {
    /// What was found, if it was.
    pub fn found(&self) -> Option<&T> {
        match self {
            Self::Found(value) => Some(value),
            Self::Missing(_) => None,
        }
    }
}

impl<T, E: fmt::Display> From<Result<T, E>> for Finding<T> {
    fn from(result: Result<T, E>) -> Self {
        result.map_or_else(|error| Self::Missing(error.to_string()), Self::Found)
    }
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Its number among those that the process sees.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its memory, in bytes.
    pub memory: usize,
    /// Its number of streaming multiprocessors.
    pub multiprocessors: i32,
    /// Its compute capability, major and minor.
    pub compute_capability: (i32, i32),
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ordinal, name, memory, multiprocessors, compute_capability: (major, minor) } = self;
        let gibibytes = *memory as f64 / f64::from(1 << 30);
        write!(
            f,
            "cuda:{ordinal} {name}, {gibibytes:.1} GiB, {multiprocessors} SMs, compute capability {major}.{minor}"
        )
    }
}

/// The kernels in this build of fsmoe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kernels {
    /// The nvcc that compiled them.
    pub nvcc: String,
    /// Machine code (`sm_…`) and PTX (`compute_…`) that there is.
    pub archs: Vec<String>,
    /// The size of the fat binary, in bytes.
    pub bytes: usize,
}

/// What [`probe`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// The newest CUDA version that the driver supports, `13.0` for instance.
    pub driver: Finding<String>,
    /// The GPUs that the process sees, at least one.
    pub gpus: Finding<Vec<Gpu>>,
    /// The version of cuBLAS.
    pub cublas: Finding<String>,
    /// The version of NCCL, which only training on several GPUs needs.
    pub nccl: Finding<String>,
    /// The kernels in this build.
    pub kernels: Finding<Kernels>,
    /// The GPU on which all of this works, its kernels loaded and tried, `cuda:0` for instance.
    pub usable: Finding<String>,
    /// Threads that CPU kernels run on.
    pub threads: usize,
}

/// Looks at this machine. Where there is a GPU that looks usable, tries the embedded kernels on it (about a second).
///
/// Never fails: what cannot be found out is a [`Finding::Missing`] with the reason.
#[must_use]
pub fn probe() -> Probe {
    let driver = driver_version();
    let gpus = driver.as_ref().map_err(|_| "there is no driver to ask".to_owned()).and_then(|_| gpus());
    let cublas = cublas_version();
    let kernels = kernels_embedded();
    let usable = match (&driver, &gpus, &kernels, &cublas) {
        (Err(error), ..) | (_, Err(error), ..) | (.., Err(error)) => Err(error.clone()),
        (_, _, Err(error), _) => Err(error.to_string()),
        (Ok(_), Ok(gpus), Ok(_), Ok(_)) => try_kernels(gpus),
    };
    Probe {
        driver: driver.into(),
        gpus: gpus.into(),
        cublas: cublas.into(),
        nccl: nccl_version().into(),
        kernels: kernels
            .map(|embedded| Kernels {
                nvcc: embedded.nvcc.into(),
                archs: embedded.archs.iter().map(ToString::to_string).collect(),
                bytes: super::fat_binary().len(),
            })
            .into(),
        usable: usable.into(),
        threads: rayon::current_num_threads(),
    }
}

impl Probe {
    /// The findings as a person reads them, one per line: a label and what was found.
    #[must_use]
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        fn or_reason<T>(finding: &Finding<T>, show: impl Fn(&T) -> String) -> String {
            match finding {
                Finding::Found(value) => show(value),
                Finding::Missing(reason) => format!("none: {reason}"),
            }
        }
        let mut lines = vec![("CUDA driver", or_reason(&self.driver, |version| format!("supports CUDA {version}")))];
        match &self.gpus {
            Finding::Missing(_) => lines.push(("GPU", or_reason(&self.gpus, |_| String::new()))),
            Finding::Found(gpus) => lines.extend(gpus.iter().map(|gpu| ("GPU", gpu.to_string()))),
        }
        lines.push(("cuBLAS", or_reason(&self.cublas, Clone::clone)));
        lines.push(("NCCL", or_reason(&self.nccl, Clone::clone)));
        lines.push((
            "CUDA kernels",
            or_reason(&self.kernels, |kernels| {
                let Kernels { nvcc, archs, bytes } = kernels;
                format!("embedded: {}, by nvcc {nvcc}, {} KiB", archs.join(" "), bytes.div_ceil(1024))
            }),
        ));
        lines.push((
            "usable GPU",
            or_reason(&self.usable, |gpu| format!("{gpu}: the kernels load on it and give the right answers")),
        ));
        let by_default = match self.usable.found() {
            Some(gpu) => format!("on {gpu}, in bf16; --device cpu for the CPU, {} threads", self.threads),
            None => format!("on the CPU, {} threads", self.threads),
        };
        lines.push(("train, sample", by_default));
        lines
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        let width = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
        for (index, (label, text)) in lines.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{label:width$}  {text}")?;
        }
        Ok(())
    }
}

fn driver_version() -> Result<String, String> {
    if !is_driver_present() {
        return Err("libcuda.so cannot be loaded; install NVIDIA's driver to use a GPU".into());
    }
    let mut version: c_int = 0;
    // SAFETY: the driver is present, the call needs no initialisation, and it writes one int.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    status.result().map_err(|e| CudaError::driver("asking for the driver's version")(e).to_string())?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// Every GPU. Asks the driver about them without opening any.
fn gpus() -> Result<Vec<Gpu>, String> {
    use sys::CUdevice_attribute as Attribute;

    let failed = |action: &str| {
        let action = action.to_owned();
        move |error| CudaError::driver(action)(error).to_string()
    };
    result::init().map_err(failed("initialising the driver"))?;
    let count = result::device::get_count().map_err(failed("counting the GPUs"))?;
    if count == 0 {
        return Err("the driver sees none".into());
    }
    (0..count)
        .map(|ordinal| {
            let error = || failed(&format!("asking about GPU {ordinal}"));
            let device = result::device::get(ordinal).map_err(error())?;
            let attribute = |which| {
                // SAFETY: the handle has just come from the driver.
                unsafe { result::device::get_attribute(device, which) }.map_err(error())
            };
            Ok(Gpu {
                ordinal: ordinal as usize,
                name: result::device::get_name(device).map_err(error())?,
                // SAFETY: as above.
                memory: unsafe { result::device::total_mem(device) }.map_err(error())?,
                multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                compute_capability: (
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
            })
        })
        .collect()
}

fn cublas_version() -> Result<String, String> {
    use cublas::libraryPropertyType as Property;

    // SAFETY: this runs the initialisers of libcublas, a library made to be loaded at any time.
    if !unsafe { cublas::is_culib_present() } {
        return Err("libcublas.so cannot be loaded; if it is installed, put its folder in LD_LIBRARY_PATH".into());
    }
    let part = |property| {
        let mut value: c_int = 0;
        // SAFETY: the library is present, the call needs no handle, and it writes one int.
        let status = unsafe { cublas::cublasGetProperty(property, &raw mut value) };
        status.result().map(|()| value).map_err(|error| format!("cublasGetProperty: {error:?}"))
    };
    let [major, minor, patch] =
        [part(Property::MAJOR_VERSION)?, part(Property::MINOR_VERSION)?, part(Property::PATCH_LEVEL)?];
    Ok(format!("{major}.{minor}.{patch}"))
}

/// NCCL's library, by the names it has: cudarc does not look for `libnccl.so.2`, the only one that a machine without the
/// development package has. It is never unloaded, as code that uses it may hold its addresses.
pub(crate) fn nccl_library() -> Result<*mut c_void, String> {
    const NAMES: [&CStr; 2] = [c"libnccl.so.2", c"libnccl.so"];

    NAMES
        .iter()
        // SAFETY: the name ends in a zero; this runs the initialisers of a library made to be loaded at any time.
        .map(|name| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) })
        .find(|library| !library.is_null())
        .ok_or_else(|| {
            "libnccl.so.2 cannot be loaded; only ranks that are processes (--comm nccl) need it; if it is installed, put \
             its folder in LD_LIBRARY_PATH"
                .into()
        })
}

/// NCCL's version, asked of the library itself.
fn nccl_version() -> Result<String, String> {
    let library = nccl_library()?;
    // SAFETY: the library is loaded and the name ends in a zero.
    let symbol: *mut c_void = unsafe { libc::dlsym(library, c"ncclGetVersion".as_ptr()) };
    if symbol.is_null() {
        return Err("libnccl.so has no ncclGetVersion".into());
    }
    // SAFETY: this is the function's type in every version: ncclResult_t ncclGetVersion(int*).
    let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = unsafe { std::mem::transmute(symbol) };
    let mut version: c_int = 0;
    // SAFETY: it writes one int.
    let status = unsafe { get_version(&raw mut version) };
    if status != 0 {
        return Err(format!("ncclGetVersion returned {status}"));
    }
    Ok(format!("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100))
}

/// Tries the embedded kernels on the first GPU that is new enough.
fn try_kernels(gpus: &[Gpu]) -> Result<String, String> {
    let Some(gpu) = gpus.iter().find(|gpu| gpu.compute_capability >= LEAST_CAPABILITY) else {
        let (major, minor) = LEAST_CAPABILITY;
        return Err(format!("no GPU has compute capability {major}.{minor} or newer, which the kernels need"));
    };
    let name = format!("cuda:{}", gpu.ordinal);
    let tried = open(gpu.ordinal).and_then(|context| selftest(&Modules::new(&context)?));
    tried.map(|()| name.clone()).map_err(|error| format!("{name} does not work: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_why() {
        let found = probe();
        let text = found.to_string();
        assert!(text.contains("CUDA driver") && text.contains("cuBLAS") && text.contains("NCCL"), "{text}");
        if !is_driver_present() {
            assert!(found.driver.found().is_none() && found.usable.found().is_none() && found.gpus.found().is_none());
            assert!(text.contains("libcuda.so cannot be loaded"), "{text}");
        }
        assert_eq!(found.kernels.found().is_some(), kernels_embedded().is_ok());
    }
}
