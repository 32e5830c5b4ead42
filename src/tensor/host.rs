//! Host memory of tensors, kept when they go and given to the next of its size.
//!
//! A step allocates what the step before it freed. Given back to the system in between, every page of it would be a fault,
//! and pages to clear: as much time as a layer's products take.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Blocks from here on are kept: the system's allocator keeps smaller ones by itself.
const KEPT_FROM: usize = 64 << 10;

/// What is kept. Never more than makes, with what is in use, the most that was in use at a time: a process holds what it has
/// needed, no more.
struct Kept<B> {
    in_use: usize,
    most: usize,
    kept: usize,
    blocks: BTreeMap<usize, Vec<B>>,
}

impl<B> Kept<B> {
    const fn new() -> Self {
        Kept { in_use: 0, most: 0, kept: 0, blocks: BTreeMap::new() }
    }

    /// A block of `size`, if one is kept; and blocks to free, largest first, where a new one makes the sum too large.
    fn take(&mut self, size: usize) -> (Option<B>, Vec<(usize, B)>) {
        self.in_use += size;
        self.most = self.most.max(self.in_use);
        let block = self.pop(size);
        let mut surplus = Vec::new();
        while self.in_use + self.kept > self.most {
            let Some(&largest) = self.blocks.keys().next_back() else { break };
            surplus.extend(self.pop(largest).map(|block| (largest, block)));
        }
        (block, surplus)
    }

    /// Keeps a block of `size` that was in use.
    fn give(&mut self, size: usize, block: B) {
        self.in_use -= size;
        self.kept += size;
        self.blocks.entry(size).or_default().push(block);
    }

    fn pop(&mut self, size: usize) -> Option<B> {
        let blocks = self.blocks.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.blocks.remove(&size);
        }
        self.kept -= if block.is_some() { size } else { 0 };
        block
    }
}

/// Memory that nobody uses.
struct Unused(*mut u8);

// SAFETY: an address of memory that nothing else refers to.
unsafe impl Send for Unused {}

static KEPT: Mutex<Kept<Unused>> = Mutex::new(Kept::new());

fn kept() -> std::sync::MutexGuard<'static, Kept<Unused>> {
    // Nothing in between can panic and leave it half done.
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Owned host memory, 64-byte aligned.
pub(super) struct HostBlock {
    pub(super) ptr: *mut u8,
    layout: Layout,
}

// SAFETY: the block owns its allocation; it is only freed, never read, through this handle.
unsafe impl Send for HostBlock {}
// SAFETY: as for Send.
unsafe impl Sync for HostBlock {}

impl HostBlock {
    pub(super) fn new(bytes: usize, zeroed: bool) -> Self {
        // Sizes come from element counts of tensors; one that overflows cannot be allocated in any case.
        let Ok(layout) = Layout::from_size_align(bytes.max(1), 64) else { handle_alloc_error(Layout::new::<u8>()) };
        if layout.size() >= KEPT_FROM {
            let (block, surplus) = kept().take(layout.size());
            for (size, Unused(ptr)) in surplus {
                // SAFETY: allocated below with a layout of this size and alignment, and used by nobody.
                unsafe { dealloc(ptr, Layout::from_size_align_unchecked(size, 64)) }
            }
            if let Some(Unused(ptr)) = block {
                if zeroed {
                    // SAFETY: a block of this size that is ours alone.
                    unsafe { ptr.write_bytes(0, layout.size()) }
                }
                return HostBlock { ptr, layout };
            }
        }
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
        if self.layout.size() >= KEPT_FROM {
            kept().give(self.layout.size(), Unused(self.ptr));
        } else {
            // SAFETY: allocated in `new` with this layout, freed once.
            unsafe { dealloc(self.ptr, self.layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_is_given_again_and_no_more_is_held_than_was_ever_in_use() {
        let mut kept = Kept::new();
        for block in ["a", "b"] {
            assert_eq!(kept.take(100), (None, vec![]), "{block}");
        }
        kept.give(100, "a");
        assert_eq!(kept.take(100), (Some("a"), vec![]));
        kept.give(100, "a");
        // 100 in use, 100 kept, 200 at most: room for 50 more is a's.
        assert_eq!(kept.take(50), (None, vec![(100, "a")]));
        kept.give(100, "b");
        kept.give(50, "c");
        assert_eq!((kept.in_use, kept.kept, kept.most), (0, 150, 200));
        // Of another size, but within the most.
        assert_eq!(kept.take(40), (None, vec![]));
        assert_eq!(kept.take(60), (None, vec![(100, "b")]));
        assert_eq!(kept.take(50), (Some("c"), vec![]));
        assert_eq!((kept.in_use, kept.kept, kept.most), (150, 0, 200));
        assert_eq!(kept.take(60), (None, vec![]));
        assert_eq!(kept.most, 210);
    }

    #[test]
    fn zeroed_memory_is_zero_also_when_it_was_used_before() {
        let bytes = KEPT_FROM + 12_352;
        for round in 0..3 {
            let block = HostBlock::new(bytes, true);
            // SAFETY: the block's own bytes, which nothing else refers to.
            let bytes = unsafe { std::slice::from_raw_parts_mut(block.ptr, bytes) };
            assert!(bytes.iter().all(|b| *b == 0), "round {round}");
            bytes.fill(7);
        }
    }
}
