//! From logits to a token.

/// How a token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens that together hold this probability are drawn from; 1 takes all.
    pub top_p: f32,
    /// Only this many of the likeliest tokens are drawn from; 0 takes all.
    pub top_k: usize,
    /// Same seed, same text.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
}

/// Draws tokens, one after the other.
pub struct Sampler {
    sampling: Sampling,
    drawn: u64,
    /// (probability, token), kept between draws so that none allocates.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at its first draw.
    pub fn new(sampling: Sampling) -> Sampler {
        Sampler { sampling, drawn: 0, candidates: Vec::new() }
    }

    /// The next token from `logits` [V]. Equal logits fall to the lower id; NaN is never drawn.
    pub fn draw(&mut self, logits: &[f32]) -> u32 {
        let best = likeliest(logits);
        let u = uniform(self.sampling.seed, self.drawn);
        self.drawn += 1;
        if self.sampling.temperature <= 0.0 {
            return best;
        }
        let top = logits[best as usize];
        let scale = 1.0 / self.sampling.temperature;
        let weigh = |(id, x): (usize, &f32)| (((x - top) * scale).exp(), id as u32);
        self.candidates.clear();
        // A weight below 1e-9 of the likeliest would be drawn once in an age; leaving them out
        // makes the sort below short.
        let likely = logits.iter().enumerate().map(weigh).filter(|(p, _)| *p > 1e-9);
        self.candidates.extend(likely);
        self.candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        if self.sampling.top_k > 0 {
            self.candidates.truncate(self.sampling.top_k);
        }
        let total: f32 = self.candidates.iter().map(|(p, _)| p).sum();
        let mut kept = 0.0;
        let enough = |(p, _): &(f32, u32)| {
            kept += p / total;
            kept >= self.sampling.top_p
        };
        if let Some(last) = self.candidates.iter().position(enough) {
            self.candidates.truncate(last + 1);
        }
        let mut left = u * self.candidates.iter().map(|(p, _)| p).sum::<f32>();
        for (p, id) in &self.candidates {
            left -= p;
            if left < 0.0 {
                return *id;
            }
        }
        self.candidates.last().map_or(best, |(_, id)| *id)
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (id, x) in logits.iter().enumerate() {
        if *x > best.0 {
            best = (*x, id as u32);
        }
    }
    best.1
}

/// The `index`-th number of a stream in [0, 1): SplitMix64 (Steele, Lea and Flood 2014).
fn uniform(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling);
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|_| counts[sampler.draw(logits) as usize] += 1);
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0];
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3 };
        let total: f32 = logits.iter().map(|x: &f32| x.exp()).sum();
        for (count, x) in counts(sampling, &logits).iter().zip(logits) {
            let want = x.exp() / total;
            assert!((*count as f32 / 4000.0 - want).abs() < 0.03, "{count} for {want}");
        }
    }

    #[test]
    fn top_k_top_p_and_zero_temperature_cut() {
        let logits = [0.0, 1.0, 2.0, f32::NAN];
        let base = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 3 };
        assert_eq!(counts(Sampling { top_k: 1, ..base }, &logits), [0, 0, 4000, 0]);
        assert_eq!(counts(Sampling { top_p: 0.6, ..base }, &logits), [0, 0, 4000, 0]);
        let two = counts(Sampling { top_p: 0.7, ..base }, &logits);
        assert!(two[0] == 0 && two[1] > 0 && two[3] == 0, "{two:?}");
        assert_eq!(counts(Sampling::GREEDY, &logits), [0, 0, 4000, 0]);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.9, top_k: 0, seed });
            (0..50).map(|_| sampler.draw(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
