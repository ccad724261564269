//! Which layers each slice of a model gets: runs of layers, so cut that the most costly slice costs
//! as little as it can, the head counted with the last.

use std::ops::Range;

/// Cut layers that cost `layers` (any unit, none below zero) into `slices` runs of at least one
/// layer; the last one also bears `head`. Of the cuts whose most costly run costs least, the one whose
/// runs differ least (least sum of squares); of those, the one whose first runs are longest.
/// None where there are fewer layers than slices.
pub fn balance(layers: &[f64], head: f64, slices: usize) -> Option<Vec<Range<usize>>> {
    let count = layers.len();
    if slices == 0 || count < slices {
        return None;
    }
    // Cost of layers up to i, and of the run i..j as slice s.
    let upto: Vec<f64> = std::iter::once(0.0)
        .chain(layers.iter().scan(0.0, |sum, cost| {
            *sum += cost;
            Some(*sum)
        }))
        .collect();
    let cost = |s: usize, run: &Range<usize>| {
        upto[run.end] - upto[run.start] + if s + 1 == slices { head } else { 0.0 }
    };
    let least = cheapest(count, slices, cost, f64::max, f64::INFINITY)?;
    let cap = (0..slices).map(|s| cost(s, &least[s])).fold(0.0, f64::max);
    // Sums of the same costs in another order differ in their last bits.
    cheapest(count, slices, cost, |sum, cost| sum + cost * cost, cap * (1.0 + 1e-9))
}

/// (layers of the longest slice, layers of the last one) of `balance` for layers that cost 1 each, without
/// cutting; none where there are fewer layers than slices.
pub fn balance_alike(layers: usize, head: f64, slices: usize) -> Option<(usize, usize)> {
    if slices <= 1 || layers < slices {
        return (slices == 1).then_some((layers, layers));
    }
    let others = slices - 1;
    // As `last` grows, so does its cost, and the longest of the others becomes shorter. From where they meet
    // on, the costliest is the last one; below, it pays to go as far as the longest does not grow.
    let meet = ((layers as f64 - others as f64 * head) / slices as f64).ceil().max(1.0) as usize;
    let mut best = (f64::INFINITY, f64::INFINITY, 0, 0);
    for last in (1..=(meet + 1).min(layers - others)).rev() {
        let (each, more) = ((layers - last) / others, (layers - last) % others);
        let (longest, end) = (each + usize::from(more > 0), last as f64 + head);
        if longest as f64 > best.0 {
            break;
        }
        let squares = (more * (each + 1).pow(2) + (others - more) * each.pow(2)) as f64 + end * end;
        let costliest = (longest as f64).max(end);
        if (costliest, squares) <= (best.0, best.1) {
            best = (costliest, squares, longest, last);
        }
    }
    let (_, _, longest, last) = best;
    Some((longest.max(last), last))
}

/// The cut into `slices` runs, none costlier than `cap`, of which `join`ed costs are least: the least for
/// the layers from i on is found for one slice more at a time, from the last.
fn cheapest(
    count: usize,
    slices: usize,
    cost: impl Fn(usize, &Range<usize>) -> f64,
    join: impl Fn(f64, f64) -> f64,
    cap: f64,
) -> Option<Vec<Range<usize>>> {
    // ends[s][i]: where slice s ends when it begins at layer i.
    let mut ends = vec![vec![0; count + 1]; slices];
    let mut rest = vec![f64::INFINITY; count + 1];
    rest[count] = 0.0;
    for s in (0..slices).rev() {
        let mut here = vec![f64::INFINITY; count + 1];
        for start in s..count {
            // The slices behind need a layer each.
            let last = if s + 1 == slices { count } else { count - (slices - 1 - s) };
            let first = if s + 1 == slices { count } else { start + 1 };
            for (end, rest) in rest.iter().enumerate().take(last + 1).skip(first) {
                let own = cost(s, &(start..end));
                if own > cap {
                    break;
                }
                let all = join(*rest, own);
                if all <= here[start] && all.is_finite() {
                    (here[start], ends[s][start]) = (all, end);
                }
            }
        }
        rest = here;
    }
    if !rest[0].is_finite() {
        return None;
    }
    let mut start = 0;
    let cut = ends.iter().map(|ends| {
        let run = start..ends[start];
        start = run.end;
        run
    });
    Some(cut.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lens(layers: usize, head: f64, slices: usize) -> Vec<usize> {
        balance(&vec![1.0; layers], head, slices).unwrap().iter().map(Range::len).collect()
    }

    #[test]
    fn slices_are_as_equal_as_layers_allow() {
        assert_eq!(lens(8, 0.0, 4), [2, 2, 2, 2]);
        assert_eq!(lens(7, 0.0, 4), [2, 2, 2, 1]);
        assert_eq!(lens(5, 0.0, 5), [1; 5]);
        // A head of two layers.
        assert_eq!(lens(10, 2.0, 4), [3, 3, 3, 1]);
        // A head larger than all layers: the rest share what is left.
        assert_eq!(lens(7, 100.0, 3), [3, 3, 1]);
        assert_eq!(balance(&[1.0; 3], 0.0, 4), None);
    }

    proptest! {
        #[test]
        fn layers_that_are_alike_need_no_cutting(layers in 1usize..40, head in 0u32..24, slices in 1usize..20) {
            let head = f64::from(head) / 2.0;
            let found = balance(&vec![1.0; layers], head, slices).map(|cut| {
                let lens: Vec<usize> = cut.iter().map(Range::len).collect();
                (lens.iter().copied().max().unwrap(), lens[slices - 1])
            });
            prop_assert_eq!(balance_alike(layers, head, slices), found);
        }

        /// Against every cut there is.
        #[test]
        fn no_cut_has_a_cheaper_costliest_slice(
            layers in prop::collection::vec(0u32..5, 1..8), head in 0u32..6, slices in 1usize..5,
        ) {
            let costs: Vec<f64> = layers.iter().map(|cost| f64::from(*cost)).collect();
            let Some(found) = balance(&costs, f64::from(head), slices) else {
                prop_assert!(costs.len() < slices);
                return Ok(());
            };
            prop_assert_eq!(found.len(), slices);
            prop_assert!(found.iter().all(|run| !run.is_empty()));
            prop_assert!(found[0].start == 0 && found[slices - 1].end == costs.len());
            prop_assert!(found.windows(2).all(|pair| pair[0].end == pair[1].start));
            let worst = |ends: &[usize]| {
                let starts = std::iter::once(0).chain(ends.iter().copied());
                let runs = starts.zip(ends.iter().copied().chain([costs.len()])).enumerate();
                let cost = runs.map(|(s, (from, to))| {
                    costs[from..to].iter().sum::<f64>() + if s + 1 == slices { f64::from(head) } else { 0.0 }
                });
                cost.fold(0.0, f64::max)
            };
            let ours = worst(&found[..slices - 1].iter().map(|run| run.end).collect::<Vec<_>>());
            // Cuts as sets of bits between layers.
            for bits in 0u32..1 << (costs.len() - 1) {
                if bits.count_ones() as usize == slices - 1 {
                    let ends: Vec<usize> =
                        (1..costs.len()).filter(|end| bits >> (end - 1) & 1 == 1).collect();
                    prop_assert!(ours <= worst(&ends), "{ends:?} is better than {found:?}");
                }
            }
        }
    }
}
