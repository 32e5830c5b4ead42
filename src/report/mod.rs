//! What a person looks at: numbers with units, tables, bars, loss curves.

mod bars;
mod loss_svg;
mod num;
mod summary;
mod table;

pub use bars::load_bars;
pub use loss_svg::{LossCurves, loss_svg};
pub use num::{bytes, count, percent, seconds};
pub use summary::{DeviceUse, Summary};
pub use table::{Align, Table};
