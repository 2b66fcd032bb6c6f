//! The run's random numbers: counter-based, a pure function of a key and an index.
//!
//! Every random choice of a run (order, masks, false images, dropout, manager noise) is drawn from
//! a [`Key`] derived from (run seed, purpose, step or epoch, lane, micro-batch, site). Nothing
//! here has state, so the numbers cannot depend on time, thread, worker or call order. It lives
//! beside the configuration because the seed does, and because both the model and the data plane
//! need it while neither may import the other.
//!
//! The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014), integer operations only, so that
//! host and device give the same numbers.

/// What a random number is for. The discriminants are part of the run's bits: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial parameter values, keyed further by the parameter's name.
    Init = 1,
    /// Permutation of shards in a round.
    ShardOrder = 2,
    /// Permutation of pairs in a window.
    WindowOrder = 3,
    /// Where a shard's pairs begin to be dealt to rounds.
    CaptionRound = 4,
    /// MLM masking of one pair.
    Mask = 5,
    /// The false image of one pair.
    FalseImage = 6,
    /// Permutation of ITM labels in a micro-batch.
    ItmLabels = 7,
    /// Dropout.
    Dropout = 8,
    /// Exploration noise of the managers.
    ManagerNoise = 9,
    /// Packing order of samples.
    Pack = 10,
    /// Hard negatives of the contrastive tasks.
    Negatives = 11,
    /// Random transforms of one pair's images.
    Augment = 12,
    /// Order of a lane's pairs of one step over several datasets.
    Mixture = 13,
    /// The pair that stands for one of a shard under quarantine.
    Substitute = 14,
}

/// A key into the random function. Derive with [`Key::with`]; draw with [`Key::bits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u64);

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

#[inline]
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Key {
    /// The root key of a run's `seed` for one `purpose`.
    pub const fn new(seed: u64, purpose: Purpose) -> Self {
        Key(mix(seed.wrapping_add(GOLDEN))).with(purpose as u64)
    }

    /// The key of a part: a step, a lane, a site, an index.
    pub const fn with(self, part: u64) -> Self {
        Key(mix(self.0 ^ mix(part.wrapping_add(GOLDEN))).wrapping_add(GOLDEN))
    }

    /// The key of a named part, for instance a parameter (FNV-1a of the name).
    pub fn with_name(self, name: &str) -> Self {
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3)
        });
        self.with(hash)
    }

    /// The key as a number, for kernels that draw where this code does not run.
    pub const fn state(self) -> u64 {
        self.0
    }

    /// 64 random bits for element `index`.
    #[inline]
    pub const fn bits(self, index: u64) -> u64 {
        mix(self.0.wrapping_add(index.wrapping_mul(GOLDEN)))
    }

    /// Uniform in [0, 1) with 24 random bits, exact in f32.
    #[inline]
    pub fn uniform(self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `0..bound` (multiply-shift; the bias is under 2^-32 for bounds below 2^32).
    ///
    /// # Panics
    /// If `bound` is zero.
    #[inline]
    pub fn below(self, index: u64, bound: u64) -> u64 {
        assert!(bound > 0, "below() needs a positive bound");
        ((u128::from(self.bits(index)) * u128::from(bound)) >> 64) as u64
    }

    /// Standard normal by Box-Muller, in f64, rounded once.
    pub fn normal(self, index: u64) -> f32 {
        let unit = |bits: u64| (bits >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0);
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = (-2.0 * (1.0 - unit(self.bits(2 * index))).ln()).sqrt();
        let angle = std::f64::consts::TAU * unit(self.bits(2 * index + 1));
        (radius * angle.cos()) as f32
    }

    /// A permutation of `0..len` (Fisher-Yates).
    pub fn permutation(self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for last in (1..len).rev() {
            let pick = self.below(last as u64, last as u64 + 1) as usize;
            order.swap(last, pick);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_fixed_for_ever() {
        // A change here changes the bits of every run ever made.
        let key = Key::new(7, Purpose::Dropout).with(3).with_name("text.0");
        let drawn: Vec<u64> = (0..3).map(|i| key.bits(i)).collect();
        assert_eq!(drawn, (0..3).map(|i| key.bits(i)).collect::<Vec<_>>());
        assert_ne!(
            key,
            Key::new(8, Purpose::Dropout).with(3).with_name("text.0")
        );
        assert_ne!(Key::new(7, Purpose::Mask), Key::new(7, Purpose::Dropout));
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let key = Key::new(1, Purpose::Init);
        let n = 200_000u64;
        let mean = (0..n).map(|i| f64::from(key.uniform(i))).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 2e-3, "uniform mean {mean}");
        let normals: Vec<f64> = (0..n).map(|i| f64::from(key.normal(i))).collect();
        let mean = normals.iter().sum::<f64>() / n as f64;
        let var = normals.iter().map(|x| x * x).sum::<f64>() / n as f64;
        assert!(
            mean.abs() < 1e-2 && (var - 1.0).abs() < 1e-2,
            "normal {mean} {var}"
        );
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = Key::new(5, Purpose::ShardOrder).permutation(1000);
        assert_ne!(order[..10], (0..10).collect::<Vec<u32>>()[..]);
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<u32>>());
    }
}
