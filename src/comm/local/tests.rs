use super::*;
use crate::comm::Communicator;
use crate::device::MemoryKernels;
use crate::device::cpu::Cpu;
use crate::rng::{Counter, Purpose};
use crate::tensor::DType;
use proptest::prelude::*;
use std::time::Instant;

const TIMEOUT: Duration = Duration::from_secs(20);

/// A tensor of `n` elements that depends on `id` alone; integers are small.
fn tensor(id: usize, n: usize, dtype: DType) -> Tensor {
    if dtype == DType::I32 {
        let values: Vec<i32> = (0..n).map(|i| (id * 1000 + i) as i32).collect();
        return Tensor::from_slice(&values, [n]).unwrap();
    }
    let t = Tensor::host([n], dtype);
    Cpu.normal(Counter { seed: 3, purpose: Purpose::Test, step: id as u64 }, 0, &t).unwrap();
    t
}

/// The elements as f64, which holds every value of every dtype.
fn wide(t: &Tensor) -> Vec<f64> {
    if t.dtype() == DType::I32 {
        return t.to_vec::<i32>().unwrap().into_iter().map(f64::from).collect();
    }
    let out = Tensor::host(*t.shape(), DType::F64);
    Cpu.copy(t, &out).unwrap();
    out.to_vec().unwrap()
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL)
}

