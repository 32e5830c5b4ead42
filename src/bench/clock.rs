//! The device under test, its clock, and how pieces of work are timed beside each other.

use super::{Image, Spread};
use crate::device::Lane;
use crate::error::{Result, config_err};
use crate::tensor::{DType, Place, Tensor};
use std::time::{Duration, Instant};

/// A captured piece of work that can be run again.
pub type Replay = Box<dyn FnMut() -> Result<()>>;

/// Measures what is issued on one lane.
pub trait Clock {
    /// Marks the beginning of a time, in the lane's order.
    ///
    /// # Errors
    /// If the device fails.
    fn start(&mut self) -> Result<()>;

    /// Marks its end.
    ///
    /// # Errors
    /// If the device fails.
    fn stop(&mut self) -> Result<()>;

    /// Milliseconds between each start and its stop since the last call; waits for them.
    ///
    /// # Errors
    /// If the device fails, or failed in between.
    fn read(&mut self) -> Result<Vec<f64>>;

    /// Captures what `work` issues, to be replayed at once; none where the device has no such thing.
    ///
    /// # Errors
    /// If the work cannot be captured: it waits for the device, for instance.
    fn capture(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Replay>>;

    /// The lane's memory; none where it is not counted.
    fn memory(&self) -> Option<Memory>;

    /// Starts [`Memory::peak`] anew.
    fn reset_peak(&mut self);

    /// Gives memory that no tensor has back to the device.
    fn release_unused(&mut self) {}

    /// The GPU's compute capability, which kernels are compiled for; none on the CPU.
    fn architecture(&self) -> Option<(u32, u32)> {
        None
    }

    /// The same queue with the entry points of `image` in the place of this crate's of the same name.
    ///
    /// # Errors
    /// If the device does not load the image; on the CPU always.
    fn with_kernels(&self, image: &Image) -> Result<Theirs> {
        config_err!("{}: to check and time a kernel takes a GPU, and this is the CPU", image.name)
    }
}

/// A lane with somebody's kernels in it.
pub struct Theirs {
    /// Where the kernels came from.
    pub name: String,
    /// The lane; its queue and memory are those of the lane it was made from.
    pub lane: Lane,
    /// The entry points asked for since the last call of it, and whether they were somebody's.
    pub asked: Box<dyn Fn() -> Vec<(String, bool)>>,
}

/// Bytes in a lane's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Now.
    pub used: usize,
    /// At most at one time since [`Clock::reset_peak`].
    pub peak: usize,
}

/// The wall clock, for lanes that run an operation before its call returns.
#[derive(Debug, Default)]
pub struct HostClock {
    started: Option<Instant>,
    times: Vec<f64>,
}

