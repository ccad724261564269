//! Model files: right ones are read right, wrong ones are refused by name.

mod common;

use checkpoint::gguf::{self, Value};
use checkpoint::{FormatError, WeightError, WeightType, Weights, safetensors};
use common::{GgufBytes, floats, smollm2, tiny_llama, with_header};
use std::fs;
use std::path::{Path, PathBuf};

fn put(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn parse(bytes: &[u8]) -> Result<safetensors::Header, FormatError> {
    safetensors::parse_header(bytes, bytes.len() as u64)
}

fn parse_gguf(bytes: &[u8]) -> Result<gguf::Header, FormatError> {
    gguf::parse_header(bytes, bytes.len() as u64)
}

#[test]
fn safetensors_are_widened_in_pieces_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let half: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
    let brain: Vec<u8> = [0.25f32].iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    let big: Vec<f32> = (0..200_000).map(|i| i as f32).collect();
    let file = common::safetensors(&[
        ("b", "F32", &[400, 500], &floats(&big)),
        ("a", "F16", &[2], &half),
        ("scalar", "BF16", &[], &brain),
        ("ids", "I64", &[1], &[0; 8]),
    ]);
    let weights = Weights::open_safetensors(&put(dir.path(), "x.safetensors", &file)).unwrap();
    let names: Vec<_> = weights.infos().iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "scalar"]);
    assert_eq!(weights.find("b").unwrap().dtype, WeightType::F32);
    assert_eq!(weights.read_f32("a").unwrap(), [1.5, -2.0]);
    assert_eq!(weights.read_f32("scalar").unwrap(), [0.25]);
    assert!(weights.read_f32("b").unwrap() == big);
    let mut piece = [0.0; 3];
    weights.read_rows_f32("b", 199_997, &mut piece).unwrap();
    assert_eq!(piece, [199_997.0, 199_998.0, 199_999.0]);
    assert!(matches!(weights.read_rows_f32("b", 199_998, &mut piece), Err(WeightError::Range { .. })));
    let refused = weights.read_f32("ids").unwrap_err().to_string();
    assert!(refused.contains("`ids` is of type I64"), "{refused}");
    let missing = weights.read_f32("c").unwrap_err().to_string();
    assert!(missing.contains("no tensor `c`") && missing.contains("`a`, `b`, `scalar`"), "{missing}");
}

#[test]
fn damaged_safetensors_headers_are_refused() {
    let entry = |name: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}"#)
    };
    let two = |a: String, b: String| with_header(&format!("{{{a},{b}}}"), &[0; 8]);
    assert!(parse(&two(entry("a", 0, 4), entry("b", 4, 8))).is_ok());
    assert!(matches!(parse(&two(entry("a", 0, 4), entry("a", 4, 8))), Err(FormatError::Duplicate { .. })));
    assert!(matches!(parse(&two(entry("a", 0, 4), entry("b", 0, 4))), Err(FormatError::Offset { .. })));
    assert!(matches!(parse(&two(entry("a", 0, 4), entry("b", 5, 9))), Err(FormatError::Offset { .. })));
    assert!(matches!(parse(&two(entry("a", 0, 4), entry("b", 4, 12))), Err(FormatError::Truncated { .. })));
    assert!(matches!(parse(&two(entry("a", 0, 4), entry("b", 4, 7))), Err(FormatError::Size { .. })));
    let one = |text: &str| parse(&with_header(&format!("{{{text}}}"), &[0; 8]));
    assert!(one(&entry("a", 0, 4)).unwrap_err().to_string().contains("4 bytes after the last tensor"));
    let huge = r#""a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#;
    assert!(matches!(one(huge), Err(FormatError::Size { .. })));
    let unknown = one(r#""w":{"dtype":"Q9","shape":[1],"data_offsets":[0,8]}"#).unwrap_err().to_string();
    assert!(unknown.contains("tensor `w`") && unknown.contains("Q9"), "{unknown}");
    assert!(matches!(parse(&[1, 2, 3]), Err(FormatError::Truncated { .. })));
    assert!(matches!(parse(&u64::MAX.to_le_bytes()), Err(FormatError::Limit { .. })));
    assert!(matches!(parse(&1000u64.to_le_bytes()), Err(FormatError::Truncated { .. })));
    assert!(matches!(parse(&with_header(&"[".repeat(5000), &[])), Err(FormatError::Malformed { .. })));
}

