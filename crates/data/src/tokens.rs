//! A corpus as one stream of tokens, documents end to end.

use crate::{CorpusError, Document, Tokenizer};

/// Texts that are encoded together: enough to keep every core busy.
const BATCH_BYTES: usize = 4 << 20;

/// Text encoded in one piece at most. A single word of many megabytes would take the encoder
/// quadratic time; cuts fall after line ends.
const PIECE_BYTES: usize = 1 << 16;

/// Tokens of a corpus. Each document ends with the end-of-text token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizedCorpus {
    tokens: Vec<u32>,
    /// Ends of runs of tokens that are all learned or all not, in turn, beginning with learned.
    runs: Vec<usize>,
    /// One past the last token of each document.
    ends: Vec<usize>,
}

impl TokenizedCorpus {
    /// Tokenize `documents`; `progress` is told the bytes of text done.
    pub fn build(
        documents: impl Iterator<Item = Result<Document, CorpusError>>,
        tokenizer: &Tokenizer,
        progress: &mut dyn FnMut(u64),
    ) -> Result<TokenizedCorpus, CorpusError> {
        let mut corpus = TokenizedCorpus::default();
        let (mut waiting, mut bytes, mut done) = (Vec::new(), 0, 0u64);
        for document in documents {
            let document = document?;
            bytes += document.pieces.iter().map(|piece| piece.text.len()).sum::<usize>();
            waiting.push(document);
            if bytes >= BATCH_BYTES {
                corpus.append(std::mem::take(&mut waiting), tokenizer)?;
                done += std::mem::take(&mut bytes) as u64;
                progress(done);
            }
        }
        corpus.append(waiting, tokenizer)?;
        progress(done + bytes as u64);
        let learned = (0..corpus.tokens.len()).filter(|i| corpus.is_learned(*i)).take(2).count();
        if corpus.tokens.len() < 2 || learned == 0 {
            return Err(CorpusError::Empty { tokens: if learned == 0 { 0 } else { corpus.tokens.len() } });
        }
        Ok(corpus)
    }

    fn append(&mut self, documents: Vec<Document>, tokenizer: &Tokenizer) -> Result<(), CorpusError> {
        let (mut texts, mut marks) = (Vec::new(), Vec::new());
        for (d, document) in documents.into_iter().enumerate() {
            for piece in document.pieces {
                for part in cut(&piece.text) {
                    texts.push(part.to_string());
                    marks.push((d, piece.learn));
                }
            }
        }
        let encoded = tokenizer.encode_all(texts)?;
        let mut current = None;
        for (ids, (document, learn)) in encoded.into_iter().zip(marks) {
            if current.is_some_and(|before| before != document) {
                self.end_document(tokenizer);
            }
            current = Some(document);
            self.push(&ids, learn);
        }
        if current.is_some() {
            self.end_document(tokenizer);
        }
        Ok(())
    }

    fn push(&mut self, ids: &[u32], learn: bool) {
        self.tokens.extend(ids);
        // Runs alternate beginning with learned: an even count means the next one is learned.
        let next_learned = self.runs.len().is_multiple_of(2);
        match self.runs.last_mut() {
            // The last run is of the other kind than the next: it goes on.
            Some(end) if learn != next_learned => *end = self.tokens.len(),
            _ => {
                if learn != next_learned {
                    self.runs.push(0);
                }
                self.runs.push(self.tokens.len());
            }
        }
    }

    /// The end-of-text token is learned: a model has to know when to stop.
    fn end_document(&mut self, tokenizer: &Tokenizer) {
        if let Some(end) = tokenizer.end_of_text()
            && self.tokens.last() != Some(&end)
        {
            self.push(&[end], true);
        }
        self.ends.push(self.tokens.len());
    }

    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// First token of the document that holds token `at`.
    pub fn document_start(&self, at: usize) -> usize {
        match self.ends.partition_point(|end| *end <= at) {
            0 => 0,
            i => self.ends[i - 1],
        }
    }

    /// Whether the model learns to say token `at`.
    pub fn is_learned(&self, at: usize) -> bool {
        self.runs.partition_point(|end| *end <= at) % 2 == 0
    }

    /// Hold out about `fraction` of the tokens: the last documents where there are at least 20,
    /// the end of the stream otherwise. `None` where nothing would be left on either side.
    pub fn split_validation(self, fraction: f64) -> (TokenizedCorpus, Option<TokenizedCorpus>) {
        let wanted = (self.len() as f64 * fraction) as usize;
        if wanted < 2 || self.len() - wanted < 2 {
            return (self, None);
        }
        let mut at = self.len() - wanted;
        if self.documents() >= 20 {
            let whole = self.document_start(at);
            at = if whole >= 2 { whole } else { at };
        }
        let valid = self.part(at, self.len());
        (self.part(0, at), Some(valid))
    }

    fn part(&self, from: usize, to: usize) -> TokenizedCorpus {
        let mut part = TokenizedCorpus { tokens: self.tokens[from..to].to_vec(), ..Default::default() };
        let within = |ends: &[usize]| -> Vec<usize> {
            let inside = ends.iter().filter(|end| **end > from && **end < to).map(|end| end - from);
            inside.chain([to - from]).collect()
        };
        part.ends = within(&self.ends);
        if !self.is_learned(from) {
            part.runs.push(0);
        }
        part.runs.extend(within(&self.runs));
        part
    }

    /// Checksum of tokens, masks and document ends: a run is not resumed on other data.
    pub fn fingerprint(&self) -> u32 {
        let mut crc = 0;
        for chunk in self.tokens.chunks(1 << 16) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|id| id.to_le_bytes()).collect();
            crc = crc32c::crc32c_append(crc, &bytes);
        }
        for end in self.ends.iter().chain(&self.runs) {
            crc = crc32c::crc32c_append(crc, &(*end as u64).to_le_bytes());
        }
        crc
    }
}

/// A text in pieces of about `PIECE_BYTES`, cut after line ends, or failing that between characters.
fn cut(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > PIECE_BYTES {
        let mut limit = PIECE_BYTES;
        while !rest.is_char_boundary(limit) {
            limit -= 1;
        }
        // A break right before a non-blank keeps every pre-token whole.
        let bytes = rest.as_bytes();
        let line = (1..limit).rev().find(|i| bytes[i - 1] == b'\n' && !bytes[*i].is_ascii_whitespace());
        let (part, after) = rest.split_at(line.unwrap_or(limit));
        parts.push(part);
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}
