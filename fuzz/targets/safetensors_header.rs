//! Whatever header we accept covers the file exactly, and the reference accepts it too.
#![no_main]

use checkpoint::safetensors::parse_header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = parse_header(bytes, bytes.len() as u64) else { return };
    let end = header.tensors.iter().fold(header.data_start, |at, tensor| {
        assert_eq!(tensor.offset, at);
        at + tensor.bytes
    });
    assert_eq!(end, bytes.len() as u64);
    safetensors::SafeTensors::read_metadata(bytes).unwrap();
});
