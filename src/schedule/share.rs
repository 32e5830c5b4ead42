//! Which gradients are reduced where, so that a step takes least.

use super::plan::{Candidate, ROUNDING, idle};
use super::step::Pending;
use super::{Degree, ModelCosts, Pass, Plan, Policy, Slice, Windows};
use crate::device::LaneKind;
use crate::engine::Slowdown;

/// One way of doing a pass backward, the forward that goes with it, and what slices of gradients add to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) degrees: [Degree; 2],
    /// What it takes without gradients.
    seconds: f64,
    /// By lane: what x seconds of slices add to, as in [`Candidate::around`].
    around: [f64; 3],
    /// By lane: what a second of slices costs where it is hidden, as in [`Candidate::lost`].
    lost: [f64; 3],
}

impl Choice {
    /// A dense part, the lanes of collectives being free: two tasks beside each other.
    fn dense(seconds: f64, slowdown: &Slowdown) -> Self {
        let compute = LaneKind::Compute as usize;
        let mut choice = Choice { degrees: [Degree::all_first(1); 2], seconds, around: [0.0; 3], lost: [0.0; 3] };
        choice.around[compute] = seconds;
        for lane in (0..3).filter(|&lane| lane != compute) {
            // Beside the slice the part goes on at 1/(1 + a) of its speed, and the slice beside the part at 1/(1 + b).
            let (a, b) = (slowdown[compute][lane], slowdown[lane][compute]);
            choice.lost[lane] = a * (1.0 + b) / (1.0 + a);
            choice.around[lane] = seconds * (1.0 + a) * b / (1.0 + b);
        }
        choice
    }

    /// What it takes with slices of so many seconds on each lane.
    fn with(&self, slices: [f64; 3]) -> f64 {
        let (mut hidden, mut ends) = (0.0, 0.0f64);
        for (lane, x) in slices.into_iter().enumerate().filter(|(_, x)| *x > 0.0) {
            let (lost, after) = (self.lost[lane] * x, self.around[lane] + x - self.seconds);
            match self.lost[lane] < 1.0 {
                true => (hidden, ends) = (hidden + lost, ends.max(after)),
                // What outlasts the part no longer slows it down.
                false => hidden += lost.min(after),
            }
        }
        self.seconds + ends.max(hidden)
    }
}

/// What a layer may be cut in: of each pair of ways only those that are not worse than another in time and in room for
/// gradients on every lane.
pub(super) fn choices(policy: &dyn Policy, [forward, backward]: &[Vec<Candidate>; 2]) -> Vec<Choice> {
    let least = |a: &Candidate, b: &Candidate| b.seconds < a.seconds * (1.0 - ROUNDING);
    let Some(fastest) = forward.iter().reduce(|a, b| if least(a, b) { b } else { a }) else { return Vec::new() };
    let mut kept: Vec<Choice> = Vec::new();
    for (i, b) in backward.iter().enumerate() {
        let f = if policy.same_both_ways() { &forward[i] } else { fastest };
        let around = b.around.map(|around| around + f.seconds);
        let new = Choice { degrees: [f.degree, b.degree], seconds: b.seconds + f.seconds, around, lost: b.lost };
        let as_good = |a: &Choice, b: &Choice| {
            let slack = ROUNDING * b.seconds;
            let lost = a.lost.iter().zip(b.lost).all(|(a, b)| *a <= b + ROUNDING);
            a.seconds <= b.seconds + slack && lost && a.around.iter().zip(b.around).all(|(a, b)| *a <= b + slack)
        };
        if !kept.iter().any(|old| as_good(old, &new)) {
            kept.retain(|old| !as_good(&new, old));
            kept.push(new);
        }
    }
    kept
}

/// How the backward may go up to some point: what it has taken, and what is left to be reduced.
#[derive(Clone)]
struct State<'a> {
    seconds: f64,
    pending: Pending<'a>,
    /// The last decision.
    at: usize,
}

/// A decision about one part of the backward.
struct Decision {
    /// The one before it.
    before: usize,
    degrees: [Degree; 2],
    slices: Vec<Slice>,
}

/// What of the complete gradients a part reduces beside its own work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// What fits.
    Fitted,
    All,
    Nothing,
}

/// So many ways are followed at a time. As long as there are no more that are not worse in every respect than another,
/// none is lost.
const WAYS: usize = 160;
/// What a second of gradients that are left is taken to cost, when ways have to be given up: the best by each stay.
const PRICES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
/// So many of the best are given back.
const BEST: usize = 8;

/// The best plans in which each part of the backward, beside its own work, reduces what of the complete gradients fits into
/// the time that their lanes are idle, or all of them, whatever it takes longer for it, or none of them; and in which a layer
/// is cut otherwise than would be fastest for it alone, if the room for gradients is worth it. Their times are sums: simulate
/// them.
///
/// Parts are decided about in the order of the backward. Of two ways that a part of it can have gone, one that has taken
/// longer and left more of every group's gradients is never part of the best plan: what comes after it takes no less. The
/// others are all followed.
///
/// That a part takes in less than fits, or more and not everything, gains nothing: a second of gradients that is added to a
/// part, its lane not being idle, is a second that is saved later, if it is not hidden there; and what can be hidden later,
/// still can. Where lanes slow each other down, hiding costs something, by the part that it is hidden in, and the times here
/// are estimates: some part of what fits might then be better than all or none of it.
pub(super) fn share(policy: &dyn Policy, model: &ModelCosts, choices: &[Option<&[Choice]>]) -> Vec<Plan> {
    let none = usize::MAX;
    let mut decisions: Vec<Decision> = Vec::new();
    let mut states = vec![State { seconds: 0.0, pending: Pending::new(model), at: none }];
    for (block, costs) in model.blocks.iter().enumerate().rev() {
        if let Some(choices) = choices[block] {
            states = step(policy, &states, choices, costs.moe_gradients, &mut decisions);
        }
        let dense = Choice::dense(costs.dense[Pass::Backward as usize], &model.slowdown);
        states = step(policy, &states, &[dense], costs.dense_gradients, &mut decisions);
    }
    let total = |s: &State<'_>| s.seconds + longest(s.pending.seconds(policy));
    states.sort_by(|a, b| total(a).total_cmp(&total(b)));
    states.truncate(BEST);
    states.into_iter().map(|state| plan(policy, model, choices, &decisions, state)).collect()
}

