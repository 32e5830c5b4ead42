//! The folder of a run: config.toml, metrics.jsonl, loss.svg, checkpoints/.

use super::config::Settings;
use crate::error::{Error, Result, config_err};
use crate::fsio::atomic_write;
use serde::Serialize;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// A new folder: `out`, or `runs/PRESET-DATE-TIME` (UTC).
    ///
    /// # Errors
    /// If `out` holds a run already, or the folder cannot be made.
    pub fn create(out: Option<&Path>, preset: &str) -> Result<Self> {
        match out {
            Some(out) if out.join("config.toml").exists() => {
                config_err!(
                    "--out {}: there is a run in it; go on with it by --resume {0}, or name another folder",
                    out.display()
                );
            }
            Some(out) => {
                fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
                Ok(RunDir(out.to_path_buf()))
            }
            None => {
                let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                RunDir::create_new(Path::new("runs"), &format!("{preset}-{}", utc(seconds)))
            }
        }
    }

    /// The folder `name` in `runs`, or `name-2` and so on. Making it is what takes a name: of two runs that start in the
    /// same second, looking first would give both the same one.
    fn create_new(runs: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(runs).map_err(|e| Error::io(runs, e))?;
        let mut path = runs.join(name);
        let mut number = 1;
        loop {
            match fs::create_dir(&path) {
                Ok(()) => return Ok(RunDir(path)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(Error::io(path, e)),
            }
            path = runs.join(format!("{name}-{number}"));
        }
    }

    /// The run that a checkpoint, `RUN/checkpoints/step-NNNNNN`, lies in.
    ///
    /// # Errors
    /// If it lies in none: then it has neither the settings nor the optimizer to go on with.
    pub fn of(checkpoint: &Path) -> Result<Self> {
        let full = fs::canonicalize(checkpoint).map_err(|e| Error::io(checkpoint, e))?;
        match full.parent().and_then(Path::parent) {
            Some(run) if run.join("config.toml").is_file() => Ok(RunDir(run.to_path_buf())),
            _ => Err(Error::Checkpoint {
                path: checkpoint.to_path_buf(),
                reason: "not RUN/checkpoints/step-NNNNNN of a run with a config.toml: only a run's checkpoint has the \
                         settings and the optimizer to go on with"
                    .into(),
            }),
        }
    }

    /// The settings in config.toml.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn settings(&self) -> Result<Settings> {
        Settings::read(&self.config())
    }

    /// The newest run below `runs/`, by the time its config.toml was written.
    ///
    /// # Errors
    /// If there is none.
    pub fn newest() -> Result<Self> {
        let entries = fs::read_dir("runs").into_iter().flatten().flatten().map(|e| e.path());
        let written = |p: &PathBuf| fs::metadata(p.join("config.toml")).and_then(|m| m.modified()).ok();
        match entries.filter_map(|p| Some((written(&p)?, p))).max() {
            Some((_, path)) => Ok(RunDir(path)),
            None => config_err!("there is no run in the folder runs/: name a run or a checkpoint, or train first"),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// config.toml: the settings.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// metrics.jsonl: a row per step and evaluation.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// loss.svg.
    pub fn loss_svg(&self) -> PathBuf {
        self.0.join("loss.svg")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// Writes config.toml.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_config(&self, toml: &str) -> Result<()> {
        let path = self.config();
        atomic_write(&path, |w| w.write_all(toml.as_bytes()).map_err(|e| Error::io(&path, e)))
    }

    /// Opens metrics.jsonl to append to, first cutting off the rows of steps from `next_step` on and a last row that was
    /// not written to its end: what a run that goes on from a checkpoint is about to do again.
    ///
    /// # Errors
    /// If the file cannot be read or written, or a line before the last is not a row.
    pub fn append_metrics(&self, next_step: u64) -> Result<Metrics> {
        let path = self.metrics();
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
            let rows = rows(&path, &text)?;
            // The lines themselves, not their values printed again: JSON numbers may lose their last digit on the way.
            let kept = rows.iter().filter(|(_, row)| row["step"].as_u64().is_some_and(|s| s < next_step));
            let text: String = kept.flat_map(|(line, _)| [*line, "\n"]).collect();
            atomic_write(&path, |w| w.write_all(text.as_bytes()).map_err(|e| Error::io(&path, e)))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Metrics { file, path })
    }

    /// The rows of metrics.jsonl; a last row that was not written to its end is left out.
    ///
    /// # Errors
    /// If the file cannot be read, or a line before the last is not a row.
    pub fn read_metrics(&self) -> Result<Vec<Value>> {
        let path = self.metrics();
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Ok(rows(&path, &text)?.into_iter().map(|(_, row)| row).collect())
    }
}

