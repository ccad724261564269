//! Threads that share a GPU: each has a workspace of its own, and memory that comes and goes behind the addresses of
//! one is not in the way of another.

use device::{Buffer, DType, Device, Region, ViewMut, cuda};
use std::sync::Barrier;

fn floats(region: &Region, start: usize, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    device::copy(ViewMut::of_f32(&mut values), region.view(DType::F32, start, len));
    values
}

fn write(region: &mut Region, start: usize, value: f32, len: usize) {
    let values = vec![value; len];
    device::copy(region.view_mut(DType::F32, start, len), device::View::of_f32(&values));
}

#[test]
fn threads_have_workspaces_of_their_own_and_leave_them_to_others() {
    let _gpu = cuda::for_a_test();
    let gpu = cuda::gpu().unwrap();
    let all_have = Barrier::new(3);
    let first: Vec<u64> = std::thread::scope(|scope| {
        let ask = || {
            let at = gpu.workspace(1000);
            all_have.wait();
            assert_eq!(gpu.workspace(10), at, "the same until more is asked for");
            at
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2], "{first:?}");
    let later = std::thread::spawn(move || gpu.workspace(1000)).join().unwrap();
    assert!(first.contains(&later), "{later:#x} is none of {first:?}");
}

#[test]
fn granules_of_a_standing_region_are_away_by_name_only() {
    let _gpu = cuda::for_a_test();
    let each = 1024;
    let mut region = Region::standing(Device::Cuda, 10 * each, 4096).unwrap();
    assert_eq!((region.granules(), region.device()), (3, Device::Cuda));
    assert!(floats(&region, 0, 2560).iter().all(|x| *x == 0.0));
    write(&mut region, 0, 1.5, 2560);
    region.send_away(1);
    assert!(region.is_here(0) && !region.is_here(1));
    region.bring(1);
    let now = floats(&region, 0, 2560);
    assert!(now.iter().enumerate().all(|(i, x)| *x == if i / each == 1 { 0.0 } else { 1.5 }));
}

#[test]
fn regions_of_threads_come_and_go_at_once() {
    let _gpu = cuda::for_a_test();
    let (granule, granules) = (1024, 12);
    let run = |own: usize| {
        for round in 0..60 {
            let mut region = Region::reserve(Device::Cuda, granules * granule * 4, granule * 4).unwrap();
            for i in 0..granules {
                region.bring(i);
                assert_eq!(floats(&region, i * granule, granule), vec![0.0; granule], "{own} {round} {i}");
                write(&mut region, i * granule, own as f32, granule);
                if i >= 2 {
                    region.send_away(i - 2);
                }
            }
            let last = (granules - 2) * granule;
            assert_eq!(floats(&region, last, 2 * granule), vec![own as f32; 2 * granule]);
            let buffer = Buffer::zeroed(Device::Cuda, 64).unwrap();
            drop(region);
            drop(buffer);
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|own| drop(scope.spawn(move || run(own)))));
}
