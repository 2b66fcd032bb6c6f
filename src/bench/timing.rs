//! Medians of rounds, memory of this process and of this machine.

/// Times or rates of the rounds of one measurement.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Vec<f64>);

impl Rounds {
    /// One more round.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle value; of an even number the upper of both.
    ///
    /// # Panics
    /// Without any round.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        sorted[sorted.len() / 2]
    }

    /// The value that so large a share of all does not exceed.
    ///
    /// # Panics
    /// Without any round.
    pub fn quantile(&self, share: f64) -> f64 {
        let sorted = self.sorted();
        let place = (share * sorted.len() as f64).ceil() as usize;
        sorted[place.clamp(1, sorted.len()) - 1]
    }

    /// How many there were.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes the last one back.
    pub fn take_last(&mut self) -> Option<f64> {
        self.0.pop()
    }

    /// Smallest and largest.
    ///
    /// # Panics
    /// Without any round.
    pub fn range(&self) -> (f64, f64) {
        let sorted = self.sorted();
        (sorted[0], sorted[sorted.len() - 1])
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

/// Forgets this process's peak memory, where the system can.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// This process's peak memory in bytes since the last reset, where the system tells.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    kilobytes(&status, "VmHWM:")
}

/// Bytes of memory that a new process could have: what the system has left, or what its control
/// group allows.
pub fn available_bytes() -> Option<u64> {
    let system = std::fs::read_to_string("/proc/meminfo").ok()?;
    let system = kilobytes(&system, "MemAvailable:")?;
    let number = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let group = number("memory.max").zip(number("memory.current"));
    let group = group.map(|(max, current)| max.saturating_sub(current));
    Some(group.map_or(system, |group| group.min(system)))
}

fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kilobytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_does_not_follow_the_outlier() {
        let mut rounds = Rounds::default();
        for value in [3.0, 1.0, 100.0, 2.0, 2.5] {
            rounds.add(value);
        }
        assert_eq!(rounds.median(), 2.5);
        assert_eq!(rounds.range(), (1.0, 100.0));
        assert_eq!((rounds.quantile(0.5), rounds.quantile(0.99)), (2.5, 100.0));
        assert_eq!((rounds.take_last(), rounds.count()), (Some(2.5), 4));
    }

    #[test]
    fn the_kernels_lines_are_read() {
        assert_eq!(
            kilobytes("A: 1 kB\nVmHWM:\t  12 kB\n", "VmHWM:"),
            Some(12288)
        );
        assert_eq!(kilobytes("A: 1 kB\n", "VmHWM:"), None);
    }
}
