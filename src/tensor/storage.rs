//! Storage: a stretch of memory on some device, owned or borrowed.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Where memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The host's memory.
    Cpu,
    /// The memory of the CUDA device with this ordinal.
    Cuda(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// A shared handle to memory. Cloning shares it; the owner frees it when the last handle goes.
///
/// Like the memory behind a device pointer, its bytes are not tracked by the borrow checker: operations are issued on
/// a lane, a lane runs them in order, and work on two lanes that touches the same bytes is ordered by an event. Within
/// one operation, an output may share bytes with an input only where that operation's contract says so.
#[derive(Clone)]
pub struct Storage {
    ptr: *mut u8,
    bytes: usize,
    place: Place,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a Storage is an address with a shared owner that is itself Send; the bytes behind it are reached only by
// operations issued on lanes, whose order keeps two threads from touching them at once (see the type's contract).
unsafe impl Send for Storage {}
// SAFETY: as for Send; `&Storage` gives out the address and nothing else.
unsafe impl Sync for Storage {}

impl Storage {
    /// New host memory, 64-byte aligned. Zeroed memory comes from the system's zero pages and costs nothing up front.
    pub fn host(bytes: usize, zeroed: bool) -> Self {
        let block = HostBlock::new(bytes, zeroed);
        Storage { ptr: block.ptr, bytes, place: Place::Cpu, owner: Arc::new(block) }
    }

    /// Memory that `owner` keeps alive.
    ///
    /// # Safety
    /// `ptr` must be valid for reads and writes of `bytes` bytes on `place` as long as `owner` lives.
    pub unsafe fn from_raw(ptr: *mut u8, bytes: usize, place: Place, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Storage { ptr, bytes, place, owner }
    }

    /// The address of the first byte, on [`Storage::place`].
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Whether two handles share one owner.
    pub fn same(&self, other: &Storage) -> bool {
        Arc::ptr_eq(&self.owner, &other.owner)
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Storage({} bytes on {})", self.bytes, self.place)
    }
}

struct HostBlock {
    ptr: *mut u8,
    layout: Layout,
}

// SAFETY: the block owns its allocation; it is only freed, never read, through this handle.
unsafe impl Send for HostBlock {}
// SAFETY: as for Send.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    fn new(bytes: usize, zeroed: bool) -> Self {
        // Sizes come from element counts of tensors; one that overflows cannot be allocated in any case.
        let Ok(layout) = Layout::from_size_align(bytes.max(1), 64) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout has a size of at least one byte.
        let ptr = unsafe { if zeroed { alloc_zeroed(layout) } else { alloc(layout) } };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        HostBlock { ptr, layout }
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.ptr, self.layout) }
    }
}
