//! A timeline in the terminal.

use super::duration;
use crate::engine::{LANES, Timeline, lane_name};

/// A line per lane that has tasks, `width` characters for the whole time, and a scale:
///
/// ```text
/// inter-node  [D1===][D2===]      [C1===][C2===]
/// ```
///
/// A task shows the first word of its name where there is room for it.
pub fn gantt(timeline: &Timeline, width: usize) -> String {
    let total = timeline.makespan();
    let width = width.max(10);
    let mut text = String::new();
    for lane in LANES {
        let mut cells = vec![' '; width];
        let mut free = 0;
        for span in timeline.spans.iter().filter(|s| s.lane == lane && s.end > s.start) {
            let at = |time: f64| ((time / total * width as f64).round() as usize).min(width);
            // What is shorter than a character takes one, if the task before it left it.
            let begin = at(span.start).max(free);
            let end = at(span.end).max(begin + 1).min(width);
            if begin < end {
                draw(&mut cells[begin..end], span.name.split(' ').next().unwrap_or_default());
                free = end;
            }
        }
        if free > 0 {
            let line: String = cells.into_iter().collect();
            text.push_str(&format!("{:<11} {}\n", lane_name(lane), line.trim_end()));
        }
    }
    let end = duration(total);
    text.push_str(&format!("{:<11} 0{end:>room$}\n", "", room = width - 1));
    text
}

fn draw(cells: &mut [char], name: &str) {
    let last = cells.len() - 1;
    if last == 0 {
        cells[0] = '|';
        return;
    }
    cells.fill('=');
    (cells[0], cells[last]) = ('[', ']');
    if name.chars().count() <= last {
        cells[1..].iter_mut().zip(name.chars()).for_each(|(cell, letter)| *cell = letter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::LaneKind::{Compute, InterNode};
    use crate::engine::Span;

    #[test]
    fn lanes_are_drawn_to_scale() {
        let span = |name: &str, lane, start: f64, end: f64| Span { name: name.into(), lane, start, end };
        let timeline = Timeline {
            spans: vec![
                span("D1 L1", InterNode, 0.0, 2e-3),
                span("E1 L1", Compute, 2e-3, 8e-3),
                span("G dense 0..7", InterNode, 2e-3, 2.4e-3),
                span("nothing", InterNode, 3e-3, 3e-3),
                span("C1 L1", InterNode, 8e-3, 10e-3),
            ],
        };
        // 20 characters: half a millisecond each.
        let expected =
            ["compute         [E1========]", "inter-node  [D1]|           [C1]", "            0            10.0 ms"];
        assert_eq!(gantt(&timeline, 20).lines().collect::<Vec<_>>(), expected);
        assert_eq!(gantt(&Timeline::default(), 20), format!("{:<11} 0{:>19}\n", "", "0 µs"));
    }
}
