//! Load per expert as bars of Unicode blocks.

const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Bars of a line: more experts take more lines.
const LINE: usize = 64;

/// A bar per expert, full height the largest load, and the extremes over the mean: `▅█▃▆  0.6–1.4 × mean`. An expert
/// that took nothing shows as a dot.
pub fn load_bars(loads: &[u64]) -> Vec<String> {
    let most = loads.iter().copied().max().unwrap_or(0);
    if most == 0 {
        return vec!["no expert took a token".to_owned()];
    }
    let bar = |&load: &u64| match load {
        0 => '·',
        _ => BLOCKS[((load as f64 / most as f64 * 8.0).ceil() as usize).clamp(1, 8) - 1],
    };
    let mut lines: Vec<String> = loads.chunks(LINE).map(|line| line.iter().map(bar).collect()).collect();
    let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
    let least = loads.iter().copied().min().unwrap_or(0);
    if let Some(last) = lines.last_mut() {
        last.push_str(&format!("  {:.2}–{:.2} × mean", least as f64 / mean, most as f64 / mean));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heights_follow_loads() {
        assert_eq!(load_bars(&[80, 40, 10, 0, 70]), ["█▄▁·▇  0.00–2.00 × mean"]);
        assert_eq!(load_bars(&[0, 0]), ["no expert took a token"]);
        let many = load_bars(&[5; 100]);
        assert_eq!((many.len(), many[0].chars().count()), (2, 64));
        assert!(many[1].ends_with("1.00–1.00 × mean"));
    }
}
