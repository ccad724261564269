//! Attention in f64 with the whole matrix of scores, and its gradients by the chain rule.

use super::{Mask, Shape};

/// (out [b*t, n*h], lse [b, n, t]) of packed qkv [b*s, (n+2k)*h]; queries are the last t tokens.
pub(super) fn forward(shape: &Shape, qkv: &[f64], mask: &Mask<'_>, scale: f64) -> (Vec<f64>, Vec<f64>) {
    let Shape { b, t, s, n, k, h } = *shape;
    let ld = (n + 2 * k) * h;
    let (mut out, mut lse) = (vec![0.0; b * t * n * h], vec![f64::NEG_INFINITY; b * n * t]);
    for (row, head, q) in
        (0..b).flat_map(|row| (0..n).flat_map(move |head| (0..t).map(move |q| (row, head, q))))
    {
        let kv = head / (n / k);
        let query = &qkv[(row * s + s - t + q) * ld + head * h..][..h];
        let (from, to) = mask.visible(shape, row, q);
        let key = |p: usize| &qkv[(row * s + p) * ld + (n + kv) * h..][..h];
        let value = |p: usize| &qkv[(row * s + p) * ld + (n + k + kv) * h..][..h];
        let scores: Vec<f64> =
            (from..to).map(|p| scale * query.iter().zip(key(p)).map(|(a, b)| a * b).sum::<f64>()).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x - top).exp()).sum();
        if scores.is_empty() {
            continue;
        }
        lse[(row * n + head) * t + q] = top + sum.ln();
        for (i, score) in scores.iter().enumerate() {
            let p = (score - top).exp() / sum;
            let out = &mut out[((row * t + q) * n + head) * h..][..h];
            out.iter_mut().zip(value(from + i)).for_each(|(o, v)| *o += p * v);
        }
    }
    (out, lse)
}
