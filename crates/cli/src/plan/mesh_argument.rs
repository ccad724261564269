//! `--mesh pp=8,x=4` to sizes of axes.

use dist::Axis;
use dist::cost::MeshShape;

pub fn parse(text: &str) -> Result<MeshShape, String> {
    let mut mesh = MeshShape::SOLO;
    for part in text.split(',') {
        let (name, size) = part.split_once('=').ok_or_else(|| format!("`{part}` is not like x=4"))?;
        let axis = Axis::ALL.into_iter().find(|axis| axis.name() == name.trim());
        let axis = axis.ok_or_else(|| format!("no axis `{name}`; axes are pp dp fsdp cp ep x y z"))?;
        let size: usize = size.trim().parse().map_err(|_| format!("`{size}` is no number of ranks"))?;
        if !(1..=1 << 20).contains(&size) {
            return Err(format!("{name} = {size}: an axis has 1 to 1048576 ranks"));
        }
        if mesh.size(axis) > 1 {
            return Err(format!("axis `{name}` stands twice"));
        }
        mesh = mesh.with(axis, size);
    }
    let ranks = Axis::ALL.iter().try_fold(1usize, |product, axis| product.checked_mul(mesh.size(*axis)));
    match ranks {
        Some(ranks) if ranks <= 1 << 20 => Ok(mesh),
        _ => Err(format!("`{text}` has more than 1048576 ranks")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_named() {
        assert_eq!(parse("ep=8,dp=2").unwrap().replicas(), 16);
        let mesh = parse("pp=8, x=4").unwrap();
        assert_eq!((mesh.size(Axis::Pp), mesh.size(Axis::X), mesh.world_size()), (8, 4, 32));
        for (text, want) in [
            ("q=2", "no axis `q`"),
            ("x", "not like x=4"),
            ("x=0", "1 to 1048576"),
            ("x=two", "no number"),
            ("x=2,x=4", "stands twice"),
            ("x=1048576,y=1048576,z=1048576,pp=1048576", "more than"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.contains(want), "{text}: {refused}");
        }
    }
}
