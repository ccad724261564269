//! Models with experts: parameters, memory, traffic and choices.

use super::tests::cluster;
use super::*;
use crate::MeshShape;
use crate::pipeline::Schedule;
use crate::{Axis, Scheme};

/// Mixtral 8x7B.
fn mixtral() -> ModelShape {
    ModelShape {
        layers: 32,
        width: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        ffn: 0,
        gated: true,
        vocab: 32000,
        tied: false,
        mixture: Some(MixtureShape { experts: 8, choices: 2, ffn: 14336, shared_ffn: 0 }),
    }
}

const BATCH: Batch = Batch { rows: 1024, context: 4096 };

fn plan(axes: &[(Axis, usize)]) -> Plan {
    Plan {
        mesh: axes.iter().fold(MeshShape::SOLO, |mesh, (axis, size)| mesh.with(*axis, *size)),
        scheme: Scheme::OneDSequence,
        parts: Default::default(),
        zero: Zero::One,
        schedule: Schedule::OneFOneB,
        microbatch_rows: 2,
        recompute: true,
        offload: Offload::default(),
    }
}

fn priced(plan: &Plan) -> Price {
    price(&mixtral(), BATCH, &cluster(), plan).unwrap()
}

#[test]
fn a_token_meets_two_of_eight_experts() {
    let model = mixtral();
    let active = 32.0 * model.active_params() + 2.0 * model.table_params();
    assert!((46.6e9..46.8e9).contains(&model.params()), "{}", model.params());
    assert!((12.8e9..13.0e9).contains(&active), "{active}");
    let shared = MixtureShape { shared_ffn: 512, ..model.mixture.unwrap() };
    let both = ModelShape { ffn: 512, mixture: Some(shared), ..model };
    // A gated part of 512 and its gate of one row.
    assert_eq!(both.layer_params() - model.layer_params(), 4096.0 * (3.0 * 512.0 + 1.0));
    let m = (BATCH.rows * BATCH.context) as f64;
    let attention = 32.0 * 3.0 * model.attention_flops(m, BATCH.context);
    let products = 6.0 * m * (active - model.table_params());
    assert!((model.step_flops(BATCH) - products - attention).abs() < 1e-9 * products);
}

/// 4 (N - 1)/N M k D elements a layer and microbatch, half of them once more with recompute; beside them
/// the counts and the sums of the balance.
#[test]
fn experts_are_met_over_ep_as_the_formula_says() {
    let solo = plan(&[(Axis::Dp, 8)]);
    for n in [2usize, 4, 8] {
        let of = |recompute: bool| {
            let plan = Plan { recompute, ..plan(&[(Axis::Dp, 8 / n), (Axis::Ep, n)]) };
            (priced(&plan), plan)
        };
        let ((once, plan), (again, _)) = (of(false), of(true));
        let f = n as f64;
        let runs = 32.0 * plan.microbatches(BATCH) as f64;
        let rows = (f - 1.0) / f * (2.0 * 4096.0) * 2.0 * 4096.0;
        let words = (f - 1.0) / f * 8.0 + 2.0 * (f - 1.0) / f * 17.0;
        let held = memory_of(&plan);
        let gradients = 2.0 * (f - 1.0) / f * held * 4.0;
        let expected = |passes: f64| runs * (passes * rows * 2.0 + (passes - 2.0) / 2.0 * words * 4.0);
        for (price, passes) in [(&once, 4.0), (&again, 6.0)] {
            let found = price.traffic[Axis::Ep as usize];
            let want = expected(passes) + gradients;
            assert!((found.bytes - want).abs() < 1e-9 * want, "ep = {n}: {} is not {want}", found.bytes);
            assert_eq!(found.peers, n - 1);
        }
        assert!(once.seconds.experts > priced(&Plan { recompute: false, ..solo }).seconds.experts);
        let less = priced(&solo).memory.optimizer - again.memory.optimizer;
        let away = (1.0 - 1.0 / f) * 32.0 * 3.0 * 8.0 * 4096.0 * 14336.0 * STATE_BYTES.optimizer;
        assert!((less - away).abs() < 1e-9 * away, "ep = {n}: {less} is not {away}");
    }
}

