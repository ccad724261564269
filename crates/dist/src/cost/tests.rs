//! Formulas per transformer layer, rectangles, memory and choices.

use super::*;
use crate::pipeline::Schedule;
use crate::{Axis, MeshShape, Parts, Scheme};

/// The layer all published formulas are for: four h x 4h-like products, 12 h^2 weights.
fn classic(h: usize) -> ModelShape {
    ModelShape {
        layers: 1,
        width: h,
        heads: h / 64,
        kv_heads: h / 64,
        head_dim: 64,
        ffn: 4 * h,
        gated: false,
        vocab: 50257,
        tied: true,
        mixture: None,
    }
}

/// Elements a rank receives for one layer, forward and backward.
fn layer(model: &ModelShape, scheme: Scheme, grid: Grid, m: f64) -> f64 {
    let products = model.pairs().iter().flat_map(|pair| model.products(*pair, m));
    products.map(|(half, product)| volume(scheme, grid, product, half).elements()).sum()
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs(), "{found} is not {expected}");
}

#[test]
fn layers_cost_what_the_formulas_say() {
    let (h, m) = (4096.0, 6144.0);
    let model = classic(4096);
    let (bsh, hh) = (m * h, h * h);
    for q in [1usize, 2, 3, 8, 20, 100] {
        let f = q as f64;
        let square = Grid { x: q, y: q, z: 1 };
        let cube = Grid { x: q, y: q, z: q };
        let line = Grid { x: q * q, y: 1, z: 1 };
        let p = f * f;
        close(layer(&model, Scheme::OneD, line, m), 8.0 * (p - 1.0) / p * bsh);
        let summa = |d: f64| 3.0 * (f - 1.0) / p * (7.0 * bsh / d + 12.0 * hh);
        close(layer(&model, Scheme::Summa, square, m), summa(1.0));
        for z in [1usize, 2, 5] {
            let d = z as f64;
            let depth = 2.0 * (d - 1.0) / d * 12.0 * hh / p;
            close(layer(&model, Scheme::TwoPointFiveD, Grid { z, ..square }, m), summa(d) + depth);
        }
        close(layer(&model, Scheme::WeightStationary, square, m), 32.0 * (f - 1.0) / p * bsh);
        let three = 2.0 * (f - 1.0) / f.powi(3) * (16.0 * bsh + 12.0 * hh);
        close(layer(&model, Scheme::ThreeD, cube, m), three);
    }
}

#[test]
fn flat_meshes_are_the_lower_dimension() {
    let model = ModelShape { kv_heads: 8, gated: true, ffn: 11008, ..classic(4096) };
    let m = 4096.0;
    for p in [2usize, 6, 16] {
        let one_d = layer(&model, Scheme::OneD, Grid { x: p, y: 1, z: 1 }, m);
        close(layer(&model, Scheme::WeightStationary, Grid { x: 1, y: p, z: 1 }, m), one_d);
        close(layer(&model, Scheme::ThreeD, Grid { x: 1, y: p, z: 1 }, m), one_d);
        let plane = Grid { x: 3, y: p, z: 1 };
        let summa = layer(&model, Scheme::Summa, plane, m);
        close(layer(&model, Scheme::TwoPointFiveD, plane, m), summa);
        let stationary = layer(&model, Scheme::WeightStationary, plane, m);
        // 3D without its first axis: x plays z.
        close(layer(&model, Scheme::ThreeD, Grid { x: 1, y: p, z: 3 }, m), stationary);
    }
}

#[test]
fn rectangles_move_each_operand_by_its_own_axis() {
    let product = Product { m: 120.0, k: 60.0, n: 240.0 };
    let found = summa(Grid { x: 2, y: 5, z: 1 }, product).by_axis();
    close(found[0].elements, 3.0 * 1.0 * 60.0 * 240.0 / 10.0);
    close(found[1].elements, 3.0 * 4.0 * 120.0 * 60.0 / 10.0);
    assert_eq!(found[0].calls, 30.0, "ten panels, three passes");
}

/// An H100-like node of eight.
pub(super) fn cluster() -> Cluster {
    let link =
        |latency_us: f64, gb: f64| Link { latency_s: latency_us * 1e-6, call_s: 0.0, bytes_per_s: gb * 1e9 };
    Cluster {
        node_devices: 8,
        device_bytes: 80.0 * (1u64 << 30) as f64,
        flops_per_s: 600e12,
        device_bytes_per_s: 3e12,
        host_bytes: 200.0 * (1u64 << 30) as f64,
        host_bytes_per_s: 40e9,
        host_link: link(10.0, 50.0),
        intra: link(3.0, 400.0),
        inter: link(10.0, 45.0),
        pace: Pace::nominal(600e12, 3e12),
    }
}

