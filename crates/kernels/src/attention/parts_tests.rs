//! Rows cut among ranks: parts of the keys one after the other, against the whole matrix.

use super::*;
use crate::testkit::*;
use device::{DType, Threads};

/// One of `ranks`' share of a row of `2 * ranks * each` tokens: an early and a late run.
fn share(ranks: usize, rank: usize, each: usize) -> Places {
    Places::runs((rank * each, each), ((2 * ranks - 1 - rank) * each, each))
}

/// The tokens of a share, out of rows of `t` tokens of `width` elements.
fn taken<T: Copy>(x: &[T], (b, t, width): (usize, usize, usize), places: Places) -> Vec<T> {
    let tokens = (0..b).flat_map(|row| (0..places.len()).map(move |i| row * t + places.at(i)));
    tokens.flat_map(|token| x[token * width..(token + 1) * width].to_vec()).collect()
}

struct Case {
    /// Of whole rows.
    shape: Shape,
    ranks: usize,
    dtype: DType,
    starts: Option<Vec<u32>>,
    window: Option<usize>,
    qkv: Vec<f32>,
    dout: Vec<f32>,
}

const SCALE: f32 = 0.3;

/// What the ranks found, in the order of whole rows: out, lse, dqkv.
type Found = [Vec<f64>; 3];

impl Case {
    fn new(shape: Shape, ranks: usize, dtype: DType) -> Case {
        let Shape { b, t, n, k, h, .. } = shape;
        let round = |x: Vec<f32>| Floats::new(&x, dtype).to_f64().iter().map(|x| *x as f32).collect();
        let qkv = round(random(b * t * (n + 2 * k) * h, 1).iter().map(|x| 2.0 * x).collect());
        let dout = round(random(b * t * n * h, 2));
        Case { shape, ranks, dtype, starts: None, window: None, qkv, dout }
    }

    fn width(&self) -> usize {
        (self.shape.n + 2 * self.shape.k) * self.shape.h
    }

    fn places(&self, rank: usize) -> Places {
        share(self.ranks, rank, self.shape.t / (2 * self.ranks))
    }

    /// Every rank against the blocks of all, its own first, then those of the ranks before it.
    fn run(&self) -> Found {
        let Shape { b, t, n, k, h, .. } = self.shape;
        let mut out = vec![0f64; b * t * n * h];
        let mut lse = vec![0f64; b * n * t];
        let mut dqkv = vec![0f64; b * t * self.width()];
        let mut dkvs: Vec<Vec<f32>> =
            (0..self.ranks).map(|_| vec![0f32; b * t / self.ranks * 2 * k * h]).collect();
        for rank in 0..self.ranks {
            let places = self.places(rank);
            let (found, stats, dq) = self.rank(rank, &mut dkvs);
            for (i, (row, q)) in (0..b).flat_map(|row| (0..places.len()).map(move |q| (row, q))).enumerate() {
                let token = row * t + places.at(q);
                for j in 0..n * h {
                    out[token * n * h + j] = found[i * n * h + j];
                    dqkv[token * self.width() + j] = dq[i * n * h + j] as f64;
                }
                for head in 0..n {
                    lse[(row * n + head) * t + places.at(q)] =
                        stats[(row * n + head) * places.len() + q] as f64;
                }
            }
        }
        for (rank, dkv) in dkvs.iter().enumerate() {
            let places = self.places(rank);
            for (i, values) in dkv.chunks_exact(2 * k * h).enumerate() {
                let token = i / places.len() * t + places.at(i % places.len());
                let to = &mut dqkv[token * self.width() + n * h..][..2 * k * h];
                to.iter_mut().zip(values).for_each(|(to, x)| *to = *x as f64);
            }
        }
        [out, lse, dqkv]
    }

