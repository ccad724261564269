//! `mesh = "auto"`: what it leaves open, and a choice written back as keys.

use super::values::{Get, impossible};
use super::{Recipe, RecipeError, Settings};
use dist::cost::Price;
use dist::{Axis, MeshShape, Parts, Scheme};

/// Whether the mesh is to be chosen; refuses one that is given beside it.
pub(super) fn asked(
    get: &Get<'_>,
    shape: &MeshShape,
    (scheme, parts): (Option<Scheme>, Parts),
) -> Result<bool, RecipeError> {
    let auto = get.text("mesh.axes").is_some_and(|axes| axes == "auto");
    let pins = [("scheme", scheme), ("attention_scheme", parts.attention), ("ffn_scheme", parts.ffn)];
    let mut pins = pins.into_iter().filter_map(|(key, scheme)| Some((key, scheme?)));
    let given = match (shape.world_size(), pins.next()) {
        (1, None) => return Ok(auto),
        (1, Some((key, scheme))) => format!("mesh.{key} = \"{}\"", scheme.name()),
        _ => format!("mesh `{shape}`"),
    };
    if auto {
        return impossible(
            format!("mesh = \"auto\" and {given} are given"),
            "auto chooses axes and schemes for the ranks there are (--ranks); leave one of them away",
        );
    }
    Ok(false)
}

impl Settings {
    /// The keys that make a run follow `price`, as `--set` takes them; what the recipe says itself about
    /// recomputing stays.
    pub fn keys_of(&self, price: &Price) -> Vec<String> {
        let plan = &price.plan;
        let mesh = &plan.mesh;
        let mut sets = vec!["mesh.axes=given".to_string()];
        sets.extend(Axis::ALL.map(|axis| format!("mesh.{}={}", axis.name(), mesh.size(axis))));
        let scheme = if mesh.grid().size() == 1 { "auto" } else { plan.scheme.name() };
        sets.push(format!("mesh.scheme={scheme}"));
        for (part, scheme) in [("attention", plan.parts.attention), ("ffn", plan.parts.ffn)] {
            let own = scheme.filter(|own| *own != plan.scheme).map_or("same", Scheme::name);
            sets.push(format!("mesh.{part}_scheme={own}"));
        }
        sets.push(format!("mesh.zero={}", plan.zero as usize + 1));
        sets.extend(schedule(plan.schedule, mesh.size(Axis::Pp)));
        sets.push(format!("train.batch={}", plan.microbatch_rows * mesh.replicas()));
        sets.push(format!("train.accumulate={}", price.microbatches));
        if !self.says_recompute() {
            sets.push(format!("train.recompute={}", if plan.recompute { "always" } else { "never" }));
        }
        sets
    }

    /// "auto" leaves it open.
    fn says_recompute(&self) -> bool {
        let auto = self.get("train.recompute").is_some_and(|word| word.as_str() == Some("auto"));
        self.gives("train.recompute_layers") || self.gives("train.recompute") && !auto
    }

    /// The recipe that follows `price`, if training can: every rule of recipes holds for it too.
    pub fn following(&self, price: &Price) -> Result<(Settings, Recipe), RecipeError> {
        let mut settings = self.clone();
        self.keys_of(price).iter().try_for_each(|argument| settings.set(argument))?;
        let recipe = settings.recipe()?;
        let wants = recipe.train.recompute == model::Recompute::Always;
        if self.says_recompute() && wants != price.plan.recompute {
            return impossible(
                format!("a plan with recompute = {} for a recipe that says otherwise", price.plan.recompute),
                "another plan",
            );
        }
        Ok((settings, recipe))
    }
}

fn schedule(schedule: dist::pipeline::Schedule, stages: usize) -> Vec<String> {
    use dist::pipeline::Schedule;
    let (name, slices) = match schedule {
        Schedule::GPipe => ("gpipe", None),
        Schedule::Interleaved { chunks } => ("interleaved", Some(chunks)),
        Schedule::ZeroBubble if stages > 1 => ("zero-bubble", None),
        _ => ("1f1b", None),
    };
    let slices = slices.map(|slices| format!("mesh.virtual={slices}"));
    [format!("mesh.schedule={name}")].into_iter().chain(slices).collect()
}
