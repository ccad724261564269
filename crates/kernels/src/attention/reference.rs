//! Attention in f64 with the whole matrix of scores, and its gradients by the chain rule.

use super::{Mask, Seen, Shape};

/// (out [b*t, n*h], lse [b, n, t]) of packed qkv [b*s, (n+2k)*h]; queries are the last t tokens.
pub(super) fn forward(shape: &Shape, qkv: &[f64], mask: &Mask<'_>, scale: f64) -> (Vec<f64>, Vec<f64>) {
    let Shape { b, t, s, n, k, h } = *shape;
    let ld = (n + 2 * k) * h;
    let token = |row: usize, p: usize| &qkv[(row * s + p) * ld..][..ld];
    let rows = |first: usize| (0..b).flat_map(move |row| (first..s).map(move |p| (row, p)));
    let q: Vec<f64> = rows(s - t).flat_map(|(row, p)| token(row, p)[..n * h].to_vec()).collect();
    let kv: Vec<f64> = rows(0).flat_map(|(row, p)| token(row, p)[n * h..].to_vec()).collect();
    part(shape, (&q, &kv), &Seen::last(*mask, t, s), scale)
}

/// (out [b*t, n*h], lse [b, n, t]) of q [b*t, n*h] and k | v [b*s, 2k*h], wherever they stand.
pub(super) fn part(
    shape: &Shape,
    (q, kv): (&[f64], &[f64]),
    seen: &Seen<'_>,
    scale: f64,
) -> (Vec<f64>, Vec<f64>) {
    let Shape { b, t, s, n, k, h } = *shape;
    let (mut out, mut lse) = (vec![0.0; b * t * n * h], vec![f64::NEG_INFINITY; b * n * t]);
    for (row, head, i) in
        (0..b).flat_map(|row| (0..n).flat_map(move |head| (0..t).map(move |q| (row, head, q))))
    {
        let kv_head = head / (n / k);
        let query = &q[((row * t + i) * n + head) * h..][..h];
        let key = |p: usize| &kv[((row * s + p) * 2 * k + kv_head) * h..][..h];
        let value = |p: usize| &kv[((row * s + p) * 2 * k + k + kv_head) * h..][..h];
        // Key by key, by its place alone.
        let place = seen.queries.at(i);
        let document = seen.mask.starts.map_or(0, |starts| starts[row * t + i] as usize);
        let sees = |p: &usize| {
            let key = seen.keys.at(*p);
            key <= place && key >= document && seen.mask.window.is_none_or(|window| place - key < window)
        };
        let keys: Vec<usize> = (0..s).filter(sees).collect();
        let scores: Vec<f64> =
            keys.iter().map(|p| scale * query.iter().zip(key(*p)).map(|(a, b)| a * b).sum::<f64>()).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x - top).exp()).sum();
        if scores.is_empty() {
            continue;
        }
        lse[(row * n + head) * t + i] = top + sum.ln();
        for (p, score) in keys.iter().zip(&scores) {
            let weight = (score - top).exp() / sum;
            let out = &mut out[((row * t + i) * n + head) * h..][..h];
            out.iter_mut().zip(value(*p)).for_each(|(o, v)| *o += weight * v);
        }
    }
    (out, lse)
}
