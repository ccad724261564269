//! The compiler of kernels, and what it made kept on disk for the next process.

use super::driver::Program;
use cudarc::nvrtc::sys as rtc;
use std::collections::hash_map::DefaultHasher;
use std::ffi::{CString, c_char, c_int};
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::ptr::{null, null_mut};

/// Machine code of each part, compiled side by side where it is not kept yet.
pub(super) fn compile_all(
    program: &Program<'_>,
    architecture: &str,
    kept: Option<&Path>,
) -> Result<Vec<Vec<u8>>, String> {
    let one = |part: &&str| {
        let source = format!("{}\n{part}", program.common);
        let Some(kept) = kept else { return compile(&source, architecture) };
        let file = kept.join(format!("{architecture}-{:016x}.cubin", key(&source)));
        if let Some(image) = std::fs::read(&file).ok().filter(|image| image.starts_with(MACHINE_CODE)) {
            return Ok(image);
        }
        let image = compile(&source, architecture)?;
        keep(&file, &image);
        Ok(image)
    };
    std::thread::scope(|scope| {
        let parts: Vec<_> = program.parts.iter().map(|part| scope.spawn(move || one(part))).collect();
        let joined = parts.into_iter().map(|part| part.join());
        joined.map(|part| part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// What images begin with: they are ELF files.
const MACHINE_CODE: &[u8] = b"\x7fELF";

fn key(source: &str) -> u64 {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { rtc::nvrtcVersion(&mut major, &mut minor) };
    let mut hasher = DefaultHasher::new();
    (source, major, minor, OPTIONS).hash(&mut hasher);
    hasher.finish()
}

/// Whole or not at all. A folder that cannot be written only costs the next process time.
fn keep(file: &Path, image: &[u8]) {
    let aside = file.with_extension(format!("{}.part", std::process::id()));
    let folder = file.parent().map_or(Ok(()), std::fs::create_dir_all);
    let kept =
        folder.and_then(|()| std::fs::write(&aside, image)).and_then(|()| std::fs::rename(&aside, file));
    if kept.is_err() {
        std::fs::remove_file(&aside).ok();
    }
}

/// Products and sums stay apart (see `common.cuh`); lambdas in kernels run where the kernels run, as older compilers
/// want to be told.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "-default-device"];

/// Whether NVRTC is on this machine.
pub fn has_compiler() -> bool {
    // SAFETY: looks for a library and does nothing else.
    unsafe { rtc::is_culib_present() }
}

/// Machine code of a program for an architecture (`sm_90`), by NVRTC, which must be there; no GPU is needed.
pub fn compile(source: &str, architecture: &str) -> Result<Vec<u8>, String> {
    let source = CString::new(source).map_err(|error| error.to_string())?;
    let options = OPTIONS.map(String::from).into_iter().chain([format!("--gpu-architecture={architecture}")]);
    let options: Vec<CString> = options.map(|option| CString::new(option).expect("no zeros")).collect();
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = null_mut();
    // SAFETY: strings that end in zeros and outlive the calls; sizes are asked for before buffers are filled.
    unsafe {
        let name = c"trilith.cu".as_ptr();
        let made = rtc::nvrtcCreateProgram(&mut program, source.as_ptr(), name, 0, null(), null());
        if made != rtc::nvrtcResult::NVRTC_SUCCESS {
            return Err(format!("NVRTC: {made:?}"));
        }
        let result = rtc::nvrtcCompileProgram(program, options.len() as c_int, options.as_ptr());
        let outcome = match result {
            rtc::nvrtcResult::NVRTC_SUCCESS => {
                let mut bytes = 0;
                rtc::nvrtcGetCUBINSize(program, &mut bytes);
                let mut image = vec![0u8; bytes];
                match rtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) {
                    rtc::nvrtcResult::NVRTC_SUCCESS => Ok(image),
                    failed => Err(format!("NVRTC: {failed:?}")),
                }
            }
            failed => {
                let mut bytes = 0;
                rtc::nvrtcGetProgramLogSize(program, &mut bytes);
                let mut log = vec![0u8; bytes];
                rtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
                let log = String::from_utf8_lossy(&log);
                let log = log.trim_end_matches(['\0', '\n']);
                Err(format!("NVRTC cannot compile the kernels for {architecture}: {failed:?}\n{log}"))
            }
        };
        rtc::nvrtcDestroyProgram(&mut program);
        outcome
    }
}
