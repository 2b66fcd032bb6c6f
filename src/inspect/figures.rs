//! Figures of an inspection as SVG, in the paper's arrangements.

use std::ops::Range;

use anyhow::anyhow;
use belfry_model::{Modality, Part, SimilarityRow, Source, WeightRow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::{modality, part};

/// Lines that colour-blind readers tell apart too (Okabe and Ito's set), on white.
pub const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(0, 0, 0),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];
/// Whatever font a viewer has.
pub const FONT: &str = "sans-serif";
const SIDES: [Modality; 2] = [Modality::Text, Modality::Image];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Lines over whole numbers.
struct Panel {
    title: String,
    x_label: &'static str,
    y_label: &'static str,
    y: Range<f64>,
    lines: Vec<Line>,
}

struct Line {
    name: String,
    points: Vec<(i32, f64)>,
}

/// Average aggregation weights of experts: a panel per modality, a line per cross-modal layer
/// (paper Figures 7, 9 and 10).
pub fn weights(title: &str, rows: &[WeightRow]) -> anyhow::Result<String> {
    let panels = SIDES.map(|side| Panel {
        title: format!("{} managers", modality(side)),
        x_label: "uni-modal layer",
        y_label: "average weight",
        // Room for the legend.
        y: 0.0..1.4 * highest(rows, side, |_| true),
        lines: layers(rows, side)
            .map(|layer| Line {
                name: format!("cross-modal layer {layer}"),
                points: experts(rows, side, layer),
            })
            .collect(),
    });
    let legend = Some(SeriesLabelPosition::UpperRight);
    draw(title, (1100, 480), 2, &panels, legend)
}

/// The same as a grid, modalities above each other and layers side by side; all but the first layer
/// share their scale (paper Figure 6).
pub fn weights_by_layer(title: &str, rows: &[WeightRow]) -> anyhow::Result<String> {
    let panels: Vec<Panel> = SIDES
        .iter()
        .flat_map(|side| layers(rows, *side).map(move |layer| (*side, layer)))
        .map(|(side, layer)| Panel {
            title: format!("{} layer {layer}", modality(side)),
            x_label: "uni-modal layer",
            y_label: if layer == 1 { "average weight" } else { "" },
            y: 0.0..1.1 * highest(rows, side, |other| (other == 1) == (layer == 1)),
            lines: vec![Line {
                name: String::new(),
                points: experts(rows, side, layer),
            }],
        })
        .collect();
    let columns = SIDES.map(|side| layers(rows, side).count());
    let columns = columns[0].max(columns[1]).max(1);
    draw(
        title,
        (40 + 230 * columns as u32, 520),
        columns,
        &panels,
        None,
    )
}

/// Cosine similarity of consecutive managers: a panel per modality, a line per part (Figure 3).
pub fn similarity(title: &str, rows: &[SimilarityRow]) -> anyhow::Result<String> {
    let lowest = rows.iter().map(|row| row.mean).fold(0.0, f64::min);
    let panels = SIDES.map(|side| Panel {
        title: format!("{} managers", modality(side)),
        x_label: "cross-modal layer, compared with the one below",
        y_label: "cosine similarity",
        y: 1.05 * lowest..1.05,
        lines: [Part::Experts, Part::Cross]
            .map(|wanted| Line {
                name: part(wanted).into(),
                points: rows
                    .iter()
                    .filter(|row| row.modality == side && row.part == wanted)
                    .map(|row| (row.layer as i32, row.mean))
                    .collect(),
            })
            .into(),
    });
    let legend = Some(SeriesLabelPosition::LowerRight);
    draw(title, (1100, 480), 2, &panels, legend)
}

/// Cross-modal layers of a stream, ascending.
fn layers(rows: &[WeightRow], side: Modality) -> impl Iterator<Item = u32> + use<'_> {
    let last = rows.iter().filter(move |row| row.modality == side);
    let last = last.map(|row| row.layer).max().unwrap_or(0);
    (1..=last).filter(move |layer| !experts(rows, side, *layer).is_empty())
}

fn experts(rows: &[WeightRow], side: Modality, layer: u32) -> Vec<(i32, f64)> {
    let own = rows
        .iter()
        .filter(|row| (row.modality, row.layer) == (side, layer));
    let of_expert = |row: &WeightRow| match row.source {
        Source::Expert(expert) => Some((expert as i32, row.mean)),
        Source::Cross(_) => None,
    };
    own.filter_map(of_expert).collect()
}

fn highest(rows: &[WeightRow], side: Modality, of_layer: impl Fn(u32) -> bool) -> f64 {
    let shown = layers(rows, side).filter(|layer| of_layer(*layer));
    let values = shown.flat_map(|layer| experts(rows, side, layer));
    values
        .map(|(_, weight)| weight)
        .fold(f64::MIN_POSITIVE, f64::max)
}

fn draw(
    title: &str,
    size: (u32, u32),
    columns: usize,
    panels: &[Panel],
    legend: Option<SeriesLabelPosition>,
) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        fill(&area, title, columns, panels, legend).map_err(|e| anyhow!("cannot draw: {e}"))?;
    }
    Ok(text)
}

fn fill(
    area: &Area,
    title: &str,
    columns: usize,
    panels: &[Panel],
    legend: Option<SeriesLabelPosition>,
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let area = area.titled(title, (FONT, 18))?;
    let rows = panels.len().div_ceil(columns).max(1);
    for (area, panel) in area.split_evenly((rows, columns)).iter().zip(panels) {
        panel.draw(area, legend.clone())?;
    }
    area.present()?;
    Ok(())
}

impl Panel {
    fn draw(
        &self,
        area: &Area,
        legend: Option<SeriesLabelPosition>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let places = || {
            self.lines
                .iter()
                .flat_map(|line| line.points.iter().map(|p| p.0))
        };
        let (first, last) = (places().min().unwrap_or(0), places().max().unwrap_or(1));
        // A scale needs some width.
        let last = last.max(first + 1);
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, 15))
            .margin(10)
            .x_label_area_size(38)
            .y_label_area_size(52)
            .build_cartesian_2d(first..last, self.y.clone())?;
        chart
            .configure_mesh()
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .x_labels((last - first + 1) as usize)
            .y_labels(6)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (i, line) in self.lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let drawn = chart.draw_series(LineSeries::new(
                line.points.iter().copied(),
                color.stroke_width(2),
            ))?;
            if legend.is_some() {
                drawn.label(&line.name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
            }
            let points = line.points.iter();
            chart.draw_series(points.map(|point| Circle::new(*point, 3, color.filled())))?;
        }
        if let Some(position) = legend {
            chart
                .configure_series_labels()
                .position(position)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
        }
        Ok(())
    }
}
