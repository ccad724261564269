//! The obvious version: every code's value in a list, the neighbours found by search, chances in
//! f64. Agrees with the fast one bit for bit.

use super::BLOCK;
use super::code::{chances, seed};
use crate::adamw::{Hyper, Step};

/// Values of the codes 0 to `top`, ascending: zero, then eighths of octaves, up to 15/8 of the
/// run's power of two.
pub(super) fn values(exponent: u8, top: i32) -> Vec<f32> {
    let value = |code: i32| {
        let eighths = 7 + code - top;
        let octave = exponent as i32 - 127 + eighths.div_euclid(8);
        ((1.0 + eighths.rem_euclid(8) as f64 / 8.0) * 2f64.powi(octave)) as f32
    };
    std::iter::once(0.0).chain((1..=top).map(value)).collect()
}

/// The smallest exponent with a code above the largest magnitude; 0 where all are zero.
pub(super) fn exponent(largest: f32) -> u8 {
    let reaches = |e: &u8| values(*e, 255)[255] > largest;
    if largest == 0.0 { 0 } else { (1..=254).find(reaches).unwrap_or(255) }
}

/// The neighbour below, or above where `chance` of 65536 reaches what is missing to it.
fn round(x: f32, values: &[f32], chance: u32) -> usize {
    let below = values.partition_point(|value| *value <= x) - 1;
    let Some(above) = values.get(below + 1) else { return below };
    let share = (x - values[below]) as f64 / (above - values[below]) as f64;
    below + (share >= 1.0 - chance as f64 / 65536.0) as usize
}

/// Moments of one kind, unpacked.
#[derive(Clone)]
pub(super) struct State {
    pub(super) m: Vec<f32>,
    pub(super) v: Vec<f32>,
}

pub(super) fn update(w: &mut [f32], g: &[f32], state: &mut State, first: u64, hyper: &Hyper) {
    let step = Step::new(hyper);
    for i in 0..w.len() {
        w[i] = step.apply(w[i], g[i], &mut state.m[i], &mut state.v[i]);
    }
    for (run, (m, v)) in state.m.chunks_mut(BLOCK).zip(state.v.chunks_mut(BLOCK)).enumerate() {
        let most = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let (m_values, v_values) = (values(exponent(most(m)), 127), values(exponent(most(v)), 255));
        let seed = seed(hyper.step, first / BLOCK as u64 + run as u64);
        for (lane, (m, v)) in m.iter_mut().zip(v).enumerate() {
            let (for_m, for_v) = chances(seed, lane as u32);
            *m = m_values[round(m.abs(), &m_values, for_m)].copysign(*m);
            let code = round(*v, &v_values, for_v);
            *v = v_values[if *v > 0.0 { code.max(1) } else { 0 }];
        }
    }
}
