use crate::rows::rows_per_task;
use crate::simd::{Float, Open};
use device::{View, ViewMut};

pub(super) fn route(logits: &mut [f32], e: usize, ids: &mut [u32], weights: &mut [f32], normalise: bool) {
    let tokens = logits.len() / e;
    if tokens == 0 {
        return;
    }
    let k = ids.len() / tokens;
    device::for_each_part((logits, e), (&mut [] as &mut [u8], 0), |_, row, _| softmax(row));
    let probabilities = &*logits;
    device::for_each_part((ids, k), (weights, k), |token, ids, weights| {
        let row = &probabilities[token * e..][..e];
        choose(row, ids);
        let chosen = |id: &u32| row[*id as usize];
        let sum: f32 = if normalise { ids.iter().map(chosen).sum() } else { 1.0 };
        weights.iter_mut().zip(&*ids).for_each(|(weight, id)| *weight = chosen(id) / sum);
    });
}

fn softmax(row: &mut [f32]) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = (*x - top).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// The likeliest, by insertion: k is small. A row that is not finite chooses the first experts; the
/// loss will say so.
fn choose(row: &[f32], ids: &mut [u32]) {
    let mut held = 0;
    for (expert, p) in row.iter().enumerate() {
        let place = (0..held).find(|i| *p > row[ids[*i] as usize]).unwrap_or(held);
        if place < ids.len() {
            held = (held + 1).min(ids.len());
            ids[place..held].rotate_right(1);
            ids[place] = expert as u32;
        }
    }
}

pub(super) fn route_backward(
    probabilities: &[f32],
    ids: &[u32],
    dweights: &[f32],
    pull: &[f32],
    normalise: bool,
    dlogits: &mut [f32],
) {
    let e = pull.len();
    let tokens = probabilities.len() / e.max(1);
    let k = ids.len() / tokens.max(1);
    device::for_each_part((dlogits, e), (&mut [] as &mut [u8], 0), |token, out, _| {
        let row = &probabilities[token * e..][..e];
        let (ids, dweights) = (&ids[token * k..][..k], &dweights[token * k..][..k]);
        out.copy_from_slice(pull);
        let chosen = |id: &u32| row[*id as usize];
        let sum: f32 = if normalise { ids.iter().map(chosen).sum() } else { 1.0 };
        // w_j = p_j / sum, so dp_j = (dw_j - sum over i of dw_i w_i) / sum.
        let mean: f32 = match normalise {
            true => ids.iter().zip(dweights).map(|(id, dw)| dw * chosen(id) / sum).sum(),
            false => 0.0,
        };
        ids.iter().zip(dweights).for_each(|(id, dw)| out[*id as usize] += (dw - mean) / sum);
        let inner: f32 = out.iter().zip(row).map(|(dp, p)| dp * p).sum();
        out.iter_mut().zip(row).for_each(|(dp, p)| *dp = p * (*dp - inner));
    });
}

pub(super) fn combine(
    rows: View<'_>,
    d: usize,
    slot_of: &[u32],
    weights: Option<&[f32]>,
    residual: Option<View<'_>>,
    y: ViewMut<'_>,
) {
    let tokens = y.len() / d.max(1);
    let (k, each) = (slot_of.len() / tokens.max(1), rows_per_task(d));
    by_dtype!(rows, T => {
        let (rows, residual) = (T::open(rows), residual.map(T::open));
        device::for_each_part((T::open_mut(y), each * d), (&mut [] as &mut [u8], 0), |i, out, _| {
            let mut sum = vec![0f32; d];
            for (r, out) in out.chunks_exact_mut(d).enumerate() {
                let token = i * each + r;
                match residual {
                    Some(residual) => widen(&residual[token * d..][..d], &mut sum),
                    None => sum.fill(0.0),
                }
                for pair in token * k..(token + 1) * k {
                    let weight = weights.map_or(1.0, |weights| weights[pair]);
                    add(weight, &rows[slot_of[pair] as usize * d..][..d], &mut sum);
                }
                narrow(1.0, &sum, out);
            }
        });
    });
}

pub(super) fn combine_backward(
    dy: View<'_>,
    d: usize,
    pair_of: &[u32],
    (weights, choices): (&[f32], usize),
    rows: View<'_>,
    drows: ViewMut<'_>,
    dweights: &mut [f32],
) {
    let each = rows_per_task(d);
    by_dtype!(rows, T => {
        let (dy, rows) = (T::open(dy), T::open(rows));
        device::for_each_part((T::open_mut(drows), each * d), (dweights, each), |i, out, dweights| {
            let mut wide = vec![0f32; d];
            for (r, (out, dweight)) in out.chunks_exact_mut(d).zip(dweights).enumerate() {
                let slot = i * each + r;
                let pair = pair_of[slot] as usize;
                widen(&dy[pair / choices * d..][..d], &mut wide);
                *dweight = dot(&wide, &rows[slot * d..][..d]);
                narrow(weights[pair], &wide, out);
            }
        });
    });
}

multiversion! {
    fn widen<T: Float>(x: &[T], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x.to_f32());
    }
}

multiversion! {
    fn add<T: Float>(weight: f32, x: &[T], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x.to_f32());
    }
}

multiversion! {
    fn narrow<T: Float>(weight: f32, x: &[f32], out: &mut [T]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = T::from_f32(weight * x));
    }
}

fn dot<T: Float>(a: &[f32], b: &[T]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b.to_f32()).sum()
}
