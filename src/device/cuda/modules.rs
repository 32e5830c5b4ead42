//! The embedded kernels: finds their entry points by name and launches them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::CudaError;

mod built {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The fat binary, on the boundary that the driver reads its 8-byte words from.
#[repr(C, align(16))]
struct FatBinary([u8; built::LENGTH]);

// In the section where nvcc's own linker puts device code, so that `cuobjdump` lists it in the finished program too.
#[cfg_attr(target_os = "linux", unsafe(link_section = ".nv_fatbin"))]
static FAT_BINARY: FatBinary = FatBinary(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The embedded fat binary, empty in a build without kernels: one container per kernel file, end to end.
#[must_use]
pub fn fat_binary() -> &'static [u8] {
    &FAT_BINARY.0
}

/// What the embedded kernels were compiled with and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedded {
    /// The version of nvcc.
    pub nvcc: &'static str,
    /// Machine code (`sm_…`) and PTX (`compute_…`) in the fat binary.
    pub archs: &'static [&'static str],
}

/// Whether this build has kernels in it.
///
/// # Errors
///
/// [`CudaError::NoKernels`], saying why not.
pub fn kernels_embedded() -> Result<Embedded, CudaError> {
    match (built::ABSENT, built::NVCC_VERSION) {
        (None, Some(nvcc)) => Ok(Embedded { nvcc, archs: built::ARCHS }),
        (reason, _) => Err(CudaError::NoKernels { reason: reason.unwrap_or("the build embedded none") }),
    }
}

/// A loaded module of the driver's, unloaded with its last user.
#[derive(Debug)]
struct Module {
    handle: sys::CUmodule,
    context: Arc<CudaContext>,
}

// SAFETY: a module handle may be used from any thread that has its context current, and every use here makes it so.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // There is nobody to tell of a failure: the context keeps it for the next call that can return one.
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: the handle came from cuModuleLoadData, is unloaded only here, and no Function is left, each of which
        // holds this module.
        self.context.record_err(unsafe { result::module::unload(self.handle) });
    }
}

impl Module {
    fn function(self: &Arc<Self>, name: &str) -> Result<Function, CudaError> {
        let action = || format!("finding the kernel '{name}'");
        let c_name =
            CString::new(name).map_err(|_| CudaError::NoKernelFile { name: name.into(), files: unit_names() })?;
        self.context.bind_to_thread().map_err(CudaError::driver(action()))?;
        // SAFETY: the module is loaded and alive, the name ends in a zero.
        let handle =
            unsafe { result::module::get_function(self.handle, c_name) }.map_err(CudaError::driver(action()))?;
        Ok(Function { handle, name: name.into(), module: self.clone() })
    }
}

/// The embedded kernels on one GPU. A kernel file's code is loaded when one of its entry points is first asked for.
#[derive(Debug)]
pub struct Modules {
    context: Arc<CudaContext>,
    /// One per kernel file, in the order of the build's table.
    loaded: Vec<OnceLock<Arc<Module>>>,
    functions: Mutex<HashMap<String, Function>>,
    multiprocessors: u32,
    overlay: Option<Overlay>,
}

/// Somebody's code whose entry points go before the embedded ones of the same name.
#[derive(Debug)]
struct Overlay {
    module: Arc<Module>,
    /// The entry points asked for since the last reading, and whether it has them.
    asked: Mutex<BTreeMap<String, bool>>,
}

