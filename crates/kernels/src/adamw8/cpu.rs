use super::code::{chances, decode, decode_signed, encode, encode_signed, exponent, seed};
use super::{BLOCK, Packed, exponents_len};
use crate::adamw::{Hyper, Master, Step, join, split};
use crate::rows::Parts;
use crate::simd::{Float, Open};
use device::View;
use half::bf16;

/// Parameters of a task, whole runs.
const CHUNK: usize = 1 << 14;

pub(super) fn update(
    master: Master<'_>,
    grad: View<'_>,
    m: Packed<'_>,
    v: Packed<'_>,
    first: u64,
    hyper: &Hyper,
) {
    by_dtype!(grad, G => run(master, G::open(grad), m, v, first, hyper));
}

fn run<G: Float>(master: Master<'_>, g: &[G], m: Packed<'_>, v: Packed<'_>, first: u64, hyper: &Hyper) {
    let step = Step::new(hyper);
    let (m_codes, v_codes) = (Parts::new(m.codes.bytes()), Parts::new(v.codes.bytes()));
    let (m_exps, v_exps) = (Parts::new(m.exponents.bytes()), Parts::new(v.exponents.bytes()));
    let parts = |i: usize, len: usize| {
        let (at, run) = (i * CHUNK, i * CHUNK / BLOCK);
        let (codes, exps) = (at..at + len, run..run + exponents_len(len));
        // SAFETY: each task takes the state of its own weights, once.
        unsafe {
            Task {
                step,
                salt: (hyper.step, first / BLOCK as u64 + run as u64),
                g: &g[codes.clone()],
                m: (m_codes.part(codes.clone()), m_exps.part(exps.clone())),
                v: (v_codes.part(codes), v_exps.part(exps)),
            }
        }
    };
    match master {
        Master::F32(weights) => {
            device::for_each_part((weights.f32(), CHUNK), (&mut [] as &mut [u8], 0), |i, w, _| {
                run_f32(w, parts(i, w.len()));
            });
        }
        Master::Split { high, low } => {
            device::for_each_part((high.bf16(), CHUNK), (low.u16(), CHUNK), |i, high, low| {
                run_split(high, low, parts(i, high.len()));
            });
        }
    }
}

/// A task's part of everything but the weights; moments are (codes, exponents).
struct Task<'a, G> {
    step: Step,
    /// Step, and number of the first run.
    salt: (u64, u64),
    g: &'a [G],
    m: (&'a mut [u8], &'a mut [u8]),
    v: (&'a mut [u8], &'a mut [u8]),
}

multiversion! {
    fn run_f32<G: Float>(w: &mut [f32], task: Task<'_, G>) {
        let mut task = task;
        for (run, w) in w.chunks_mut(BLOCK).enumerate() {
            let mut wide = [0f32; BLOCK];
            wide[..w.len()].copy_from_slice(w);
            one_run(&mut wide, w.len(), run, &mut task);
            w.copy_from_slice(&wide[..w.len()]);
        }
    }
}

multiversion! {
    fn run_split<G: Float>(high: &mut [bf16], low: &mut [u16], task: Task<'_, G>) {
        let mut task = task;
        for (run, (high, low)) in high.chunks_mut(BLOCK).zip(low.chunks_mut(BLOCK)).enumerate() {
            let mut wide = [0f32; BLOCK];
            for ((wide, high), low) in wide.iter_mut().zip(&*high).zip(&*low) {
                *wide = join(*high, *low);
            }
            one_run(&mut wide, high.len(), run, &mut task);
            for ((wide, high), low) in wide.iter().zip(high).zip(low) {
                (*high, *low) = split(*wide);
            }
        }
    }
}

/// A run of `n` weights. Everything is worked on in arrays of whole runs, the last one padded with
/// zeros, so that loops have a length the compiler knows.
#[inline(always)]
fn one_run<G: Float>(w: &mut [f32; BLOCK], n: usize, run: usize, task: &mut Task<'_, G>) {
    let at = run * BLOCK..run * BLOCK + n;
    let (m_codes, m_exp) = (&mut task.m.0[at.clone()], &mut task.m.1[run]);
    let (v_codes, v_exp) = (&mut task.v.0[at.clone()], &mut task.v.1[run]);
    let (mut g, mut mc, mut vc) = ([0f32; BLOCK], [0u8; BLOCK], [0u8; BLOCK]);
    g.iter_mut().zip(&task.g[at]).for_each(|(wide, g)| *wide = g.to_f32());
    mc[..n].copy_from_slice(m_codes);
    vc[..n].copy_from_slice(v_codes);
    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
    // Largest magnitudes as bits: for floats that are not negative the order is that of integers.
    let (mut m_most, mut v_most) = (0u32, 0u32);
    let (step, m_old, v_old) = (task.step, *m_exp, *v_exp);
    for i in 0..BLOCK {
        m[i] = decode_signed(mc[i], m_old);
        v[i] = decode(vc[i], v_old);
    }
    for i in 0..BLOCK {
        w[i] = step.apply(w[i], g[i], &mut m[i], &mut v[i]);
    }
    for i in 0..BLOCK {
        m_most = m_most.max(m[i].abs().to_bits());
        v_most = v_most.max(v[i].to_bits());
    }
    (*m_exp, *v_exp) = (exponent(f32::from_bits(m_most)), exponent(f32::from_bits(v_most)));
    let seed = seed(task.salt.0, task.salt.1 + run as u64);
    let (m_new, v_new) = (*m_exp, *v_exp);
    let (mut for_m, mut for_v) = ([0u32; BLOCK], [0u32; BLOCK]);
    for i in 0..BLOCK {
        (for_m[i], for_v[i]) = chances(seed, i as u32);
    }
    for i in 0..BLOCK {
        mc[i] = encode_signed(m[i], m_new, for_m[i]);
        vc[i] = encode(v[i], v_new, for_v[i]);
    }
    m_codes.copy_from_slice(&mc[..n]);
    v_codes.copy_from_slice(&vc[..n]);
}
