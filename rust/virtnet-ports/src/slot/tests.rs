use std::thread;
use std::time::Instant;

use virtnet_sys::{Events, Poller};

use super::*;

const SHORT: Duration = Duration::from_millis(20);

#[test]
fn parked_data_is_reached_at_once_on_the_callers_thread() {
    let slot = Slot::new(1).unwrap();
    let here = thread::current().id();
    let (value, there) = slot
        .run(|data| {
            *data += 1;
            (*data, thread::current().id())
        })
        .unwrap();
    assert_eq!((value, there), (2, here));
}

#[test]
fn held_data_is_reached_on_the_holders_thread() {
    let slot = Slot::new(String::from("a")).unwrap();
    let mut held = slot.take().unwrap();
    let caller = thread::spawn({
        let slot = Arc::clone(&slot);
        move || {
            slot.run(|data| {
                data.push('b');
                thread::current().id()
            })
        }
    });
    while !held.sync() {
        thread::yield_now();
    }
    assert_eq!(caller.join().unwrap().unwrap(), thread::current().id());
    assert_eq!(*held, "ab");
    assert!(!held.sync());
}

#[test]
fn a_sleeping_holder_is_woken_once_for_many_closures() {
    let slot = Slot::new(0).unwrap();
    let poller = Poller::new().unwrap();
    poller.add(&*slot, 5).unwrap();
    let mut held = slot.take().unwrap();
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let slot = Arc::clone(&slot);
            thread::spawn(move || slot.run(|data| *data += 1))
        })
        .collect();
    let mut events = Events::with_capacity(4);
    while *held < 4 {
        assert_eq!(poller.wait(&mut events, Some(DEADLINE)).unwrap(), 1);
        held.sync();
    }
    for caller in callers {
        caller.join().unwrap().unwrap();
    }
    // Nothing is left that would wake the holder again.
    assert_eq!(poller.wait(&mut events, Some(Duration::ZERO)).unwrap(), 0);
}

#[test]
fn what_is_posted_runs_without_anyone_waiting() {
    let slot = Slot::new(0).unwrap();
    slot.post(|data| *data += 1).unwrap();
    let mut held = slot.take().unwrap();
    slot.post(|data| *data += 1).unwrap();
    assert_eq!(*held, 1);
    assert!(held.sync());
    assert_eq!(*held, 2);
}

#[test]
fn only_one_holder_at_a_time() {
    let slot = Slot::new(()).unwrap();
    let held = slot.take().unwrap();
    assert!(slot.take().is_none());
    held.put_back();
    assert!(slot.take().is_some());
}

#[test]
fn a_holder_that_does_not_look_costs_the_deadline_and_the_closure_never_runs() {
    let slot = Slot::new(0).unwrap();
    let mut held = slot.take().unwrap();
    let start = Instant::now();
    let error = slot.run_within(SHORT, |data| *data += 1).unwrap_err();
    assert_eq!(error, SlotError::Late { waited: SHORT });
    assert!(start.elapsed() >= SHORT);
    // The bell still has to be quieted, but nothing runs.
    assert!(!held.sync());
    assert!(!held.has_pending());
    assert_eq!(*held, 0);
}

#[test]
fn a_closure_that_has_begun_is_waited_for_longer() {
    let slot = Slot::new(0).unwrap();
    let mut held = slot.take().unwrap();
    let caller = thread::spawn({
        let slot = Arc::clone(&slot);
        move || {
            slot.run_within(Duration::from_millis(100), |_| {
                thread::sleep(Duration::from_millis(130));
                7
            })
        }
    });
    while !held.sync() {
        thread::yield_now();
    }
    assert_eq!(caller.join().unwrap(), Ok(7));
}

