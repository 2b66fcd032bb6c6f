//! What a benchmark says: figures beside their floors on standard output, one JSON line at the end.
//!
//! It refuses to know what was measured.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// A figure beside its floor.
struct Row {
    what: String,
    measured: String,
    floor: String,
    ratio: Option<f64>,
}

/// A table in the making.
pub struct Report {
    title: String,
    notes: Vec<String>,
    rows: Vec<Row>,
    json: Map<String, Value>,
}

impl Report {
    /// An empty table; `bench` names the benchmark in the JSON line.
    pub fn new(bench: &str, title: String) -> Self {
        let mut json = Map::new();
        json.insert("bench".into(), bench.into());
        Report {
            title,
            notes: Vec::new(),
            rows: Vec::new(),
            json,
        }
    }

    /// A line between title and table: what was warmed up, what the words mean.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// A figure, its floor in words, and measured over floor.
    pub fn row(
        &mut self,
        what: &str,
        measured: String,
        floor: impl Into<String>,
        ratio: impl Into<Option<f64>>,
    ) {
        self.rows.push(Row {
            what: what.into(),
            measured,
            floor: floor.into(),
            ratio: ratio.into(),
        });
    }

    /// A value of the JSON line, in SI units without prefix.
    pub fn json(&mut self, key: &str, value: impl Into<Value>) {
        self.json.insert(key.into(), value.into());
    }

    /// Writes everything to standard output, JSON last.
    pub fn print(self) {
        print!("{}", self.text());
        println!("{}", Value::Object(self.json));
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n", self.title);
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        let heads = ["figure", "measured", "floor, in this run"];
        let width = |head: &str, of: fn(&Row) -> &str| {
            let cells = self.rows.iter().map(|row| of(row).chars().count());
            cells.chain([head.len()]).max().unwrap_or(0)
        };
        let widths = [
            width(heads[0], |row| &row.what),
            width(heads[1], |row| &row.measured),
            width(heads[2], |row| &row.floor),
        ];
        let mut line = |cells: [&str; 3], ratio: &str| {
            let [a, b, c] = widths;
            let [what, measured, floor] = cells;
            let row = format!("{what:<a$}  {measured:<b$}  {floor:<c$}  {ratio:>5}");
            let _ = writeln!(text, "{}", row.trim_end());
        };
        line(heads, "ratio");
        for row in &self.rows {
            let ratio = row.ratio.map_or(String::new(), |r| match r {
                r if r < 0.1 => format!("{r:.4}"),
                r => format!("{r:.2}"),
            });
            line([&row.what, &row.measured, &row.floor], &ratio);
        }
        text
    }
}

/// Bytes in GB (10^9).
pub fn gigabytes(bytes: f64) -> String {
    match bytes {
        b if b >= 1e10 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b => format!("{:.1} MB", b / 1e6),
    }
}

/// Seconds with the unit that suits them.
pub fn seconds(s: f64) -> String {
    match s {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_beside_their_floors() {
        let mut report = Report::new("x", "title".into());
        report.note("a note");
        report.row("speed", "2.00 GB".into(), "4.00 GB, memcpy", 0.5);
        report.row("count", "7".into(), "", None);
        assert_eq!(
            report.text(),
            "title\na note\n\
             figure  measured  floor, in this run  ratio\n\
             speed   2.00 GB   4.00 GB, memcpy      0.50\n\
             count   7\n"
        );
    }

    #[test]
    fn units_suit_their_numbers() {
        assert_eq!(seconds(0.0123), "12.30 ms");
        assert_eq!(seconds(2e-5), "20.0 us");
        assert_eq!(gigabytes(3.2e10), "32.0 GB");
        assert_eq!(gigabytes(4.5e6), "4.5 MB");
    }
}
