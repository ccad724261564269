//! Free bytes over the moments of a step, for questions about ranges: a tree of minima.

/// Free bytes by moment. Ranges are cyclic: they may run past the end of the step.
pub(super) struct Room {
    moments: u32,
    leaves: usize,
    /// Least of a subtree, without what waits in `extra` of its ancestors.
    least: Vec<i64>,
    /// Added to the whole subtree.
    extra: Vec<i64>,
}

impl Room {
    /// From the free bytes of each moment.
    pub(super) fn new(free: &[i64]) -> Room {
        let leaves = free.len().next_power_of_two();
        let mut least = vec![i64::MAX / 2; 2 * leaves];
        least[leaves..leaves + free.len()].copy_from_slice(free);
        for node in (1..leaves).rev() {
            least[node] = least[2 * node].min(least[2 * node + 1]);
        }
        Room { moments: free.len() as u32, leaves, least, extra: vec![0; 2 * leaves] }
    }

    /// The fewest free bytes in `len` moments from `first` on; plenty in an empty range.
    pub(super) fn least(&self, first: u32, len: u32) -> i64 {
        let (head, tail) = self.parts(first, len);
        let of =
            |(from, to)| if from == to { i64::MAX / 2 } else { self.least_in(1, 0, self.leaves, from, to) };
        of(head).min(of(tail))
    }

    /// Change the free bytes of `len` moments from `first` on.
    pub(super) fn add(&mut self, first: u32, len: u32, bytes: i64) {
        let (head, tail) = self.parts(first, len);
        for (from, to) in [head, tail] {
            if from != to {
                self.add_in(1, (0, self.leaves), (from, to), bytes);
            }
        }
    }

    /// Take `bytes` if they are free throughout.
    pub(super) fn take(&mut self, first: u32, len: u32, bytes: u64) -> bool {
        let fits = self.least(first, len) >= bytes as i64;
        if fits {
            self.add(first, len, -(bytes as i64));
        }
        fits
    }

    /// Free bytes, moment by moment.
    pub(super) fn by_moment(&self) -> Vec<i64> {
        (0..self.moments).map(|moment| self.least(moment, 1)).collect()
    }

    fn parts(&self, first: u32, len: u32) -> ((usize, usize), (usize, usize)) {
        let (first, moments) = ((first % self.moments) as usize, self.moments as usize);
        let end = first + (len.min(self.moments)) as usize;
        ((first, end.min(moments)), (0, end.saturating_sub(moments)))
    }

    fn least_in(&self, node: usize, low: usize, high: usize, from: usize, to: usize) -> i64 {
        if from <= low && high <= to {
            return self.least[node];
        }
        let middle = (low + high) / 2;
        let mut least = i64::MAX / 2;
        if from < middle {
            least = least.min(self.least_in(2 * node, low, middle, from, to));
        }
        if to > middle {
            least = least.min(self.least_in(2 * node + 1, middle, high, from, to));
        }
        least + self.extra[node]
    }

    fn add_in(&mut self, node: usize, (low, high): (usize, usize), (from, to): (usize, usize), bytes: i64) {
        if from <= low && high <= to {
            self.least[node] += bytes;
            self.extra[node] += bytes;
            return;
        }
        let middle = (low + high) / 2;
        if from < middle {
            self.add_in(2 * node, (low, middle), (from, to), bytes);
        }
        if to > middle {
            self.add_in(2 * node + 1, (middle, high), (from, to), bytes);
        }
        self.least[node] = self.least[2 * node].min(self.least[2 * node + 1]) + self.extra[node];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_array(
            free in prop::collection::vec(-50i64..50, 1..20),
            edits in prop::collection::vec((0u32..40, 0u32..25, -9i64..9), 0..30),
        ) {
            let mut room = Room::new(&free);
            let mut plain = free.clone();
            let moments = free.len() as u32;
            for (first, len, bytes) in edits {
                let range = || (first..first + len.min(moments)).map(|m| (m % moments) as usize);
                let least = range().map(|m| plain[m]).min().unwrap_or(i64::MAX / 2);
                prop_assert_eq!(room.least(first, len), least);
                room.add(first, len, bytes);
                range().for_each(|m| plain[m] += bytes);
                prop_assert_eq!(&room.by_moment(), &plain);
            }
        }
    }
}
