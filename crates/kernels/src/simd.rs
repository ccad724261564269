//! What every CPU kernel shares: element conversion, lane-wise reductions and `multiversion!`,
//! which compiles one plain-Rust body for each instruction set and picks at run time.

use half::bf16;

/// An element a kernel reads and writes; the arithmetic itself is always in f32.
pub(crate) trait Float: Copy + Send + Sync + 'static {
    /// Widen, exact.
    fn to_f32(self) -> f32;
    /// Round to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    /// Branch-free so that loops over it vectorise; NaN stays NaN.
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
}

/// Lanes of a reduction: fixed, so that sums have the same bits on every instruction set that
/// compiles the same body, and wide enough to fill two AVX-512 registers.
pub(crate) const LANES: usize = 32;

/// Sum with `LANES` partial sums, folded in a fixed order: upper half onto lower, five times.
#[inline(always)]
pub(crate) fn fold(lanes: [f32; LANES]) -> f32 {
    // Plain loops: what `from_fn` calls may be compiled apart, for no instruction set.
    let mut x = lanes;
    for half in [16, 8, 4, 2] {
        for i in 0..half {
            x[i] += x[i + half];
        }
    }
    x[0] + x[1]
}

/// Sum of `f(i)` for `i < len` in the lane order.
#[inline(always)]
pub(crate) fn lane_sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = len - len % LANES;
    let mut at = 0;
    while at < whole {
        for (lane, acc) in lanes.iter_mut().enumerate() {
            *acc += f(at + lane);
        }
        at += LANES;
    }
    for (lane, acc) in lanes.iter_mut().enumerate().take(len - whole) {
        *acc += f(whole + lane);
    }
    fold(lanes)
}

/// Sum of `f(x[i])` in the lane order. Slices and not indices: a bounds check in the inner loop
/// would keep it scalar.
#[inline(always)]
pub(crate) fn lane_sum_of<T: Float>(x: &[T], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            lanes[lane] += f(x[lane].to_f32());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane += f(x.to_f32());
    }
    fold(lanes)
}

/// Two sums over three arrays of one length, each in the lane order: the components of
/// `f(x[i], y[i], z[i])`.
#[inline(always)]
pub(crate) fn lane_sums_of<X: Float, Y: Float, Z: Float>(
    (x, y, z): (&[X], &[Y], &[Z]),
    f: impl Fn(f32, f32, f32) -> (f32, f32),
) -> (f32, f32) {
    let (mut a, mut b) = ([0f32; LANES], [0f32; LANES]);
    let (xs, x_tail) = x.as_chunks::<LANES>();
    let (ys, y_tail) = y.as_chunks::<LANES>();
    let (zs, z_tail) = z.as_chunks::<LANES>();
    for ((x, y), z) in xs.iter().zip(ys).zip(zs) {
        for lane in 0..LANES {
            let (p, q) = f(x[lane].to_f32(), y[lane].to_f32(), z[lane].to_f32());
            a[lane] += p;
            b[lane] += q;
        }
    }
    for (lane, ((x, y), z)) in x_tail.iter().zip(y_tail).zip(z_tail).enumerate() {
        let (p, q) = f(x.to_f32(), y.to_f32(), z.to_f32());
        a[lane] += p;
        b[lane] += q;
    }
    (fold(a), fold(b))
}

/// e^x by range reduction and a degree-6 polynomial: about 2 ulp between -87 and 88, 0 below.
/// Cody and Waite's split of ln 2; coefficients after Cephes `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.3, 88.0);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer without a libm call.
    const ROUND: f32 = 12_582_912.0;
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = clamped - k * 0.693_359_4;
    let r = r + k * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let p = p * r * r + r + 1.0;
    // The low bits of `shifted` are k: Rust's float to integer cast saturates, lane by lane.
    let y = p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { y }
}

/// Call `$f::<T>` with the views opened as the element type of `$x`; the others must share it.
macro_rules! by_dtype {
    ($x:expr, $t:ident => $body:expr) => {
        match $x.dtype() {
            device::DType::F32 => {
                type $t = f32;
                $body
            }
            device::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            other => panic!("no float kernel takes {other}"),
        }
    };
}

/// Open a view by element type; what `by_dtype!` bodies use.
pub(crate) trait Open<'a>: Float {
    /// Shared elements.
    fn open(view: device::View<'a>) -> &'a [Self];
    /// Exclusive elements.
    fn open_mut(view: device::ViewMut<'a>) -> &'a mut [Self];
}

impl<'a> Open<'a> for f32 {
    fn open(view: device::View<'a>) -> &'a [f32] {
        view.f32()
    }
    fn open_mut(view: device::ViewMut<'a>) -> &'a mut [f32] {
        view.f32()
    }
}

impl<'a> Open<'a> for bf16 {
    fn open(view: device::View<'a>) -> &'a [bf16] {
        view.bf16()
    }
    fn open_mut(view: device::ViewMut<'a>) -> &'a mut [bf16] {
        view.bf16()
    }
}

/// Compile one body for portable, AVX2 and AVX-512 and pick by `device::Isa::active()`.
///
/// The body must be plain Rust whose loops the compiler vectorises; helpers it calls must be
/// `#[inline(always)]`. Generics are written `<T: Float>`.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),+>)?
     ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::extra_unused_type_parameters)]
        $vis fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($g),+>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($g),+>)? ($($arg),*)
            }

            match device::Isa::active() {
                // SAFETY: `active` never exceeds what the machine was found to have.
                #[cfg(target_arch = "x86_64")]
                device::Isa::Avx512 | device::Isa::Avx512Bf16 | device::Isa::Amx => unsafe {
                    avx512 $(::<$($g),+>)? ($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                device::Isa::Avx2 => unsafe { avx2 $(::<$($g),+>)? ($($arg),*) },
                _ => body $(::<$($g),+>)? ($($arg),*),
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_ulp_of_libm() {
        let mut worst = 0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - want) / want).abs());
        }
        assert!(worst < 3.0 * f32::EPSILON as f64, "{worst:e}");
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn bf16_rounding_agrees_with_the_half_crate() {
        for step in 0..200_000u32 {
            let x = f32::from_bits(step.wrapping_mul(21_473));
            assert_eq!(<bf16 as Float>::from_f32(x).to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
        }
        assert!(<bf16 as Float>::from_f32(f32::NAN).is_nan());
    }
}
