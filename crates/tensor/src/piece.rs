//! The part of a larger matrix that a parameter holds. Where the whole is cut into equal pieces the
//! last ones reach past its end: those elements are zero and stay so.

/// `len` rows or columns of the whole from `from` on, held from `at` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First place here.
    pub at: usize,
    /// First place in the whole.
    pub from: usize,
    /// How many.
    pub len: usize,
}

/// A parameter as the crossing of some rows and columns of a whole matrix; a vector is a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Rows and columns of the whole.
    pub whole: [usize; 2],
    /// Rows held, in the order of their places here.
    pub rows: Vec<Run>,
    /// Columns held.
    pub cols: Vec<Run>,
}

impl Piece {
    /// Elements of the whole.
    pub fn whole_len(&self) -> usize {
        self.whole[0] * self.whole[1]
    }

    /// Elements of the whole that are held.
    pub fn held(&self) -> usize {
        let sum = |runs: &[Run]| runs.iter().map(|run| run.len).sum::<usize>();
        sum(&self.rows) * sum(&self.cols)
    }

    /// `body(first element here, first element of the whole, how many)` for every stretch that is
    /// consecutive in both, when rows here have `ld` elements; in the order of the rows here.
    pub fn stretches(&self, ld: usize, mut body: impl FnMut(usize, usize, usize)) {
        for rows in &self.rows {
            for row in 0..rows.len {
                for cols in &self.cols {
                    let from = (rows.from + row) * self.whole[1] + cols.from;
                    body((rows.at + row) * ld + cols.at, from, cols.len);
                }
            }
        }
    }

    /// Copy what is held out of the whole into `here` (rows of `ld`), whose padding stays.
    pub fn take<T: Copy>(&self, whole: &[T], here: &mut [T], ld: usize) {
        assert_eq!(whole.len(), self.whole_len(), "a whole of {:?}", self.whole);
        self.stretches(ld, |at, from, len| here[at..at + len].copy_from_slice(&whole[from..from + len]));
    }

    /// Copy what is held from `here` to its places in the whole.
    pub fn put<T: Copy>(&self, here: &[T], ld: usize, whole: &mut [T]) {
        assert_eq!(whole.len(), self.whole_len(), "a whole of {:?}", self.whole);
        self.stretches(ld, |at, from, len| whole[from..from + len].copy_from_slice(&here[at..at + len]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_and_putting_are_inverse_and_leave_padding_alone() {
        let rows = vec![Run { at: 0, from: 1, len: 1 }, Run { at: 1, from: 3, len: 2 }];
        let piece = Piece { whole: [5, 4], rows, cols: vec![Run { at: 0, from: 2, len: 2 }] };
        let whole: Vec<u32> = (0..20).collect();
        let mut here = vec![99; 12];
        piece.take(&whole, &mut here, 3);
        assert_eq!(here, [6, 7, 99, 14, 15, 99, 18, 19, 99, 99, 99, 99]);
        let mut back = vec![0; 20];
        piece.put(&here, 3, &mut back);
        assert_eq!(back.iter().sum::<u32>(), 6 + 7 + 14 + 15 + 18 + 19);
        assert_eq!((back[6], back[19], piece.held()), (6, 19, 6));
    }
}
