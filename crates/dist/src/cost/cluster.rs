//! What devices and links can do. Where numbers were not measured they are nominal, and whatever is
//! computed from them is predicted.

use super::volume::Flow;
use crate::{Axis, MeshShape};

/// A link as seen by one device: a message of n bytes takes alpha + n / rate, and a call of several devices
/// something beside its messages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Seconds until the first byte arrives, alpha.
    pub latency_s: f64,
    /// Seconds of a call beside its hops, however many ranks it has: what ranks that read each other's memory
    /// take to meet.
    pub call_s: f64,
    /// Bytes a second each way, 1 / beta.
    pub bytes_per_s: f64,
}

/// Equal devices in equal nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// Devices of a node.
    pub node_devices: usize,
    /// Memory of a device.
    pub device_bytes: f64,
    /// What products reach on a device, not its data sheet.
    pub flops_per_s: f64,
    /// Rate of a device's memory.
    pub device_bytes_per_s: f64,
    /// Host memory, a device's share.
    pub host_bytes: f64,
    /// Rate of host memory, a device's share.
    pub host_bytes_per_s: f64,
    /// Between a device and its host, each way.
    pub host_link: Link,
    /// Between devices of a node.
    pub intra: Link,
    /// Between devices of different nodes.
    pub inter: Link,
    /// What a device does beside products.
    pub pace: Pace,
}

/// What a device reaches outside products, and how its work shares it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// FLOPs a second of attention: softmax runs between its two products.
    pub attention_flops_per_s: f64,
    /// Bytes a second of operands that are packed before a product; infinite where products read them
    /// as they lie.
    pub packed_bytes_per_s: f64,
    /// Bytes a second of what products write beside that; infinite: not counted.
    pub written_bytes_per_s: f64,
    /// Bytes a second of the residual stream that pass through norms.
    pub norm_bytes_per_s: f64,
    /// Bytes a second of other values that pass through memory outside products.
    pub element_bytes_per_s: f64,
    /// Logits a second of the loss and its gradient beside the head's products; infinite: not counted.
    pub logits_per_s: f64,
    /// Bytes a second that copies read and write: what travels is laid out for it, and again where it comes.
    pub moved_bytes_per_s: f64,
    /// Bytes a second of terms that a sum over ranks adds, beside their way; infinite: not counted.
    pub summed_bytes_per_s: f64,
    /// Bytes a second of memory that comes and goes with what ranks share; infinite: not counted.
    pub fresh_bytes_per_s: f64,
    /// Bytes a second the optimizer reads and writes.
    pub update_bytes_per_s: f64,
    /// Whether messages travel beside computation. Where the cores that compute also copy them, every
    /// message shows.
    pub beside: bool,
    /// Ranks that share a core: while one waits, the others are the faster for it.
    pub sharing: f64,
}

/// Rate of attention as part of the rate of products, where it was not measured.
const ATTENTION_RATE: f64 = 0.6;

impl Pace {
    /// Of a device that was not measured: one that multiplies at `flops_per_s`, whose memory gives
    /// `bytes_per_s`, and which sends and receives while it computes.
    pub fn nominal(flops_per_s: f64, bytes_per_s: f64) -> Pace {
        Pace {
            attention_flops_per_s: ATTENTION_RATE * flops_per_s,
            packed_bytes_per_s: f64::INFINITY,
            written_bytes_per_s: f64::INFINITY,
            norm_bytes_per_s: bytes_per_s,
            element_bytes_per_s: bytes_per_s,
            logits_per_s: f64::INFINITY,
            moved_bytes_per_s: bytes_per_s,
            summed_bytes_per_s: f64::INFINITY,
            fresh_bytes_per_s: f64::INFINITY,
            update_bytes_per_s: bytes_per_s,
            beside: true,
            sharing: 1.0,
        }
    }
}

impl Link {
    /// Seconds of a flow of `element_bytes` elements.
    pub fn seconds(&self, flow: Flow, element_bytes: f64) -> f64 {
        flow.hops * self.latency_s
            + flow.calls * self.call_s
            + flow.elements * element_bytes / self.bytes_per_s
    }
}

impl Cluster {
    /// The link that bounds a collective over `axis`: ranks are numbered with z fastest, so the
    /// group stays inside a node when its stride times its size fits one. A group that leaves a
    /// node goes at the pace of the link between nodes.
    pub fn link(&self, mesh: &MeshShape, axis: Axis) -> &Link {
        self.link_of(mesh.stride(axis) * mesh.size(axis))
    }

    /// The link that bounds a group within `span` consecutive ranks.
    pub fn link_of(&self, span: usize) -> &Link {
        if span <= self.node_devices && self.node_devices.is_multiple_of(span) {
            &self.intra
        } else {
            &self.inter
        }
    }
}
