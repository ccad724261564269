//! How evenly the experts of a mixture were asked in a step.

use std::collections::BTreeMap;
use tensor::Load;

/// Of the whole global batch, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    /// Load-balancing loss before its factor, the mean over the layers that have experts: the experts
    /// a token goes to when loads are even, more when they are not.
    pub loss: f64,
    /// Tokens of the expert with most over their mean, in the layer where that is largest.
    pub imbalance: f64,
}

impl Balance {
    /// Of the loads of every layer in every microbatch; none where no layer has experts.
    pub(crate) fn of(loads: &[Load]) -> Option<Balance> {
        let mut layers: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        let (mut loss, mut shares) = (0.0, 0.0);
        for load in loads {
            loss += f64::from(load.share) * load.balance;
            shares += f64::from(load.share);
            let sums = layers.entry(load.layer).or_insert_with(|| vec![0.0; load.choices.len()]);
            sums.iter_mut().zip(&load.choices).for_each(|(sum, choices)| *sum += choices);
        }
        let uneven = |sums: &Vec<f64>| {
            let mean = sums.iter().sum::<f64>() / sums.len() as f64;
            let top = sums.iter().fold(0.0, |top: f64, sum| top.max(*sum));
            if top > 0.0 { top / mean } else { 1.0 }
        };
        let imbalance = layers.values().map(uneven).reduce(f64::max)?;
        Some(Balance { loss: if shares > 0.0 { loss / shares } else { 0.0 }, imbalance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microbatches_count_by_their_share_and_layers_alike() {
        let load = |layer, choices: [f64; 2], balance, share| Load {
            layer,
            choices: choices.to_vec(),
            balance,
            share,
            margin: 0.0,
        };
        assert_eq!(Balance::of(&[]), None);
        let loads = [
            load(1, [4.0, 4.0], 1.0, 0.75),
            load(3, [6.0, 2.0], 2.0, 0.75),
            load(1, [0.0, 8.0], 3.0, 0.25),
            load(3, [4.0, 4.0], 4.0, 0.25),
        ];
        let balance = Balance::of(&loads).unwrap();
        assert_eq!(balance, Balance { loss: (0.75 * 3.0 + 0.25 * 7.0) / 2.0, imbalance: 1.5 });
    }
}
