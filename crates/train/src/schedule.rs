//! The learning rate as a pure function of the step.

/// Shape of the schedule after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Half a cosine down to the minimum at the last step (SGDR, Loshchilov and Hutter 2017).
    Cosine,
    /// A straight line down to the minimum at the last step.
    Linear,
    /// Warmup, stable, decay (MiniCPM, Hu et al. 2024): flat until the last `decay` steps.
    Wsd {
        /// Steps of the final straight line.
        decay: u64,
    },
    /// Flat.
    Constant,
}

/// Learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the last step.
    pub min_lr: f64,
    /// Steps of the straight line up from 0.
    pub warmup: u64,
    /// Steps of the run.
    pub steps: u64,
    /// What follows the warmup.
    pub decay: Decay,
}

impl Schedule {
    /// Learning rate of `step`, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * step as f64 / self.warmup as f64;
        }
        let from = match self.decay {
            Decay::Wsd { decay } => self.steps.saturating_sub(decay).max(self.warmup),
            _ => self.warmup,
        };
        if step <= from || self.steps <= from {
            return self.lr;
        }
        let done = ((step - from) as f64 / (self.steps - from) as f64).min(1.0);
        let left = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Linear | Decay::Wsd { .. } => 1.0 - done,
            Decay::Constant => 1.0,
        };
        self.min_lr + (self.lr - self.min_lr) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(decay: Decay) -> Schedule {
        Schedule { lr: 1.0, min_lr: 0.1, warmup: 10, steps: 110, decay }
    }

    #[test]
    fn every_shape_warms_up_and_ends_where_it_says() {
        for decay in [Decay::Cosine, Decay::Linear, Decay::Wsd { decay: 20 }] {
            let schedule = of(decay);
            assert!((schedule.at(1) - 0.1).abs() < 1e-12);
            assert!((schedule.at(10) - 1.0).abs() < 1e-12);
            assert!((schedule.at(110) - 0.1).abs() < 1e-12, "{decay:?}");
            assert!((schedule.at(500) - 0.1).abs() < 1e-12, "past the end");
            let falling = (10..110).all(|step| schedule.at(step + 1) <= schedule.at(step));
            assert!(falling, "{decay:?}");
        }
        assert_eq!(of(Decay::Constant).at(110), 1.0);
    }

    #[test]
    fn the_middle_of_each_shape() {
        assert!((of(Decay::Cosine).at(60) - 0.55).abs() < 1e-12);
        assert!((of(Decay::Linear).at(60) - 0.55).abs() < 1e-12);
        assert_eq!(of(Decay::Wsd { decay: 20 }).at(90), 1.0);
        assert!((of(Decay::Wsd { decay: 20 }).at(100) - 0.55).abs() < 1e-12);
    }

    #[test]
    fn a_warmup_as_long_as_the_run_is_a_ramp() {
        let schedule = Schedule { lr: 1.0, min_lr: 0.0, warmup: 4, steps: 4, decay: Decay::Cosine };
        assert_eq!([1, 2, 3, 4].map(|step| schedule.at(step)), [0.25, 0.5, 0.75, 1.0]);
    }
}
