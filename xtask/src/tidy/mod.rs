//! `cargo xtask tidy`: the rules that no compiler checks, each a pure function from text to findings.
//!
//! Only this file reads the tree; the rules in the files beside it see strings.

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

mod levels;
mod links;
mod sizes;
mod source;

/// Options of `tidy`.
#[derive(clap::Args)]
pub struct Args {
    /// Lower (never raise) the entries of xtask/ratchet.toml to today's sizes.
    #[arg(long)]
    update: bool,
}

/// One broken rule, printed as `path:line: what: remedy`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    path: String,
    line: usize,
    what: String,
    remedy: String,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { path: path.to_string(), line, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.what, self.remedy)
    }
}

/// A text file of the repository: its path from the root, with `/`, and its contents.
struct File {
    path: String,
    text: String,
}

/// Where the ratchet's entries lie, from the root.
const RATCHET: &str = "xtask/ratchet.toml";

/// Checks every rule and prints what it finds; true when the tree is tidy.
pub fn run(root: &Path, args: &Args) -> Result<bool> {
    let files = read_files(root)?;
    let mut findings = Vec::new();
    for file in &files {
        findings.extend(source::dashes(&file.path, &file.text));
        if file.path.ends_with(".md") {
            findings.extend(links::broken(&file.path, &file.text, |target| root.join(target).exists()));
        }
        if is_manifest_of_crate(&file.path) {
            findings.extend(levels::check(&file.path, &file.text));
        }
        if file.path.ends_with(".rs") {
            findings.extend(source::check(&file.path, &file.text));
        }
    }
    findings.extend(check_sizes(root, &files, args.update)?);
    findings.sort();
    findings.iter().for_each(|finding| println!("{finding}"));
    match findings.len() {
        0 => println!("tidy: {} files, nothing to say", files.len()),
        count => println!("tidy: {count} findings in {} files", files.len()),
    }
    Ok(findings.is_empty())
}

fn is_manifest_of_crate(path: &str) -> bool {
    path.strip_prefix("crates/").and_then(|p| p.strip_suffix("/Cargo.toml")).is_some_and(|p| !p.contains('/'))
}

/// Compares sizes with the ratchet; with `update` it lowers the file's entries first.
fn check_sizes(root: &Path, files: &[File], update: bool) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut sizes = sizes::Sizes::default();
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        if let Err(error) = sizes.measure(&file.path, &file.text) {
            let line = error.span().start().line;
            findings.push(Finding::new(
                &file.path,
                line,
                format!("does not parse: {error}"),
                "fix the syntax",
            ));
        }
    }
    let path = root.join(RATCHET);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {RATCHET}"))?;
    let mut ratchet: sizes::Ratchet = toml::from_str(&text).with_context(|| format!("parsing {RATCHET}"))?;
    if update && ratchet.lower(&sizes) {
        std::fs::write(&path, ratchet.to_toml()).with_context(|| format!("writing {RATCHET}"))?;
        println!("tidy: lowered the entries of {RATCHET}");
    }
    findings.extend(ratchet.check(&sizes));
    Ok(findings)
}

/// The .rs, .md and .toml files that git tracks or would track.
fn read_files(root: &Path) -> Result<Vec<File>> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"])
        .args(["--", "*.rs", "*.md", "*.toml"])
        .current_dir(root)
        .output()
        .context("running git ls-files")?;
    ensure!(listing.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listing.stderr));
    let paths = String::from_utf8(listing.stdout).context("a path that is not UTF-8")?;
    let mut files = Vec::new();
    for path in paths.split('\0').filter(|path| !path.is_empty()) {
        let full = root.join(path);
        // Deleted but still in the index: nothing to check.
        if !full.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&full).with_context(|| format!("reading {path}"))?;
        files.push(File { path: path.to_string(), text });
    }
    Ok(files)
}
