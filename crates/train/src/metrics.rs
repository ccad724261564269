//! What a run writes down about itself: one JSON object a line, and TensorBoard events.
//!
//! A resumed run cuts the log back to where its state was saved, so that the log of a run that was
//! killed reads as if it had not been, timings aside.

use crate::balance::Balance;
use crate::budget::BudgetChange;
use crate::predicted::{Predicted, PredictedLink};
use crate::tensorboard::EventWriter;
use dist::Counts;
use memory::pager::{LinkCount, TierCount, TierReport};
use memory::plan::Stretch;
use serde_json::{Map, Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The log of a run.
pub struct Metrics {
    path: PathBuf,
    file: File,
    len: u64,
    events: Option<EventWriter>,
}

/// The log cannot be written or is not the one the state belongs to.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The system refused.
    #[error(
        "cannot write {path}: {source}; free space or make the folder writable, then run again with --resume"
    )]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log lost lines that the saved state counts on.
    #[error(
        "{path} has {found} bytes, but had {wanted} when the state was saved; restore the file, or start anew in another run.dir"
    )]
    Shorter {
        /// Which file.
        path: PathBuf,
        /// Bytes now.
        found: u64,
        /// Bytes at the save.
        wanted: u64,
    },
}

/// One step as it is written down.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMetrics {
    /// Counted from 1.
    pub step: u64,
    /// Mean over the learned targets of the global batch, in nats.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Whether the gradients were applied; false when loss or norm were not finite.
    pub applied: bool,
    /// Tokens of all steps so far.
    pub tokens: u64,
    /// Epochs so far, as a fraction.
    pub epoch: f64,
    /// Duration of the step.
    pub seconds: f64,
    /// Tokens of this step over its duration.
    pub tokens_per_s: f64,
    /// Counted FLOPs over duration, in GFLOP/s.
    pub gflops: f64,
    /// That over the measured peak of the machine.
    pub mfu: f64,
    /// What the tiers of the state did, where it has some.
    pub tiers: Option<TierReport>,
    /// What this rank exchanged with others, by axes; empty on a mesh of one.
    pub messages: Vec<Messages>,
    /// How evenly experts were asked, where the model has some.
    pub balance: Option<Balance>,
}

/// What one rank exchanged in a step over one set of axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Messages {
    /// The axes, like `fsdp` or `dp`.
    pub axes: String,
    /// Bytes that left the rank.
    pub sent_bytes: u64,
    /// Bytes that reached it.
    pub received_bytes: u64,
    /// Seconds the rank waited instead of computing.
    pub exposed_s: f64,
    /// Seconds of calls beside computation, waited for or not.
    pub beside_s: f64,
}

impl Messages {
    /// What was exchanged over each set of axes between two counts of one rank; nothing of axes that
    /// were silent.
    pub(crate) fn between(before: &[Counts], after: &[Counts]) -> Vec<Messages> {
        let since = |after: &Counts| {
            let before = before.iter().find(|before| before.axes == after.axes);
            let less = |of: &dyn Fn(&Counts) -> u64| of(after) - before.map_or(0, of);
            let less_s = |of: &dyn Fn(&Counts) -> f64| of(after) - before.map_or(0.0, of);
            Messages {
                axes: after.axes.clone(),
                sent_bytes: less(&|counts| counts.bytes_sent),
                received_bytes: less(&|counts| counts.bytes_received),
                exposed_s: less_s(&|counts| counts.exposed_s),
                beside_s: less_s(&|counts| counts.beside_s),
            }
        };
        let silent = |m: &Messages| m.sent_bytes + m.received_bytes == 0 && m.exposed_s + m.beside_s == 0.0;
        after.iter().map(since).filter(|messages| !silent(messages)).collect()
    }
}

impl Metrics {
    /// Begin at `len` bytes of `dir/metrics.jsonl` (0: anew), the first step being `step` + 1.
    pub fn open(dir: &Path, len: u64, step: u64, tensorboard: bool) -> Result<Metrics, MetricsError> {
        let path = dir.join("metrics.jsonl");
        let failed = |source| MetricsError::Write { path: path.clone(), source };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        if found < len {
            return Err(MetricsError::Shorter { path, found, wanted: len });
        }
        file.set_len(len).map_err(failed)?;
        let events = tensorboard.then(|| EventWriter::create(&dir.join("tensorboard"), step));
        let events = events.transpose().map_err(failed)?;
        Ok(Metrics { path, file, len, events })
    }

