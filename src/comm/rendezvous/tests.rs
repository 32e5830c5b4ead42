use super::*;

/// A meeting at a port that was free a moment ago.
fn place(world: usize) -> Rendezvous {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let agree = vec![("ep".to_owned(), "2".to_owned())];
    Rendezvous { address, rank: 0, world, job: "j".to_owned(), timeout: Duration::from_secs(10), agree }
}

type Came = Result<(Vec<u8>, Arc<Control>)>;

/// What came of it on every rank, and the longest that it took.
fn all(ranks: Vec<Rendezvous>) -> (Vec<Came>, Duration) {
    let begin = Instant::now();
    let came = thread::scope(|scope| {
        let meet = |r: Rendezvous| scope.spawn(move || r.meet(|| Ok(vec![7, 0, 255])));
        let threads: Vec<_> = ranks.into_iter().map(meet).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    (came, begin.elapsed())
}

fn ranks(at: &Rendezvous, numbers: &[usize]) -> Vec<Rendezvous> {
    numbers.iter().map(|&rank| Rendezvous { rank, ..at.clone() }).collect()
}

/// Fails unless every rank was told what contains `parts`, soon.
fn refused(ranks: Vec<Rendezvous>, parts: &[&str]) {
    let (came, took) = all(ranks);
    for (i, result) in came.into_iter().enumerate() {
        let message = result.err().unwrap_or_else(|| panic!("{parts:?}: number {i} was let in")).to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message:?} does not name {parts:?}");
    }
    assert!(took < Duration::from_secs(6), "{parts:?}: {took:?}");
}

#[test]
fn all_get_what_the_first_has_in_whatever_order_they_come() {
    let at = place(4);
    let (came, _) = all(ranks(&at, &[3, 1, 0, 2]));
    for result in came {
        let (payload, control) = result.unwrap();
        assert_eq!(payload, [7, 0, 255]);
        assert_eq!(control.failure(), None);
        control.leave();
    }
    let (payload, control) = Rendezvous { world: 1, ..at }.meet(|| Ok(vec![1])).unwrap();
    assert_eq!((payload, control.failure()), (vec![1], None));
}

#[test]
fn ranks_that_do_not_fit_together_are_all_told_why() {
    let at = place(3);
    let mut differ = ranks(&at, &[0, 1, 2]);
    differ[2].agree[0].1 = "4".to_owned();
    refused(differ, &["rank 0 has 2 for ep", "rank 2 has 4"]);

    let mut more = ranks(&place(3), &[0, 1, 2]);
    more[1].agree.push(("seed".to_owned(), "5".to_owned()));
    refused(more, &["rank 0 has nothing for seed", "rank 1 has 5"]);

    refused(ranks(&place(3), &[0, 1, 1]), &["rank 1 comes twice", &std::process::id().to_string()]);

    let at = place(2);
    let mut worlds = ranks(&at, &[0, 1, 3]);
    worlds.iter_mut().skip(1).for_each(|r| r.world = 4);
    refused(worlds, &["one of 4 ranks", "rank 0 one of 2"]);
}

#[test]
fn who_never_comes_is_named_and_nobody_hangs() {
    let short = |at: Rendezvous| Rendezvous { timeout: Duration::from_millis(700), ..at };
    refused(ranks(&short(place(4)), &[0, 2]), &["rank 1, 3 of 4 did not come", "700ms"]);
    let at = short(place(2));
    let (came, took) = all(ranks(&at, &[1]));
    let message = came.into_iter().next().unwrap().err().unwrap().to_string();
    assert!(message.contains(&at.address) && message.contains("rank 0 did not listen"), "{message}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_port_that_is_taken_and_a_service_that_is_none_of_ours() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let at = Rendezvous { address: address.clone(), timeout: Duration::from_millis(200), ..place(2) };
    let message = at.meet(|| Ok(Vec::new())).err().unwrap().to_string();
    assert!(message.contains(&address) && message.contains("taken") && message.contains("--rendezvous"), "{message}");
    // It takes connections and says nothing.
    let message = Rendezvous { rank: 1, ..at }.meet(|| Ok(Vec::new())).err().unwrap().to_string();
    assert!(message.contains("no answer"), "{message}");
}

#[test]
fn strangers_and_other_jobs_keep_nobody_out() {
    let at = place(2);
    let begin = Instant::now();
    thread::scope(|scope| {
        let first = scope.spawn(|| at.meet(|| Ok(vec![1])).map(|(payload, _)| payload));
        // One says nothing, one speaks otherwise.
        let silent = loop {
            match TcpStream::connect(&at.address) {
                Ok(stream) => break stream,
                Err(_) => thread::sleep(POLL),
            }
        };
        TcpStream::connect(&at.address).unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let other = Rendezvous { rank: 1, job: "another".to_owned(), ..at.clone() };
        let message = other.meet(|| Ok(Vec::new())).err().unwrap().to_string();
        assert!(message.contains("\"another\"") && message.contains("\"j\""), "{message}");
        let second = Rendezvous { rank: 1, ..at.clone() }.meet(|| Ok(Vec::new())).unwrap();
        assert_eq!((second.0, first.join().unwrap().unwrap()), (vec![1], vec![1]));
        drop(silent);
    });
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn all_hear_of_a_failure_and_of_one_who_goes_without_a_word() {
    let soon = Duration::from_secs(5);
    let lines = |at: &Rendezvous| -> Vec<Arc<Control>> {
        all(ranks(at, &[0, 1, 2])).0.into_iter().map(|r| r.unwrap().1).collect()
    };
    let controls = lines(&place(3));
    controls[2].fail("rank 2 failed: no memory");
    for control in &controls {
        assert_eq!(control.failure_within(soon).as_deref(), Some("rank 2 failed: no memory"));
    }
    for gone in [1, 0] {
        let mut controls = lines(&place(3));
        drop(controls.remove(gone));
        for control in &controls {
            assert_eq!(control.failure_within(soon), Some(format!("rank {gone} has gone without a word")));
        }
    }
    // One who leaves in good order is not missed.
    let mut controls = lines(&place(3));
    let first = controls.remove(0);
    controls.iter().for_each(|control| control.leave());
    drop(controls);
    assert_eq!(first.failure_within(Duration::from_millis(300)), None);
}
