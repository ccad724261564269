//! Every key a recipe may hold, with its unit, default and meaning: the one table behind parsing,
//! `--set`, the resolved recipe and `docs/recipes.md`.

use super::kind::MANY;
pub use super::kind::{Kind, parse_bytes};

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `table.name`.
    pub path: &'static str,
    /// What it may hold.
    pub kind: Kind,
    /// TOML of the default; empty where the key is absent unless given.
    pub default: &'static str,
    /// Unit, where it has one.
    pub unit: &'static str,
    /// What it means.
    pub doc: &'static str,
}

const fn key(
    path: &'static str,
    kind: Kind,
    default: &'static str,
    unit: &'static str,
    doc: &'static str,
) -> Key {
    Key { path, kind, default, unit, doc }
}

use Kind::{Bytes, Choice, Flag, Float, Int, Path, Paths, Text};

const SIZE: u64 = 1 << 24;

/// All of them, in the order they are written.
pub const KEYS: &[Key] = &[
    key("run.dir", Path, "", "", "Folder the run writes: model, state, metrics, resolved recipe. Required."),
    key("run.seed", Int(0, u64::MAX >> 1), "1", "", "Seed of initial weights and of the order of samples."),
    key(
        "run.threads",
        Int(0, 4096),
        "0",
        "cores",
        "Worker threads; 0 takes every core. Never changes a result.",
    ),
    key(
        "model.from",
        Path,
        "",
        "",
        "Model to fine-tune: a Hugging Face folder or a GGUF file. Excludes the sizes below.",
    ),
    key(
        "model.family",
        Choice(&["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe"]),
        "\"llama\"",
        "",
        "Architecture of a new model.",
    ),
    key("model.layers", Int(1, 4096), "6", "", "Layers L."),
    key("model.width", Int(1, SIZE), "384", "", "Model width D."),
    key("model.heads", Int(1, 65536), "6", "", "Query heads N."),
    key("model.kv_heads", Int(0, 65536), "0", "", "Key and value heads K; 0 means as many as query heads."),
    key("model.head_dim", Int(0, 65536), "0", "", "Head dim H; 0 means width / heads."),
    key(
        "model.ffn",
        Int(0, SIZE),
        "0",
        "",
        "Width F of the feed-forward part; 0 means 8/3 width (4 width for gpt2), rounded up to 32.",
    ),
    key(
        "model.experts",
        Int(1, 4096),
        "",
        "experts",
        "Experts E of a layer (mixtral, qwen2_moe, qwen3_moe); absent: 8.",
    ),
    key("model.experts_per_token", Int(1, 4096), "", "experts", "Experts a token goes to, k; absent: 2."),
    key("model.expert_ffn", Int(1, SIZE), "", "", "Width F of an expert; absent: model.ffn."),
    key(
        "model.shared_ffn",
        Int(1, SIZE),
        "",
        "",
        "Width of the expert every token goes to (qwen2_moe); absent: that of the k experts together.",
    ),
    key(
        "model.balance",
        Float(0.0, 1e6),
        "",
        "",
        "Factor of the load-balancing loss; 0 turns it off. Absent: 0.01.",
    ),
    key("model.tied", Flag, "true", "", "Use the embedding as the head."),
    key("model.rope_theta", Float(1.0, 1e12), "10000.0", "", "Base of the rotary positions."),
    key("model.norm_eps", Float(1e-12, 1.0), "1e-5", "", "Added to the variance in norms."),
    key("model.window", Int(0, MANY), "0", "tokens", "Sliding attention window (mistral); 0 means none."),
    key(
        "tokenizer.file",
        Path,
        "",
        "",
        "A tokenizer.json, or a folder that holds one. Absent: the model's own, or a new one is trained.",
    ),
    key(
        "tokenizer.vocab",
        Int(257, 1 << 20),
        "4096",
        "tokens",
        "Vocabulary of a newly trained byte-level BPE.",
    ),
    key("data.path", Paths, "", "", "Text, JSONL or Parquet: a file, a folder or a list of them. Required."),
    key(
        "data.format",
        Choice(&["auto", "text", "jsonl", "parquet"]),
        "\"auto\"",
        "",
        "How files are read; auto goes by their extension.",
    ),
    key("data.valid", Paths, "", "", "Validation data; absent: a part of data.path is held out."),
    key(
        "data.valid_fraction",
        Float(0.0, 0.5),
        "0.02",
        "",
        "Part held out for validation when data.valid is absent.",
    ),
    key("data.shuffle", Flag, "true", "", "Visit samples in an order drawn from seed and epoch."),
    key("train.steps", Int(1, MANY), "1000", "steps", "Steps of the run."),
    key("train.batch", Int(1, 1 << 20), "8", "rows", "Rows per microbatch."),
    key(
        "train.accumulate",
        Int(1, 1 << 20),
        "1",
        "microbatches",
        "Microbatches per step; the global batch is batch x accumulate rows.",
    ),
    key("train.context", Int(2, SIZE), "256", "tokens", "Tokens per row."),
    key("train.lr", Float(0.0, 10.0), "1e-3", "", "Highest learning rate."),
    key(
        "train.min_lr",
        Float(0.0, 10.0),
        "",
        "",
        "Learning rate at the last step; absent: a tenth of train.lr.",
    ),
    key(
        "train.warmup",
        Int(0, MANY),
        "",
        "steps",
        "Steps of the straight line up from 0; absent: a tenth of train.steps, at most 100.",
    ),
    key(
        "train.schedule",
        Choice(&["cosine", "linear", "wsd", "constant"]),
        "\"cosine\"",
        "",
        "Shape after the warmup; wsd is warmup, stable, decay.",
    ),
    key(
        "train.decay",
        Int(1, MANY),
        "",
        "steps",
        "Steps of the final decay of wsd; absent: a fifth of train.steps.",
    ),
    key("train.beta1", Float(0.0, 0.999_999_9), "0.9", "", "Decay of AdamW's first moment."),
    key("train.beta2", Float(0.0, 0.999_999_9), "0.95", "", "Decay of AdamW's second moment."),
    key("train.eps", Float(1e-30, 1.0), "1e-8", "", "Added to the root of the second moment."),
    key(
        "train.moments",
        Choice(&["f32", "8bit"]),
        "\"f32\"",
        "",
        "Precision of AdamW's moments: 8bit holds them in a quarter of the memory, with rounding that keeps the mean (docs/memory.md). A state goes on with either.",
    ),
    key(
        "train.gradients",
        Choice(&["f32", "bf16"]),
        "\"f32\"",
        "",
        "Precision of a step's final gradients: bf16 rounds them once, after all sums (f32) over microbatches and ranks and before norm and update, so that over tiers they travel and lie in 2 bytes (docs/memory.md). A state goes on with either.",
    ),
    key(
        "train.weight_decay",
        Float(0.0, 10.0),
        "0.1",
        "",
        "Decoupled decay of matrices; norms and biases have none.",
    ),
    key(
        "train.clip",
        Float(0.0, 1e9),
        "1.0",
        "",
        "Largest global norm of the gradient; 0 turns clipping off.",
    ),
    key(
        "train.precision",
        Choice(&["bf16", "f32"]),
        "\"bf16\"",
        "",
        "Weights and activations; bf16 keeps exact f32 masters for the optimizer.",
    ),
    key(
        "train.device",
        Choice(&["auto", "cpu", "cuda"]),
        "\"auto\"",
        "",
        "Where ops compute. auto: on the GPU where there is one that this run can use, else on the CPU. Ranks that are processes take a GPU each. Bits of a run are those of its device.",
    ),
    key(
        "train.recompute",
        Choice(&["never", "always", "auto"]),
        "\"never\"",
        "",
        "Whether layers keep only their input and run again on the way back: less memory, a third more work. \"auto\" takes the number of layers of which the step is predicted to be the fastest that fits.",
    ),
    key(
        "train.recompute_layers",
        Int(0, 4096),
        "",
        "layers",
        "Recompute only this many layers, from the first.",
    ),
    key(
        "train.max_skipped",
        Int(0, MANY),
        "10",
        "steps",
        "Stop after this many steps in a row with a loss or gradient that is not finite.",
    ),
    key(
        "eval.every",
        Int(0, MANY),
        "100",
        "steps",
        "Steps between validations, and one at the end; 0: only at the end.",
    ),
    key("eval.batches", Int(0, MANY), "16", "batches", "Batches per validation, always the same; 0: all."),
    key("sample.every", Int(0, MANY), "0", "steps", "Steps between samples of what the model says; 0: none."),
    key("sample.prompt", Text, "\"\"", "", "Text the samples continue."),
    key("sample.tokens", Int(1, SIZE), "80", "tokens", "Length of a sample."),
    key(
        "sample.temperature",
        Float(0.0, 100.0),
        "0.8",
        "",
        "Divides the logits; 0 takes the likeliest token.",
    ),
    key(
        "sample.top_p",
        Float(1e-6, 1.0),
        "0.95",
        "",
        "Tokens that together hold this probability are drawn from.",
    ),
    key(
        "checkpoint.every",
        Int(0, MANY),
        "200",
        "steps",
        "Steps between saves of the training state, and one at the end; 0: only at the end.",
    ),
    key("checkpoint.keep_last", Int(1, 1 << 20), "2", "saves", "Newest saves that are kept."),
    key(
        "checkpoint.background",
        Flag,
        "true",
        "",
        "Write saves from a copy while training goes on; false needs no memory for the copy.",
    ),
    key("cluster.devices", Int(1, 1 << 20), "1", "devices", "Devices `trilith plan` spreads the run over."),
    key("cluster.node_devices", Int(1, 4096), "8", "devices", "Devices of a node."),
    key("cluster.memory", Float(0.001, 1e6), "80.0", "GiB", "Memory of a device."),
    key(
        "cluster.compute",
        Float(1e-6, 1e6),
        "600.0",
        "TFLOP/s",
        "What matrix products reach on a device, not its data sheet; the default is nominal for bf16 on an H100.",
    ),
    key("cluster.memory_rate", Float(0.001, 1e6), "3000.0", "GB/s", "Rate of a device's memory."),
    key("cluster.host_memory", Float(0.0, 1e6), "200.0", "GiB", "Host memory, a device's share."),
    key(
        "cluster.host_memory_rate",
        Float(0.001, 1e6),
        "40.0",
        "GB/s",
        "Rate of host memory, a device's share.",
    ),
    key("cluster.host_rate", Float(0.001, 1e6), "50.0", "GB/s", "Between a device and its host, each way."),
    key("cluster.host_latency", Float(0.0, 1e6), "10.0", "us", "The same, until the first byte arrives."),
    key("cluster.intra_rate", Float(0.001, 1e6), "400.0", "GB/s", "Between devices of a node, each way."),
    key("cluster.intra_latency", Float(0.0, 1e6), "3.0", "us", "The same, until the first byte arrives."),
    key(
        "cluster.inter_rate",
        Float(0.001, 1e6),
        "45.0",
        "GB/s",
        "Between nodes, a device's share, each way.",
    ),
    key("cluster.inter_latency", Float(0.0, 1e6), "10.0", "us", "The same, until the first byte arrives."),
    key(
        "mesh.axes",
        Choice(&["given", "auto"]),
        "\"given\"",
        "",
        "auto: the axes below, the schemes, mesh.zero and the microbatches are chosen for the ranks there are, by speeds measured when the run starts (docs/parallelism.md); rows of a step stay. `mesh = \"auto\"` is short for it.",
    ),
    key(
        "mesh.pp",
        Int(1, 65536),
        "1",
        "ranks",
        "Pipeline stages: each has a run of the layers. Microbatches are train.accumulate.",
    ),
    key(
        "mesh.dp",
        Int(1, 65536),
        "1",
        "ranks",
        "Replicas: each learns from its share of the rows of train.batch.",
    ),
    key(
        "mesh.fsdp",
        Int(1, 65536),
        "1",
        "ranks",
        "Replicas that share the state among them: each keeps its shard of it (mesh.zero).",
    ),
    key(
        "mesh.zero",
        Int(1, 3),
        "3",
        "",
        "What the ranks of mesh.fsdp share (ZeRO): 1 masters and moments, 2 also gradients, 3 also weights. Changes memory and traffic; results only where microbatches are added up (docs/parallelism.md).",
    ),
    key(
        "mesh.overlap",
        Flag,
        "true",
        "",
        "Sums of gradients and gathers of weights travel beside computation. Never changes a result.",
    ),
    key("mesh.cp", Int(1, 65536), "1", "ranks", "Context: every row of tokens is cut among so many ranks."),
    key(
        "mesh.attention",
        Choice(&["auto", "ring", "all-to-all"]),
        "\"auto\"",
        "",
        "How attention sees the tokens of other context ranks; auto takes all-to-all where the heads divide and it moves less.",
    ),
    key("mesh.ep", Int(1, 65536), "1", "ranks", "Replicas that share the experts of a mixture among them."),
    key(
        "mesh.x",
        Int(1, 65536),
        "1",
        "ranks",
        "First tensor axis. Ranks are threads of the process, or processes (docs/communication.md).",
    ),
    key("mesh.y", Int(1, 65536), "1", "ranks", "Second tensor axis."),
    key("mesh.z", Int(1, 65536), "1", "ranks", "Third tensor axis."),
    key(
        "mesh.scheme",
        Choice(&["auto", "1d", "1d-sequence", "summa", "2.5d", "3d", "weight-stationary"]),
        "\"auto\"",
        "",
        "How products are spread over x, y and z (docs/parallelism.md); auto goes by the axes: 1d, summa or 3d.",
    ),
    key(
        "mesh.attention_scheme",
        Choice(&["same", "1d", "1d-sequence", "summa", "2.5d", "3d", "weight-stationary"]),
        "\"same\"",
        "",
        "The scheme of q, k, v and out where it is not mesh.scheme: the normed stream is laid out for it and its output laid back (docs/parallelism.md).",
    ),
    key(
        "mesh.ffn_scheme",
        Choice(&["same", "1d", "1d-sequence", "summa", "2.5d", "3d", "weight-stationary"]),
        "\"same\"",
        "",
        "The same for the feed-forward part; routed experts follow mesh.scheme.",
    ),
    key(
        "mesh.deadline",
        Float(0.1, 1e7),
        "600.0",
        "s",
        "Longest time a rank waits for another in one call; then the run ends on all of them and says who was late.",
    ),
    key(
        "mesh.schedule",
        Choice(&["gpipe", "1f1b", "interleaved", "zero-bubble"]),
        "\"1f1b\"",
        "",
        "In which order the stages of pp work on the train.accumulate microbatches of a step (docs/parallelism.md).",
    ),
    key(
        "mesh.virtual",
        Int(1, 4096),
        "",
        "slices",
        "Slices of the model on each stage of mesh.schedule = \"interleaved\"; absent: 2.",
    ),
    key(
        "memory.dram",
        Bytes,
        "",
        "",
        "Memory the run may take, activations included; what does not fit lies in memory.dir. auto takes what the system or its control group allows. Absent: everything stays in memory. Never changes a result.",
    ),
    key(
        "memory.simulate_device",
        Bytes,
        "",
        "",
        "Part of memory that plays the memory of a GPU: ops compute in it, memory.dram is the host behind it.",
    ),
    key(
        "memory.hbm",
        Bytes,
        "\"auto\"",
        "",
        "Memory of the GPU the run may take, activations included, where train.device is one: memory.dram is the host behind it. auto takes nine tenths of what is free.",
    ),
    key("memory.nvme", Bytes, "\"auto\"", "", "Space on the drive of memory.dir; auto takes what is free."),
    key(
        "memory.dir",
        Path,
        "",
        "",
        "Folder on a fast local drive for the offload file, which is gone when the run ends. Absent: run.dir.",
    ),
    key(
        "memory.policy",
        Choice(&["dynamic", "belady", "static", "lru"]),
        "\"dynamic\"",
        "",
        "Who leaves memory: dynamic plans the whole step, belady goes by what is needed last, static keeps a fixed part, lru what was used last.",
    ),
    key("log.tensorboard", Flag, "true", "", "Write TensorBoard event files beside metrics.jsonl."),
];

