//! NCCL is found and has every call we make, where it can be had: no GPU is needed for that.

use device::cuda;

#[test]
fn the_library_has_every_call() {
    let nccl = match cuda::peers() {
        Ok(nccl) => nccl,
        Err(missing) => {
            let required = option_env!("TRILITH_NCCL") == Some("required");
            assert!(!required, "{missing}");
            assert!(missing.to_string().contains("libnccl.so.2"), "{missing}");
            return eprintln!("skipped: {missing}");
        }
    };
    let name = nccl.name();
    let version = name.strip_prefix("NCCL 2.").unwrap_or_else(|| panic!("{name}"));
    let minor: usize = version.split('.').next().and_then(|minor| minor.parse().ok()).expect("a number");
    assert!(minor >= 14, "{name}");
    // Ids are made without a GPU, of addresses of this machine.
    let [first, second] = [(); 2].map(|()| nccl.unique_id().unwrap_or_else(|error| panic!("{error}")));
    assert_ne!(first, second);
    assert!(first.0.iter().any(|byte| *byte != 0));
    eprintln!("{name}");
}
