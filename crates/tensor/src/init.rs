//! Initial values that depend on nothing but seed, name and index: the same on any mesh, in any
//! order of creation.

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// All ones (norm weights).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// SplitMix64's finaliser (Steele et al. 2014): a bijection that mixes well.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// FNV-1a, to give every name a stream of its own.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3))
}

/// Standard normal number `index` of the stream `(seed, name)`, by Box and Muller.
pub fn normal(seed: u64, name: &str, index: u64) -> f32 {
    stream_normal(mix(seed) ^ hash(name), index)
}

fn stream_normal(stream: u64, index: u64) -> f32 {
    let bits = mix(stream ^ mix(index));
    // Two 32-bit uniforms from one word; the first lies in (0, 1] so that its logarithm is finite.
    let u = ((bits >> 32) as f64 + 1.0) / 4_294_967_296.0;
    let v = (bits as u32) as f64 / 4_294_967_296.0;
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// Elements `[first, first + out.len())` of a parameter.
pub(crate) fn fill(init: Init, seed: u64, name: &str, first: u64, out: &mut [f32]) {
    match init {
        Init::Ones => out.fill(1.0),
        Init::Zeros => out.fill(0.0),
        Init::Normal(std) => {
            let stream = mix(seed) ^ hash(name);
            for (i, value) in out.iter_mut().enumerate() {
                *value = std * stream_normal(stream, first + i as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_the_moments_of_a_normal_and_streams_differ() {
        let mut values = vec![0f32; 200_000];
        fill(Init::Normal(2.0), 7, "w", 0, &mut values);
        let mean = values.iter().map(|x| *x as f64).sum::<f64>() / values.len() as f64;
        let var = values.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.02 && (var - 4.0).abs() < 0.05, "mean {mean}, variance {var}");
        assert_ne!(normal(7, "w", 0), normal(7, "v", 0));
        assert_ne!(normal(7, "w", 0), normal(8, "w", 0));
        let mut tail = vec![0f32; 10];
        fill(Init::Normal(2.0), 7, "w", 199_990, &mut tail);
        assert_eq!(tail, values[199_990..]);
    }
}
