//! Passes that are set aside, of several microbatches at once, and gradients of weights that wait: the bits
//! of passes that run to their end.

mod common;

use common::{Batch, Keep, Net};
use tensor::{DType, GeluKind, ParamStore, Phase, Tape};

fn grads(store: &ParamStore) -> Vec<u8> {
    store.all_grads().bytes().to_vec()
}

fn batches() -> [Batch; 3] {
    [Batch::random(2, 20, 8), Batch::random(2, 20, 9), Batch::random(2, 20, 10)]
}

/// Gradients of three microbatches, each run to its end.
fn one_by_one(net: &Net, dtype: DType, keep: Keep) -> Vec<u8> {
    let mut store = net.store(dtype);
    for batch in batches() {
        net.train(&mut store, &batch, 0.1, keep);
    }
    grads(&store)
}

#[test]
fn passes_under_way_at_once_and_sums_that_wait_change_no_bit() {
    // A tied head would add its gradient on the way forward.
    let net = Net::new(GeluKind::Tanh, false);
    for dtype in [DType::F32, DType::Bf16] {
        for keep in [Keep::All, Keep::Blocks, Keep::Nested] {
            let wanted = one_by_one(&net, dtype, keep);
            for waits in [false, true] {
                let mut store = net.store(dtype);
                let mut tape = Tape::recording(&mut store);
                let passes: Vec<_> = batches()
                    .iter()
                    .map(|batch| {
                        net.losses(&mut tape, batch, 0.1, keep).unwrap();
                        tape.set_aside(None, None)
                    })
                    .collect();
                let mut later = Vec::new();
                for pass in passes {
                    match waits {
                        false => drop(tape.walk_back(pass, None).unwrap()),
                        true => later.push(tape.walk_back_inputs(pass, None).unwrap().1),
                    }
                }
                later.into_iter().for_each(|later| tape.form(later).unwrap());
                drop(tape);
                assert!(grads(&store) == wanted, "{dtype} {keep:?}, waits: {waits}");
            }
        }
    }
}

/// Every product's weights wait, and nothing of theirs is written until they are formed; moments say so.
#[test]
fn gradients_that_wait_are_not_written_before() {
    let (net, batch) = (Net::new(GeluKind::Erf, false), Batch::random(2, 20, 11));
    let mut store = net.store(DType::F32);
    store.clear_grads().unwrap();
    let mut written = Vec::new();
    let mut watch = |moment: &tensor::Moment<'_>, _: &mut ParamStore| {
        if moment.phase == Phase::Backward && moment.writes_grads {
            written.extend(moment.params.iter().map(|param| (moment.op, *param)));
        }
        Ok(())
    };
    let mut tape = Tape::recording(&mut store).watched_by(&mut watch);
    net.losses(&mut tape, &batch, 0.1, Keep::All).unwrap();
    let pass = tape.set_aside(None, None);
    let (dx, later) = tape.walk_back_inputs(pass, None).unwrap();
    assert!(dx.is_none(), "the pass began with parameters");
    // q|k|v, out, gate|up, down; q|k|v, out, up, down.
    assert_eq!(later.len(), 8);
    let weights: Vec<_> =
        tape.params.refs().filter(|param| tape.params.spec(*param).name.ends_with(".weight")).collect();
    // Marks that a write would replace.
    let all = 0..tape.params.flat_len();
    tape.params.arrays_mut().view_mut(memory::Class::Grad, all).f32().fill(7.0);
    for param in &weights {
        assert!(tape.params.grad(*param).f32().iter().all(|x| *x == 7.0));
    }
    tape.form(later).unwrap();
    for param in &weights {
        assert!(tape.params.grad(*param).f32().iter().any(|x| *x != 7.0), "{param:?} was not formed");
    }
    drop(tape);
    for param in weights {
        let of: Vec<_> = written.iter().filter(|(_, written)| *written == param).collect();
        assert_eq!(of.len(), 1, "{param:?} is written once, when it is formed");
    }
}
