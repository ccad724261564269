//! Attention on a GPU, measured by the CPU's in f32 of the same values.

use crate::support::{OnGpu, Values, close, gpu, random, same};
use device::{DType, View, ViewMut};
use kernels::attention::{
    Given, Heads, Mask, Operands, Places, Seen, Shape, backward, backward_part, forward, forward_part, merge,
    row_sums,
};

const SCALE: f32 = 0.3;
/// Gradients are added to this.
const KNOWN: f32 = 0.125;

const fn shape(b: usize, [t, s]: [usize; 2], [n, k]: [usize; 2], h: usize) -> Shape {
    Shape { b, t, s, n, k, h }
}

/// What a part is measured with.
#[derive(Clone)]
struct Case {
    shape: Shape,
    /// Columns before the heads in each row of q, and of k | v.
    spare: usize,
    q: Values,
    kv: Values,
    dout: Values,
    starts: Option<Vec<u32>>,
    window: Option<usize>,
    queries: Places,
    keys: Places,
}

/// out, lse, row sums, dq, dkv.
type Views<'a> = [ViewMut<'a>; 5];

impl Case {
    fn new(shape: Shape, dtype: DType, spare: usize) -> Case {
        let Shape { b, t, s, n, k, h } = shape;
        let values = |tokens: usize, heads: usize, seed| {
            // A token more than are at hand.
            let len = b * (tokens + 1) * (heads * h + spare);
            Values::new(dtype, &random(len, seed).iter().map(|x| 2.0 * x).collect::<Vec<_>>())
        };
        Case {
            shape,
            spare,
            q: values(t, n, 1),
            kv: values(s, 2 * k, 2),
            dout: Values::random(dtype, b * t * n * h, 3),
            starts: None,
            window: None,
            queries: Places::run(s.saturating_sub(t), t),
            keys: Places::run(0, s),
        }
    }

    fn wide(&self) -> Case {
        let wide = |values: &Values| Values::new(DType::F32, &values.floats());
        Case { q: wide(&self.q), kv: wide(&self.kv), dout: wide(&self.dout), ..self.clone() }
    }

    fn operands<'a>(&self, q: View<'a>, kv: View<'a>) -> Operands<'a> {
        let Shape { t, s, n, k, h, .. } = self.shape;
        let heads = |data, heads: usize, first: usize, tokens: usize| {
            let (ld, col) = (heads * h + self.spare, self.spare + first * h);
            Heads { data, ld, col, rows_per_batch: tokens + 1 }
        };
        (heads(q, n, 0, t), heads(kv, 2 * k, 0, s), heads(kv, 2 * k, k, s))
    }

