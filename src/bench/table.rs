//! The rows as tables for people.

use super::kernels::KernelRow;
use super::layer::LayerRow;
use super::schedule::ScheduleRow;
use crate::report::{Align, Table, bytes};

/// Milliseconds with four significant digits.
fn ms(value: f64) -> String {
    let decimals = match value {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        v if v >= 1.0 => 3,
        _ => 4,
    };
    format!("{value:.decimals$}")
}

/// A table of layers' rows, with what failed below it.
pub fn layer_table(rows: &[LayerRow]) -> String {
    let mut columns = vec![Align::Left; 4];
    columns.extend([Align::Right; 9]);
    let mut table = Table::new(&columns).header([
        "shape",
        "impl",
        "pass",
        "mode",
        "ms",
        "p10–p90",
        "TFLOP/s",
        "dense ms",
        "efficiency",
        "floor ms",
        "peak",
        "load",
        "dropped",
    ]);
    for row in rows {
        let Some(f) = &row.figures else { continue };
        table.row([
            row.shape.clone(),
            row.implementation.clone(),
            row.pass.clone(),
            row.mode.clone(),
            ms(f.time.median_ms),
            format!("{}–{}", ms(f.time.p10_ms), ms(f.time.p90_ms)),
            format!("{:.1}", f.tflops),
            ms(f.dense_ms),
            format!("{:.3}", f.efficiency),
            ms(f.floor_ms),
            f.peak_bytes.map_or("–".into(), |n| bytes(n as f64)),
            format!("{:.2} × mean", f.load_max_over_mean),
            format!("{:.1} %", 100.0 * f.dropped as f64 / (row.tokens * row.top_k) as f64),
        ]);
    }
    let errors = rows.iter().filter_map(|row| {
        row.error.as_ref().map(|error| format!("{} {} {}: {error}\n", row.shape, row.pass, row.mode))
    });
    format!("{table}{}", errors.collect::<String>())
}

/// A table of schedules' rows.
pub fn schedule_table(rows: &[ScheduleRow]) -> String {
    let mut columns = vec![Align::Left; 2];
    columns.extend([Align::Right; 8]);
    let mut table = Table::new(&columns).header([
        "shape",
        "policy",
        "ms",
        "p10–p90",
        "predicted",
        "off by",
        "r, d forward",
        "r, d backward",
        "× deepspeed",
        "overran",
    ]);
    for row in rows {
        table.row([
            row.shape.clone(),
            row.policy.clone(),
            ms(row.measured_ms),
            format!("{}–{}", ms(row.p10_ms), ms(row.p90_ms)),
            ms(row.predicted_ms),
            format!("{:+.1} %", row.error_percent),
            format!("{}, {}", row.r_forward, row.d_forward),
            format!("{}, {}", row.r_backward, row.d_backward),
            row.speedup_over_deepspeed.map_or("–".into(), |speedup| format!("{speedup:.2}")),
            row.overran_percent.map_or("–".into(), |percent| format!("{percent:.2} %")),
        ]);
    }
    table.to_string()
}

/// A table of operations' rows, with what failed below it.
pub fn kernel_table(rows: &[KernelRow]) -> String {
    let mut columns = vec![Align::Left; 4];
    columns.extend([Align::Right; 7]);
    let mut table = Table::new(&columns).header([
        "operation",
        "impl",
        "shape",
        "mode",
        "µs",
        "p10–p90",
        "GB/s",
        "TFLOP/s",
        "floor µs",
        "ratio",
        "bound",
    ]);
    for row in rows {
        let Some(f) = &row.figures else { continue };
        let us = |v: f64| ms(v * 1e3);
        table.row([
            row.name.clone(),
            row.implementation.clone(),
            row.shape.clone(),
            row.mode.clone(),
            us(f.time.median_ms),
            format!("{}–{}", us(f.time.p10_ms), us(f.time.p90_ms)),
            format!("{:.0}", f.gb_per_s),
            if f.flops > 0.0 { format!("{:.1}", f.tflops) } else { "–".into() },
            us(f.ceiling_ms),
            format!("{:.2}", f.ratio),
            f.bound.clone(),
        ]);
    }
    let compared = rows.iter().filter(|row| row.mode == "eager").filter_map(|row| {
        let (shapes, error) = (row.compared.as_ref()?.join("; "), row.largest_error?);
        Some(format!(
            "{} {}: as the CPU's, off by {error:.1e} of the largest at most, on {shapes}\n",
            row.name, row.implementation
        ))
    });
    let errors = rows.iter().filter_map(|row| {
        row.error.as_ref().map(|error| format!("{} {} {}: {error}\n", row.name, row.implementation, row.mode))
    });
    format!("{table}{}{}", compared.collect::<String>(), errors.collect::<String>())
}
