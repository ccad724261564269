//! What keys of a recipe hold, and how that is said and checked.

/// What a key may hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A whole number in a range.
    Int(u64, u64),
    /// A finite number in a range.
    Float(f64, f64),
    /// true or false.
    Flag,
    /// Any text.
    Text,
    /// A file or folder; relative paths are taken from the folder trilith runs in.
    Path,
    /// One path or a list of paths.
    Paths,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A number of bytes, as "4GiB", or "auto".
    Bytes,
}

/// A bound that is none.
pub(super) const MANY: u64 = 1 << 40;

use Kind::{Bytes, Choice, Flag, Float, Int, Path, Paths, Text};

impl Kind {
    /// What a value should be, for messages and documents.
    pub fn expected(self) -> String {
        let number =
            |x: f64| if x >= 1e6 || (x > 0.0 && x < 1e-3) { format!("{x:e}") } else { format!("{x}") };
        match self {
            Int(low, high) if high >= MANY => format!("a whole number from {low} on"),
            Int(low, high) => format!("a whole number from {low} to {high}"),
            Float(low, high) => format!("a number from {} to {}", number(low), number(high)),
            Flag => "true or false".into(),
            Text => "a text in quotes".into(),
            Path => "a path in quotes".into(),
            Paths => "a path in quotes, or a list of them".into(),
            Choice(words) => format!("one of \"{}\"", words.join("\", \"")),
            Bytes => "a number of bytes with its unit, as \"4GiB\", or \"auto\"".into(),
        }
    }

    /// Whether `value` is one, whole numbers where numbers are expected included.
    pub fn accepts(self, value: &toml::Value) -> bool {
        match self {
            Int(low, high) => {
                value.as_integer().is_some_and(|n| n >= 0 && (low..=high).contains(&(n as u64)))
            }
            Float(low, high) => {
                let number = value.as_float().or(value.as_integer().map(|n| n as f64));
                number.is_some_and(|x| x.is_finite() && x >= low && x <= high)
            }
            Flag => value.is_bool(),
            Text => value.is_str(),
            Path => value.as_str().is_some_and(|path| !path.is_empty()),
            Paths => {
                let some = |value: &toml::Value| value.as_str().is_some_and(|path| !path.is_empty());
                some(value) || value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(some))
            }
            Choice(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Bytes => value.as_str().is_some_and(|text| text == "auto" || parse_bytes(text).is_some()),
        }
    }
}

/// Bytes of a text like "512MiB", "1.5GB" or "4096B".
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit.trim() {
        "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "TiB" => 1_099_511_627_776.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * scale;
    (1.0..1e18).contains(&bytes).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit() {
        for (text, want) in [
            ("4096B", Some(4096)),
            ("1.5GiB", Some(3 << 29)),
            ("2 MB", Some(2_000_000)),
            ("12", None),
            ("GiB", None),
            ("-1GiB", None),
            ("1..2GiB", None),
            ("1e3MiB", None),
            ("0B", None),
        ] {
            assert_eq!(parse_bytes(text), want, "{text}");
        }
    }
}
