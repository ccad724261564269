//! One record of a corpus: `text`, `messages`, or `prompt` and `completion`.

use crate::chat::{ChatTemplate, Message};
use crate::corpus::{Document, Piece};
use serde_json::Value;

/// Turns records into documents.
pub(crate) struct Records {
    pub(crate) chat: ChatTemplate,
    /// Begin and end of a sequence, as the template is told them.
    pub(crate) special: (String, String),
}

impl Records {
    /// What is wrong, and what would be right, is the error.
    pub(crate) fn document(&self, json: &Value) -> Result<Document, String> {
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
