//! Numbers for people: thousands, bytes, and histograms that a terminal shows. It refuses to know
//! what is counted.

use serde::Serialize;

/// Widest bar of a histogram.
const BAR_COLUMNS: usize = 36;

/// `1234567` as `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes with a unit.
pub(super) fn bytes(count: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{value:.0} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Counts of values between fixed edges, with their least, mean and greatest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Histogram {
    /// The first bucket ends below `edges[0]`, the last begins at the last edge.
    edges: Vec<f64>,
    counts: Vec<u64>,
    count: u64,
    sum: f64,
    min: f64,
    max: f64,
}

impl Histogram {
    pub(super) fn new(edges: &[f64]) -> Self {
        Histogram {
            edges: edges.to_vec(),
            counts: vec![0; edges.len() + 1],
            count: 0,
            sum: 0.0,
            // Numbers that JSON can write, also where nothing was counted.
            min: f64::MAX,
            max: 0.0,
        }
    }

    pub(super) fn add(&mut self, value: f64) {
        let bucket = self.edges.partition_point(|edge| *edge <= value);
        self.counts[bucket] += 1;
        self.count += 1;
        self.sum += value;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    pub(super) fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Title with least, mean and greatest, and a bar for each bucket that is not beyond all values.
    pub(super) fn text(&self, title: &str, unit: impl Fn(f64) -> String) -> String {
        if self.count == 0 {
            return format!("{title}: none\n");
        }
        let mean = self.sum / self.count as f64;
        let mut text = format!(
            "{title}: {} to {}, mean {}\n",
            unit(self.min),
            unit(self.max),
            unit(mean)
        );
        let filled = |count: &u64| *count > 0;
        let first = self.counts.iter().position(filled).unwrap_or(0);
        let last = self.counts.iter().rposition(filled).unwrap_or(0);
        let rows = (first..=last).map(|bucket| {
            let label = match (bucket.checked_sub(1), self.edges.get(bucket)) {
                (None, Some(end)) => format!("< {}", unit(*end)),
                (Some(start), _) if bucket == self.edges.len() => {
                    format!(">= {}", unit(self.edges[start]))
                }
                (Some(start), Some(_)) => format!("{} ..", unit(self.edges[start])),
                (None, None) => "all".into(),
                (Some(_), None) => unreachable!("the last bucket is taken above"),
            };
            (label, self.counts[bucket])
        });
        text.push_str(&bars(&rows.collect::<Vec<_>>()));
        text
    }
}

/// A labelled bar for each count, with its share.
pub(super) fn bars(rows: &[(String, u64)]) -> String {
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let all: u64 = rows.iter().map(|(_, count)| count).sum();
    let label_columns = rows.iter().map(|(label, _)| label.chars().count());
    let label_columns = label_columns.max().unwrap_or(0).max(12);
    let row = |(label, count): &(String, u64)| {
        let columns = (*count as u128 * BAR_COLUMNS as u128).div_ceil(u128::from(most.max(1)));
        let share = *count as f64 * 100.0 / (all as f64).max(1.0);
        let bar = "#".repeat(columns as usize);
        let count = thousands(*count);
        format!("  {label:>label_columns$} {bar:<BAR_COLUMNS$} {count:>11} {share:5.1} %\n")
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        let all = [0, 999, 1000, 1_234_567].map(thousands);
        assert_eq!(all, ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(bytes(1023.0), "1023 B");
        assert_eq!(bytes(1536.0), "1.5 KiB");
    }

    #[test]
    fn a_histogram_counts_between_its_edges_and_adds_up() {
        let mut one = Histogram::new(&[10.0, 20.0]);
        let mut two = one.clone();
        [9.0, 10.0].iter().for_each(|v| one.add(*v));
        [19.0, 20.0, 500.0].iter().for_each(|v| two.add(*v));
        one.merge(&two);
        assert_eq!(one.counts, [1, 2, 2]);
        let text = one.text("widths", |v| format!("{v:.0}"));
        assert!(text.starts_with("widths: 9 to 500, mean 112\n"), "{text}");
        assert!(text.contains("< 10") && text.contains(">= 20"), "{text}");
        assert!(text.contains(" 40.0 %"), "{text}");
        assert_eq!(
            Histogram::new(&[1.0]).text("none", |v| v.to_string()),
            "none: none\n"
        );
    }
}
