//! Peers and bytes against the number of ranks, for `docs/cost-model.md`: the table and the plot
//! there are this file's output, which a test compares.

use super::volume::{Flow, Grid, Laid, crossing, peers};
use super::{ModelShape, expert_flows, pool_flows};
use crate::{Axis, MeshShape, Parts, Scheme};
use std::fmt::Write;

/// Ranks of the table and the plot.
const RANKS: [usize; 8] = [4, 16, 64, 256, 1024, 4096, 10_000, 65_536];

/// What a rank receives for one layer of `model` over x, y and z, forward and backward, when a
/// microbatch has `m` tokens. A router's scores and choices count as elements.
pub fn layer_flows(model: &ModelShape, scheme: Scheme, grid: Grid, m: f64) -> [Flow; 3] {
    let mesh = MeshShape::SOLO.with(Axis::X, grid.x).with(Axis::Y, grid.y).with(Axis::Z, grid.z);
    mixed_flows(model, (scheme, Parts::default()), &mesh, m)
}

/// The same where parts of the layer have schemes of their own. Parts that no mesh combines
/// (`Parts::check`) receive nothing for their way in and out.
pub fn mixed_flows(
    model: &ModelShape,
    (scheme, parts): (Scheme, Parts),
    mesh: &MeshShape,
    m: f64,
) -> [Flow; 3] {
    let mut sums = [Flow::default(); 3];
    let mut add = |flows: [Flow; 3]| sums.iter_mut().zip(flows).for_each(|(sum, flow)| sum.add(flow));
    for pair in model.pairs() {
        let own = parts.of(*pair, scheme);
        for (half, product) in model.products(*pair, m) {
            add(Laid::new(mesh, scheme, own).volume(product, half).by_axis());
        }
        let way = crossing(mesh, scheme, own, m * model.width as f64).unwrap_or_default();
        add(way);
        add(way);
    }
    let Some(mixture) = &model.mixture else { return sums };
    let flows = expert_flows(mixture, model.width, (scheme, mesh), m);
    let pool = pool_flows(mixture, scheme, mesh);
    for (sum, axis) in sums.iter_mut().zip([Axis::X, Axis::Y, Axis::Z]) {
        for flow in [flows.forward, flows.backward].map(|way| way[axis as usize]) {
            sum.add(flow.rows);
            sum.add(flow.words);
        }
        sum.add(pool[axis as usize]);
    }
    sums
}

/// All ranks as one tensor mesh, in every scheme: the squarest plane, the cube with fewest peers,
/// and for 2.5D the depth, no more than rows, at which `model` moves least.
pub fn pure_grids(model: &ModelShape, ranks: usize, m: f64) -> Vec<(Scheme, Grid)> {
    let layered = |z: usize| {
        let (x, y) = squarest(ranks / z);
        Grid { x, y, z }
    };
    let layers: Vec<Grid> = (1..=ranks).filter(|z| ranks.is_multiple_of(*z)).map(layered).collect();
    let plane = layered(1);
    let elements = |grid: &Grid| -> f64 {
        layer_flows(model, Scheme::TwoPointFiveD, *grid, m).iter().map(|flow| flow.elements).sum()
    };
    let deep = layers.iter().filter(|grid| (2..=grid.x).contains(&grid.z));
    let deep = deep.min_by(|a, b| elements(a).total_cmp(&elements(b))).copied().unwrap_or(plane);
    let cube = layers.iter().min_by_key(|grid| peers(**grid)).copied().unwrap_or(plane);
    vec![
        (Scheme::OneD, Grid { x: ranks, y: 1, z: 1 }),
        (Scheme::Summa, plane),
        (Scheme::TwoPointFiveD, deep),
        (Scheme::ThreeD, cube),
        (Scheme::WeightStationary, plane),
    ]
}

/// (rows, columns) nearest to a square, rows no more than columns.
fn squarest(n: usize) -> (usize, usize) {
    let x = (1..=n.isqrt()).rev().find(|x| n.is_multiple_of(*x)).unwrap_or(1);
    (x, n / x)
}

/// The layer of the formulas, 12 h^2 weights, and as many tokens as it is wide.
fn classic() -> (ModelShape, f64) {
    let h = 12_288;
    let model = ModelShape {
        layers: 1,
        width: h,
        heads: 96,
        kv_heads: 96,
        head_dim: 128,
        ffn: 4 * h,
        gated: false,
        vocab: 1,
        tied: true,
        mixture: None,
    };
    (model, h as f64)
}

/// (grid, elements received for a layer in units of b s h) of every scheme.
fn points(ranks: usize) -> Vec<(Scheme, Grid, f64)> {
    let (model, m) = classic();
    let bsh = m * model.width as f64;
    let of = |(scheme, grid)| {
        let elements: f64 = layer_flows(&model, scheme, grid, m).iter().map(|flow| flow.elements).sum();
        (scheme, grid, elements / bsh)
    };
    pure_grids(&model, ranks, m).into_iter().map(of).collect()
}

