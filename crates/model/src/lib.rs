//! Layers, then families: config, forward, weight names. Knows no tiers, no ranks.
