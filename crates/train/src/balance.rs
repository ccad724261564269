//! How evenly the experts of a mixture were asked in a step.

use crate::stages;
use dist::Mesh;
use std::collections::BTreeMap;
use tensor::{Fault, Load};

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

/// Loads of all stages in the order in which one rank meets them, from `own` with their microbatches. Every
/// stage calls it.
pub(crate) fn of_stages(mesh: &Mesh, own: Vec<(usize, Load)>) -> Result<Vec<Load>, Fault> {
    let words: Vec<Vec<f64>> = own.iter().map(|(microbatch, load)| to_words(*microbatch, load)).collect();
    let sizes = stages::over_stages(mesh, &[words.len() as f64, words.first().map_or(0, Vec::len) as f64])?;
    // A stage may have fewer layers with experts than another, or none.
    let most = |of: usize| sizes.iter().map(|sizes| sizes[of] as usize).max().unwrap_or(0);
    let (most, each) = (most(0), most(1));
    if most == 0 {
        return Ok(Vec::new());
    }
    let mut mine = words.concat();
    mine.resize(most * each, 0.0);
    let all = stages::over_stages(mesh, &mine)?;
    let mut loads: Vec<(usize, Load)> = Vec::new();
    for (stage, sizes) in all.iter().zip(&sizes) {
        loads.extend(stage.chunks_exact(each).take(sizes[0] as usize).map(from_words));
    }
    loads.sort_by_key(|(microbatch, load)| (*microbatch, load.layer));
    Ok(loads.into_iter().map(|(_, load)| load).collect())
}

fn to_words(microbatch: usize, load: &Load) -> Vec<f64> {
    let Load { layer, choices, balance, share, margin } = load;
    let head = [microbatch as f64, *layer as f64, *balance, f64::from(*share), f64::from(*margin)];
    head.into_iter().chain(choices.iter().copied()).collect()
}

fn from_words(words: &[f64]) -> (usize, Load) {
    let (share, margin, choices) = (words[3] as f32, words[4] as f32, words[5..].to_vec());
    (words[0] as usize, Load { layer: words[1] as usize, choices, balance: words[2], share, margin })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_tell_each_other_every_bit_of_a_load() {
        let (layer, choices, margin) = (7, vec![3.0, 0.0, 1e9], f32::INFINITY);
        let load = Load { layer, choices, balance: 1.0 / 3.0, share: 0.1, margin };
        assert_eq!(from_words(&to_words(5, &load)), (5, load));
    }

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
