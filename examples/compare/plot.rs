//! Figures as lines over the sequence length.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Result;
use crate::arguments::{Mask, Op};
use crate::report::{Figure, Task};

/// Points of one line, `[N, value]`.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// One line for each kernel, type, mask and shape less the sequence length.
fn series(figures: &[Figure], value: impl Fn(&Figure) -> f64) -> Vec<Series> {
    let mut all: Vec<Series> = vec![];
    for figure in figures {
        let Task { problem, mask, feature, .. } = &figure.task;
        let mut name = format!("{} {}", figure.name, problem.element_type);
        if *mask != Mask::None {
            name = format!("{name}, {}", mask.name());
        }
        if let Some(feature) = feature {
            name = format!("{name}, {}", feature.name());
        }
        if common_op(figures).is_none() {
            name = format!("{name}, {}", figure.op);
        }
        if common_sizes(figures).is_none() {
            name = format!("{name}, {}", sizes(figure));
        }
        let point = (problem.shape.seqlen_k as f64, value(figure));
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => all.push(Series { name, points: vec![point] }),
        }
    }
    for series in &mut all {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    all
}

/// All sizes but the sequence length.
fn sizes(figure: &Figure) -> String {
    let s = &figure.task.problem.shape;
    let heads = if s.group() == 1 { s.heads_q.to_string() } else { format!("{}/{}", s.heads_q, s.heads_kv) };
    format!("B {}, H {heads}, D {}", s.batch, s.head_dim)
}

/// The same, where they are those of every figure.
fn common_sizes(figures: &[Figure]) -> Option<String> {
    let first = figures.first().map(sizes)?;
    figures.iter().all(|figure| sizes(figure) == first).then_some(first)
}

/// The operation, where it is that of every figure.
fn common_op(figures: &[Figure]) -> Option<Op> {
    let first = figures.first()?.op;
    figures.iter().all(|figure| figure.op == first).then_some(first)
}

pub fn draw(figures: &[Figure], adapter: &str) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (1100, 500)).into_drawing_area();
        root.fill(&WHITE)?;
        let title = common_sizes(figures).map_or(adapter.into(), |sizes| format!("{sizes} on {adapter}"));
        let root = root.titled(&title, ("sans-serif", 16))?;
        let (left, right) = root.split_horizontally(550);
        let time = match common_op(figures) {
            Some(Op::Forward) => "Time of a forward pass",
            Some(Op::Backward) => "Time of a backward pass",
            Some(Op::Both) => "Time of a forward and a backward pass",
            None => "Time",
        };
        panel(&left, time, "ms", &series(figures, |figure| figure.time.median * 1e3))?;
        let memory = match common_op(figures) {
            Some(Op::Forward) => "Memory beyond q, k, v and o",
            _ => "Memory beyond q, k, v, o and gradients",
        };
        let mebibytes = series(figures, |figure| figure.extra_bytes as f64 / 1_048_576.0);
        panel(&right, memory, "MiB", &mebibytes)?;
        root.present()?;
    }
    Ok(svg)
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, unit: &str, all: &[Series]) -> Result<()> {
    let values =
        |of: fn(&(f64, f64)) -> f64| -> Vec<f64> { all.iter().flat_map(|s| s.points.iter().map(of)).collect() };
    let (lengths, heights) = (values(|p| p.0), values(|p| p.1));
    let mut ticks = lengths.clone();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    // Room for the legend above the lines.
    let range = |values: &[f64], below: f64, above: f64| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        low * below..high * above
    };
    let x = range(&lengths, 0.8, 1.25).log_scale().with_key_points(ticks);
    let y = range(&heights, 0.5, 10.0).log_scale();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("sequence length N (positions)")
        .y_desc(unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y}"))
        .light_line_style(WHITE)
        .draw()?;
    for (n, Series { name, points }) in all.iter().enumerate() {
        let style = Palette99::pick(n).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
