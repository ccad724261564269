//! Crates form floors: each depends only on floors below its own.

use super::Finding;

/// The floor of every crate, by package name. A new crate gets a line here first.
const LEVELS: &[(&str, u32)] = &[
    ("device", 0),
    ("data", 0),
    ("kernels", 1),
    ("memory", 1),
    ("tensor", 2),
    ("dist", 3),
    ("model", 4),
    ("checkpoint", 4),
    ("train", 5),
    ("infer", 5),
    ("compress", 5),
    ("serve", 6),
    ("platform", 6),
    ("trilith", 7),
];

/// Names that say nothing of what is inside, so anything ends up there.
const REFUSED: &[&str] = &["common", "core", "utils", "base", "types"];

const HERE: &str = "xtask/src/tidy/levels.rs";

fn level(name: &str) -> Option<u32> {
    LEVELS.iter().find(|(crate_name, _)| *crate_name == name).map(|(_, level)| *level)
}

/// Checks the manifest of one crate: its name, and where its dependencies live.
pub fn check(path: &str, text: &str) -> Vec<Finding> {
    let manifest: toml::Table = match text.parse() {
        Ok(manifest) => manifest,
        Err(error) => return vec![Finding::new(path, 1, error.message().to_string(), "fix the manifest")],
    };
    let name = manifest.get("package").and_then(|package| package.get("name")).and_then(|name| name.as_str());
    let Some(name) = name else {
        return vec![Finding::new(path, 1, "no package name", "add [package] name")];
    };
    let name_line = line_of(text, "name");
    if REFUSED.contains(&name) {
        let what = format!("crate name `{name}` says nothing");
        return vec![Finding::new(path, name_line, what, "name it after the concept it holds")];
    }
    let Some(own) = level(name) else {
        let what = format!("crate `{name}` has no level");
        return vec![Finding::new(path, name_line, what, format!("give it one in {HERE}"))];
    };
    let mut findings = Vec::new();
    for (key, dependency) in dependencies(&manifest) {
        let Some(theirs) = level(&dependency) else { continue };
        if theirs >= own {
            let what = format!("`{name}` (level {own}) depends on `{dependency}` (level {theirs})");
            let remedy = "move the shared part down, or the caller up";
            findings.push(Finding::new(path, line_of(text, &key), what, remedy));
        }
    }
    findings
}

/// Every dependency of every section, as (key in the manifest, package name).
fn dependencies(manifest: &toml::Table) -> Vec<(String, String)> {
    const SECTIONS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];
    let for_targets = manifest.get("target").and_then(|targets| targets.as_table());
    let for_targets = for_targets.into_iter().flat_map(|targets| targets.values());
    let tables = std::iter::once(manifest).chain(for_targets.filter_map(|target| target.as_table()));
    let sections = tables.flat_map(|table| SECTIONS.iter().filter_map(|section| table.get(*section)));
    let entries = sections.filter_map(|section| section.as_table()).flatten();
    entries
        .map(|(key, value)| {
            let renamed = value.get("package").and_then(|package| package.as_str());
            (key.clone(), renamed.unwrap_or(key).to_string())
        })
        .collect()
}

/// The first line that sets `key`; 1 when it is spelled in a way this does not look for.
fn line_of(text: &str, key: &str) -> usize {
    let sets = |line: &str| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.starts_with([' ', '=', '.']))
    };
    text.lines().position(sets).map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<String> {
        check("crates/x/Cargo.toml", text).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn lower_levels_and_libraries_are_fine() {
        let text = "[package]\nname = \"kernels\"\n[dependencies]\ndevice = \"1\"\nhalf = \"2\"\n";
        assert!(messages(text).is_empty());
    }

    #[test]
    fn upward_and_sideways_dependencies_are_found_with_their_lines() {
        let text = "[package]\nname = \"tensor\"\n[dependencies]\nkernels.workspace = true\n\
                    model = { workspace = true }\n[dev-dependencies]\ntensor = \"1\"\n";
        assert_eq!(
            messages(text),
            [
                "crates/x/Cargo.toml:5: `tensor` (level 2) depends on `model` (level 4): \
                 move the shared part down, or the caller up",
                "crates/x/Cargo.toml:7: `tensor` (level 2) depends on `tensor` (level 2): \
                 move the shared part down, or the caller up",
            ]
        );
    }

    #[test]
    fn target_sections_and_renames_count() {
        let text = "[package]\nname = \"dist\"\n[target.'cfg(unix)'.dependencies]\n\
                    t = { package = \"train\", path = \"../train\" }\n";
        assert_eq!(messages(text).len(), 1);
        assert!(messages(text)[0].starts_with("crates/x/Cargo.toml:4: `dist` (level 3) depends on `train`"));
    }

    #[test]
    fn empty_names_and_unknown_crates_are_refused() {
        let refused = messages("[package]\nname = \"utils\"\n");
        assert_eq!(
            refused,
            ["crates/x/Cargo.toml:2: crate name `utils` says nothing: name it after the concept it holds"]
        );
        let unknown = messages("[package]\nname = \"attic\"\n");
        assert!(unknown[0].contains("`attic` has no level"), "{unknown:?}");
    }
}