fn gpt3() -> ModelShape {
    ModelShape { layers: 96, heads: 96, kv_heads: 96, head_dim: 128, ..classic(12288) }
}

pub(super) fn small() -> (ModelShape, Batch) {
    (ModelShape { layers: 8, ..classic(1024) }, Batch { rows: 64, context: 1024 })
}

fn solo() -> Plan {
    Plan {
        mesh: MeshShape::SOLO,
        scheme: Scheme::OneD,
        parts: Parts::default(),
        zero: Zero::One,
        schedule: Schedule::OneFOneB,
        microbatch_rows: 4,
        recompute: false,
        offload: Offload::default(),
    }
}

#[test]
fn gpt3_has_its_parameters() {
    let billions = gpt3().params() / 1e9;
    assert!((174.0..176.0).contains(&billions), "{billions}");
}

#[test]
fn one_rank_talks_to_nobody_and_waits_for_nobody() {
    let (model, batch) = small();
    let price = price(&model, batch, &cluster(), &solo()).unwrap();
    assert_eq!(price.peers(), 0);
    let seconds = price.seconds;
    assert_eq!(price.step(), seconds.compute + seconds.optimizer);
    assert!(price.step() > model.step_flops(batch) / cluster().flops_per_s);
}

#[test]
fn peers_are_rows_and_columns() {
    let (model, batch) = (gpt3(), Batch { rows: 1024, context: 2048 });
    let mesh = MeshShape::SOLO.with(Axis::X, 16).with(Axis::Y, 48);
    let plan = Plan { mesh, microbatch_rows: 64, scheme: Scheme::Summa, ..solo() };
    assert_eq!(price(&model, batch, &cluster(), &plan).unwrap().peers(), 15 + 47);
    let hundred = Grid { x: 100, y: 100, z: 1 };
    assert_eq!(peers(hundred), 99 + 99);
    assert_eq!(peers(Grid { x: 10_000, y: 1, z: 1 }), 9_999);
}

#[test]
fn memory_falls_with_what_each_choice_gives_away() {
    let (model, batch) = small();
    let device = |plan: Plan| price(&model, batch, &cluster(), &plan).unwrap().memory.device();
    let mesh = MeshShape::SOLO.with(Axis::Fsdp, 8);
    let stages = [Zero::One, Zero::Two, Zero::Three].map(|zero| device(Plan { mesh, zero, ..solo() }));
    assert!(stages[0] > stages[1] && stages[1] > stages[2], "{stages:?}");
    assert!(device(solo()) > device(Plan { recompute: true, ..solo() }));
    let offload = Offload { optimizer: true, activations: true };
    let price = price(&model, batch, &cluster(), &Plan { offload, ..solo() }).unwrap();
    close(price.memory.host + price.memory.device() - device(solo()), {
        // Two layers of activations stay on the device while they travel.
        let kept = price.memory.host - model.params() * STATE_BYTES.optimizer;
        2.0 * kept / 8.0
    });
}

/// Stages that share have several microbatches under way: sums travel with each, and so do weights, there
/// and back unless a way back follows its way there.
#[test]
fn stages_that_share_more_hold_less_and_exchange_more() {
    let (model, batch) = small();
    let mesh = MeshShape::SOLO.with(Axis::Pp, 2).with(Axis::Fsdp, 4);
    let of = |zero, schedule| {
        let plan = Plan { mesh, zero, schedule, microbatch_rows: 4, ..solo() };
        price(&model, batch, &cluster(), &plan).unwrap()
    };
    let bytes = |zero, schedule| of(zero, schedule).traffic[Axis::Fsdp as usize].bytes;
    // The layers of the first stage and the table of one end; 4 microbatches.
    let (layers, table, a) = (model.slice_layers(batch.context, 2).0 as f64, model.table_params(), 4.0);
    let part = 3.0 / 4.0 * (layers * 12.0 * 1024.0 * 1024.0 + table);
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        close(bytes(Zero::One, schedule), part * (4.0 + 2.0));
        let tied = 3.0 / 4.0 * table * 4.0;
        close(bytes(Zero::Two, schedule), part * (a * 4.0 + 2.0) + tied);
        let gathered = bytes(Zero::Three, schedule) - part * a * 4.0 - tied;
        match schedule {
            Schedule::GPipe => close(gathered, part * 2.0 * a * 2.0),
            _ => assert!(gathered > part * a * 2.0 && gathered < part * 2.0 * a * 2.0),
        }
        let held = [Zero::One, Zero::Two, Zero::Three].map(|zero| of(zero, schedule).memory.device());
        assert!(held[0] > held[1] && held[1] > held[2], "{held:?}");
    }
    // Norms lie in every fourth of these stripes: they take others along, never more than all.
    let (once, twice) = (bytes(Zero::Two, Schedule::OneFOneB), bytes(Zero::Two, Schedule::ZeroBubble));
    assert!(twice > once && twice < 2.0 * once, "{once} {twice}");
    assert_eq!(bytes(Zero::One, Schedule::OneFOneB), bytes(Zero::One, Schedule::ZeroBubble));
    // A search asks for more sharing only where less does not fit.
    for schedule in [Schedule::GPipe, Schedule::Interleaved { chunks: 2 }, Schedule::ZeroBubble] {
        let steps = [Zero::One, Zero::Two, Zero::Three].map(|zero| of(zero, schedule).step());
        assert!(steps.is_sorted(), "{schedule}: {steps:?}");
    }
}