/// The lines of metrics.jsonl with their values; a last line that does not end is left out if it is not a row.
fn rows<'a>(path: &Path, text: &'a str) -> Result<Vec<(&'a str, Value)>> {
    let mut rows = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(row) => rows.push((line.trim_end(), row)),
            Err(_) if !line.ends_with('\n') => {}
            Err(e) => config_err!(
                "{}, line {}: not a row of metrics ({e}): take the line out, or go on in another folder by --out",
                path.display(),
                number + 1
            ),
        }
    }
    Ok(rows)
}

/// metrics.jsonl, open.
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Appends a row.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(row).map_err(|e| Error::Config(format!("a row of metrics: {e}")))?;
        // One write: a row is there or it is not.
        self.file.write_all(format!("{text}\n").as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}

/// YYYYMMDD-HHMMSS in UTC, from seconds since 1970.
fn utc(seconds: u64) -> String {
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let mut month = 1;
    for length in [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year:04}{month:02}{:02}-{:02}{:02}{:02}", days + 1, of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "19700101-000000");
        assert_eq!(utc(951_826_153), "20000229-120913");
        assert_eq!(utc(1_735_689_599), "20241231-235959");
    }

    #[test]
    fn runs_of_the_same_second_have_folders_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let make = || RunDir::create_new(&dir.path().join("runs"), "x-1").unwrap().0;
        let mut made: Vec<PathBuf> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..8).map(|_| s.spawn(make)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        made.sort();
        made.dedup();
        assert_eq!(made.len(), 8);
    }

    #[test]
    fn metrics_go_on_from_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(Some(dir.path()), "x").unwrap();
        let mut metrics = run.append_metrics(0).unwrap();
        for step in 0..5 {
            metrics.append(&json!({"event": "step", "step": step})).unwrap();
        }
        metrics.file.write_all(b"{\"event\":\"st").unwrap();
        run.append_metrics(3).unwrap().append(&json!({"event": "step", "step": 3, "again": true})).unwrap();
        let rows = run.read_metrics().unwrap();
        assert_eq!(rows.len(), 4);
        assert_eq!((rows[2]["step"].as_u64(), rows[3]["again"].as_bool()), (Some(2), Some(true)));
    }

    #[test]
    fn a_folder_with_a_run_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(Some(dir.path()), "x").unwrap();
        let checkpoint = run.checkpoints().join("step-000001");
        fs::create_dir_all(&checkpoint).unwrap();
        assert!(RunDir::of(&checkpoint).is_err());
        run.write_config("steps = 1\n").unwrap();
        assert!(RunDir::create(Some(dir.path()), "x").unwrap_err().to_string().contains("--resume"));
        assert_eq!(RunDir::of(&checkpoint).unwrap().path(), fs::canonicalize(dir.path()).unwrap());
    }

    /// What was written stays as it was written: parsed and printed again, keys would change places and some numbers their
    /// last digit.
    #[test]
    fn kept_rows_keep_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(Some(dir.path()), "x").unwrap();
        let rng = crate::rng::Counter { seed: 1, purpose: crate::rng::Purpose::Test, step: 0 };
        let rows: String =
            (1..=2000).map(|step| format!("{{\"step\":{step},\"loss\":{}}}\n", rng.uniform(step) * 6.0)).collect();
        fs::write(run.metrics(), &rows).unwrap();
        run.append_metrics(2001).unwrap();
        assert!(fs::read_to_string(run.metrics()).unwrap() == rows);
    }

    /// Only the end of the file can be half a row; a broken row before it is not cut off with all that follows.
    #[test]
    fn a_broken_row_in_the_middle_is_named_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(Some(dir.path()), "x").unwrap();
        let rows = "{\"step\":1}\nnot a row\n{\"step\":3}\n";
        fs::write(run.metrics(), rows).unwrap();
        for error in [run.read_metrics().err(), run.append_metrics(9).err()] {
            let error = error.unwrap().to_string();
            assert!(error.contains("metrics.jsonl") && error.contains("line 2"), "{error}");
        }
        assert_eq!(fs::read_to_string(run.metrics()).unwrap(), rows);
    }
}
