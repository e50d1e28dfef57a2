//! The state of a device, had and given by the driver at its other end.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use support::other_pipe::OtherPipe;
use support::{Pair, Wiring, beside_others, breathe, burst_of, open_things, send_or_drop, until};
use virtnet_packet::Port;
use virtnet_packet::header::Mac;
use virtnet_ports::{Control, PortError, What};
use virtnet_sys::{EventFd, Listener};
use virtnet_testkit::{TempDir, frame};
use virtnet_vhost::{
    Backend, BackendDevice, DeviceError, LogFile, Offer, ProtocolFeatures, Region, RingAddresses,
    RingSetup,
};
use virtnet_virtio::net::control::Command;
use virtnet_virtio::{Features, RingFormat};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

fn wiring(format: RingFormat, in_band: bool) -> Wiring {
    Wiring {
        format,
        control: true,
        in_band,
        ..Wiring::default()
    }
}

fn mac(pair: &Pair) -> Option<[u8; 6]> {
    pair.device.status().unwrap().config.unwrap().mac
}

fn announcements(pair: &Pair) -> usize {
    let (events, _) = pair.driver.watch().events().since(0);
    let announced = events.iter().filter(|event| event.what == What::Announce);
    announced.count()
}

#[test]
fn u26_a_driver_takes_the_state_of_its_device_to_another_one_and_loses_nothing() {
    let _gate = beside_others();
    for format in [RingFormat::Split, RingFormat::Packed] {
        for in_band in [false, true] {
            let (mut from, to) = (
                wiring(format, in_band).connect(),
                wiring(format, in_band).connect(),
            );
            from.driver.watch().command(Command::SetMac(MAC)).unwrap();
            // Something is in the rings meanwhile, in both directions.
            let frames: Vec<_> = (0..10).map(|n| frame::pattern(100, n)).collect();
            from.driver.attach();
            from.device.attach();
            assert_eq!(send_or_drop(&mut from.driver, &burst_of(&frames)), 10);
            from.driver.flush();
            assert_eq!(send_or_drop(&mut from.device, &burst_of(&frames)), 10);
            from.device.flush();
            from.driver.detach();
            from.device.detach();
            let state = from.driver.watch().transfer_state(None).unwrap();
            assert!(state.starts_with(b"vnst"), "{state:?}");
            assert_eq!(from.driver.watch().transfer_state(None).unwrap(), state);
            from.driver.attach();
            from.device.attach();
            until("what the driver sent arrives", || {
                let came = breathe(&mut from.device);
                assert!(came.is_empty() || came == frames, "not as it was sent");
                !came.is_empty()
            });
            assert!(breathe(&mut from.driver) == frames);

            assert_ne!(mac(&to), Some(MAC.0));
            let loaded = to.driver.watch().transfer_state(Some(state.clone()));
            assert_eq!(loaded.unwrap(), [0_u8; 0]);
            assert_eq!(mac(&to), Some(MAC.0));
            // The network here does not know the guest yet: the driver hears of it, once, and the device knows that it has.
            until("the device knows that it is announced", || {
                announcements(&to) == 1 && !to.device.status().unwrap().config.unwrap().announce
            });
            assert_eq!(announcements(&from), 0);

            // What is none is refused, and changes nothing.
            for wrong in [b"nonsense".to_vec(), vec![1; 10_000]] {
                let error = to.driver.watch().transfer_state(Some(wrong)).unwrap_err();
                assert!(
                    matches!(error, PortError::TransferRefused { .. }),
                    "{error}"
                );
            }
            let error = to.driver.watch().transfer_state(Some(vec![0; 65_537]));
            assert!(error.unwrap_err().to_string().contains("65536"));
            assert_eq!(to.driver.watch().transfer_state(None).unwrap(), state);
            to.wait_until_running();
        }
    }
}

