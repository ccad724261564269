//! A layer of a model on one rank of a mesh that is not there: the model's own code runs, messages
//! are counted and move nothing. So what a rank would exchange is counted, not computed from formulas.

use crate::TrainError;
use crate::ranks::axes_of_sums;
use device::{DType, Device};
use dist::{Axis, Communicator, Flow, Mesh, MeshShape, Parts, Scheme};
use memory::Class;
use model::{Built, Config, Model, Recompute, Tokens};
use std::collections::BTreeSet;
use tensor::{Fault, ParamStore, Tape, Targets};

/// Tokens of a dry run, about: bytes per token do not depend on it.
const TOKENS: usize = 1024;

/// What one rank was counted to exchange.
#[derive(Clone, Debug, PartialEq)]
pub struct DryLayer {
    /// Tokens of the microbatch that was run.
    pub tokens: usize,
    /// Elements received for one layer, forward and backward, sums of gradients apart.
    pub received: u64,
    /// Elements received for the gradients of one layer when a step ends.
    pub received_once: u64,
    /// Ranks the rank exchanges data with in a whole step: (axis, how many).
    pub peers: Vec<(Axis, usize)>,
}

/// Run one layer of `config` on the last rank of `mesh`. Errors: a model that cannot lie on it.
pub fn dry_layer(config: &Config, mesh: MeshShape, schemes: (Scheme, Parts)) -> Result<DryLayer, TrainError> {
    let one = run(&config.with_layers(1), mesh, schemes)?;
    let two = run(&config.with_layers(2), mesh, schemes)?;
    let received = two.passes - one.passes;
    Ok(DryLayer {
        tokens: two.tokens,
        received,
        received_once: two.all - one.all - received,
        peers: two.peers,
    })
}

/// Elements received in the passes and in all, over every axis.
struct Counted {
    tokens: usize,
    passes: u64,
    all: u64,
    peers: Vec<(Axis, usize)>,
}

fn run(config: &Config, shape: MeshShape, (scheme, parts): (Scheme, Parts)) -> Result<Counted, TrainError> {
    let last = shape.world_size() - 1;
    let mesh = Mesh::new(shape, Communicator::null(last, shape.world_size()))
        .map_err(|error| TrainError::Mesh { what: error.to_string() })?;
    let flow = Flow::new(&mesh, scheme).and_then(|flow| flow.with_parts(parts));
    let flow = flow.map_err(model::ConfigError::from)?;
    let rows = flow.row_pieces();
    let context = (TOKENS / rows).clamp(1, config.max_positions());
    let Built { model, params, spreads, .. } = Model::build_on(config, context, &flow)?;
    let mut store = ParamStore::new(Device::Cpu, DType::F32, &params)?;
    store.enable_grads()?;
    let tokens = rows * context;
    let ids = vec![0u32; tokens];
    let positions = (0..rows).flat_map(|_| 0..context as u32).collect();
    let batch = Tokens { b: rows, ids: ids.as_slice().into(), positions, starts: None };
    let mut tape = Tape::recording(&mut store);
    let hidden = model.hidden(&mut tape, &batch, Recompute::Never)?;
    model.loss(&mut tape, &hidden, Targets { ids: &ids, scale: 1.0 }, rows)?;
    drop(hidden);
    tape.backward()?;
    drop(tape);
    let passes = received(&mesh);
    store.settle_grads()?;
    for (param, spread) in store.refs().zip(&spreads) {
        for axis in axes_of_sums(&mesh, spread) {
            let range = store.range(param);
            let grad = store.arrays_mut().view_mut(Class::Grad, range);
            mesh.group(axis).all_reduce_sum(grad).map_err(Fault::from)?;
        }
    }
    Ok(Counted { tokens, passes, all: received(&mesh), peers: peers(&mesh) })
}

fn received(mesh: &Mesh) -> u64 {
    mesh.counts().iter().map(|counts| counts.bytes_received / DType::F32.size_bytes() as u64).sum()
}

