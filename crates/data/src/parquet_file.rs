//! Parquet with a string column `text`.

use crate::corpus::{CorpusError, Document};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, reader::RowIter};
use std::fs::File;
use std::path::PathBuf;

pub(crate) struct ParquetFile {
    path: PathBuf,
    rows: RowIter<'static>,
}

impl ParquetFile {
    pub(crate) fn new(path: PathBuf, file: File) -> Result<ParquetFile, CorpusError> {
        let wrong = |what: String| CorpusError::Parquet { path: path.clone(), what };
        let reader = SerializedFileReader::new(file).map_err(|error| wrong(error.to_string()))?;
        let columns = reader.metadata().file_metadata().schema_descr().root_schema().get_fields();
        if !columns.iter().any(|column| column.name() == "text") {
            let names: Vec<_> = columns.iter().map(|column| column.name()).collect();
            return Err(wrong(format!("no column `text` among {names:?}")));
        }
        let rows = RowIter::from_file_into(Box::new(reader));
        Ok(ParquetFile { path, rows })
    }

    pub(crate) fn next_document(&mut self) -> Result<Option<Document>, CorpusError> {
        let wrong = |what: String| CorpusError::Parquet { path: self.path.clone(), what };
        let Some(row) = self.rows.next() else { return Ok(None) };
        let row = row.map_err(|error| wrong(error.to_string()))?;
        match row.get_column_iter().find(|(name, _)| *name == "text") {
            Some((_, Field::Str(text))) => Ok(Some(Document::text(text.clone()))),
            Some((_, other)) => Err(wrong(format!("a row has {other} as its `text`"))),
            None => Err(wrong("a row has no `text`".into())),
        }
    }
}
