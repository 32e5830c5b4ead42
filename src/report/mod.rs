//! What a person looks at: numbers with units, tables, bars, loss curves, timelines.

mod bars;
mod costs;
mod gantt;
mod gantt_svg;
mod loss_svg;
mod num;
mod plans;
mod summary;
mod table;
mod trace;

pub use bars::load_bars;
pub use costs::{CostRow, Costs};
pub use gantt::gantt;
pub use gantt_svg::gantt_svg;
pub use loss_svg::{LossCurves, loss_svg};
pub use num::{bytes, count, duration, percent, rate, seconds};
pub use plans::{PlanRow, Plans};
pub use summary::{DeviceUse, Summary};
pub use table::{Align, Table};
pub use trace::perfetto;
