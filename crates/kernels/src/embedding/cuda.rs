use super::ELSEWHERE;
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{DType, View, ViewMut};

pub(super) fn forward(ids: &[u32], table: View<'_>, d: usize, out: ViewMut<'_>, accumulate: bool) {
    assert_eq!(table.dtype(), out.dtype(), "rows");
    launch(&format!("embedding_forward_{}", suffix(out.dtype())))
        .ids(ids)
        .read(table)
        .write(&out)
        .u32(usize::from(accumulate))
        .over_rows(ids.len(), d, run_of(&[out.dtype()]))
        .run();
}

pub(super) fn backward(ids: &[u32], dout: View<'_>, d: usize, dtable: ViewMut<'_>) {
    assert_eq!(dtable.dtype(), DType::F32, "gradients of the table");
    let Users { rows, starts, tokens } = users(ids);
    launch(&format!("embedding_backward_{}", suffix(dout.dtype())))
        .ids(&rows)
        .ids(&starts)
        .ids(&tokens)
        .read(dout)
        .write(&dtable)
        .over_rows(rows.len(), d, run_of(&[dout.dtype()]))
        .run();
}

/// Who uses which row of the table.
struct Users {
    /// Rows that somebody uses, ascending.
    rows: Vec<u32>,
    /// First of the tokens of each row, and of none. [rows + 1]
    starts: Vec<u32>,
    /// By row, in their own order among those of one.
    tokens: Vec<u32>,
}

fn users(ids: &[u32]) -> Users {
    let order = sorted(ids);
    let mut users = Users { rows: Vec::new(), starts: Vec::new(), tokens: Vec::with_capacity(order.len()) };
    for (id, token) in order {
        if users.rows.last() != Some(&id) {
            users.rows.push(id);
            users.starts.push(users.tokens.len() as u32);
        }
        users.tokens.push(token);
    }
    users.starts.push(users.tokens.len() as u32);
    users
}

/// (id, token) by id, of one id by token: as many passes, which keep the order of equals, as the ids have
/// digits of 11 bits.
fn sorted(ids: &[u32]) -> Vec<(u32, u32)> {
    const DIGITS: usize = 1 << 11;
    let here = |(id, _): &(u32, u32)| *id != ELSEWHERE;
    let mut pairs: Vec<(u32, u32)> = ids.iter().copied().zip(0..).filter(here).collect();
    let mut out = pairs.clone();
    let largest = pairs.iter().map(|(id, _)| *id).max().unwrap_or(0);
    for shift in (0..32).step_by(11).take_while(|shift| largest >> shift != 0) {
        let digit = |id: u32| (id >> shift) as usize % DIGITS;
        let mut next = [0; DIGITS];
        pairs.iter().for_each(|(id, _)| next[digit(*id)] += 1);
        next.iter_mut().fold(0, |first, count| first + std::mem::replace(count, first));
        for pair in &pairs {
            let place = &mut next[digit(pair.0)];
            out[*place] = *pair;
            *place += 1;
        }
        std::mem::swap(&mut pairs, &mut out);
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_a_row_stand_in_the_order_of_the_tokens() {
        let ids: Vec<u32> = (0..3000u32)
            .map(|i| if i % 7 == 3 { ELSEWHERE } else { i.wrapping_mul(2_654_435_761) % 40 * 123_457 })
            .collect();
        let mut want: Vec<(u32, u32)> =
            ids.iter().copied().zip(0..).filter(|(id, _)| *id != ELSEWHERE).collect();
        want.sort();
        assert_eq!(sorted(&ids), want);
        let Users { rows, starts, tokens } = users(&ids);
        assert!(
            rows.is_sorted()
                && rows.len() + 1 == starts.len()
                && starts.last() == Some(&(tokens.len() as u32))
        );
        let runs = rows.iter().zip(starts.windows(2));
        let flat =
            runs.flat_map(|(row, run)| tokens[run[0] as usize..run[1] as usize].iter().map(|t| (*row, *t)));
        assert!(flat.eq(want));
        assert_eq!(users(&[ELSEWHERE]).starts, [0]);
    }
}