impl Clock for HostClock {
    fn start(&mut self) -> Result<()> {
        self.started = Some(Instant::now());
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        if let Some(started) = self.started.take() {
            self.times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<f64>> {
        Ok(std::mem::take(&mut self.times))
    }

    fn capture(&mut self, _work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Replay>> {
        Ok(None)
    }

    fn memory(&self) -> Option<Memory> {
        None
    }

    fn reset_peak(&mut self) {}
}

/// A piece of work to be timed.
pub struct Work<'a> {
    prepare: Box<dyn FnMut(usize) -> Result<()> + 'a>,
    run: Box<dyn FnMut() -> Result<()> + 'a>,
}

impl<'a> Work<'a> {
    /// Work that needs no preparation.
    pub fn new(run: impl FnMut() -> Result<()> + 'a) -> Self {
        Work { prepare: Box::new(|_| Ok(())), run: Box::new(run) }
    }

    /// The same with something that is done before each time and not counted; it is given the round's number.
    pub fn prepared(self, prepare: impl FnMut(usize) -> Result<()> + 'a) -> Self {
        Work { prepare: Box::new(prepare), ..self }
    }
}

/// The last level of cache is overwritten by this many bytes: several times what a GPU has, and about what a CPU has.
const GPU_FLUSH: usize = 256 << 20;
const CPU_FLUSH: usize = 32 << 20;

/// Runs before anything is counted: memory is taken, code is loaded, libraries have chosen their algorithms.
const WARM_UP: usize = 3;
/// Fewer times than this have no percentiles worth telling.
const FEWEST: usize = 7;
/// More add nothing.
const MOST: usize = 500;

/// A device under test: a lane and its clock.
pub struct Bench {
    lane: Lane,
    clock: Box<dyn Clock>,
    device: String,
    flush: Tensor,
    budget: Duration,
}

impl Bench {
    /// The host's processor.
    ///
    /// # Errors
    /// None; devices have them.
    pub fn cpu() -> Result<Self> {
        let lane = Lane::cpu();
        let name = lane.name()?;
        Self::new(lane, Box::<HostClock>::default(), name)
    }

    /// The device of this place.
    ///
    /// # Errors
    /// If there is no such device, or it cannot be used.
    pub fn open(place: Place) -> Result<Self> {
        match place {
            Place::Cpu => Self::cpu(),
            Place::Cuda(ordinal) => super::gpu::open(ordinal),
        }
    }

    /// Any lane, with a clock for it and the device's name.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(lane: Lane, clock: Box<dyn Clock>, device: String) -> Result<Self> {
        let bytes = if lane.place() == Place::Cpu { CPU_FLUSH } else { GPU_FLUSH };
        let flush = lane.zeros([bytes / 4], DType::F32)?;
        Ok(Bench { lane, clock, device, flush, budget: Duration::from_millis(300) })
    }

    /// Measures for about this long, between 7 and 500 times. By default 300 ms.
    pub fn set_budget(&mut self, budget: Duration) {
        self.budget = budget;
    }

    /// Where work is issued.
    pub fn lane(&self) -> &Lane {
        &self.lane
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether this is the host's processor, whose benchmarks take smaller shapes.
    pub fn is_cpu(&self) -> bool {
        self.lane.place() == Place::Cpu
    }

    /// The lane's memory; none where it is not counted.
    pub fn memory(&self) -> Option<Memory> {
        self.clock.memory()
    }

    /// The most bytes that `work` has in tensors at one time, those that were there before included; none where memory
    /// is not counted.
    ///
    /// # Errors
    /// The work's.
    pub fn peak(&mut self, work: impl FnOnce() -> Result<()>) -> Result<Option<usize>> {
        self.clock.reset_peak();
        work()?;
        Ok(self.clock.memory().map(|memory| memory.peak))
    }

    /// Gives memory that no tensor has back to the device: between shapes, whose tensors have different sizes.
    pub fn release_unused(&mut self) {
        self.clock.release_unused();
    }

    /// The compute capability that kernels for this device are compiled for; on the CPU Hopper's, so that a source can be
    /// tried out.
    pub fn architecture(&self) -> (u32, u32) {
        self.clock.architecture().unwrap_or((9, 0))
    }

    /// The same lane with the entry points of `image` in the place of this crate's.
    ///
    /// # Errors
    /// On the CPU, and if the device does not load the image.
    pub fn with_kernels(&self, image: &Image) -> Result<Theirs> {
        self.clock.with_kernels(image)
    }

    /// Captures what `work` issues; none on the CPU.
    ///
    /// # Errors
    /// If the work cannot be captured.
    pub fn capture(&mut self, mut work: impl FnMut() -> Result<()>) -> Result<Option<Replay>> {
        for _ in 0..WARM_UP {
            work()?;
        }
        self.clock.capture(&mut work)
    }

    /// Times pieces of work in turn, round after round.
    ///
    /// # Errors
    /// The first failure of any work or of the device.
    pub fn time(&mut self, works: &mut [Work<'_>]) -> Result<Vec<Spread>> {
        for round in 0..WARM_UP {
            for work in works.iter_mut() {
                (work.prepare)(round)?;
                (work.run)()?;
            }
        }
        // What a round takes, with everything around the times, says how many there are time for.
        self.clock.read()?;
        let begun = Instant::now();
        self.round(works, 0)?;
        self.clock.read()?;
        let round = begun.elapsed().as_secs_f64();
        let rounds = (self.budget.as_secs_f64() / round.max(1e-9)) as usize;
        let rounds = rounds.clamp(FEWEST, MOST);
        for n in 0..rounds {
            self.round(works, n)?;
        }
        let times = self.clock.read()?;
        Ok((0..works.len()).map(|w| Spread::of(times.iter().skip(w).step_by(works.len()).copied().collect())).collect())
    }

    fn round(&mut self, works: &mut [Work<'_>], n: usize) -> Result<()> {
        for work in works {
            (work.prepare)(n)?;
            self.lane.fill(&self.flush, 0.0)?;
            self.clock.start()?;
            (work.run)()?;
            self.clock.stop()?;
        }
        Ok(())
    }

    /// The time of `repeats` runs of `work`, the cache overwritten before each: what Criterion's `iter_custom` asks for.
    ///
    /// # Errors
    /// The work's, or the device's.
    pub fn total(&mut self, repeats: u64, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.clock.read()?;
        for _ in 0..repeats {
            self.lane.fill(&self.flush, 0.0)?;
            self.clock.start()?;
            work()?;
            self.clock.stop()?;
        }
        Ok(Duration::from_secs_f64(self.clock.read()?.iter().sum::<f64>() / 1e3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn works_take_turns_and_are_told_apart() {
        let mut bench = Bench::cpu().unwrap();
        bench.set_budget(Duration::ZERO);
        let order = RefCell::new(Vec::new());
        let sleep = |ms| std::thread::sleep(Duration::from_millis(ms));
        let work = |name: char, ms| {
            let (order, prepared) = (&order, &order);
            Work::new(move || {
                order.borrow_mut().push(name);
                sleep(ms);
                Ok(())
            })
            .prepared(move |_| {
                prepared.borrow_mut().push('.');
                Ok(())
            })
        };
        let spreads = bench.time(&mut [work('a', 1), work('b', 6)]).unwrap();
        assert_eq!(order.borrow().iter().collect::<String>(), ".a.b".repeat(WARM_UP + 1 + FEWEST));
        assert_eq!(spreads[0].repeats, FEWEST);
        assert!(
            spreads[0].median_ms >= 1.0 && spreads[0].median_ms < 6.0 && spreads[1].median_ms >= 6.0,
            "{spreads:?}"
        );
        let total = bench.total(3, &mut || {
            sleep(2);
            Ok(())
        });
        assert!(total.unwrap() >= Duration::from_millis(6));
    }

    #[test]
    fn a_failure_is_the_works_own() {
        let mut bench = Bench::cpu().unwrap();
        let failing = Work::new(|| Err(crate::Error::Device("broken".into())));
        assert_eq!(bench.time(&mut [failing]).unwrap_err().to_string(), "broken");
        assert!(bench.capture(|| Ok(())).unwrap().is_none());
    }
}
