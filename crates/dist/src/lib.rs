//! Mesh, layouts, communicators and the distributed matmul. Knows no layers.
