//! Plain text tables.

use std::fmt;

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows under thin rules, columns as wide as their widest cell.
pub struct Table {
    align: Vec<Align>,
    header: Option<Vec<String>>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of columns so aligned.
    pub fn new(align: &[Align]) -> Self {
        Table { align: align.to_vec(), header: None, rows: Vec::new() }
    }

    /// The same with a header row.
    pub fn header<S: Into<String>>(mut self, cells: impl IntoIterator<Item = S>) -> Self {
        self.header = Some(cells.into_iter().map(Into::into).collect());
        self
    }

    /// Adds a row; missing cells are empty.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = || self.header.iter().chain(&self.rows);
        let cell = |row: &Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
        let widths: Vec<usize> =
            (0..self.align.len()).map(|c| all().map(|row| cell(row, c).chars().count()).max().unwrap_or(0)).collect();
        let rule = "─".repeat(widths.iter().sum::<usize>() + 3 * widths.len() - 1);
        let line = |f: &mut fmt::Formatter<'_>, row: &Vec<String>| {
            for (c, (&width, align)) in widths.iter().zip(&self.align).enumerate() {
                let text = cell(row, c);
                match align {
                    Align::Left => write!(f, " {text:<width$}")?,
                    Align::Right => write!(f, " {text:>width$}")?,
                }
                f.write_str(if c + 1 < widths.len() { "  " } else { "\n" })?;
            }
            Ok(())
        };
        writeln!(f, "{rule}")?;
        if let Some(header) = &self.header {
            line(f, header)?;
            writeln!(f, "{rule}")?;
        }
        self.rows.iter().try_for_each(|row| line(f, row))?;
        writeln!(f, "{rule}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut t = Table::new(&[Align::Left, Align::Right]).header(["gate", "µs"]);
        t.row(["top-k", "9"]);
        t.row(["x", "1234"]);
        let rule = "─".repeat(14);
        assert_eq!(t.to_string(), format!("{rule}\n gate      µs\n{rule}\n top-k      9\n x       1234\n{rule}\n"));
    }
}
