//! Arrays of an accepted manifest lie in order within the file. The checksum is made right first,
//! or nothing would ever get past it.
#![no_main]

use checkpoint::{BLOCK_BYTES, parse_manifest};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    parse_manifest(bytes).ok();
    let body = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let trailer = format!("\n{{\"crc32c\":\"{:08x}\"}}\n", crc32c::crc32c(body));
    let Ok(manifest) = parse_manifest(&[body, trailer.as_bytes()].concat()) else { return };
    let mut end = 0;
    for array in &manifest.arrays {
        assert!(array.offset >= end);
        end = array.offset + array.bytes;
        assert_eq!(array.crc32c.len() as u64, array.bytes.div_ceil(BLOCK_BYTES));
    }
    assert!(end <= manifest.file_bytes);
});
