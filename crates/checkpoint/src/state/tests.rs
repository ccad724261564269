//! A state survives whatever happens while it, or another, is being saved.

use super::*;
use crate::effects::failpoint::{Failure, run};
use serde_json::json;
use std::fs;

fn arrays(seed: u8) -> Vec<Array<'static>> {
    let bytes = |n: usize| (0..n).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect::<Vec<u8>>();
    let sizes = [("weights", 3 * 4096 + 5), ("moments", 100), ("empty", 0)];
    sizes.map(|(name, n)| Array { name: name.into(), bytes: bytes(n).into() }).into()
}

fn newest(dir: &StateDir) -> Checkpoint {
    dir.newest().unwrap().checkpoint.expect("a whole state")
}

fn assert_holds(state: &Checkpoint, seed: u8) {
    for array in arrays(seed) {
        let mut out = vec![0; array.bytes.len()];
        state.read(&array.name, &mut out).unwrap();
        assert_eq!(out, *array.bytes, "{}", array.name);
    }
}

#[test]
fn what_was_saved_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(&root.path().join("states"), 2).unwrap();
    assert!(dir.newest().unwrap().checkpoint.is_none());
    let meta = json!({ "loss": 0.1 + 0.2, "position": [1, 2] });
    let report = dir.save(100, &meta, &arrays(7)).unwrap();
    assert!(report.bytes > 3 * 4096 && report.pruned == 0);
    let state = newest(&dir);
    assert_eq!((state.step, &state.meta), (100, &meta));
    assert_holds(&state, 7);
    state.verify_all().unwrap();
    assert!(state.arrays().iter().all(|array| array.offset % 4096 == 0));
    let wrong = state.read("weights", &mut [0; 3]).unwrap_err().to_string();
    assert!(wrong.contains("`weights` has 12293 bytes, 3 were asked for"), "{wrong}");
    assert!(matches!(state.read("nothing", &mut []), Err(StateError::Missing { .. })));
    let twice = [Array::new("a", b"x"), Array::new("a", b"y")];
    assert!(matches!(dir.save(1, &meta, &twice), Err(StateError::Duplicate { .. })));
    assert!(matches!(StateDir::new(root.path(), 0), Err(StateError::KeepLast)));
}

#[test]
fn the_newest_is_whole_and_old_or_new_wherever_a_save_stops() {
    for failure in [Failure::Crash, Failure::Once] {
        for effects in 0.. {
            let root = tempfile::tempdir().unwrap();
            let dir = StateDir::new(root.path(), 1).unwrap();
            dir.save(1, &json!(null), &arrays(1)).unwrap();
            let (result, reached) = run(effects, failure, || dir.save(2, &json!(null), &arrays(2)));
            let state = newest(&dir);
            assert!(state.step == 2 || (state.step == 1 && result.is_err()), "after {effects} effects");
            assert_holds(&state, state.step as u8);
            // The next save succeeds and leaves nothing behind.
            dir.save(3, &json!(null), &arrays(3)).unwrap();
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "after {effects} effects");
            if !reached {
                break;
            }
        }
    }
}

#[test]
fn saving_a_step_again_is_as_safe() {
    for effects in 0.. {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path(), 1).unwrap();
        dir.save(5, &json!("old"), &arrays(1)).unwrap();
        let (_, reached) = run(effects, Failure::Crash, || dir.save(5, &json!("new"), &arrays(2)));
        let state = newest(&dir);
        assert_holds(&state, if state.meta == json!("old") { 1 } else { 2 });
        if !reached {
            break;
        }
    }
}

#[test]
fn any_flipped_bit_is_found_and_named() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path(), 3).unwrap();
    dir.save(1, &json!({}), &arrays(1)).unwrap();
    dir.save(2, &json!({}), &arrays(2)).unwrap();
    let (manifest, data) = (dir.step_path(2).join("manifest.json"), dir.step_path(2).join("state.bin"));
    let whole = fs::read(&manifest).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&manifest, &bytes).unwrap();
        let found = dir.newest().unwrap();
        assert_eq!(found.checkpoint.unwrap().step, 1, "byte {at}");
        let message = found.skipped[0].1.to_string();
        assert!(message.contains("manifest.json") && message.contains("remove its folder"), "{message}");
    }
    fs::write(&manifest, &whole).unwrap();
    let bytes = fs::read(&data).unwrap();
    for (at, named) in [
        (0, "`weights`, block 0 (byte 0"),
        (12292, "`weights`"),
        (16384 + 9, "`moments`, block 0 (byte 16384"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        fs::write(&data, &bytes).unwrap();
        let message = dir.open(2).unwrap().verify_all().unwrap_err().to_string();
        assert_eq!(newest(&dir).step, 1);
        assert!(message.contains(named) && message.contains("remove the folder"), "{message}");
    }
}

