//! What the Rust peers share: the model sizes, the arguments and the JSON line of a step.
//! Included by path into each of them; knows no tensors.

/// Sizes of one model and its batch, named as in the README.
#[derive(Clone, Copy)]
pub struct Config {
    /// Vocabulary size.
    pub v: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// Layers.
    pub l: usize,
    /// Attention heads.
    pub n: usize,
    /// Feed-forward width.
    pub f: usize,
    /// Sequences in the batch.
    pub b: usize,
    /// Tokens of a sequence.
    pub t: usize,
}

impl Config {
    pub fn head_dim(&self) -> usize {
        self.d / self.n
    }

    pub fn tokens(&self) -> usize {
        self.b * self.t
    }

    /// Floating point operations of one step, attention counted as if it were not causal.
    fn flop(&self) -> f64 {
        let n_mat = self.l * (4 * self.d * self.d + 3 * self.d * self.f) + self.d * self.v;
        (6 * n_mat + 12 * self.l * self.t * self.d) as f64 * self.tokens() as f64
    }

    /// The fixed batch: `tokens` inputs and the same number of targets, each the next input.
    pub fn batch(&self) -> (Vec<u32>, Vec<u32>) {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            // xorshift64: enough for tokens nobody learns from.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % self.v as u64) as u32
        };
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..self.b {
            let row: Vec<u32> = (0..=self.t).map(|_| next()).collect();
            inputs.extend_from_slice(&row[..self.t]);
            targets.extend_from_slice(&row[1..]);
        }
        (inputs, targets)
    }

    /// Cosines and sines of the rotary angles, each `t` x `head_dim / 2`.
    pub fn rope_tables(&self) -> (Vec<f32>, Vec<f32>) {
        let h = self.head_dim();
        let angles = (0..self.t)
            .flat_map(|t| (0..h / 2).map(move |i| t as f32 * 10000f32.powf(-((2 * i) as f32) / h as f32)));
        angles.map(|a| (a.cos(), a.sin())).unzip()
    }
}

/// The arguments every program of the bench takes.
pub struct Args {
    pub config: Config,
    pub steps: usize,
    pub threads: usize,
}

impl Args {
    /// Reads the command line; panics with the offending argument.
    pub fn parse() -> Args {
        let mut args = Args { config: config("S"), steps: 4, threads: 2 };
        let mut words = std::env::args().skip(1);
        while let Some(flag) = words.next() {
            let value = words.next().unwrap_or_else(|| panic!("{flag} needs a value"));
            let count = || value.parse().unwrap_or_else(|_| panic!("{flag} {value}: not a number"));
            match flag.as_str() {
                "--config" => args.config = config(&value),
                "--mode" => assert!(value == "f32", "--mode {value}: this program knows only f32"),
                "--steps" => args.steps = count(),
                "--threads" => args.threads = count(),
                _ => panic!("{flag}: unknown argument"),
            }
        }
        // SAFETY: called first in main, before any other thread exists.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", args.threads.to_string()) };
        args
    }
}

fn config(name: &str) -> Config {
    match name {
        "S" => Config { v: 8192, d: 512, l: 6, n: 8, f: 1376, b: 4, t: 256 },
        "M" => Config { v: 32000, d: 768, l: 12, n: 12, f: 2048, b: 2, t: 512 },
        _ => panic!("--config {name}: expected S or M"),
    }
}

/// Prints the line of one step.
pub fn report(name: &str, config: &Config, step: usize, seconds: f64, loss: f32) {
    let tokens_per_s = config.tokens() as f64 / seconds;
    let gflops = config.flop() / seconds / 1e9;
    let rss = peak_rss_bytes();
    println!(
        "{{\"impl\":\"{name}\",\"step\":{step},\"seconds\":{seconds},\"tokens_per_s\":{tokens_per_s},\
         \"gflops\":{gflops},\"peak_rss_bytes\":{rss},\"loss\":{loss}}}"
    );
}

fn peak_rss_bytes() -> i64 {
    // SAFETY: rusage is plain data, and getrusage fills it.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    // Linux counts in KiB.
    usage.ru_maxrss * 1024
}
