//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A number is a function of (seed, purpose, step, index). There is no state to carry or to save, and what is drawn does
//! not depend on ranks, threads or schedules.

/// What random numbers are for: streams of different purposes never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Initial parameters.
    Init = 0,
    /// Which window of the corpus a sample is.
    Data = 1,
    /// Noise on router logits.
    GateNoise = 2,
    /// Dropout masks.
    Dropout = 3,
    /// Drawing bytes from a model.
    Sample = 4,
    /// Inputs of tests, examples and benchmarks.
    Test = 5,
}

/// A stream of random numbers, addressed by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// The step, or another number that tells streams of one purpose apart.
    pub step: u64,
}

impl Counter {
    /// What addresses this stream: two words of key and two of the counter. The step and the purpose go into them
    /// through one more Philox call, so that all 64 bits of the step and of the block count.
    pub(crate) fn key(&self) -> [u32; 4] {
        let seed = [self.seed as u32, (self.seed >> 32) as u32];
        philox4x32(seed, [self.step as u32, (self.step >> 32) as u32, self.purpose as u32, 0x6673_6d6f])
    }

    /// 128 random bits for block `block`.
    fn block(&self, block: u64) -> [u32; 4] {
        let key = self.key();
        philox4x32([key[0], key[1]], [block as u32, (block >> 32) as u32, key[2], key[3]])
    }

    /// 64 uniform bits.
    pub fn u64(&self, index: u64) -> u64 {
        let b = self.block(index / 2);
        let half = (index % 2) as usize * 2;
        u64::from(b[half]) | u64::from(b[half + 1]) << 32
    }

    /// A uniform number in [0, 1), of 53 bits.
    pub fn uniform(&self, index: u64) -> f64 {
        (self.u64(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A uniform integer in 0..n, for n up to 2⁶³; its bias is below n/2⁶⁴.
    pub fn below(&self, index: u64, n: u64) -> u64 {
        ((u128::from(self.u64(index)) * u128::from(n)) >> 64) as u64
    }

    /// A standard normal deviate (Box and Muller 1958); indices 2i and 2i + 1 share a block.
    pub fn normal(&self, index: u64) -> f64 {
        let (a, b) = self.normal_pair(index / 2);
        if index.is_multiple_of(2) { a } else { b }
    }

    /// The normal deviates 2i and 2i + 1.
    pub fn normal_pair(&self, i: u64) -> (f64, f64) {
        // 1 − u lies in (0, 1]: its logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform(2 * i)).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform(2 * i + 1)).sin_cos();
        (radius * cos, radius * sin)
    }
}

/// Ten rounds of Philox4x32.
pub fn philox4x32(mut key: [u32; 2], mut ctr: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let (p0, p1) = (u64::from(ctr[0]) * 0xD251_1F53, u64::from(ctr[2]) * 0xCD9E_8D57);
        ctr = [(p1 >> 32) as u32 ^ ctr[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ ctr[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    ctr
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of the Random123 distribution.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn streams_differ_and_have_the_right_moments() {
        let c = Counter { seed: 7, purpose: Purpose::Test, step: 3 };
        let n = 20_000;
        let mean = (0..n).map(|i| c.normal(i)).sum::<f64>() / n as f64;
        let var = (0..n).map(|i| c.normal(i).powi(2)).sum::<f64>() / n as f64;
        let uniform = (0..n).map(|i| c.uniform(i)).sum::<f64>() / n as f64;
        assert!(
            mean.abs() < 0.03 && (var - 1.0).abs() < 0.04 && (uniform - 0.5).abs() < 0.01,
            "{mean} {var} {uniform}"
        );
        assert!((0..1000).all(|i| c.below(i, 10) < 10));
        for other in [Counter { step: 4, ..c }, Counter { seed: 8, ..c }, Counter { purpose: Purpose::Init, ..c }] {
            assert!((0..64).all(|i| other.u64(i) != c.u64(i)));
        }
    }
}
