//! Small results of a step, read to the host all at once.

use crate::device::Lane;
use crate::error::Result;
use crate::moe::{RoutingStats, RoutingTally};
use crate::tensor::{DType, Tensor};

/// What a step leaves on the device for the host to know. Reading it waits for the device, so it is done once, when all
/// of the step has been issued.
#[derive(Default)]
pub(super) struct Readings {
    /// One float each, of one type.
    floats: Vec<Tensor>,
    tallies: Vec<RoutingTally>,
}

/// [`Readings`] on the host, in the order in which they were put in.
#[derive(Debug, PartialEq)]
pub(super) struct Values {
    pub(super) floats: Vec<f64>,
    pub(super) stats: Vec<RoutingStats>,
}

impl Readings {
    /// Will read t: (1) acc.
    pub(super) fn float(&mut self, t: &Tensor) {
        self.floats.push(t.clone());
    }

    /// Will read a routing's statistics.
    pub(super) fn routing(&mut self, tally: RoutingTally) {
        self.tallies.push(tally);
    }

    /// Waits for what has been issued on `lane`.
    pub(super) fn read(self, lane: &Lane) -> Result<Values> {
        let Some(dtype) = self.floats.first().map(Tensor::dtype) else {
            return Ok(Values { floats: Vec::new(), stats: Vec::new() });
        };
        let of_routings = self.tallies.iter().flat_map(|t| t.floats.iter().flatten());
        let floats = together(lane, dtype, self.floats.iter().chain(of_routings))?;
        let loads = together(lane, DType::I32, self.tallies.iter().map(|t| &t.loads))?.to_vec::<i32>()?;
        let floats: Vec<f64> = Lane::cpu().cast(&floats, DType::F64)?.to_vec()?;
        let (own, mut rest) = floats.split_at(self.floats.len());
        let mut loads = &loads[..];
        let mut stats = Vec::with_capacity(self.tallies.len());
        for tally in &self.tallies {
            let mut values = [0.0; 3];
            for (value, _) in values.iter_mut().zip(&tally.floats).filter(|(_, t)| t.is_some()) {
                (*value, rest) = (rest[0], &rest[1..]);
            }
            let (of_this, others) = loads.split_at(tally.loads.elements());
            loads = others;
            stats.push(tally.stats(of_this, &values));
        }
        Ok(Values { floats: own.to_vec(), stats })
    }
}

/// The tensors' elements one after the other, on the host.
fn together<'a>(lane: &Lane, dtype: DType, tensors: impl Iterator<Item = &'a Tensor> + Clone) -> Result<Tensor> {
    let all = lane.empty([tensors.clone().map(Tensor::elements).sum::<usize>()], dtype)?;
    let mut at = 0;
    for t in tensors {
        let n = t.elements();
        lane.copy(&t.reshape([n])?, &all.narrow(0, at, n)?)?;
        at += n;
    }
    lane.to_host(&all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Init, Tape};
    use crate::moe::gate::GateKind;
    use crate::moe::{Capacity, MoeConfig, MoeLayer, StepContext};

    #[test]
    fn what_is_read_at_once_is_what_is_read_one_by_one() {
        let lane = Lane::cpu();
        let mut readings = Readings::default();
        let mut one_by_one = Vec::new();
        for (n, gate) in [GateKind::TopK, GateKind::Sigmoid, GateKind::ExpertChoice].into_iter().enumerate() {
            let capacity = Capacity::Factor(0.5);
            let config = MoeConfig { gate, experts: 4 + n, hidden: 8, ffn: 8, capacity, ..MoeConfig::default() };
            let layer = MoeLayer::new(&Init::new(&lane, DType::F32, 1), &config).unwrap();
            let x = lane.empty([24, 8], DType::F32).unwrap();
            let rng = crate::rng::Counter { seed: 1, purpose: crate::rng::Purpose::Test, step: 0 };
            lane.normal(rng, 0, &x).unwrap();
            let tape = Tape::inference(&lane);
            let step = StepContext { train: true, seed: 1, step: 0, first_token: 0 };
            let routing = layer.forward(&tape, &tape.constant(x), step).unwrap().routing;
            readings.routing(routing.tally());
            readings.float(&lane.full([1], DType::F32, n as f64).unwrap());
            one_by_one.push(routing.stats(&lane).unwrap());
        }
        let values = readings.read(&lane).unwrap();
        assert_eq!(values.floats, [0.0, 1.0, 2.0]);
        assert!(one_by_one[0].dropped > 0);
        assert_eq!(values.stats, one_by_one);
        assert!(Readings::default().read(&lane).unwrap().floats.is_empty());
    }
}
