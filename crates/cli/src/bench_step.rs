//! `trilith bench-step`: training steps of a bench configuration, timed, one JSON line each. The
//! other side of `cargo xtask bench train`.

use crate::on::On;
use anyhow::{Context, Result};
use clap::ValueEnum;
use data::Batch;
use device::{DType, Isa};
use model::{Config, Recompute};
use serde_json::json;
use std::process::ExitCode;
use std::time::Instant;
use train::{AdamWConfig, Learner, LearnerOptions, Moments};

#[derive(clap::Args)]
pub struct Args {
    /// Size of the model
    #[arg(long, value_enum)]
    config: Size,
    /// Type of weights and activations
    #[arg(long, value_enum, default_value = "bf16")]
    mode: crate::chat::Dtype,
    /// Steps
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: On,
    /// Rows of the batch instead of those of the configuration
    #[arg(long)]
    batch: Option<usize>,
    /// Worker threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Instruction set instead of the best this machine has, by its name in `trilith doctor`
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// Seconds of every op after the steps, to standard error
    #[arg(long)]
    profile: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    #[value(name = "S")]
    S,
    #[value(name = "M")]
    M,
    #[value(name = "L")]
    L,
}

impl Size {
    /// (V, D, L, N, F, B, T)
    fn sizes(self) -> (usize, usize, usize, usize, usize, usize, usize) {
        match self {
            Size::S => (8192, 512, 6, 8, 1376, 4, 256),
            Size::M => (32_000, 768, 12, 12, 2048, 2, 512),
            Size::L => (32_000, 2048, 16, 16, 5504, 8, 2048),
        }
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(name) = &args.isa {
        let isa = Isa::available().into_iter().find(|isa| isa.name() == name);
        let names: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
        let isa =
            isa.with_context(|| format!("this machine has no `{name}`; it has {}", names.join(", ")))?;
        Isa::choose(isa);
    }
    device::Threads::new(args.threads).context("cannot start the workers")?.run(|| steps(&args))?;
    Ok(ExitCode::SUCCESS)
}

fn steps(args: &Args) -> Result<()> {
    let (v, d, l, n, f, b, t) = args.config.sizes();
    let b = args.batch.unwrap_or(b);
    let device = args.device.device()?;
    let [f32_peak, bf16_peak] = [DType::F32, DType::Bf16].map(|dtype| kernels::peak::gflops(device, dtype));
    println!("{}", json!({ "gemm_peak_gflops_f32": f32_peak, "gemm_peak_gflops_bf16": bf16_peak }));
    let config = Config::from_json(&json!({
        "model_type": "llama", "vocab_size": v, "hidden_size": d, "num_hidden_layers": l,
        "num_attention_heads": n, "intermediate_size": f, "max_position_embeddings": t,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    }))?;
    let adamw = AdamWConfig {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        moments: Moments::F32,
        gradients: DType::F32,
    };
    let dtype: DType = args.mode.dtype();
    let options =
        LearnerOptions { context: t, dtype, adamw, recompute: Recompute::Never, device, tiers: None };
    let mut learner = Learner::new(&config, options)?;
    learner.initialise(1)?;
    let batch = random_batch(v, b, t);
    let flops = config.flops().per_token_unmasked(t) * (b * t) as f64;
    for step in 0..args.steps {
        let started = Instant::now();
        learner.clear_grads()?;
        let loss = learner.accumulate(&batch, 1.0 / (b * t) as f32)? / (b * t) as f64;
        learner.apply_settled(3e-4)?;
        let seconds = started.elapsed().as_secs_f64();
        let memory = device::memory_use_of(device);
        println!(
            "{}",
            json!({
                "impl": format!("trilith-{dtype}"), "step": step, "seconds": seconds,
                "tokens_per_s": (b * t) as f64 / seconds, "gflops": flops / seconds / 1e9,
                "peak_rss_bytes": device::resident_bytes().map(|(_, peak)| peak), "loss": loss,
                "peak_device_bytes": (device == device::Device::Cuda).then_some(memory.peak_held_bytes), "system_allocations": memory.system_allocations,
            })
        );
    }
    if args.profile {
        profile(&mut learner, &batch)?;
    }
    Ok(())
}

/// Tokens of a fixed generator, every target learned.
fn random_batch(v: usize, b: usize, t: usize) -> Batch {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % v as u64) as u32
    };
    let ids: Vec<u32> = (0..b * t).map(|_| next()).collect();
    let targets = (0..b * t).map(|_| next()).collect();
    let positions = (0..b * t).map(|i| (i % t) as u32).collect();
    Batch { b, t, ids, targets, positions, starts: vec![0; b * t], learned: b * t, samples: Vec::new() }
}

fn profile(learner: &mut Learner, batch: &Batch) -> Result<()> {
    let rows = learner.profile(batch)?;
    let total: f64 = rows.iter().map(|(_, _, seconds)| seconds).sum();
    let rows = rows
        .into_iter()
        .map(|(phase, op, seconds)| {
            vec![phase, op, format!("{:.1}", 1e3 * seconds), format!("{:.1}", 100.0 * seconds / total)]
        })
        .collect();
    eprintln!("{}", crate::show::table(&["phase", "op", "ms", "%"], rows, &[2, 3]));
    Ok(())
}
