//! The policies' plans beside each other.

use super::{Align, Table, duration, percent};
use crate::engine::{Bound, lane_name};
use crate::schedule::{Degree, Pass, Plan};
use serde::Serialize;
use std::fmt;

/// What a policy's plan comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanRow {
    /// The policy.
    pub policy: String,
    /// What a step takes, simulated, in milliseconds.
    pub predicted_ms: f64,
    /// In how many chunks the layers are cut in the forward, and how many all-gathers come first; the commonest.
    pub forward: Option<Degree>,
    /// The same in the backward.
    pub backward: Option<Degree>,
    /// deepspeed's time over this one's, where deepspeed is compared.
    pub speedup_over_deepspeed: Option<f64>,
    /// What no plan of this policy can beat, in milliseconds.
    pub bound_ms: f64,
    /// Which of the bounds that is: a lane's tasks, or the way through all layers.
    pub bound_by: String,
    /// By how much of the bound the plan is above it.
    pub above_bound: f64,
    /// Milliseconds of the step in which gradients are reduced after the backward, as the plan has it.
    pub exposed_gradients_ms: f64,
}

/// The table of plans.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plans {
    /// A row per policy.
    pub policies: Vec<PlanRow>,
}

impl Plans {
    /// Adds a policy's plan with its bound and the seconds of gradients reduced after the backward. The time of one called
    /// `deepspeed` is what those added after it are compared with.
    pub fn add(&mut self, plan: &Plan, bound: &Bound, exposed: f64) {
        let before = self.policies.iter().find(|row| row.policy == "deepspeed").map(|row| row.predicted_ms);
        let reference = if plan.policy == "deepspeed" { Some(plan.seconds * 1e3) } else { before };
        let by_lane = bound.busiest > bound.critical_path;
        self.policies.push(PlanRow {
            policy: plan.policy.clone(),
            predicted_ms: plan.seconds * 1e3,
            forward: plan.commonest(Pass::Forward),
            backward: plan.commonest(Pass::Backward),
            speedup_over_deepspeed: reference.map(|r| r / (plan.seconds * 1e3)),
            bound_ms: bound.seconds() * 1e3,
            bound_by: if by_lane { format!("{} lane", lane_name(bound.lane)) } else { "critical path".to_owned() },
            above_bound: plan.seconds / bound.seconds() - 1.0,
            exposed_gradients_ms: exposed * 1e3,
        });
    }
}

impl fmt::Display for Plans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [
            ("policy", Align::Left),
            ("forward r (d)", Align::Right),
            ("backward r (d)", Align::Right),
            ("step", Align::Right),
            ("speedup", Align::Right),
            ("after the backward", Align::Right),
            ("bound", Align::Right),
            ("above it", Align::Right),
            ("bound by", Align::Left),
        ];
        let mut table = Table::new(&columns.map(|c| c.1)).header(columns.map(|c| c.0));
        let degree = |d: Option<Degree>| d.map_or_else(String::new, |d| format!("{} ({})", d.r, d.d));
        for row in &self.policies {
            table.row([
                row.policy.clone(),
                degree(row.forward),
                degree(row.backward),
                duration(row.predicted_ms / 1e3),
                row.speedup_over_deepspeed.map_or_else(String::new, |s| format!("{s:.2} ×")),
                duration(row.exposed_gradients_ms / 1e3),
                duration(row.bound_ms / 1e3),
                percent(row.above_bound),
                row.bound_by.clone(),
            ]);
        }
        table.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::LaneKind;
    use crate::schedule::Windows;

    #[test]
    fn rows_are_compared_with_deepspeed() {
        let degrees = |r| Some([Degree { r: 1, d: 1 }, Degree { r, d: 1 }]);
        let plan = |policy: &str, seconds| Plan {
            policy: policy.into(),
            degrees: vec![degrees(4), None, degrees(2), degrees(2)],
            windows: Windows::default(),
            seconds,
        };
        let mut plans = Plans::default();
        let bound = Bound { busiest: 0.08, lane: LaneKind::InterNode, critical_path: 0.05 };
        plans.add(&plan("deepspeed", 0.2), &bound, 0.03);
        plans.add(&plan("fsmoe", 0.1), &Bound { critical_path: 0.1, ..bound }, 0.0);
        let [deepspeed, fsmoe] = &plans.policies[..] else { panic!("{plans:?}") };
        assert_eq!((deepspeed.speedup_over_deepspeed, fsmoe.speedup_over_deepspeed), (Some(1.0), Some(2.0)));
        assert_eq!(fsmoe.backward, Some(Degree { r: 2, d: 1 }));
        assert_eq!((deepspeed.bound_by.as_str(), fsmoe.bound_by.as_str()), ("inter-node lane", "critical path"));
        assert!((deepspeed.above_bound - 1.5).abs() < 1e-12 && fsmoe.above_bound == 0.0);
        let text = plans.to_string();
        let line = text.lines().find(|l| l.contains("fsmoe")).unwrap();
        assert!(
            line.contains("1 (1)") && line.contains("2 (1)") && line.contains("100 ms") && line.contains("2.00 ×"),
            "{text}"
        );
    }
}
