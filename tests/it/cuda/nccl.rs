//! Ranks as processes over NCCL: four that share the GPU, started here with the environment that torchrun gives them.
//!
//! A test that needs other code than the command's starts this binary again, with itself as the only test, and finds by its
//! environment that it is a rank.

use std::ffi::{c_int, c_void};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fsmoe::comm::launch::Launch;
use fsmoe::comm::{Communicator, local, nccl};
use fsmoe::device::Lane;
use fsmoe::tensor::{DType, Tensor};
use fsmoe::{Error, Result};

use crate::train::{Place, binary};

const RANKS: usize = 4;

/// A rank's process, and what it has said.
struct Process {
    child: Child,
    said: std::thread::JoinHandle<String>,
}

impl Process {
    /// Starts `command` as rank `rank` of `world`, which meet on the host at a port of their own.
    fn start(mut command: Command, rank: usize, world: usize, port: u16) -> Self {
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", world.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("LOCAL_WORLD_SIZE", world.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", (port - 1).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        let said = std::thread::spawn(move || {
            let lines = err.lines().map_while(std::result::Result::ok);
            lines.fold(String::new(), |all, line| all + &line + "\n")
        });
        Process { child, said }
    }

    /// Waits for its end: whether it was a success, and what it has said. One that does not end is killed, and so is the
    /// test.
    fn end(mut self, deadline: Instant) -> (bool, String) {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.success(), self.said.join().unwrap());
            }
            if Instant::now() > deadline {
                self.child.kill().unwrap();
                let said = self.said.join().unwrap();
                panic!("process {} did not end; it has said:\n{said}", self.child.id());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, signal: c_int) {
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

/// A port that was free a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What became of all of them.
fn end(processes: Vec<Process>, within: Duration) -> Vec<(bool, String)> {
    let deadline = Instant::now() + within;
    processes.into_iter().map(|p| p.end(deadline)).collect()
}

#[track_caller]
fn assert_all_well(ended: Vec<(bool, String)>) {
    for (rank, (well, said)) in ended.iter().enumerate() {
        assert!(well, "rank {rank} said:\n{said}");
    }
}

/// Runs `body` on every rank of a world, each in a process, and returns what became of them; in such a process it does not
/// return.
fn on_ranks(
    test: &str,
    timeout: Duration,
    body: impl FnOnce(Arc<dyn Communicator>, &Lane) -> Result<()>,
) -> Vec<(bool, String)> {
    if std::env::var("FSMOE_TEST_RANK").is_ok() {
        let launch = Launch::from_env().unwrap().unwrap();
        let options = nccl::Options { share_gpu: true, ..nccl::Options::new(timeout) };
        let result = nccl::run(&launch, &options, body);
        if let Err(e) = &result {
            eprintln!("error: {e}");
        }
        std::process::exit(i32::from(result.is_err()));
    }
    let port = port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("cuda::nccl::{test}"), "--ignored", "--nocapture"]);
        command.env("FSMOE_TEST_RANK", rank.to_string());
        Process::start(command, rank, RANKS, port)
    };
    end((0..RANKS).map(start).collect(), Duration::from_secs(60))
}

/// Element i of what rank `rank` has: small whole numbers, whose sums every type holds.
fn value(rank: usize, i: usize) -> f64 {
    ((rank * 7 + i * 3) % 11) as f64 - 4.0
}

fn tensor(lane: &Lane, dtype: DType, values: &[f64]) -> Result<Tensor> {
    let host = match dtype {
        DType::I32 => Tensor::from_slice(&values.iter().map(|v| *v as i32).collect::<Vec<_>>(), [values.len()])?,
        _ => Lane::cpu().cast(&Tensor::from_slice(values, [values.len()])?, dtype)?,
    };
    lane.to_device(&host)
}

/// Element i of rank `rank`'s tensors, `n` of them.
fn of_rank(rank: usize, n: usize) -> Vec<f64> {
    (0..n).map(|i| value(rank, i)).collect()
}

#[track_caller]
fn assert_is(lane: &Lane, what: &str, t: &Tensor, right: &[f64]) -> Result<()> {
    let host = lane.to_host(t)?;
    let got: Vec<f64> = match t.dtype() {
        DType::I32 => host.to_vec::<i32>()?.into_iter().map(f64::from).collect(),
        _ => Lane::cpu().cast(&host, DType::F64)?.to_vec()?,
    };
    assert_eq!(got, right, "{what} of {}", t.dtype());
    Ok(())
}

