//! From documents to batches: what is seen, what counts, and that nothing is seen twice.

use data::{Document, IGNORE, Loader, Piece, Samples, TokenizedCorpus, Tokenizer, order};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;

fn tokenizer() -> Tokenizer {
    let texts = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"].map(String::from);
    Tokenizer::train_bpe(texts.into_iter().cycle().take(30), 280, "<|endoftext|>").unwrap()
}

fn corpus(documents: Vec<Document>) -> TokenizedCorpus {
    TokenizedCorpus::build(documents.into_iter().map(Ok), &tokenizer(), &mut |_| {}).unwrap()
}

fn piece(text: &str, learn: bool) -> Piece {
    Piece { text: text.into(), learn }
}

#[test]
fn documents_stand_apart_and_only_what_is_learned_counts() {
    let asked = Document { pieces: vec![piece("the cat", false), piece(" sat", true)] };
    let plain = Document::text("a dog".into());
    let corpus = Arc::new(corpus(vec![asked, plain]));
    let tokenizer = tokenizer();
    let end = tokenizer.end_of_text().unwrap();
    let (q, r) = (tokenizer.encode("the cat").unwrap(), tokenizer.encode(" sat").unwrap());
    let p = tokenizer.encode("a dog").unwrap();
    let ids = [&q[..], &r, &[end], &p, &[end]].concat();
    assert_eq!(corpus.tokens(), ids);
    let batch = Samples::new(corpus, ids.len() - 1).unwrap().batch(&[0]);
    let first = q.len() + r.len() + 1;
    for (i, target) in batch.targets.iter().enumerate() {
        let asked = i + 1 < q.len();
        let want = if asked || i + 1 == first { IGNORE } else { ids[i + 1] };
        assert_eq!(*target, want, "target {i}");
        let start = if i < first { 0 } else { first };
        assert_eq!((batch.starts[i] as usize, batch.positions[i] as usize), (start, i - start));
    }
    assert_eq!(batch.learned, r.len() + 1 + p.len());
}

#[test]
fn every_target_of_a_stream_is_served_once_and_the_last_row_is_padded() {
    let text = "the cat sat on the mat and a dog sat on the log. ".repeat(20);
    let corpus = Arc::new(corpus(vec![Document::text(text)]));
    for t in [3, 7, 64, 1000] {
        let samples = Samples::new(corpus.clone(), t).unwrap();
        let targets: Vec<u32> =
            samples.sequential(4).flat_map(|batch| batch.targets).filter(|id| *id != IGNORE).collect();
        assert_eq!(targets, corpus.tokens()[1..], "t = {t}");
        let learned: usize = samples.sequential(3).map(|batch| batch.learned).sum();
        assert_eq!(learned, targets.len());
    }
}

#[test]
fn validation_is_held_out_by_documents_or_from_the_end() {
    let documents = |n: usize| (0..n).map(|i| Document::text(format!("the cat sat {i}"))).collect::<Vec<_>>();
    let whole = corpus(documents(40));
    let (train, valid) = whole.clone().split_validation(0.1);
    let valid = valid.unwrap();
    assert_eq!(train.documents() + valid.documents(), 40);
    assert!(valid.documents() >= 4);
    assert_eq!([train.tokens(), valid.tokens()].concat(), whole.tokens());
    let one = corpus(vec![Document::text("the cat sat on the mat ".repeat(50))]);
    let (train, valid) = one.clone().split_validation(0.1);
    assert_eq!(train.len() + valid.unwrap().len(), one.len());
    assert!(one.clone().split_validation(0.0).1.is_none());
    assert_ne!(train.fingerprint(), one.fingerprint());
}

#[test]
fn an_empty_corpus_is_refused() {
    let build = |documents: Vec<Document>| {
        TokenizedCorpus::build(documents.into_iter().map(Ok), &tokenizer(), &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    assert!(build(vec![]).contains("the corpus has 0 tokens"));
    let silent = Document { pieces: vec![piece("the cat", false)] };
    // Its end-of-text token is learned, so it is a corpus of one target.
    assert!(TokenizedCorpus::build([Ok(silent)].into_iter(), &tokenizer(), &mut |_| {}).is_ok());
}

#[test]
fn a_long_text_is_tokenized_as_if_it_were_not_cut() {
    let text = "the cat sat\n  on the mat\nand a dog\n\n".repeat(5000);
    let tokens = corpus(vec![Document::text(text.clone())]);
    let whole = tokenizer().encode(&text).unwrap();
    assert_eq!(tokens.tokens()[..whole.len()], whole);
}

proptest! {
    #[test]
    fn order_is_a_bijection_that_depends_on_seed_and_epoch(n in 1u64..3000, seed: u64, epoch in 0u64..1000) {
        let seen: HashSet<u64> = (0..n).map(|i| order(seed, epoch, n, i)).collect();
        prop_assert_eq!(seen.len() as u64, n);
        prop_assert!(seen.iter().all(|i| *i < n));
        if n > 50 {
            let next: Vec<u64> = (0..n).map(|i| order(seed, epoch + 1, n, i)).collect();
            let this: Vec<u64> = (0..n).map(|i| order(seed, epoch, n, i)).collect();
            prop_assert_ne!(this, next);
        }
    }

    #[test]
    fn ranks_together_see_each_sample_once_an_epoch(b in 1usize..5, ranks in 1usize..6, t in 2usize..9) {
        let corpus = Arc::new(corpus(vec![Document::text("the cat sat on the mat ".repeat(12))]));
        let loader = Loader::new(Samples::new(corpus, t).unwrap(), 7, true);
        let n = loader.len();
        let global = (b * ranks) as u64;
        let mut seen = Vec::new();
        for step in 0..(2 * n).div_ceil(global) {
            for rank in 0..ranks {
                seen.extend(loader.batch(step * global, b, rank, ranks).samples);
            }
        }
        for epoch in 0..2 {
            let part: HashSet<u64> = seen[(epoch * n) as usize..((epoch + 1) * n) as usize].iter().copied().collect();
            prop_assert_eq!(part.len() as u64, n);
        }
        // The same rows whatever the number of ranks.
        let alone: Vec<u64> = (0..seen.len() as u64).flat_map(|at| loader.batch(at, 1, 0, 1).samples).collect();
        prop_assert_eq!(alone, seen);
    }
}
