//! Where the processes of a run meet: rank 0 listens, the others come, all are compared, and what rank 0 has for them is
//! handed out. The connections stay, so that every rank hears when another has failed or gone.

use super::list;
use crate::error::{Error, Result, config_err};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Who comes to a meeting, and where it is.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    /// HOST:PORT of rank 0.
    pub address: String,
    /// This process's rank.
    pub rank: usize,
    /// P.
    pub world: usize,
    /// What tells this run from others that might meet in the same place.
    pub job: String,
    /// How long ranks wait for each other.
    pub timeout: Duration,
    /// What has to be the same on all ranks, by name.
    pub agree: Vec<(String, String)>,
}

/// How long between looks at something that nothing tells of.
const POLL: Duration = Duration::from_millis(20);
/// How long rank 0 stays after a meeting has failed, to tell those who come late why.
const LINGER: Duration = Duration::from_secs(2);
/// The longest line that is read: settings, of which there are some dozens.
const LONGEST: u64 = 1 << 20;
/// What a process of ours says first.
const MAGIC: &str = concat!("fsmoe ", env!("CARGO_PKG_VERSION"));

/// A line of what ranks say to each other.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Hello { magic: String, job: String, rank: usize, world: usize, pid: u32, agree: Vec<(String, String)> },
    Welcome { payload: Vec<u8> },
    Refused { reason: String },
    Failed { reason: String },
    Bye,
}

fn send(mut to: &TcpStream, message: &Message) -> std::io::Result<()> {
    let mut line = serde_json::to_string(message).map_err(std::io::Error::other)?;
    line.push('\n');
    to.write_all(line.as_bytes())
}

/// The next message; none where the other has closed.
fn receive(from: &mut impl BufRead) -> std::io::Result<Option<Message>> {
    let mut line = String::new();
    match from.take(LONGEST).read_line(&mut line)? {
        0 => Ok(None),
        _ => serde_json::from_str(&line).map(Some).map_err(std::io::Error::other),
    }
}

/// Somebody who has come.
struct Guest {
    stream: TcpStream,
    rank: usize,
    pid: u32,
}

impl Rendezvous {
    /// Waits until all ranks have come, and returns what `payload` is on rank 0, and the line to the others.
    ///
    /// # Errors
    /// If a rank does not come in time, comes twice, is of a world of another size, or differs in what ranks have to agree
    /// in; if the address is taken or nobody listens there. Every rank that has come is told why.
    pub fn meet(&self, payload: impl FnOnce() -> Result<Vec<u8>>) -> Result<(Vec<u8>, Arc<Control>)> {
        if self.rank >= self.world {
            config_err!("rank {} of {}: ranks count from 0", self.rank, self.world);
        }
        if self.world == 1 {
            return Ok((payload()?, Control::new(0, Vec::new())?));
        }
        if self.rank == 0 { self.host(payload) } else { self.join() }
    }

    fn host(&self, payload: impl FnOnce() -> Result<Vec<u8>>) -> Result<(Vec<u8>, Arc<Control>)> {
        let deadline = Instant::now() + self.timeout;
        let listener = self.listen()?;
        let (door, comers) = mpsc::channel();
        let closed = Arc::new(AtomicBool::new(false));
        let porter = thread::Builder::new().name("rendezvous".to_owned()).spawn({
            let closed = closed.clone();
            move || admit(&listener, &door, &closed)
        });
        let porter = porter.map_err(|e| Error::Comm(format!("no thread for the rendezvous: {e}")))?;
        let mut guests: Vec<Guest> = Vec::new();
        let all = self.gather(&comers, deadline, &mut guests).and_then(|()| payload());
        if let Err(e) = &all {
            let refusal = Message::Refused { reason: e.to_string() };
            let end = Instant::now() + LINGER;
            guests.iter().for_each(|guest| drop(send(&guest.stream, &refusal)));
            while let Ok((stream, _)) = comers.recv_timeout(end.saturating_duration_since(Instant::now())) {
                drop(send(&stream, &refusal));
            }
        }
        closed.store(true, Ordering::Release);
        drop(porter.join());
        let payload = all?;
        for guest in &guests {
            let welcome = Message::Welcome { payload: payload.clone() };
            send(&guest.stream, &welcome)
                .map_err(|e| Error::Comm(format!("rank {} has gone while ranks met: {e}", guest.rank)))?;
        }
        Ok((payload, Control::new(0, guests.into_iter().map(|g| (g.rank, g.stream)).collect())?))
    }

