//! s

use crate::device::ExpertGroups;
use crate::error::{Result, config_err};
use serde::{Deserialize, Serialize};

/// The sigmoid gate's options, DeepSeek-V3's (DeepSeek-AI 2024); the default is the plain gate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigmoidOptions {
    /// Node-limited selection: a token takes experts only from its best groups of experts.
    pub groups: Option<ExpertGroups>,
    /// What the weights are multiplied by.
    pub routed_scale: f64,
    /// γ: after each step every expert's selection bias moves by this much against its load. 0: no bias.
    pub bias_rate: f64,
}

impl Default for SigmoidOptions {
    fn default() -> Self {
        SigmoidOptions { groups: None, routed_scale: 1.0, bias_rate: 0.0 }
    }
}

impl SigmoidOptions {
    /// Checks the options for E experts of which a token takes k.
    ///
    /// # Errors
    /// Names the value and the rule it breaks.
    pub(crate) fn validate(&self, experts: usize, top_k: usize) -> Result<()> {
        if !(self.routed_scale.is_finite() && self.routed_scale > 0.0) {
            config_err!("sigmoid.routed_scale = {}: it is a finite number above 0", self.routed_scale);
        }
        let Some(ExpertGroups { groups, kept }) = self.groups else { return Ok(()) };
        if groups == 0 || !experts.is_multiple_of(groups) {
            config_err!("sigmoid.groups: {groups} groups of {experts} experts: the groups divide the experts");
        }
        if kept == 0 || kept > groups || kept * (experts / groups) < top_k {
            config_err!(
                "sigmoid.groups: {kept} of {groups} groups kept, of {} experts each: between 1 and {groups}, and together \
                 at least top_k = {top_k} experts",
                experts / groups
            );
        }
        Ok(())
    }
}
