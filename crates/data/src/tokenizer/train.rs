//! A byte-level BPE of our own (GPT-2's pre-tokenisation, every byte in the alphabet), so that any
//! text, in any language, has tokens.

use super::{Tokenizer, TokenizerError, guarded};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

/// Bytes and the end-of-text token: the least a vocabulary holds.
const LEAST: usize = 257;

impl Tokenizer {
    /// Learn `vocab` tokens from `texts`. `end_of_text` is token 0 and ends documents. The same
    /// texts give the same tokenizer.
    pub fn train_bpe(
        texts: impl Iterator<Item = String> + Send,
        vocab: usize,
        end_of_text: &str,
    ) -> Result<Tokenizer, TokenizerError> {
        if vocab < LEAST {
            let what = format!("a vocabulary of {vocab} cannot hold every byte");
            return Err(TokenizerError::Train { what, remedy: "ask for 257 tokens or more" });
        }
        let trained = guarded(|| train(texts, vocab, end_of_text));
        let inner = trained
            .map_err(|what| TokenizerError::Train { what, remedy: "check the texts it is trained on" })?;
        let tokenizer = Tokenizer::wrap(inner);
        let end = tokenizer.token_to_id(end_of_text);
        Ok(Tokenizer { eos: end.into_iter().collect(), ..tokenizer })
    }
}

fn train(
    texts: impl Iterator<Item = String> + Send,
    vocab: usize,
    end_of_text: &str,
) -> Result<tokenizers::Tokenizer, String> {
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(ByteLevel::new(true, false, true)))
        .with_decoder(Some(bytes))
        .build()
        .map_err(|error| error.to_string())?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(end_of_text, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts).map_err(|error| error.to_string())?;
    Ok(tokenizer.into())
}
