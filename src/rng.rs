//! interim

/// p
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose { /// i
 Init, /// d
 Data, /// g
 GateNoise, /// d
 Dropout, /// s
 Sample, /// t
 Test }
/// c
#[derive(Clone, Copy, Debug)]
pub struct Counter { /// s
 pub seed: u64, /// p
 pub purpose: Purpose, /// s
 pub step: u64 }
