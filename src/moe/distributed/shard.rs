//! Which part of a logical tensor each rank holds.

use crate::device::Lane;
use crate::error::{Result, config_err, shape_err};
use crate::tensor::{Shape, Tensor};

/// How a logical tensor is divided among the ranks of a world. The first [`Sharding::parts`] ranks hold all of it, and so
/// does every as many that follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharding {
    full: Shape,
    splits: Vec<Split>,
}

/// A dimension that is divided among `members` ranks: rank r is number (r / stride) mod members of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Split {
    dim: usize,
    /// Lengths that add up to the dimension's. Each is divided evenly; a part has its share of all of them, one after the
    /// other.
    sections: Vec<usize>,
    members: usize,
    stride: usize,
}

impl Split {
    fn new(full: Shape, dim: usize, sections: &[usize], members: usize, stride: usize) -> Result<Self> {
        if dim >= full.len() || sections.iter().sum::<usize>() != full[dim] {
            shape_err!("sections {sections:?} of dimension {dim} of a tensor of shape {full}: they add up to it");
        }
        if let Some(section) = sections.iter().find(|section| !section.is_multiple_of(members)) {
            config_err!(
                "{section} of dimension {dim} of a tensor of shape {full} for {members} ranks: as much for each"
            );
        }
        Ok(Split { dim, sections: sections.to_vec(), members, stride })
    }
}

impl Sharding {
    /// Of a dense parameter of shape `full`: dimension `dim` is divided among the `mp` ranks of an MP group, each of
    /// `sections`, whose lengths add up to it, for itself.
    ///
    /// # Errors
    /// If there is no such dimension, or `mp` does not divide a section.
    pub fn dense(full: Shape, dim: usize, sections: &[usize], mp: usize) -> Result<Self> {
        Ok(Sharding { full, splits: vec![Split::new(full, dim, sections, mp, 1)?] })
    }

    /// Of an expert parameter of shape `full`, of which each rank has as much as `part`: experts, the first dimension, are
    /// divided among the `ep` ranks of an EP group, the inner width, whichever dimension it is, among the `esp` of an ESP
    /// group.
    ///
    /// # Errors
    /// If the parts do not make up the whole.
    pub fn expert(full: Shape, part: Shape, ep: usize, esp: usize) -> Result<Self> {
        let mut splits = Vec::new();
        if full.len() == part.len() {
            for d in 0..full.len() {
                let (members, stride) = if d == 0 { (ep, esp) } else { (esp, 1) };
                if members > 1 && (d == 0 || part[d] != full[d]) {
                    splits.push(Split::new(full, d, &[full[d]], members, stride)?);
                }
            }
        }
        let sharding = Sharding { full, splits };
        if sharding.part() != part || sharding.splits.iter().filter(|split| split.dim > 0).count() > 1 {
            shape_err!(
                "a part of shape {part} of an expert parameter of shape {full}, with {ep} ranks to an EP group and {esp} to \
                 an ESP group: experts are divided among the former, one other dimension among the latter"
            );
        }
        Ok(sharding)
    }

    /// The logical tensor's shape.
    pub fn full(&self) -> Shape {
        self.full
    }

    /// The shape of what each rank holds.
    pub fn part(&self) -> Shape {
        let mut dims = self.full.dims().to_vec();
        self.splits.iter().for_each(|split| dims[split.dim] /= split.members);
        Shape::new(&dims)
    }

    /// How many ranks hold it all.
    pub fn parts(&self) -> usize {
        self.splits.iter().map(|split| split.members).product()
    }

    /// Copies rank `rank`'s part of `whole` to `part`.
    ///
    /// # Errors
    /// If one of them has another shape, or the device fails.
    pub fn take(&self, lane: &Lane, rank: usize, whole: &Tensor, part: &Tensor) -> Result<()> {
        self.views(rank, whole, part)?.iter().try_for_each(|(whole, part)| lane.copy(whole, part))
    }

    /// Copies `part` to where rank `rank`'s lies in `whole`.
    ///
    /// # Errors
    /// If one of them has another shape, or the device fails.
    pub fn put(&self, lane: &Lane, rank: usize, part: &Tensor, whole: &Tensor) -> Result<()> {
        self.views(rank, whole, part)?.iter().try_for_each(|(whole, part)| lane.copy(part, whole))
    }