/// Parameters but for the experts, which every replica has whole.
fn memory_of(plan: &Plan) -> f64 {
    let model = mixtral();
    assert_eq!(plan.mesh.grid().size(), 1);
    32.0 * (model.plain_params() + model.router_params()) + 2.0 * model.table_params()
}

/// Where axes cut tokens and not neurons experts are copies: SUMMA and 3D have more of them than 1D on as
/// many ranks, and sum their gradients.
#[test]
fn copies_of_experts_are_held_and_summed() {
    let of = |scheme, axes: &[(Axis, usize)]| priced(&Plan { scheme, microbatch_rows: 8, ..plan(axes) });
    let line = of(Scheme::OneDSequence, &[(Axis::X, 8)]);
    let plane = of(Scheme::Summa, &[(Axis::X, 2), (Axis::Y, 4)]);
    let cube = of(Scheme::ThreeD, &[(Axis::X, 2), (Axis::Y, 2), (Axis::Z, 2)]);
    let experts = 32.0 * 3.0 * 8.0 * 4096.0 * 14336.0;
    let (line, plane_bytes, cube) = (line.memory.weights, plane.memory.weights, cube.memory.weights);
    // Routers, a thousandth of a percent, lie the other way round.
    let more = experts * 2.0 * (1.0 / 4.0 - 1.0 / 8.0);
    assert!((plane_bytes - line - more).abs() < 1e-3 * more, "{plane_bytes} {line} {more}");
    assert!(cube - line > experts * 2.0 * (1.0 / 2.0 - 1.0 / 8.0));
    // Over x, beside what panels of attention move.
    assert!(plane.traffic[Axis::X as usize].bytes > experts / 4.0 * 4.0);
}

#[test]
fn plans_of_experts_that_cannot_run_say_why() {
    let refused =
        |model: &ModelShape, plan: &Plan| price(model, BATCH, &cluster(), plan).unwrap_err().to_string();
    let many = refused(&mixtral(), &plan(&[(Axis::Ep, 16)]));
    assert!(many.contains("ep = 16 ranks share the 8 experts"), "{many}");
    let none = refused(&ModelShape { mixture: None, ffn: 14336, ..mixtral() }, &plan(&[(Axis::Ep, 2)]));
    assert!(none.contains("share the 0 experts"), "{none}");
}

/// The choice is the cheapest of all meshes with and without `ep`, and no step towards another `ep` is
/// better.
#[test]
fn a_mixtral_finds_its_mesh_with_ep_among_the_axes() {
    let space = Space { devices: 64, mesh: None, offload: false };
    let model = mixtral();
    let decision = search(&model, BATCH, &cluster(), space).unwrap();
    assert_eq!(decision, search(&model, BATCH, &cluster(), space).unwrap());
    let best = &decision.best;
    assert_eq!(best.plan.mesh.world_size(), 64);
    assert!(best.fits(&cluster()));
    assert!(best.step() > model.step_flops(BATCH) / cluster().flops_per_s / 64.0);
    let again = price(&model, BATCH, &cluster(), &best.plan).unwrap();
    assert_eq!(again, *best, "a search prices as `price` does");
    let mut fit = 0;
    for ep in [1, 2, 4, 8] {
        for fsdp in [1, 2, 4, 8] {
            let mesh = MeshShape::SOLO.with(Axis::Ep, ep).with(Axis::Fsdp, fsdp);
            let mesh = mesh.with(Axis::Dp, 64 / ep / fsdp);
            let Ok(other) = search(&model, BATCH, &cluster(), Space { mesh: Some(mesh), ..space }) else {
                continue;
            };
            assert!(other.best.step() >= best.step(), "{mesh}");
            fit += 1;
        }
    }
    assert!(fit > 4, "{fit} meshes of replicas fit");
    let towards = decision.variations.iter().filter(|variation| variation.what.contains('='));
    assert!(towards.clone().count() > 0, "{:?}", decision.variations);
    for variation in towards {
        let better = variation.price.as_ref().is_ok_and(|p| p.fits(&cluster()) && p.step() < best.step());
        assert!(!better, "{} would be better", variation.what);
    }
}