#[test]
fn folders_of_shards_must_agree_with_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Weights::open_folder(dir.path()).map_err(|error| error.to_string());
    assert!(open().unwrap_err().contains("neither model.safetensors nor"));
    put(dir.path(), "1.safetensors", &common::safetensors(&[("a", "F32", &[1], &floats(&[1.0]))]));
    put(dir.path(), "2.safetensors", &common::safetensors(&[("b", "F32", &[1], &floats(&[2.0]))]));
    let index = |map: &str| {
        put(dir.path(), "model.safetensors.index.json", format!(r#"{{"weight_map":{{{map}}}}}"#).as_bytes());
    };
    index(r#""a":"1.safetensors","b":"2.safetensors""#);
    assert_eq!(open().unwrap().read_f32("b").unwrap(), [2.0]);
    index(r#""a":"1.safetensors","b":"3.safetensors""#);
    assert!(open().unwrap_err().contains("shard 3.safetensors is not in the folder"));
    index(r#""a":"1.safetensors","b":"1.safetensors""#);
    assert!(open().unwrap_err().contains("`b` should be in 1.safetensors"));
    put(dir.path(), "2.safetensors", &common::safetensors(&[("a", "F32", &[1], &floats(&[2.0]))]));
    index(r#""a":"1.safetensors","b":"2.safetensors""#);
    assert!(open().is_err());
    index(r#""a":"../1.safetensors""#);
    assert!(open().unwrap_err().contains("outside the folder"));
}

#[test]
fn a_gguf_reads_as_a_hugging_face_folder() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = Weights::open_gguf(&put(dir.path(), "x.gguf", &tiny_llama().build())).unwrap();
    assert_eq!((gguf.version, gguf.alignment), (3, 32));
    assert_eq!(gguf.weights.find("token_embd.weight").unwrap().shape, [3, 8]);
    let config = gguf.config_json().unwrap();
    for (key, value) in [("vocab_size", 3), ("hidden_size", 8), ("num_key_value_heads", 2), ("head_dim", 4)] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["rms_norm_eps"], 1e-5, "as a person would write it, not as the nearest f32");
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(gguf.hf_name_map()["model.layers.0.self_attn.q_proj.weight"], "blk.0.attn_q.weight");
    // Stored rows 0 2 | 1 3 of a head are its first and second half interleaved.
    let first = |name: &str| -> Vec<f32> { gguf.read_hf_f32(name).unwrap().into_iter().step_by(8).collect() };
    assert_eq!(first("model.layers.0.self_attn.q_proj.weight"), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(first("model.layers.0.self_attn.v_proj.weight"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let hf = gguf.hf_weights().unwrap();
    let mut piece = [0.0; 10];
    hf.read_rows_f32("model.layers.0.self_attn.q_proj.weight", 15, &mut piece).unwrap();
    assert_eq!(piece, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0]);
    let tokenizer = gguf.tokenizer().unwrap();
    assert_eq!(tokenizer.merges, [("a".to_string(), "b".to_string())]);
    assert!(!tokenizer.add_bos);
}

#[test]
fn other_architectures_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let config = |gguf: &GgufBytes| {
        let gguf = Weights::open_gguf(&put(dir.path(), "x.gguf", &gguf.build())).unwrap();
        gguf.config_json().map_err(|error| error.to_string())
    };
    let mut scaled = tiny_llama();
    scaled.tensor("rope_freqs.weight", &[2], 0, &floats(&[1.0, 2.0]));
    assert!(config(&scaled).unwrap_err().contains("Llama 3.1"));
    let mut experts = tiny_llama();
    experts.key_u32("llama.expert_count", 8);
    assert!(config(&experts).unwrap_err().contains("mixture of experts"));
    let mut mamba = GgufBytes::default();
    mamba.key_str("general.architecture", "mamba");
    assert!(config(&mamba).unwrap_err().contains("\"mamba\"; supported are llama"));
}

#[test]
fn damaged_ggufs_are_refused() {
    let one = |dims: &[u64], kind, offset| {
        let mut gguf = GgufBytes::default();
        gguf.tensor("x", &[8], 0, &[0; 32]).entry("y", dims, kind, offset);
        parse_gguf(&gguf.build())
    };
    assert!(matches!(one(&[8], 0, 0), Err(FormatError::Offset { .. })), "overlap");
    assert!(matches!(one(&[8], 0, 16), Err(FormatError::Offset { .. })), "alignment");
    assert!(matches!(one(&[8], 0, 32), Err(FormatError::Truncated { .. })), "past the end");
    assert!(matches!(one(&[8], 0, u64::MAX - 31), Err(FormatError::Truncated { .. })));
    assert!(matches!(one(&[u64::MAX, 2], 0, 32), Err(FormatError::Size { .. })));
    assert!(matches!(one(&[16, 2], 2, 32), Err(FormatError::Size { .. })), "rows of half a block");
    assert!(matches!(one(&[1; 5], 0, 32), Err(FormatError::Limit { .. })));
    let message = one(&[256], 23, 32).unwrap_err().to_string();
    assert!(message.contains("`y` is of type iq4_xs"), "{message}");
    let mut twice = GgufBytes::default();
    twice.key_u32("k", 1).key_u32("k", 2);
    assert!(matches!(parse_gguf(&twice.build()), Err(FormatError::Duplicate { .. })));
    let mut odd = GgufBytes::default();
    odd.key_u32("general.alignment", 24);
    assert!(matches!(parse_gguf(&odd.build()), Err(FormatError::Malformed { .. })));
    let mut nested = Vec::new();
    for _ in 0..100 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    let mut deep = GgufBytes::default();
    deep.key("deep", 9, &nested);
    assert!(matches!(parse_gguf(&deep.build()), Err(FormatError::Limit { .. })));
    let mut big_endian = tiny_llama().build();
    big_endian[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(parse_gguf(&big_endian).unwrap_err().to_string().contains("big endian"));
}

#[test]
fn smollm2_is_read_whole() {
    let Some(path) = smollm2() else { return };
    let gguf = Weights::open_gguf(&path).unwrap();
    assert_eq!((gguf.version, gguf.metadata.len(), gguf.weights.infos().len()), (3, 33, 272));
    assert_eq!(gguf.metadata.get("llama.block_count"), Some(&Value::Uint(30)));
    let config = gguf.config_json().unwrap();
    assert_eq!((&config["vocab_size"], &config["rope_theta"]), (&49152.into(), &100_000.0.into()));
    assert_eq!(gguf.hf_name_map().len(), 272);
    let hf = gguf.hf_weights().unwrap();
    for info in hf.infos() {
        let values = hf.read_f32(&info.name).unwrap();
        let scale = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
        assert!(scale > 1e-3 && scale < 50.0, "{}: {scale}", info.name);
    }
    let tokenizer = gguf.tokenizer().unwrap();
    assert_eq!((tokenizer.tokens.len(), tokenizer.merges.len()), (49152, 48900));
    assert_eq!((tokenizer.pre.as_str(), tokenizer.eos, tokenizer.add_bos), ("smollm", Some(2), false));
    assert!(tokenizer.chat_template.unwrap().contains("<|im_start|>"));
}
