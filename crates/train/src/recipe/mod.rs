//! Recipes: TOML in, checked values out. Unknown keys are refused, every value has one type.

mod auto;
mod experts;
pub mod keys;
mod kind;
mod new_model;
mod stages;
mod tiers;
mod values;

pub use values::{
    CheckpointRecipe, ClusterRecipe, DataRecipe, EvalRecipe, MemoryRecipe, MeshRecipe, ModelRecipe, Recipe,
    RunRecipe, SampleRecipe, TokenizerRecipe, TrainRecipe,
};

use keys::{KEYS, Key, Kind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Value;

/// A recipe that cannot be cooked.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read recipe {path}: {source}; give the path of a TOML file, as recipes/shakespeare.toml")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML.
    #[error("{origin} is not valid TOML: {message}")]
    Syntax {
        /// File or argument.
        origin: String,
        /// What the parser says.
        message: String,
    },
    /// A key we do not know.
    #[error("{origin}: unknown key `{key}`{suggestion}; `trilith train --keys` lists them all")]
    UnknownKey {
        /// File or argument.
        origin: String,
        /// Which key.
        key: String,
        /// The nearest known key, if one is near.
        suggestion: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{origin}: `{key}` is {found}, expected {expected}")]
    WrongValue {
        /// File or argument.
        origin: String,
        /// Which key.
        key: &'static str,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A required key is absent.
    #[error("the recipe has no `{0}`; add it to the file or pass `--set {0}=...`")]
    Missing(&'static str),
    /// Keys that do not go together.
    #[error("{what}: {remedy}")]
    Impossible {
        /// The keys and their values.
        what: String,
        /// What would do.
        remedy: String,
    },
    /// Parts of a mesh that do not go together.
    #[error(transparent)]
    Clash(#[from] dist::Clash),
    /// `--set` without a value.
    #[error("`--set {0}` has no value; write `--set key=value`, as in `--set train.lr=3e-4`")]
    NoValue(String),
}

/// Keys and values of a recipe before they become a `Recipe`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    values: BTreeMap<&'static str, Value>,
}

impl Settings {
    /// From a file.
    pub fn read(path: &Path) -> Result<Settings, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| RecipeError::Read { path: path.to_path_buf(), source })?;
        Settings::parse(&text, &path.display().to_string())
    }

    /// From the text of a recipe; `origin` names it in errors.
    pub fn parse(text: &str, origin: &str) -> Result<Settings, RecipeError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| RecipeError::Syntax {
            origin: origin.to_string(),
            message: error.to_string().trim_end().to_string(),
        })?;
        let mut settings = Settings::default();
        for (head, value) in table {
            match value {
                Value::Table(inner) => {
                    for (name, value) in inner {
                        settings.put(&format!("{head}.{name}"), value, origin)?;
                    }
                }
                _ => settings.put(&head, value, origin)?,
            }
        }
        Ok(settings)
    }

    /// `key=value` of a `--set`. A value that is no TOML is taken as text, so that paths and words
    /// need no quotes within quotes.
    pub fn set(&mut self, argument: &str) -> Result<(), RecipeError> {
        let (key, value) = argument.split_once('=').ok_or_else(|| RecipeError::NoValue(argument.into()))?;
        let (key, value) = (key.trim(), value.trim());
        let parsed = format!("x = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("x"));
        let text_wanted = matches!(
            keys::find(key).map(|key| key.kind),
            Some(Kind::Text | Kind::Path | Kind::Paths | Kind::Choice(_) | Kind::Bytes)
        );
        let value = match parsed {
            Some(parsed) if !text_wanted || parsed.is_str() || parsed.is_array() => parsed,
            _ => Value::String(value.to_string()),
        };
        self.put(key, value, "--set")
    }

    fn put(&mut self, path: &str, value: Value, origin: &str) -> Result<(), RecipeError> {
        let key = keys::find(path).ok_or_else(|| RecipeError::UnknownKey {
            origin: origin.to_string(),
            key: path.to_string(),
            suggestion: nearest(path),
        })?;
        if !key.kind.accepts(&value) {
            return Err(RecipeError::WrongValue {
                origin: origin.to_string(),
                key: key.path,
                found: value.to_string().trim().to_string(),
                expected: key.kind.expected(),
            });
        }
        self.values.insert(key.path, value);
        Ok(())
    }

    /// Whether the recipe itself gives a key.
    pub fn gives(&self, path: &str) -> bool {
        self.values.contains_key(path)
    }

    fn get(&self, path: &'static str) -> Option<Value> {
        let default = || {
            let key = keys::find(path)?;
            format!("x = {}", key.default).parse::<toml::Table>().ok()?.remove("x")
        };
        self.values.get(path).cloned().or_else(default)
    }

    /// Check the whole and give it types.
    pub fn recipe(&self) -> Result<Recipe, RecipeError> {
        Recipe::from_settings(self)
    }

    /// The recipe with every default written out, as a commented TOML file.
    pub fn resolved(&self) -> String {
        let mut out = String::from("# Resolved by trilith: every key, given or default.\n");
        let mut table = "";
        for Key { path, unit, doc, .. } in KEYS {
            let (head, name) = path.split_once('.').unwrap_or(("", path));
            if head != table {
                table = head;
                out += &format!("\n[{table}]\n");
            }
            let unit = if unit.is_empty() { String::new() } else { format!(" [{unit}]") };
            match self.get(path) {
                Some(value) => out += &format!("# {doc}{unit}\n{name} = {value}\n"),
                None => out += &format!("# {doc}{unit}\n# {name} is absent\n"),
            }
        }
        out
    }
}

