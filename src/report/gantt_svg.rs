//! Timelines as a picture.

use super::duration;
use crate::engine::{LANES, Span, Timeline, lane_name};
use std::fmt::Write;

const WIDTH: f64 = 1200.0;
const LABELS: f64 = 92.0;
const LANE: f64 = 30.0;
const TITLE: f64 = 30.0;
const AXIS: f64 = 26.0;
const LEGEND: f64 = 30.0;

/// Colours of kinds of tasks, in the order in which kinds turn up: seven of Okabe and Ito's, which are told apart with any
/// eyes, and a grey.
const COLOURS: [&str; 8] = ["#56b4e9", "#009e73", "#e69f00", "#f0e442", "#cc79a7", "#0072b2", "#d55e00", "#b8bcc6"];

/// Timelines under each other, to one scale, lanes as rows; a task's colour is that of its kind, the letters its name begins
/// with. An SVG document.
pub fn gantt_svg(charts: &[(&str, &Timeline)]) -> String {
    let total = charts.iter().map(|c| c.1.makespan()).fold(f64::MIN_POSITIVE, f64::max);
    let spans = || charts.iter().flat_map(|c| &c.1.spans).filter(|s| s.end > s.start);
    let mut kinds: Vec<&str> = Vec::new();
    for span in spans() {
        if !kinds.contains(&kind(span)) {
            kinds.push(kind(span));
        }
    }
    let colour = |kind: &str| kinds.iter().position(|k| *k == kind).map_or("#888888", |i| COLOURS[i % COLOURS.len()]);
    let lanes = |timeline: &Timeline| {
        LANES.into_iter().filter(|&lane| timeline.spans.iter().any(|s| s.lane == lane)).collect::<Vec<_>>()
    };
    let height: f64 = charts.iter().map(|c| TITLE + AXIS + LANE * lanes(c.1).len() as f64).sum::<f64>() + LEGEND;
    let x = |time: f64| LABELS + time / total * (WIDTH - LABELS - 16.0);

    let mut body = String::new();
    let mut y = 0.0;
    for (title, timeline) in charts {
        text(&mut body, 8.0, y + 20.0, "start", 15, &format!("{title}: {}", duration(timeline.makespan())));
        y += TITLE;
        for lane in lanes(timeline) {
            text(&mut body, LABELS - 8.0, y + LANE * 0.62, "end", 13, lane_name(lane));
            for span in timeline.spans.iter().filter(|s| s.lane == lane && s.end > s.start) {
                bar(&mut body, span, x(span.start), x(span.end), y, colour(kind(span)));
            }
            y += LANE;
        }
        let step = tick(total);
        for i in 0..=(timeline.makespan() / step) as usize {
            let time = step * i as f64;
            let at = x(time);
            push(&mut body, format_args!("<path d='M{at:.1} {y:.1}v5' stroke='#969aa5'/>"));
            text(&mut body, at, y + 18.0, "middle", 11, &duration(time));
        }
        y += AXIS;
    }
    for (i, name) in kinds.iter().enumerate() {
        let at = LABELS + 90.0 * i as f64;
        let colour = colour(name);
        push(&mut body, format_args!("<rect x='{at:.1}' y='{:.1}' width='14' height='14' fill='{colour}'/>", y + 6.0));
        text(&mut body, at + 20.0, y + 18.0, "start", 13, name);
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}' \
         font-family='sans-serif'>\n<rect width='100%' height='100%' fill='white'/>\n{body}</svg>\n"
    )
}

/// The letters that a task's name begins with.
pub(super) fn kind(span: &Span) -> &str {
    let end = span.name.find(|c: char| !c.is_alphabetic()).unwrap_or(span.name.len());
    &span.name[..end]
}

fn bar(body: &mut String, span: &Span, from: f64, to: f64, y: f64, colour: &str) {
    let (top, width) = (y + 3.0, (to - from).max(0.4));
    let hint = format!("{}: {} to {}", span.name, duration(span.start), duration(span.end));
    push(
        body,
        format_args!(
            "<rect x='{from:.2}' y='{top:.1}' width='{width:.2}' height='{:.1}' fill='{colour}' stroke='white' \
             stroke-width='0.6'><title>{}</title></rect>",
            LANE - 6.0,
            escaped(&hint)
        ),
    );
    let name = span.name.split(' ').next().unwrap_or_default();
    if width > 8.0 * name.chars().count() as f64 {
        text(body, (from + to) / 2.0, y + LANE * 0.62, "middle", 12, name);
    }
}

fn text(body: &mut String, x: f64, y: f64, anchor: &str, size: u32, content: &str) {
    let content = escaped(content);
    push(
        body,
        format_args!(
            "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' font-size='{size}' fill='#3c3c44'>{content}</text>"
        ),
    );
}

fn push(body: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(body, "{line}");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The distance of ticks, a round number of which there are five to ten.
fn tick(total: f64) -> f64 {
    let rough = total / 10.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&step| step >= rough).unwrap_or(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::LaneKind::{Compute, InterNode};

    #[test]
    fn a_bar_per_task_and_one_scale() {
        let span = |name: &str, lane, start, end| Span { name: name.into(), lane, start, end };
        let one = Timeline { spans: vec![span("D1 L1", InterNode, 0.0, 4e-3), span("E1 <L1>", Compute, 4e-3, 8e-3)] };
        let two = Timeline { spans: vec![span("D'1 L1", InterNode, 0.0, 2e-3), span("empty", Compute, 2e-3, 2e-3)] };
        let svg = gantt_svg(&[("forward", &one), ("back & forth", &two)]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("forward: 8.00 ms") && svg.contains("back &amp; forth: 2.00 ms"));
        assert!(svg.contains("<title>E1 &lt;L1&gt;: 4.00 ms to 8.00 ms</title>"));
        assert_eq!(svg.matches("<title>").count(), 3, "what takes no time is not drawn");
        // D and D' are of one kind; the legend has two.
        assert_eq!(svg.matches("height='14'").count(), 2);
        assert_eq!(svg.matches(&format!("fill='{}' stroke", COLOURS[0])).count(), 2);
        // Half as long, half as wide.
        let width = |part: &str| {
            let line = svg.lines().find(|l| l.contains(part)).unwrap();
            line.split("width='").nth(1).unwrap().split('\'').next().unwrap().parse::<f64>().unwrap()
        };
        assert!((width("D1 L1") - 2.0 * width("D'1 L1")).abs() < 0.02);
    }

    #[test]
    fn ticks_are_round() {
        assert!((tick(8.0e-3) - 1e-3).abs() < 1e-12);
        assert!((tick(0.0123) - 2e-3).abs() < 1e-12);
        assert!((tick(45.0) - 5.0).abs() < 1e-9);
    }
}
