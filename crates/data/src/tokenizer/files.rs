//! The files of a tokenizer in a model folder.

use super::{Tokenizer, TokenizerError};
use crate::chat::ChatTemplate;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    std::fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_path_buf(), source })
}

/// A JSON file that may be absent.
fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    if !path.exists() {
        return Ok(None);
    }
    let wrong = |what: String| TokenizerError::Format { origin: path.display().to_string(), what };
    serde_json::from_slice(&read(path)?).map(Some).map_err(|error| wrong(error.to_string()))
}

impl Tokenizer {
    /// From a `tokenizer.json`; files beside it are read as `from_folder` does.
    pub fn from_file(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let tokenizer = Self::from_named_bytes(&read(path)?, &path.display().to_string())?;
        tokenizer.with_neighbours(path.parent().unwrap_or(Path::new(".")))
    }

    /// From a model folder: `tokenizer.json`, with special tokens and chat template from
    /// `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`.
    pub fn from_folder(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        Self::from_file(&dir.join("tokenizer.json"))
    }

    /// From a file or a folder.
    pub fn open(path: &Path) -> Result<Tokenizer, TokenizerError> {
        if path.is_dir() { Self::from_folder(path) } else { Self::from_file(path) }
    }

    fn with_neighbours(mut self, dir: &Path) -> Result<Tokenizer, TokenizerError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Value::Null);
        let token = |key: &str| {
            let value = &config[key];
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            self.token_to_id(text)
        };
        let (bos, eos) = (token("bos_token"), token("eos_token"));
        let mut ends: Vec<u32> = eos.into_iter().collect();
        for name in ["generation_config.json", "config.json"] {
            let Some(json) = read_json(&dir.join(name))? else { continue };
            let ids = match &json["eos_token_id"] {
                Value::Array(list) => list.iter().filter_map(Value::as_u64).collect(),
                one => one.as_u64().into_iter().collect::<Vec<_>>(),
            };
            ends.extend(ids.into_iter().filter_map(|id| u32::try_from(id).ok()));
        }
        let mut known = Vec::new();
        ends.retain(|id| {
            !known.contains(id) && {
                known.push(*id);
                true
            }
        });
        if !ends.is_empty() {
            self.eos = ends;
        }
        self.bos = bos;
        self.adds_bos = config["add_bos_token"].as_bool().unwrap_or(false);
        let jinja = dir.join("chat_template.jinja");
        let source = match &config["chat_template"] {
            Value::String(source) => Some(source.clone()),
            // Some folders hold several by name; `default` is what everyone uses.
            Value::Array(list) => list
                .iter()
                .find(|entry| entry["name"] == "default")
                .and_then(|entry| entry["template"].as_str().map(str::to_string)),
            _ if jinja.exists() => Some(String::from_utf8_lossy(&read(&jinja)?).into_owned()),
            _ => None,
        };
        let template = source.as_deref().map(ChatTemplate::new).transpose();
        self.template = template
            .map_err(|error| TokenizerError::Format {
                origin: config_path.display().to_string(),
                what: error.to_string(),
            })?
            .map(Arc::new);
        Ok(self)
    }

    /// The files that make a model folder's tokenizer, as `transformers` reads them: (name, bytes).
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
        let json = self.inner.to_string(true).map_err(|error| TokenizerError::Use(error.to_string()))?;
        let text = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        let (bos, eos) = (text(self.bos), text(self.end_of_text()));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
            "bos_token": bos, "eos_token": eos, "pad_token": eos, "add_bos_token": self.adds_bos,
        });
        if let Some(template) = self.chat_template() {
            config["chat_template"] = json!(template.source());
        }
        let special: serde_json::Map<String, Value> =
            [("bos_token", bos), ("eos_token", eos.clone()), ("pad_token", eos)]
                .into_iter()
                .filter_map(|(key, token)| Some((key.to_string(), json!(token?))))
                .collect();
        let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
        Ok(vec![
            ("tokenizer.json".into(), json.into_bytes()),
            ("tokenizer_config.json".into(), pretty(&config)),
            ("special_tokens_map.json".into(), pretty(&Value::Object(special))),
        ])
    }
}
