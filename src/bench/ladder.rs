//! Which device batches are tried, when to stop, and which is the fastest: decisions of
//! `belfry bench step --fit`, pure.

/// Rungs that may be slower than the one before, in a row, until the climb ends.
const SLOWER_MAX: usize = 2;

/// What became of one device batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It ran.
    Ran(Figures),
    /// It was not tried: this much was predicted.
    Skipped {
        /// Bytes.
        predicted: u64,
    },
    /// It ran out of memory; in the words of who said so.
    TooLarge(String),
}

/// Figures of a device batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Of a step.
    pub seconds: f64,
    /// Pairs per second.
    pub samples_per_second: f64,
    /// Share of the device's own matrix products.
    pub mfu: f64,
    /// Measured, where the system tells.
    pub peak_bytes: Option<u64>,
    /// As `belfry model` counts.
    pub predicted_bytes: u64,
}

/// A device batch that was looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Rung {
    /// Micro-batches in one forward.
    pub device_batch: u32,
    /// What became of it.
    pub outcome: Outcome,
}

impl Rung {
    fn rate(&self) -> Option<f64> {
        match &self.outcome {
            Outcome::Ran(figures) => Some(figures.samples_per_second),
            _ => None,
        }
    }
}

/// The device batches that divide a lane of `micro_batches`, ascending.
pub fn divisors(micro_batches: u32) -> Vec<u32> {
    (1..=micro_batches)
        .filter(|n| micro_batches.is_multiple_of(*n))
        .collect()
}

/// Whether a larger one is worth trying: none failed to fit, and the last two were not each slower
/// than the one before.
pub fn go_on(rungs: &[Rung]) -> bool {
    let fits = rungs.iter().all(|rung| rung.rate().is_some());
    let rates: Vec<f64> = rungs.iter().filter_map(Rung::rate).collect();
    let slower = rates.windows(2).rev().take_while(|pair| pair[1] < pair[0]);
    fits && slower.count() < SLOWER_MAX
}

/// The fastest that fits; of equals the smaller, which needs less memory.
pub fn fastest(rungs: &[Rung]) -> Option<u32> {
    let mut best: Option<(u32, f64)> = None;
    for rung in rungs {
        let Some(rate) = rung.rate() else { continue };
        if best.is_none_or(|(_, held)| rate > held) {
            best = Some((rung.device_batch, rate));
        }
    }
    best.map(|(device_batch, _)| device_batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn climbed(rates: &[Option<f64>]) -> Vec<Rung> {
        let rung = |(i, rate): (usize, &Option<f64>)| Rung {
            device_batch: 1 << i,
            outcome: match rate {
                Some(rate) => Outcome::Ran(Figures {
                    seconds: 1.0,
                    samples_per_second: *rate,
                    mfu: 0.5,
                    peak_bytes: None,
                    predicted_bytes: 1,
                }),
                None => Outcome::TooLarge("out of memory".into()),
            },
        };
        rates.iter().enumerate().map(rung).collect()
    }

    #[test]
    fn rungs_divide_the_lane() {
        assert_eq!(divisors(12), [1, 2, 3, 4, 6, 12]);
        assert_eq!(divisors(1), [1]);
    }

    #[test]
    fn the_climb_ends_where_it_does_not_fit_or_gets_slower_twice() {
        let (a, b, c) = (Some(1.0), Some(2.0), Some(1.5));
        assert!(go_on(&[]));
        assert!(go_on(&climbed(&[a, b, c])));
        assert!(!go_on(&climbed(&[a, b, c, Some(1.4)])));
        assert!(go_on(&climbed(&[b, a, b, a])), "up and down is no descent");
        assert!(!go_on(&climbed(&[a, b, None])));
    }

    #[test]
    fn the_fastest_fits_and_of_equals_is_the_smaller() {
        let rates = [Some(1.0), Some(2.0), Some(2.0), None];
        assert_eq!(fastest(&climbed(&rates)), Some(2));
        assert_eq!(fastest(&climbed(&[None])), None);
    }
}