/// The key of a path.
pub fn find(path: &str) -> Option<&'static Key> {
    let path = if path == "mesh" { "mesh.axes" } else { path };
    KEYS.iter().find(|key| key.path == path)
}

/// The reference of all keys, as Markdown.
pub fn markdown() -> String {
    let mut out = String::new();
    let mut table = "";
    for key in KEYS {
        let (head, name) = key.path.split_once('.').unwrap_or(("", key.path));
        if head != table {
            table = head;
            out += &format!(
                "\n### [{table}]\n\n| key | default | unit | value | meaning |\n|---|---|---|---|---|\n"
            );
        }
        let default = if key.default.is_empty() { "absent".into() } else { format!("`{}`", key.default) };
        let row = [format!("`{name}`"), default, key.unit.into(), key.kind.expected(), key.doc.into()];
        out += &format!("| {} |\n", row.join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_value_its_key_accepts() {
        for key in KEYS.iter().filter(|key| !key.default.is_empty()) {
            let value: toml::Table = toml::from_str(&format!("x = {}", key.default)).unwrap();
            assert!(key.kind.accepts(&value["x"]), "{} = {}", key.path, key.default);
        }
    }

    #[test]
    fn the_reference_in_docs_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/recipes.md");
        let text = std::fs::read_to_string(path).unwrap();
        let kept =
            text.split("<!-- keys -->").nth(1).expect("docs/recipes.md holds the keys between two marks");
        assert!(kept.trim() == markdown().trim(), "run `trilith train --keys` and paste its output");
    }
}
