//! The kernels compile for the GPUs there are, where NVRTC can be had: no GPU is needed for that.

use device::cuda;

#[test]
fn every_kernel_compiles_for_every_generation() {
    if !cuda::has_compiler() {
        let required = option_env!("TRILITH_NVRTC") == Some("required");
        assert!(!required, "NVRTC is not on this machine; run this under scripts/with_cuda.sh");
        return eprintln!("skipped: NVRTC is not on this machine");
    }
    for architecture in ["sm_80", "sm_90"] {
        for part in kernels::cuda::parts() {
            let image = cuda::compile(&part, architecture).unwrap_or_else(|error| panic!("{error}"));
            assert!(image.starts_with(b"\x7fELF"), "machine code for {architecture}");
        }
    }
}