#[test]
fn truncated_and_missing_files_are_passed_over() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path(), 3).unwrap();
    dir.save(1, &json!({}), &arrays(1)).unwrap();
    dir.save(2, &json!({}), &arrays(2)).unwrap();
    for name in ["manifest.json", "state.bin"] {
        let path = dir.step_path(2).join(name);
        let whole = fs::read(&path).unwrap();
        for length in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let found = dir.newest().unwrap();
            assert_eq!(
                (found.checkpoint.unwrap().step, found.skipped.len()),
                (1, 1),
                "{name} cut to {length}"
            );
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(newest(&dir).step, 1);
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(newest(&dir).step, 2);
}

#[test]
fn pruning_keeps_whole_ones_and_what_lies_ahead() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path(), 2).unwrap();
    let steps = || dir.list().unwrap().iter().map(|state| state.step).collect::<Vec<_>>();
    for step in [10, 20, 30] {
        dir.save(step, &json!({}), &arrays(0)).unwrap();
    }
    assert_eq!(steps(), [20, 30]);
    fs::write(dir.step_path(30).join("state.bin"), "damaged").unwrap();
    dir.save(40, &json!({}), &arrays(0)).unwrap();
    assert_eq!(steps(), [20, 30, 40], "a damaged state counts for nothing");
    dir.save(15, &json!({}), &arrays(0)).unwrap();
    assert_eq!(steps(), [15, 20, 30, 40], "a rewound run removes nothing ahead of it");
    dir.save(50, &json!({}), &arrays(0)).unwrap();
    assert_eq!(steps(), [40, 50]);
}

#[test]
fn blocks_are_visited_in_order() {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::new(root.path(), 1).unwrap();
    let big: Vec<u8> = (0..BLOCK_BYTES as usize * 2 + 3).map(|i| (i >> 12) as u8).collect();
    dir.save(1, &json!({}), &[Array::new("big", &big)]).unwrap();
    let mut seen = Vec::new();
    newest(&dir)
        .for_each_block("big", |first, bytes| {
            assert_eq!(first, seen.len() as u64);
            seen.extend_from_slice(bytes);
            Ok::<(), StateError>(())
        })
        .unwrap();
    assert!(seen == big);
    let path = dir.step_path(1).join("state.bin");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let message = dir.open(1).unwrap().read("big", &mut vec![0; big.len()]).unwrap_err().to_string();
    assert!(message.contains("block 2 (byte 8388608"), "{message}");
}

#[test]
fn the_saver_returns_buffers_and_earlier_failures() {
    let root = tempfile::tempdir().unwrap();
    let states = root.path().join("states");
    let dir = StateDir::new(&states, 1).unwrap();
    let mut saver = Saver::start(dir.clone()).unwrap();
    assert!(saver.take_buffers().is_empty());
    saver.save(1, json!({}), vec![("w".into(), vec![1; 10_000])]).unwrap();
    let mut buffers = saver.take_buffers();
    let address = buffers[0].1.as_ptr();
    buffers[0].1.fill(2);
    saver.save(2, json!({}), buffers).unwrap();
    let buffers = saver.take_buffers();
    assert_eq!(buffers[0].1.as_ptr(), address, "the same memory");
    assert_eq!(saver.poll().unwrap().unwrap().step, 2);
    // A file where the folder should be: the next save fails, and the one after tells.
    fs::rename(&states, root.path().join("moved")).unwrap();
    fs::write(&states, "in the way").unwrap();
    saver.save(3, json!({}), buffers).unwrap();
    let failure = saver.save(4, json!({}), vec![("w".into(), vec![4])]).unwrap_err().to_string();
    assert!(failure.contains("states"), "{failure}");
    fs::remove_file(&states).unwrap();
    fs::rename(root.path().join("moved"), &states).unwrap();
    let buffers = saver.take_buffers();
    assert_eq!(buffers[0].1, [4], "the snapshot not written is kept");
    saver.save(4, json!({}), buffers).unwrap();
    assert_eq!(saver.finish().unwrap().unwrap().step, 4);
    assert_eq!(newest(&dir).step, 4);
}

#[test]
fn manifest_content_is_checked_behind_its_checksum() {
    use super::manifest::parse_body;
    let array = |name: &str, offset: u64, bytes: u64, sums: usize| json!({ "name": name, "offset": offset, "bytes": bytes, "crc32c": vec![0; sums] });
    let body = |format: u64, arrays: serde_json::Value| {
        let body = json!({ "format": format, "step": 1, "meta": null, "file_bytes": 8192, "block_bytes": BLOCK_BYTES, "arrays": arrays });
        parse_body(body.to_string().as_bytes())
    };
    assert!(body(1, json!([array("a", 0, 5, 1), array("b", 4096, 4096, 1)])).is_ok());
    assert_eq!(body(2, json!([])), Err(ManifestError::Format(2)));
    for arrays in [
        json!([array("a", 0, 5, 1), array("a", 4096, 5, 1)]),
        json!([array("a", 0, 5000, 1), array("b", 4096, 5, 1)]),
        json!([array("a", 1, 5, 1)]),
        json!([array("a", 0, 8193, 1)]),
        json!([array("a", 4096, u64::MAX, 1)]),
        json!([array("a", 0, 5, 2)]),
    ] {
        assert!(matches!(body(1, arrays), Err(ManifestError::Content(_))));
    }
}
