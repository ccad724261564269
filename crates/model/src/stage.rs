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
