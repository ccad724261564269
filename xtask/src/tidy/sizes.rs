//! Files and functions stay small: a limit for all, and a ratchet for those that are larger today.

use std::collections::BTreeMap;

use proc_macro2::Span;
use serde::Deserialize;
use syn::visit::{self, Visit};

use super::{Finding, RATCHET};

/// Lines a file may have.
const FILE_LIMIT: usize = 500;
/// Lines a function may have, from its signature to its closing brace.
const FUNCTION_LIMIT: usize = 70;

/// What the tree measures today.
#[derive(Default)]
pub struct Sizes {
    /// Lines by path.
    files: BTreeMap<String, usize>,
    /// Functions by `path#Type::name`.
    functions: BTreeMap<String, Function>,
}

struct Function {
    first_line: usize,
    lines: usize,
}

impl Sizes {
    /// Adds one Rust file.
    pub fn measure(&mut self, path: &str, text: &str) -> syn::Result<()> {
        self.files.insert(path.to_string(), text.lines().count());
        let mut walk = Walk { path, scope: Vec::new(), functions: &mut self.functions };
        walk.visit_file(&syn::parse_file(text)?);
        Ok(())
    }
}

/// Visits the functions of a file, keeping the names of what encloses them.
struct Walk<'a> {
    path: &'a str,
    scope: Vec<String>,
    functions: &'a mut BTreeMap<String, Function>,
}

impl Walk<'_> {
    fn function(&mut self, sig: &syn::Signature, close: Span) {
        let first_line = sig.fn_token.span.start().line;
        let lines = close.end().line + 1 - first_line;
        let mut name = self.scope.join("::");
        if !name.is_empty() {
            name.push_str("::");
        }
        let key = format!("{}#{name}{}", self.path, sig.ident);
        // Two functions of one name (traits, cfg) share an entry: the larger one counts.
        let longest = self.functions.entry(key).or_insert(Function { first_line, lines });
        if lines > longest.lines {
            *longest = Function { first_line, lines };
        }
    }

    fn within(&mut self, name: String, visit: impl FnOnce(&mut Self)) {
        self.scope.push(name);
        visit(self);
        self.scope.pop();
    }
}

impl<'ast> Visit<'ast> for Walk<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, item.block.brace_token.span.close());
        self.within(item.sig.ident.to_string(), |walk| visit::visit_item_fn(walk, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, item.block.brace_token.span.close());
        self.within(item.sig.ident.to_string(), |walk| visit::visit_impl_item_fn(walk, item));
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig, block.brace_token.span.close());
        }
        self.within(item.sig.ident.to_string(), |walk| visit::visit_trait_item_fn(walk, item));
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.within(item.ident.to_string(), |walk| visit::visit_item_mod(walk, item));
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.within(item.ident.to_string(), |walk| visit::visit_item_trait(walk, item));
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
            _ => None,
        };
        self.within(name.unwrap_or_else(|| "impl".to_string()), |walk| visit::visit_item_impl(walk, item));
    }
}

/// Sizes above the limit that are tolerated, because they were there; they may only fall.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ratchet {
    #[serde(default)]
    files: BTreeMap<String, usize>,
    #[serde(default)]
    functions: BTreeMap<String, usize>,
}

impl Ratchet {
    /// What is too large, what grew, and which entries are higher than need be.
    pub fn check(&self, sizes: &Sizes) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (path, &lines) in &sizes.files {
            let remedy = "split it by concept";
            findings.extend(over(path, 1, "file", lines, FILE_LIMIT, self.files.get(path), remedy));
        }
        for (key, function) in &sizes.functions {
            let (path, name) = key.split_once('#').expect("keys are path#name");
            let what = format!("function `{name}`");
            let allowed = self.functions.get(key);
            let remedy = "take its loops or branches out into functions";
            findings.extend(over(
                path,
                function.first_line,
                &what,
                function.lines,
                FUNCTION_LIMIT,
                allowed,
                remedy,
            ));
        }
        findings.extend(self.stale(sizes));
        findings
    }

    fn stale(&self, sizes: &Sizes) -> Vec<Finding> {
        let mut tighter = Ratchet { files: self.files.clone(), functions: self.functions.clone() };
        tighter.lower(sizes);
        let files = self.files.iter().filter(|(key, allowed)| tighter.files.get(*key) != Some(allowed));
        let functions =
            self.functions.iter().filter(|(key, allowed)| tighter.functions.get(*key) != Some(allowed));
        let remedy = "lower the entry with `cargo xtask tidy --update`";
        files
            .chain(functions)
            .map(|(key, allowed)| {
                Finding::new(RATCHET, 1, format!("`{key}` is smaller than its entry, {allowed}"), remedy)
            })
            .collect()
    }

    /// Lowers entries to today's sizes and drops those within the limit; true if any changed.
    pub fn lower(&mut self, sizes: &Sizes) -> bool {
        let before = (self.files.clone(), self.functions.clone());
        self.files.retain(|path, allowed| {
            *allowed = sizes.files.get(path).map_or(0, |lines| *lines.min(allowed));
            *allowed > FILE_LIMIT
        });
        self.functions.retain(|key, allowed| {
            *allowed = sizes.functions.get(key).map_or(0, |function| function.lines.min(*allowed));
            *allowed > FUNCTION_LIMIT
        });
        before != (self.files.clone(), self.functions.clone())
    }

    /// The file `xtask/ratchet.toml`.
    pub fn to_toml(&self) -> String {
        let mut text = String::from(HEADER);
        for (section, entries) in [("files", &self.files), ("functions", &self.functions)] {
            text.push_str(&format!("\n[{section}]\n"));
            entries.iter().for_each(|(key, allowed)| text.push_str(&format!("\"{key}\" = {allowed}\n")));
        }
        text
    }
}