    fn listen(&self) -> Result<TcpListener> {
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::AddrInUse => Error::Comm(format!(
                "rendezvous at {}: the port is taken; another run may be using it: --rendezvous HOST:PORT names another",
                self.address
            )),
            _ => Error::Comm(format!("rendezvous at {}: {e}", self.address)),
        };
        let addresses: Vec<_> = self.address.to_socket_addrs().map_err(failed)?.collect();
        let bound = TcpListener::bind(&addresses[..]).or_else(|e| match (e.kind(), addresses.first()) {
            // The host's name as others see it may be of no interface of its own.
            (ErrorKind::AddrNotAvailable, Some(address)) => TcpListener::bind(("0.0.0.0", address.port())),
            _ => Err(e),
        });
        bound.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)).map_err(failed)
    }

    /// Waits for all others.
    fn gather(
        &self,
        comers: &mpsc::Receiver<(TcpStream, Message)>,
        deadline: Instant,
        guests: &mut Vec<Guest>,
    ) -> Result<()> {
        while guests.len() + 1 < self.world {
            let Ok((stream, message)) = comers.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                let absent = list((1..self.world).filter(|rank| guests.iter().all(|g| g.rank != *rank)));
                return Err(Error::Comm(format!(
                    "rank {absent} of {} did not come to {} within {:?}",
                    self.world, self.address, self.timeout
                )));
            };
            let Message::Hello { magic, job, rank, world, pid, agree } = message else { continue };
            if magic != MAGIC || job != self.job {
                let reason = format!(
                    "at {} meet ranks of {MAGIC}, job {:?}, and not of {magic}, job {job:?}: --rendezvous HOST:PORT \
                     names another place",
                    self.address, self.job
                );
                drop(send(&stream, &Message::Refused { reason }));
                continue;
            }
            let twin = guests.iter().find(|g| g.rank == rank).map(|g| g.pid);
            guests.push(Guest { stream, rank, pid });
            if world != self.world {
                config_err!("rank {rank} is one of {world} ranks, rank 0 one of {}: all are of one world", self.world);
            }
            if rank == 0 || rank >= self.world {
                config_err!("process {pid} comes as rank {rank} of {}: ranks 1 to {} come", world, world - 1);
            }
            if let Some(twin) = twin {
                config_err!("rank {rank} comes twice, as processes {twin} and {pid}: every rank is one process");
            }
            self.compare(rank, &agree)?;
        }
        Ok(())
    }

    fn compare(&self, rank: usize, theirs: &[(String, String)]) -> Result<()> {
        let value = |all: &[(String, String)], name: &str| {
            all.iter().find(|(n, _)| n == name).map_or_else(|| "nothing".to_owned(), |(_, value)| value.clone())
        };
        for (name, _) in self.agree.iter().chain(theirs) {
            let (ours, theirs) = (value(&self.agree, name), value(theirs, name));
            if ours != theirs {
                config_err!("rank 0 has {ours} for {name}, rank {rank} has {theirs}: all ranks have the same");
            }
        }
        Ok(())
    }

    fn join(&self) -> Result<(Vec<u8>, Arc<Control>)> {
        let deadline = Instant::now() + self.timeout;
        let stream = self.connect(deadline)?;
        let failed =
            |e: std::io::Error| Error::Comm(format!("rank {} at the rendezvous {}: {e}", self.rank, self.address));
        let hello = Message::Hello {
            magic: MAGIC.to_owned(),
            job: self.job.clone(),
            rank: self.rank,
            world: self.world,
            pid: std::process::id(),
            agree: self.agree.clone(),
        };
        send(&stream, &hello).map_err(failed)?;
        // Rank 0 has its own deadline, and says so when it has passed.
        let patience = deadline.saturating_duration_since(Instant::now()) + LINGER;
        stream.set_read_timeout(Some(patience)).map_err(failed)?;
        let mut reader = BufReader::new(&stream);
        let payload = match receive(&mut reader) {
            Ok(Some(Message::Welcome { payload })) => payload,
            Ok(Some(Message::Refused { reason })) => return Err(Error::Comm(reason)),
            Ok(Some(other)) => {
                return Err(failed(std::io::Error::other(format!("an answer of another kind: {other:?}"))));
            }
            Ok(None) => return Err(failed(std::io::Error::other("rank 0 has gone"))),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(failed(std::io::Error::other(format!("no answer within {:?}", self.timeout))));
            }
            Err(e) => return Err(failed(e)),
        };
        stream.set_read_timeout(None).map_err(failed)?;
        Ok((payload, Control::new(self.rank, vec![(0, stream)])?))
    }

    /// Rank 0 may not be there yet, nor its name.
    fn connect(&self, deadline: Instant) -> Result<TcpStream> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tried = self.address.to_socket_addrs().and_then(|addresses| {
                let mut last = std::io::Error::other("no address of this name");
                for address in addresses {
                    match TcpStream::connect_timeout(&address, left.clamp(POLL, LINGER)) {
                        Ok(stream) => return Ok(stream),
                        Err(e) => last = e,
                    }
                }
                Err(last)
            });
            match tried {
                Ok(stream) => return Ok(stream),
                Err(e) if left.is_zero() => {
                    return Err(Error::Comm(format!(
                        "rank {}: rank 0 did not listen at {} within {:?}: {e}",
                        self.rank, self.address, self.timeout
                    )));
                }
                Err(_) => thread::sleep(POLL.min(left)),
            }
        }
    }
}