#[test]
fn u26_a_back_end_with_a_pipe_of_its_own_gives_and_takes_the_state_through_that() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let wiring = wiring(RingFormat::Split, false);
    let pair = |name: &str| {
        let (back_end, path) = (
            directory.join(name),
            directory.join(&format!("{name}-between")),
        );
        let device = wiring.device(&back_end, &control);
        let between = OtherPipe::start(&path, &back_end);
        let driver = wiring.driver(&path, &control);
        until("both run", || {
            let (device, driver) = (device.status().unwrap(), driver.status().unwrap());
            (device.state, driver.state) == ("running", "running")
        });
        (device, driver, between)
    };
    let (_device, from, between) = pair("from");
    from.watch().command(Command::SetMac(MAC)).unwrap();
    let state = from.watch().transfer_state(None).unwrap();
    assert!(state.starts_with(b"vnst"), "{state:?}");
    assert_eq!(between.exchanged(), 1);

    let (device, to, between) = pair("to");
    let loaded = to.watch().transfer_state(Some(state.clone()));
    eprintln!(
        "DBG {:?} {:?}",
        to.status().unwrap().last_error,
        device.status().unwrap().last_error
    );
    assert_eq!(loaded.unwrap(), [0_u8; 0]);
    assert_eq!(device.status().unwrap().config.unwrap().mac, Some(MAC.0));
    // Through that pipe, too, nonsense is none.
    let error = to.watch().transfer_state(Some(b"nonsense".to_vec()));
    assert!(matches!(error, Err(PortError::TransferRefused { .. })));
    assert_eq!(to.watch().transfer_state(None).unwrap(), state);
    assert_eq!(between.exchanged(), 3);
    assert_eq!(to.status().unwrap().state, "running");
}

/// A device that does nothing.
#[derive(Default)]
struct Nothing;

impl BackendDevice for Nothing {
    fn set_features(&mut self, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_memory(&mut self, _: Vec<Region>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn add_memory(&mut self, _: Region) -> Result<(), DeviceError> {
        Ok(())
    }
    fn remove_memory(
        &mut self,
        _: virtnet_vhost::payload::MemoryRegion,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_log(&mut self, _: LogFile) -> Result<(), DeviceError> {
        Ok(())
    }
    fn start_ring(&mut self, _: usize, _: RingSetup) -> Result<(), DeviceError> {
        Ok(())
    }
    fn stop_ring(&mut self, _: usize) -> Result<Option<u32>, DeviceError> {
        Ok(None)
    }
    fn enable_ring(&mut self, _: usize, _: bool) {}
    fn set_kick(
        &mut self,
        _: usize,
        _: Option<std::sync::Arc<EventFd>>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_call(
        &mut self,
        _: usize,
        _: Option<std::sync::Arc<EventFd>>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_err(&mut self, _: usize, _: Option<std::sync::Arc<EventFd>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_addresses(&mut self, _: usize, _: RingAddresses) -> Result<(), DeviceError> {
        Ok(())
    }
    fn disconnected(&mut self) {}
}

#[test]
fn a_device_whose_state_cannot_be_had_says_why_and_goes_on() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let listener = Listener::bind(&path).unwrap();
    let driver = Wiring::default().driver(&path, &control);
    let why = |expected: &str| {
        let error = driver.watch().transfer_state(None).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    why("nobody is at the other end");
    let mut accepted = None;
    until("the driver connects", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let protocol = ProtocolFeatures::all() - ProtocolFeatures::DEVICE_STATE;
    let offer = Offer::new(Features::VERSION_1.bits(), protocol, 1);
    let mut backend = Backend::new(accepted.unwrap(), offer);
    until("the driver runs", || {
        backend.on_readable(&mut Nothing).unwrap();
        driver.status().unwrap().state == "running"
    });
    why("does not offer DEVICE_STATE");
    assert_eq!(driver.status().unwrap().state, "running");
}

#[test]
fn a_back_end_that_leaves_in_the_middle_leaves_nothing_behind() {
    let _gate = support::alone();
    let mut things = None;
    for _ in 0..3 {
        let pair = wiring(RingFormat::Split, false).connect();
        let (watch, device) = (pair.driver.watch(), pair.device);
        let leaves = std::thread::spawn(move || drop(device));
        // It is had, or it is not.
        drop(watch.transfer_state(None));
        leaves.join().unwrap();
        let error = watch.transfer_state(None).unwrap_err();
        assert!(matches!(error, PortError::NoTransfer { .. }), "{error}");
        drop((pair.driver, pair.control, pair.directory));
        assert_eq!(*things.get_or_insert_with(open_things), open_things());
    }
}
