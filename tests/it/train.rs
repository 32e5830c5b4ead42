//! Training runs: the same to the bit whenever they are repeated, stopped and gone on with; and what stops them.

use crate::checkpoint::edit_tensors;
use fsmoe::moe::gate::GateKind;
use fsmoe::moe::order::OrderKind;
use fsmoe::report::Summary;
use fsmoe::tensor::Tensor;
use fsmoe::train::checkpoint::list;
use fsmoe::train::{Request, Settings, train};
use fsmoe::{Error, Result};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A model and a schedule so small that a step takes a millisecond.
const SMALL: &str = r#"
data = "text.txt"
layers = 2
hidden = 32
heads = 2
ffn = 32
experts = 4
seq = 16
batch = 4
steps = 20
eval_every = 10
eval_windows = 4
save_every = 10
"#;

/// A folder with a text that is easily learned, `small.toml`, and the runs that are made in it.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let place = Place(TempDir::new().unwrap());
        fs::write(place.at("text.txt"), "The quick brown fox jumps over the lazy dog. ".repeat(100)).unwrap();
        fs::write(place.at("small.toml"), SMALL).unwrap();
        place
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// [`SMALL`] with `flags`, into the run folder `out`.
    pub(crate) fn train(&self, out: &str, flags: &str) -> Result<Summary> {
        let small = Settings { data: Some(self.at("text.txt")), ..toml::from_str(SMALL).unwrap() };
        let settings = Settings { out: Some(self.at(out)), ..parsed(flags) }.or(small);
        train(Request { settings, resume: None, json: None })
    }

    pub(crate) fn resume(&self, from: &str, flags: &str) -> Result<Summary> {
        train(Request { settings: parsed(flags), resume: Some(self.at(from)), json: None })
    }

    /// The error of going on with `from`, after which everything is as it was.
    fn resume_refused(&self, from: &str, flags: &str) -> String {
        let before = tree(self.0.path());
        let error = self.resume(from, flags).unwrap_err().to_string();
        assert!(tree(self.0.path()) == before, "{flags}");
        error
    }

    /// The command with arguments that have no spaces, in this folder.
    pub(crate) fn command(&self, args: &str) -> Command {
        let mut command = Command::new(binary());
        command.args(args.split_whitespace()).current_dir(self.0.path());
        command
    }

    /// What the command does in this folder.
    pub(crate) fn output(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    /// The command's standard output; it must succeed.
    #[track_caller]
    pub(crate) fn stdout(&self, args: &str) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The rows of a run's steps as they were written, whose numbers read back to the bit; without the speed.
    pub(crate) fn steps(&self, run: &str) -> Vec<String> {
        let text = fs::read_to_string(self.at(run).join("metrics.jsonl")).unwrap();
        let steps = text.lines().filter(|row| row.contains("\"event\":\"step\""));
        let timeless = |row: &str| -> Vec<String> {
            row.split(',').filter(|field| !field.contains("tokens_per_s")).map(str::to_owned).collect()
        };
        steps.map(|row| timeless(row).join(",")).collect()
    }

    /// The names of a run's checkpoints.
    pub(crate) fn checkpoints(&self, run: &str) -> Vec<String> {
        let paths = list(&self.at(run).join("checkpoints")).unwrap();
        paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }

    /// Asserts that two runs did the same steps and ended with the same checkpoint, to the bit.
    #[track_caller]
    pub(crate) fn assert_same(&self, a: &str, b: &str, what: &str) {
        assert_eq!(self.steps(a), self.steps(b), "{what}");
        let last = |run: &str| list(&self.at(run).join("checkpoints")).unwrap().pop().unwrap();
        let (a, b) = (last(a), last(b));
        assert_eq!(a.file_name(), b.file_name(), "{what}");
        let (a, b) = (tree(&a), tree(&b));
        let names: Vec<&str> = a.keys().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(names, ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]);
        for (name, bytes) in &a {
            assert!(b[name] == *bytes, "{what}: {} differs", name.display());
        }
    }
}

