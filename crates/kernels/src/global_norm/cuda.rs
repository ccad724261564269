use super::{CHUNK, total};
use crate::cuda::launch;
use device::{Buffer, DType, Device, View, ViewMut};

/// Chunks of a block: a warp each.
const CHUNKS: usize = 4;

/// Sums of all arrays in one launch, and one wait for them.
pub(super) fn sums_of_squares(views: &[View<'_>]) -> Vec<f64> {
    let chunks: Vec<u32> = views.iter().flat_map(chunks_of).flatten().collect();
    let count = chunks.len() / 4;
    let mut sums = vec![0f32; count];
    if count > 0 {
        let mut buffer = Buffer::new(Device::Cuda, count * size_of::<f32>())
            .unwrap_or_else(|error| panic!("sums of squares: {error}"));
        launch("global_norm_squares")
            .grid(count.div_ceil(CHUNKS))
            .threads(CHUNKS * 32)
            .ids(&chunks)
            .write(&buffer.view_mut(DType::F32, 0, count))
            .u32(count)
            .run();
        device::copy(ViewMut::of_f32(&mut sums), buffer.view(DType::F32, 0, count));
    }
    let mut sums = sums.as_slice();
    let mut sum_of = |view: &View<'_>| {
        let (own, others) = sums.split_at(view.len().div_ceil(CHUNK));
        sums = others;
        total(own)
    };
    views.iter().map(&mut sum_of).collect()
}

/// As the kernel reads them.
fn chunks_of(view: &View<'_>) -> impl Iterator<Item = [u32; 4]> {
    let (view, size) = (*view, view.dtype().size_bytes());
    let narrow = match view.dtype() {
        DType::F32 => 0,
        DType::Bf16 => 1,
        other => panic!("no float kernel reads {other}"),
    };
    (0..view.len()).step_by(CHUNK).map(move |first| {
        let address = view.address() + (first * size) as u64;
        let len = CHUNK.min(view.len() - first);
        [address as u32, (address >> 32) as u32, len as u32, narrow]
    })
}
