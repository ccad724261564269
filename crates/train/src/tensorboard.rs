//! TensorBoard event files: TFRecord frames around a few protobuf fields
//! (tensorflow/core/util/event.proto, summary.proto), written by hand because they are so few.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file being written.
pub struct EventWriter {
    out: BufWriter<File>,
}

impl EventWriter {
    /// A new file in `dir` that begins after `step`: points of an earlier file beyond it, which a
    /// resumed run writes again, are dropped by the reader.
    pub fn create(dir: &Path, step: u64) -> io::Result<EventWriter> {
        std::fs::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.{:09}.trilith", now.as_secs(), now.subsec_nanos());
        let mut writer = EventWriter { out: BufWriter::new(File::create(dir.join(name))?) };
        let mut version = Vec::new();
        bytes(&mut version, 3, b"brain.Event:2");
        writer.event(0, &version)?;
        if step > 0 {
            let (mut log, mut start) = (Vec::new(), Vec::new());
            varint_field(&mut start, 1, 1);
            bytes(&mut log, 7, &start);
            writer.event(step + 1, &log)?;
        }
        writer.out.flush()?;
        Ok(writer)
    }

    /// Points of one step: (tag, value).
    pub fn scalars(&mut self, step: u64, points: &[(&str, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in points {
            let mut point = Vec::new();
            bytes(&mut point, 1, tag.as_bytes());
            point.push(2 << 3 | 5);
            point.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &point);
        }
        let mut body = Vec::new();
        bytes(&mut body, 5, &summary);
        self.event(step, &body)?;
        self.out.flush()
    }

    fn event(&mut self, step: u64, body: &[u8]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut event = vec![1 << 3 | 1];
        event.extend(now.to_le_bytes());
        varint_field(&mut event, 2, step);
        event.extend(body);
        let len = (event.len() as u64).to_le_bytes();
        self.out.write_all(&len)?;
        self.out.write_all(&masked_crc(&len).to_le_bytes())?;
        self.out.write_all(&event)?;
        self.out.write_all(&masked_crc(&event).to_le_bytes())
    }
}

/// TFRecord's rotation of a CRC-32C, so that a CRC of data that holds CRCs stays sound.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_field(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_lengths_and_checksums_of_tfrecord() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 41).unwrap();
        writer.scalars(42, &[("train/loss", 1.5)]).unwrap();
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let data = std::fs::read(file).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        while at < data.len() {
            let len = u64::from_le_bytes(data[at..at + 8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            assert_eq!(crc(at + 8), masked_crc(&data[at..at + 8]));
            let event = &data[at + 12..at + 12 + len];
            assert_eq!(crc(at + 12 + len), masked_crc(event));
            events.push(event.to_vec());
            at += 16 + len;
        }
        assert_eq!(events.len(), 3);
        assert!(events[0].ends_with(b"brain.Event:2"));
        assert!(events[1].ends_with(&[7 << 3 | 2, 2, 1 << 3, 1]), "session start");
        assert!(events[2].windows(10).any(|w| w == b"train/loss"));
        assert!(events[2].ends_with(&1.5f32.to_le_bytes()));
    }

    #[test]
    fn the_mask_is_the_published_one() {
        // CRC-32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4).
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
