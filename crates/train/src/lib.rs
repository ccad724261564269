//! The training loop: recipe, schedule, step, metrics. Knows no HTTP.
