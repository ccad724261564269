//! GFLOP/s of the product over the shapes of a training step, beside the machine's own peak.
//! `cargo run --release -p kernels --example gemm_bench [threads [instruction set]]`

use device::{DType, Device, Isa, Threads, View, ViewMut};
use half::bf16;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use std::time::Instant;

struct Shape {
    name: &'static str,
    sizes: (usize, usize, usize),
    transposed: (bool, bool),
}

fn best_of(times: usize, mut body: impl FnMut()) -> f64 {
    body();
    (0..times)
        .map(|_| {
            let start = Instant::now();
            body();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn measure(shape: &Shape, dtype: DType) -> f64 {
    let (m, n, k) = shape.sizes;
    let fill = |len: usize| (0..len).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect::<Vec<f32>>();
    let (a, b, mut c) = (fill(m * k), fill(k * n), vec![0f32; m * n]);
    let half = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (ah, bh) = (half(&a), half(&b));
    let (av, bv) = match dtype {
        DType::F32 => (View::of_f32(&a), View::of_f32(&b)),
        _ => (View::of_bf16(&ah), View::of_bf16(&bh)),
    };
    let mat = |data, rows, cols, t| Mat { data, ld: if t { rows } else { cols }, transposed: t };
    let (a, b) = (mat(av, m, k, shape.transposed.0), mat(bv, k, n, shape.transposed.1));
    let seconds = best_of(8, || {
        let out = MatMut { data: ViewMut::of_f32(&mut c), ld: n };
        gemm(m, n, k, a, b, out, false, Epilogue::default());
    });
    2.0 * (m * n * k) as f64 / seconds / 1e9
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(device::cores());
    if let Some(name) = std::env::args().nth(2) {
        let isa = Isa::available().into_iter().find(|isa| isa.name() == name);
        assert!(isa.is_some_and(Isa::choose), "this machine has no {name}");
    }
    let shapes = [
        Shape { name: "forward 1024x2304x768 NT", sizes: (1024, 2304, 768), transposed: (false, true) },
        Shape { name: "forward 1024x4096x768 NT", sizes: (1024, 4096, 768), transposed: (false, true) },
        Shape { name: "forward 1024x768x2048 NT", sizes: (1024, 768, 2048), transposed: (false, true) },
        Shape { name: "dx 1024x768x4096 NN", sizes: (1024, 768, 4096), transposed: (false, false) },
        Shape { name: "dW 4096x768x1024 TN", sizes: (4096, 768, 1024), transposed: (true, false) },
        Shape { name: "head 256x32000x768 NT", sizes: (256, 32000, 768), transposed: (false, true) },
        Shape { name: "head dx 256x768x32000 NN", sizes: (256, 768, 32000), transposed: (false, false) },
        Shape { name: "head dW 32000x768x256 TN", sizes: (32000, 768, 256), transposed: (true, false) },
        Shape { name: "small 1024x512x512 NT", sizes: (1024, 512, 512), transposed: (false, true) },
    ];
    Threads::new(threads).expect("a pool").run(|| {
        let (peak, peak_bf16) =
            [DType::F32, DType::Bf16].map(|dtype| kernels::peak::gflops(Device::Cpu, dtype)).into();
        println!("{threads} threads, peak {peak:.0} GFLOP/s f32, {peak_bf16:.0} bf16");
        for shape in &shapes {
            let (f, b) = (measure(shape, DType::F32), measure(shape, DType::Bf16));
            println!(
                "{:28} f32 {f:6.1} ({:3.0} %)   bf16 {b:6.1} ({:3.0} %)",
                shape.name,
                100.0 * f / peak,
                100.0 * b / peak_bf16
            );
        }
    });
}