/// Every collective of a group, against what it is to give.
fn check(comm: &dyn Communicator, lane: &Lane, dtype: DType, n: usize) -> Result<()> {
    let (p, me, ranks) = (comm.size(), comm.rank(), comm.ranks().to_vec());
    let empty = |n: usize| lane.empty([n], dtype);
    let mine = |n: usize| tensor(lane, dtype, &of_rank(ranks[me], n));

    let all = empty(p * n)?;
    comm.all_gather(lane, &mine(n)?, &all)?;
    let right: Vec<f64> = ranks.iter().flat_map(|&r| of_rank(r, n)).collect();
    assert_is(lane, "all-gather", &all, &right)?;

    let recv = empty(p * n)?;
    comm.all_to_all(lane, &mine(p * n)?, &recv)?;
    let right: Vec<f64> = ranks.iter().flat_map(|&r| of_rank(r, p * n)[me * n..(me + 1) * n].to_vec()).collect();
    assert_is(lane, "all-to-all", &recv, &right)?;

    // From i to j go (2i + j)·n / 2 elements: none from the first to itself.
    let rows = |i: usize, j: usize| (2 * i + j) * n / 2;
    let sends: Vec<Tensor> = (0..p).map(|to| mine(rows(me, to))).collect::<Result<_>>()?;
    let recvs: Vec<Tensor> = (0..p).map(|from| empty(rows(from, me))).collect::<Result<_>>()?;
    comm.all_to_all_ragged(lane, &sends, &recvs)?;
    for (from, recv) in recvs.iter().enumerate() {
        assert_is(lane, "ragged all-to-all", recv, &of_rank(ranks[from], rows(from, me)))?;
    }
    let recvs: Vec<Tensor> = (0..p).map(|from| empty(from * n)).collect::<Result<_>>()?;
    comm.all_gather_ragged(lane, &mine(me * n)?, &recvs)?;
    for (from, recv) in recvs.iter().enumerate() {
        assert_is(lane, "ragged all-gather", recv, &of_rank(ranks[from], from * n))?;
    }

    let data = mine(n)?;
    comm.broadcast(lane, &data, p - 1)?;
    assert_is(lane, "broadcast", &data, &of_rank(ranks[p - 1], n))?;
    if !dtype.is_float() {
        return Ok(());
    }

    let sum = |i: usize| ranks.iter().map(|&r| value(r, i)).sum::<f64>();
    let data = mine(n)?;
    comm.all_reduce(lane, &data)?;
    assert_is(lane, "all-reduce", &data, &(0..n).map(sum).collect::<Vec<_>>())?;
    let recv = empty(n)?;
    comm.reduce_scatter(lane, &mine(p * n)?, &recv)?;
    assert_is(lane, "reduce-scatter", &recv, &(me * n..(me + 1) * n).map(sum).collect::<Vec<_>>())?;
    // These are summed by our kernels; on a GPU in f64 only statistics are, which are not ragged.
    if dtype != DType::F64 || lane.place() == fsmoe::tensor::Place::Cpu {
        let sends: Vec<Tensor> = (0..p).map(|to| mine(to * n)).collect::<Result<_>>()?;
        let recv = empty(me * n)?;
        comm.reduce_scatter_ragged(lane, &sends, &recv)?;
        assert_is(lane, "ragged reduce-scatter", &recv, &(0..me * n).map(sum).collect::<Vec<_>>())?;
    }
    comm.barrier(lane)
}

/// [`check`] of a world of [`RANKS`] and of what is split off it.
fn check_all(world: &dyn Communicator, lane: &Lane) -> Result<()> {
    let rank = world.rank();
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64, DType::I32] {
        check(world, lane, dtype, 6)?;
    }
    check(world, lane, DType::F32, 0)?;
    check(world, lane, DType::BF16, 20_000)?;
    // Two groups of two, the second in reverse; groups of one; and all of it again, on a lane of its own.
    let pairs = world.split("pairs", rank % 2, if rank.is_multiple_of(2) { rank } else { RANKS - rank })?;
    let members = if rank.is_multiple_of(2) { [0, 2] } else { [3, 1] };
    assert_eq!((pairs.label(), pairs.ranks()), ("pairs", &members[..]));
    check(&*pairs, lane, DType::F32, 5)?;
    let alone = pairs.split("alone", pairs.rank(), 0)?;
    assert_eq!(alone.ranks(), [rank]);
    check(&*alone, lane, DType::F32, 5)?;
    let other = lane.beside(fsmoe::device::LaneKind::InterNode, fsmoe::device::cuda::Share::default())?;
    check(&*world.split("again", 0, rank)?, &other, DType::F32, 5)
}

