//! The kernels' text as a library of the host.

use crate::Isa;
use crate::cuda::driver::Kernel;
use libloading::Library;
use std::collections::hash_map::DefaultHasher;
use std::ffi::{CString, c_char, c_void};
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// What stands in for the language.
const HEADERS: &[(&str, &str)] = &[
    ("emulate.h", include_str!("../../../emulate/emulate.h")),
    ("fibers.h", include_str!("../../../emulate/fibers.h")),
    ("launch.h", include_str!("../../../emulate/launch.h")),
    ("warp.h", include_str!("../../../emulate/warp.h")),
];

const COMPILER: &str = "g++";
const TEXT: &str = "kernels.cu";
const LIBRARY: &str = "kernels.so";

/// Products and sums stay apart, as on the GPU; and arrays are read as vectors of other types.
const OPTIONS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-w",
    "-DTRILITH_EMULATED",
];

type Trampoline = unsafe extern "C" fn(*mut *mut c_void);
type Launch =
    unsafe extern "C" fn(Trampoline, *const c_char, *const [u32; 3], *const [u32; 3], u32, *mut *mut c_void);

pub(super) struct Program {
    library: Library,
}

impl Program {
    /// Compiled at most once for all processes whose executables share a folder.
    pub fn compile(source: &str) -> Result<Program, String> {
        let options = options();
        let mut hasher = DefaultHasher::new();
        (source, HEADERS, &options).hash(&mut hasher);
        let folder = folder().join(format!("{:016x}", hasher.finish()));
        if !folder.exists() {
            build(&folder, source, &options)?;
        }
        let path = folder.join(LIBRARY);
        // SAFETY: a library of kernels; its initialisers do no more than list them.
        let library = unsafe { Library::new(&path) };
        let library = library.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Program { library })
    }

    /// # Safety
    /// The arguments are those of the kernel.
    pub unsafe fn launch(&self, kernel: &Kernel<'_>, arguments: &mut [*mut c_void]) {
        let name = CString::new(kernel.name).expect("no zeros in a name");
        // SAFETY: what KERNEL leaves of each kernel, by its name, and the one function of the emulator.
        let (run, count, launch) = unsafe {
            let run = self.symbol::<Trampoline>(&format!("emulated_{}", kernel.name));
            let count = *self.symbol::<*const u32>(&format!("arguments_of_{}", kernel.name));
            (run, count, self.symbol::<Launch>("emulate_launch"))
        };
        assert_eq!(arguments.len(), count as usize, "arguments of kernel {}", kernel.name);
        let (grid, threads) = (&raw const kernel.grid, &raw const kernel.threads);
        // SAFETY: the caller's promise.
        unsafe { launch(run, name.as_ptr(), grid, threads, kernel.shared_bytes, arguments.as_mut_ptr()) };
    }

    /// # Safety
    /// The symbol is of that type.
    unsafe fn symbol<T: Copy>(&self, name: &str) -> T {
        // SAFETY: the caller's promise.
        match unsafe { self.library.get::<T>(name.as_bytes()) } {
            Ok(symbol) => *symbol,
            Err(error) => panic!("the program has no such kernel: {error}"),
        }
    }
}

fn options() -> Vec<&'static str> {
    let mut options = OPTIONS.to_vec();
    if Isa::detected() >= Isa::Avx2 {
        options.extend(["-mavx2", "-mfma"]);
    }
    options
}

/// Beside the executable, so within the folder of what was built.
fn folder() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    executable.parent().unwrap_or(Path::new(".")).join("emulated")
}

/// Several processes may do the same at once: each fills a folder of its own, and the first to rename it wins.
fn build(folder: &Path, source: &str, options: &[&str]) -> Result<(), String> {
    static BUILT: AtomicU32 = AtomicU32::new(0);
    let own =
        folder.with_extension(format!("{}-{}", std::process::id(), BUILT.fetch_add(1, Ordering::Relaxed)));
    let told = |error: io::Error| format!("{}: {error}", own.display());
    std::fs::create_dir_all(&own).map_err(told)?;
    for (name, text) in HEADERS.iter().chain(&[(TEXT, source)]) {
        std::fs::write(own.join(name), text).map_err(told)?;
    }
    let mut command = Command::new(COMPILER);
    command.current_dir(&own).args(options);
    command.args(["-include", HEADERS[0].0, "-x", "c++", TEXT, "-o", LIBRARY]);
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("{COMPILER}, which compiles kernels for the CPU, is not on this machine; install it")
        }
        _ => format!("{COMPILER}: {error}"),
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "{COMPILER} cannot compile the kernels for the CPU ({}):\n{said}",
            own.display()
        ));
    }
    if let Err(error) = std::fs::rename(&own, folder) {
        if !folder.exists() {
            return Err(told(error));
        }
        std::fs::remove_dir_all(&own).map_err(told)?;
    }
    Ok(())
}
