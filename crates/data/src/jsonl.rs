//! JSONL: one record on each line.

use crate::corpus::{CorpusError, Document};
use crate::records::Records;
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
    records: Records,
}

impl Jsonl {
    pub(crate) fn new(path: PathBuf, file: File, records: Records) -> Jsonl {
        Jsonl { path, reader: BufReader::new(file), line: 0, records }
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
        self.records.document(&json)
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
