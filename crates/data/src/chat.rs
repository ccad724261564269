//! Chat templates: the Jinja of `tokenizer_config.json`, with what `transformers` gives it.
//!
//! A template is foreign code: it runs on a bounded amount of fuel and touches nothing.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, context};
use serde::{Deserialize, Serialize};

/// Instructions a template may spend: real ones spend a few hundred per message.
const FUEL: u64 = 5_000_000;

/// What ChatML looks like, for tokenizers without a template.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A template that cannot be used, or refuses a conversation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("chat template: {what}; check `chat_template` in tokenizer_config.json")]
pub struct ChatError {
    /// What the template engine says.
    what: String,
}

/// How a conversation becomes text.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// From the source of a Jinja template.
    pub fn new(source: &str) -> Result<ChatTemplate, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ChatError { what: describe(&error) })?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        // Templates print dates into system prompts; a fixed one keeps the same prompt the same.
        environment.add_function("strftime_now", |_format: String| "26 Jul 2024");
        environment
            .add_template_owned("chat", source.to_string())
            .map_err(|error| ChatError { what: describe(&error) })?;
        Ok(ChatTemplate { source: source.to_string(), environment })
    }

    /// ChatML, for tokenizers that bring none.
    pub fn chatml() -> ChatTemplate {
        ChatTemplate::new(CHATML).expect("our own template parses")
    }

    /// The Jinja.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as text, with the beginning of the assistant's turn when asked for.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String, ChatError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|Message { role, content }| context! { role => role.as_str(), content => content.as_str() })
            .collect();
        let render = || {
            self.environment.get_template("chat")?.render(context! {
                messages, add_generation_prompt, bos_token => bos, eos_token => eos,
                tools => (), documents => (),
            })
        };
        render().map_err(|error| ChatError { what: describe(&error) })
    }
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

/// The Python methods that published templates call.
fn python_method(_: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown =
        || Error::new(ErrorKind::UnknownMethod, format!("no method `{method}` on {}", value.kind()));
    if value.kind() == ValueKind::Map {
        return map_method(value, method, args).ok_or_else(unknown);
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let (args, _kwargs): (&[Value], Kwargs) = minijinja::value::from_args(args)?;
    let arg = |i: usize| args.get(i).and_then(Value::as_str);
    let set = |i: usize| arg(i).unwrap_or(" \t\r\n\u{b}\u{c}").to_string();
    Ok(match method {
        "strip" => text.trim_matches(|c| set(0).contains(c)).into(),
        "lstrip" => text.trim_start_matches(|c| set(0).contains(c)).into(),
        "rstrip" => text.trim_end_matches(|c| set(0).contains(c)).into(),
        "startswith" => arg(0).is_some_and(|prefix| text.starts_with(prefix)).into(),
        "endswith" => arg(0).is_some_and(|suffix| text.ends_with(suffix)).into(),
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "capitalize" | "title" => {
            let mut chars = text.chars();
            let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
            (first + chars.as_str()).into()
        }
        "replace" => match (arg(0), arg(1)) {
            (Some(from), Some(to)) => text.replace(from, to).into(),
            _ => return Err(unknown()),
        },
        "split" => match arg(0) {
            Some(at) if !at.is_empty() => text.split(at).map(Value::from).collect(),
            _ => text.split_whitespace().map(Value::from).collect(),
        },
        _ => return Err(unknown()),
    })
}

fn map_method(value: &Value, method: &str, args: &[Value]) -> Option<Value> {
    let keys = || value.try_iter().ok();
    match method {
        "get" => {
            let found = value.get_item(args.first()?).ok().filter(|found| !found.is_undefined());
            Some(found.or_else(|| args.get(1).cloned()).unwrap_or(Value::from(())))
        }
        "keys" => Some(keys()?.collect()),
        "values" => Some(keys()?.filter_map(|key| value.get_item(&key).ok()).collect()),
        "items" => Some(
            keys()?
                .filter_map(|key| Some(Value::from(vec![key.clone(), value.get_item(&key).ok()?])))
                .collect(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Vec<Message> {
        vec![Message::new("user", " Hi "), Message::new("assistant", "Hello"), Message::new("user", "Bye")]
    }

    #[test]
    fn chatml_and_smollm2() {
        let plain = ChatTemplate::chatml().render(&talk()[..1], true, "", "").unwrap();
        assert_eq!(plain, "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
        let smol = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let text = ChatTemplate::new(smol).unwrap().render(&talk()[..1], true, "", "").unwrap();
        assert!(text.starts_with("<|im_start|>system\nYou are") && text.ends_with("assistant\n"));
    }

    #[test]
    fn llama_3_trims_and_uses_bos() {
        let source = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
        let text = ChatTemplate::new(source).unwrap().render(&talk(), true, "<B>", "<E>").unwrap();
        assert!(text.starts_with("<B><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"), "{text}");
        assert_eq!(text.matches("<B>").count(), 1);
    }

    #[test]
    fn python_methods_work_and_unknown_ones_are_errors() {
        let render = |source: &str| ChatTemplate::new(source).unwrap().render(&talk(), false, "b", "e");
        assert_eq!(render("{{ messages[0].content.strip() + '|' + ' x'.lstrip() }}").unwrap(), "Hi|x");
        assert_eq!(render("{{ 'a,b'.split(',')[1] }}{{ 'ab'.startswith('a') }}").unwrap(), "bTrue");
        assert_eq!(
            render("{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}").unwrap(),
            "role=assistant;content=Hello;"
        );
        assert_eq!(render("{{ messages[1].get('name', 'none') }}").unwrap(), "none");
        assert!(render("{{ 'a'.explode() }}").unwrap_err().to_string().contains("explode"));
        assert!(
            render("{{ raise_exception('no system turn') }}")
                .unwrap_err()
                .to_string()
                .contains("no system turn")
        );
    }

    #[test]
    fn a_template_that_would_run_for_ever_is_stopped() {
        let forever = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(ChatTemplate::new(forever).unwrap().render(&[], false, "", "").is_err());
        assert!(ChatTemplate::new("{% if %}").is_err());
    }
}
