//! Loss curves as SVG.

use crate::error::{Error, Result};
use plotters::prelude::*;

/// What to draw.
#[derive(Clone, Debug, Default)]
pub struct LossCurves {
    /// Above the picture.
    pub title: String,
    /// (steps done, training loss of that step).
    pub train: Vec<(u64, f64)>,
    /// (steps done, held-out loss).
    pub held_out: Vec<(u64, f64)>,
}

const SIZE: (u32, u32) = (900, 450);
const FAINT: RGBColor = RGBColor(170, 190, 225);
const TRAIN: RGBColor = RGBColor(38, 84, 168);
const HELD_OUT: RGBColor = RGBColor(214, 96, 36);
const INK: RGBColor = RGBColor(60, 60, 68);

/// The curves as an SVG document: training loss faint and smoothed, held-out loss as points.
///
/// # Errors
/// If nothing finite is there to draw, or the drawing fails.
pub fn loss_svg(curves: &LossCurves) -> Result<String> {
    let finite = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
        points.iter().filter(|p| p.1.is_finite()).map(|&(s, l)| (s as f64, l)).collect()
    };
    let (train, held_out) = (finite(&curves.train), finite(&curves.held_out));
    let mut values: Vec<f64> = train.iter().chain(&held_out).map(|p| p.1).collect();
    if values.is_empty() {
        return Err(Error::Config("a picture of the loss: there is no finite value to draw".into()));
    }
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[0], values[values.len() - 1]);
    let pad = ((high - low) * 0.06).max(0.05);
    let end = train.iter().chain(&held_out).map(|p| p.0).fold(1.0, f64::max);
    let mut svg = String::new();
    draw(&mut svg, curves, &train, &held_out, (low - pad, high + pad), end)
        .map_err(|e| Error::Config(format!("a picture of the loss: {e}")))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    curves: &LossCurves,
    train: &[(f64, f64)],
    held_out: &[(f64, f64)],
    (low, high): (f64, f64),
    end: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&root)
        .caption(&curves.title, text(20))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, low..high)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(RGBColor(225, 228, 235))
        .light_line_style(WHITE)
        .axis_style(RGBColor(150, 154, 165))
        .label_style(text(14))
        .x_desc("step")
        .y_desc("loss (nats per byte)")
        .axis_desc_style(text(15))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.1}"))
        .draw()?;
    chart.draw_series(LineSeries::new(train.iter().copied(), FAINT.stroke_width(1)))?;
    chart
        .draw_series(LineSeries::new(smoothed(train), TRAIN.stroke_width(2)))?
        .label("training")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], TRAIN.stroke_width(2)));
    chart
        .draw_series(LineSeries::new(held_out.iter().copied(), HELD_OUT.stroke_width(1)))?
        .label("held out")
        .legend(|(x, y)| Circle::new((x + 11, y), 4, HELD_OUT.filled()));
    chart.draw_series(held_out.iter().map(|&p| Circle::new(p, 4, HELD_OUT.filled())))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .border_style(RGBColor(205, 208, 216))
        .label_font(text(15))
        .draw()?;
    root.present()?;
    Ok(())
}

/// The mean over a window about each point, an eightieth of the points to either side, narrower near the ends: unlike an
/// exponential mean, it does not lag behind a loss that falls fast.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let n = points.len();
    let mean = |window: &[(f64, f64)]| window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64;
    let reach = |i: usize| (n / 80).min(i).min(n - 1 - i);
    (0..n).map(|i| (points[i].0, mean(&points[i - reach(i)..=i + reach(i)]))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_what_is_finite() {
        let mut curves = LossCurves {
            title: "mixtral-tiny".into(),
            train: (1..=300).map(|s| (s, 5.5 / (s as f64).sqrt() + 1.0)).collect(),
            held_out: vec![(150, 1.6), (300, 1.4)],
        };
        curves.train[7].1 = f64::NAN;
        let svg = loss_svg(&curves).unwrap();
        assert!(svg.contains("mixtral-tiny") && svg.contains("held out") && svg.contains("<polyline"));
        assert!(!svg.contains("NaN"));
        assert!(loss_svg(&LossCurves { train: vec![(1, 2.0)], ..LossCurves::default() }).is_ok());
        assert!(loss_svg(&LossCurves { train: vec![(1, f64::NAN)], ..LossCurves::default() }).is_err());
    }

    #[test]
    fn smoothing_keeps_a_line_and_takes_noise_away() {
        assert!(smoothed(&[]).is_empty());
        let line: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), 2.0 - 0.5 * f64::from(i))).collect();
        assert!(smoothed(&line).iter().zip(&line).all(|(a, b)| (a.1 - b.1).abs() < 1e-9));
        let noise: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert!(smoothed(&noise)[200..300].iter().all(|p| (p.1 - 0.5).abs() < 0.05));
    }
}
