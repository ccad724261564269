//! What devices and links can do. Where numbers were not measured they are nominal, and whatever is
//! computed from them is predicted.

use super::MeshShape;
use super::volume::Flow;
use crate::Axis;

/// A link as seen by one device: a message of n bytes takes alpha + n / rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Seconds until the first byte arrives, alpha.
    pub latency_s: f64,
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
}

impl Link {
    /// Seconds of a flow of `element_bytes` elements.
    pub fn seconds(&self, flow: Flow, element_bytes: f64) -> f64 {
        flow.hops * self.latency_s + flow.elements * element_bytes / self.bytes_per_s
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
