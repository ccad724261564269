//! The answer of `trilith plan` as tables.

use super::{GIB, Question};
use crate::show;
use dist::cost::{
    Contender, Decision, Grid, MixtureShape, ModelShape, Offload, Price, Variation, Zero, layer_flows, peers,
    pure_grids, title,
};
use dist::{Axis, MeshShape, Parts, Scheme};
use train::bytes;

/// Bytes of an activation and of a weight as messages carry them.
const ELEMENT_BYTES: f64 = 2.0;

pub fn headline(question: &Question) -> String {
    let Question { config, model, batch, cluster, space, .. } = question;
    let (n, k, h) = config.heads();
    let shape = format!(
        "{} {} layers, width {}, {n} heads ({k} kv) of {h}, {}, vocabulary {}: {} parameters",
        config.family(),
        model.layers,
        model.width,
        feed_forward(model),
        model.vocab,
        show::count(model.params())
    );
    let tokens = (batch.rows * batch.context) as f64;
    let step = format!(
        "{} rows of {} tokens: {} tokens, {}",
        batch.rows,
        batch.context,
        show::count(tokens),
        show::flops(model.step_flops(*batch))
    );
    let devices = format!(
        "{} in nodes of {}, each {} and {:.0} TFLOP/s in products",
        space.devices,
        cluster.node_devices,
        bytes(cluster.device_bytes as u64),
        cluster.flops_per_s / 1e12
    );
    let links = format!(
        "{:.0} GB/s, {:.0} us in a node; {:.0} GB/s, {:.0} us between nodes; {:.0} GB/s to the host",
        cluster.intra.bytes_per_s / 1e9,
        cluster.intra.latency_s * 1e6,
        cluster.inter.bytes_per_s / 1e9,
        cluster.inter.latency_s * 1e6,
        cluster.host_link.bytes_per_s / 1e9
    );
    let facts = show::facts(&[("model", shape), ("step", step), ("devices", devices), ("links", links)]);
    format!("{facts}\nEverything below is predicted: computed from shapes and the figures above.\n\n")
}

fn feed_forward(model: &ModelShape) -> String {
    let Some(MixtureShape { experts, choices, ffn, shared_ffn }) = model.mixture else {
        return format!("ffn {}", model.ffn);
    };
    let shared =
        if shared_ffn > 0 { format!(" and one of {shared_ffn} for every token") } else { String::new() };
    format!("{choices} of {experts} experts of {ffn}{shared}")
}

/// All devices as one tensor mesh: who talks to whom, and how much, in each scheme.
pub fn schemes(question: &Question) -> String {
    let devices = question.space.devices;
    let m = (question.rows * question.batch.context) as f64;
    let rows = pure_grids(&question.model, devices, m)
        .into_iter()
        .map(|(scheme, grid)| scheme_row(question, scheme, grid, m));
    let header = ["scheme", "mesh", "peers", "received / bsh", "per layer", "messages"];
    let table = show::table(&header, rows.collect(), &[2, 3, 4, 5]);
    format!(
        "All {devices} devices as one tensor mesh, one microbatch of {} rows ({} tokens), one layer\n\
         forward and backward: what a rank receives (and sends), and how long its messages take alone\n\
         {table}\n\n",
        question.rows,
        show::count(m)
    )
}

/// What the model's own code exchanges on the same meshes: counted, not computed.
pub fn counted(question: &Question) -> Result<String, train::TrainError> {
    let m = (question.rows * question.batch.context) as f64;
    let grids = pure_grids(&question.model, question.space.devices, m);
    let rows: Vec<Vec<String>> = grids
        .into_iter()
        .map(|(scheme, grid)| counted_row(question, scheme, grid))
        .collect::<Result<_, _>>()?;
    let header = ["scheme", "mesh", "peers", "tokens", "received / bsh", "by the formula", "once a step"];
    let table = show::table(&header, rows, &[2, 3, 4, 5, 6]);
    Ok(format!(
        "Counted: one rank of each of these meshes ran one layer with messages that move nothing (f32;\n\
         tokens: as few whole rows as the mesh can cut; the formula leaves out the sums of norms)\n{table}\n{}\n",
        padding(question)
    ))
}

/// Why some rows are above their formula.
fn padding(question: &Question) -> String {
    let (heads, devices) = (question.model.heads, question.space.devices);
    if heads >= devices {
        return String::new();
    }
    format!(
        "A mesh that cuts the {heads} heads into more pieces pads them with heads of zeros, which travel too:\n\
         there the formula is a lower bound, and the choice below keeps away from such meshes.\n"
    )
}

