//! Somebody's kernels: CUDA source that is compiled here, or what a compiler made of it.

use crate::error::{Error, Result, config_err};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Code that a GPU's driver loads.
pub struct Image {
    /// The file's name.
    pub name: String,
    /// A fat binary, a cubin, or PTX.
    pub bytes: Vec<u8>,
}

impl Image {
    /// The file at `path`: a `.cu` is compiled for a GPU of compute capability `major.minor`, anything else taken as it is.
    /// Sources may include this project's headers (`common/vector.cuh`) where they are at hand.
    ///
    /// # Errors
    /// If the file cannot be read, there is no compiler, or it does not compile: with what the compiler says.
    pub fn of(path: &Path, (major, minor): (u32, u32)) -> Result<Self> {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        if path.extension().is_none_or(|e| e != "cu") {
            return Ok(Image { name, bytes: fs::read(path).map_err(|e| Error::io(path, e))? });
        }
        if !path.is_file() {
            config_err!("{}: there is no such file", path.display());
        }
        let nvcc = nvcc()?;
        let folder = tempfile::tempdir().map_err(|e| Error::io(env::temp_dir(), e))?;
        let out = folder.path().join("kernels.fatbin");
        // Hopper's own instructions (wgmma, TMA) are in the target with the letter alone.
        let target = format!("{major}{minor}{}", if major >= 9 { "a" } else { "" });
        let mut command = Command::new(&nvcc);
        command.args(["--fatbin", "-O3", "-std=c++17", "-lineinfo"]);
        command.arg(format!("-gencode=arch=compute_{target},code=sm_{target}"));
        for headers in [Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), PathBuf::from("kernels")] {
            if headers.is_dir() {
                command.arg("-I").arg(headers);
            }
        }
        let output = command
            .arg("-o")
            .arg(&out)
            .arg(path)
            .output()
            .map_err(|e| Error::Config(format!("cannot run {}: {e}", nvcc.display())))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim_end().to_owned();
            config_err!("{} does not compile with {} for sm_{target}:\n{text}", path.display(), nvcc.display());
        }
        Ok(Image { name, bytes: fs::read(&out).map_err(|e| Error::io(&out, e))? })
    }
}

/// The compiler where the build looks for it too: `NVCC`, `CUDA_HOME`, `PATH`, and what `scripts/install-cuda.sh` installed
/// beside the sources or below the working folder.
fn nvcc() -> Result<PathBuf> {
    if let Some(named) = env::var_os("NVCC").filter(|value| !value.is_empty()) {
        return Ok(named.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let mut folders: Vec<PathBuf> =
        home.into_iter().chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())).collect();
    for root in [Path::new("."), Path::new(env!("CARGO_MANIFEST_DIR"))] {
        if let Ok(entries) = fs::read_dir(root.join(".cuda/lib")) {
            folders.extend(entries.flatten().map(|e| e.path().join("site-packages/nvidia/cu13/bin")));
        }
    }
    folders.push("/usr/local/cuda/bin".into());
    match folders.into_iter().map(|folder| folder.join("nvcc")).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => config_err!(
            "no nvcc to compile the kernel with: set NVCC or CUDA_HOME, run scripts/install-cuda.sh, or give a fat binary"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.cu");
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn sources_compile_or_say_why_not() {
        let Ok(_) = nvcc() else { return };
        let (_folder, good) =
            source("#include \"common/dtype.cuh\"\nextern \"C\" __global__ void mine_f32(float* y) { *y = 1; }");
        let image = Image::of(&good, (9, 0)).unwrap();
        assert_eq!((image.name.as_str(), &image.bytes[..4]), ("mine.cu", &0xBA55_ED50_u32.to_le_bytes()[..]));

        let (_folder, bad) = source("extern \"C\" __global__ void mine_f32(float* y) { *z = 1; }");
        let message = Image::of(&bad, (8, 0)).err().unwrap().to_string();
        assert!(message.contains("mine.cu does not compile") && message.contains("\"z\" is undefined"), "{message}");
    }

    #[test]
    fn other_files_are_taken_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.cubin");
        fs::write(&path, b"code").unwrap();
        assert_eq!(Image::of(&path, (9, 0)).unwrap().bytes, b"code");
        for missing in ["none.cu", "none.fatbin"] {
            let message = Image::of(&folder.path().join(missing), (9, 0)).err().unwrap().to_string();
            assert!(message.contains(missing), "{message}");
        }
    }
}
