//! Drivers that kick, and are called, by messages.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use support::{Echo, Wiring, beside_others, breathe, burst_of, open_things, send_or_drop, until};
use virtnet_packet::Port;
use virtnet_ports::Control;
use virtnet_sys::{Events, Poller};
use virtnet_testkit::{TempDir, frame};
use virtnet_virtio::RingFormat;

use crate::support::PATIENCE;

fn wiring(format: RingFormat) -> Wiring {
    Wiring {
        format,
        in_band: true,
        ..Wiring::default()
    }
}

/// Sends a frame to whoever echoes, and sleeps until it is back.
#[track_caller]
fn round_trip(port: &mut dyn Port, frame: &[u8]) {
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 0).unwrap();
    assert_eq!(send_or_drop(port, &burst_of(&[frame.to_vec()])), 1);
    port.flush();
    let mut back = Vec::new();
    while back.is_empty() {
        back = breathe(port);
        if back.is_empty() && !port.arm() {
            let woken = poller.wait(&mut Events::with_capacity(1), Some(PATIENCE));
            assert_eq!(woken.unwrap(), 1, "nobody has called");
        }
        port.disarm();
    }
    assert_eq!(back, [frame]);
}

#[test]
fn u24_a_driver_without_events_kicks_and_is_called_by_messages() {
    let _gate = beside_others();
    for format in [RingFormat::Split, RingFormat::Packed] {
        for (swapped, queue_pairs, control) in [(false, 1, false), (true, 2, true)] {
            let mut pair = Wiring {
                swapped,
                queue_pairs,
                control,
                ..wiring(format)
            }
            .connect();
            if control {
                // It was agreed on by the control queue, whose kicks and calls are messages too.
                until("both pairs are in use", || {
                    pair.driver.status().unwrap().queue_pairs == 2
                });
            }
            let echo = Echo::start(pair.device);
            echo.assert_falls_asleep();
            pair.driver.attach();
            for n in 0..50 {
                // Whoever is to be woken sleeps now and then.
                if n % 10 == 0 {
                    echo.assert_falls_asleep();
                }
                round_trip(&mut pair.driver, &frame::pattern(200, n));
            }
            pair.driver.detach();
            drop(echo.stop());
        }
    }
}

#[test]
fn a_back_end_without_notifications_by_message_is_left_with_what_is_missing() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let device = Wiring::default().device(&path, &control);
    let driver = wiring(RingFormat::Split).driver(&path, &control);
    until("the driver says what is missing", || {
        let error = driver.status().unwrap().last_error.unwrap_or_default();
        error.contains("INBAND_NOTIFICATIONS") && error.contains("leave out in_band")
    });
    drop(device);
}

#[test]
fn a_driver_without_events_finds_the_next_back_end_and_leaves_nothing() {
    let _gate = support::alone();
    let mut things = None;
    for _ in 0..3 {
        let mut pair = wiring(RingFormat::Split).connect();
        let echo = Echo::start(pair.device);
        pair.driver.attach();
        round_trip(&mut pair.driver, &frame::pattern(100, 1));
        pair.driver.detach();
        drop(echo.stop());
        until("it is gone", || {
            pair.driver.status().unwrap().state != "running"
        });
        let path = pair.directory.join("port.sock");
        let device = wiring(RingFormat::Split).device(&path, &pair.control);
        until("there is another", || {
            pair.driver.status().unwrap().state == "running"
        });
        let echo = Echo::start(device);
        pair.driver.attach();
        round_trip(&mut pair.driver, &frame::pattern(100, 2));
        pair.driver.detach();
        drop((echo.stop(), pair.driver, pair.control, pair.directory));
        assert_eq!(*things.get_or_insert_with(open_things), open_things());
    }
}