fn counted_row(question: &Question, scheme: Scheme, grid: Grid) -> Result<Vec<String>, train::TrainError> {
    let shape = MeshShape::new(&[(Axis::X, grid.x), (Axis::Y, grid.y), (Axis::Z, grid.z)]);
    let shape = shape.map_err(|error| train::TrainError::Mesh { what: error.to_string() })?;
    let dry = train::dry_layer(&question.config, shape, (scheme, Parts::default()))?;
    let peers: Vec<String> = dry.peers.iter().map(|(_, count)| count.to_string()).collect();
    let sum: usize = dry.peers.iter().map(|(_, count)| count).sum();
    let bsh = (dry.tokens * question.model.width) as f64;
    let flows = layer_flows(&question.model, scheme, grid, dry.tokens as f64);
    // In 2.5D the sums over depth are paid once a step.
    let depth = |axis: usize| scheme == Scheme::TwoPointFiveD && axis == 2;
    let formula: f64 = (0..3).filter(|axis| !depth(*axis)).map(|axis| flows[axis].elements).sum();
    Ok(vec![
        title(scheme).to_string(),
        sizes(grid),
        if peers.len() > 1 { format!("{} = {sum}", peers.join(" + ")) } else { sum.to_string() },
        show::count(dry.tokens as f64),
        format!("{:.3}", dry.received as f64 / bsh),
        format!("{:.3}", formula / bsh),
        bytes(dry.received_once * 4),
    ])
}

fn sizes(grid: Grid) -> String {
    let sizes = [grid.x, grid.y, grid.z];
    let sizes: Vec<String> = sizes.iter().filter(|size| **size > 1).map(usize::to_string).collect();
    if sizes.is_empty() { "1".into() } else { sizes.join(" x ") }
}

fn scheme_row(question: &Question, scheme: Scheme, grid: Grid, m: f64) -> Vec<String> {
    let mesh = MeshShape::SOLO.with(Axis::X, grid.x).with(Axis::Y, grid.y).with(Axis::Z, grid.z);
    let flows = layer_flows(&question.model, scheme, grid, m);
    let elements: f64 = flows.iter().map(|flow| flow.elements).sum();
    let axes = [Axis::X, Axis::Y, Axis::Z];
    let link = |axis| question.cluster.link(&mesh, axis);
    let seconds: f64 =
        axes.iter().zip(flows).map(|(axis, flow)| link(*axis).seconds(flow, ELEMENT_BYTES)).sum();
    let lines: Vec<String> = [grid.x, grid.y, grid.z]
        .iter()
        .filter(|size| **size > 1)
        .map(|size| (size - 1).to_string())
        .collect();
    let who = if lines.len() > 1 {
        format!("{} = {}", lines.join(" + "), peers(grid))
    } else {
        peers(grid).to_string()
    };
    vec![
        title(scheme).to_string(),
        sizes(grid),
        who,
        format!("{:.3}", elements / (m * question.model.width as f64)),
        bytes((elements * ELEMENT_BYTES) as u64),
        show::short(seconds),
    ]
}

pub fn decision(question: &Question, decision: &Decision, fewer: Option<&Price>) -> String {
    let best = &decision.best;
    let choice = format!("The choice, of {} plans priced\n{}", decision.priced, chosen(question, best));
    let parts = best.seconds.parts().into_iter().filter(|(_, seconds)| *seconds > 0.0);
    let rows = parts.map(|(name, seconds)| {
        vec![name.to_string(), show::short(seconds), format!("{:.1} %", 100.0 * seconds / best.step())]
    });
    let step = show::table(&["part of the step", "", ""], rows.collect(), &[1, 2]);
    let memory = &best.memory;
    let held = [
        ("weights", memory.weights),
        ("gradients", memory.grads),
        ("optimizer state", memory.optimizer),
        ("activations", memory.activations),
        ("on the device", memory.device()),
        ("on the host", memory.host),
    ];
    let rows = held.iter().map(|(name, held)| vec![name.to_string(), bytes(*held as u64)]).collect();
    let memory = show::table(&["memory of the fullest rank", ""], rows, &[1]);
    let note = fewer.map_or(String::new(), |price| {
        let devices = price.plan.mesh.world_size();
        format!(
            "  {devices} of the devices would take {} a step: {}\n",
            show::short(price.step()),
            price.plan.mesh
        )
    });
    format!(
        "{choice}{note}\n{step}\n\n{memory}\n\n{}\n\n{}\n\n{}\n",
        traffic(best),
        contenders(&decision.contenders),
        variations(question, &decision.variations, best)
    )
}

