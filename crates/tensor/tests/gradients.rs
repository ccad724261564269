//! Every op's way back against finite differences of its way there, in f32.

mod common;

use common::{Batch, Keep, MAX_T, Net, grad, set};
use tensor::{DType, GeluKind, ParamRef, ParamStore, normal};

/// Step along a direction whose elements are standard normal: small enough for the fourth-order
/// formula, large enough that rounding of the loss (1e-7) stays small beside what it moves.
const STEP: f32 = 2e-3;
/// Allowed difference over the norm of the gradient: 8e-4 is the worst seen, a sign or a factor gone
/// wrong is near 1.
const TOLERANCE: f64 = 5e-3;
/// Directions tried for each parameter.
const DIRECTIONS: u64 = 4;

fn total(net: &Net, store: &mut ParamStore, batch: &Batch) -> f64 {
    net.evaluate(store, batch).iter().map(|loss| *loss as f64).sum()
}

/// Slope of the summed loss along `direction` by a fourth-order central difference.
fn slope(net: &Net, store: &mut ParamStore, batch: &Batch, param: ParamRef, direction: &[f32]) -> f64 {
    let weight = store.weight(param).f32().to_vec();
    let mut at = |steps: f32| {
        let moved = weight.iter().zip(direction).map(|(w, d)| w + steps * STEP * d);
        set(store, param, &moved.collect::<Vec<_>>());
        total(net, store, batch)
    };
    let (near, far) = (at(1.0) - at(-1.0), at(2.0) - at(-2.0));
    set(store, param, &weight);
    (8.0 * near - far) / (12.0 * STEP as f64)
}

fn check(what: &str, net: &Net, batch: &Batch) {
    let mut store = net.store(DType::F32);
    net.train(&mut store, batch, 1.0, Keep::All);
    let mut worst = (0f64, String::new());
    for param in store.refs() {
        let (name, grad) = (store.spec(param).name.clone(), grad(&store, param));
        let norm = grad.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{what}: nothing flows to {name}");
        for seed in 0..DIRECTIONS {
            let direction: Vec<f32> = (0..grad.len()).map(|i| normal(seed, &name, i as u64)).collect();
            let expected: f64 = grad.iter().zip(&direction).map(|(g, d)| *g as f64 * *d as f64).sum();
            let found = slope(net, &mut store, batch, param, &direction);
            let apart = (found - expected).abs() / norm;
            assert!(apart < TOLERANCE, "{what}: {name}: slope {found}, by the gradient {expected}");
            if apart > worst.0 {
                worst = (apart, name.clone());
            }
        }
    }
    println!("{what}: {:.1e} ({})", worst.0, worst.1);
}

#[test]
fn rows_of_one_document() {
    check("tanh", &Net::new(GeluKind::Tanh, false), &Batch::random(2, 21, 1));
}

#[test]
fn rows_of_several_documents() {
    check("documents", &Net::new(GeluKind::Erf, false), &Batch::random(2, 21, 2).cut(&[8, 1, 7]));
}

#[test]
fn tied_head() {
    check("tied", &Net::new(GeluKind::Tanh, true), &Batch::random(1, 21, 3).cut(&[13]));
}

#[test]
fn rows_longer_than_a_block_of_attention() {
    check("long", &Net::new(GeluKind::Tanh, false), &Batch::random(1, MAX_T, 4).cut(&[150, 3]));
}

#[test]
fn rows_shorter_than_a_vector() {
    check("short", &Net::new(GeluKind::Erf, false), &Batch::random(3, 3, 5));
}
