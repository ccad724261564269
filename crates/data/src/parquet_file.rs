//! Parquet: one record in each row.

use crate::corpus::{CorpusError, Document};
use crate::records::Records;
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use std::fs::File;
use std::path::PathBuf;

pub(crate) struct ParquetFile {
    path: PathBuf,
    rows: RowIter<'static>,
    row: u64,
    records: Records,
}

impl ParquetFile {
    pub(crate) fn new(path: PathBuf, file: File, records: Records) -> Result<ParquetFile, CorpusError> {
        match SerializedFileReader::new(file) {
            Ok(reader) => {
                Ok(ParquetFile { path, rows: RowIter::from_file_into(Box::new(reader)), row: 0, records })
            }
            Err(error) => Err(CorpusError::Parquet { path, row: 0, what: error.to_string() }),
        }
    }

    pub(crate) fn next_document(&mut self) -> Result<Option<Document>, CorpusError> {
        let Some(row) = self.rows.next() else { return Ok(None) };
        self.row += 1;
        let document = row
            .map_err(|error| error.to_string())
            .and_then(|row| self.records.document(&row.to_json_value()));
        let wrong = |what| CorpusError::Parquet { path: self.path.clone(), row: self.row, what };
        document.map(Some).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Document, Format, documents};
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::path::Path;
    use std::sync::Arc;

    /// A file of string columns: (name, values).
    fn write(path: &Path, columns: &[(&str, &[&str])]) {
        let fields: String =
            columns.iter().map(|(name, _)| format!("required binary {name} (UTF8);")).collect();
        let schema = Arc::new(parse_message_type(&format!("message m {{ {fields} }}")).unwrap());
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for (_, values) in columns {
            let values: Vec<ByteArray> = values.iter().map(|value| ByteArray::from(*value)).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    fn read(path: &Path) -> Result<Vec<Document>, String> {
        documents(&[path.to_path_buf()], Format::Auto)
            .unwrap()
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn rows_are_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, &[("text", &["one", "two"]), ("source", &["x", "y"])]);
        let texts: Vec<String> = read(&path).unwrap().iter().map(|d| d.pieces[0].text.clone()).collect();
        assert_eq!(texts, ["one", "two"]);
        write(&path, &[("prompt", &["q"]), ("completion", &["r"])]);
        let pieces = read(&path).unwrap().remove(0).pieces;
        assert_eq!((pieces[0].learn, pieces[1].learn, pieces[1].text.as_str()), (false, true, "r"));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        write(&path, &[("body", &["one"])]);
        let message = read(&path).unwrap_err();
        assert!(message.contains("a.parquet, row 1: has none of `text`"), "{message}");
        std::fs::write(&path, "PAR1 and nothing").unwrap();
        let message = read(&path).unwrap_err();
        assert!(message.contains("a.parquet, row 0:"), "{message}");
        let schema = Arc::new(parse_message_type("message m { required int32 text; }").unwrap());
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[7], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let message = read(&path).unwrap_err();
        assert!(message.contains("row 1: `text` is a number, expected a text"), "{message}");
    }
}
