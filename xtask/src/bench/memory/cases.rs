//! What is run: the recipe and the cases of each part. Pure.

use clap::ValueEnum;

use super::{Args, Clip};

/// 110 million parameters, 1.75 GB of weights, masters, gradients and moments; 330 GFLOP a step. The
/// same shape as `memory` in bench/torch_step.py.
pub const RECIPE: &str = r#"model = { layers = 8, width = 1024, heads = 16, ffn = 2752, tied = false }
tokenizer = { vocab = 4096 }
train = { steps = 1000, batch = 4, context = 128, lr = 3e-4, warmup = 0 }
eval = { every = 0, batches = 1 }
checkpoint = { every = 0 }
log = { tensorboard = false }
"#;

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Part {
    /// The dynamic plan against rules, most of the state on the drive.
    Plans,
    /// Budgets that hold everything against no `[memory]`.
    Whole,
    /// PyTorch with mapped state under the same limit.
    Torch,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Plans => "plans",
            Part::Whole => "whole",
            Part::Torch => "torch",
        })
    }
}

/// Which program.
pub enum Program {
    /// Ours, with these keys set.
    Trilith(Vec<String>),
    /// torch_step.py with these arguments, and whether state lies in mapped files.
    Torch { mode: &'static str, mapped: bool, gradients: bool },
}

/// One line of a table.
pub struct Case {
    pub name: String,
    pub program: Program,
    /// Limit of its control group, in bytes.
    pub limit_bytes: Option<u64>,
    /// Whether its steps are the compute of this table: the same program without limits.
    pub is_reference: bool,
}

fn ours(name: &str, keys: &[&str]) -> Case {
    let keys = keys.iter().map(|key| key.to_string()).collect();
    let is_reference = name == "no limit";
    Case { name: name.to_string(), program: Program::Trilith(keys), limit_bytes: None, is_reference }
}

/// Title and cases of each table of a part. The reference comes first.
pub fn of(part: Part, args: &Args) -> Vec<(String, Vec<Case>)> {
    match part {
        Part::Plans => plans(args),
        Part::Whole => vec![("whole".to_string(), whole())],
        Part::Torch => vec![("torch".to_string(), torch(args))],
    }
}

fn plans(args: &Args) -> Vec<(String, Vec<Case>)> {
    let (dram, batch) = (format!("memory.dram={}", args.dram), format!("train.batch={}", args.batch));
    let table = |title: &str, clip: &str| {
        let both = [clip, batch.as_str()];
        let policy = |policy: &str| format!("memory.policy={policy}");
        let limited = ["dynamic", "belady", "lru", "static"]
            .map(|name| ours(name, &[&both[..], &[dram.as_str(), policy(name).as_str()]].concat()));
        let cases = std::iter::once(ours("no limit", &both)).chain(limited).collect();
        (title.to_string(), cases)
    };
    let mut tables = Vec::new();
    if args.clip != Clip::Off {
        tables.push(table("plans, clipping on", "train.clip=1.0"));
    }
    if args.clip != Clip::On {
        tables.push(table("plans, clipping off", "train.clip=0"));
    }
    tables
}

fn whole() -> Vec<Case> {
    vec![ours("no limit", &[]), ours("large dram", &["memory.dram=8GiB"])]
}

/// f32 throughout and no clipping, as torch_step.py has it.
fn torch(args: &Args) -> Vec<Case> {
    let limit_bytes = Some(args.limit << 20);
    let keys = ["train.clip=0", "train.precision=f32"];
    let dram = format!("memory.dram={}", args.dram);
    let dynamic = Case { limit_bytes, ..ours("dynamic, limit", &[&keys[..], &[dram.as_str()]].concat()) };
    let theirs = |name: &str, mapped, gradients, limit_bytes| Case {
        name: name.to_string(),
        program: Program::Torch { mode: "eager-f32", mapped, gradients },
        limit_bytes,
        is_reference: false,
    };
    vec![
        ours("no limit", &keys),
        dynamic,
        theirs("torch, no limit", false, false, None),
        theirs("torch, masters and moments mapped, limit", true, false, limit_bytes),
        theirs("torch, gradients mapped too, limit", true, true, limit_bytes),
    ]
}