    /// Bytes written, for the state that is saved now; they are on disk when this returns.
    pub fn sync(&mut self) -> Result<u64, MetricsError> {
        self.file.sync_data().map_err(|source| MetricsError::Write { path: self.path.clone(), source })?;
        Ok(self.len)
    }

    /// Write down what was predicted before the first step.
    pub fn predicted(&mut self, predicted: &Predicted) -> Result<(), MetricsError> {
        let Predicted { step_s, memory_bytes, links } = predicted;
        let mut line = json!({"kind": "predicted", "step_s": step_s, "memory_bytes": memory_bytes});
        let mut named = vec![
            ("predicted/step_s".to_string(), *step_s),
            ("predicted/memory_bytes".to_string(), *memory_bytes as f64),
        ];
        let link = |link: &PredictedLink| {
            json!({
                "link": format!("{}-{}", link.upper, link.lower), "up_bytes": link.up_bytes,
                "down_bytes": link.down_bytes, "stall_s": link.stall_s,
            })
        };
        if !links.is_empty() {
            line["links"] = links.iter().map(link).collect();
        }
        for link in links {
            let name = |what: &str| format!("predicted/{}-{}/{what}", link.upper, link.lower);
            named.push((name("up_bytes"), link.up_bytes as f64));
            named.push((name("down_bytes"), link.down_bytes as f64));
            named.push((name("stall_s"), link.stall_s));
        }
        let points: Vec<(&str, f64)> = named.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        self.put(0, &line, &points)
    }

    /// Write a step down.
    pub fn step(&mut self, m: &StepMetrics) -> Result<(), MetricsError> {
        let mut line = json!({
            "kind": "step", "step": m.step, "loss": finite(m.loss), "lr": m.lr,
            "grad_norm": finite(m.grad_norm), "applied": m.applied, "tokens": m.tokens, "epoch": m.epoch,
            "seconds": m.seconds, "tokens_per_s": m.tokens_per_s, "gflops": m.gflops, "mfu": m.mfu,
        });
        let mut points = vec![
            ("train/loss", m.loss),
            ("train/lr", m.lr),
            ("train/grad_norm", m.grad_norm),
            ("speed/tokens_per_s", m.tokens_per_s),
            ("speed/mfu", m.mfu),
        ];
        if let Some(balance) = &m.balance {
            line["balance"] = json!({"loss": finite(balance.loss), "imbalance": finite(balance.imbalance)});
            points.push(("experts/balance_loss", balance.loss));
            points.push(("experts/imbalance", balance.imbalance));
        }
        let mut named = Vec::new();
        if let Some(tiers) = &m.tiers {
            line["tiers"] = tiers_line(tiers);
            named.extend(tiers_points(tiers));
        }
        if !m.messages.is_empty() {
            line["messages"] = messages_line(&m.messages);
            named.extend(m.messages.iter().flat_map(messages_points));
        }
        points.extend(named.iter().map(|(name, value)| (name.as_str(), *value)));
        self.put(m.step, &line, &points)
    }

    /// Write a validation down.
    pub fn validation(&mut self, step: u64, loss: f64, targets: u64) -> Result<(), MetricsError> {
        let perplexity = loss.exp();
        let line = json!({
            "kind": "validation", "step": step, "loss": finite(loss), "perplexity": finite(perplexity),
            "targets": targets,
        });
        self.put(step, &line, &[("valid/loss", loss), ("valid/perplexity", perplexity)])
    }

    /// Write down that other budgets were asked for after `step`.
    pub fn budget(&mut self, step: u64, change: &BudgetChange) -> Result<(), MetricsError> {
        let BudgetChange { budgets, refused } = change;
        let tiers = budgets.tiers().into_iter().map(|tier| (tier.to_string(), json!(budgets.of(tier))));
        let mut line = json!({"kind": "budget", "step": step, "bytes": tiers.collect::<Map<_, _>>()});
        if let Some(why) = refused {
            line["refused"] = json!(why);
        }
        self.put(step, &line, &[])
    }

