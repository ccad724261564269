use super::*;
use proptest::prelude::*;
use std::sync::LazyLock;

const TEXTS: [&str; 3] =
    ["Now is the winter of our discontent", "made glorious summer", "by this sun of York; 1593"];

fn texts() -> impl Iterator<Item = String> + Send {
    TEXTS.iter().cycle().take(60).map(|text| text.to_string())
}

static TRAINED: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::train_bpe(texts(), 300, "<|endoftext|>").unwrap());

#[test]
fn training_is_deterministic_and_ends_documents_with_token_0() {
    let again = Tokenizer::train_bpe(texts(), 300, "<|endoftext|>").unwrap();
    assert_eq!(again.files().unwrap(), TRAINED.files().unwrap());
    assert_eq!((TRAINED.vocab_size(), TRAINED.end_of_text()), (300, Some(0)));
    assert_eq!(TRAINED.encode("a<|endoftext|>b").unwrap()[1], 0);
    let small = Tokenizer::train_bpe(texts(), 200, "<e>").err().unwrap();
    assert!(small.to_string().contains("cannot hold every byte"));
}

#[test]
fn a_folder_brings_special_tokens_and_template() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in TRAINED.files().unwrap() {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "A"}, "eos_token": "<|endoftext|>", "add_bos_token": true, "chat_template": "{{ bos_token }}hi"}"#,
    );
    write("generation_config.json", r#"{"eos_token_id": [0, 7]}"#);
    let read = Tokenizer::from_folder(dir.path()).unwrap();
    assert_eq!((read.eos_ids(), read.bos()), (&[0, 7][..], read.token_to_id("A")));
    assert_eq!(read.encode_prompt("x").unwrap()[0], read.bos().unwrap());
    let (template, bos, eos) = read.chat();
    assert_eq!(template.render(&[], false, &bos, &eos).unwrap(), "Ahi");
    write("tokenizer_config.json", "{");
    assert!(Tokenizer::from_folder(dir.path()).err().unwrap().to_string().contains("tokenizer_config.json"));
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for bytes in [&b""[..], b"{}", b"\xff\xfe", b"{\"model\": {\"type\": \"BPE\"}}", b"[1,2]"] {
        let error = Tokenizer::from_bytes(bytes).err().unwrap().to_string();
        assert!(error.contains("is not a tokenizer"), "{error}");
    }
    let missing = Tokenizer::open(std::path::Path::new("/no/such")).err().unwrap().to_string();
    assert!(missing.contains("/no/such"), "{missing}");
}

#[test]
fn its_parts_make_the_same_tokenizer() {
    let json: serde_json::Value = serde_json::from_slice(&TRAINED.files().unwrap()[0].1).unwrap();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let parts = BpeParts {
        tokens: (0..300).map(|id| TRAINED.id_to_token(id).unwrap()).collect(),
        merges: merges
            .map(|pair| (pair[0].as_str().unwrap().to_string(), pair[1].as_str().unwrap().to_string()))
            .collect(),
        special: vec![0],
        eos: vec![0],
        ..BpeParts::default()
    };
    let made = Tokenizer::from_bpe(&parts).unwrap();
    for text in TEXTS.iter().chain(&["<|endoftext|>ü 1234 \n\n  x"]) {
        assert_eq!(made.encode(text).unwrap(), TRAINED.encode(text).unwrap());
    }
    let unknown = BpeParts { pre: "klingon".into(), ..parts.clone() };
    assert!(Tokenizer::from_bpe(&unknown).err().unwrap().to_string().contains("klingon"));
    let beyond = BpeParts { special: vec![999], ..parts };
    assert!(Tokenizer::from_bpe(&beyond).is_err());
}

proptest! {
    #[test]
    fn any_text_survives_the_round_trip(text in "\\PC{0,60}") {
        let ids = TRAINED.encode(&text).unwrap();
        prop_assert_eq!(TRAINED.decode(&ids, false).unwrap(), text);
    }

    #[test]
    fn a_stream_says_the_same_as_decoding_at_once(text in "\\PC{0,40}") {
        let ids = TRAINED.encode(&text).unwrap();
        let mut stream = TRAINED.stream(false);
        let mut said = String::new();
        for id in &ids {
            said += &stream.push(*id).unwrap().unwrap_or_default();
        }
        said += &stream.finish().unwrap();
        prop_assert_eq!(said, text);
    }

    #[test]
    fn random_tokens_decode_in_a_stream_as_at_once(ids in prop::collection::vec(1u32..300, 0..30)) {
        let mut stream = TRAINED.stream(false);
        let mut said = String::new();
        for id in &ids {
            said += &stream.push(*id).unwrap().unwrap_or_default();
        }
        said += &stream.finish().unwrap();
        prop_assert_eq!(said, TRAINED.decode(&ids, false).unwrap());
    }
}
