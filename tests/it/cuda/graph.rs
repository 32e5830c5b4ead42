//! Graphs and events. Every test has a lane of its own: what another thread issued on a lane would be captured too.

use fsmoe::Result;
use fsmoe::device::cpu::Cpu;
use fsmoe::device::cuda::Cuda;
use fsmoe::device::{ExpertKernels, Gelu, MathKernels, MemoryKernels};
use fsmoe::tensor::{DType, Tensor};

use super::support::{bytes, gpu, uniform};

fn upload(lane: &Cuda, values: &[f64], shape: [usize; 2], dtype: DType) -> Tensor {
    let host = Tensor::host(shape, dtype);
    Cpu.copy(&Tensor::from_slice(values, shape).unwrap(), &host).unwrap();
    let out = lane.alloc(shape.into(), dtype).unwrap();
    lane.upload(&host, &out).unwrap();
    out
}

fn download(lane: &Cuda, t: &Tensor) -> Tensor {
    let out = Tensor::host(*t.shape(), t.dtype());
    lane.download(t, &out).unwrap();
    out
}

const ROWS: usize = 200;
const WIDTH: usize = 96;

/// A small FFN: several kernels, matrix products, and tensors that come and go.
struct Work {
    x: Tensor,
    w: Tensor,
    y: Tensor,
    sum: Tensor,
}

impl Work {
    fn new(lane: &Cuda) -> Self {
        Work {
            x: upload(lane, &uniform(1, ROWS * WIDTH, -1.0, 1.0), [ROWS, WIDTH], DType::BF16),
            w: upload(lane, &uniform(2, WIDTH * WIDTH, -0.2, 0.2), [WIDTH, WIDTH], DType::BF16),
            y: lane.alloc([ROWS, WIDTH].into(), DType::BF16).unwrap(),
            sum: lane.alloc([WIDTH].into(), DType::F32).unwrap(),
        }
    }

    fn run(&self, lane: &Cuda) -> Result<()> {
        let like = || lane.alloc([ROWS, WIDTH].into(), DType::BF16);
        let inner = like()?;
        lane.gemm(1.0, &self.x, &self.w, 0.0, &inner)?;
        let bent = like()?;
        lane.gelu(Gelu::Erf, &inner, &bent)?;
        drop(inner);
        let again = like()?;
        lane.gemm(1.0, &bent, &self.w.t()?, 0.0, &again)?;
        lane.add(&again, &self.x, &self.y)?;
        lane.fill(&self.sum, 0.0)?;
        lane.sum_rows(&self.y, &self.sum)
    }

    fn results(&self, lane: &Cuda) -> [Vec<u8>; 2] {
        [&self.y, &self.sum].map(|t| bytes(&download(lane, t)))
    }