#[test]
fn a_panicking_closure_is_an_error_for_its_sender_and_the_holder_goes_on() {
    let slot = Slot::new(0).unwrap();
    let error = slot.run(|_| panic!("parked")).unwrap_err();
    assert!(error.to_string().contains("parked"), "{error}");

    let mut held = slot.take().unwrap();
    let caller = thread::spawn({
        let slot = Arc::clone(&slot);
        move || slot.run(|data| panic!("held {data}"))
    });
    while !held.sync() {
        thread::yield_now();
    }
    let error = caller.join().unwrap().unwrap_err();
    let message = "held 0".to_owned();
    assert_eq!(error, SlotError::Panicked { message });
    drop(held);
    assert_eq!(slot.run(|data| *data), Ok(0));
}

#[test]
fn a_panicking_holder_loses_the_data_and_tells_everyone() {
    let slot = Slot::new(0).unwrap();
    let held = slot.take().unwrap();
    let caller = thread::spawn({
        let slot = Arc::clone(&slot);
        move || slot.run(|data| *data)
    });
    while !held.has_pending() {
        thread::yield_now();
    }
    thread::spawn(move || {
        let _held = held;
        panic!("the worker breaks");
    })
    .join()
    .unwrap_err();
    assert_eq!(caller.join().unwrap(), Err(SlotError::Lost));
    assert_eq!(slot.run(|data| *data), Err(SlotError::Lost));
    assert!(slot.take().is_none());
}

#[test]
fn what_is_queued_runs_when_the_data_is_put_back() {
    let slot = Slot::new(0).unwrap();
    let held = slot.take().unwrap();
    let caller = thread::spawn({
        let slot = Arc::clone(&slot);
        move || {
            slot.run(|data| {
                *data += 1;
                *data
            })
        }
    });
    while !held.has_pending() {
        thread::yield_now();
    }
    drop(held);
    assert_eq!(caller.join().unwrap(), Ok(1));
    assert_eq!(slot.run(|data| *data), Ok(1));
}

/// Owners come and go while callers call: every closure runs exactly once, in whatever place it met the data.
#[test]
fn taking_and_putting_back_races_with_running_and_nothing_is_lost() {
    const CALLS: u64 = 2_000;
    let slot = Slot::new(0u64).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let owners: Vec<_> = (0..2)
        .map(|owner: u32| {
            let (slot, done) = (Arc::clone(&slot), Arc::clone(&done));
            thread::spawn(move || {
                let mut turns = 0u32;
                while !done.load(Ordering::Relaxed) {
                    if let Some(mut held) = slot.take() {
                        for _ in 0..turns % 4 + owner {
                            held.sync();
                        }
                    }
                    turns = turns.wrapping_add(1);
                    if turns.is_multiple_of(8) {
                        thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let callers: Vec<_> = (0..3)
        .map(|_| {
            let slot = Arc::clone(&slot);
            thread::spawn(move || {
                for _ in 0..CALLS {
                    slot.run_within(DEADLINE * 10, |data| *data += 1).unwrap();
                }
            })
        })
        .collect();
    for caller in callers {
        caller.join().unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for owner in owners {
        owner.join().unwrap();
    }
    assert_eq!(slot.run(|data| *data), Ok(3 * CALLS));
    assert!(!slot.pending.load(Ordering::Relaxed));
    assert!(!slot.bell.drain());
}

/// Callers that give up race with a slow holder: a closure that was reported late has not run and never will.
#[test]
fn a_late_answer_is_never_a_silent_change() {
    let slot = Slot::new(0u32).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let owner = thread::spawn({
        let (slot, done) = (Arc::clone(&slot), Arc::clone(&done));
        move || {
            let mut held = slot.take().unwrap();
            while !done.load(Ordering::Relaxed) {
                held.sync();
                thread::sleep(Duration::from_micros(300));
            }
        }
    });
    let mut ran = 0;
    for _ in 0..300 {
        match slot.run_within(Duration::from_micros(200), |data| *data += 1) {
            Ok(()) => ran += 1,
            Err(SlotError::Late { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    done.store(true, Ordering::Relaxed);
    owner.join().unwrap();
    assert_eq!(slot.run(|data| *data), Ok(ran));
}
