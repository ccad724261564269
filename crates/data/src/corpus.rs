//! Documents from files: text, JSONL, Parquet.

use crate::chat::ChatTemplate;
use crate::jsonl::Jsonl;
use crate::records::Records;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// A line that holds only this separates the documents of a text file.
pub const DOCUMENT_MARK: &str = "<|endoftext|>";

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// By its extension.
    Auto,
    /// Plain text.
    Text,
    /// One JSON object a line.
    Jsonl,
    /// Parquet with a column `text`.
    Parquet,
}

/// A run of text that is learned or only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Whether the model learns to say it.
    pub learn: bool,
}

/// What belongs together: attention never looks across the end of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// In order.
    pub pieces: Vec<Piece>,
}

impl Document {
    /// A text that is learned whole.
    pub fn text(text: String) -> Document {
        Document { pieces: vec![Piece { text, learn: true }] }
    }
}

/// A corpus that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The system refused.
    #[error("cannot read {}: {source}; check data.path", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No files.
    #[error("{} holds no text, JSONL or Parquet files; check data.path", path.display())]
    NoFiles {
        /// Which folder.
        path: PathBuf,
    },
    /// An extension we do not know.
    #[error("{}: unknown kind of file; name it .txt, .md, .jsonl or .parquet, or set data.format", path.display())]
    UnknownKind {
        /// Which file.
        path: PathBuf,
    },
    /// Bytes that are no text.
    #[error("{}: not valid UTF-8 at byte {at}; convert it, for example with `iconv -t utf-8`", path.display())]
    Utf8 {
        /// Which file.
        path: PathBuf,
        /// Offset of the first bad byte.
        at: u64,
    },
    /// A line that is no record.
    #[error("{}, line {line}: {what}", path.display())]
    Record {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong and what would be right.
        what: String,
    },
    /// Parquet was not built in.
    #[error("{}: this trilith reads no Parquet; build it with `--features parquet`, or convert the file to JSONL", path.display())]
    NoParquet {
        /// Which file.
        path: PathBuf,
    },
    /// Parquet that cannot be read.
    #[error("{}, row {row}: {what}", path.display())]
    Parquet {
        /// Which file.
        path: PathBuf,
        /// From 1; 0 for the file as a whole.
        row: u64,
        /// What is wrong.
        what: String,
    },
    /// Nothing to learn.
    #[error("the corpus has {tokens} tokens to learn from, a sample needs at least 2; check data.path")]
    Empty {
        /// Tokens found.
        tokens: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] crate::TokenizerError),
}

/// Documents of files, one after the other; only one is held at a time.
pub struct Documents {
    files: VecDeque<(PathBuf, Format)>,
    total_bytes: u64,
    chat: Option<ChatTemplate>,
    special: (String, String),
    open: Option<Open>,
}

enum Open {
    Text {
        path: PathBuf,
        reader: BufReader<File>,
        at: u64,
    },
    Jsonl(Box<Jsonl>),
    #[cfg(feature = "parquet")]
    Parquet(Box<crate::parquet_file::ParquetFile>),
}

/// Documents of `paths` (files, or folders read recursively in the order of their names).
pub fn documents(paths: &[PathBuf], format: Format) -> Result<Documents, CorpusError> {
    let mut files = Vec::new();
    for path in paths {
        collect(path, format, true, &mut files)?;
    }
    let sizes = files.iter().map(|(path, _): &(PathBuf, Format)| {
        std::fs::metadata(path)
            .map(|meta| meta.len())
            .map_err(|source| CorpusError::Read { path: path.clone(), source })
    });
    let total_bytes = sizes.sum::<Result<u64, _>>()?;
    Ok(Documents { files: files.into(), total_bytes, chat: None, special: Default::default(), open: None })
}