/// Lets everybody in who says who he is. One who says nothing keeps nobody else waiting.
fn admit(listener: &TcpListener, door: &mpsc::Sender<(TcpStream, Message)>, closed: &AtomicBool) {
    while !closed.load(Ordering::Acquire) {
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(POLL);
            continue;
        };
        let door = door.clone();
        thread::spawn(move || {
            let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(LINGER)));
            // Whoever speaks otherwise is none of ours.
            if ready.is_ok()
                && let Ok(Some(message)) = receive(&mut BufReader::new(&stream))
                && stream.set_read_timeout(None).is_ok()
            {
                drop(door.send((stream, message)));
            }
        });
    }
}

/// One rank's line to the others, through rank 0: a word that it has failed, and word of who else has.
pub struct Control {
    rank: usize,
    lines: Vec<(usize, TcpStream)>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    failure: Option<String>,
    /// Ranks that have left in good order.
    left: Vec<usize>,
    /// This rank leaves: lines that close are no news.
    leaving: bool,
}

impl Control {
    fn new(rank: usize, lines: Vec<(usize, TcpStream)>) -> Result<Arc<Self>> {
        let control = Arc::new(Control { rank, lines, state: Mutex::default(), changed: Condvar::new() });
        for i in 0..control.lines.len() {
            let (peer, stream) = &control.lines[i];
            let failed = |e: std::io::Error| Error::Comm(format!("a line to rank {peer}: {e}"));
            let reader = BufReader::new(stream.try_clone().map_err(failed)?);
            let (weak, peer) = (Arc::downgrade(&control), *peer);
            let listen = move || listen(reader, peer, |word| weak.upgrade().is_some_and(|c| c.heard(peer, word)));
            thread::Builder::new().name(format!("line to rank {peer}")).spawn(listen).map_err(failed)?;
        }
        Ok(control)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is guarded is changed in single steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what a peer says, or that it has fallen silent; whether to go on listening.
    fn heard(&self, peer: usize, word: Option<Message>) -> bool {
        match word {
            Some(Message::Bye) => {
                self.lock().left.push(peer);
                false
            }
            Some(Message::Failed { reason }) => {
                self.learn(peer, reason);
                true
            }
            Some(_) => true,
            None => {
                self.learn(peer, format!("rank {peer} has gone without a word"));
                false
            }
        }
    }

    /// Keeps the first failure, and tells the others of it.
    fn learn(&self, from: usize, reason: String) {
        {
            let mut state = self.lock();
            if state.leaving || state.failure.is_some() {
                return;
            }
            state.failure = Some(reason.clone());
            self.changed.notify_all();
        }
        for (_, line) in self.lines.iter().filter(|(peer, _)| *peer != from) {
            // Who does not hear it has gone.
            drop(send(line, &Message::Failed { reason: reason.clone() }));
        }
    }

    /// Tells all others that this rank has failed.
    pub fn fail(&self, reason: &str) {
        self.learn(self.rank, reason.to_owned());
    }

    /// Why the run cannot go on, as far as has been heard: the first failure of any rank.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// [`Control::failure`], waiting for word of one for as long as this.
    pub fn failure_within(&self, time: Duration) -> Option<String> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, time, |state| state.failure.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.failure.clone()
    }

    /// Leaves in good order: what others do from here on is no concern of this rank.
    pub fn leave(&self) {
        if !std::mem::replace(&mut self.lock().leaving, true) {
            self.lines.iter().for_each(|(_, line)| drop(send(line, &Message::Bye)));
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Its readers end.
        for (_, line) in &self.lines {
            drop(line.shutdown(std::net::Shutdown::Both));
        }
    }
}

/// Hands on what comes, and at last that nothing comes any more.
fn listen(mut reader: BufReader<TcpStream>, peer: usize, heard: impl Fn(Option<Message>) -> bool) {
    loop {
        let word = receive(&mut reader).unwrap_or_else(|e| {
            tracing::debug!("the line to rank {peer}: {e}");
            None
        });
        if !heard(word) {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
