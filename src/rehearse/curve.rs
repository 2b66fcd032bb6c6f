//! Goodput over the time between failures: a table and a figure.

use std::fmt::Write as _;

use anyhow::anyhow;
use belfry_simulator::Mtbf;
use plotters::prelude::*;

use super::outcome::Outcome;
use super::report::every;
use super::scenario::Scenario;
use super::{RehearseArguments, run_all};
use crate::inspect::figures::{COLORS, FONT};
use crate::plan::{percent, table as columns};

/// Times between two deaths of workers anywhere in the run, in minutes.
const MINUTES: [u64; 12] = [1, 2, 5, 10, 15, 30, 60, 120, 240, 480, 720, 1440];
/// Size of the figure in pixels.
const SIZE: (u32, u32) = (900, 520);

/// All runs with one time between failures.
pub struct Point {
    /// Between two deaths of workers in the run.
    pub mtbf_ms: u64,
    /// Of each run.
    pub goodputs: Vec<f64>,
    deaths: u64,
    stall_p99_ms: u64,
}

impl Point {
    /// Lowest, mean and highest of the runs.
    fn spread(&self) -> [f64; 3] {
        let low = self.goodputs.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.goodputs.iter().copied().fold(0.0, f64::max);
        [
            low,
            self.goodputs.iter().sum::<f64>() / self.goodputs.len() as f64,
            high,
        ]
    }
}

/// Rehearses with every time between failures; coordinators die as often as a worker does, unless
/// the arguments say otherwise.
pub fn sweep(scenario: &Scenario, arguments: &RehearseArguments) -> anyhow::Result<Vec<Point>> {
    let point = |minutes: u64| {
        let mtbf_ms = minutes * 60_000;
        let worker_ms = mtbf_ms * u64::from(arguments.workers);
        let mut scenario = scenario.clone();
        scenario.mtbf = Mtbf {
            worker_ms,
            coordinator_ms: arguments
                .mtbf_coordinator
                .map_or(worker_ms, |time| time.millis()),
        };
        let what = format!("{:>4} ", every(mtbf_ms));
        let outcomes = run_all(&scenario, arguments.seed, arguments.runs, &what)?;
        let all = Outcome::merged(&outcomes).ok_or_else(|| anyhow!("--runs: at least 1"))?;
        Ok(Point {
            mtbf_ms,
            goodputs: outcomes.iter().map(Outcome::goodput).collect(),
            deaths: all.counts.faults.values().sum(),
            stall_p99_ms: all.stall(0.99),
        })
    };
    MINUTES.into_iter().map(point).collect()
}

/// The points as columns.
pub fn table(points: &[Point]) -> String {
    let heads = [
        "a death every",
        "deaths",
        "goodput",
        "lowest",
        "highest",
        "stall p99",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    for point in points {
        let [low, mean, high] = point.spread();
        rows.push(vec![
            every(point.mtbf_ms),
            point.deaths.to_string(),
            percent(mean),
            percent(low),
            percent(high),
            format!("{:.1} s", point.stall_p99_ms as f64 / 1e3),
        ]);
    }
    let mut text = String::new();
    columns(&mut text, &rows);
    let _ = writeln!(
        text,
        "  deaths of all runs; goodput: time of undisturbed steps over all time"
    );
    text
}

/// The points as a figure.
///
/// # Errors
/// It cannot be drawn.
pub fn svg(title: &str, points: &[Point]) -> anyhow::Result<String> {
    let mut text = String::new();
    draw(&mut text, title, points).map_err(|e| anyhow!("cannot draw: {e}"))?;
    Ok(text)
}

fn draw(
    text: &mut String,
    title: &str,
    points: &[Point],
) -> Result<(), Box<dyn std::error::Error>> {
    let minutes = |point: &Point| point.mtbf_ms as f64 / 60_000.0;
    let lowest = points.iter().map(|p| p.spread()[0]).fold(1.0, f64::min);
    // Whole tens of percent, so that the scale reads well.
    let floor = ((lowest * 10.0).floor() / 10.0).clamp(0.0, 0.9) * 100.0;
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 18))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d((0.9..1700.0f64).log_scale(), floor..100.0f64)?;
    chart
        .configure_mesh()
        .x_desc("mean time between two deaths of workers in the whole run")
        .y_desc("goodput, % of the time")
        .axis_desc_style((FONT, 14))
        .label_style((FONT, 13))
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(11)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let band: Vec<(f64, f64)> = points
        .iter()
        .map(|p| (minutes(p), 100.0 * p.spread()[2]))
        .chain(
            points
                .iter()
                .rev()
                .map(|p| (minutes(p), 100.0 * p.spread()[0])),
        )
        .collect();
    chart.draw_series([Polygon::new(band, COLORS[0].mix(0.15).filled())])?;
    let line = points.iter().map(|p| (minutes(p), 100.0 * p.spread()[1]));
    chart.draw_series(LineSeries::new(line.clone(), COLORS[0].stroke_width(2)))?;
    chart.draw_series(line.map(|at| Circle::new(at, 4, COLORS[0].filled())))?;
    // Labels at the points themselves: powers of ten say nothing of minutes and days.
    let style =
        TextStyle::from((FONT, 13).into_font()).pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Center,
            plotters::style::text_anchor::VPos::Top,
        ));
    let place = |x: f64| chart.backend_coord(&(x, floor));
    for point in points {
        let (x, y) = place(minutes(point));
        area.draw(&PathElement::new([(x, y), (x, y + 5)], BLACK.mix(0.5)))?;
        area.draw(&Text::new(every(point.mtbf_ms), (x, y + 8), style.clone()))?;
    }
    area.present()?;
    Ok(())
}
