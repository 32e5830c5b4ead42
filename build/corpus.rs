//! The built-in training corpus: the project's own sources and pages, one after the other.

use std::path::{Path, PathBuf};

use super::{files, read, watch};

/// Writes `corpus.txt` into `out`: every Rust source, kernel and page of the project in sorted order, so that the same
/// tree gives the same bytes, each file followed by a newline.
pub(crate) fn write(root: &Path, out: &Path) -> Result<(), String> {
    let parts: [(&str, &[&str]); 3] = [("src", &["rs"]), ("kernels", &["cu", "cuh"]), ("docs", &["md"])];
    let mut paths = Vec::new();
    for (folder, extensions) in parts {
        watch(&root.join(folder));
        paths.extend(files(root, folder, extensions)?);
    }
    let readme = PathBuf::from("README.md");
    watch(&root.join(&readme));
    if root.join(&readme).is_file() {
        paths.push(readme);
    }
    paths.sort();

    let mut corpus = Vec::new();
    for path in paths {
        corpus.extend(read(&root.join(path))?);
        corpus.push(b'\n');
    }
    super::write(&out.join("corpus.txt"), &corpus)
}