#[test]
fn a_stage_that_waits_leaves_its_processor_to_others() {
    // Of 8 layers' worth of work the last stage has 5: the head is as large as 4 layers.
    let (model, batch) = (ModelShape { layers: 4, ..small().0 }, Batch { rows: 8, context: 1024 });
    let mesh = MeshShape::SOLO.with(Axis::Pp, 4);
    let plan = Plan { mesh, microbatch_rows: 1, ..solo() };
    let on = |sharing: f64| {
        let mut shared = cluster();
        shared.pace.sharing = sharing;
        price(&model, batch, &shared, &plan).unwrap().seconds
    };
    let (own, two, four) = (on(1.0), on(2.0), on(4.0));
    assert!(own.compute == two.compute && own.compute == four.compute, "the work is the same");
    assert!(own.bubble > own.compute, "one of four works nearly all the time: {own:?}");
    // Two processors: the longest chain goes at twice the pace at best, and is still longer than all work; at
    // worst what is not of it runs beside none of it.
    let (chain, whole) = ((own.compute + own.bubble) / 2.0, two.compute + two.bubble);
    assert!(whole >= chain && whole <= two.compute + chain / 2.0, "{two:?}, a chain of {chain}");
    // One processor: it is never idle.
    close(1.0 + four.bubble, 1.0);
    assert!(four.optimizer < own.optimizer, "ends have an embedding more than the stages between");
}

#[test]
fn plans_that_cannot_run_say_why() {
    let (model, batch) = small();
    let refused = |plan: Plan| price(&model, batch, &cluster(), &plan).unwrap_err().to_string();
    let wide = MeshShape::SOLO.with(Axis::X, 32);
    assert!(refused(Plan { mesh: wide, ..solo() }).contains("cuts 16 heads into 32"));
    let deep = MeshShape::SOLO.with(Axis::Pp, 16);
    assert!(refused(Plan { mesh: deep, ..solo() }).contains("16 pipeline slices"));
    let many = MeshShape::SOLO.with(Axis::Dp, 128);
    assert!(refused(Plan { mesh: many, ..solo() }).contains("share 64 rows"));
    let plane = MeshShape::SOLO.with(Axis::X, 2).with(Axis::Y, 2);
    assert!(refused(Plan { mesh: plane, ..solo() }).contains("scheme `1d` has no use for mesh axis y = 2"));
    let rows = MeshShape::SOLO.with(Axis::X, 8).with(Axis::Y, 2);
    let plan = Plan { mesh: rows, scheme: Scheme::Summa, ..solo() };
    assert!(refused(plan).contains("cuts the 4 rows"));
}

#[test]
fn the_choice_is_the_cheapest_of_all_plans_and_always_the_same() {
    let (model, batch) = small();
    let space = Space { devices: 24, mesh: None, offload: true };
    let decision = search(&model, batch, &cluster(), space).unwrap();
    assert_eq!(decision, search(&model, batch, &cluster(), space).unwrap());
    assert_eq!(decision.best.plan.mesh.world_size(), 24);
    for contender in decision.contenders.iter().filter_map(|contender| contender.best) {
        assert!(contender.step() >= decision.best.step());
        assert!(contender.fits(&cluster()));
        let again = price(&model, batch, &cluster(), &contender.plan).unwrap();
        assert_eq!(again, contender, "a search prices as `price` does");
    }
    for variation in decision.variations {
        let better = variation.price.is_ok_and(|p| p.fits(&cluster()) && p.step() < decision.best.step());
        assert!(!better, "{} would be better", variation.what);
    }
}