/// The command: where cargo has built it, or beside this binary, where both were carried elsewhere.
pub(crate) fn binary() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_fsmoe"));
    if built.exists() { built } else { std::env::current_exe().unwrap().with_file_name("fsmoe") }
}

/// The settings of a command line.
fn parsed(flags: &str) -> Settings {
    use clap::{Args, FromArgMatches};
    let command = Settings::augment_args(clap::Command::new("train").no_binary_name(true));
    Settings::from_arg_matches(&command.get_matches_from(flags.split_whitespace())).unwrap()
}

/// Every file below `dir`, by its path from there. Empty folders have an entry of their own.
pub(crate) fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn collect(root: &Path, dir: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_path_buf();
            if path.is_dir() && !path.is_symlink() {
                files.insert(name.join(""), Vec::new());
                collect(root, &path, files);
            } else {
                files.insert(name, fs::read(&path).unwrap_or_default());
            }
        }
    }
    let mut files = BTreeMap::new();
    collect(dir, dir, &mut files);
    files
}

/// A field of a row of [`Place::steps`].
fn field(row: &str, name: &str) -> f64 {
    let row: serde_json::Value = serde_json::from_str(row).unwrap();
    row[name].as_f64().unwrap()
}

/// Gives every element of one of a checkpoint's weights the same value.
fn fill(checkpoint: &Path, name: &str, value: f32) {
    edit_tensors(checkpoint, |all| {
        let t = all.get_mut(name).unwrap();
        *t = Tensor::from_slice(&vec![value; t.elements()], *t.shape()).unwrap();
    });
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_does_not() {
    let place = Place::new();
    place.train("a", "--seed 7").unwrap();
    place.train("b", "--seed 7").unwrap();
    place.train("c", "--seed 8").unwrap();
    place.assert_same("a", "b", "seed 7");
    let losses = |run: &str| -> Vec<u64> { place.steps(run).iter().map(|r| field(r, "loss").to_bits()).collect() };
    assert_eq!(losses("a").len(), 20);
    assert!(losses("a").iter().zip(losses("c")).all(|(a, c)| *a != c));
}

#[test]
fn two_hundred_steps_in_two_parts_are_two_hundred_steps() {
    let place = Place::new();
    place.train("whole", "--steps 200 --save-every 50").unwrap();
    let first = place.train("parts", "--steps 200 --save-every 50 --stop-at 100").unwrap();
    assert_eq!(first.steps, (100, 200));
    assert_eq!(place.steps("parts").len(), 100);
    // Where the first part stopped is not where the second does.
    let second = place.resume("parts", "").unwrap();
    assert_eq!(second.steps, (200, 200));
    assert_eq!(place.steps("parts").len(), 200);
    place.assert_same("whole", "parts", "200 steps");
}

/// Whatever has a state besides weights and moments: selection biases, noise, micro-batches, master weights.
#[test]
fn every_kind_of_run_goes_on_to_the_bit() {
    let place = Place::new();
    for (i, flags) in [
        "--gate sigmoid --bias-rate 0.05",
        "--gate-noise",
        "--accumulate 2 --capacity-factor 1 --batch-prioritised",
        "--preset gpt2-moe-tiny --shared-experts 1",
        "--gate x-moe --order ragged --z-weight 0.01",
        "--gate expert-choice --routing-groups 4",
        "--gate soft",
        "--dtype f64",
        "--dtype bf16",
        "--dtype f16",
    ]
    .iter()
    .enumerate()
    {
        let (whole, parts) = (format!("whole-{i}"), format!("parts-{i}"));
        place.train(&whole, flags).unwrap();
        place.train(&parts, &format!("{flags} --stop-at 7")).unwrap();
        place.resume(&parts, "").unwrap();
        place.assert_same(&whole, &parts, flags);
    }
    let bias = fs::read(place.at("whole-0/checkpoints/step-000020/optimizer.safetensors")).unwrap();
    assert!(bias.windows(7).any(|w| w == b"buffer."), "the sigmoid gate has a bias to keep");
    assert!(place.steps("whole-2").iter().any(|row| field(row, "dropped_fraction") > 0.0), "something is dropped");
}

#[test]
fn a_run_goes_back_to_an_older_checkpoint() {
    let place = Place::new();
    place.train("run", "--save-every 5 --keep-last 4").unwrap();
    place.train("copy", "--save-every 5 --keep-last 4").unwrap();
    place.resume("run/checkpoints/step-000010", "").unwrap();
    place.assert_same("copy", "run", "from step 10");
    assert_eq!(place.checkpoints("run"), place.checkpoints("copy"));

    // What came after it is no longer this run's past: the newest checkpoint is the one just written.
    let summary = place.resume("run/checkpoints/step-000010", "--stop-at 12 --lr 0.001 --keep-last 1").unwrap();
    assert_eq!(place.steps("run").len(), 12);
    assert_eq!(place.checkpoints("run"), ["step-000012"]);
    assert!(summary.files[0].1.ends_with("run/checkpoints/step-000012"));
    place.resume("run", "").unwrap();
    let numbers: Vec<f64> = place.steps("run").iter().map(|row| field(row, "step")).collect();
    assert_eq!(numbers, (1..=20).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn a_run_goes_on_in_another_folder() {
    let place = Place::new();
    place.train("whole", "").unwrap();
    place.train("first", "--stop-at 10").unwrap();
    let before = tree(&place.at("first"));
    place.resume("first", &format!("--out {}", place.at("second").display())).unwrap();
    assert!(tree(&place.at("first")) == before);
    assert_eq!(place.steps("second"), place.steps("whole")[10..]);
}

#[test]
fn every_gate_learns_in_every_order() {
    let place = Place::new();
    let mut learned = 0;
    for gate in GateKind::ALL {
        for &order in OrderKind::ALL {
            let flags = format!("--gate {gate} --order {order} --steps 50 --lr 0.01 --save-every 50");
            if parsed(&flags).resolve().is_err() {
                continue;
            }
            let run = format!("{gate}-{order}");
            let summary = place.train(&run, &flags).unwrap();
            let losses: Vec<f64> = place.steps(&run).iter().map(|row| field(row, "loss")).collect();
            let (first, last) = (losses[0], losses[49]);
            assert!((first - 256_f64.ln()).abs() < 0.1, "{run}: begins at {first}");
            assert!(last < 2.0 && summary.val_loss < 2.0, "{run}: ends at {last}, held out {}", summary.val_loss);
            learned += 1;
        }
    }
    // Of three orders, soft routing takes one.
    assert_eq!(learned, 4 * 3 + 1);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_says_where() {
    const CHECKPOINT: &str = "run/checkpoints/step-000010";
    const ROUTER: &str = "model.layers.1.block_sparse_moe.gate.weight";
    const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
    let place = Place::new();
    place.train("run", "--stop-at 10").unwrap();
    let whole = tree(&place.at(CHECKPOINT));
    for (tensor, value, whose) in [(ROUTER, f32::NAN, "in the parameter"), (QUERY, f32::MAX, "of the operation with")] {
        fill(&place.at(CHECKPOINT), tensor, value);
        let error = place.resume("run", "").unwrap_err();
        assert!(matches!(error, Error::Numeric(_)), "{error}");
        let error = error.to_string();
        let parts = ["step 11: the loss is NaN; ", "first appeared in ", &format!("{whose} {tensor};")];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!((place.checkpoints("run"), place.steps("run").len()), (vec!["step-000010".to_owned()], 10));
        for (name, bytes) in &whole {
            fs::write(place.at(CHECKPOINT).join(name), bytes).unwrap();
        }
    }
    place.train("straight", "").unwrap();
    place.resume("run", "").unwrap();
    place.assert_same("straight", "run", "after the checkpoint was put right");
}

/// The step that does the damage has a finite loss itself. Neither a checkpoint nor a result may come of it.
#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let place = Place::new();
    for flags in ["--steps 1", "--save-every 1"] {
        let run = flags.replace(' ', "");
        let error = place.train(&run, &format!("{flags} --lr 1e39 --warmup 0")).unwrap_err();
        assert!(matches!(error, Error::Numeric(_)), "{error}");
        let error = error.to_string();
        assert!(error.contains("step 1") && error.contains("in the parameter model."), "{error}");
        assert_eq!((place.steps(&run).len(), place.checkpoints(&run).len()), (1, 0), "{flags}");
    }
}

/// The write fails in the middle of the first file, and of the second.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_one_before() {
    let place = Place::new();
    place.train("straight", "").unwrap();
    place.train("run", "--stop-at 10").unwrap();
    let checkpoints = place.at("run/checkpoints");
    let before = tree(&checkpoints);
    let weights = fs::metadata(checkpoints.join("step-000010/model.safetensors")).unwrap().len();
    for (limit, file) in [(weights - 4096, "model.safetensors"), (weights + 4096, "optimizer.safetensors")] {
        let mut command = place.command("train --resume run");
        // SAFETY: between fork and exec the closure makes two system calls with valid arguments, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                // Ignored, the signal turns into an error of the write.
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                if libc::setrlimit(libc::RLIMIT_FSIZE, &limit) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let error = stderr.lines().last().unwrap();
        let parts = ["error: ", "run/checkpoints/", file, "File too large"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(tree(&checkpoints) == before, "{file}");
    }
    place.resume("run", "").unwrap();
    place.assert_same("straight", "run", "with room again");
}

/// The model is large enough for its products and loops to be divided among threads.
#[test]
fn the_number_of_threads_changes_nothing() {
    let place = Place::new();
    let flags = "--hidden 128 --heads 4 --ffn 128 --seq 64 --batch 8 --steps 4";
    for threads in ["1", "2", "3"] {
        let mut command = place.command(&format!("train --config small.toml {flags} --out {threads}"));
        assert!(command.env("RAYON_NUM_THREADS", threads).output().unwrap().status.success());
    }
    place.assert_same("1", "2", "2 threads");
    place.assert_same("1", "3", "3 threads");
}

#[test]
fn a_run_that_is_there_is_not_begun_again() {
    let place = Place::new();
    place.train("run", "--stop-at 10").unwrap();
    let before = tree(&place.at("run"));
    let out = format!("--out {}", place.at("run").display());
    for error in [place.train("run", "").unwrap_err(), place.resume("run", &out).unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains(&out) && error.contains("there is a run in it"), "{error}");
    }
    assert!(tree(&place.at("run")) == before);
}

#[test]
fn what_decides_the_samples_does_not_change() {
    let place = Place::new();
    place.train("run", "--stop-at 10 --batch 4 --seed 3").unwrap();
    for (flags, parts) in [
        ("--seed 4", ["--seed 4", "that run has seed 3"]),
        ("--batch 5", ["5 sequences a step", "saw 40 in 10 steps"]),
        ("--accumulate 3", ["12 sequences a step", "saw 40 in 10 steps"]),
        ("--stop-at 10", ["10 steps done", "raise --stop-at or --steps"]),
        ("--steps 9", ["10 steps done", "end after 9"]),
    ] {
        let error = place.resume_refused("run", flags);
        assert!(parts.iter().all(|part| error.contains(part)), "{flags}: {error}");
    }
    // As many in other portions, and a longer schedule, are the user's to choose.
    place.resume("run", "--batch 2 --accumulate 2 --steps 25").unwrap();
    assert_eq!(place.steps("run").len(), 25);
}
