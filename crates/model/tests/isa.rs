//! Every family against `transformers` on every instruction set of this machine. A binary of its
//! own with one test: the choice holds for the whole process.

mod common;

use common::{FAMILIES, Golden};
use device::Isa;

#[test]
fn every_instruction_set_matches() {
    for isa in Isa::available() {
        assert!(Isa::choose(isa));
        for family in FAMILIES {
            for (dtype, tolerances) in Golden::dtypes(family) {
                Golden::open(family, *dtype).check(&format!("{family} {}", isa.name()), tolerances);
            }
        }
    }
}
