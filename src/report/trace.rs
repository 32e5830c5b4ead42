//! Timelines for <https://ui.perfetto.dev>, in Chrome's trace event format.

use super::gantt_svg::kind;
use crate::engine::{LANES, Timeline, lane_name};
use serde_json::{Value, json};

/// A trace with a process for each timeline (a rank, or a variant) and its lanes as threads: JSON text.
pub fn perfetto(processes: &[(&str, &Timeline)]) -> String {
    let mut events: Vec<Value> = Vec::new();
    for (pid, (name, timeline)) in processes.iter().enumerate() {
        events.push(json!({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}));
        for lane in LANES {
            let (tid, name) = (lane as usize, lane_name(lane));
            events.push(json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}));
        }
        for span in &timeline.spans {
            events.push(json!({
                "ph": "X",
                "name": span.name,
                "cat": kind(span),
                "pid": pid,
                "tid": span.lane as usize,
                // The format's unit is the microsecond.
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
            }));
        }
    }
    json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::LaneKind::InterNode;
    use crate::engine::Span;

    #[test]
    fn an_event_per_task() {
        let spans = vec![Span { name: "D1 L1".into(), lane: InterNode, start: 0.5, end: 0.75 }];
        let text = perfetto(&[("rank 0", &Timeline::default()), ("rank 1", &Timeline { spans })]);
        let trace: Value = serde_json::from_str(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 * 4 + 1);
        let names: Vec<&str> = events.iter().filter_map(|e| e["args"]["name"].as_str()).collect();
        assert_eq!(
            names,
            ["rank 0", "compute", "intra-node", "inter-node", "rank 1", "compute", "intra-node", "inter-node"]
        );
        let task = &events[8];
        assert_eq!(
            (task["name"].as_str(), task["cat"].as_str(), task["pid"].as_u64()),
            (Some("D1 L1"), Some("D"), Some(1))
        );
        assert_eq!((task["ts"].as_f64(), task["dur"].as_f64()), (Some(500_000.0), Some(250_000.0)));
        let thread = events.iter().find(|e| e["args"]["name"] == "inter-node").unwrap();
        assert_eq!(task["tid"], thread["tid"]);
    }
}
