//! NCCL's functions, loaded when they are first asked for: the same binary starts where there is no NCCL.

use crate::device::cuda::probe::nccl_library;
use crate::error::{Error, Result};
use crate::tensor::DType;
use cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

pub(super) use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

/// What a call comes to: a number, as newer libraries have results that these bindings have not.
pub(super) type Status = c_int;
pub(super) const SUCCESS: Status = sys::ncclResult_t::ncclSuccess as Status;
pub(super) const IN_PROGRESS: Status = sys::ncclResult_t::ncclInProgress as Status;

/// The color of a rank that is to be in no group of a split.
pub(super) const NO_COLOR: c_int = -1;

macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ty),*) -> $out:ty;)+) => {
        /// The functions. Which thread calls them does not matter; one at a time does, but for those that watch and abort.
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> $out,)+
        }

        impl Library {
            fn load() -> Result<Self, String> {
                let library = nccl_library()?;
                let find = |name: &'static CStr| {
                    // SAFETY: the library is loaded and the name ends in a zero.
                    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
                    if symbol.is_null() {
                        return Err(format!("libnccl.so has no {}: NCCL 2.18 and later have it", name.to_string_lossy()));
                    }
                    Ok(symbol)
                };
                Ok(Library {
                    // SAFETY: these are the functions' types in NCCL 2.18 and later.
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> $out>(find($symbol)?)
                    },)+
                })
            }
        }
    };
}

functions! {
    get_unique_id = c"ncclGetUniqueId" (*mut ncclUniqueId) -> Status;
    init_rank = c"ncclCommInitRankConfig" (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Status;
    split = c"ncclCommSplit" (ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut ncclConfig_t) -> Status;
    destroy = c"ncclCommDestroy" (ncclComm_t) -> Status;
    abort = c"ncclCommAbort" (ncclComm_t) -> Status;
    async_error = c"ncclCommGetAsyncError" (ncclComm_t, *mut Status) -> Status;
    device = c"ncclCommCuDevice" (ncclComm_t, *mut c_int) -> Status;
    count = c"ncclCommCount" (ncclComm_t, *mut c_int) -> Status;
    user_rank = c"ncclCommUserRank" (ncclComm_t, *mut c_int) -> Status;
    error_string = c"ncclGetErrorString" (Status) -> *const c_char;
    last_error = c"ncclGetLastError" (ncclComm_t) -> *const c_char;
    group_start = c"ncclGroupStart" () -> Status;
    group_end = c"ncclGroupEnd" () -> Status;
    send = c"ncclSend" (*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> Status;
    recv = c"ncclRecv" (*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> Status;
    all_gather = c"ncclAllGather" (*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> Status;
    reduce_scatter = c"ncclReduceScatter" (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> Status;
    all_reduce = c"ncclAllReduce" (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> Status;
    broadcast = c"ncclBroadcast" (*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> Status;
}

impl Library {
    /// The library.
    ///
    /// # Errors
    /// If it cannot be loaded, or is too old.
    pub(super) fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Library::load).as_ref().map_err(|e| Error::Device(format!("NCCL: {e}")))
    }

    /// What a status means; with what NCCL last complained of, if it did.
    pub(super) fn explain(&self, status: Status) -> String {
        let text = |chars: *const c_char| match chars.is_null() {
            true => String::new(),
            // SAFETY: NCCL gives texts that end in a zero and stay.
            false => unsafe { CStr::from_ptr(chars) }.to_string_lossy().trim().to_owned(),
        };
        // SAFETY: any status has a text; no communicator is needed to ask for the last complaint.
        let (what, last) =
            unsafe { (text((self.error_string)(status)), text((self.last_error)(std::ptr::null_mut()))) };
        if last.is_empty() { what } else { format!("{what} ({last})") }
    }
}

/// A configuration that leaves everything to NCCL, but for how many CTAs a collective may take, and that calls return
/// when their work is issued.
pub(super) fn config(ctas: Option<u32>) -> ncclConfig_t {
    let (unset, none) = (c_int::MIN, std::ptr::null());
    let most = ctas.map_or(unset, |n| c_int::try_from(n).unwrap_or(c_int::MAX));
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22_800 as c_uint,
        blocking: 1,
        cgaClusterSize: unset,
        minCTAs: if ctas.is_some() { 1 } else { unset },
        maxCTAs: most,
        netName: none,
        splitShare: unset,
        trafficClass: unset,
        commName: none,
        collnetEnable: unset,
        CTAPolicy: unset,
        shrinkShare: unset,
        nvlsCTAs: unset,
        nChannelsPerNetPeer: unset,
        nvlinkCentricSched: unset,
    }
}

/// NCCL's name for a dtype.
pub(super) fn data_type(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::BF16 => ncclDataType_t::ncclBfloat16,
        DType::F16 => ncclDataType_t::ncclFloat16,
        DType::I32 => ncclDataType_t::ncclInt32,
    }
}