/// How training follows the choice, or why it does not.
pub fn follow(settings: &train::Settings, best: &Price) -> String {
    let host = match best.plan.offload == Offload::default() {
        true => String::new(),
        false => format!("; {} on the host is asked for by [memory]", best.plan.offload),
    };
    match settings.following(best) {
        Ok(_) => {
            let sets = settings.keys_of(best).join(" --set ");
            format!("follow the choice: trilith train RECIPE --set {sets}{host}\n")
        }
        Err(error) => format!("this recipe does not follow the choice: {error}\n"),
    }
}

fn chosen(question: &Question, best: &Price) -> String {
    let plan = &best.plan;
    let (flops, devices) = (question.model.step_flops(question.batch), question.space.devices as f64);
    let reached = flops / best.step() / devices;
    let tokens = (question.batch.rows * question.batch.context) as f64;
    let recompute = if plan.recompute { "every layer" } else { "none" };
    let mut facts = vec![("mesh", plan.mesh.to_string())];
    if plan.mesh.grid().size() > 1 {
        facts.push(("scheme", plan.parts.named(plan.scheme)));
    }
    if plan.mesh.size(Axis::Pp) > 1 {
        facts.push(("schedule", plan.schedule.to_string()));
    }
    if plan.mesh.size(Axis::Fsdp) > 1 {
        facts.push(("fsdp shares", shared(plan.zero).to_string()));
    }
    facts.extend([
        ("microbatches", format!("{} of {} rows", best.microbatches, plan.microbatch_rows)),
        ("recompute", recompute.to_string()),
        ("on the host", plan.offload.to_string()),
        (
            "step, predicted",
            format!(
                "{}: {} tokens/s, {:.0} TFLOP/s a device ({:.0} % of what products reach)",
                show::short(best.step()),
                show::count(tokens / best.step()),
                reached / 1e12,
                100.0 * reached / question.cluster.flops_per_s
            ),
        ),
        ("peers of a rank", best.peers().to_string()),
    ]);
    show::facts(&facts)
}

fn shared(zero: Zero) -> &'static str {
    match zero {
        Zero::One => "optimizer state (ZeRO 1)",
        Zero::Two => "optimizer state and gradients (ZeRO 2)",
        Zero::Three => "optimizer state, gradients and weights (ZeRO 3)",
    }
}

fn traffic(best: &Price) -> String {
    let rows = Axis::ALL.into_iter().filter(|axis| best.plan.mesh.size(*axis) > 1).map(|axis| {
        let traffic = best.traffic[axis as usize];
        vec![
            axis.name().to_string(),
            best.plan.mesh.size(axis).to_string(),
            traffic.peers.to_string(),
            bytes(traffic.bytes as u64),
            show::count(traffic.calls),
        ]
    });
    show::table(&["axis", "ranks", "peers", "received a step", "calls"], rows.collect(), &[1, 2, 3, 4])
        .to_string()
}

fn contenders(contenders: &[Contender]) -> String {
    let rows = contenders.iter().map(|contender| {
        let (step, memory, mesh) = match (&contender.best, &contender.least) {
            (Some(price), _) => (show::short(price.step()), gib(price), price.plan.mesh.to_string()),
            (None, Some(price)) => ("".into(), gib(price), price.plan.mesh.to_string()),
            (None, None) => Default::default(),
        };
        vec![contender.family.to_string(), step, memory, contender.why.clone(), mesh]
    });
    let header = ["best of each family", "step", "GiB", "why it lost", "mesh"];
    show::table(&header, rows.collect(), &[1, 2]).to_string()
}

fn variations(question: &Question, variations: &[Variation], best: &Price) -> String {
    let rows = variations.iter().map(|variation| match &variation.price {
        Err(error) => vec![variation.what.clone(), "".into(), "".into(), error.to_string()],
        Ok(price) => {
            let fits = if price.fits(&question.cluster) { "" } else { "does not fit" };
            let more = 100.0 * (price.step() / best.step() - 1.0);
            vec![variation.what.clone(), format!("{more:+.1} %"), gib(price), fits.to_string()]
        }
    });
    let header = ["the choice but", "step", "GiB", ""];
    show::table(&header, rows.collect(), &[1, 2]).to_string()
}

fn gib(price: &Price) -> String {
    format!("{:.1}", price.memory.device() / GIB)
}
