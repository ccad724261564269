//! How ranks share flat arrays: in stripes of as many granules as there are ranks, granule r of each
//! being rank r's. So a stripe is gathered or scattered by one collective over equal pieces that
//! lie side by side. Pure; nothing here talks to anybody.

use std::ops::Range;

/// Granules of fewer elements are no whole pages in every element type: 8-bit moments have one byte.
const LEAST: usize = 4096;

/// Granules of more elements wait longer than they save: 2 MiB of bf16, which is a huge page.
const MOST: usize = 1 << 20;

/// Granules a model has at least, unless they would be smaller than `LEAST`: what lies beyond the
/// last element of the last stripe is a small part.
const GRANULES: usize = 128;

/// The share of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripes {
    /// Elements of a granule. Follows from the length of the arrays alone, so that sums over granules
    /// have the same order on any number of ranks.
    pub granule: usize,
    /// Ranks that share.
    pub ranks: usize,
    /// Which of them we are.
    pub index: usize,
}

impl Stripes {
    /// The share of rank `index` of `ranks` in arrays of `len` elements.
    pub fn new(len: usize, ranks: usize, index: usize) -> Stripes {
        assert!(index < ranks, "rank {index} of {ranks}");
        let granule = (len / GRANULES).next_power_of_two().clamp(LEAST, MOST);
        Stripes { granule, ranks, index }
    }

    /// Elements of a stripe.
    pub fn stripe(&self) -> usize {
        self.granule * self.ranks
    }

    /// Stripes that cover `len` elements; the last one may reach beyond.
    pub fn count(&self, len: usize) -> usize {
        len.div_ceil(self.stripe())
    }

    /// Stripes that hold some of `elements`.
    pub fn of(&self, elements: &Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return 0..0;
        }
        elements.start / self.stripe()..(elements.end - 1) / self.stripe() + 1
    }

    /// Elements of a stripe's granule that is ours.
    pub fn own(&self, stripe: usize) -> Range<usize> {
        let start = stripe * self.stripe() + self.index * self.granule;
        start..start + self.granule
    }

    /// Granules of a stripe.
    pub fn granules(&self, stripe: usize) -> Range<usize> {
        stripe * self.ranks..(stripe + 1) * self.ranks
    }

    /// Whether a granule is ours.
    pub fn has(&self, granule: usize) -> bool {
        granule % self.ranks == self.index
    }

    /// Runs of `elements` that are ours, each within one granule, in order.
    pub fn owned(self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        self.of(&elements)
            .map(move |stripe| {
                let own = self.own(stripe);
                own.start.max(elements.start)..own.end.min(elements.end)
            })
            .filter(|run| run.start < run.end)
    }

    /// Where an element of ours lies when our granules stand one after the other.
    pub fn packed(&self, element: usize) -> usize {
        element / self.stripe() * self.granule + element % self.granule
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_one_owner_and_one_place_there() {
        for (len, ranks) in [(1, 1), (5000, 2), (100_000, 3), (34_000, 4), (2048 * 12, 6)] {
            let mut owners = vec![0; len];
            for index in 0..ranks {
                let stripes = Stripes::new(len, ranks, index);
                assert_eq!(stripes.granule, Stripes::new(len, 1, 0).granule);
                let mut next = 0;
                for run in stripes.owned(0..len) {
                    assert!(run.len() <= stripes.granule);
                    assert_eq!(stripes.packed(run.start), next, "{stripes:?} {run:?}");
                    next = stripes.packed(run.end - 1) + 1;
                    owners[run].iter_mut().for_each(|owner| *owner += 1);
                }
                // Runs of a part are those of the whole, cut.
                let part: Vec<_> = stripes.owned(len / 3..len / 2).flatten().collect();
                let whole: Vec<_> =
                    stripes.owned(0..len).flatten().filter(|i| (len / 3..len / 2).contains(i)).collect();
                assert_eq!(part, whole);
            }
            assert!(owners.iter().all(|owner| *owner == 1), "{len} elements over {ranks}");
        }
    }

    #[test]
    fn granules_are_whole_pages_and_grow_with_the_model() {
        let granule = |len| Stripes::new(len, 4, 0).granule;
        assert_eq!([granule(1), granule(34_000), granule(1 << 20)], [4096, 4096, 8192]);
        assert_eq!([granule(134 << 20), granule(7_000_000_000)], [1 << 20, 1 << 20]);
    }
}