fn collect(
    path: &Path,
    format: Format,
    named: bool,
    out: &mut Vec<(PathBuf, Format)>,
) -> Result<(), CorpusError> {
    let failed = |source| CorpusError::Read { path: path.to_path_buf(), source };
    if std::fs::metadata(path).map_err(failed)?.is_dir() {
        let before = out.len();
        let entries = std::fs::read_dir(path).map_err(failed)?;
        let mut inside =
            entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        inside.sort();
        for path in inside {
            collect(&path, format, false, out)?;
        }
        if out.len() == before && named {
            return Err(CorpusError::NoFiles { path: path.to_path_buf() });
        }
        return Ok(());
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let format = match (format, extension.as_str()) {
        (Format::Auto, "txt" | "md" | "text") => Format::Text,
        (Format::Auto, "jsonl" | "ndjson" | "json") => Format::Jsonl,
        (Format::Auto, "parquet") => Format::Parquet,
        // A folder may hold a README of another kind; a file that was named may not.
        (Format::Auto, _) if !named => return Ok(()),
        (Format::Auto, _) => return Err(CorpusError::UnknownKind { path: path.to_path_buf() }),
        (given, _) => given,
    };
    out.push((path.to_path_buf(), format));
    Ok(())
}

impl Documents {
    /// Render `messages` with this template, its bos and its eos; ChatML otherwise.
    pub fn with_chat(mut self, (template, bos, eos): (ChatTemplate, String, String)) -> Documents {
        self.chat = Some(template);
        self.special = (bos, eos);
        self
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn open_next(&mut self) -> Result<bool, CorpusError> {
        let Some((path, format)) = self.files.pop_front() else { return Ok(false) };
        let file = File::open(&path).map_err(|source| CorpusError::Read { path: path.clone(), source })?;
        let records = || Records {
            chat: self.chat.clone().unwrap_or_else(ChatTemplate::chatml),
            special: self.special.clone(),
        };
        self.open = Some(match format {
            Format::Jsonl => Open::Jsonl(Box::new(Jsonl::new(path, file, records()))),
            #[cfg(feature = "parquet")]
            Format::Parquet => {
                Open::Parquet(Box::new(crate::parquet_file::ParquetFile::new(path, file, records())?))
            }
            #[cfg(not(feature = "parquet"))]
            Format::Parquet => return Err(CorpusError::NoParquet { path }),
            _ => Open::Text { path, reader: BufReader::new(file), at: 0 },
        });
        Ok(true)
    }

    fn next_document(&mut self) -> Result<Option<Document>, CorpusError> {
        loop {
            let found = match &mut self.open {
                None => None,
                Some(Open::Text { path, reader, at }) => next_text(path, reader, at)?,
                Some(Open::Jsonl(file)) => file.next_document()?,
                #[cfg(feature = "parquet")]
                Some(Open::Parquet(file)) => file.next_document()?,
            };
            match found {
                Some(document) => return Ok(Some(document)),
                None if !self.open_next()? => return Ok(None),
                None => {}
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document, CorpusError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}

/// Lines up to a document mark or the end of the file, as one document; `None` at the end.
fn next_text(path: &Path, reader: &mut impl BufRead, at: &mut u64) -> Result<Option<Document>, CorpusError> {
    let mut text = String::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line may be the whole file; it is all held in memory anyway.
        let read = reader.read_until(b'\n', &mut line);
        let read = read.map_err(|source| CorpusError::Read { path: path.to_path_buf(), source })?;
        if read == 0 {
            return Ok((!text.trim().is_empty()).then(|| Document::text(text)));
        }
        let part = std::str::from_utf8(&line).map_err(|error| CorpusError::Utf8 {
            path: path.to_path_buf(),
            at: *at + error.valid_up_to() as u64,
        })?;
        *at += read as u64;
        if part.trim_end() == DOCUMENT_MARK {
            if !text.trim().is_empty() {
                return Ok(Some(Document::text(text)));
            }
            text.clear();
        } else {
            text.push_str(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(paths: &[PathBuf], format: Format) -> Result<Vec<Document>, CorpusError> {
        documents(paths, format)?.collect()
    }

    #[test]
    fn text_files_are_documents_and_marks_separate_them() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b.txt"), "one\n<|endoftext|>\n\n<|endoftext|>\ntwo\n").unwrap();
        std::fs::write(dir.path().join("a.md"), "first").unwrap();
        std::fs::write(dir.path().join("c.png"), [0xff]).unwrap();
        let found = all(&[dir.path().to_path_buf()], Format::Auto).unwrap();
        assert_eq!(found, ["first", "one\n", "two\n"].map(|text| Document::text(text.into())));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("bad.txt"), b"good\nba\xffd").unwrap();
        let message = |p: PathBuf| all(&[p], Format::Auto).unwrap_err().to_string();
        assert!(message(path("bad.txt")).contains("not valid UTF-8 at byte 7"));
        assert!(message(path("none.txt")).contains("none.txt: No such file"));
        std::fs::write(path("x.bin"), b"x").unwrap();
        assert!(message(path("x.bin")).contains("set data.format"));
        std::fs::create_dir(path("empty")).unwrap();
        assert!(message(path("empty")).contains("holds no text"));
        #[cfg(not(feature = "parquet"))]
        {
            std::fs::write(path("x.parquet"), b"PAR1").unwrap();
            assert!(message(path("x.parquet")).contains("--features parquet"));
        }
    }
}
