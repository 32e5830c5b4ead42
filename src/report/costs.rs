//! What was measured, and the lines that were fitted to it.

use super::{Align, Table, bytes, count, duration, percent, rate};
use crate::engine::{LANES, Slowdown, lane_name};
use crate::moe::distributed::{Measured, Measurement};
use crate::schedule::Cost;
use serde::Serialize;
use std::fmt;

/// What one thing was measured to cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CostRow {
    /// What.
    pub name: String,
    /// What sizes are counted in: `bytes` or `FLOPs`.
    pub unit: &'static str,
    /// Size and seconds of what was measured.
    pub points: Vec<(f64, f64)>,
    /// Seconds that the start takes.
    pub alpha: f64,
    /// Seconds per byte or per FLOP.
    pub beta: f64,
    /// Which part of the times' variance the line explains.
    pub r2: f64,
    /// How far the point that is farthest from the line is from it, as a part of what the line says.
    pub deviation: f64,
}

/// The table of costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Costs {
    /// A row for each.
    pub costs: Vec<CostRow>,
    /// What the lanes lose to each other, where that was measured.
    pub slowdown: Option<Slowdown>,
}

impl Costs {
    /// Of what was measured.
    pub fn new(measured: &Measured) -> Self {
        Costs { costs: measured.costs.iter().map(CostRow::new).collect(), slowdown: measured.profile.slowdown }
    }
}

impl CostRow {
    fn new(m: &Measurement) -> Self {
        CostRow {
            name: m.name.clone(),
            unit: m.unit,
            points: m.points.clone(),
            alpha: m.cost.alpha,
            beta: m.cost.beta,
            r2: m.cost.r2.unwrap_or(0.0),
            deviation: m.deviation(),
        }
    }

    /// Sizes from the least to the most.
    fn sizes(&self) -> String {
        let sizes = || self.points.iter().map(|p| p.0);
        let one = |n| if self.unit == "bytes" { bytes(n) } else { count(n) };
        format!("{} – {}", one(sizes().fold(f64::INFINITY, f64::min)), one(sizes().fold(0.0, f64::max)))
    }

    /// What is done in a second, beyond the start.
    fn speed(&self) -> String {
        let of = if self.unit == "bytes" { "B" } else { "FLOP" };
        if self.beta > 0.0 { rate(1.0 / self.beta, of) } else { "–".to_owned() }
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [
            ("what", Align::Left),
            ("unit", Align::Left),
            ("sizes", Align::Right),
            ("α", Align::Right),
            ("1/β", Align::Right),
            ("R²", Align::Right),
            ("farthest off", Align::Right),
        ];
        let mut table = Table::new(&columns.map(|c| c.1)).header(columns.map(|c| c.0));
        for row in &self.costs {
            table.row([
                row.name.clone(),
                row.unit.to_owned(),
                row.sizes(),
                duration(row.alpha),
                row.speed(),
                format!("{:.4}", row.r2),
                percent(row.deviation),
            ]);
        }
        table.fmt(f)?;
        for (lane, lost) in LANES.into_iter().zip(self.slowdown.iter().flatten()) {
            let others = LANES.into_iter().filter(|&other| other != lane);
            let words: Vec<String> =
                others.map(|other| format!("{} beside {}", percent(lost[other as usize]), lane_name(other))).collect();
            writeln!(f, "{} takes longer by {}", lane_name(lane), words.join(", "))?;
        }
        for CostRow { name, r2, .. } in self.costs.iter().filter(|row| row.r2 < Cost::LEAST_R2) {
            writeln!(
                f,
                "warning: R² = {r2:.2} for the {name}: its times are on no line. Measure for longer (--time), larger sizes \
                 (--batch), or while nothing else runs on this machine"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, unit: &'static str, points: &[(f64, f64)]) -> CostRow {
        let cost = Cost::fit(points).unwrap();
        CostRow::new(&Measurement { name: name.to_owned(), unit, points: points.to_vec(), cost })
    }

    #[test]
    fn lines_in_units_and_a_warning_where_there_is_none() {
        let straight = [1024.0, 2048.0, 1048576.0].map(|n| (n, 2e-5 + n / 4e9));
        // Slope 0: all is off, by 1 of 2 and by 1 of 2.
        let scattered = [(1e6, 1e-3), (2e6, 3e-3), (3e6, 3e-3), (4e6, 1e-3)];
        let costs = Costs {
            costs: vec![row("a all-gather", "bytes", &straight), row("b product", "FLOPs", &scattered)],
            slowdown: Some([[0.0, 0.25, 0.02], [1.5, 0.0, 0.0], [0.0; 3]]),
        };
        let text = costs.to_string();
        let line = |name: &str| text.lines().find(|l| l.trim_start().starts_with(name)).unwrap();
        for part in ["1.00 KiB – 1.00 MiB", "20.0 µs", "4.00 GB/s", "1.0000"] {
            assert!(line("a all-gather").contains(part), "no {part:?} in\n{text}");
        }
        for part in ["1.00M – 4.00M", "2.00 ms", " – ", "0.0000", "50.0 %"] {
            assert!(line("b product").contains(part), "no {part:?} in\n{text}");
        }
        assert!(line("warning: ").contains("R² = 0.00 for the b product"), "{text}");
        assert_eq!(text.matches("warning").count(), 1, "{text}");
        assert_eq!(line("compute"), "compute takes longer by 25.0 % beside intra-node, 2.0 % beside inter-node");
        assert_eq!(line("intra-node"), "intra-node takes longer by 150.0 % beside compute, 0 % beside inter-node");
    }
}
