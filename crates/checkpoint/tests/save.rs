//! Saved folders are whole, readable by the reference implementation, and survive full disks,
//! read-only disks and kills.

mod common;

use checkpoint::{Array, FolderWriter, OutTensor, SaveError, StateDir, StateError, Weights, save_folder};
use common::floats;
use device::DType;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn tensors() -> Vec<OutTensor> {
    let tensor =
        |name: &str, shape: &[usize], dtype| OutTensor { name: name.into(), shape: shape.into(), dtype };
    vec![
        tensor("embed", &[3, 2], DType::Bf16),
        tensor("norm", &[2], DType::F32),
        tensor("head", &[3, 2], DType::F16),
    ]
}

/// All elements of tensor i are i + 0.5.
fn write(index: usize, out: &mut dyn Write) -> std::io::Result<()> {
    let value = index as f32 + 0.5;
    match index {
        0 => out.write_all(&half::bf16::from_f32(value).to_le_bytes().repeat(6)),
        1 => out.write_all(&floats(&[value; 2])),
        _ => out.write_all(&half::f16::from_f32(value).to_le_bytes().repeat(6)),
    }
}

#[test]
fn a_saved_folder_reads_back_whole_or_in_shards() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("new/model");
    let extra = [("config.json".to_string(), b"{}".to_vec())];
    for (shard_bytes, files) in [(1 << 30, 2), (12, 5), (1 << 30, 2), (20, 4)] {
        save_folder(&dir, &tensors(), write, &extra, shard_bytes).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), files, "shards of {shard_bytes}");
        let weights = Weights::open_folder(&dir).unwrap();
        for (index, tensor) in tensors().iter().enumerate() {
            assert_eq!(weights.find(&tensor.name).unwrap().shape, tensor.shape);
            let values = weights.read_f32(&tensor.name).unwrap();
            assert!(values.iter().all(|x| *x == index as f32 + 0.5), "{values:?}");
        }
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|end| end == "safetensors") {
                let bytes = fs::read(path).unwrap();
                let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
                assert_eq!(header % 8, 0);
                assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
            }
        }
        assert_eq!(fs::read_dir(dir.parent().unwrap()).unwrap().count(), 1, "no temporary stays");
    }
}

#[test]
fn a_failed_save_leaves_the_old_folder() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    save_folder(&dir, &tensors(), write, &[], 1 << 30).unwrap();
    let short = save_folder(&dir, &tensors(), |_, out| out.write_all(&[0; 4]), &[], 1 << 30).unwrap_err();
    assert!(matches!(short, SaveError::Length { expected: 8, written: 4, .. }), "{short}");
    let failing = |_, _: &mut dyn Write| Err(std::io::Error::other("device lost"));
    assert!(save_folder(&dir, &tensors(), failing, &[], 1 << 30).is_err());
    let bad = [OutTensor { name: "ids".into(), shape: vec![1], dtype: DType::U32 }];
    assert!(save_folder(&dir, &bad, write, &[], 1 << 30).unwrap_err().to_string().contains("`ids` is u32"));
    let twice = [tensors()[0].clone(), tensors()[0].clone()];
    assert!(matches!(save_folder(&dir, &twice, write, &[], 1 << 30), Err(SaveError::Name { .. })));
    assert_eq!(Weights::open_folder(&dir).unwrap().read_f32("norm").unwrap(), [1.5; 2]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    // Somebody's other files are not ours to delete.
    fs::write(dir.join("thesis.tex"), "").unwrap();
    let foreign = save_folder(&dir, &tensors(), write, &[], 1 << 30).unwrap_err().to_string();
    assert!(foreign.contains("`thesis.tex`, which is no part of a model"), "{foreign}");
}

/// A small file system of its own, unmounted at the end.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path) -> Option<Mounted> {
        fs::create_dir(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(path)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            println!("skipped: mounting a tmpfs needs root");
        }
        mounted.then(|| Mounted(path.to_path_buf()))
    }

    fn read_only(&self) -> bool {
        let args = ["-o", "remount,ro"];
        Command::new("mount").args(args).arg(&self.0).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn full_and_read_only_disks_leave_what_was_there() {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = Mounted::new(&root.path().join("disk")) else { return };
    let states = disk.0.join("states");
    let dir = StateDir::new(&states, 1).unwrap();
    let intact = || {
        let state = dir.newest().unwrap().checkpoint.unwrap();
        state.verify_all().unwrap();
        assert_eq!(state.step, 1);
        assert_eq!(fs::read_dir(&states).unwrap().count(), 1);
    };
    dir.save(1, &json!({}), &[Array::new("w", &[1; 500_000])]).unwrap();
    let full = dir.save(2, &json!({}), &[Array::new("w", &[2; 600_000])]).unwrap_err();
    assert!(matches!(full, StateError::Save(SaveError::Space { .. })), "{full}");
    intact();
    // Past the check: the disk fills while the files are written.
    let writer = FolderWriter::new(&states.join("step-00000002")).unwrap();
    let error = writer.write("state.bin", &[2; 900_000]).unwrap_err().to_string();
    assert!(error.contains("cannot write") && error.contains("No space left"), "{error}");
    drop(writer);
    intact();
    assert!(disk.read_only());
    let error = dir.save(2, &json!({}), &[Array::new("w", &[2; 10])]).unwrap_err().to_string();
    assert!(error.contains("cannot create") && error.contains("Read-only"), "{error}");
    intact();
}

/// Not a test: what `a_killed_process_leaves_a_whole_state` kills.
#[test]
#[ignore = "runs until killed, as a child of another test"]
fn child_saves_for_ever() {
    let Some(dir) = std::env::var_os("CHECKPOINT_TEST_CHILD") else { return };
    let dir = StateDir::new(Path::new(&dir), 1).unwrap();
    for step in 1u64.. {
        let bytes = vec![step as u8; 300_000];
        dir.save(step, &json!({}), &[Array::new("w", &bytes)]).unwrap();
        println!("\nsaved {step}");
    }
}

#[test]
fn a_killed_process_leaves_a_whole_state() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path(), 1).unwrap();
    for saves in [1, 3, 4, 7] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_saves_for_ever", "--ignored", "--nocapture"])
            .env("CHECKPOINT_TEST_CHILD", root.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let saved = lines.filter(|line| line.starts_with("saved ")).take(saves).count();
        assert_eq!(saved, saves);
        // Somewhere within a later save.
        child.kill().unwrap();
        child.wait().unwrap();
        let state = dir.newest().unwrap().checkpoint.expect("a whole state");
        assert!(state.step >= saves as u64);
        let mut bytes = vec![0; 300_000];
        state.read("w", &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == state.step as u8));
        dir.save(1, &json!({}), &[Array::new("w", &[0])]).unwrap();
        fs::remove_dir_all(root.path()).unwrap();
    }
}