fn nearest(path: &str) -> String {
    let name = path.rsplit('.').next().unwrap_or(path);
    let score = |key: &Key| {
        let tail = key.path.rsplit('.').next().unwrap_or(key.path);
        // The right name in the wrong table is nearer than any misspelling.
        let whole = strsim::jaro_winkler(path, key.path);
        if tail == name { 1.0 + whole } else { whole.max(strsim::jaro_winkler(name, tail) - 0.05) }
    };
    let best = KEYS.iter().map(|key| (score(key), key.path)).max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((score, key)) if score > 0.8 => format!(", did you mean `{key}`?"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Settings::parse(text, "r.toml").and_then(|s| s.recipe()).unwrap_err().to_string()
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_known_one() {
        assert!(refused("[train]\nlearning_rate = 1").contains("unknown key `train.learning_rate`"));
        assert!(refused("[train]\nstep = 1").contains("did you mean `train.steps`?"));
        assert!(refused("[model]\nlr = 0.1").contains("did you mean `train.lr`?"));
        assert!(refused("lr = 0.1").contains("did you mean `train.lr`?"));
        let far = refused("[zzz]\nqqq = 1");
        assert!(far.contains("unknown key `zzz.qqq`; `trilith train --keys`"), "{far}");
    }

    #[test]
    fn values_have_one_type_and_a_range() {
        assert_eq!(
            refused("[train]\nsteps = \"many\""),
            "r.toml: `train.steps` is \"many\", expected a whole number from 1 on"
        );
        assert!(refused("[train]\nlr = nan").contains("expected a number from 0 to 10"));
        assert!(refused("[train]\nprecision = \"fp8\"").contains("one of \"bf16\", \"f32\""));
        assert!(refused("[data]\npath = []").contains("or a list of them"));
        assert!(refused("[train\n").contains("r.toml is not valid TOML"));
    }

    #[test]
    fn set_overrides_and_needs_no_quotes() {
        let mut settings = Settings::parse("[train]\nlr = 1e-3", "r.toml").unwrap();
        for argument in ["train.lr=3e-4", "run.dir=runs/a", "data.path=a.txt", "train.precision=f32"] {
            settings.set(argument).unwrap();
        }
        let recipe = settings.recipe().unwrap();
        assert_eq!((recipe.train.lr, recipe.run.dir.to_str()), (3e-4, Some("runs/a")));
        settings.set("data.path=[\"a.txt\", \"b.txt\"]").unwrap();
        assert_eq!(settings.recipe().unwrap().data.path.len(), 2);
        settings.set("run.dir=2024").unwrap();
        assert!(settings.set("train.lr").unwrap_err().to_string().contains("key=value"));
        assert!(settings.set("train.lr=fast").unwrap_err().to_string().contains("--set: `train.lr` is"));
    }

    #[test]
    fn mesh_auto_is_short_for_its_axes() {
        let base = "mesh = \"auto\"\n[run]\ndir = \"r\"\n[data]\npath = \"d\"\n";
        let mut settings = Settings::parse(base, "r.toml").unwrap();
        assert!(settings.recipe().unwrap().mesh.auto);
        settings.set("mesh.axes=given").unwrap();
        assert!(!settings.recipe().unwrap().mesh.auto);
        settings.set("mesh=auto").unwrap();
        assert!(settings.recipe().unwrap().mesh.auto);
        assert!(refused("mesh = 3").contains("one of \"given\", \"auto\""));
    }

    #[test]
    fn the_resolved_recipe_means_the_same() {
        let mut settings = Settings::parse("[train]\nsteps = 7\n[model]\nwidth = 96", "r.toml").unwrap();
        settings.set("run.dir=runs/a").unwrap();
        settings.set("data.path=a.txt").unwrap();
        let again = Settings::parse(&settings.resolved(), "resolved").unwrap();
        assert_eq!(again.recipe().unwrap(), settings.recipe().unwrap());
        assert_eq!(again.resolved(), settings.resolved());
    }

    #[test]
    fn impossible_combinations_are_named() {
        let base = "[run]\ndir = \"r\"\n[data]\npath = \"d\"\n";
        for (more, want) in [
            ("[model]\nwidth = 100\nheads = 6", "model.heads"),
            ("[model]\nheads = 6\nkv_heads = 4", "model.kv_heads"),
            ("[model]\nfrom = \"m\"\nwidth = 64", "model.from"),
            ("[train]\nlr = 1e-4\nmin_lr = 1e-3", "train.min_lr"),
            ("[train]\nschedule = \"cosine\"\ndecay = 5", "train.decay"),
            ("[memory]\ndir = \"x\"", "memory.dram"),
            ("[mesh]\naxes = \"auto\"\nx = 2", "leave one of them away"),
            ("[mesh]\naxes = \"auto\"\nscheme = \"summa\"", "mesh.scheme = \"summa\""),
            ("[mesh]\naxes = \"auto\"\nffn_scheme = \"summa\"", "mesh.ffn_scheme = \"summa\""),
            ("[mesh]\nx = 2\nffn_scheme = \"summa\"\nz = 2", "`summa` has no use for mesh axis z = 2"),
            (
                "[mesh]\nx = 2\ny = 2\nz = 2\nffn_scheme = \"2.5d\"",
                "[rows over x,y; columns over z], that of scheme `2.5d` as [rows over z,x; columns over y]",
            ),
            ("[model]\nexperts = 4", "mixtral, qwen2_moe and qwen3_moe"),
            ("[model]\nfamily = \"mixtral\"\nexperts = 4\nexperts_per_token = 5", "at most all experts"),
            ("[model]\nfamily = \"mixtral\"\nshared_ffn = 64", "qwen2_moe"),
        ] {
            let message = refused(&format!("{base}{more}"));
            assert!(message.contains(want), "{more}: {message}");
        }
        assert!(refused("[data]\npath = \"d\"").contains("the recipe has no `run.dir`"));
    }
}