/// The table of `docs/cost-model.md`.
pub fn table() -> String {
    let mut out = String::from("| ranks |");
    for (scheme, ..) in points(4) {
        let _ = write!(out, " {} |", title(scheme));
    }
    out += &format!("\n|{}\n", "---:|".repeat(6));
    for ranks in RANKS {
        let _ = write!(out, "| {ranks} |");
        for (_, grid, received) in points(ranks) {
            let _ = write!(out, " {}: {} peers, {received:.3} |", sizes(grid), peers(grid));
        }
        out.push('\n');
    }
    out
}

fn sizes(grid: Grid) -> String {
    let sizes = [grid.x, grid.y, grid.z];
    let sizes: Vec<String> = sizes.iter().filter(|size| **size > 1).map(usize::to_string).collect();
    sizes.join(" x ")
}

/// A scheme as people call it.
pub fn title(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::OneD | Scheme::OneDSequence => "1D",
        Scheme::Summa => "2D SUMMA",
        Scheme::TwoPointFiveD => "2.5D",
        Scheme::ThreeD => "3D",
        Scheme::WeightStationary => "2D weight-stationary",
    }
}

const COLOURS: [&str; 5] = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2"];
const PANEL: (f64, f64) = (380.0, 300.0);

/// One panel: both axes logarithmic.
struct Panel {
    left: f64,
    title: &'static str,
    /// Decades of the vertical axis.
    decades: (i32, i32),
}

impl Panel {
    fn x(&self, ranks: f64) -> f64 {
        self.left + PANEL.0 * (ranks.log10() / 5.0)
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = (self.decades.0 as f64, self.decades.1 as f64);
        40.0 + PANEL.1 * (1.0 - (value.log10() - low) / (high - low))
    }

    fn frame(&self, out: &mut String) {
        let (left, right) = (self.left, self.left + PANEL.0);
        let _ = writeln!(out, "<text x=\"{left}\" y=\"24\" font-weight=\"bold\">{}</text>", self.title);
        for decade in self.decades.0..=self.decades.1 {
            let (y, label) = (self.y(10f64.powi(decade)), 10f64.powi(decade));
            let _ = writeln!(
                out,
                "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                left - 6.0,
                y + 4.0
            );
        }
        for decade in 0..=5 {
            let x = self.x(10f64.powi(decade));
            let bottom = 40.0 + PANEL.1;
            let _ = writeln!(
                out,
                "<path d=\"M{x:.1} 40V{bottom}\" stroke=\"#ddd\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                10u32.pow(decade as u32)
            );
        }
    }

    fn line(&self, out: &mut String, colour: &str, points: &[(f64, f64)]) {
        let path: Vec<String> = points
            .iter()
            .map(|(ranks, value)| format!("{:.1},{:.1}", self.x(*ranks), self.y(*value)))
            .collect();
        let path = path.join(" ");
        let _ = writeln!(
            out,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        );
    }
}

/// `docs/cost-model.svg`.
pub fn svg() -> String {
    let mut out = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 900 440\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"900\" height=\"440\" fill=\"white\"/>\n",
    );
    let panels = [
        Panel { left: 60.0, title: "peers of a rank", decades: (0, 5) },
        Panel { left: 500.0, title: "elements received for a layer / bsh, h = bs", decades: (-2, 2) },
    ];
    panels.iter().for_each(|panel| panel.frame(&mut out));
    let all: Vec<_> = RANKS.iter().map(|ranks| (*ranks as f64, points(*ranks))).collect();
    for (i, colour) in COLOURS.iter().enumerate() {
        let peers: Vec<_> = all.iter().map(|(ranks, points)| (*ranks, peers(points[i].1) as f64)).collect();
        let received: Vec<_> = all.iter().map(|(ranks, points)| (*ranks, points[i].2)).collect();
        panels[0].line(&mut out, colour, &peers);
        panels[1].line(&mut out, colour, &received);
        let (x, name) = (60.0 + 170.0 * i as f64, title(all[0].1[i].0));
        let _ = writeln!(
            out,
            "<path d=\"M{x} 404h24\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{}\" y=\"408\">{name}</text>",
            x + 30.0
        );
    }
    out += "<text x=\"450\" y=\"376\" text-anchor=\"middle\">ranks</text>\n</svg>\n";
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");

    #[test]
    fn the_table_and_the_plot_in_docs_are_these() {
        let page = std::fs::read_to_string(format!("{DOCS}/cost-model.md")).unwrap();
        let kept = page.split("<!-- table -->").nth(1).expect("the table stands between two marks");
        let remedy = "run `cargo run -p dist --example cost_model`";
        assert!(kept.trim() == table().trim(), "{remedy}");
        assert!(std::fs::read_to_string(format!("{DOCS}/cost-model.svg")).unwrap() == svg(), "{remedy}");
    }

    #[test]
    fn ten_thousand_ranks_are_a_square_and_nearly_a_cube() {
        let found: Vec<_> = points(10_000).into_iter().map(|(_, grid, _)| peers(grid)).collect();
        assert_eq!((found[0], found[1], found[3], found[4]), (9_999, 198, 62, 198));
    }
}
