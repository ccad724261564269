//! JSONL: `text`, `messages`, or `prompt` and `completion`.

use crate::chat::{ChatTemplate, Message};
use crate::corpus::{CorpusError, Document, Piece};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

/// Longest line that is read: a record beyond it is a broken file, not a document.
const MAX_LINE_BYTES: u64 = 256 << 20;

pub(crate) struct Jsonl {
    path: PathBuf,
    reader: BufReader<File>,
    line: u64,
    chat: ChatTemplate,
    special: (String, String),
}

impl Jsonl {
    pub(crate) fn new(path: PathBuf, file: File, chat: ChatTemplate, special: (String, String)) -> Jsonl {
        Jsonl { path, reader: BufReader::new(file), line: 0, chat, special }
    }

    pub(crate) fn next_document(&mut self) -> Result<Option<Document>, CorpusError> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = self.reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
            let read = read.map_err(|source| CorpusError::Read { path: self.path.clone(), source })?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            if !line.trim_ascii().is_empty() {
                return self.record(&line).map(Some).map_err(|what| CorpusError::Record {
                    path: self.path.clone(),
                    line: self.line,
                    what,
                });
            }
        }
    }

    fn record(&self, line: &[u8]) -> Result<Document, String> {
        if line.len() as u64 == MAX_LINE_BYTES {
            return Err(format!("longer than {} MiB; one record stands on each line", MAX_LINE_BYTES >> 20));
        }
        let json: Value = serde_json::from_slice(line)
            .map_err(|error| format!("not valid JSON ({error}); one object stands on each line"))?;
        let text = |key: &str| match &json[key] {
            Value::String(text) => Ok(text.clone()),
            other => Err(format!("`{key}` is {}, expected a text", kind(other))),
        };
        if json.get("messages").is_some() {
            return self.conversation(&json["messages"]);
        }
        if json.get("prompt").is_some() || json.get("completion").is_some() {
            let pieces = vec![
                Piece { text: text("prompt")?, learn: false },
                Piece { text: text("completion")?, learn: true },
            ];
            return Ok(Document { pieces });
        }
        if json.get("text").is_some() {
            return Ok(Document::text(text("text")?));
        }
        Err("has none of `text`, `messages` or `prompt` and `completion`".into())
    }

    /// Only what the assistant says is learned. The text is rendered turn by turn; what a turn adds
    /// beyond the invitation to speak is what it said.
    fn conversation(&self, json: &Value) -> Result<Document, String> {
        let messages: Vec<Message> = serde_json::from_value(json.clone())
            .map_err(|error| format!("`messages` is not a list of {{role, content}}: {error}"))?;
        if messages.is_empty() {
            return Err("`messages` is empty".into());
        }
        let render = |count: usize, invite: bool| {
            self.chat
                .render(&messages[..count], invite, &self.special.0, &self.special.1)
                .map_err(|error| error.to_string())
        };
        let whole = render(messages.len(), false)?;
        let mut pieces = Vec::new();
        let mut done = 0;
        let mut add = |end: usize, learn: bool| {
            if end > done {
                pieces.push(Piece { text: whole[done..end].to_string(), learn });
                done = end;
            }
        };
        for (i, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            // Templates that change what they said before (some drop old reasoning) cannot be cut.
            let cut = |text: &str| whole.starts_with(text).then_some(text.len());
            let unclear =
                || format!("the chat template rewrites earlier turns, turn {} cannot be told apart", i + 1);
            let invited = if i == 0 { Some(0) } else { cut(&render(i, true)?) };
            let from = invited.ok_or_else(unclear)?;
            let to = if i + 1 == messages.len() {
                whole.len()
            } else {
                cut(&render(i + 1, false)?).ok_or_else(unclear)?
            };
            add(from, false);
            add(to, true);
        }
        add(whole.len(), false);
        Ok(Document { pieces })
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "absent",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use crate::{Document, Format, documents};

    fn read(text: &str) -> Result<Vec<Document>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, text).unwrap();
        documents(&[path], Format::Auto).unwrap().collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    fn shape(document: &Document) -> Vec<(&str, bool)> {
        document.pieces.iter().map(|piece| (piece.text.as_str(), piece.learn)).collect()
    }

    #[test]
    fn the_three_kinds_of_record() {
        let found = read(concat!(
            "{\"text\": \"a\"}\n\n",
            "{\"prompt\": \"q\", \"completion\": \" r\"}\n",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"yo\"},",
            " {\"role\": \"user\", \"content\": \"so\"}, {\"role\": \"assistant\", \"content\": \"ok\"}]}",
        ))
        .unwrap();
        assert_eq!(shape(&found[0]), [("a", true)]);
        assert_eq!(shape(&found[1]), [("q", false), (" r", true)]);
        let turns = [
            ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", false),
            ("yo<|im_end|>\n", true),
            ("<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n", false),
            ("ok<|im_end|>\n", true),
        ];
        assert_eq!(shape(&found[2]), turns);
    }

    #[test]
    fn a_wrong_record_is_named_by_its_line() {
        for (line, want) in [
            ("{", "line 2: not valid JSON"),
            ("{\"txt\": 1}", "line 2: has none of `text`"),
            ("{\"text\": 1}", "line 2: `text` is a number, expected a text"),
            ("{\"prompt\": \"a\"}", "line 2: `completion` is absent"),
            ("{\"messages\": []}", "line 2: `messages` is empty"),
            ("{\"messages\": [{\"role\": 1}]}", "line 2: `messages` is not a list"),
            ("[1]", "line 2: has none"),
        ] {
            let message = read(&format!("{{\"text\": \"ok\"}}\n{line}\n")).unwrap_err();
            assert!(message.contains(want), "{line}: {message}");
        }
    }
}
