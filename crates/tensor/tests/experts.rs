//! Experts: every parameter's gradient, the router's and the balance's included, against finite
//! differences; and what the ops must not depend on.

use std::convert::Infallible;
use std::sync::Arc;
use tensor::{
    DType, Device, Init, Order, ParamList, ParamRef, ParamSpec, ParamStore, Real, Router, Tape, Targets,
    Tensor, Var, normal,
};

const V: usize = 23;
const D: usize = 12;
const F: usize = 10;
const M: usize = 17;

/// Embedding, a shared expert and routed ones, head.
struct Net {
    list: ParamList,
    embedding: ParamRef,
    route: ParamRef,
    experts: (ParamRef, ParamRef),
    shared: (ParamRef, ParamRef),
    gate: ParamRef,
    head: ParamRef,
    router: Router,
}

impl Net {
    fn new(router: Router) -> Net {
        let mut list = ParamList::default();
        let mut add = |name: &str, rows: usize, cols: usize, std: f32| {
            let (name, shape) = (name.to_string(), vec![rows, cols]);
            list.add(ParamSpec { name, shape, init: Init::Normal(std), decay: true })
        };
        let e = router.experts;
        let embedding = add("embedding", V, D, 1.0);
        let route = add("route", e, D, 1.0);
        let experts = (add("gate_up", e * 2 * F, D, 0.4), add("down", e * D, F, 0.4));
        let shared = (add("shared.gate_up", 2 * F, D, 0.4), add("shared.down", D, F, 0.4));
        let (gate, head) = (add("gate", 1, D, 0.3), add("head", V, D, 0.5));
        Net { list, embedding, route, experts, shared, gate, head, router }
    }

    fn store(&self, dtype: DType) -> ParamStore {
        let mut store = ParamStore::new(Device::Cpu, dtype, &self.list).unwrap();
        store.enable_grads().unwrap();
        let put = |param, first, values: &[f32]| {
            let values = Tensor::from_f32(values, DType::F32, &[values.len()]).unwrap();
            store.set_weights(param, first, values.view()).unwrap();
            Ok::<_, Infallible>(())
        };
        self.list.initial_values(11, put).unwrap();
        store
    }

    /// Sum of the losses of all tokens, and of the balance.
    fn loss(&self, store: &mut ParamStore, train: bool) -> f64 {
        let ids: Arc<[u32]> = (0..M as u32).map(|i| i * 7 % V as u32).collect();
        let targets: Vec<u32> = (0..M as u32).map(|i| i * 5 % V as u32).collect();
        store.clear_grads().unwrap();
        let mut tape = if train { Tape::recording(store) } else { Tape::running(store) };
        let x = tape.embedding(&[(ids, self.embedding)]).unwrap();
        let (weights, order) = route(&mut tape, &x, self);
        let rows = tape.permute(&x, &order).unwrap();
        let rows = tape.experts(&rows, &order.starts, self.experts).unwrap();
        let y = tape.combine(&rows, &weights, &order, Some(&x)).unwrap();
        let everyone = Arc::new(Order::all(M));
        let scores = tape.scores(&x, self.gate).unwrap();
        let gate = tape.sigmoid(&scores).unwrap();
        let rows = tape.experts(&x, &everyone.starts, self.shared).unwrap();
        let y = tape.combine(&rows, &gate, &everyone, Some(&y)).unwrap();
        let losses = tape.head_loss(&y, self.head, Targets { ids: &targets, scale: 1.0 }).unwrap();
        let balance = tape.balance_loss;
        if train {
            tape.backward().unwrap();
        }
        drop(tape);
        store.settle_grads().unwrap();
        losses.to_f32().iter().map(|loss| f64::from(*loss)).sum::<f64>() + balance
    }
}

fn route(tape: &mut Tape<'_>, x: &Var, net: &Net) -> (Var, Arc<Order>) {
    let scores = tape.scores(x, net.route).unwrap();
    let (weights, ids) = tape.route(&scores, net.router, &Real::first(M), &|_| Ok(())).unwrap();
    (weights, Arc::new(Order::new(&ids, net.router.experts, net.router.choices)))
}

fn check(router: Router) {
    let net = Net::new(router);
    let mut store = net.store(DType::F32);
    net.loss(&mut store, true);
    let grads: Vec<Vec<f32>> = store.refs().map(|param| store.grad(param).f32().to_vec()).collect();
    for param in store.refs() {
        let (name, grad) = (store.spec(param).name.clone(), &grads[param.index()]);
        let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "nothing flows to {name}");
        let weight = store.weight(param).f32().to_vec();
        for seed in 0..3 {
            let direction: Vec<f32> = (0..grad.len()).map(|i| normal(seed, &name, i as u64)).collect();
            // Short steps: at a longer one a token would choose another expert.
            let mut at = |step: f32| {
                let moved: Vec<f32> = weight.iter().zip(&direction).map(|(w, d)| w + step * d).collect();
                let moved = Tensor::from_f32(&moved, DType::F32, &[moved.len()]).unwrap();
                store.set_weights(param, 0, moved.view()).unwrap();
                net.loss(&mut store, false)
            };
            let step = 1e-3;
            let found =
                (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step as f64);
            let expected: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let apart = (found - expected).abs() / norm;
            assert!(apart < 1e-2, "{router:?} {name}: slope {found}, by the gradient {expected}");
            let original = Tensor::from_f32(&weight, DType::F32, &[weight.len()]).unwrap();
            store.set_weights(param, 0, original.view()).unwrap();
        }
    }
}

#[test]
fn gradients_are_the_slopes() {
    for (experts, choices, normalise, balance) in
        [(4, 2, true, 0.0), (4, 2, false, 3.0), (5, 1, false, 0.5), (3, 3, true, 2.0)]
    {
        check(Router { experts, choices, normalise, balance });
    }
}

#[test]
fn the_same_bits_every_time_and_nothing_is_dropped() {
    for dtype in [DType::F32, DType::Bf16] {
        let net = Net::new(Router { experts: 4, choices: 2, normalise: true, balance: 1.0 });
        let run = || {
            let mut store = net.store(dtype);
            let loss = net.loss(&mut store, true);
            (loss.to_bits(), store.all_grads().bytes().to_vec())
        };
        assert!(run() == run());
    }
    let order = Order::new(&[2, 0, 0, 2, 2, 1], 4, 2);
    assert_eq!(*order.starts, [0, 2, 3, 6, 6]);
    assert_eq!(order.pair_of, [1, 2, 5, 0, 3, 4]);
    assert_eq!(order.token_of, [0, 1, 2, 0, 1, 2]);
    assert!((0..6).all(|pair| order.pair_of[order.slot_of[pair] as usize] as usize == pair));
}

#[test]
fn even_loads_have_the_least_balance_loss() {
    // Every expert as likely as any other: E sum over e of (k / E) (1 / E) = k.
    let net = Net::new(Router { experts: 4, choices: 2, normalise: true, balance: 1.0 });
    let mut store = net.store(DType::F32);
    let zeros = Tensor::zeros(Device::Cpu, DType::F32, &[4 * D]).unwrap();
    store.set_weights(net.route, 0, zeros.view()).unwrap();
    let ids: Arc<[u32]> = (0..M as u32).collect();
    let mut tape = Tape::running(&mut store);
    let x = tape.embedding(&[(ids, net.embedding)]).unwrap();
    route(&mut tape, &x, &net);
    assert!((tape.balance_loss - 2.0).abs() < 1e-6, "{}", tape.balance_loss);
}