    fn rank(&self, rank: usize, dkvs: &mut [Vec<f32>]) -> (Vec<f64>, Vec<f32>, Vec<f32>) {
        let Shape { b, t, n, k, h, .. } = self.shape;
        let (width, queries) = (self.width(), self.places(rank));
        let local = Shape { t: queries.len(), s: queries.len(), ..self.shape };
        let rows = |places| Floats::new(&taken(&self.qkv, (b, t, width), places), self.dtype);
        let starts = self.starts.as_ref().map(|starts| taken(starts, (b, t, 1), queries));
        let mask = Mask { starts: starts.as_deref(), window: self.window };
        let own = rows(queries);
        let blocks: Vec<(usize, Floats)> = (0..self.ranks)
            .map(|step| (rank + self.ranks - step) % self.ranks)
            .map(|from| (from, rows(self.places(from))))
            .collect();
        let operands = |block: usize| {
            let heads = |data: usize, first: usize| Heads {
                data: if data == 0 { own.view() } else { blocks[block].1.view() },
                ld: width,
                col: first * h,
                rows_per_batch: local.t,
            };
            (heads(0, 0), heads(1, n), heads(1, n + k))
        };
        let seen = |block: usize| Seen { mask, queries, keys: self.places(blocks[block].0) };
        let len = b * local.t * n * h;
        let (mut out, mut lse) = (vec![0f32; len], vec![f32::NEG_INFINITY; b * n * local.t]);
        for block in 0..self.ranks {
            let (mut part, mut stats) = (vec![7f32; len], vec![7f32; lse.len()]);
            let to = (ViewMut::of_f32(&mut part), ViewMut::of_f32(&mut stats));
            forward_part(local, operands(block), seen(block), SCALE, to);
            let to = (ViewMut::of_f32(&mut out), ViewMut::of_f32(&mut lse));
            merge(&local, to, (View::of_f32(&part), View::of_f32(&stats)));
        }
        let out = Floats::new(&out, self.dtype);
        let dout = Floats::new(&taken(&self.dout, (b, t, n * h), queries), self.dtype);
        let mut sums = vec![0f32; lse.len()];
        row_sums(&local, out.view(), dout.view(), ViewMut::of_f32(&mut sums));
        let given = Given { lse: View::of_f32(&lse), sums: View::of_f32(&sums), dout: dout.view() };
        let mut dq = vec![0f32; len];
        for block in 0..self.ranks {
            let dkv = ViewMut::of_f32(&mut dkvs[blocks[block].0]);
            backward_part(local, operands(block), seen(block), SCALE, given, (ViewMut::of_f32(&mut dq), dkv));
        }
        (out.to_f64(), lse, dq)
    }

    fn reference(&self, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mask = Mask { starts: self.starts.as_deref(), window: self.window };
        reference::forward(&self.shape, qkv, &mask, SCALE as f64)
    }

    fn masks(mut self, check: impl Fn(&Case)) {
        let Shape { b, t, .. } = self.shape;
        let documents: Vec<u32> = (0..b * t)
            .map(|i| [0, t / 5, t / 2][usize::from(i % t >= t / 5) + usize::from(i % t >= t / 2)] as u32)
            .collect();
        for (starts, window) in [
            (None, None),
            (Some(&documents), None),
            (None, Some(t.min(5))),
            (Some(&documents), Some(t / 3 + 1)),
        ] {
            (self.starts, self.window) = (starts.cloned(), window);
            check(&self);
        }
    }
}

fn whole(b: usize, t: usize, n: usize, k: usize, h: usize) -> Shape {
    Shape { b, t, s: t, n, k, h }
}

#[test]
fn parts_join_to_the_whole_matrix() {
    for (shape, ranks) in [
        (whole(2, 8, 2, 1, 8), 2),
        (whole(1, 4, 1, 1, 2), 2),
        (whole(2, 96, 4, 2, 16), 3),
        (whole(1, 200, 2, 2, 20), 4),
        // Blocks of queries and of keys that straddle the two runs.
        (whole(1, 840, 3, 1, 12), 2),
        (whole(2, 30, 4, 1, 64), 1),
    ] {
        for dtype in [DType::F32, DType::Bf16] {
            Case::new(shape, ranks, dtype).masks(|case| {
                let [out, lse, _] = case.run();
                let x: Vec<f64> = case.qkv.iter().map(|x| *x as f64).collect();
                let (want, want_lse) = case.reference(&x);
                assert_close("out", &out, &want, tolerance(dtype).max(1e-5));
                assert_close("lse", &lse, &want_lse, 1e-5);
            });
        }
    }
}

