//! Numbers as people read them.

/// A count with three digits and a decimal prefix: `950`, `12.3k`, `46.7B`.
pub fn count(n: f64) -> String {
    scaled(n, 1000.0, &["", "k", "M", "B", "T"])
}

/// Bytes with a binary prefix: `512 B`, `1.20 GiB`.
pub fn bytes(n: f64) -> String {
    scaled(n, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

/// So many of something a second, with a decimal prefix: `12.3 GB/s` with `B`.
pub fn rate(per_second: f64, of: &str) -> String {
    format!("{}{of}/s", scaled(per_second, 1000.0, &[" ", " k", " M", " G", " T", " P"]))
}

fn scaled(n: f64, base: f64, units: &[&str]) -> String {
    let mut value = n;
    let mut unit = 0;
    // 999.5 and up would be written with four digits.
    while value.abs() >= base - 0.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = match value.abs() {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}{}", units[unit])
}

/// A duration: `4.2 s`, `3 min 12 s`, `2 h 05 min`.
pub fn seconds(s: f64) -> String {
    let whole = s.round() as u64;
    match whole {
        _ if s < 9.95 => format!("{s:.1} s"),
        w if w < 60 => format!("{w} s"),
        w if w < 3600 => format!("{} min {:02} s", w / 60, w % 60),
        w => format!("{} h {:02} min", w / 3600, w / 60 % 60),
    }
}

/// A short time with three digits: `8.20 µs`, `12.3 ms`, `1.05 s`.
pub fn duration(s: f64) -> String {
    let (value, unit) = match s.abs() {
        v if v < 0.999_5e-3 => (s * 1e6, "µs"),
        v if v < 0.999_5 => (s * 1e3, "ms"),
        _ => (s, "s"),
    };
    let decimals = match value.abs() {
        0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {unit}")
}

/// A fraction of one as a percentage: `0 %`, `1.3 %`.
pub fn percent(fraction: f64) -> String {
    // What rounds to zero has no sign.
    if fraction == 0.0 { "0 %".to_owned() } else { format!("{:.1} %", (fraction * 1e3).round() / 10.0 + 0.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        let counts = [0.0, 950.0, 999.6, 12_345.0, 123_456.0, 46.7e9];
        assert_eq!(counts.map(count), ["0", "950", "1.00k", "12.3k", "123k", "46.7B"]);
        assert_eq!([1.234e10, 999.0].map(|n| rate(n, "B")), ["12.3 GB/s", "999 B/s"]);
        assert_eq!([512.0, 1536.0, 1.2 * 1073741824.0].map(bytes), ["512 B", "1.50 KiB", "1.20 GiB"]);
        assert_eq!([4.2, 59.7, 192.0, 7500.0].map(seconds), ["4.2 s", "1 min 00 s", "3 min 12 s", "2 h 05 min"]);
        let times = [0.0, 8.2e-6, 999.4e-6, 0.9996e-3, 0.0123, 0.12345, 1.05, 420.0];
        let texts = ["0 µs", "8.20 µs", "999 µs", "1.00 ms", "12.3 ms", "123 ms", "1.05 s", "420 s"];
        assert_eq!(times.map(duration), texts);
        assert_eq!([0.0, 0.0134, 1.0, -1e-9].map(percent), ["0 %", "1.3 %", "100.0 %", "0.0 %"]);
    }
}