    fn spoil(&self, lane: &Cuda) {
        [&self.y, &self.sum].into_iter().for_each(|t| lane.fill(t, f64::NAN).unwrap());
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_graph_replays_with_the_same_bits() {
    let lane = gpu().fork().unwrap();
    let work = Work::new(&lane);
    work.run(&lane).unwrap();
    let eager = work.results(&lane);
    work.spoil(&lane);
    let spoilt = work.results(&lane);

    let (graph, answer) = lane.capture(&[], || work.run(&lane).map(|()| 42)).unwrap();
    assert_eq!(answer, 42);
    assert_eq!(work.results(&lane), spoilt, "capturing executes nothing");
    for _ in 0..3 {
        work.spoil(&lane);
        graph.replay().unwrap();
        assert_eq!(work.results(&lane), eager);
    }

    // Other inputs at the same addresses.
    let other = upload(&lane, &uniform(3, ROWS * WIDTH, -1.0, 1.0), [ROWS, WIDTH], DType::BF16);
    lane.copy(&other, &work.x).unwrap();
    work.run(&lane).unwrap();
    let eager_of_other = work.results(&lane);
    assert_ne!(eager_of_other, eager);
    work.spoil(&lane);
    graph.replay().unwrap();
    assert_eq!(work.results(&lane), eager_of_other);
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_graph_keeps_its_memory() {
    let lane = gpu().fork().unwrap();
    let work = Work::new(&lane);
    work.run(&lane).unwrap();
    let eager = work.results(&lane);
    let before = lane.memory();
    let (graph, ()) = lane.capture(&[], || work.run(&lane)).unwrap();
    assert_eq!(lane.memory(), before, "a capture allocates from the graph's own pool");
    let memory = graph.memory();
    assert!(memory.used == 0 && memory.reserved > 0, "{memory:?}");
    // Three tensors of one size, of which two live at a time, and the partial sums.
    assert_eq!(memory.driver_allocations, 3, "{memory:?}");

    // What is allocated now is not the graph's: its values survive a replay, and the replay its writes.
    let others: Vec<Tensor> = (0..8)
        .map(|i| {
            let t = lane.alloc([ROWS, WIDTH].into(), DType::BF16).unwrap();
            lane.fill(&t, f64::from(i)).unwrap();
            t
        })
        .collect();
    work.spoil(&lane);
    graph.replay().unwrap();
    assert_eq!(work.results(&lane), eager);
    for (i, t) in others.iter().enumerate() {
        let right = Tensor::host(*t.shape(), DType::BF16);
        Cpu.fill(&right, i as f64).unwrap();
        assert_eq!(bytes(&download(&lane, t)), bytes(&right), "tensor {i} was written by the graph");
    }

    // A tensor that the capture returns is valid until the graph replays again, and outlives the graph.
    let (graph, kept) = lane
        .capture(&[], || {
            let out = lane.alloc([ROWS, WIDTH].into(), DType::BF16)?;
            lane.axpby(2.0, &work.x, 0.0, &out)?;
            Ok(out)
        })
        .unwrap();
    graph.replay().unwrap();
    drop(graph);
    let twice = lane.alloc([ROWS, WIDTH].into(), DType::BF16).unwrap();
    lane.axpby(2.0, &work.x, 0.0, &twice).unwrap();
    assert_eq!(bytes(&download(&lane, &kept)), bytes(&download(&lane, &twice)));
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_capture_that_fails_leaves_the_lane_as_it_was() {
    let lane = gpu().fork().unwrap();
    let work = Work::new(&lane);
    work.run(&lane).unwrap();
    let eager = work.results(&lane);
    let before = lane.memory();

    // A wait for the GPU cannot be captured.
    let error = lane.capture(&[], || lane.synchronize()).unwrap_err().to_string();
    assert!(error.contains("waiting for the GPU"), "{error}");
    // An error of the work's own.
    let error = lane.capture(&[], || lane.softmax(&work.x, &work.x)).unwrap_err().to_string();
    assert!(error.contains("shares memory"), "{error}");
    // A panic.
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = lane.capture(&[], || -> Result<()> { panic!("in the middle") });
    }));
    assert!(panic.is_err());

    assert_eq!(lane.memory(), before);
    work.spoil(&lane);
    work.run(&lane).unwrap();
    assert_eq!(work.results(&lane), eager);
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_graph_of_two_lanes() {
    let lane = gpu().fork().unwrap();
    let side = lane.fork().unwrap();
    let work = Work::new(&lane);
    let out = lane.alloc([ROWS, WIDTH].into(), DType::BF16).unwrap();
    let both = || {
        // The side lane doubles x while this one works; then both results are added.
        side.wait(&lane.mark(false)?)?;
        let double = side.alloc([ROWS, WIDTH].into(), DType::BF16)?;
        side.axpby(2.0, &work.x, 0.0, &double)?;
        let joined = side.mark(false)?;
        work.run(&lane)?;
        lane.wait(&joined)?;
        lane.add(&work.y, &double, &out)?;
        // The side lane must not use the block again before this one has read it.
        side.wait(&lane.mark(false)?)?;
        drop(double);
        lane.wait(&side.mark(false)?)
    };
    both().unwrap();
    let eager = bytes(&download(&lane, &out));
    side.synchronize().unwrap();
    lane.fill(&out, f64::NAN).unwrap();
    let before = [lane.memory(), side.memory()];
    let (graph, ()) = lane.capture(&[&side], both).unwrap();
    assert_eq!([lane.memory(), side.memory()], before);
    graph.replay().unwrap();
    assert_eq!(bytes(&download(&lane, &out)), eager);

    // A lane that is not joined again is an error.
    let error = lane
        .capture(&[&side], || {
            side.wait(&lane.mark(false)?)?;
            side.fill(&out, 0.0)
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("must be joined"), "{error}");
    work.run(&lane).unwrap();
    side.fill(&out, 1.0).unwrap();
    side.synchronize().unwrap();
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_events_order_lanes_and_measure_time() {
    let lane = gpu().fork().unwrap();
    let side = lane.fork().unwrap();
    let n = 2048;
    let a = upload(&lane, &vec![1.0; n * n], [n, n], DType::F32);
    let c = lane.alloc([n, n].into(), DType::F32).unwrap();
    let seen = lane.alloc([n, n].into(), DType::F32).unwrap();
    lane.gemm(1.0, &a, &a, 0.0, &c).unwrap();
    lane.synchronize().unwrap();
    for round in 1..=5 {
        let start = lane.mark(true).unwrap();
        lane.fill(&c, 0.0).unwrap();
        (0..round).for_each(|_| lane.gemm(1.0, &a, &a, 1.0, &c).unwrap());
        let (end, edge) = (lane.mark(true).unwrap(), lane.mark(false).unwrap());
        side.wait(&edge).unwrap();
        side.copy(&c, &seen).unwrap();
        side.synchronize().unwrap();
        assert!(edge.is_done().unwrap() && end.is_done().unwrap());
        let got = download(&side, &seen).to_vec::<f32>().unwrap();
        assert!(got.iter().all(|v| *v == (round * n) as f32), "round {round}: the copy did not wait for the products");
        let ms = start.elapsed_ms(&end).unwrap();
        assert!(ms > 0.0 && ms < 1000.0, "{ms} ms");
        assert!(start.elapsed_ms(&edge).is_err(), "an edge measures no time");
    }
}