#[test]
fn collectives_of_threads_give_what_they_are_to_give() {
    local::run(RANKS, Duration::from_secs(60), |world| check_all(&*world, &Lane::cpu())).unwrap();
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_collectives_give_what_they_are_to_give() {
    let ended = on_ranks("cuda_nccl_collectives_give_what_they_are_to_give", Duration::from_secs(60), |world, lane| {
        check_all(&*world, lane)
    });
    assert_all_well(ended);
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_a_rank_that_fails_ends_all() {
    let begin = Instant::now();
    let ended = on_ranks("cuda_nccl_a_rank_that_fails_ends_all", Duration::from_secs(40), |world, lane| {
        let data = lane.zeros([8], DType::F32)?;
        world.all_reduce(lane, &data)?;
        lane.synchronize()?;
        match world.rank() {
            1 => Err(Error::Config("rows of the wrong color".into())),
            _ => world.barrier(lane),
        }
    });
    for (rank, (well, said)) in ended.into_iter().enumerate() {
        assert!(!well && said.contains("rows of the wrong color"), "rank {rank} said:\n{said}");
        assert!(rank == 1 || (said.contains("barrier") && said.contains("group world")), "rank {rank} said:\n{said}");
    }
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
}

/// A communicator of somebody else, of one rank: it stays his.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_a_borrowed_communicator_is_given_back() {
    // SAFETY: the names end in a zero, and the types are those of NCCL's header.
    let (init, count, destroy) = unsafe {
        let library = libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null());
        let find = |name: &std::ffi::CStr| libc::dlsym(library, name.as_ptr());
        (
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void, c_int, *const c_int) -> c_int>(
                find(c"ncclCommInitAll"),
            ),
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int>(find(
                c"ncclCommCount",
            )),
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> c_int>(find(c"ncclCommDestroy")),
        )
    };
    let lane = Lane::cuda(0).unwrap();
    let mut comm = std::ptr::null_mut();
    // SAFETY: one GPU of one number; the communicator is written.
    assert_eq!(unsafe { init(&raw mut comm, 1, [0].as_ptr()) }, 0);
    {
        // SAFETY: it has just been made, and nobody else has it.
        let group = unsafe { nccl::borrow(comm, &lane, "theirs") }.unwrap();
        assert_eq!((group.label(), group.ranks(), group.rank()), ("theirs", &[0][..], 0));
        check(&*group, &lane, DType::F32, 4).unwrap();
        let part = group.split("part", 3, 0).unwrap();
        check(&*part, &lane, DType::BF16, 4).unwrap();
        let error = group.all_reduce(&Lane::cpu(), &Tensor::host_zeros([2], DType::F32)).unwrap_err().to_string();
        assert!(error.contains("theirs") && error.contains("cuda:0") && error.contains("cpu"), "{error}");
    }
    let mut ranks = 0;
    // SAFETY: the communicator is as it was.
    unsafe {
        assert_eq!((count(comm, &raw mut ranks), ranks), (0, 1));
        assert_eq!(destroy(comm), 0);
    }
}

/// `fsmoe train` on so many ranks, in a folder of [`Place`].
fn train(place: &Place, ranks: usize, port: u16, flags: &str) -> Vec<Process> {
    let start = |rank: usize| {
        let mut command = Command::new(binary());
        command.args(["train", "--comm", "nccl", "--share-gpu"]).args(flags.split_whitespace());
        command.current_dir(place.at(""));
        Process::start(command, rank, ranks, port)
    };
    (0..ranks).map(start).collect()
}

const SOON: Duration = Duration::from_secs(90);
const MODEL: &str = "--config small.toml --dtype f32 --capacity-factor * --warmup 2";

