//! What is planned can be trained: the `--set` options of every plan make a recipe that holds.

use dist::cost::{Batch, Cluster, Pair, Plan, PlanError, Price, Space, Zero, every, price, search};
use dist::pipeline::Schedule;
use dist::{Axis, Communicator, Mesh, MeshShape, Parts, Scheme};
use model::{Config, Model};
use train::Settings;
use train::recipe::{ModelRecipe, Recipe};

/// Recipes of models that differ in what meshes may cut.
const MODELS: [&str; 4] = [
    "model = { layers = 4, width = 256, heads = 8 }\ntrain = { batch = 8, context = 256 }",
    "model = { family = 'gpt2', layers = 6, width = 96, heads = 6 }\ntrain = { batch = 3, accumulate = 4, context = 64 }",
    "model = { layers = 24, width = 512, heads = 16, kv_heads = 2 }\ntrain = { batch = 16, accumulate = 4, context = 2048 }",
    // Rows so short that only few context ranks can cut them; layers that run again are the planner's choice.
    "model = { layers = 2, width = 64, heads = 4 }\ntrain = { batch = 16, context = 6, recompute = 'auto' }",
];

struct Case {
    settings: Settings,
    recipe: Recipe,
    config: Config,
    batch: Batch,
}

fn case(text: &str) -> Case {
    let whole = format!("run = {{ dir = 'run' }}\ndata = {{ path = 'corpus.txt' }}\n{text}");
    let settings = Settings::parse(&whole, "a test").unwrap();
    let recipe = settings.recipe().unwrap();
    let ModelRecipe::New(mut json) = recipe.model.clone() else { unreachable!("a new model") };
    json["vocab_size"] = 512.into();
    let train = &recipe.train;
    let batch = Batch { rows: train.batch * train.accumulate, context: train.context };
    Case { config: Config::from_json(&json).unwrap(), batch, settings, recipe }
}

impl Case {
    fn cluster(&self) -> Cluster {
        self.recipe.cluster.cluster
    }

    /// Training follows it, on the mesh and in the rows that were planned.
    fn follows(&self, price: &Price) {
        let plan = &price.plan;
        let (_, recipe) = self.settings.following(price).unwrap_or_else(|error| {
            panic!("{} with {} and {}: {error}", plan.mesh, plan.scheme, plan.zero);
        });
        assert_eq!(recipe.mesh.shape, plan.mesh);
        if plan.mesh.grid().size() > 1 {
            let parts = [Pair::Attention, Pair::Mlp].map(|part| recipe.mesh.parts.of(part, plan.scheme));
            assert_eq!(recipe.mesh.scheme(), plan.scheme);
            assert_eq!(parts, [Pair::Attention, Pair::Mlp].map(|part| plan.scheme_of(part)));
        }
        let shape = plan.mesh;
        let mesh = Mesh::new(shape, Communicator::null(0, shape.world_size())).unwrap();
        let flow = recipe.mesh.flow(&mesh).unwrap();
        Model::build_on(&self.config, recipe.train.context, &flow).unwrap();
        assert_eq!((recipe.mesh.sharding.zero, recipe.mesh.schedule), (plan.zero, plan.schedule));
        assert_eq!(recipe.train.batch, plan.microbatch_rows * plan.mesh.replicas());
        assert_eq!(recipe.train.accumulate, price.microbatches);
        assert!(!recipe.train.recompute_auto, "ranks cannot leave it open");
    }
}

#[test]
fn every_plan_for_a_few_ranks_is_a_recipe_that_holds() {
    for text in MODELS {
        let case = case(text);
        for ranks in [1, 2, 3, 4, 6, 8] {
            let plans = every(&case.config.shape(), case.batch, &case.cluster(), ranks);
            plans.iter().for_each(|price| case.follows(price));
            assert!(!plans.is_empty(), "{ranks} ranks: {text}");
            // Stages whose ranks share optimizer state stay among them.
            let shared = |p: &Price| p.plan.mesh.size(Axis::Pp) > 1 && p.plan.mesh.size(Axis::Fsdp) > 1;
            assert!(ranks < 8 || plans.iter().any(shared), "{text}");
        }
    }
}

#[test]
fn what_a_search_finds_is_a_recipe_that_holds() {
    for text in MODELS {
        let case = case(text);
        for devices in [8, 48, 1024] {
            let space = Space { devices, mesh: None, offload: true };
            let Ok(decision) = search(&case.config.shape(), case.batch, &case.cluster(), space) else {
                continue;
            };
            case.follows(&decision.best);
            decision
                .contenders
                .iter()
                .filter_map(|found| found.best.as_ref())
                .for_each(|best| case.follows(best));
            let changed = decision.variations.iter().filter_map(|changed| changed.price.as_ref().ok());
            changed.for_each(|price| case.follows(price));
        }
    }
}

/// The planner and the recipe refuse with the same words.
#[test]
fn a_clash_is_the_same_to_planner_and_recipe() {
    let case = case(MODELS[2]);
    let plan = Plan {
        mesh: MeshShape::SOLO,
        scheme: Scheme::OneD,
        parts: Default::default(),
        zero: Zero::One,
        schedule: Schedule::OneFOneB,
        microbatch_rows: 1,
        recompute: false,
        offload: Default::default(),
    };
    let plane = MeshShape::SOLO.with(Axis::X, 2).with(Axis::Y, 2);
    let (boxed, deep) =
        (plane.with(Axis::Z, 2), Parts { attention: Some(Scheme::TwoPointFiveD), ..Parts::default() });
    for (plan, sets) in [
        (Plan { mesh: plane, ..plan }, &["mesh.x=2", "mesh.y=2", "mesh.scheme=1d"][..]),
        (Plan { mesh: MeshShape::SOLO.with(Axis::Cp, 1100), ..plan }, &["mesh.cp=1100"]),
        (
            Plan { mesh: boxed, scheme: Scheme::ThreeD, parts: deep, ..plan },
            &["mesh.x=2", "mesh.y=2", "mesh.z=2", "mesh.attention_scheme=2.5d"],
        ),
    ] {
        let planned = price(&case.config.shape(), case.batch, &case.cluster(), &plan).unwrap_err();
        assert!(matches!(planned, PlanError::Clash(_)), "{planned}");
        let mut settings = case.settings.clone();
        sets.iter().for_each(|set| settings.set(set).unwrap());
        assert_eq!(settings.recipe().unwrap_err().to_string(), planned.to_string());
    }
    // Stages share whatever ranks share.
    let staged = MeshShape::SOLO.with(Axis::Pp, 2).with(Axis::Fsdp, 2);
    for zero in [Zero::One, Zero::Two, Zero::Three] {
        let shared = Plan { mesh: staged, zero, ..plan };
        case.follows(&price(&case.config.shape(), case.batch, &case.cluster(), &shared).unwrap());
    }
}