#[test]
fn a_part_agrees_with_its_reference() {
    // Queries before, inside and behind the keys at hand; some see nothing.
    let (b, n, k, h) = (2, 4, 2, 8);
    let places = [Places::run(0, 7), Places::runs((2, 3), (9, 4)), Places::runs((100, 50), (300, 60))];
    for queries in places {
        for keys in places {
            let shape = Shape { b, t: queries.len(), s: keys.len(), n, k, h };
            let q = Floats::new(&random(b * shape.t * n * h, 1), DType::F32);
            let kv = Floats::new(&random(b * shape.s * 2 * k * h, 2), DType::F32);
            let heads = |data, ld, first, rows_per_batch| Heads { data, ld, col: first * h, rows_per_batch };
            let ours = heads(q.view(), n * h, 0, shape.t);
            let theirs = |first| heads(kv.view(), 2 * k * h, first, shape.s);
            for window in [None, Some(6)] {
                let seen = Seen { mask: Mask { starts: None, window }, queries, keys };
                let (mut out, mut lse) = (vec![7f32; b * shape.t * n * h], vec![7f32; b * n * shape.t]);
                let to = (ViewMut::of_f32(&mut out), ViewMut::of_f32(&mut lse));
                forward_part(shape, (ours, theirs(0), theirs(k)), seen, SCALE, to);
                let (want, want_lse) =
                    reference::part(&shape, (&q.to_f64(), &kv.to_f64()), &seen, SCALE as f64);
                let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
                assert_close("out", &wide(&out), &want, 1e-5);
                let nothing: Vec<bool> = lse.iter().map(|x| *x == f32::NEG_INFINITY).collect();
                assert!(nothing.iter().zip(&want_lse).all(|(a, b)| *a == (*b == f64::NEG_INFINITY)));
                let finite = |x: Vec<f64>| x.into_iter().filter(|x| x.is_finite()).collect::<Vec<_>>();
                assert_close("lse", &finite(wide(&lse)), &finite(want_lse), 1e-5);
            }
        }
    }
}

#[test]
fn gradients_of_parts_add_up_to_finite_differences() {
    for (shape, ranks) in [(whole(2, 8, 2, 1, 4), 2), (whole(1, 12, 4, 2, 6), 3), (whole(1, 112, 1, 1, 2), 2)]
    {
        Case::new(shape, ranks, DType::F32).masks(|case| {
            let [_, _, dqkv] = case.run();
            let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
            let f = |x: &[f64]| case.reference(x).0;
            let want = numeric_gradient(&wide(&case.qkv), &wide(&case.dout), f);
            assert_close("dqkv", &dqkv, &want, 2e-5);
        });
    }
}

#[test]
fn long_parts_agree_between_types_and_between_thread_counts() {
    let shape = whole(1, 1088, 2, 1, 32);
    let exact = Case::new(shape, 2, DType::Bf16);
    let exact = Case { dtype: DType::F32, ..exact }.run();
    let on = |threads| Threads::new(threads).unwrap().run(|| Case::new(shape, 2, DType::Bf16).run());
    let one = on(1);
    assert!(one == on(3));
    assert_close("bf16", &one[2], &exact[2], 2e-2);
}

/// A row that is one part has the bits of a row that was never cut, both ways.
#[test]
fn one_part_is_the_plain_call() {
    let case = Case::new(whole(2, 130, 4, 2, 16), 1, DType::F32);
    let Shape { b, t, n, k, h, .. } = case.shape;
    let [out, lse, dqkv] = case.run();
    let (mut plain, mut stats) = (vec![0f32; b * t * n * h], vec![0f32; b * n * t]);
    let mut grads = vec![0f32; case.qkv.len()];
    let part = |first: usize| Heads {
        data: View::of_f32(&case.qkv),
        ld: case.width(),
        col: first * h,
        rows_per_batch: t,
    };
    let (q, key, v, mask) = (part(0), part(n), part(n + k), Mask::default());
    let to = (ViewMut::of_f32(&mut plain), ViewMut::of_f32(&mut stats));
    forward(case.shape, q, key, v, mask, SCALE, to.0, to.1);
    let (o, l, dout) = (View::of_f32(&plain), View::of_f32(&stats), View::of_f32(&case.dout));
    backward(case.shape, q, key, v, mask, SCALE, o, l, dout, ViewMut::of_f32(&mut grads));
    let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
    assert!(out == wide(&plain) && lse == wide(&stats) && dqkv == wide(&grads));
}
