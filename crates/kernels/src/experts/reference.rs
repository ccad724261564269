//! The same in f64, a token at a time.

/// (probabilities [M, E], ids [M, k], weights [M, k]).
pub(super) fn route(logits: &[f64], e: usize, k: usize, normalise: bool) -> (Vec<f64>, Vec<u32>, Vec<f64>) {
    let (mut all, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for row in logits.chunks(e) {
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        let p: Vec<f64> = row.iter().map(|x| x.exp() / sum).collect();
        let mut order: Vec<usize> = (0..e).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        let share: f64 = if normalise { order[..k].iter().map(|i| p[*i]).sum() } else { 1.0 };
        ids.extend(order[..k].iter().map(|i| *i as u32));
        weights.extend(order[..k].iter().map(|i| p[*i] / share));
        all.extend(p);
    }
    (all, ids, weights)
}
