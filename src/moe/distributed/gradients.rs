//! Gradients in one flat buffer per reduction group, summed over ranks in slices.

use crate::autograd::Parameter;
use crate::comm::Groups;
use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::schedule::{GradGroup, Slice};
use crate::tensor::Tensor;
use std::sync::{Mutex, PoisonError};

/// The gradients of one rank's parameters, a flat buffer for each group of ranks that they are summed over.
///
/// Inside a buffer gradients lie in the order in which the backward completes them. Slices of it are summed in that order,
/// each byte once a step: on the last micro-batch.
pub struct GradientBuffers {
    groups: Groups,
    /// By [`GradGroup`]; none where no parameter is of that group.
    flat: [Option<Tensor>; 3],
    /// By [`GradGroup`]: the bytes that have been summed this step.
    reduced: Mutex<[u64; 3]>,
}

impl GradientBuffers {
    /// Has the gradients of `parameters`, given in the order in which the backward completes them, lie in buffers. They
    /// are zero afterwards.
    ///
    /// # Errors
    /// If parameters of one group differ in dtype, a gradient has a place already, or the device has no memory left.
    pub fn new(lane: &Lane, groups: &Groups, parameters: &[(Parameter, GradGroup)]) -> Result<Self> {
        let mut flat = [None, None, None];
        for group in GradGroup::ALL {
            let members: Vec<&Parameter> = parameters.iter().filter(|(_, g)| *g == group).map(|(p, _)| p).collect();
            let Some(first) = members.first() else { continue };
            let dtype = first.value().dtype();
            if let Some(other) = members.iter().find(|p| p.value().dtype() != dtype) {
                config_err!("{other:?} and {first:?} in one buffer of gradients: both have one dtype");
            }
            let buffer = lane.zeros([members.iter().map(|p| p.elements()).sum()], dtype)?;
            let mut at = 0;
            for p in members {
                p.place_grad(buffer.narrow(0, at, p.elements())?.reshape(*p.value().shape())?)?;
                at += p.elements();
            }
            flat[group as usize] = Some(buffer);
        }
        Ok(GradientBuffers { groups: groups.clone(), flat, reduced: Mutex::default() })
    }

    /// A group's buffer, of one dimension; none where no parameter is of that group.
    pub fn flat(&self, group: GradGroup) -> Option<&Tensor> {
        self.flat[group as usize].as_ref()
    }

    /// Sets all gradients to zero and begins a step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn zero(&self, lane: &Lane) -> Result<()> {
        *self.reduced.lock().unwrap_or_else(PoisonError::into_inner) = [0; 3];
        self.flat.iter().flatten().try_for_each(|t| lane.fill(t, 0.0))
    }

    /// Sums a slice over its group's ranks, in place. A collective of the group.
    ///
    /// # Errors
    /// If the slice does not begin where the last one ended, or lies outside of the buffer or not on whole elements; if a
    /// rank fails or never comes.
    pub fn reduce(&self, lane: &Lane, slice: Slice) -> Result<()> {
        let Slice { group, begin, end } = slice;
        let Some(flat) = self.flat(group) else {
            config_err!("a slice of {} gradients: there are none of this group", group.name());
        };
        let size = flat.dtype().size() as u64;
        let bytes = flat.elements() as u64 * size;
        {
            let mut reduced = self.reduced.lock().unwrap_or_else(PoisonError::into_inner);
            let before = &mut reduced[group as usize];
            if begin != *before || end < begin || end > bytes || !end.is_multiple_of(size) {
                config_err!(
                    "bytes {begin}..{end} of the {} gradients: {before} of {bytes} are summed, and a slice begins there, \
                     of whole elements of {size} bytes",
                    group.name()
                );
            }
            *before = end;
        }
        let comm = self.groups.get(group.kind());
        if comm.size() == 1 || begin == end {
            return Ok(());
        }
        comm.all_reduce(lane, &flat.narrow(0, (begin / size) as usize, ((end - begin) / size) as usize)?)
    }

    /// What has not been summed this step.
    pub fn rest(&self) -> Vec<Slice> {
        let reduced = *self.reduced.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = |group: GradGroup| {
            let flat = self.flat(group)?;
            let (begin, end) = (reduced[group as usize], (flat.elements() * flat.dtype().size()) as u64);
            (begin < end).then_some(Slice { group, begin, end })
        };
        GradGroup::ALL.into_iter().filter_map(rest).collect()
    }
}