    fn run(&self, [q, kv, dout]: [View<'_>; 3], [mut out, mut lse, mut sums, dq, dkv]: Views<'_>) {
        let qkv = self.operands(q, kv);
        let mask = Mask { starts: self.starts.as_deref(), window: self.window };
        let seen = Seen { mask, queries: self.queries, keys: self.keys };
        forward_part(self.shape, qkv, seen, SCALE, (out.reborrow(), lse.reborrow()));
        row_sums(&self.shape, out.as_view(), dout, sums.reborrow());
        let given = Given { lse: lse.as_view(), sums: sums.as_view(), dout };
        backward_part(self.shape, qkv, seen, SCALE, given, (dq, dkv));
    }

    fn results(&self, out: DType) -> [Values; 5] {
        let Shape { b, t, s, n, k, h } = self.shape;
        let known = |dtype, len| Values::new(dtype, &vec![KNOWN; len]);
        let f32s = |len| known(DType::F32, len);
        let (heads, stats) = (b * t * n * h, b * n * t);
        [known(out, heads), f32s(stats), f32s(stats), f32s(heads), f32s(b * s * 2 * k * h)]
    }

    fn on_cpu(&self) -> [Values; 5] {
        let mut results = self.results(DType::F32);
        let case = self.wide();
        case.run([case.q.cpu(), case.kv.cpu(), case.dout.cpu()], results.each_mut().map(Values::cpu_mut));
        results
    }

    fn on_gpu(&self, out: DType) -> [Values; 5] {
        let mut results = self.results(out).map(|values| values.on_gpu());
        let inputs = [&self.q, &self.kv, &self.dout].map(Values::on_gpu);
        self.run(inputs.each_ref().map(OnGpu::view), results.each_mut().map(OnGpu::view_mut));
        results.map(|values| values.back())
    }

    fn check(&self, out: DType) {
        let tolerance = |dtype| if dtype == DType::F32 { 1e-5f64 } else { 1e-2 };
        let most = tolerance(self.q.cpu().dtype());
        let mut got = self.on_gpu(out);
        let mut want = self.on_cpu();
        let [nothing, expected] = [&mut got[1], &mut want[1]].map(take_infinities);
        let what = format!(
            "{:?} {} -> {out}, spare {}, starts {}, window {:?}, {:?} {:?}",
            self.shape,
            self.q.cpu().dtype(),
            self.spare,
            self.starts.is_some(),
            self.window,
            self.queries,
            self.keys,
        );
        assert!(nothing == expected, "{what}: who sees nothing");
        let most = [most.max(tolerance(out)), 1e-5, most, most, most];
        for (i, name) in ["out", "lse", "row sums", "dq", "dkv"].into_iter().enumerate() {
            close(&format!("{name} of {what}"), &got[i], &want[i], most[i]);
        }
    }

    fn masks(mut self, out: DType) {
        let Shape { b, t, .. } = self.shape;
        // Documents of uneven lengths.
        let starts: Vec<u32> = (0..b * t)
            .map(|i| [0, t / 5, t / 2][usize::from(i % t >= t / 5) + usize::from(i % t >= t / 2)] as u32)
            .collect();
        for (starts, window) in
            [(None, None), (Some(&starts), None), (None, Some(5)), (Some(&starts), Some(t / 3 + 1))]
        {
            (self.starts, self.window) = (starts.cloned(), window);
            self.check(out);
        }
    }
}

/// Infinities become 0; where they were.
fn take_infinities(values: &mut Values) -> Vec<bool> {
    let floats = values.floats();
    let finite: Vec<f32> = floats.iter().map(|x| if x.is_finite() { *x } else { 0.0 }).collect();
    *values = Values::new(DType::F32, &finite);
    floats.iter().map(|x| *x == f32::NEG_INFINITY).collect()
}

#[test]
fn heads_of_any_width() {
    let _gpu = gpu();
    for (shape, spare) in [
        (shape(2, [9, 9], [2, 1], 8), 8),
        (shape(1, [97, 97], [4, 2], 16), 0),
        (shape(2, [130, 130], [2, 1], 64), 16),
        (shape(1, [90, 90], [2, 2], 80), 0),
        (shape(1, [160, 160], [4, 2], 128), 0),
        (shape(1, [70, 70], [2, 1], 200), 8),
        // Without tensor cores.
        (shape(2, [33, 33], [2, 1], 18), 0),
        (shape(1, [40, 40], [1, 1], 64), 1),
        (shape(1, [1, 1], [1, 1], 1), 0),
    ] {
        for (dtype, out) in [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32)]
        {
            Case::new(shape, dtype, spare).masks(out);
        }
    }
}

#[test]
fn queries_at_the_end_of_many_keys() {
    let _gpu = gpu();
    for (t, s, h) in [(1, 1, 64), (1, 300, 128), (3, 200, 64), (50, 333, 96), (2, 90, 24)] {
        for dtype in [DType::F32, DType::Bf16] {
            let case = Case::new(shape(2, [t, s], [4, 2], h), dtype, 0);
            case.check(dtype);
            Case { window: Some(70), ..case }.check(dtype);
        }
    }
}

/// Queries before, inside and behind the keys at hand; some see nothing.
#[test]
fn queries_and_keys_in_two_runs() {
    let _gpu = gpu();
    let places = [
        Places::run(0, 7),
        Places::runs((2, 3), (9, 4)),
        Places::runs((100, 50), (300, 60)),
        Places::runs((0, 100), (300, 101)),
    ];
    for queries in places {
        for keys in places {
            for (dtype, h) in [(DType::F32, 8), (DType::Bf16, 64)] {
                for window in [None, Some(6), Some(120)] {
                    let case = Case::new(shape(1, [queries.len(), keys.len()], [2, 1], h), dtype, 0);
                    Case { queries, keys, window, ..case }.check(DType::F32);
                }
            }
        }
    }
}

