//! The mesh as one rank sees it: its place, its groups, and who carries their messages.

use crate::beside::Lane;
use crate::call::Place;
use crate::traffic::Counts;
use crate::{Axis, Communicator, Coords, Group, MeshError, MeshShape};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The ranks of a run along their axes, as seen from one of them. Cheap to clone.
#[derive(Clone)]
pub struct Mesh {
    own: Arc<Own>,
}

struct Own {
    shape: MeshShape,
    rank: usize,
    communicator: Communicator,
    place: Arc<Place>,
    lane: Arc<Lane>,
    /// By name.
    groups: Mutex<BTreeMap<String, Group>>,
}

impl Mesh {
    /// A mesh of one rank.
    pub fn solo() -> Mesh {
        let communicator = Communicator::Solo;
        Mesh::new(MeshShape::SOLO, communicator).expect("one rank has one place")
    }

    /// The rank that `communicator` speaks for, at its place in `shape`.
    pub fn new(shape: MeshShape, communicator: Communicator) -> Result<Mesh, MeshError> {
        shape.expect_ranks(communicator.world_size())?;
        let place = communicator.place();
        let rank = communicator.rank();
        let groups = Mutex::new(BTreeMap::new());
        Ok(Mesh { own: Arc::new(Own { shape, rank, communicator, place, lane: Arc::default(), groups }) })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &MeshShape {
        &self.own.shape
    }

    /// Our number among all ranks.
    pub fn rank(&self) -> usize {
        self.own.rank
    }

    /// All ranks.
    pub fn world_size(&self) -> usize {
        self.own.shape.world_size()
    }

    /// Our place.
    pub fn coords(&self) -> Coords {
        self.own.shape.coords(self.own.rank)
    }

    /// Ranks along an axis.
    pub fn size(&self, axis: Axis) -> usize {
        self.own.shape.size(axis)
    }

    /// Our place along an axis.
    pub fn coord(&self, axis: Axis) -> usize {
        self.coords().on(axis)
    }

    /// Who carries the messages.
    pub fn communicator(&self) -> &Communicator {
        &self.own.communicator
    }

    /// The ranks that share all our coordinates but the one on `axis`.
    pub fn group(&self, axis: Axis) -> Group {
        self.named(axis.name(), || self.own.shape.ranks_over(self.own.rank, &[axis]))
    }

    /// The ranks that share all our coordinates but those on `axes`; members stand in ascending
    /// order of rank. `Axis::ALL` is the whole world.
    pub fn group_over(&self, axes: &[Axis]) -> Group {
        let names = Axis::ALL.into_iter().filter(|axis| axes.contains(axis)).map(Axis::name);
        let name = names.collect::<Vec<_>>().join("+");
        self.named(&name, || self.own.shape.ranks_over(self.own.rank, axes))
    }

    /// A group that no axes describe, like both ends of a pipeline: these ranks in ascending order,
    /// ourselves among them. Every member asks for it with the same name, which no axes have.
    pub fn group_of(&self, name: &str, ranks: &[usize]) -> Group {
        assert!(ranks.is_sorted_by(|a, b| a < b), "ranks of `{name}` ascend: {ranks:?}");
        assert!(ranks.last().is_some_and(|last| *last < self.world_size()), "ranks of `{name}` exist");
        let group = self.named(name, || ranks.to_vec());
        assert_eq!(group.ranks(), ranks, "`{name}` names one group of ranks");
        group
    }

    fn named(&self, name: &str, ranks: impl FnOnce() -> Vec<usize>) -> Group {
        let mut groups = self.own.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(name) {
            return group.clone();
        }
        let group = Group::new(&self.own.communicator, name, ranks(), self.own.lane.clone());
        groups.insert(name.to_string(), group.clone());
        group
    }

    /// Say which training step and layer we are in; messages about late ranks name them.
    pub fn set_place(&self, step: u64, layer: Option<u32>) {
        self.own.place.set(step, layer);
    }

    /// The same within the step said last.
    pub fn set_layer(&self, layer: u32) {
        self.own.place.set(self.own.place.step(), Some(layer));
    }

    /// What we have communicated over each set of axes so far.
    pub fn counts(&self) -> Vec<Counts> {
        let groups = self.own.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().filter(|group| group.size() > 1).map(Group::counts).collect()
    }
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mesh({}, rank {})", self.own.shape, self.own.rank)
    }
}
