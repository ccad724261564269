//! Rules on Rust text: where `unsafe` and the environment may be used, how a crate begins, dashes.
//!
//! Works on tokens, so strings and comments never count and macro bodies do.

use proc_macro2::{TokenStream, TokenTree};

use super::Finding;

/// Crates whose work is raw memory; all others forbid `unsafe`.
const UNSAFE_CRATES: &[&str] = &["device", "kernels"];

/// The one folder elsewhere whose work is raw memory, and its crate, which denies `unsafe` instead:
/// while the drive works on memory, no borrow can say so.
const UNSAFE_FOLDER: (&str, &str) = ("memory", "crates/memory/src/disk/");

/// Files outside crates/cli and xtask that may read the environment, each with its reason.
const ENV_FILES: &[&str] = &[
    // The folder for a child process that is killed.
    "crates/checkpoint/tests/save.rs",
    // What its supervisor told a rank, which is a copy of the test.
    "crates/dist/tests/processes.rs",
];

/// Spelled as an escape so that this file passes its own rule.
const EM_DASH: char = '\u{2014}';

/// Em dashes of any text file.
pub fn dashes(path: &str, text: &str) -> Vec<Finding> {
    let with_dash = text.lines().enumerate().filter(|(_, line)| line.contains(EM_DASH));
    let remedy = "use a comma, a colon or two sentences";
    with_dash.map(|(index, _)| Finding::new(path, index + 1, "em dash", remedy)).collect()
}

/// The rules on one Rust file of the workspace; files outside crates/ and xtask/ are free.
pub fn check(path: &str, text: &str) -> Vec<Finding> {
    let Some(room) = room_of(path) else { return Vec::new() };
    let mut findings = check_crate_root(path, text, room);
    // A file that is no Rust at all is reported where functions are measured.
    let Ok(tokens) = text.parse::<TokenStream>() else { return findings };
    let mut seen = Seen::default();
    seen.walk(tokens);
    if !UNSAFE_CRATES.contains(&room) && !path.starts_with(UNSAFE_FOLDER.1) {
        let remedy = format!("move it into {}", UNSAFE_CRATES.join(" or "));
        findings.extend(seen.unsafes.iter().map(|line| Finding::new(path, *line, "`unsafe`", &remedy)));
    }
    if !["cli", "xtask"].contains(&room) && !ENV_FILES.contains(&path) {
        let what = "reads the environment";
        let remedy = "read it in crates/cli and pass the value down";
        findings.extend(seen.env_reads.iter().map(|line| Finding::new(path, *line, what, remedy)));
    }
    findings
}

/// The crate's folder: `tensor` of `crates/tensor/src/lib.rs`.
fn room_of(path: &str) -> Option<&str> {
    match path.strip_prefix("crates/") {
        Some(rest) => rest.split('/').next(),
        None => path.starts_with("xtask/").then_some("xtask"),
    }
}

/// The crate's first file says what the room is, and forbids `unsafe` where there is none.
fn check_crate_root(path: &str, text: &str, room: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !(path.ends_with(&format!("{room}/src/lib.rs")) || path.ends_with(&format!("{room}/src/main.rs"))) {
        return findings;
    }
    if !text.starts_with("//!") {
        let remedy = "begin with `//!` and what this crate does";
        findings.push(Finding::new(path, 1, "no crate documentation on the first line", remedy));
    }
    let how = if room == UNSAFE_FOLDER.0 { "deny" } else { "forbid" };
    let line = format!("#![{how}(unsafe_code)]");
    if !UNSAFE_CRATES.contains(&room) && !text.lines().any(|l| l.trim() == line) {
        let remedy = format!("add `{line}` below the crate documentation");
        findings.push(Finding::new(path, 1, "`unsafe` is not forbidden", remedy));
    }
    findings
}

/// Lines of the tokens that the rules ask about.
#[derive(Default)]
struct Seen {
    unsafes: Vec<usize>,
    env_reads: Vec<usize>,
}

impl Seen {
    fn walk(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (index, token) in tokens.iter().enumerate() {
            let line = token.span().start().line;
            match token {
                TokenTree::Ident(ident) if ident == "unsafe" => self.unsafes.push(line),
                TokenTree::Ident(ident) if ident == "env" && reads_env(&tokens[index + 1..]) => {
                    self.env_reads.push(line);
                }
                TokenTree::Group(group) => self.walk(group.stream()),
                _ => {}
            }
        }
    }
}

/// Whether the tokens after `env` are `::var`, a sibling of it, or a `::{...}` that names one.
fn reads_env(rest: &[TokenTree]) -> bool {
    let is_colon = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ':');
    let [first, second, third, ..] = rest else { return false };
    is_colon(first) && is_colon(second) && names_a_read(third)
}

fn names_a_read(token: &TokenTree) -> bool {
    match token {
        TokenTree::Ident(ident) => ["var", "var_os", "vars", "vars_os"].iter().any(|name| ident == name),
        TokenTree::Group(group) => group.stream().into_iter().any(|token| names_a_read(&token)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<(usize, String)> {
        check(path, text).into_iter().map(|f| (f.line, f.what)).collect()
    }

    #[test]
    fn unsafe_outside_its_crates_is_found_but_not_in_comments_or_strings() {
        let text = "// unsafe\nfn f() {\n    let s = \"unsafe\";\n    unsafe { g(s) }\n}\n";
        assert_eq!(found("crates/tensor/src/a.rs", text), [(4, "`unsafe`".to_string())]);
        assert_eq!(found("crates/kernels/src/a.rs", text), []);
        assert_eq!(found("bench/peer.rs", text), []);
        assert_eq!(found("crates/memory/src/disk/a.rs", text), []);
        assert_eq!(found("crates/memory/src/a.rs", text), [(4, "`unsafe`".to_string())]);
    }

    #[test]
    fn environment_is_read_in_the_binary_only() {
        let read = (1, "reads the environment".to_string());
        for text in ["fn f() { std::env::var(\"X\"); }", "use std::env::{self, var_os};"] {
            assert_eq!(found("crates/train/src/a.rs", text), std::slice::from_ref(&read), "{text}");
            assert_eq!(found("crates/cli/src/a.rs", text), []);
        }
        assert_eq!(found("crates/train/src/a.rs", "fn f() { std::env::args(); env!(\"X\"); }"), []);
    }

    #[test]
    fn a_crate_begins_with_words_and_a_promise() {
        let good = "//! Tensors.\n#![forbid(unsafe_code)]\n";
        assert_eq!(found("crates/tensor/src/lib.rs", good), []);
        assert_eq!(found("crates/kernels/src/lib.rs", "//! Kernels.\n"), []);
        assert_eq!(found("crates/memory/src/lib.rs", "//! Tiers.\n#![deny(unsafe_code)]\n"), []);
        assert_eq!(found("crates/memory/src/lib.rs", "//! Tiers.\n").len(), 1);
        assert_eq!(found("crates/tensor/src/lib.rs", "mod a;\n").len(), 2);
        assert_eq!(found("crates/tensor/src/ops/mod.rs", "mod a;\n"), []);
    }

    #[test]
    fn dashes_are_found_by_line() {
        let findings = dashes("a.md", "plain - text\nwith \u{2014} one\n");
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].to_string(), "a.md:2: em dash: use a comma, a colon or two sentences");
    }
}
