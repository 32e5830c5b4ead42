//! Text as bytes: a file, a folder, or the project's own sources.

use crate::error::{Error, Result, config_err};
use crate::rng::{Counter, Purpose};
use memmap2::Mmap;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The project's sources and pages, put together when it was built.
static BUILTIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/corpus.txt"));

/// One part in this many, at the end of the text, is held out.
const HELD_OUT: usize = 20;

/// A text, as one run of bytes over one or more memory-mapped files, with its last twentieth held out for evaluation.
pub struct Corpus {
    name: String,
    parts: Vec<Part>,
    len: usize,
}

struct Part {
    /// Where the part begins in the whole text.
    first: usize,
    bytes: Bytes,
}

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl Corpus {
    /// The text built into the program: fsmoe's own sources and pages.
    pub fn builtin() -> Self {
        Corpus::from_parts("the project's own sources".to_owned(), vec![Bytes::Static(BUILTIN)])
    }

    /// A file, or all files below a folder in the order of their paths (hidden and empty ones left out), mapped into memory.
    ///
    /// # Errors
    /// If the path does not exist or cannot be read, or there is no text in it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = Vec::new();
        collect(path, &mut files, &mut HashSet::new())?;
        let mut parts = Vec::new();
        for file in &files {
            let handle = File::open(file).map_err(|e| Error::io(file, e))?;
            if handle.metadata().map_err(|e| Error::io(file, e))?.len() == 0 {
                continue;
            }
            // SAFETY: the map is only read. A file that another process cuts off while it is mapped would raise SIGBUS;
            // that is the usual bargain of mapping, and training text is not a file that others write to.
            parts.push(Bytes::Mapped(unsafe { Mmap::map(&handle) }.map_err(|e| Error::io(file, e))?));
        }
        if parts.is_empty() {
            config_err!("--data {}: there is no text in it ({} files, none with a byte)", path.display(), files.len());
        }
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Corpus::from_parts(name, parts))
    }

    fn from_parts(name: String, bytes: Vec<Bytes>) -> Self {
        let mut len = 0;
        let parts = bytes
            .into_iter()
            .map(|bytes| {
                let part = Part { first: len, bytes };
                len += part.bytes().len();
                part
            })
            .collect();
        Corpus { name, parts, len }
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes to train on: those before the held-out part.
    pub fn train_len(&self) -> usize {
        self.len - self.held_out_len()
    }

    /// The bytes held out: the last twentieth.
    pub fn held_out_len(&self) -> usize {
        self.len / HELD_OUT
    }

    /// Checks that both parts hold a window of `seq` + 1 bytes.
    ///
    /// # Errors
    /// If one does not: names the sizes.
    pub fn require(&self, seq: usize) -> Result<()> {
        if self.held_out_len() < seq + 1 || self.train_len() < seq + 1 {
            config_err!(
                "{}: {} bytes to train on and {} held out (the last twentieth); --seq {seq} takes at least {} in each: \
                 give more text or a shorter --seq",
                self.name,
                self.train_len(),
                self.held_out_len(),
                seq + 1
            );
        }
        Ok(())
    }

    /// The `seq` + 1 bytes of training sample number `sample`, a random window that depends on the seed and the number
    /// alone. Call [`Corpus::require`] first.
    pub fn train_window(&self, seed: u64, sample: u64, seq: usize) -> Vec<u8> {
        let starts = self.train_len().saturating_sub(seq) as u64;
        let rng = Counter { seed, purpose: Purpose::Data, step: 0 };
        self.window(rng.below(sample, starts.max(1)) as usize, seq + 1)
    }

    /// Up to `count` windows of `seq` + 1 bytes, evenly spaced over the held-out part and always the same; fewer where it
    /// holds fewer without overlap.
    pub fn held_out_windows(&self, seq: usize, count: usize) -> Vec<Vec<u8>> {
        let room = self.held_out_len();
        let count = count.min(room / (seq + 1)).max(1);
        let space = room.saturating_sub(seq + 1) as f64 / (count.max(2) - 1) as f64;
        (0..count).map(|i| self.window(self.train_len() + (i as f64 * space) as usize, seq + 1)).collect()
    }

    /// `len` bytes from `start` on, across the ends of files.
    fn window(&self, start: usize, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        let first = self.parts.partition_point(|p| p.first <= start).saturating_sub(1);
        for part in &self.parts[first..] {
            let from = (start + out.len()).saturating_sub(part.first);
            out.extend(part.bytes().iter().skip(from).take(len - out.len()));
            if out.len() == len {
                break;
            }
        }
        out
    }
}

