//! The distributed matmul: one entry, one algorithm per kind of mesh.

use crate::Mesh;
use tensor::Fault;
use tensor::{ParamRef, Tape, Var};

/// y = x W^T (+ bias) (+ residual) for x [M, K], W [N, K], laid out as `product` allows.
/// On a mesh of one that is the plain product.
pub fn matmul(
    tape: &mut Tape<'_>,
    mesh: &Mesh,
    x: &Var,
    (weight, bias): (ParamRef, Option<ParamRef>),
    residual: Option<&Var>,
) -> Result<Var, Fault> {
    assert_eq!(mesh.world_size(), 1, "no product is cut among ranks yet: {mesh:?}");
    tape.linear(x, weight, bias, residual)
}
