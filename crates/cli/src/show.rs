//! Numbers, tables and bars for people.

use comfy_table::{CellAlignment, LineStyle, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

pub use train::bytes;

/// "12.3k", "4.56M": three digits that matter.
pub fn count(n: f64) -> String {
    let (value, unit) = match n {
        n if n >= 1e18 => (n / 1e18, "E"),
        n if n >= 1e15 => (n / 1e15, "P"),
        n if n >= 1e12 => (n / 1e12, "T"),
        n if n >= 1e9 => (n / 1e9, "G"),
        n if n >= 1e6 => (n / 1e6, "M"),
        n if n >= 1e4 => (n / 1e3, "k"),
        n => return format!("{n:.0}"),
    };
    match value {
        v if v >= 100.0 => format!("{v:.0}{unit}"),
        v if v >= 10.0 => format!("{v:.1}{unit}"),
        v => format!("{v:.2}{unit}"),
    }
}

/// "27.0 GFLOP".
pub fn flops(n: f64) -> String {
    let short = count(n);
    let digits = short.trim_end_matches(char::is_alphabetic);
    format!("{digits} {}FLOP", &short[digits.len()..])
}

/// "3h 04m", "2m 05s", "1.2 s".
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// "1.234 s", "5.7 ms", "12 us": for times far below a minute.
pub fn short(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => duration(s),
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// A table with a header; columns of numbers are given by index and stand to the right.
pub fn table(header: &[&str], rows: Vec<Vec<String>>, numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()))
        .set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in numbers {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Two columns without a header: what, and how much.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(what, value)| format!("  {what:width$}  {value}\n")).collect()
}

/// A bar over `total` of `what`; hidden where standard error is no terminal.
pub fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style.progress_chars("━╸ "));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// An error with its causes, each said once: many messages name their cause themselves.
pub fn causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(|cause| cause.to_string()) {
        if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

/// Whether an error is that nobody reads our output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [count(950.0), count(12_340.0), count(4.56e6), count(1.5e12)],
            ["950", "12.3k", "4.56M", "1.50T"]
        );
        assert_eq!([flops(2.7e10), flops(12.0)], ["27.0 GFLOP", "12 FLOP"]);
        assert_eq!([short(1.5), short(0.0123), short(2e-6)], ["1.500 s", "12.30 ms", "2.0 us"]);
        assert_eq!([duration(1.23), duration(125.0), duration(11_040.0)], ["1.2 s", "2m 05s", "3h 04m"]);
    }
}
