//! What goes together in one run. Recipes and plans ask the same rules, so that nothing is planned that
//! training refuses.

use crate::{Axis, FlowError, MeshShape, Parts, Scheme};

/// What a run is spread by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Combination {
    /// Ranks along each axis.
    pub mesh: MeshShape,
    /// How products are distributed; none: as the axes say.
    pub scheme: Option<Scheme>,
    /// Schemes of parts of a layer that have their own.
    pub parts: Parts,
    /// Tokens a row.
    pub context: usize,
}

/// Choices that no run combines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Clash {
    /// An axis the scheme would leave idle, or schemes that do not go together.
    #[error(transparent)]
    Idle(#[from] FlowError),
    /// Rows that are too short to be cut.
    #[error(
        "mesh.cp = {ranks} cuts rows of train.context = {context} tokens into {runs} runs: lower mesh.cp, or train longer rows"
    )]
    Context {
        /// Ranks of the context axis.
        ranks: usize,
        /// Tokens a row.
        context: usize,
        /// Pieces of a row: each rank takes an early and a late one.
        runs: usize,
    },
}

impl Combination {
    /// Refuses what no run combines, whatever the model.
    pub fn check(&self) -> Result<(), Clash> {
        let size = |axis| self.mesh.size(axis);
        if let Some(scheme) = self.scheme {
            scheme.check(&self.mesh)?;
        }
        self.parts.check(&self.mesh, self.scheme.unwrap_or_else(|| Scheme::of(&self.mesh)))?;
        let (ranks, context) = (size(Axis::Cp), self.context);
        let runs = 2 * ranks;
        if ranks > 1 && runs > context {
            return Err(Clash::Context { ranks, context, runs });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(mesh: &str, scheme: Option<Scheme>) -> String {
        let mesh = mesh.parse().unwrap();
        let parts = Parts::default();
        let checked = Combination { mesh, scheme, parts, context: 8 }.check();
        checked.map_or_else(|clash| clash.to_string(), |()| "runs".to_string())
    }

    #[test]
    fn what_clashes_is_named() {
        for (mesh, scheme, want) in [
            ("solo", None, "runs"),
            ("pp=2,fsdp=2", None, "runs"),
            ("pp=2,ep=2", None, "runs"),
            ("cp=4", None, "runs"),
            ("cp=5", None, "mesh.cp = 5 cuts rows of train.context = 8 tokens into 10 runs"),
            ("x=2,y=2", Some(Scheme::Summa), "runs"),
            ("x=2,y=2", Some(Scheme::OneD), "has no use for mesh axis y = 2"),
        ] {
            let said = said(mesh, scheme);
            assert!(said.contains(want), "{mesh}: {said}");
        }
    }

    #[test]
    fn parts_that_lie_too_far_from_the_stream_are_named() {
        let said = |mesh: &str, ffn| {
            let parts = Parts { ffn: Some(ffn), ..Parts::default() };
            let mesh = mesh.parse().unwrap();
            let checked = Combination { mesh, scheme: None, parts, context: 8 }.check();
            checked.map_or_else(|clash| clash.to_string(), |()| "runs".to_string())
        };
        assert_eq!(said("x=2,y=2", Scheme::WeightStationary), "runs");
        assert!(said("x=2,y=2", Scheme::OneD).contains("`1d` has no use for mesh axis y = 2"));
        let apart = said("x=2,y=2,z=2", Scheme::TwoPointFiveD);
        assert!(apart.contains("[rows over x,y; columns over z], that of scheme `2.5d` as"), "{apart}");
    }
}