/// q, k and v side by side, gradients too; the same bits each time.
#[test]
fn packed_rows_there_and_back() {
    let _gpu = gpu();
    for (t, h, dtype) in [(150, 64, DType::Bf16), (140, 128, DType::Bf16), (100, 24, DType::F32)] {
        let shape = shape(2, [t, t], [4, 2], h);
        let qkv = Values::random(dtype, 2 * t * 8 * h, 1);
        let dout = Values::random(dtype, 2 * t * 4 * h, 2);
        let wide = |values: &Values| Values::new(DType::F32, &values.floats());
        let (wide_qkv, wide_dout) = (wide(&qkv), wide(&dout));
        let mut want = results(&shape, DType::F32);
        packed(shape, [wide_qkv.cpu(), wide_dout.cpu()], want.each_mut().map(Values::cpu_mut));
        let on_gpu = || {
            let (qkv, dout) = (qkv.on_gpu(), dout.on_gpu());
            let mut got = results(&shape, dtype).map(|values| values.on_gpu());
            packed(shape, [qkv.view(), dout.view()], got.each_mut().map(OnGpu::view_mut));
            got.map(|values| values.back())
        };
        let (got, again) = (on_gpu(), on_gpu());
        let most = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
        for (i, what) in ["out", "lse", "dqkv"].into_iter().enumerate() {
            close(what, &got[i], &want[i], if i == 1 { 1e-5 } else { most });
            same(what, &again[i], &got[i]);
        }
    }
}

fn results(shape: &Shape, dtype: DType) -> [Values; 3] {
    let Shape { b, t, n, k, h, .. } = *shape;
    let dqkv = Values::new(dtype, &vec![7.0; b * t * (n + 2 * k) * h]);
    [Values::zeros(dtype, b * t * n * h), Values::zeros(DType::F32, b * n * t), dqkv]
}

fn packed(shape: Shape, [qkv, dout]: [View<'_>; 2], [mut out, mut lse, dqkv]: [ViewMut<'_>; 3]) {
    let Shape { t, n, k, h, .. } = shape;
    let part = |first: usize| Heads { data: qkv, ld: (n + 2 * k) * h, col: first * h, rows_per_batch: t };
    let (q, k, v, mask) = (part(0), part(n), part(n + k), Mask::default());
    forward(shape, q, k, v, mask, SCALE, out.reborrow(), lse.reborrow());
    backward(shape, q, k, v, mask, SCALE, out.as_view(), lse.as_view(), dout, dqkv);
}

#[test]
fn parts_are_merged() {
    let _gpu = gpu();
    let shape = shape(2, [5, 5], [3, 1], 40);
    let (stats, heads) = (2 * 3 * 5, 2 * 3 * 5 * 40);
    // Some saw nothing so far, some see nothing now.
    let lse = |seed, nothing: usize| {
        let floats = random(stats, seed);
        let of = |i: usize, x: f32| if i % nothing == 1 { f32::NEG_INFINITY } else { 5.0 * x };
        Values::new(DType::F32, &floats.iter().enumerate().map(|(i, x)| of(i, *x)).collect::<Vec<_>>())
    };
    let (mut out, mut known) = (Values::random(DType::F32, heads, 1), lse(2, 3));
    let (part, more) = (Values::random(DType::F32, heads, 3), lse(4, 4));
    let (mut gpu_out, mut gpu_known) = (out.on_gpu(), known.on_gpu());
    let (gpu_part, gpu_more) = (part.on_gpu(), more.on_gpu());
    merge(&shape, (gpu_out.view_mut(), gpu_known.view_mut()), (gpu_part.view(), gpu_more.view()));
    merge(&shape, (out.cpu_mut(), known.cpu_mut()), (part.cpu(), more.cpu()));
    close("out", &gpu_out.back(), &out, 1e-6);
    let mut got = gpu_known.back();
    assert_eq!(take_infinities(&mut got), take_infinities(&mut known));
    close("lse", &got, &known, 1e-6);
}
