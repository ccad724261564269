//! `trilith eval`: perplexity on a file.

use crate::chat::{LoadArgs, parameters};
use crate::show;
use anyhow::Result;
use data::{Format, Samples, TokenizedCorpus, documents};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trilith eval runs/shakespeare --data data/shakespeare/valid.txt --context 256"
)]
pub struct Args {
    /// Model: a Hugging Face folder or a .gguf file
    model: PathBuf,
    /// Text, JSONL or Parquet: a file or a folder; may be repeated
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Rows at a time
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Stop after this many tokens; 0: all
    #[arg(long, default_value_t = 0)]
    max_tokens: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

pub fn run(args: Args) -> Result<ExitCode> {
    args.load.pool()?.run(|| measure(&args))?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &Args) -> Result<()> {
    let mut loaded = args.load.open(&args.model)?;
    let documents = documents(&args.data, Format::Auto)?.with_chat(loaded.tokenizer.chat());
    let text_bytes = documents.total_bytes();
    let corpus = TokenizedCorpus::build(documents, &loaded.tokenizer, &mut |_| {})?;
    let all_tokens = corpus.len();
    let context = loaded.context;
    let samples = Samples::new(Arc::new(corpus), context)?;
    let rows = args.batch.max(1);
    let bar = show::bar(samples.len(), "evaluating {bar:30} {pos}/{len} rows {eta} left");
    let (mut loss, mut targets, started) = (0.0, 0usize, Instant::now());
    for batch in samples.sequential(rows) {
        loss += train::loss_of(&loaded.model, &mut loaded.store, &batch)?;
        targets += batch.learned;
        bar.inc(batch.b as u64);
        if args.max_tokens > 0 && targets >= args.max_tokens {
            break;
        }
    }
    bar.finish_and_clear();
    let mean = loss / targets.max(1) as f64;
    let seconds = started.elapsed().as_secs_f64();
    // Bits per byte compares models with different tokenizers.
    let bits_per_byte = mean / std::f64::consts::LN_2 * all_tokens as f64 / text_bytes.max(1) as f64;
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "loss": mean, "perplexity": mean.exp(), "bits_per_byte": bits_per_byte, "targets": targets,
                "context": context, "seconds": seconds,
            })
        );
        return Ok(());
    }
    print!(
        "{}",
        show::facts(&[
            ("model", format!("{} ({} parameters)", args.model.display(), parameters(&loaded))),
            ("tokens predicted", show::count(targets as f64)),
            ("context", format!("{context} tokens")),
            ("loss", format!("{mean:.4} nats per token")),
            ("perplexity", format!("{:.3}", mean.exp())),
            ("bits per byte", format!("{bits_per_byte:.4}")),
            ("speed", format!("{} tokens/s", show::count(targets as f64 / seconds))),
        ])
    );
    Ok(())
}