/// All ways through one more part.
fn step<'a>(
    policy: &dyn Policy,
    states: &[State<'a>],
    choices: &[Choice],
    gradients: [u64; 3],
    decisions: &mut Vec<Decision>,
) -> Vec<State<'a>> {
    // A decision is written down only for the ways that are kept.
    let mut new: Vec<(State<'a>, Decision)> = Vec::new();
    for state in states {
        for choice in choices {
            let idle = idle(choice.seconds, choice.around, choice.lost);
            // What is hidden for nothing always is.
            let free = choice.lost == [0.0; 3];
            for beside in [Beside::Fitted, Beside::All, Beside::Nothing] {
                let mut pending = state.pending.clone();
                let before = pending.seconds(policy);
                if beside != Beside::Fitted && longest(before) == 0.0 || beside == Beside::Nothing && free {
                    continue;
                }
                let slices = match beside {
                    Beside::Fitted => pending.fitted(policy, idle),
                    Beside::All => pending.all(),
                    Beside::Nothing => Vec::new(),
                };
                let with = match beside {
                    Beside::Fitted if free => choice.seconds,
                    _ => choice.with(pending.times(policy, &slices)),
                };
                pending.complete(gradients);
                let seconds = state.seconds + with;
                let decision = Decision { before: state.at, degrees: choice.degrees, slices };
                new.push((State { seconds, pending, at: 0 }, decision));
            }
        }
    }
    new.sort_by(|a, b| a.0.seconds.total_cmp(&b.0.seconds));
    let mut kept: Vec<(State<'a>, Decision)> = Vec::new();
    for (state, decision) in new {
        if !kept.iter().any(|(other, _)| other.pending.is_at_most(&state.pending)) {
            kept.push((state, decision));
        }
    }
    if kept.len() > WAYS {
        let mut chosen = vec![false; kept.len()];
        for price in PRICES {
            let worth = |i: &usize| kept[*i].0.seconds + price * longest(kept[*i].0.pending.seconds(policy));
            let mut order: Vec<(f64, usize)> = (0..kept.len()).map(|i| (worth(&i), i)).collect();
            order.sort_by(|a, b| a.0.total_cmp(&b.0));
            order[..WAYS / PRICES.len()].iter().for_each(|&(_, i)| chosen[i] = true);
        }
        let mut chosen = chosen.into_iter();
        kept.retain(|_| chosen.next() == Some(true));
    }
    let mut states = Vec::with_capacity(kept.len());
    for (mut state, decision) in kept {
        state.at = decisions.len();
        decisions.push(decision);
        states.push(state);
    }
    states
}

fn longest(seconds: [f64; 3]) -> f64 {
    seconds.into_iter().fold(0.0, f64::max)
}

/// The plan of a way through the whole backward.
fn plan(
    policy: &dyn Policy,
    model: &ModelCosts,
    choices: &[Option<&[Choice]>],
    decisions: &[Decision],
    mut end: State<'_>,
) -> Plan {
    let blocks = model.blocks.len();
    let windows = Windows { moe: vec![Vec::new(); blocks], dense: vec![Vec::new(); blocks], after: end.pending.all() };
    let mut plan = Plan { policy: policy.name().to_owned(), degrees: vec![None; blocks], windows, seconds: 0.0 };
    let mut at = end.at;
    // From the last part of the backward to its first.
    for (block, choices) in choices.iter().enumerate() {
        if let Some(decision) = decisions.get(at) {
            plan.windows.dense[block] = decision.slices.clone();
            at = decision.before;
        }
        if let (Some(_), Some(decision)) = (choices, decisions.get(at)) {
            plan.windows.moe[block] = decision.slices.clone();
            plan.degrees[block] = Some(decision.degrees);
            at = decision.before;
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Simulator, TaskGraph};
    use proptest::prelude::*;

    proptest! {
        /// What a slice beside a dense part adds to is what two such tasks take.
        #[test]
        fn a_slice_beside_a_dense_part(seconds in 0.1f64..2.0, slice in 0.01f64..4.0, drawn in prop::collection::vec(0.0f64..2.0, 9)) {
            let mut slowdown = Slowdown::default();
            slowdown.iter_mut().flatten().zip(drawn).for_each(|(s, drawn)| *s = drawn);
            let choice = Choice::dense(seconds, &slowdown);
            for lane in [LaneKind::IntraNode, LaneKind::InterNode] {
                let mut graph = TaskGraph::new();
                graph.add(lane, slice, []).unwrap();
                graph.add(LaneKind::Compute, seconds, []).unwrap();
                let simulated = Simulator::with(slowdown).makespan(&graph, |seconds| *seconds);
                let mut slices = [0.0; 3];
                slices[lane as usize] = slice;
                prop_assert!((choice.with(slices) - simulated).abs() < 1e-9 * simulated, "{} and {simulated}", choice.with(slices));
            }
        }
    }
}
