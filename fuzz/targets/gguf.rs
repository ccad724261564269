//! Tensors of an accepted header lie within the file and their shapes make their bytes.
#![no_main]

use checkpoint::gguf::parse_header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = parse_header(bytes, bytes.len() as u64) else { return };
    for tensor in &header.tensors {
        assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.dtype.bytes(elements as u64), Some(tensor.bytes));
    }
});
