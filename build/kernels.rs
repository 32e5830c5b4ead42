//! Compiles `kernels/**/*.cu` with nvcc into one fat binary that the crate embeds.
//!
//! Each source file becomes a fat binary container of its own, with machine code for sm_80 and sm_90a and PTX for
//! whatever comes after; `kernels.fatbin` is these containers one after the other, as a linker lays them out in a
//! CUDA program's `.nv_fatbin` section, so NVIDIA's tools read it as one. The driver loads each container as one module.
//! A file is compiled again only when it, a header, a flag or the compiler has changed: an edit of Rust code, or of
//! another kernel, finds it in the cache.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fmt::Write as _, fs, thread};

use super::{files, read, watch, write};

/// What is in every container: SASS for A100-class GPUs and for Hopper with its own instructions, and PTX that a driver
/// compiles for any other GPU from sm_80 on (PTX of compute_90a would run on nothing but sm_90).
const TARGETS: [(&str, &str); 3] = [("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_80", "compute_80")];

/// Compilers that run at the same time; each takes up to a gigabyte.
const JOBS: usize = 2;

/// Writes `kernels.fatbin` and `kernels.rs`, which describes it, into `out`.
pub(crate) fn build(root: &Path, out: &Path) -> Result<(), String> {
    for name in ["FSMOE_NO_CUDA", "NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    watch(&root.join("kernels"));

    if env::var_os("FSMOE_NO_CUDA").is_some_and(|value| value == "1") {
        println!("cargo:warning=building without CUDA kernels, as FSMOE_NO_CUDA=1 asks");
        return describe(out, &[], None, "the build was told to leave them out (FSMOE_NO_CUDA=1)");
    }
    let Some(nvcc) = Nvcc::find(root)? else {
        // Look again when an nvcc may have come: the installer touches itself when it is done.
        watch(&root.join("scripts/install-cuda.sh"));
        println!("cargo:rerun-if-env-changed=PATH");
        println!(
            "cargo:warning=no nvcc found, building for the CPU only; for the CUDA kernels run scripts/install-cuda.sh \
             or set NVCC or CUDA_HOME, then build again"
        );
        return describe(out, &[], None, "no nvcc was found when fsmoe was built");
    };
    watch(&nvcc.path);

    let sources = files(root, "kernels", &["cu"])?;
    let units = compile(&nvcc, root, out, &sources)?;
    describe(out, &units, Some(&nvcc.version), "")
}

/// A compiler that runs, and its version.
struct Nvcc {
    path: PathBuf,
    version: String,
}

impl Nvcc {
    /// The first compiler that runs, of: `NVCC` (which must, being asked for by name), `CUDA_HOME`, `PATH`, and what
    /// `scripts/install-cuda.sh` installed.
    fn find(root: &Path) -> Result<Option<Self>, String> {
        if let Some(named) = env::var_os("NVCC").filter(|value| !value.is_empty()) {
            let nvcc = Self::at(Path::new(&named)).map_err(|e| format!("NVCC={}: {e}", named.display()))?;
            return Ok(Some(nvcc));
        }
        let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = home.into_iter().chain(env::split_paths(&path)).collect();
        // The folder between lib and site-packages is named after the Python that made it.
        if let Ok(entries) = fs::read_dir(root.join(".cuda/lib")) {
            folders.extend(entries.flatten().map(|e| e.path().join("site-packages/nvidia/cu13/bin")));
        }
        Ok(folders.iter().map(|f| f.join("nvcc")).filter(|p| p.is_file()).find_map(|p| Self::at(&p).ok()))
    }

    /// The compiler at `path`, if it runs and knows sm_90a.
    fn at(path: &Path) -> Result<Self, String> {
        let output = Command::new(path).arg("--version").output().map_err(|e| format!("cannot run it: {e}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .split_whitespace()
            .find_map(|word| word.strip_prefix('V').filter(|v| v.starts_with(|c: char| c.is_ascii_digit())))
            .ok_or_else(|| format!("its --version names no version: {:?}", text.lines().next().unwrap_or("")))?;
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok()).unwrap_or(0);
        if major < 12 {
            return Err(format!("it is version {version}, and sm_90a needs 12.0 or newer"));
        }
        Ok(Self { path: path.to_path_buf(), version: version.to_owned() })
    }

    /// What every source is compiled with, in the repository's root. Line numbers cost the kernels nothing and let a
    /// profiler show its counters beside the source.
    fn flags() -> Vec<String> {
        let fixed =
            ["--fatbin", "-Xfatbin=-compress-all", "-O3", "-std=c++17", "-lineinfo", "-Ikernels"].map(String::from);
        let targets = TARGETS.iter().map(|(from, to)| format!("-gencode=arch={from},code={to}"));
        fixed.into_iter().chain(targets).collect()
    }
}

/// One compiled source file: `name` is its path under `kernels/` without the extension, `expert/gelu` for instance.
struct Unit {
    name: String,
    image: Vec<u8>,
}

/// Compiles `sources`, at most [`JOBS`] at a time, taking what has not changed from the cache in `out`.
fn compile(nvcc: &Nvcc, root: &Path, out: &Path, sources: &[PathBuf]) -> Result<Vec<Unit>, String> {
    let cache = out.join("kernels");
    fs::create_dir_all(&cache).map_err(|e| format!("cannot create {}: {e}", cache.display()))?;
    let flags = Nvcc::flags();
    // Every header counts for every source: following includes would save little, headers being few and seldom edited.
    let mut common = DefaultHasher::new();
    (&nvcc.version, &flags).hash(&mut common);
    for header in files(root, "kernels", &["cuh"])? {
        (&header, read(&root.join(&header))?).hash(&mut common);
    }

    let mut jobs = Vec::new();
    for source in sources {
        let mut hasher = common.clone();
        (source, read(&root.join(source))?).hash(&mut hasher);
        let name = source.strip_prefix("kernels").unwrap_or(source).with_extension("");
        let name = name.to_string_lossy().replace('\\', "/");
        let image = cache.join(format!("{}-{:016x}.fatbin", name.replace('/', "."), hasher.finish()));
        jobs.push((name, source, image));
    }
    entry_points_resolve(&jobs)?;
    // What earlier versions of the sources left would pile up.
    for entry in fs::read_dir(&cache).map_err(|e| format!("cannot list {}: {e}", cache.display()))?.flatten() {
        if !jobs.iter().any(|(_, _, image)| *image == entry.path()) {
            // Another build may have been quicker to remove it; an unused file does no harm.
            let _ = fs::remove_file(entry.path());
        }
    }

    let waiting = Mutex::new(jobs.iter().filter(|(_, _, image)| !image.is_file()));
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().map_or(None, |mut jobs| jobs.next());
                    let Some((_, source, image)) = next else { return };
                    if let (Err(failure), Ok(mut failures)) =
                        (compile_one(nvcc, root, &flags, source, image), failures.lock())
                    {
                        failures.push(failure);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|_| "a compiler's thread panicked")?;
    if !failures.is_empty() {
        return Err(format!(
            "{}\n\nthe CUDA kernels do not compile with {} ({}); FSMOE_NO_CUDA=1 builds without them",
            failures.join("\n\n"),
            nvcc.path.display(),
            nvcc.version
        ));
    }
    jobs.into_iter().map(|(name, _, image)| Ok(Unit { name, image: read(&image)? })).collect()
}

/// A kernel's file is found by its name alone: `gelu_forward_bf16` is in the file `gelu.cu`, whatever its folder. Two
/// files of one name would make that ambiguous.
fn entry_points_resolve(jobs: &[(String, &PathBuf, PathBuf)]) -> Result<(), String> {
    let mut stems = BTreeMap::new();
    for (name, source, _) in jobs {
        let stem = name.rsplit('/').next().unwrap_or(name);
        if let Some(other) = stems.insert(stem, source) {
            return Err(format!(
                "{} and {} have one name; kernels are found by their file's name, which must be unique",
                other.display(),
                source.display()
            ));
        }
    }
    Ok(())
}

fn compile_one(nvcc: &Nvcc, root: &Path, flags: &[String], source: &Path, image: &Path) -> Result<(), String> {
    // Written beside and renamed, so that an interrupted build leaves no half file under a name that looks done.
    let partial = image.with_extension("partial");
    let output = Command::new(&nvcc.path)
        .current_dir(root)
        .args(flags)
        .arg("-o")
        .arg(&partial)
        .arg(source)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", nvcc.path.display()))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        return Err(format!(
            "{}: nvcc failed ({})\n{}",
            source.display(),
            output.status,
            String::from_utf8_lossy(&text)
        ));
    }
    for warning in String::from_utf8_lossy(&output.stderr).lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo:warning={warning}");
    }
    fs::rename(&partial, image).map_err(|e| format!("cannot rename {}: {e}", partial.display()))
}