fn floats() -> impl Strategy<Value = (DType, f64)> {
    prop::sample::select(vec![(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_is_moved_arrives(p in 1usize..=16, n in 0usize..40, dtype in dtypes(), root in 0usize..16, seed in 0usize..1000) {
        let root = root % p;
        // Ragged counts, zero included.
        let count = |from: usize, to: usize| (seed + 7 * from + 3 * to) % 5;
        run(p, TIMEOUT, |comm| {
            let (lane, me) = (Lane::cpu(), comm.rank());
            let id = |from: usize, to: usize| from * p + to;

            let out = Tensor::host([p, n], dtype);
            comm.all_gather(&lane, &tensor(me, n, dtype), &out)?;
            for from in 0..p {
                assert_eq!(wide(&out.index(from)?), wide(&tensor(from, n, dtype)));
            }

            let (send, recv) = (Tensor::host([p, n], dtype), Tensor::host([p, n], dtype));
            (0..p).try_for_each(|to| lane.copy_many(&[(tensor(id(me, to), n, dtype), send.index(to)?)]))?;
            comm.all_to_all(&lane, &send, &recv)?;
            for from in 0..p {
                assert_eq!(wide(&recv.index(from)?), wide(&tensor(id(from, me), n, dtype)));
            }

            let sends: Vec<Tensor> = (0..p).map(|to| tensor(id(me, to), count(me, to), dtype)).collect();
            let recvs: Vec<Tensor> = (0..p).map(|from| Tensor::host([count(from, me)], dtype)).collect();
            comm.all_to_all_ragged(&lane, &sends, &recvs)?;
            for (from, recv) in recvs.iter().enumerate() {
                assert_eq!(wide(recv), wide(&tensor(id(from, me), count(from, me), dtype)));
            }

            let recvs: Vec<Tensor> = (0..p).map(|from| Tensor::host([count(from, 0)], dtype)).collect();
            comm.all_gather_ragged(&lane, &tensor(me, count(me, 0), dtype), &recvs)?;
            for (from, recv) in recvs.iter().enumerate() {
                assert_eq!(wide(recv), wide(&tensor(from, count(from, 0), dtype)));
            }

            let data = tensor(me, n, dtype);
            comm.broadcast(&lane, &data, root)?;
            assert_eq!(wide(&data), wide(&tensor(root, n, dtype)));
            comm.barrier(&lane)
        }).unwrap();
    }

    #[test]
    fn sums_are_right_and_the_same_to_the_bit_on_all_ranks(p in 1usize..=16, n in 0usize..70, (dtype, bound) in floats()) {
        // The plain sums, and those in rank order in the type that is accumulated in.
        let all: Vec<Vec<f64>> = (0..p).map(|rank| wide(&tensor(rank, p * n, dtype))).collect();
        let plain: Vec<f64> = (0..p * n).map(|i| all.iter().map(|part| part[i]).sum()).collect();
        let in_order = |i: usize| match dtype {
            DType::F64 => all.iter().map(|part| part[i]).fold(-0.0, |sum, v| sum + v),
            _ => f64::from(all.iter().map(|part| part[i] as f32).fold(-0.0f32, |sum, v| sum + v)),
        };
        let in_order = Tensor::from_slice(&(0..p * n).map(in_order).collect::<Vec<f64>>(), [p * n]).unwrap();
        let in_order = wide(&Lane::cpu().cast(&in_order, dtype).unwrap());
        run(p, TIMEOUT, |comm| {
            let (lane, me) = (Lane::cpu(), comm.rank());
            let mine = tensor(me, p * n, dtype);

            let scattered = Tensor::host([n], dtype);
            comm.reduce_scatter(&lane, &mine, &scattered)?;
            let ragged = Tensor::host([n], dtype);
            comm.reduce_scatter_ragged(&lane, &blocks(&mine, p)?, &ragged)?;
            comm.all_reduce(&lane, &mine)?;
            assert_eq!(wide(&mine), in_order);
            for (a, b) in in_order.iter().zip(&plain) {
                assert!((a - b).abs() <= bound * p as f64 * 4.0, "{a} for {b}");
            }
            let block = &in_order[me * n..(me + 1) * n];
            assert_eq!((&wide(&scattered)[..], &wide(&ragged)[..]), (block, block));
            Ok(())
        }).unwrap();
    }

    #[test]
    fn splits_order_by_key(p in 1usize..=12, colors in 1usize..4) {
        run(p, TIMEOUT, |comm| {
            let rank = comm.rank();
            let part = comm.split("part", rank % colors, p - rank)?;
            let members: Vec<usize> = (0..p).rev().filter(|r| r % colors == rank % colors).collect();
            assert_eq!((part.label(), part.ranks(), part.ranks()[part.rank()]), ("part", &members[..], rank));
            let out = Tensor::host([part.size()], DType::I32);
            part.all_gather(&Lane::cpu(), &Tensor::from_slice(&[rank as i32], [1])?, &out)?;
            assert_eq!(out.to_vec::<i32>()?, members.iter().map(|&r| r as i32).collect::<Vec<_>>());
            Ok(())
        }).unwrap();
    }
}

/// Runs `f` on a world of three and returns each rank's error, which must come within a second.
fn errors(timeout: Duration, f: impl Fn(&Arc<dyn Communicator>) -> Result<()> + Sync) -> Vec<Option<String>> {
    let begin = Instant::now();
    let all = run(3, timeout, |comm| Ok(f(&comm).err().map(|e| e.to_string()))).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "it took {:?}", begin.elapsed());
    all
}

fn assert_all(errors: &[Option<String>], parts: &[&str]) {
    for (rank, error) in errors.iter().enumerate() {
        let message = error.as_ref().unwrap_or_else(|| panic!("rank {rank} has no error"));
        assert!(parts.iter().all(|part| message.contains(part)), "rank {rank}: {message:?} does not name {parts:?}");
    }
}

#[test]
fn calls_that_differ_are_errors_on_all_ranks() {
    let (lane, float) = (Lane::cpu(), |n: usize| Tensor::host_zeros([n], DType::F32));
    let other_op = errors(TIMEOUT, |comm| match comm.rank() {
        1 => comm.broadcast(&lane, &float(4), 2),
        _ => comm.all_reduce(&lane, &float(4)),
    });
    assert_all(
        &other_op,
        &["group world (ranks 0, 1, 2)", "all-reduce of 4 f32", "rank 1 broadcast of 4 f32 from rank 2"],
    );
    let other_size = errors(TIMEOUT, |comm| comm.all_reduce(&lane, &float(4 + comm.rank() / 2)));
    assert_all(&other_size, &["rank 0 called all-reduce of 4 f32, rank 2 all-reduce of 5 f32"]);
    let other_dtype = errors(TIMEOUT, |comm| {
        let dtype = if comm.rank() == 2 { DType::BF16 } else { DType::F32 };
        comm.all_gather(&lane, &Tensor::host_zeros([2], dtype), &Tensor::host([6], dtype))
    });
    assert_all(&other_dtype, &["all-gather of 2 f32, rank 2 all-gather of 2 bf16"]);
    let other_root = errors(TIMEOUT, |comm| comm.broadcast(&lane, &float(1), comm.rank()));
    assert_all(&other_root, &["broadcast of 1 f32 from rank 0 of the group", "rank 1 of the group"]);
    let other_count = errors(TIMEOUT, |comm| {
        let sends = vec![float(1), float(2), float(3)];
        let recvs: Vec<Tensor> =
            (0..3).map(|_| Tensor::host([comm.rank() + 1 + comm.rank() / 2], DType::F32)).collect();
        comm.all_to_all_ragged(&lane, &sends, &recvs)
    });
    assert_all(&other_count, &["all-to-all", "rank 0 sends 3 elements to rank 2, which receives 4"]);
}

#[test]
fn a_call_that_breaks_a_rule_ends_the_others() {
    let lane = Lane::cpu();
    let ints = errors(TIMEOUT, |comm| match comm.rank() {
        0 => comm.all_reduce(&lane, &Tensor::host([3], DType::I32)),
        _ => comm.all_reduce(&lane, &Tensor::host_zeros([3], DType::F32)),
    });
    assert_all(&ints, &["all-reduce in group world (ranks 0, 1, 2) on rank", "i32", "only floats"]);
    assert!(ints[1].as_ref().unwrap().contains("rank 0 failed"), "{ints:?}");

    let x = Tensor::host_zeros([6, 2], DType::F32);
    let (turned, shared) = (x.t().unwrap(), x.narrow(0, 0, 2).unwrap());
    let other = Tensor::host([4], DType::F32);
    let half = Tensor::host([2, 2], DType::F16);
    let comm = world(1, TIMEOUT).unwrap().remove(0);
    let refused = |result: Result<()>, part: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("group world (ranks 0) on rank 0"), "{message}");
    };
    refused(comm.all_reduce(&lane, &turned), "contiguous");
    refused(comm.all_gather(&lane, &x, &shared), "share memory");
    refused(comm.all_gather(&lane, &x, &other), "a block of 12 elements for each of 1 ranks");
    refused(comm.reduce_scatter(&lane, &other, &half), "from f32 to f16");
    refused(comm.all_to_all(&lane, &x, &other), "from shape (6, 2) to (4)");
    refused(comm.all_to_all_ragged(&lane, &[], &[]), "one of each per rank");
    refused(comm.broadcast(&lane, &x, 1), "from rank 1 of 1");
    assert!(world(0, TIMEOUT).err().unwrap().to_string().contains("at least 1"));
}

