//! What a result needs to be understood later: the machine, its kernel, the versions, how busy it was.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::peers;

/// Instruction sets that decide matrix speed; the other hundred flags are noise.
const ISA: &[&str] = &["avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "sve", "bf16", "i8mm"];

/// Facts as JSON; what cannot be read is null.
pub fn facts(root: &Path, python: Option<&Path>) -> Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let venv = peers::venv_python(root);
    json!({
        "cpu": field(&cpuinfo, "model name"),
        "cores": std::thread::available_parallelism().ok().map(|cores| cores.get()),
        "isa": isa(field(&cpuinfo, "flags").or(field(&cpuinfo, "Features")).unwrap_or_default()),
        "gpu": said("nvidia-smi", &["--query-gpu=name,driver_version", "--format=csv,noheader"]),
        "memory": std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(|text| field(text, "MemTotal")),
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "load_average_before": first_line("/proc/loadavg"),
        "commit": said("git", &["-C", &root.to_string_lossy(), "rev-parse", "HEAD"]),
        "uncommitted_changes": said("git", &["-C", &root.to_string_lossy(), "status", "--porcelain"])
            .map(|changes| !changes.is_empty()),
        "rustc": said("rustc", &["--version"]),
        "torch": peers::torch_version(python.unwrap_or(&venv)).ok(),
        "candle": locked(root, "candle", "candle-core"),
        "burn": locked(root, "burn", "burn"),
    })
}

/// The value after `name :` in a /proc listing.
fn field<'a>(listing: &'a str, name: &str) -> Option<&'a str> {
    listing.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

fn isa(flags: &str) -> Vec<&str> {
    let tells = |flag: &&str| ISA.iter().any(|prefix| flag.starts_with(prefix));
    flags.split_whitespace().filter(tells).collect()
}

fn first_line(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()?.lines().next().map(str::to_string)
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    peers::capture(command.args(args)).ok().map(|printed| printed.trim().to_string())
}

/// The version of a package in the lock file of a peer.
fn locked(root: &Path, peer: &str, package: &str) -> Option<String> {
    let text = std::fs::read_to_string(root.join("bench").join(peer).join("Cargo.lock")).ok()?;
    let lock: toml::Table = text.parse().ok()?;
    let packages = lock.get("package")?.as_array()?;
    let found =
        packages.iter().find(|entry| entry.get("name").and_then(|name| name.as_str()) == Some(package))?;
    Some(found.get("version")?.as_str()?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_listings_are_read_by_field() {
        let listing = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 sse2 avx512f fma\n";
        assert_eq!(field(listing, "model name"), Some("AMD EPYC"));
        assert_eq!(field(listing, "Features"), None);
        assert_eq!(isa(field(listing, "flags").unwrap_or_default()), ["avx2", "avx512f", "fma"]);
    }
}