    fn put(&mut self, step: u64, line: &Value, points: &[(&str, f64)]) -> Result<(), MetricsError> {
        let line = format!("{line}\n");
        let events = &mut self.events;
        let written = self.file.write_all(line.as_bytes()).and_then(|()| match events {
            Some(events) => events.scalars(step, points),
            None => Ok(()),
        });
        written.map_err(|source| MetricsError::Write { path: self.path.clone(), source })?;
        self.len += line.len() as u64;
        Ok(())
    }
}

fn tiers_line(tiers: &TierReport) -> Value {
    let link = |link: &LinkCount| {
        json!({
            "link": format!("{}-{}", link.upper, link.lower), "up_bytes": link.up_bytes,
            "down_bytes": link.down_bytes, "bound_bytes": link.bound_bytes, "gap": link.gap(),
            "up_s": link.up_s, "down_s": link.down_s, "stall_s": link.stall_s,
        })
    };
    let stretch = |stretch: Stretch| {
        json!({
            "compute_s": stretch.compute_s, "up_bytes": stretch.up_bytes, "down_bytes": stretch.down_bytes,
        })
    };
    let tier = |tier: &TierCount| {
        json!({
            "tier": tier.tier.to_string(), "peak_bytes": tier.peak_bytes,
            "capacity_bytes": tier.capacity_bytes,
        })
    };
    json!({
        "links": tiers.links.iter().map(link).collect::<Vec<_>>(), "tiers": tiers.tiers.iter().map(tier).collect::<Vec<_>>(),
        "other_bytes": tiers.other_bytes, "stretches": tiers.stretches.map(|both| both.map(stretch)),
    })
}

fn tiers_points(tiers: &TierReport) -> Vec<(String, f64)> {
    let peak = |tier: &TierCount| (format!("memory/{}/peak_bytes", tier.tier), tier.peak_bytes as f64);
    let mut points: Vec<_> = tiers.tiers.iter().map(peak).collect();
    for link in &tiers.links {
        let name = |what: &str| format!("memory/{}-{}/{what}", link.upper, link.lower);
        points.push((name("up_bytes"), link.up_bytes as f64));
        points.push((name("down_bytes"), link.down_bytes as f64));
        points.push((name("stall_s"), link.stall_s));
        if let (Some(bound), Some(gap)) = (link.bound_bytes, link.gap()) {
            points.push((name("bound_bytes"), bound as f64));
            points.push((name("gap"), gap));
        }
    }
    points
}

fn messages_line(messages: &[Messages]) -> Value {
    let line = |m: &Messages| {
        json!({
            "axes": m.axes, "sent_bytes": m.sent_bytes, "received_bytes": m.received_bytes,
            "exposed_s": m.exposed_s, "beside_s": m.beside_s,
        })
    };
    messages.iter().map(line).collect()
}

fn messages_points(messages: &Messages) -> [(String, f64); 3] {
    let name = |what: &str| format!("mesh/{}/{what}", messages.axes);
    [
        (name("received_bytes"), messages.received_bytes as f64),
        (name("exposed_s"), messages.exposed_s),
        (name("beside_s"), messages.beside_s),
    ]
}

/// JSON has no NaN and no infinity; a text keeps what happened.
fn finite(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { json!(x.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_is_cut_back_to_the_save() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Metrics::open(dir.path(), 0, 0, false).unwrap();
        log.validation(1, 2.0, 10).unwrap();
        let saved = log.sync().unwrap();
        log.validation(2, f64::NAN, 10).unwrap();
        drop(log);
        let mut log = Metrics::open(dir.path(), saved, 1, false).unwrap();
        log.validation(2, 1.0, 10).unwrap();
        let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let losses: Vec<Value> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].clone()).collect();
        assert_eq!(losses, [json!(2.0), json!(1.0)]);
        let shorter = Metrics::open(dir.path(), 10_000, 1, false).err().unwrap();
        assert!(shorter.to_string().contains("10000 when the state was saved"));
    }
}