impl Modules {
    /// The embedded kernels for `context`'s GPU. Loads nothing yet.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoKernels`] in a build without kernels.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        kernels_embedded()?;
        let count = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(CudaError::driver("asking for the number of multiprocessors"))?;
        Ok(Self {
            context: context.clone(),
            loaded: built::UNITS.iter().map(|_| OnceLock::new()).collect(),
            functions: Mutex::default(),
            multiprocessors: u32::try_from(count).unwrap_or(1).max(1),
            overlay: None,
        })
    }

    /// The same kernels, with the entry points of `image` (a fat binary, a cubin or PTX called `name`) in the place of
    /// those of the same name.
    ///
    /// # Errors
    ///
    /// [`CudaError::Driver`] when the driver does not load the image.
    pub fn with_image(&self, name: &str, image: &[u8]) -> Result<Self, CudaError> {
        let module = load(&self.context, || format!("loading the kernels of {name}"), &aligned(image))?;
        Ok(Self {
            overlay: Some(Overlay { module, asked: Mutex::default() }),
            multiprocessors: self.multiprocessors,
            ..Self::new(&self.context)?
        })
    }

    /// The entry points asked for since the last call of this, and whether they were those of [`Modules::with_image`]'s
    /// image.
    #[must_use]
    pub fn asked(&self) -> Vec<(String, bool)> {
        let asked = |overlay: &Overlay| {
            let asked = std::mem::take(&mut *overlay.asked.lock().unwrap_or_else(PoisonError::into_inner));
            asked.into_iter().collect()
        };
        self.overlay.as_ref().map_or_else(Vec::new, asked)
    }

    /// The GPU that the kernels are for.
    #[must_use]
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The number of the GPU's streaming multiprocessors, what a grid is sized by.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The entry point `name`. Its file is the one whose name it has or begins with: `gelu_forward_bf16` is in `gelu.cu`.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoKernelFile`] when there is no such file, [`CudaError::Driver`] when the file has no such entry
    /// point or its code does not load (no code for this GPU, an old driver).
    pub fn function(&self, name: &str) -> Result<Function, CudaError> {
        // A panic while the lock is held leaves a map that is whole all the same.
        if let Some(function) = self.functions.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            self.note(function);
            return Ok(function.clone());
        }
        let function = match self.overlaid(name)? {
            Some(function) => function,
            None => self.module(unit_of(name)?)?.function(name)?,
        };
        self.functions.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), function.clone());
        self.note(&function);
        Ok(function)
    }

    /// For [`Modules::asked`].
    fn note(&self, function: &Function) {
        if let Some(Overlay { module, asked }) = &self.overlay {
            let found = Arc::ptr_eq(module, &function.module);
            asked.lock().unwrap_or_else(PoisonError::into_inner).insert(function.name.to_string(), found);
        }
    }

    /// The entry point of the overlay, if there is one.
    fn overlaid(&self, name: &str) -> Result<Option<Function>, CudaError> {
        let Some(overlay) = &self.overlay else { return Ok(None) };
        match overlay.module.function(name) {
            Ok(function) => Ok(Some(function)),
            Err(CudaError::Driver { code, .. }) if code == sys::CUresult::CUDA_ERROR_NOT_FOUND as u32 => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Loads the code of every kernel file: whether all of it suits this GPU and its driver.
    ///
    /// # Errors
    ///
    /// [`CudaError::Driver`], naming the file whose code does not load.
    pub fn load_all(&self) -> Result<(), CudaError> {
        (0..built::UNITS.len()).try_for_each(|unit| self.module(unit).map(|_| ()))
    }

    fn module(&self, unit: usize) -> Result<Arc<Module>, CudaError> {
        let slot = &self.loaded[unit];
        if let Some(module) = slot.get() {
            return Ok(module.clone());
        }
        let (name, range) = &built::UNITS[unit];
        let module = load(&self.context, || format!("loading the kernels of {name}.cu"), &fat_binary()[range.clone()])?;
        // Of two threads that load at once one's module is dropped again.
        Ok(slot.get_or_init(|| module).clone())
    }
}

/// Loads an image, which begins on an 8-byte boundary.
fn load(context: &Arc<CudaContext>, action: impl Fn() -> String, image: &[u8]) -> Result<Arc<Module>, CudaError> {
    context.bind_to_thread().map_err(CudaError::driver(action()))?;
    // SAFETY: an image says its own length, and the driver refuses what is none; PTX ends in a zero.
    let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(CudaError::driver(action()))?;
    Ok(Arc::new(Module { handle, context: context.clone() }))
}

/// The bytes on an 8-byte boundary, with zeros behind them.
fn aligned(image: &[u8]) -> Vec<u8> {
    // The allocator's blocks of this size begin on 16-byte boundaries.
    let mut bytes = Vec::with_capacity(image.len() + 16);
    bytes.extend_from_slice(image);
    bytes.resize(image.len() + 16, 0);
    bytes
}

fn unit_names() -> Vec<&'static str> {
    built::UNITS.iter().map(|(name, _)| *name).collect()
}

/// The index of the kernel file that `function` is in: the longest file name that it begins with.
fn unit_of(function: &str) -> Result<usize, CudaError> {
    let file = |name: &'static str| name.rsplit('/').next().unwrap_or(name);
    built::UNITS
        .iter()
        .enumerate()
        .filter(|(_, (name, _))| {
            function.strip_prefix(file(name)).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        })
        .max_by_key(|(_, (name, _))| file(name).len())
        .map(|(index, _)| index)
        .ok_or_else(|| CudaError::NoKernelFile { name: function.into(), files: unit_names() })
}

/// A kernel that can be launched.
#[derive(Clone, Debug)]
pub struct Function {
    handle: sys::CUfunction,
    name: Arc<str>,
    /// The handle is valid as long as its module is loaded.
    module: Arc<Module>,
}

