//! The order in which a kernel visits tensors of one shape and several layouts: rows along the innermost dimension,
//! numbered by the others (`kernels/common/walk.cuh`).

use crate::tensor::{Layout, MAX_RANK};

/// What tensors have besides the innermost dimension.
const MAX_LEAD: usize = MAX_RANK - 1;

/// A dimension's size, and its stride in each of N layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dim<const N: usize> {
    pub(super) size: usize,
    pub(super) strides: [usize; N],
}

/// The dimensions of N layouts of one shape, as few as say the same: those of one entry left out, the rest ordered by the
/// last layout's strides, the largest first (so that its memory is walked in order), and merged where they follow each
/// other in every layout. At least one is left.
pub(super) fn dims<const N: usize>(layouts: [&Layout; N]) -> Vec<Dim<N>> {
    let shape = layouts[0].shape();
    let mut dims: Vec<Dim<N>> = (0..shape.len())
        .filter(|&d| shape[d] != 1)
        .map(|d| Dim { size: shape[d], strides: layouts.map(|l| l.strides()[d]) })
        .collect();
    dims.sort_by_key(|d| std::cmp::Reverse(d.strides[N - 1]));
    let mut merged: Vec<Dim<N>> = Vec::with_capacity(dims.len());
    for dim in dims {
        match merged.last_mut() {
            Some(outer) if (0..N).all(|n| outer.strides[n] == dim.strides[n] * dim.size) => {
                *outer = Dim { size: outer.size * dim.size, strides: dim.strides };
            }
            _ => merged.push(dim),
        }
    }
    if merged.is_empty() {
        merged.push(Dim { size: 1, strides: [1; N] });
    }
    merged
}

/// The dimensions that number the rows, outermost first, as a kernel's `Walk<N>`.
pub(super) fn words<const N: usize>(lead: &[Dim<N>]) -> Vec<u64> {
    let column = |of: &dyn Fn(&Dim<N>) -> usize| {
        let mut column = [0; MAX_LEAD];
        lead.iter().zip(&mut column).for_each(|(dim, word)| *word = of(dim) as u64);
        column
    };
    let mut words = vec![lead.len() as u64];
    words.extend(column(&|dim| dim.size));
    (0..N).for_each(|n| words.extend(column(&|dim| dim.strides[n])));
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Shape;

    fn layout(shape: &[usize]) -> Layout {
        Layout::contiguous(Shape::new(shape))
    }

    #[test]
    fn contiguous_layouts_are_one_dimension() {
        let both = dims([&layout(&[3, 1, 5]), &layout(&[3, 1, 5])]);
        assert_eq!(both, [Dim { size: 15, strides: [1, 1] }]);
        assert_eq!(dims([&layout(&[])]), [Dim { size: 1, strides: [1] }]);
        assert_eq!(dims([&layout(&[1, 1])]), [Dim { size: 1, strides: [1] }]);
    }

    #[test]
    fn the_last_layout_says_the_order() {
        // A transposed source into a contiguous destination, and the other way round.
        let (turned, plain) = (layout(&[4, 3]).transpose(0, 1).unwrap(), layout(&[3, 4]));
        let want = [Dim { size: 3, strides: [1, 4] }, Dim { size: 4, strides: [3, 1] }];
        assert_eq!(dims([&turned, &plain]), want);
        let want = [Dim { size: 4, strides: [1, 3] }, Dim { size: 3, strides: [4, 1] }];
        assert_eq!(dims([&plain, &turned]), want);
        // Both turned the same way: one stretch of memory.
        assert_eq!(dims([&turned, &turned]), [Dim { size: 12, strides: [1, 1] }]);
    }

    #[test]
    fn repeated_and_narrowed_dimensions_stay_apart() {
        let narrow = layout(&[2, 3, 8]).narrow(2, 1, 4).unwrap();
        let want = [Dim { size: 6, strides: [8, 4] }, Dim { size: 4, strides: [1, 1] }];
        assert_eq!(dims([&narrow, &layout(&[2, 3, 4])]), want);
        let repeated = Layout::strided([5, 4].into(), &[0, 1], 0).unwrap();
        let want = [Dim { size: 5, strides: [0, 4] }, Dim { size: 4, strides: [1, 1] }];
        assert_eq!(dims([&repeated, &layout(&[5, 4])]), want);
        assert_eq!(words(&want[..1]), [1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
    }
}
