//! Files and folders that appear whole or not at all.

use crate::error::{Error, Result};
#[cfg(target_os = "linux")]
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Replaces the file at `path` by what `write` writes: into a temporary beside it, synced, renamed over it, and the folder
/// synced. Whatever fails, the file that was there is whole, and the temporary is gone.
///
/// # Errors
/// If `write` fails, or the file cannot be made, synced or renamed.
pub fn atomic_write(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let folder = parent(path);
    let io = |e| Error::io(path, e);
    let mut temporary = tempfile::Builder::new().prefix(".tmp-").tempfile_in(folder).map_err(io)?;
    let mut buffered = BufWriter::new(temporary.as_file_mut());
    write(&mut buffered)?;
    buffered.flush().map_err(io)?;
    drop(buffered);
    set_usual_mode(temporary.as_file()).map_err(io)?;
    temporary.as_file().sync_all().map_err(io)?;
    temporary.persist(path).map_err(|e| Error::io(path, e.error))?;
    sync_folder(folder)
}

/// Makes the folder `path` of what `fill` puts into it: filled under a temporary name, every file synced, renamed. A
/// folder that was there changes places with it in one step, where the file system can do that (Linux: ext4, XFS, Btrfs,
/// tmpfs, overlay). Whatever fails, what was there is whole, and the temporary is gone.
///
/// # Errors
/// If `fill` fails, or a file or folder cannot be made, synced or renamed.
pub fn atomic_dir(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = parent(path);
    let io = |e| Error::io(path, e);
    let temporary = tempfile::Builder::new().prefix(".tmp-").tempdir_in(folder).map_err(io)?;
    let new = temporary.path().join("new");
    fs::create_dir(&new).map_err(io)?;
    fill(&new)?;
    sync_tree(&new)?;
    if !path.exists() {
        fs::rename(&new, path).map_err(io)?;
    } else if exchange(&new, path).is_err() {
        // Two renames: between them neither is at `path`, but both are whole.
        let old = temporary.path().join("old");
        fs::rename(path, &old).map_err(io)?;
        if let Err(e) = fs::rename(&new, path) {
            if fs::rename(&old, path).is_err() {
                // Cleaning up would delete the only copies.
                let kept = temporary.keep();
                let text = format!("{e}; the old folder is kept as {0}/old, the new one as {0}/new", kept.display());
                return Err(Error::io(path, std::io::Error::new(e.kind(), text)));
            }
            return Err(Error::io(path, e));
        }
    }
    sync_folder(folder)
}

/// Lets two paths change places in one step, where system and file system can.
#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let (a, b) = (CString::new(a.as_os_str().as_bytes())?, CString::new(b.as_os_str().as_bytes())?);
    // SAFETY: both are strings that end with a zero byte and outlive the call, which keeps neither.
    let status =
        unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) };
    if status == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Lets two paths change places in one step: nothing portable does.
#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary files are readable by their owner only; what takes their place is an ordinary file.
fn set_usual_mode(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, e))?;
        }
    }
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_writer_that_fails_halfway_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let put = |text: &'static str| {
            atomic_write(&path, move |w| w.write_all(text.as_bytes()).map_err(|e| Error::io("a", e)))
        };
        put("first").unwrap();
        let failed = atomic_write(&path, |w| {
            w.write_all(&[7; 100_000]).map_err(|e| Error::io("a", e))?;
            Err(Error::io("a", std::io::Error::other("the disk is gone")))
        });
        assert!(failed.unwrap_err().to_string().contains("the disk is gone"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(names(dir.path()), ["a"]);
        put("second").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
    }

    #[test]
    fn a_folder_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("step");
        let put = |name: &'static str| {
            atomic_dir(&path, move |tmp| fs::write(tmp.join(name), name).map_err(|e| Error::io(tmp, e)))
        };
        put("one").unwrap();
        let failed = atomic_dir(&path, |tmp| {
            fs::write(tmp.join("two"), "half").map_err(|e| Error::io(tmp, e))?;
            Err(Error::Config("no".into()))
        });
        assert!(failed.is_err());
        assert_eq!((names(&path), names(dir.path())), (vec!["one".to_owned()], vec!["step".to_owned()]));
        put("three").unwrap();
        assert_eq!((names(&path), names(dir.path())), (vec!["three".to_owned()], vec!["step".to_owned()]));
    }

    /// A file-size limit is a process's own, so the write that meets it runs in a child: this test, started again.
    #[test]
    fn a_file_size_limit_leaves_the_old_file() {
        const CHILD: &str = "FSMOE_TEST_LIMITED_WRITE";
        if let Some(path) = std::env::var_os(CHILD) {
            let path = Path::new(&path);
            // SAFETY: plain system calls with valid arguments, in a process that does nothing else.
            unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 4096 };
                assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            }
            let error = atomic_write(path, |w| w.write_all(&[1; 1 << 20]).map_err(|e| Error::io(path, e))).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "first").unwrap();
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fsio::tests::a_file_size_limit_leaves_the_old_file"])
            .env(CHILD, &path)
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        assert_eq!((fs::read_to_string(&path).unwrap(), names(dir.path())), ("first".into(), vec!["a".to_owned()]));
    }

    #[test]
    fn a_rename_that_fails_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::create_dir_all(path.join("kept")).unwrap();
        // A file cannot take a folder's place.
        assert!(atomic_write(&path, |w| w.write_all(b"x").map_err(|e| Error::io("a", e))).is_err());
        assert_eq!((names(&path), names(dir.path())), (vec!["kept".to_owned()], vec!["a".to_owned()]));
    }

    /// There is no moment at which a reader finds no folder, where the file system can exchange two.
    #[test]
    fn a_folder_is_replaced_in_one_step() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        if let Err(e) = exchange(&a, &b) {
            eprintln!("not checked: {} cannot exchange two folders ({e})", dir.path().display());
            return;
        }
        fs::remove_dir(&a).unwrap();
        fs::remove_dir(&b).unwrap();
        let path = dir.path().join("step");
        let put = || atomic_dir(&path, |tmp| fs::write(tmp.join("f"), "whole").map_err(|e| Error::io(tmp, e))).unwrap();
        put();
        let done = AtomicBool::new(false);
        let missing = std::thread::scope(|s| {
            let reader = s.spawn(|| {
                let mut missing = 0;
                while !done.load(Ordering::Relaxed) {
                    missing += u32::from(!path.exists());
                }
                missing
            });
            (0..50).for_each(|_| put());
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert_eq!(missing, 0);
        assert_eq!(names(dir.path()), ["step"]);
    }
}
