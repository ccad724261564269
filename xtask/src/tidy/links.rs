//! Links of Markdown files that point into the repository must point at something.

use std::path::{Component, Path, PathBuf};

use super::Finding;

/// Links of `text` whose target, a path from the root, does not satisfy `exists`.
pub fn broken(path: &str, text: &str, exists: impl Fn(&Path) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, target) in targets(text) {
        let Some(file) = file_of(path, target) else { continue };
        let found = file.as_ref().is_some_and(|file| exists(file));
        if !found {
            let what = format!("link to `{target}`, which does not exist");
            findings.push(Finding::new(path, line, what, "fix the path or drop the link"));
        }
    }
    findings
}

/// Targets of inline links, images and reference definitions, with their lines; code is skipped.
fn targets(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut fence: Option<&str> = None;
    for (index, line) in text.lines().enumerate() {
        let start = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| start.starts_with(mark));
        match (fence, mark) {
            (None, Some(_)) => fence = mark,
            (Some(open), Some(mark)) if open == mark => fence = None,
            (Some(_), _) => {}
            (None, None) => found.extend(targets_of_line(line).into_iter().map(|target| (index + 1, target))),
        }
    }
    found
}

fn targets_of_line(line: &str) -> Vec<&str> {
    let definition = line.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("]: "));
    if let Some((label, target)) = definition
        && !label.contains(']')
    {
        return target.split_whitespace().next().into_iter().map(unquote).collect();
    }
    // Every other part between backticks is code.
    let prose = line.split('`').step_by(2);
    let links = prose.flat_map(|part| part.split("](").skip(1));
    links.filter_map(|rest| rest.split([')', ' ']).next()).map(unquote).collect()
}

fn unquote(target: &str) -> &str {
    target.trim_start_matches('<').trim_end_matches('>')
}

/// The file a link means, as a path from the root.
///
/// `None` where it means no file here (an address, an anchor of the same page), and
/// `Some(None)` where it climbs out of the repository.
fn file_of(page: &str, target: &str) -> Option<Option<PathBuf>> {
    let target = target.split(['#', '?']).next().unwrap_or_default();
    if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let folder = Path::new(page).parent().unwrap_or(Path::new(""));
    let joined = match target.strip_prefix('/') {
        Some(from_root) => PathBuf::from(from_root),
        None => folder.join(target),
    };
    let mut file = PathBuf::new();
    for part in joined.components() {
        match part {
            Component::ParentDir if !file.pop() => return Some(None),
            Component::Normal(name) => file.push(name),
            _ => {}
        }
    }
    Some(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_broken(text: &str) -> Vec<(usize, String)> {
        let files = ["README.md", "docs/a.md", "docs/pictures/b.png"];
        let exists = |path: &Path| path.as_os_str().is_empty() || files.iter().any(|f| Path::new(f) == path);
        let findings = broken("docs/index.md", text, exists);
        findings.into_iter().map(|f| (f.line, f.what)).collect()
    }

    #[test]
    fn good_links_pass() {
        let text = "[a](a.md) ![b](pictures/b.png \"title\")\n[up](../README.md#top) [root](/docs/a.md)\n\
                    [web](https://example.org/x) [here](#part) [m](mailto:a@b.c)\n[ref]: <a.md>\n";
        assert_eq!(lines_broken(text), []);
    }

    #[test]
    fn missing_files_are_found_by_line() {
        let text = "first\n[x](gone.md), [a](a.md), [y](../../outside.md)\n\n[ref]: nowhere.md\n";
        let lines: Vec<usize> = lines_broken(text).into_iter().map(|(line, _)| line).collect();
        assert_eq!(lines, [2, 2, 4]);
        assert_eq!(lines_broken("[x](gone.md)")[0].1, "link to `gone.md`, which does not exist");
    }

    #[test]
    fn code_is_not_a_link() {
        assert_eq!(lines_broken("```\n[x](gone.md)\n```\nand `v[i](gone.md)` too"), []);
        assert_eq!(lines_broken("```\ncode\n```\n[x](gone.md)").len(), 1);
    }
}
