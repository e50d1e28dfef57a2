//! Two threads on one ring: nothing is lost between looking and sleeping, and a descriptor that changes is read once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use virtnet_mem::GuestAddr;
use virtnet_virtio::{Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, Used};

use super::{Attack, THIRD};
use crate::support::driver::{Desc, INDIRECT, NEXT};
use crate::support::{Ram, Setup};

/// A bell like an eventfd: rung before it is listened to, it is heard.
#[derive(Default)]
struct Bell(Mutex<bool>, Condvar);

impl Bell {
    fn ring(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }

    /// Waits until it has been rung. A call that never comes is what this looks for.
    fn wait(&self) {
        let rung = self.0.lock().unwrap();
        let patience = Duration::from_secs(20);
        let (mut rung, late) = self
            .1
            .wait_timeout_while(rung, patience, |rung| !*rung)
            .unwrap();
        assert!(!late.timed_out(), "nobody rang: a wake-up was lost");
        *rung = false;
    }
}

const CHAINS: u64 = 30_000;

/// Driver and device on threads of their own; each sleeps whenever there is nothing to do.
fn ping_pong(setup: Setup) {
    let (memory, _) = setup.memory(4096);
    let ram = Ram(memory);
    let mut driver = DriverQueue::new(&setup.config(), &ram.0).unwrap();
    let mut device = DeviceQueue::new(&setup.config(), &ram.0).unwrap();
    let (kick, call) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    std::thread::scope(|scope| {
        let (kicked, calls) = (Arc::clone(&kick), Arc::clone(&call));
        let device_ram = ram.clone();
        scope.spawn(move || {
            let mut chains = Chains::new();
            let mut done = 0;
            while done < CHAINS {
                device
                    .take(&device_ram.0, Access::Write, 8, &mut chains)
                    .unwrap();
                for i in 0..chains.len() {
                    // The length says which chain it was.
                    assert_eq!(chains.bytes(i), Ok(4096));
                    device.give(&chains, i, &[(done % 4096) as u32]);
                    done += 1;
                }
                let any = !chains.is_empty();
                chains.clear();
                if device.publish() {
                    calls.ring();
                }
                if !any && !device.arm() {
                    kicked.wait();
                }
                if done % 3 == 0 {
                    device.disarm();
                }
            }
        });
        let (mut sent, mut returned) = (0, 0);
        let mut used = [Used::default(); 16];
        while returned < CHAINS {
            let buffer = DriverBuffer {
                addr: GuestAddr(setup.data()),
                len: 4096,
                writable: true,
            };
            for _ in 0..1 + returned % 7 {
                if sent < CHAINS && driver.add(&[buffer]).is_some() {
                    sent += 1;
                }
            }
            if driver.publish() {
                kick.ring();
            }
            let n = driver.reap(&mut used).unwrap();
            for used in &used[..n] {
                assert_eq!(u64::from(used.len), returned % 4096, "out of order");
                returned += 1;
            }
            let blocked = sent == CHAINS || driver.free() == 0;
            if n == 0 && blocked && returned < CHAINS && !driver.arm() {
                call.wait();
            }
            if returned % 5 == 0 {
                driver.disarm();
            }
        }
    });
}

#[test]
fn ta114_no_wake_up_is_lost_between_looking_and_sleeping() {
    for size in [1, 3, 8] {
        for setup in Setup::all(size) {
            ping_pong(setup);
        }
    }
}

/// Offers `chain` again and again while another thread runs `meanwhile`: what is taken lies in the third region or is an error.
fn while_the_driver_writes(setup: Setup, chain: Desc, meanwhile: impl Fn(&Ram) + Send + Sync) {
    let mut attack = Attack::new(setup, Access::Read);
    let stop = Arc::new(AtomicBool::new(false));
    let (until, ram) = (Arc::clone(&stop), attack.ram.clone());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !until.load(Ordering::Relaxed) {
                meanwhile(&ram);
            }
        });
        let _stop = Stop(stop);
        for _ in 0..2000 {
            attack.offer(&[chain]);
            for taken in attack.take() {
                let Ok(buffers) = taken else { continue };
                for (addr, len) in buffers {
                    assert!(addr >= THIRD.start && addr + u64::from(len) <= THIRD.end);
                }
            }
            assert_eq!(attack.give_back().len(), 1);
        }
    });
}

/// Length and address may be from two moments; what they name is inside memory all the same, and is not looked at again.
#[test]
fn ta11_ta63_a_descriptor_that_changes_under_us_is_read_once() {
    // The last bytes of a region, and what would lead out of it.
    let (short, long) = (10_u32, 0x1000_u32);
    for setup in Setup::all(8) {
        while_the_driver_writes(setup, Desc::new(THIRD.start, long, 0, 0), |ram| {
            for slot in 0..8 {
                let desc = setup.desc() + 16 * slot;
                ram.set_u64(desc, THIRD.end - u64::from(short));
                ram.set_u32(desc + 8, short);
                ram.set_u64(desc, THIRD.start);
                ram.set_u32(desc + 8, long);
            }
            // And its wish for calls, at full rate.
            let flags = setup.driver_area() + if setup.is_packed() { 2 } else { 0 };
            ram.set_u16(flags, 1);
            ram.set_u16(flags, 0);
        });
    }
}

#[test]
fn ta39_a_table_that_changes_under_us_is_read_once() {
    for setup in Setup::all(8) {
        let table = setup.data() + 4096;
        while_the_driver_writes(setup, Desc::new(table, 16, INDIRECT, 0), |ram| {
            for entry in 0..8 {
                let next = if setup.is_packed() { 0 } else { NEXT };
                let there = Desc::new(THIRD.end - 10, 10, next, (entry + 1) as u16);
                there.write(ram, table, entry, setup.is_packed());
                let far = Desc::new(THIRD.start, 0x1000, 0, 0);
                far.write(ram, table, entry, setup.is_packed());
            }
            for len in [0, 16, 128, 24, u32::MAX, 16] {
                (0..8).for_each(|slot| ram.set_u32(setup.desc() + 16 * slot + 8, len));
            }
        });
    }
}

/// Stops the other thread, also when a test fails.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
