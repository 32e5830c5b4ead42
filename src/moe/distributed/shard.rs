//! Which part of a logical tensor a rank holds.

use crate::error::{Result, shape_err};
use crate::tensor::{Shape, Tensor};

/// A rank's part of a logical tensor: a range of every dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    full: Shape,
    part: Shape,
    /// The part's first index in every dimension.
    first: Shape,
}

impl Shard {
    /// The part of shape `part` of an expert parameter of shape `full` that member `ep.0` of an EP group of `ep.1` and
    /// member `esp.0` of an ESP group of `esp.1` hold: experts, the first dimension, are divided among the former, the
    /// inner width, whichever dimension it is, among the latter.
    ///
    /// # Errors
    /// If the parts do not make up the whole.
    pub fn expert(full: Shape, part: Shape, ep: (usize, usize), esp: (usize, usize)) -> Result<Self> {
        let mut first = vec![0; full.len()];
        let mut times = vec![1; full.len()];
        for d in 0..full.len().min(part.len()) {
            if part[d] == full[d] && !(d == 0 && ep.1 > 1) {
                continue;
            }
            let (member, members) = if d == 0 { ep } else { esp };
            (first[d], times[d]) = (member * part[d], members);
        }
        let whole = full.len() == part.len() && (0..full.len()).all(|d| part[d] * times[d] == full[d]);
        if !whole || times.iter().skip(1).filter(|&&n| n > 1).count() > 1 {
            shape_err!(
                "a part of shape {part} of an expert parameter of shape {full}, with {} ranks to an EP group and {} to an \
                 ESP group: experts are divided among the former, one other dimension among the latter",
                ep.1,
                esp.1
            );
        }
        Ok(Shard { full, part, first: Shape::new(&first) })
    }

    /// The logical tensor's shape.
    pub fn full(&self) -> Shape {
        self.full
    }

    /// The part of `t`, a tensor of the logical shape; shares memory.
    ///
    /// # Errors
    /// If `t` has another shape.
    pub fn of(&self, t: &Tensor) -> Result<Tensor> {
        if *t.shape() != self.full {
            shape_err!("a part of a tensor of shape {}: the whole has shape {}", t.shape(), self.full);
        }
        (0..self.full.len()).try_fold(t.clone(), |t, d| t.narrow(d, self.first[d], self.part[d]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_both_matrices() {
        let w1 = Shard::expert([4, 6, 5].into(), [2, 2, 5].into(), (1, 2), (2, 3)).unwrap();
        let full = Tensor::from_slice(&(0..120).collect::<Vec<i32>>(), [4, 6, 5]).unwrap();
        let part = w1.of(&full).unwrap();
        assert_eq!((part.shape().dims(), part.layout().offset()), (&[2, 2, 5][..], 2 * 30 + 4 * 5));
        let w2 = Shard::expert([4, 5, 6].into(), [2, 5, 2].into(), (0, 2), (1, 3)).unwrap();
        assert_eq!(w2.of(&full.reshape([4, 5, 6]).unwrap()).unwrap().layout().offset(), 2);
        let message = w2.of(&full).unwrap_err().to_string();
        assert!(message.contains("(4, 6, 5)") && message.contains("(4, 5, 6)"), "{message}");
        for part in [[4, 2, 5], [2, 3, 5], [2, 2, 1]] {
            let message = Shard::expert([4, 6, 5].into(), part.into(), (0, 2), (0, 3)).unwrap_err().to_string();
            assert!(message.contains("(4, 6, 5)"), "{message}");
        }
    }
}