    /// Views of the whole and of a rank's part of it that are of the same elements.
    fn views(&self, rank: usize, whole: &Tensor, part: &Tensor) -> Result<Vec<(Tensor, Tensor)>> {
        if *whole.shape() != self.full || *part.shape() != self.part() {
            shape_err!(
                "a part of shape {} of a tensor of shape {}: the whole has shape {}, each part {}",
                part.shape(),
                whole.shape(),
                self.full,
                self.part()
            );
        }
        let mut views = vec![(whole.clone(), part.clone())];
        for Split { dim, sections, members, stride } in &self.splits {
            let member = rank / stride % members;
            let mut finer = Vec::with_capacity(views.len() * sections.len());
            for (whole, part) in &views {
                let mut at = 0;
                for section in sections {
                    let each = section / members;
                    let there = whole.narrow(*dim, at + member * each, each)?;
                    finer.push((there, part.narrow(*dim, at / members, each)?));
                    at += section;
                }
            }
            views = finer;
        }
        Ok(views)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(dims: impl Into<Shape>) -> Tensor {
        let shape = dims.into();
        let n: usize = shape.dims().iter().product();
        Tensor::from_slice(&(0..n as i32).collect::<Vec<i32>>(), shape).unwrap()
    }

    fn taken(sharding: &Sharding, rank: usize, whole: &Tensor) -> Vec<i32> {
        let lane = Lane::cpu();
        let part = lane.empty(sharding.part(), whole.dtype()).unwrap();
        sharding.take(&lane, rank, whole, &part).unwrap();
        part.to_vec().unwrap()
    }

    /// Every rank's part, put together again.
    fn assert_whole(sharding: &Sharding) {
        let (lane, whole) = (Lane::cpu(), numbers(sharding.full()));
        let again = lane.full(sharding.full(), whole.dtype(), -1.0).unwrap();
        for rank in 0..sharding.parts() {
            let part = Tensor::from_slice(&taken(sharding, rank, &whole), sharding.part()).unwrap();
            sharding.put(&lane, rank, &part, &again).unwrap();
            assert_eq!(taken(sharding, rank + sharding.parts(), &whole), part.to_vec::<i32>().unwrap());
        }
        assert_eq!(again.to_vec::<i32>().unwrap(), whole.to_vec::<i32>().unwrap());
    }

    #[test]
    fn parts_of_experts_of_both_matrices() {
        let w1 = Sharding::expert([4, 6, 5].into(), [2, 2, 5].into(), 2, 3).unwrap();
        // Rank 5: the second half of the experts, the last third of the width.
        let part = taken(&w1, 5, &numbers([4, 6, 5]));
        assert_eq!((part[0], part[10], part.len()), (2 * 30 + 4 * 5, 3 * 30 + 4 * 5, 20));
        let w2 = Sharding::expert([4, 5, 6].into(), [2, 5, 2].into(), 2, 3).unwrap();
        assert_eq!(taken(&w2, 1, &numbers([4, 5, 6]))[..4], [2, 3, 8, 9]);
        [&w1, &w2].into_iter().for_each(assert_whole);
        let (whole, part) = (numbers([4, 6, 5]), numbers([2, 5, 2]));
        let message = w2.take(&Lane::cpu(), 0, &whole, &part).unwrap_err().to_string();
        assert!(message.contains("(4, 6, 5)") && message.contains("(4, 5, 6)"), "{message}");
        for part in [[4, 2, 5], [2, 3, 5], [2, 2, 1]] {
            let message = Sharding::expert([4, 6, 5].into(), part.into(), 2, 3).unwrap_err().to_string();
            assert!(message.contains("(4, 6, 5)"), "{message}");
        }
    }

    #[test]
    fn every_section_is_divided_for_itself() {
        // Queries, keys and values of 4, 2 and 2 columns.
        let fused = Sharding::dense([2, 8].into(), 1, &[4, 2, 2], 2).unwrap();
        assert_eq!(taken(&fused, 0, &numbers([2, 8])), [0, 1, 4, 6, 8, 9, 12, 14]);
        assert_eq!(taken(&fused, 3, &numbers([2, 8])), [2, 3, 5, 7, 10, 11, 13, 15]);
        let rows = Sharding::dense([6, 2].into(), 0, &[6], 3).unwrap();
        assert_eq!(taken(&rows, 1, &numbers([6, 2])), [4, 5, 6, 7]);
        [&fused, &rows].into_iter().for_each(assert_whole);
        for (dim, sections, part) in [(1, &[4, 2][..], "add up"), (2, &[8], "add up"), (1, &[5, 3], "5 of dimension 1")]
        {
            let error = Sharding::dense([2, 8].into(), dim, sections, 2).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("(2, 8)"), "{error}");
        }
    }
}
