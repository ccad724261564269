//! Every family against `transformers`: a tiny random model of each, with the logits, loss,
//! gradients and greedy tokens that scripts/make_goldens.py had it compute.

mod common;

use common::{CONTEXT, F32, FAMILIES, Golden, assert_close};
use model::Recompute;
use std::collections::BTreeSet;
use tensor::DType;

#[test]
fn names_and_shapes_are_those_of_the_folder() {
    for family in FAMILIES {
        let golden = Golden::open(family, DType::F32);
        let ours: BTreeSet<_> = golden.built.stored.iter().map(|s| (&s.name, &s.shape)).collect();
        let theirs: BTreeSet<_> = golden.weights.iter().map(|(name, array)| (name, &array.shape)).collect();
        assert_eq!(ours, theirs, "{family}");
        assert_eq!(ours.len(), golden.built.stored.len(), "{family}: a name twice");
        let elements: usize = golden.built.stored.iter().map(|s| s.len()).sum();
        assert_eq!(elements, golden.store.parameter_count(), "{family}: parameters not covered once each");
    }
}

#[test]
fn logits_loss_and_gradients_match() {
    for family in FAMILIES {
        for (dtype, tolerances) in Golden::dtypes(family) {
            Golden::open(family, *dtype).check(family, tolerances);
        }
    }
}

#[test]
fn rows_packed_into_one_match_as_well() {
    for family in FAMILIES {
        let mut golden = Golden::open(family, DType::F32);
        let tokens = golden.packed();
        let found = golden.logits(&tokens);
        assert_close(&format!("{family} packed"), &found, &golden.expected["logits"].f32(), F32.logits);
        golden.train(&tokens, Recompute::Never);
        golden.assert_grads(family, F32.grads);
    }
}

#[test]
fn a_cache_fed_in_pieces_of_any_size_matches() {
    for family in FAMILIES {
        let mut golden = Golden::open(family, DType::F32);
        let (t, v) = (golden.sizes.1, golden.config.vocab());
        let ids = golden.expected["ids"].u32()[..t].to_vec();
        let expected = golden.expected["logits"].f32()[..t * v].to_vec();
        for pieces in [vec![1; t], vec![t], vec![5, 1, 7, t - 13], vec![t - 1, 1]] {
            let mut caches = golden.caches(CONTEXT);
            let (mut found, mut first) = (Vec::new(), 0);
            for piece in &pieces {
                found.extend(golden.logits_cached(&ids[first..first + piece], &mut caches));
                first += piece;
            }
            assert!(caches.iter().all(|cache| cache.len() == t));
            assert_close(&format!("{family} in pieces {pieces:?}"), &found, &expected, F32.logits);
        }
    }
}

#[test]
fn a_cache_cut_back_continues_as_if_nothing_had_followed() {
    for family in FAMILIES {
        let mut golden = Golden::open(family, DType::F32);
        let (t, v) = (golden.sizes.1, golden.config.vocab());
        let ids = golden.expected["ids"].u32();
        let expected = golden.expected["logits"].f32()[6 * v..t * v].to_vec();
        let mut caches = golden.caches(CONTEXT);
        golden.logits_cached(&ids[..6], &mut caches);
        golden.logits_cached(&ids[t..t + 9], &mut caches);
        caches.iter_mut().for_each(|cache| cache.truncate(6));
        let found = golden.logits_cached(&ids[6..t], &mut caches);
        assert_close(&format!("{family} cut back"), &found, &expected, F32.logits);
    }
}

#[test]
fn greedy_tokens_are_the_same() {
    for family in FAMILIES {
        let mut golden = Golden::open(family, DType::F32);
        let (prompt, expected) = (golden.expected["prompt"].u32(), golden.expected["continuation"].u32());
        let mut caches = golden.caches(prompt.len() + expected.len());
        let (mut next, mut found) = (prompt, Vec::new());
        while found.len() < expected.len() {
            let logits = golden.logits_cached(&next, &mut caches);
            let last = &logits[logits.len() - golden.config.vocab()..];
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap() as u32;
            found.push(best);
            next = vec![best];
        }
        assert_eq!(found, expected, "{family}");
    }
}

#[test]
fn recomputed_layers_give_the_same_bits() {
    for family in FAMILIES {
        for dtype in [DType::F32, DType::Bf16] {
            let mut golden = Golden::open(family, dtype);
            let mut run = |recompute| {
                let tokens = golden.tokens();
                let loss = golden.train(&tokens, recompute);
                (loss.to_bits(), golden.store.all_grads().bytes().to_vec())
            };
            let plain = run(Recompute::Never);
            for recompute in [Recompute::First(1), Recompute::Always] {
                assert!(run(recompute) == plain, "{family} {dtype} {recompute:?}");
            }
        }
    }
}
