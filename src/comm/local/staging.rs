//! The way between nodes of a virtual cluster: through host memory, by the GPU's copy engines.

use crate::device::Lane;
use crate::device::cuda::Cuda;
use crate::error::{Error, Result};
use crate::tensor::{Storage, Tensor};
use std::sync::{Mutex, PoisonError};

/// A rank's host memory for what it sends to other nodes.
#[derive(Default)]
pub(super) struct Staging(Mutex<Option<Storage>>);

/// Tensors that lie in host memory.
#[derive(Clone)]
pub(super) struct Staged {
    host: Storage,
    /// Where each of them begins; none for those that no other node asks for.
    offsets: Vec<Option<usize>>,
}

/// Each begins at a multiple of this many bytes.
const ALIGN: usize = 256;

impl Staging {
    /// Puts those of `sends` that `which` says on their way to the host. What was there before must have been read by
    /// what the lane waits for.
    ///
    /// # Errors
    /// If the host has no memory left, or the device fails.
    pub(super) fn stage(
        &self,
        lane: &Lane,
        cuda: &Cuda,
        sends: &[Tensor],
        which: impl Fn(usize) -> bool,
    ) -> Result<Staged> {
        let mut bytes = 0;
        let mut place = |(i, t): (usize, &Tensor)| {
            which(i).then(|| {
                let at = bytes;
                bytes += (t.elements() * t.dtype().size()).next_multiple_of(ALIGN);
                at
            })
        };
        let offsets: Vec<Option<usize>> = sends.iter().enumerate().map(&mut place).collect();
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let host = match &*memory {
            Some(host) if host.bytes() >= bytes => host.clone(),
            _ => {
                // Nothing reads the old one any more.
                lane.synchronize()?;
                memory.insert(cuda.pinned(bytes.next_power_of_two())?).clone()
            }
        };
        for (t, offset) in sends.iter().zip(&offsets) {
            if let Some(offset) = offset {
                cuda.copy_to_pinned(t, &host, *offset)?;
            }
        }
        Ok(Staged { host, offsets })
    }
}

impl Staged {
    /// Puts number `i` on its way to `to`.
    ///
    /// # Errors
    /// If it is not there, or the device fails.
    pub(super) fn fetch(&self, cuda: &Cuda, i: usize, to: &Tensor) -> Result<()> {
        match self.offsets.get(i) {
            Some(Some(offset)) => cuda.copy_from_pinned(&self.host, *offset, to),
            _ => Err(Error::Comm(format!("part {i} of what a rank sends is not in host memory"))),
        }
    }
}
