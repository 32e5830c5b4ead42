//! Two things are made before the crate is compiled: the fat binary of the CUDA kernels, if there is an nvcc, and the
//! built-in training corpus. Neither needs a GPU, and without nvcc the crate builds all the same, for the CPU only.

#[path = "build/corpus.rs"]
mod corpus;
#[path = "build/kernels.rs"]
mod kernels;

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() {
    if let Err(error) = run() {
        // Cargo shows what a failed build script wrote to stderr; a panic would bury it under a backtrace note.
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set: run cargo")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run cargo")?);
    watch(&root.join("build.rs"));
    watch(&root.join("build"));
    corpus::write(&root, &out)?;
    kernels::build(&root, &out)
}

/// Runs this script again when `path` changes. A path that does not exist would run it again at every build.
fn watch(path: &Path) {
    if path.exists() {
        println!("cargo:rerun-if-changed={}", path.display());
    }
}

/// The files below `root/folder` with one of `extensions`, sorted, as paths relative to `root`; none if there is no
/// such folder.
fn files(root: &Path, folder: &str, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    fn walk(directory: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                walk(&path, extensions, found)?;
            } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)) {
                found.push(path);
            }
        }
        Ok(())
    }
    let directory = root.join(folder);
    let mut found = Vec::new();
    if directory.is_dir() {
        walk(&directory, extensions, &mut found).map_err(|e| format!("cannot list {}: {e}", directory.display()))?;
    }
    let mut found: Vec<_> = found.iter().filter_map(|path| path.strip_prefix(root).ok()).map(PathBuf::from).collect();
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