#[test]
fn a_rank_that_fails_panics_or_leaves_ends_the_others() {
    let lane = Lane::cpu();
    type Fault = fn() -> Result<()>;
    let faults: [(Fault, &str); 2] =
        [(|| config_err!("a wrong setting"), "a wrong setting"), (|| panic!("a wrong turn"), "a wrong turn")];
    for (fault, says) in faults {
        let begin = Instant::now();
        let seen = std::sync::Mutex::new(Vec::new());
        let result = run(4, TIMEOUT, |comm| {
            // Two groups: the rank that fails is a member of one only, and the other must end as well.
            let pair = comm.split("pair", comm.rank() / 2, 0)?;
            if comm.rank() == 3 {
                fault()?;
            }
            let error = match comm.rank() {
                2 => pair.barrier(&lane).unwrap_err(),
                _ => comm.all_reduce(&lane, &Tensor::host_zeros([3], DType::F64)).unwrap_err(),
            };
            seen.lock().unwrap().push(error.to_string());
            Err::<(), _>(error)
        });
        assert!(result.unwrap_err().to_string().contains(says), "the first failure is the run's");
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen.len(), 3);
        for message in seen {
            assert!(message.contains("rank 3") && message.contains(says), "{message}");
            let call = message.contains("barrier in group pair (ranks 2, 3) on rank 2")
                || message.contains("all-reduce in group world (ranks 0, 1, 2, 3) on rank");
            assert!(call, "{message}");
        }
        assert!(begin.elapsed() < Duration::from_secs(1), "it took {:?}", begin.elapsed());
    }
    let left = errors(TIMEOUT, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier(&lane) });
    assert!(left[1].is_none());
    assert_all(&[left[0].clone(), left[2].clone()], &["barrier in group world", "rank 1 has left"]);
}