fn peers(mesh: &Mesh) -> Vec<(Axis, usize)> {
    let (counts, shape, mine) = (mesh.counts(), mesh.shape(), mesh.coords());
    let all: BTreeSet<usize> = counts.iter().flat_map(|counts| counts.peers.iter().copied()).collect();
    let on =
        |axis: Axis| all.iter().filter(|peer| shape.coords(**peer).with(axis, mine.on(axis)) == mine).count();
    Axis::ALL.into_iter().map(|axis| (axis, on(axis))).filter(|(_, count)| *count > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dist::cost::{Grid, layer_flows};
    use serde_json::json;

    fn alone(scheme: Scheme) -> (Scheme, Parts) {
        (scheme, Parts::default())
    }

    /// Ten thousand ranks: in 1D a rank meets all others, on a square its row and its column; bytes
    /// are those of the formulas, and on the square the sums of the norms.
    #[test]
    fn ten_thousand_ranks_are_counted_by_the_models_own_code() {
        let h = 400;
        let config = json!({
            "model_type": "gpt2", "vocab_size": 100, "n_embd": h, "n_head": 100, "n_layer": 3, "n_positions": 8,
        });
        let config = Config::from_json(&config).unwrap();
        let line = dry_layer(&config, "x=10000".parse().unwrap(), alone(Scheme::OneD)).unwrap();
        assert_eq!(line.peers, [(Axis::X, 9_999)]);
        let square = dry_layer(&config, "x=100,y=100".parse().unwrap(), alone(Scheme::Summa)).unwrap();
        assert_eq!(square.peers, [(Axis::X, 99), (Axis::Y, 99)]);
        let m = square.tokens as f64;
        let flows = layer_flows(&config.shape(), Scheme::Summa, Grid { x: 100, y: 100, z: 1 }, m);
        let formula: f64 = flows.iter().map(|flow| flow.elements).sum();
        // Two norms: eight numbers a token, summed over the row. There are fewer tokens than ranks, so
        // the last rank sums none of them and receives each once.
        let norms = 8.0 * m / 100.0;
        assert!((square.received as f64 - formula - norms).abs() <= 1e-6, "{square:?}");
    }

    /// Experts, one for every token among them: what the model's own code receives for a layer is the
    /// formula, the sums of norms apart.
    #[test]
    fn experts_are_counted_by_the_models_own_code() {
        let config = json!({
            "model_type": "qwen2_moe", "vocab_size": 64, "hidden_size": 96, "num_attention_heads": 24,
            "num_hidden_layers": 2, "intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48,
            "max_position_embeddings": 24,
        });
        let config = Config::from_json(&config).unwrap();
        for (scheme, text, grid) in [
            (Scheme::OneD, "x=4", Grid { x: 4, y: 1, z: 1 }),
            (Scheme::OneDSequence, "x=4", Grid { x: 4, y: 1, z: 1 }),
            (Scheme::Summa, "x=2,y=4", Grid { x: 2, y: 4, z: 1 }),
            (Scheme::ThreeD, "x=2,y=2,z=2", Grid { x: 2, y: 2, z: 2 }),
            (Scheme::WeightStationary, "x=2,y=4", Grid { x: 2, y: 4, z: 1 }),
        ] {
            let found = dry_layer(&config, text.parse().unwrap(), alone(scheme)).unwrap();
            let m = found.tokens as f64;
            let flows = layer_flows(&config.shape(), scheme, grid, m);
            let formula: f64 = flows.iter().map(|flow| flow.elements).sum();
            // Two RMSNorms over columns that are cut: one sum there, a pair back, an all-reduce each.
            let sums = |n: usize, tokens: f64| 2.0 * 3.0 * 2.0 * (n as f64 - 1.0) / n as f64 * tokens;
            let norms = match scheme {
                Scheme::OneD | Scheme::OneDSequence => 0.0,
                Scheme::ThreeD => sums(2, m / 4.0),
                Scheme::WeightStationary => sums(2, m) + sums(4, m),
                _ => sums(4, m / 2.0),
            };
            // The 13 sums of the balance do not divide by the ranks.
            let apart = found.received as f64 - formula - norms;
            assert!(apart.abs() <= 8.0, "{scheme} on {text}: {apart} of {found:?}");
        }
    }
}