fn losses(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let rows = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    rows.filter(|row| row["event"] == "step").filter_map(|row| row["loss"].as_f64()).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_ranks_learn_as_one_does_and_any_world_goes_on() {
    let place = Place::new();
    let flags = format!("{MODEL} --steps 8 --save-every 4");
    let one = Command::new(binary())
        .args(format!("train {flags} --device cuda --out one").split_whitespace())
        .current_dir(place.at(""))
        .output()
        .unwrap();
    assert!(one.status.success(), "{}", String::from_utf8_lossy(&one.stderr));
    let ended = end(
        train(&place, RANKS, port(), &format!("{flags} --nodes 2 --ep 2 --esp 2 --mp 2 --out ranks --stop-at 4")),
        SOON,
    );
    assert_all_well(ended);
    assert!(!fs::read_to_string(place.at("ranks/config.toml")).unwrap().contains("nccl"));
    assert_all_well(end(train(&place, 2, port(), "--resume ranks --esp 1 --mp 1 --stop-at 6"), SOON));
    let last = Command::new(binary())
        .args("train --resume ranks --ranks 1 --nodes 1 --ep 1 --esp 1 --mp 1 --device cuda".split_whitespace())
        .current_dir(place.at(""))
        .output()
        .unwrap();
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    let (one, ranks) = (losses(&place.at("one")), losses(&place.at("ranks")));
    assert_eq!((one.len(), ranks.len()), (8, 8));
    let worst = one.iter().zip(&ranks).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
    assert!(worst < 1e-3, "off by {worst:.1e}\n{one:?}\n{ranks:?}");
    println!("losses of 4, 2 and 1 ranks: off by {worst:.1e}");
}

/// A rank that is killed, and one that stands still, in the middle of a step.
#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_a_rank_that_dies_ends_all_and_the_run_goes_on_on_half() {
    let place = Place::new();
    for (signal, name, timeout) in [(libc::SIGKILL, "killed", 10), (libc::SIGSTOP, "stopped", 6)] {
        let flags = format!("{MODEL} --steps 100000 --save-every 2 --eval-every 1000 --comm-timeout {timeout}");
        let mut processes = train(&place, RANKS, port(), &format!("{flags} --nodes 2 --ep 4 --out {name}"));
        let begin = Instant::now();
        while losses(&place.at(name)).len() < 5 {
            assert!(begin.elapsed() < SOON, "five steps take too long");
            for p in &mut processes {
                if let Some(status) = p.child.try_wait().unwrap() {
                    panic!("{status}: {:?}", end(processes, SOON));
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let victim = processes.remove(2);
        victim.signal(signal);
        let begin = Instant::now();
        let ended = end(processes, Duration::from_secs(timeout + 10));
        let took = begin.elapsed();
        victim.signal(libc::SIGKILL);
        victim.end(Instant::now() + SOON);
        for (rank, (well, said)) in [0, 1, 3].into_iter().zip(ended) {
            println!("rank {rank}: {}", said.lines().rfind(|l| l.contains("error")).unwrap_or_default());
            assert!(!well && said.contains("in group "), "rank {rank} said:\n{said}");
            let ops = ["all-to-all", "all-reduce", "all-gather", "reduce-scatter", "barrier"];
            assert!(ops.iter().any(|op| said.contains(op)), "rank {rank} said:\n{said}");
            assert!(signal != libc::SIGKILL || said.contains("rank 2 has gone"), "rank {rank} said:\n{said}");
        }
        assert!(took < Duration::from_secs(timeout), "{name}: {took:?}");
        println!("{name}: all had ended after {took:?}");
    }
    let saved = place.checkpoints("killed").pop().unwrap();
    let step: u64 = saved.trim_start_matches("step-").parse().unwrap();
    let flags = format!("--resume killed --ep 2 --stop-at {} --comm-timeout 60", step + 2);
    assert_all_well(end(train(&place, 2, port(), &flags), SOON));
    assert_eq!(place.checkpoints("killed").pop().unwrap(), format!("step-{:06}", step + 2));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_nccl_worlds_that_do_not_fit_are_told_why() {
    let place = Place::new();
    let start = |rank: usize, world: usize, port: u16, flags: &str| {
        let mut command = Command::new(binary());
        command.args(format!("train {MODEL} --comm nccl --out no {flags}").split_whitespace());
        command.current_dir(place.at(""));
        Process::start(command, rank, world, port)
    };
    let pair = |flags: [&str; 2]| {
        let port = port();
        vec![start(0, 2, port, flags[0]), start(1, 2, port, flags[1])]
    };
    let lonely = |rank| vec![start(rank, 2, port(), "--share-gpu --comm-timeout 3")];
    let worlds = port();
    let gpus = fsmoe::device::cuda::count().unwrap();
    let many = start(gpus, gpus + 1, port(), "");
    let cases: Vec<(Vec<Process>, &[&str])> = vec![
        (pair(["--share-gpu --ep 2", "--share-gpu --ep 1"]), &["has 2 for --ep", "rank 1 has 1"]),
        (pair(["--share-gpu --mp 3", "--share-gpu --mp 3"]), &["mp = 3", "2 ranks"]),
        (pair(["--share-gpu --ranks 4", "--share-gpu --ranks 4"]), &["--ranks 4", "of 2", "torchrun"]),
        (
            vec![start(0, 2, worlds, "--share-gpu"), start(1, 4, worlds, "--share-gpu")],
            &["one of 4 ranks", "rank 0 one of 2"],
        ),
        (lonely(0), &["rank 1 of 2 did not come", "3s"]),
        (lonely(1), &["rank 0 did not listen", "3s"]),
        (vec![many], &["ranks on a host", "GPU", "--share-gpu"]),
    ];
    for (processes, parts) in cases {
        for (well, said) in end(processes, Duration::from_secs(20)) {
            assert!(!well && parts.iter().all(|part| said.contains(part)), "{parts:?}: {said}");
        }
    }
    assert!(!place.at("no").exists());
}
