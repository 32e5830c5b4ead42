//! Costs and plans that are kept from run to run: `$XDG_CACHE_HOME/fsmoe`, or `~/.cache/fsmoe`.

use super::world::CacheUse;
use crate::error::{Error, Result};
use crate::fsio::atomic_write;
use crate::schedule::{Plan, Profile};
use std::path::{Path, PathBuf};

/// The user's cache. Whatever is wrong with it is worth a note, and no reason not to train.
pub(super) struct Cache {
    folder: Option<PathBuf>,
    reads: bool,
}

impl Cache {
    /// The user's.
    pub(super) fn new(kept: CacheUse, notes: &mut Vec<String>) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        if folder.is_none() && kept != CacheUse::Off {
            notes.push("note: neither XDG_CACHE_HOME nor HOME is set: costs are measured anew each time".to_owned());
        }
        Self::at(folder.map(|folder| folder.join("fsmoe")), kept)
    }

    fn at(folder: Option<PathBuf>, kept: CacheUse) -> Self {
        Cache { folder: folder.filter(|_| kept != CacheUse::Off), reads: kept == CacheUse::Use }
    }

    /// One that keeps nothing.
    pub(super) fn none() -> Self {
        Cache { folder: None, reads: false }
    }

    /// The costs of what `key` describes, if they are kept.
    pub(super) fn profile(&self, key: &str, notes: &mut Vec<String>) -> Option<Profile> {
        let read = |text: &str| Profile::from_toml(text);
        let (path, profile) = self.read("profile", "toml", key, read, notes)?;
        notes.push(format!("costs of these ranks: {}", path.display()));
        Some(profile)
    }

    /// Keeps them.
    pub(super) fn keep_profile(&self, key: &str, profile: &Profile, notes: &mut Vec<String>) {
        if let (Some(path), Ok(text)) = (self.path("profile", "toml", key), profile.to_toml()) {
            match write(&path, key, &text) {
                Ok(()) => notes.push(format!("costs of these ranks, measured: {}", path.display())),
                Err(e) => notes.push(format!("warning: costs are not kept: {e}")),
            }
        }
    }

    /// The plan that `key` describes, if it is kept.
    pub(super) fn plan(&self, key: &str, notes: &mut Vec<String>) -> Option<Plan> {
        let read = |text: &str| serde_json::from_str(text).map_err(|e| Error::Config(e.to_string()));
        self.read("plan", "plan", key, read, notes).map(|(_, plan)| plan)
    }

    /// Keeps it.
    pub(super) fn keep_plan(&self, key: &str, plan: &Plan, notes: &mut Vec<String>) {
        if let (Some(path), Ok(text)) = (self.path("plan", "plan", key), serde_json::to_string(plan))
            && let Err(e) = write(&path, key, &text)
        {
            notes.push(format!("warning: a plan is not kept: {e}"));
        }
    }

    /// What a file that is there says, after the key in its first lines: two keys may have one name.
    fn read<T>(
        &self,
        kind: &str,
        extension: &str,
        key: &str,
        read: impl FnOnce(&str) -> Result<T>,
        notes: &mut Vec<String>,
    ) -> Option<(PathBuf, T)> {
        let path = self.path(kind, extension, key).filter(|_| self.reads)?;
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(e) => {
                notes.push(format!("warning: {}: {e}; made anew", path.display()));
                return None;
            }
        };
        let head = heading(key);
        let body = text.strip_prefix(&head);
        let known = body.ok_or_else(|| Error::Config(format!("it is no {kind} of this run"))).and_then(read);
        match known {
            Ok(value) => Some((path, value)),
            Err(e) => {
                notes.push(format!("warning: {}: {e}; made anew", path.display()));
                None
            }
        }
    }

    fn path(&self, kind: &str, extension: &str, key: &str) -> Option<PathBuf> {
        // FNV-1a, which is the same everywhere and always.
        let hash = key.bytes().chain(env!("CARGO_PKG_VERSION").bytes());
        let hash = hash.fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        self.folder.as_ref().map(|folder| folder.join(format!("{kind}-{hash:016x}.{extension}")))
    }
}

/// A key as lines that whoever opens the file reads first.
fn heading(key: &str) -> String {
    key.lines().map(|line| format!("# {line}\n")).collect()
}

fn write(path: &Path, key: &str, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let whole = heading(key) + text;
    atomic_write(path, |file| file.write_all(whole.as_bytes()).map_err(|e| Error::io(path, e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_what_is_broken_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("fsmoe");
        let cache = |kept| Cache::at(Some(folder.clone()), kept);
        let (profile, mut notes) = (Profile::published().unwrap(), Vec::new());
        let used = cache(CacheUse::Use);
        assert_eq!(used.profile("a machine\n8 ranks\n", &mut notes), None);
        used.keep_profile("a machine\n8 ranks\n", &profile, &mut notes);
        assert_eq!(used.profile("a machine\n8 ranks\n", &mut notes), Some(profile.clone()));
        assert_eq!(used.profile("a machine\n4 ranks\n", &mut notes), None);
        assert!(
            notes.iter().all(|note| note.contains("costs of these ranks") && note.contains("profile-")),
            "{notes:?}"
        );
        for kept in [CacheUse::Renew, CacheUse::Off] {
            assert_eq!(cache(kept).profile("a machine\n8 ranks\n", &mut notes), None);
        }
        // Half a file, and a file of another key under this one's name.
        let path = used.path("profile", "toml", "a machine\n8 ranks\n").unwrap();
        for text in ["# a machine\n# 8 ranks\nname = \"x\"\nalpha =", "# another machine\n"] {
            std::fs::write(&path, text).unwrap();
            notes.clear();
            assert_eq!(used.profile("a machine\n8 ranks\n", &mut notes), None);
            assert!(
                notes.len() == 1 && notes[0].starts_with("warning: ") && notes[0].contains("made anew"),
                "{notes:?}"
            );
        }
        // Where nothing can be written, that is all that happens.
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "a file").unwrap();
        notes.clear();
        used.keep_profile("key", &profile, &mut notes);
        assert!(notes.len() == 1 && notes[0].starts_with("warning: costs are not kept"), "{notes:?}");
        cache(CacheUse::Off).keep_profile("key", &profile, &mut notes);
        assert_eq!(notes.len(), 1);
    }
}
