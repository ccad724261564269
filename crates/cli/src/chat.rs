//! `trilith chat`: a conversation, or one prompt.

use crate::on::On;
use crate::show;
use anyhow::{Context, Result};
use clap::ValueEnum;
use data::Message;
use infer::{Generation, LoadedModel, Sampling, Session};
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trilith chat runs/shakespeare\n  trilith chat runs/shakespeare --prompt 'ROMEO:'\n  trilith chat model.gguf --system 'Answer in one sentence.' --temperature 0\n\nA model with a chat template is spoken to in turns; one without continues your text."
)]
pub struct Args {
    /// Model: a Hugging Face folder or a .gguf file
    model: PathBuf,
    /// Answer this and exit
    #[arg(long, short)]
    prompt: Option<String>,
    /// What the model is told first, where it has a chat template
    #[arg(long)]
    system: Option<String>,
    /// Continue the text as it is, even where the model has a chat template
    #[arg(long)]
    raw: bool,
    /// Longest answer [tokens]
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Draw from the likeliest tokens that together hold this probability
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Draw from this many of the likeliest tokens; 0: all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Same seed, same words
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    load: LoadArgs,
}

/// How a model is loaded.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// Type of weights in memory; default: f32 for f32 files, bf16 otherwise
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: On,
    /// Longest sequence [tokens], cut to what the model was made for
    #[arg(long, default_value_t = 4096)]
    pub context: usize,
    /// Worker threads; 0: every core
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Dtype {
    Bf16,
    F32,
}

impl Dtype {
    pub fn dtype(self) -> device::DType {
        match self {
            Dtype::Bf16 => device::DType::Bf16,
            Dtype::F32 => device::DType::F32,
        }
    }
}

impl LoadArgs {
    pub fn pool(&self) -> Result<device::Threads> {
        let count = if self.threads == 0 { device::cores() } else { self.threads };
        device::Threads::new(count)
            .with_context(|| format!("cannot start {count} worker threads; lower --threads"))
    }

    pub fn open(&self, path: &std::path::Path) -> Result<LoadedModel> {
        let device = self.device.device()?;
        Ok(LoadedModel::open(path, device, self.dtype.map(Dtype::dtype), self.context)?)
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    args.load.pool()?.run(|| talk(&args))?;
    Ok(ExitCode::SUCCESS)
}

struct Speaker {
    loaded: LoadedModel,
    session: Session,
    sampling: Sampling,
    max_tokens: usize,
    turns: bool,
}

fn talk(args: &Args) -> Result<()> {
    let loaded = args.load.open(&args.model)?;
    let session = Session::new(&loaded.config, &loaded.store, loaded.context)?;
    let turns = !args.raw && loaded.tokenizer.chat_template().is_some();
    let sampling =
        Sampling { temperature: args.temperature, top_p: args.top_p, top_k: args.top_k, seed: args.seed };
    let mut speaker = Speaker { loaded, session, sampling, max_tokens: args.max_tokens, turns };
    let system = args.system.iter().map(|text| Message::new("system", text)).collect::<Vec<_>>();
    if let Some(prompt) = &args.prompt {
        let mut said = system;
        if !turns {
            print!("{prompt}");
        }
        speaker.answer(&mut said, prompt)?;
        println!();
        return Ok(());
    }
    let stdin = std::io::stdin();
    let asked = stdin.is_terminal();
    if asked {
        let kind = if turns { "Say something" } else { "Begin a text and it goes on" };
        eprintln!("{kind}; /new forgets the conversation, an empty line or Ctrl-D ends it.");
    }
    let mut said = system.clone();
    let mut line = String::new();
    loop {
        if asked {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        line.clear();
        if stdin.lock().read_line(&mut line).context("cannot read what you said")? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" if asked => return Ok(()),
            "" => continue,
            "/new" => said = system.clone(),
            text => {
                let (tokens, seconds) = speaker.answer(&mut said, text)?;
                println!();
                if asked {
                    eprintln!("[{tokens} tokens, {:.1} tokens/s]", tokens as f64 / seconds);
                }
            }
        }
    }
}

impl Speaker {
    /// Print the answer as it comes; (tokens, seconds).
    fn answer(&mut self, said: &mut Vec<Message>, text: &str) -> Result<(usize, f64)> {
        let started = Instant::now();
        let tokenizer = &self.loaded.tokenizer;
        let prompt = if self.turns {
            said.push(Message::new("user", text));
            let (template, bos, eos) = tokenizer.chat();
            tokenizer.encode(&template.render(said, true, &bos, &eos)?)?
        } else {
            // A text begins where another ended: models know no other beginning.
            let mut ids = tokenizer.encode_prompt(text)?;
            if ids.is_empty() {
                ids.extend(tokenizer.end_of_text());
            }
            ids
        };
        let parts = (&self.loaded.model, &mut self.loaded.store, &mut self.session);
        let mut generation =
            Generation::new(parts, &prompt, self.sampling, tokenizer.eos_ids(), self.max_tokens)?;
        let mut stream = tokenizer.stream(true);
        let (mut answer, mut out, mut tokens) = (String::new(), std::io::stdout(), 0);
        while let Some(token) = generation.next_token()? {
            tokens += 1;
            if let Some(text) = stream.push(token)? {
                write!(out, "{text}")?;
                out.flush()?;
                answer.push_str(&text);
            }
        }
        let rest = stream.finish()?;
        write!(out, "{rest}")?;
        out.flush()?;
        answer.push_str(&rest);
        if self.turns {
            said.push(Message::new("assistant", &answer));
        }
        // The next answer to the same words may be another one.
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        Ok((tokens, started.elapsed().as_secs_f64()))
    }
}

/// For the tables of other commands.
pub fn parameters(loaded: &LoadedModel) -> String {
    show::count(loaded.store.parameter_count() as f64)
}
