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
    /// By [`GradGroup`]: bytes of the buffers that slices are ranges of, and of these here, where both end at the same
    /// gradient. Empty where they are the same.
    planned: [Vec<(u64, u64)>; 3],
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
        Ok(GradientBuffers { groups: groups.clone(), flat, planned: Default::default(), reduced: Mutex::default() })
    }

    /// The same for slices of the buffers of a larger model, of which this is an image: `ends` has, by group, at how many
    /// bytes there and here the same gradients end, ascending. A slice there is one of the same gradients here.
    ///
    /// # Errors
    /// If these are not the ends of this model's buffers.
    pub fn planned_for(mut self, ends: [Vec<(u64, u64)>; 3]) -> Result<Self> {
        for group in GradGroup::ALL {
            let (ends, bytes) = (&ends[group as usize], self.bytes(group));
            if ends.last().map_or(0, |end| end.1) != bytes || !ends.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1) {
                config_err!("{} gradients of {bytes} bytes as an image of {ends:?}: they end together", group.name());
            }
        }
        self.planned = ends;
        Ok(self)
    }

    /// Bytes of a group's gradients.
    fn bytes(&self, group: GradGroup) -> u64 {
        self.flat(group).map_or(0, |flat| (flat.elements() * flat.dtype().size()) as u64)
    }

    /// The byte here of a byte of the buffer that slices are ranges of.
    fn here(&self, group: GradGroup, byte: u64, size: u64) -> u64 {
        let ends = &self.planned[group as usize];
        let after = ends.partition_point(|end| end.0 < byte);
        let Some(&(there, here)) = ends.get(after) else { return byte };
        let (before, at) = if after == 0 { (0, 0) } else { ends[after - 1] };
        // Rounded down to whole elements, so that nothing is summed before it is complete.
        let part = (byte - before) as f64 / (there - before).max(1) as f64;
        if byte == there { here } else { at + ((here - at) as f64 * part) as u64 / size * size }
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
        let bytes = self.planned[group as usize].last().map_or(self.bytes(group), |end| end.0);
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
        let (begin, end) = (self.here(group, begin, size), self.here(group, end, size));
        if comm.size() == 1 || begin == end {
            return Ok(());
        }
        comm.all_reduce(lane, &flat.narrow(0, (begin / size) as usize, ((end - begin) / size) as usize)?)
    }

    /// What has not been summed this step.
    pub fn rest(&self) -> Vec<Slice> {
        let reduced = *self.reduced.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = |group: GradGroup| {
            let planned = self.planned[group as usize].last().map(|end| end.0);
            let (begin, end) = (reduced[group as usize], planned.unwrap_or(self.bytes(group)));
            (begin < end).then_some(Slice { group, begin, end })
        };
        GradGroup::ALL.into_iter().filter_map(rest).collect()
    }
}
