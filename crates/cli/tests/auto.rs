//! `mesh = "auto"`: the mesh is chosen by measured speeds, told, trained on and written down.

mod common;

use common::Place;

#[test]
fn a_run_finds_its_mesh_and_writes_it_down() {
    let place = Place::new();
    for (ranks, dir) in [("2", "two"), ("4", "four")] {
        let dir_set = format!("run.dir={dir}");
        let output = place.run(&[
            "train",
            "tiny.toml",
            "--ranks",
            ranks,
            "--set",
            "mesh=auto",
            "--set",
            "train.steps=3",
            "--set",
            "train.accumulate=2",
            "--set",
            &dir_set,
        ]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        for part in ["mesh = auto", "the choice", "GFLOP/s in products", "predicted, ", "measured (median"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let resolved = place.path(&format!("{dir}/recipe.toml"));
        let recipe = train::Settings::read(&resolved).unwrap().recipe().unwrap();
        assert_eq!(recipe.mesh.shape.world_size().to_string(), ranks);
        assert!(!recipe.mesh.auto);
        assert_eq!(recipe.train.batch * recipe.train.accumulate, 4, "rows of a step stay");
        // What is written down is a recipe of its own.
        let again = format!("{dir}/recipe.toml");
        let output = place.run(&["train", &again, "--ranks", ranks, "--overwrite"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_plan_for_here_names_options_that_train_takes() {
    let place = Place::new();
    let lines = place.succeeds(&["plan", "tiny.toml", "--here", "--ranks", "2", "--json"]);
    let plans: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let step = |plan: &serde_json::Value| plan["step_s"].as_f64().unwrap();
    assert!(plans.len() >= 4 && plans.is_sorted_by(|a, b| step(a) <= step(b)), "{lines}");
    assert!(plans.iter().all(|plan| step(plan) > 0.0 && step(plan).is_finite()));
    let worst = plans.last().unwrap();
    let mut arguments = vec!["train", "tiny.toml", "--ranks", "2"];
    for set in worst["sets"].as_array().unwrap() {
        arguments.extend(["--set", set.as_str().unwrap()]);
    }
    place.succeeds(&arguments);
}

/// Every plan for experts, with `ep` and without, is one that training takes.
#[test]
fn experts_are_spread_too() {
    let place = Place::new();
    let mixture =
        ["--set", "model.family=mixtral", "--set", "model.experts=4", "--set", "train.accumulate=2"];
    let lines =
        place.succeeds(&[&["plan", "tiny.toml", "--here", "--ranks", "2", "--json"][..], &mixture].concat());
    let plans: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for axis in ["mesh.pp=2", "mesh.cp=2", "mesh.ep=2", "mesh.x=2"] {
        let plan = plans.iter().find(|plan| plan["sets"].as_array().unwrap().iter().any(|set| set == axis));
        let plan = plan.unwrap_or_else(|| panic!("{axis} is not among {lines}"));
        let mut arguments =
            vec!["train", "tiny.toml", "--ranks", "2", "--set", "train.steps=2", "--overwrite"];
        arguments.extend(mixture);
        for set in plan["sets"].as_array().unwrap() {
            arguments.extend(["--set", set.as_str().unwrap()]);
        }
        let output = place.run(&arguments);
        assert!(output.status.success(), "{axis}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let output = place.run(
        &[&["train", "tiny.toml", "--overwrite", "--ranks", "2", "--set", "mesh=auto"][..], &mixture]
            .concat(),
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("the choice"), "{said}");
}

#[test]
fn what_cannot_be_chosen_is_refused_with_a_remedy() {
    let place = Place::new();
    for (arguments, want) in [
        (["--set", "mesh=auto", "--set", "mesh.x=2"], "leave one of them away"),
        (["--set", "mesh=auto", "--ranks", "1000"], "1 to 256"),
        (["--set", "mesh=auto", "--ranks", "17"], "choose another number of ranks or of rows"),
        (["--set", "mesh=best", "--set", "train.steps=1"], "one of \"given\", \"auto\""),
    ] {
        let said = place.fails(&[&["train", "tiny.toml"][..], &arguments].concat());
        assert!(said.contains(want), "{arguments:?}: {said}");
    }
}
