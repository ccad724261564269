//! No bytes make a parser panic, hang or believe what the file cannot hold.

mod common;

use checkpoint::{gguf, parse_manifest, safetensors};
use common::{floats, tiny_llama};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// A length or count overwritten.
    Lie(prop::sample::Index, u64),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let index = any::<prop::sample::Index>;
    let lie = prop_oneof![any::<u64>(), 0u64..256, Just(u64::MAX), Just(1 << 40), Just(i64::MAX as u64)];
    let one = prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, value)| Damage::Flip(at, value)),
        1 => index().prop_map(Damage::Cut),
        2 => (index(), lie).prop_map(|(at, value)| Damage::Lie(at, value)),
    ];
    prop::collection::vec(one, 1..6)
}

fn apply(mut bytes: Vec<u8>, damage: &[Damage]) -> Vec<u8> {
    for damage in damage {
        if bytes.is_empty() {
            break;
        }
        match damage {
            Damage::Flip(at, value) => *at.get_mut(&mut bytes) ^= value,
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Lie(at, value) => {
                let at = at.index(bytes.len());
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
        }
    }
    bytes
}

fn check_gguf(bytes: &[u8]) {
    let Ok(header) = gguf::parse_header(bytes, bytes.len() as u64) else { return };
    for tensor in &header.tensors {
        assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.dtype.bytes(elements as u64), Some(tensor.bytes));
    }
}

fn check_safetensors(bytes: &[u8]) {
    let Ok(header) = safetensors::parse_header(bytes, bytes.len() as u64) else { return };
    let end = header.tensors.iter().fold(header.data_start, |at, tensor| {
        assert_eq!(tensor.offset, at);
        at + tensor.bytes
    });
    assert_eq!(end, bytes.len() as u64);
    // Whatever we accept, the reference accepts.
    ::safetensors::SafeTensors::read_metadata(bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn safetensors_survive(damage in damage()) {
        let file = common::safetensors(&[
            ("a", "F32", &[2, 3], &floats(&[1.0; 6])),
            ("b", "BF16", &[4], &[0; 8]),
            ("c", "I64", &[1], &[0; 8]),
        ]);
        check_safetensors(&file);
        check_safetensors(&apply(file, &damage));
    }

    #[test]
    fn ggufs_survive(damage in damage()) {
        check_gguf(&apply(tiny_llama().build(), &damage));
    }

    #[test]
    fn arbitrary_bytes_survive(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        check_safetensors(&bytes);
        check_gguf(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
        parse_manifest(&bytes).ok();
    }
}
