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

impl Counter {
    /// u
    pub fn uniform(&self, index: u64) -> f64 {
        let mut z = self.seed.wrapping_mul(0xd134_2543_de82_ef95) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.step;
        for _ in 0..2 {
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        }
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