/// Lays the containers end to end in `kernels.fatbin` and writes `kernels.rs`, the constants that describe it.
fn describe(out: &Path, units: &[Unit], nvcc: Option<&str>, absent: &str) -> Result<(), String> {
    let mut binary = Vec::new();
    let mut table = String::new();
    for unit in units {
        // A container is read in 8-byte words.
        binary.resize(binary.len().next_multiple_of(8), 0);
        let (start, end) = (binary.len(), binary.len() + unit.image.len());
        writeln!(table, "    ({:?}, {start}..{end}),", unit.name).map_err(|e| e.to_string())?;
        binary.extend_from_slice(&unit.image);
    }
    write(&out.join("kernels.fatbin"), &binary)?;

    let archs: Vec<_> = TARGETS.iter().map(|(_, code)| *code).filter(|_| nvcc.is_some()).collect();
    let absent = if absent.is_empty() { None } else { Some(absent) };
    let text = format!(
        "/// Why no kernels are embedded; `None` when they are.\n\
         pub(super) const ABSENT: Option<&str> = {absent:?};\n\
         /// The compiler's version.\n\
         pub(super) const NVCC_VERSION: Option<&str> = {nvcc:?};\n\
         /// What the kernels are compiled to.\n\
         pub(super) const ARCHS: &[&str] = &{archs:?};\n\
         /// Where each source file's container lies in the fat binary.\n\
         pub(super) const UNITS: &[(&str, std::ops::Range<usize>)] = &[\n{table}];\n\
         /// The fat binary's length in bytes.\n\
         pub(super) const LENGTH: usize = {};\n",
        binary.len()
    );
    write(&out.join("kernels.rs"), text.as_bytes())
}
