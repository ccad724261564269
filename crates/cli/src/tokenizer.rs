//! `trilith tokenizer`: train one, or see what one does.

use crate::show;
use anyhow::{Context, Result};
use data::{Format, Tokenizer, documents};
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Train a byte-level BPE and write its files into a folder
    Train {
        /// Text, JSONL or Parquet: a file or a folder; may be repeated
        #[arg(long, required = true)]
        data: Vec<PathBuf>,
        /// Tokens of the vocabulary, 257 or more
        #[arg(long, default_value_t = 8192)]
        vocab: usize,
        /// Token that ends documents; it gets id 0
        #[arg(long, default_value = "<|endoftext|>")]
        end_of_text: String,
        /// Folder to write tokenizer.json into
        #[arg(long)]
        out: PathBuf,
    },
    /// Show the tokens of a text
    Encode {
        /// tokenizer.json, or a folder that holds one
        tokenizer: PathBuf,
        /// The text; default: standard input
        text: Option<String>,
    },
    /// Show the text of tokens
    Decode {
        /// tokenizer.json, or a folder that holds one
        tokenizer: PathBuf,
        /// Token ids
        #[arg(required = true)]
        ids: Vec<u32>,
    },
}

pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Train { data, vocab, end_of_text, out } => train(&data, vocab, &end_of_text, &out)?,
        Command::Encode { tokenizer, text } => {
            let tokenizer = Tokenizer::open(&tokenizer)?;
            let text = match text {
                Some(text) => text,
                None => {
                    let mut text = String::new();
                    std::io::stdin()
                        .read_to_string(&mut text)
                        .context("cannot read standard input as text")?;
                    text
                }
            };
            let ids = tokenizer.encode(&text)?;
            let rows =
                ids.iter().map(|id| vec![id.to_string(), tokenizer.id_to_token(*id).unwrap_or_default()]);
            println!("{}", show::table(&["id", "token"], rows.collect(), &[0]));
            println!("{} tokens, {} bytes", ids.len(), text.len());
        }
        Command::Decode { tokenizer, ids } => {
            println!("{}", Tokenizer::open(&tokenizer)?.decode(&ids, false)?)
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn train(data: &[PathBuf], vocab: usize, end_of_text: &str, out: &std::path::Path) -> Result<()> {
    // Read once for errors: the trainer itself takes texts only.
    let mut texts = Vec::new();
    for document in documents(data, Format::Auto)? {
        texts.extend(document?.pieces.into_iter().map(|piece| piece.text));
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    let spinner = show::bar(0, "{spinner} training on {msg}");
    spinner.set_message(show::bytes(bytes as u64));
    let tokenizer = Tokenizer::train_bpe(texts.clone().into_iter(), vocab, end_of_text)?;
    spinner.finish_and_clear();
    checkpoint::save_tokenizer(&tokenizer, out)?;
    let sample: String = texts.iter().flat_map(|text| text.chars()).take(100_000).collect();
    let ids = tokenizer.encode(&sample)?;
    print!(
        "{}",
        show::facts(&[
            ("written to", out.display().to_string()),
            ("vocabulary", tokenizer.vocab_size().to_string()),
            (
                "bytes per token",
                format!("{:.2} on the training text", sample.len() as f64 / ids.len().max(1) as f64)
            ),
        ])
    );
    if tokenizer.vocab_size() < vocab {
        println!(
            "  the text has no more pairs that occur twice, so the vocabulary is smaller than asked for"
        );
    }
    Ok(())
}