/// A tensor without elements may point anywhere, also into what is sent.
#[test]
fn what_is_empty_shares_no_memory() {
    let (lane, comm) = (Lane::cpu(), world(1, TIMEOUT).unwrap().remove(0));
    let t = tensor(0, 4, DType::F64);
    let empty = t.narrow(0, 2, 0).unwrap();
    assert!(!t.overlaps(&empty) && !empty.overlaps(&t) && t.overlaps(&t.narrow(0, 3, 1).unwrap()));
    let one = std::slice::from_ref(&empty);
    comm.all_to_all_ragged(&lane, one, one).unwrap();
    comm.reduce_scatter_ragged(&lane, one, &t.narrow(0, 1, 0).unwrap()).unwrap();
}

#[test]
fn a_rank_that_never_comes_is_named_when_the_time_is_up() {
    let lane = Lane::cpu();
    let late = errors(Duration::from_millis(80), |comm| match comm.rank() {
        1 => {
            std::thread::sleep(Duration::from_millis(250));
            comm.barrier(&lane)
        }
        _ => comm.barrier(&lane),
    });
    assert_all(&late, &["barrier in group world (ranks 0, 1, 2)", "rank 1 did not come within 80ms"]);
}

#[test]
fn an_abort_ends_what_is_pending_and_what_comes_later() {
    let lane = Lane::cpu();
    let stopped = errors(TIMEOUT, |comm| {
        if comm.rank() == 2 {
            std::thread::sleep(Duration::from_millis(50));
            comm.abort("the user asked to stop");
        }
        comm.barrier(&lane)
    });
    assert_all(&stopped, &["rank 2 aborted: the user asked to stop"]);
}

#[test]
fn one_rank_may_not_have_two_collectives_of_a_group_pending() {
    let comm = world(2, Duration::from_millis(200)).unwrap().remove(0);
    let other = comm.clone();
    let first = std::thread::spawn(move || other.barrier(&Lane::cpu()));
    std::thread::sleep(Duration::from_millis(50));
    let message = comm.barrier(&Lane::cpu()).unwrap_err().to_string();
    assert!(message.contains("rank 1 has left") || message.contains("barrier pending"), "{message}");
    assert!(first.join().unwrap().is_err());
}

/// What a rank is held up by one that comes later is told apart from its own work.
#[test]
fn waiting_for_a_later_rank_is_counted() {
    let late = Duration::from_millis(80);
    let waits = run(2, Duration::from_secs(20), |world| {
        world.barrier(&Lane::cpu())?;
        let before = waited();
        if world.rank() == 1 {
            std::thread::sleep(late);
        }
        world.barrier(&Lane::cpu())?;
        Ok(waited() - before)
    })
    .unwrap();
    assert!(waits[0] >= late / 2 && waits[1] < late / 2, "{waits:?}");
}
