//! Every family against `transformers` on every instruction set of this machine. A binary of its
//! own with one test: the choice holds for the whole process.

mod common;

use common::{BF16, F32, FAMILIES, Golden};
use device::Isa;
use tensor::DType;

#[test]
fn every_instruction_set_matches() {
    for isa in Isa::available() {
        assert!(Isa::choose(isa));
        for family in FAMILIES {
            for (dtype, tolerances) in [(DType::F32, F32), (DType::Bf16, BF16)] {
                Golden::open(family, dtype).check(&format!("{family} {}", isa.name()), &tolerances);
            }
        }
    }
}
