use super::*;
use crate::testkit::*;
use device::DType;

#[test]
fn a_rotation_agrees_with_complex_numbers_and_turns_back() {
    let (m, heads, h, ld) = (5, 3, 8, 30);
    let table = RopeTable::new(h, 10_000.0, &RopeScaling::None, 40);
    let positions = [0, 1, 7, 39, 3];
    let before = random(m * ld, 1);
    let mut x = before.clone();
    apply(ViewMut::of_f32(&mut x), ld, heads, h, &positions, &table, false);
    for (row, p) in positions.iter().enumerate() {
        for head in 0..heads {
            for i in 0..h / 2 {
                let angle = *p as f64 * 10_000f64.powf(-2.0 * i as f64 / h as f64);
                let at = row * ld + head * h + i;
                let (a, b) = (before[at] as f64, before[at + h / 2] as f64);
                assert!((x[at] as f64 - (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
                assert!((x[at + h / 2] as f64 - (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
            }
        }
        assert_eq!(
            x[row * ld + heads * h..][..ld - heads * h],
            before[row * ld + heads * h..][..ld - heads * h]
        );
    }
    apply(ViewMut::of_f32(&mut x), ld, heads, h, &positions, &table, true);
    assert_close("back", &f64s(&x), &f64s(&before), 1e-6);
    let mut half = Floats::new(&before, DType::Bf16);
    apply(half.view_mut(), ld, heads, h, &positions, &table, false);
    apply(half.view_mut(), ld, heads, h, &positions, &table, true);
    assert_close("bf16 back", &half.to_f64(), &f64s(&before), 0.02);
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| *x as f64).collect()
}

#[test]
fn llama3_scaling_keeps_high_frequencies_and_stretches_low_ones() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192,
    };
    let (plain, long) =
        (RopeTable::new(128, 500_000.0, &RopeScaling::None, 9), RopeTable::new(128, 500_000.0, &scaling, 9));
    assert_eq!(plain.at(8).1[0], long.at(8).1[0]);
    let (fast, slow) = (plain.at(1).1[63], long.at(8).1[63]);
    assert!((fast - slow).abs() < 1e-9, "position 8 stretched by 8 is position 1");
}