/// The files at or below `path`, in order. A folder (device and inode) that links lead to more than once is read once:
/// a link to a folder above would otherwise never end.
fn collect(path: &Path, files: &mut Vec<PathBuf>, seen: &mut HashSet<(u64, u64)>) -> Result<()> {
    let io = |e| Error::io(path, e);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if metadata.is_file() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    if !seen.insert((metadata.dev(), metadata.ino())) {
        return Ok(());
    }
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(path).map_err(io)?.map(|e| Ok(e.map_err(io)?.path())).collect::<Result<_>>()?;
    entries.sort();
    for entry in entries {
        let hidden = entry.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if !hidden && (entry.is_dir() || entry.is_file()) {
            collect(&entry, files, seen)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn text(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn a_folder_reads_as_its_files_put_together() {
        let dir = tempfile::tempdir().unwrap();
        let all = text(3000);
        fs::create_dir(dir.path().join("b")).unwrap();
        fs::write(dir.path().join("a.txt"), &all[..1000]).unwrap();
        fs::write(dir.path().join("b/x"), &all[1000..1010]).unwrap();
        fs::write(dir.path().join("b/y"), "").unwrap();
        fs::write(dir.path().join("c"), &all[1010..]).unwrap();
        fs::write(dir.path().join(".hidden"), "no").unwrap();
        let c = Corpus::open(dir.path()).unwrap();
        assert_eq!((c.len(), c.train_len(), c.held_out_len()), (3000, 2850, 150));
        for start in [0, 990, 999, 1000, 1005, 1010, 2980] {
            assert_eq!(c.window(start, 20), all[start..start + 20], "from {start}");
        }
    }

    #[test]
    fn windows_stay_in_their_part_and_depend_on_seed_and_number_alone() {
        let dir = tempfile::tempdir().unwrap();
        // Bytes tell where they come from: training text is below 200, held-out text above.
        let mut all = vec![1u8; 1900];
        all.extend(vec![201u8; 100]);
        fs::write(dir.path().join("t"), &all).unwrap();
        let c = Corpus::open(&dir.path().join("t")).unwrap();
        c.require(31).unwrap();
        for i in 0..500 {
            let w = c.train_window(3, i, 31);
            assert!(w.len() == 32 && w.iter().all(|&b| b == 1));
        }
        let held_out = c.held_out_windows(31, 64);
        assert_eq!(held_out.len(), 3);
        assert!(held_out.iter().all(|w| w.len() == 32 && w.iter().all(|&b| b == 201)));

        fs::write(dir.path().join("u"), text(5000)).unwrap();
        let c = Corpus::open(&dir.path().join("u")).unwrap();
        assert_eq!(c.train_window(3, 7, 31), c.train_window(3, 7, 31));
        let different = (0..100).filter(|&i| c.train_window(3, i, 31) != c.train_window(4, i, 31)).count();
        assert!(different > 90);
    }

    #[test]
    fn bad_data_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| Corpus::open(path).err().unwrap().to_string();
        assert!(error(&dir.path().join("nowhere")).contains("nowhere"));
        assert!(error(dir.path()).contains("no text"));
        fs::write(dir.path().join("e"), "").unwrap();
        assert!(error(&dir.path().join("e")).contains("no text"));
        fs::write(dir.path().join("s"), text(1000)).unwrap();
        let short = Corpus::open(&dir.path().join("s")).unwrap();
        let error = short.require(64).unwrap_err().to_string();
        assert!(error.contains("950 bytes") && error.contains("50 held out") && error.contains("--seq 64"), "{error}");
        short.require(49).unwrap();
    }

    #[test]
    fn the_built_in_text_is_enough_for_the_default_run() {
        Corpus::builtin().require(128).unwrap();
        assert!(String::from_utf8_lossy(BUILTIN).contains("pub struct Corpus"));
    }

    #[test]
    fn a_link_back_to_a_folder_above_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/x"), text(100)).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("a/up")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("a/self")).unwrap();
        assert_eq!(Corpus::open(dir.path()).unwrap().len(), 100);
    }
}
