//! Storage: a stretch of memory on some device, owned or borrowed.

use super::host::HostBlock;
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
    /// New host memory, 64-byte aligned: what a storage that went has left, where one of the size has.
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