/// Against pricing every plan there is: with room, and with so little that few fit.
#[test]
fn plans_that_are_left_early_are_not_the_best() {
    let (model, batch) = small();
    for (devices, gib) in [(2, 80.0), (4, 80.0), (8, 80.0), (8, 0.5)] {
        let cluster = Cluster { device_bytes: gib * (1u64 << 30) as f64, ..cluster() };
        let found = search(&model, batch, &cluster, Space { devices, mesh: None, offload: false });
        // A search leaves plain 1D out, and rows cut shorter than 256 tokens.
        let tried = |price: &Price| {
            let (mesh, scheme) = (price.plan.mesh, price.plan.scheme);
            (scheme != Scheme::OneD || mesh.grid().size() == 1) && mesh.size(Axis::Cp) <= 4
        };
        let best = every(&model, batch, &cluster, devices).into_iter().find(tried);
        assert_eq!(
            found.map_or(0.0, |found| found.best.step()),
            best.unwrap().step(),
            "{devices}, {gib} GiB"
        );
    }
    let space = Space { devices: 260, mesh: None, offload: true };
    let on = |devices| search(&model, batch, &cluster(), Space { devices, ..space }).unwrap().best;
    let best = [256, 240].map(on).into_iter().min_by(|a, b| a.step().total_cmp(&b.step()));
    assert_eq!(fewer(&model, batch, &cluster(), space, f64::INFINITY), best);
    assert_eq!(fewer(&model, batch, &cluster(), space, 0.0), None);
}

/// Three tokens a column and slow links: attention wants SUMMA, the feed-forward part weight-stationary
/// products.
#[test]
fn a_plane_is_mixed_where_its_parts_want_different_schemes() {
    let (model, batch) = (ModelShape { layers: 4, ..small().0 }, Batch { rows: 8, context: 384 });
    let mesh = MeshShape::SOLO.with(Axis::X, 8).with(Axis::Y, 8);
    let mut slow = cluster();
    slow.pace.beside = false;
    slow.intra = Link { latency_s: 0.0, call_s: 0.0, bytes_per_s: 1e9 };
    slow.inter = slow.intra;
    let space = Space { devices: 64, mesh: Some(mesh), offload: false };
    let decision = search(&model, batch, &slow, space).unwrap();
    let plan = decision.best.plan;
    let parts = [Pair::Attention, Pair::Mlp].map(|part| plan.scheme_of(part));
    assert_eq!(parts, [Scheme::Summa, Scheme::WeightStationary], "{plan:?}");
    let named = |what: &str| decision.variations.iter().find(|changed| changed.what == what);
    let alone = named("summa").unwrap().price.as_ref().unwrap();
    assert!(alone.step() > decision.best.step());
    let heads = named("weight-stationary").unwrap().price.as_ref().unwrap_err();
    assert!(heads.to_string().contains("cuts 16 heads into 64"), "{heads}");
    // What a layer adds to the bytes over x and y is what `mixed_flows` says, which tests of the model count.
    let bytes = |layers| {
        let price = price(&ModelShape { layers, ..model }, batch, &slow, &plan).unwrap();
        [Axis::X, Axis::Y].map(|axis| price.traffic[axis as usize].bytes)
    };
    let flows = mixed_flows(&model, (plan.scheme, plan.parts), &mesh, 3072.0);
    assert!(!plan.recompute, "nothing asks for it");
    for ((two, one), flow) in bytes(2).iter().zip(bytes(1)).zip(flows) {
        close(two - one, 2.0 * flow.elements);
    }
}

#[test]
fn a_part_that_cannot_lie_beside_the_stream_is_no_plan() {
    let (model, batch) = (ModelShape { width: 1000, ..small().0 }, small().1);
    let mesh = MeshShape::SOLO.with(Axis::X, 2).with(Axis::Y, 3);
    let parts = Parts { attention: None, ffn: Some(Scheme::WeightStationary) };
    let plan = Plan { mesh, scheme: Scheme::Summa, parts, microbatch_rows: 6, ..solo() };
    let refused = price(&model, batch, &cluster(), &plan).unwrap_err().to_string();
    assert!(refused.contains("width 1000 does not divide into the 6 pieces"), "{refused}");
}

#[test]
fn what_does_not_fit_is_told_what_would() {
    let batch = Batch { rows: 1024, context: 2048 };
    let space = Space { devices: 16, mesh: None, offload: false };
    let refused = search(&gpt3(), batch, &cluster(), space).unwrap_err();
    assert!(refused.least.is_some_and(|least| least.memory.device() > cluster().device_bytes));
    assert!(refused.offload_helps || refused.devices.is_some());
}