const HEADER: &str = "# Files over 500 lines and functions over 70 that we live with for now: they may shrink, not grow.\n\
                      # `cargo xtask tidy --update` lowers these numbers; only a person may add or raise one.\n";

/// The finding for one size, if it is above what it may be.
fn over(
    path: &str,
    line: usize,
    what: &str,
    lines: usize,
    limit: usize,
    allowed: Option<&usize>,
    remedy: &str,
) -> Option<Finding> {
    match allowed {
        Some(&allowed) if lines > allowed => {
            let what = format!("{what} grew from {allowed} to {lines} lines");
            Some(Finding::new(path, line, what, format!("bring it back, or {remedy}")))
        }
        None if lines > limit => {
            Some(Finding::new(path, line, format!("{what} has {lines} lines, limit {limit}"), remedy))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(lines: usize) -> String {
        "    g();\n".repeat(lines)
    }

    fn sizes(text: &str) -> Sizes {
        let mut sizes = Sizes::default();
        sizes.measure("a.rs", text).expect("valid Rust");
        sizes
    }

    fn messages(ratchet: &str, text: &str) -> Vec<String> {
        let ratchet: Ratchet = toml::from_str(ratchet).expect("valid ratchet");
        ratchet.check(&sizes(text)).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn functions_are_named_by_what_encloses_them() {
        let text = "/// Doc.\n#[inline]\npub fn f(\n    a: u8,\n) {\n}\nmod m {\n    impl<T> S<T> {\n        \
                    fn g() {}\n    }\n    trait R {\n        fn h();\n        fn i() {\n        }\n    }\n}\n";
        let sizes = sizes(text);
        let found: Vec<_> =
            sizes.functions.iter().map(|(k, f)| (k.as_str(), f.first_line, f.lines)).collect();
        assert_eq!(found, [("a.rs#f", 3, 4), ("a.rs#m::R::i", 13, 2), ("a.rs#m::S::g", 9, 1)]);
    }

    #[test]
    fn the_limit_holds_for_what_is_not_listed() {
        let fits = format!("fn f() {{\n{}}}\n", body(68));
        assert!(messages("", &fits).is_empty());
        let over = format!("fn f() {{\n{}}}\n", body(69));
        let expected = "a.rs:1: function `f` has 71 lines, limit 70: \
                        take its loops or branches out into functions";
        assert_eq!(messages("", &over), [expected]);
        let long = "\n".repeat(501);
        assert_eq!(messages("", &long), ["a.rs:1: file has 501 lines, limit 500: split it by concept"]);
    }

    #[test]
    fn what_is_listed_may_stay_but_not_grow() {
        let text = format!("fn f() {{\n{}}}\n", body(90));
        assert!(messages("[functions]\n\"a.rs#f\" = 92\n", &text).is_empty());
        let grown = messages("[functions]\n\"a.rs#f\" = 91\n", &text);
        assert!(grown[0].starts_with("a.rs:1: function `f` grew from 91 to 92 lines: "), "{grown:?}");
    }

    #[test]
    fn what_shrank_is_lowered_and_then_dropped() {
        let text = format!("fn f() {{\n{}}}\n", body(90));
        let high = "[files]\n\"gone.rs\" = 600\n[functions]\n\"a.rs#f\" = 100\n";
        let said = messages(high, &text);
        assert_eq!(said.len(), 2);
        assert!(said[1].contains("`a.rs#f` is smaller than its entry, 100"), "{said:?}");

        let mut ratchet: Ratchet = toml::from_str(high).expect("valid ratchet");
        assert!(ratchet.lower(&sizes(&text)));
        assert!(!ratchet.lower(&sizes(&text)));
        assert_eq!(ratchet.to_toml(), format!("{HEADER}\n[files]\n\n[functions]\n\"a.rs#f\" = 92\n"));
        assert!(ratchet.lower(&sizes("fn f() {}\n")));
        assert!(ratchet.functions.is_empty());
    }
}
