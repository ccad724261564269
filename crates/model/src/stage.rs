//! Which part of a model a rank of a pipeline has: slices, each a run of layers. The first slice
//! also embeds, the last one has the final norm and the head.

use crate::{Config, ConfigError};
use dist::pipeline::balance;
use dist::{Axis, Flow};
use std::ops::Range;

/// A run of layers that one rank walks at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Layers, by their numbers in the model.
    pub layers: Range<usize>,
    /// Whether the model begins here, with the embedding.
    pub first: bool,
    /// Whether it ends here, with the final norm and the head.
    pub last: bool,
}

/// What one rank has of a model, slice by slice; all of it where nothing is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// In the order a microbatch walks them.
    pub slices: Vec<Slice>,
}

impl Stage {
    /// The whole model.
    pub fn whole(layers: usize) -> Stage {
        Stage { slices: vec![Slice { layers: 0..layers, first: true, last: true }] }
    }

    /// This rank's slices of a model for rows of `context` tokens: its layers are cut so that the FLOPs
    /// of the most costly slice, the head's among them, are as few as they can be. Slice i belongs to
    /// stage i mod pp.
    pub fn of(config: &Config, context: usize, flow: &Flow) -> Result<Stage, ConfigError> {
        let (stages, chunks) = (flow.mesh.size(Axis::Pp), flow.schedule.chunks());
        let layers = config.layers();
        if stages == 1 {
            return Ok(Stage::whole(layers));
        }
        let (costs, head) = config.layer_flops(context);
        let slices = stages * chunks;
        let too_few = || ConfigError::Stages { layers, stages, chunks };
        let cut = balance(&costs, head, slices).ok_or_else(too_few)?;
        let own = cut.into_iter().enumerate().filter(|(i, _)| i % stages == flow.mesh.coord(Axis::Pp));
        let slice = |(i, layers)| Slice { layers, first: i == 0, last: i + 1 == slices };
        Ok(Stage { slices: own.map(slice).collect() })
    }

    /// Whether the embedding is here.
    pub fn is_first(&self) -> bool {
        self.slices.iter().any(|slice| slice.first)
    }

    /// Whether the head is here.
    pub fn is_last(&self) -> bool {
        self.slices.iter().any(|slice| slice.last)
    }

    /// Layers that are here, in order.
    pub fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.slices.iter().flat_map(|slice| slice.layers.clone())
    }

    /// Its only slice: everything. Panics on a stage of a pipeline, which nobody asks for all of it.
    pub(crate) fn only(&self) -> &Slice {
        let [slice] = self.slices.as_slice() else { panic!("{self:?} is not a whole model") };
        assert!(slice.first && slice.last, "{self:?} is not a whole model");
        slice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dist::pipeline::Schedule;
    use dist::{Communicator, Mesh, Scheme};
    use serde_json::json;

    /// Slices of all stages in the order of the model, each with its stage.
    fn cut(layers: usize, vocab: usize, stages: usize, chunks: usize) -> Vec<(usize, Slice)> {
        let config = json!({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": 64, "num_attention_heads": 4,
            "num_hidden_layers": layers, "intermediate_size": 160,
        });
        let config = Config::from_json(&config).unwrap();
        let shape = dist::MeshShape::new(&[(Axis::Pp, stages)]).unwrap();
        let mut all = Vec::new();
        for stage in 0..stages {
            let mesh = Mesh::new(shape, Communicator::null(stage, stages)).unwrap();
            let schedule = Schedule::Interleaved { chunks };
            let flow = Flow::new(&mesh, Scheme::OneD).unwrap().scheduled(schedule);
            let own = Stage::of(&config, 128, &flow).unwrap();
            assert_eq!((own.is_first(), own.is_last()), (stage == 0, stage + 1 == stages));
            all.extend(own.slices.into_iter().map(|slice| (stage, slice)));
        }
        all.sort_by_key(|(_, slice)| slice.layers.start);
        all
    }

    #[test]
    fn slices_go_round_the_stages_and_cover_every_layer_once() {
        let all = cut(9, 16, 3, 2);
        assert_eq!(all.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
        assert_eq!(
            all.iter().flat_map(|(_, slice)| slice.layers.clone()).collect::<Vec<_>>(),
            Vec::from_iter(0..9)
        );
        let ends: Vec<_> = all.iter().map(|(_, slice)| (slice.first, slice.last)).collect();
        assert_eq!((ends[0], ends[5]), ((true, false), (false, true)));
        assert!(ends[1..5].iter().all(|ends| *ends == (false, false)));
    }

    /// A layer has 4 64^2 + 3 64 160 = 47104 weights; this head as many as four layers.
    #[test]
    fn a_large_head_takes_layers_off_the_last_stage() {
        let lens =
            |vocab| cut(8, vocab, 2, 1).iter().map(|(_, slice)| slice.layers.len()).collect::<Vec<_>>();
        assert_eq!(lens(16), [4, 4]);
        assert_eq!(lens(4 * 47104 / 64), [6, 2]);
    }
}