// SAFETY: a function handle may be launched from any thread that has its context current; `launch` makes it so.
unsafe impl Send for Function {}
// SAFETY: as above; a launch does not change the handle.
unsafe impl Sync for Function {}

/// The size of a launch: blocks, threads per block, and bytes of dynamic shared memory per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: (u32, u32, u32),
    /// Threads in x, y and z.
    pub block: (u32, u32, u32),
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Dynamic shared memory that a block has without being asked for: of 48 KiB in all, the rest is left to the kernel's own
/// variables.
const DEFAULT_SHARED: u32 = 32 << 10;

impl Function {
    fn allow_shared(&self, bytes: u32) -> Result<(), DriverError> {
        if bytes <= DEFAULT_SHARED {
            return Ok(());
        }
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the handle's module is alive; this sets a number of its own.
        unsafe { result::function::set_function_attribute(self.handle, most, bytes as i32) }
    }

    /// The entry point's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts the kernel on `stream` with `arguments`, pointers to the values of its parameters, and returns at once; a
    /// failure while it runs is reported by a later call.
    ///
    /// # Errors
    ///
    /// [`CudaError::Driver`] with the kernel's name, the launch's size and `shape`, the caller's words for the data.
    ///
    /// # Safety
    ///
    /// `arguments` must point to values of the types of the kernel's parameters, in their number and order; the device
    /// memory they name must be valid for what the kernel reads and writes until it has run, and must not be used by
    /// another stream meanwhile.
    pub unsafe fn launch(
        &self,
        stream: &CudaStream,
        launch: Launch,
        arguments: &mut [*mut c_void],
        shape: &str,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, launch, arguments, || shape.to_owned()) }
    }

    /// [`Function::launch`] with words for the data that are made only for an error.
    ///
    /// # Errors
    /// As [`Function::launch`].
    ///
    /// # Safety
    /// As [`Function::launch`].
    pub(super) unsafe fn launch_with(
        &self,
        stream: &CudaStream,
        launch: Launch,
        arguments: &mut [*mut c_void],
        shape: impl FnOnce() -> String,
    ) -> Result<(), CudaError> {
        let action = || {
            let (Launch { grid, block, shared }, shape) = (launch, shape());
            format!("launching {} on {shape} (grid {grid:?}, block {block:?}, {shared} bytes shared)", self.name)
        };
        if stream.context() != &self.module.context {
            return Err(CudaError::Argument {
                operation: self.name.to_string(),
                rule: format!(
                    "the stream is of GPU {}, the kernel was loaded on GPU {}; both must be of one context",
                    stream.context().ordinal(),
                    self.module.context.ordinal()
                ),
            });
        }
        let Launch { grid, block, shared } = launch;
        self.module
            .context
            .bind_to_thread()
            .and_then(|()| self.allow_shared(shared))
            // SAFETY: the handle's module is alive and its context current; the rest is the caller's promise.
            .and_then(|()| unsafe {
                result::launch_kernel(self.handle, grid, block, shared, stream.cu_stream(), arguments)
            })
            .map_err(|e| CudaError::driver(action())(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_containers_are_whole() {
        let Ok(embedded) = kernels_embedded() else {
            assert!(fat_binary().is_empty());
            return;
        };
        assert_eq!(embedded.archs, ["sm_80", "sm_90a", "compute_80"]);
        for (name, range) in built::UNITS {
            let container = &fat_binary()[range.clone()];
            assert_eq!(range.start % 8, 0, "{name} is not on an 8-byte boundary");
            assert_eq!(container[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name} does not begin as a fat binary");
            let body = u64::from_le_bytes(container[8..16].try_into().unwrap());
            assert_eq!(usize::from(container[6]) + body as usize, container.len(), "{name} has another length");
        }
    }

    #[test]
    fn an_entry_point_is_found_by_its_files_name() {
        if kernels_embedded().is_err() {
            return;
        }
        let file = |function| built::UNITS[unit_of(function).unwrap()].0;
        assert_eq!(file("gelu_forward_bf16"), "expert/gelu");
        assert_eq!(file("swiglu_backward_f32"), "expert/swiglu");
        assert_eq!(file("copy_many"), "comm/copy_many");
        for unknown in ["glu_forward_f32", "gel", "gelux_forward", ""] {
            let message = unit_of(unknown).unwrap_err().to_string();
            assert!(message.contains(&format!("'{unknown}'")) && message.contains("expert/gelu"), "{message}");
        }
    }

    #[test]
    fn without_a_driver_opening_is_an_error() {
        if !crate::device::cuda::is_driver_present() {
            assert!(matches!(crate::device::cuda::open(0), Err(CudaError::NoDriver)));
        }
    }
}
