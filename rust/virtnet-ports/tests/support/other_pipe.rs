//! A back-end that has a pipe of its own for its device's state: one that takes the front-end's, with somebody in between.
//!
//! Spec: vhost-user, SET_DEVICE_STATE_FD: the back-end may answer with a descriptor that is to be used instead.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use virtnet_sys::{Listener, Stream, wait_readable};

const HEADER: usize = 12;
const SET_DEVICE_STATE_FD: u32 = 42;

/// Whoever is in between; its thread ends with the process.
#[derive(Debug)]
pub struct OtherPipe {
    exchanged: Arc<AtomicU64>,
}

impl OtherPipe {
    /// Listens at `path` and takes everybody on to `backend`.
    pub fn start(path: &Path, backend: &Path) -> Self {
        let listener = Listener::bind(path).unwrap();
        let (backend, exchanged) = (backend.to_owned(), Arc::default());
        let count = Arc::clone(&exchanged);
        thread::spawn(move || {
            loop {
                wait_readable(listener.as_fd(), Duration::from_secs(1)).unwrap();
                if let Ok(front) = listener.accept() {
                    let back = Stream::connect(&backend).unwrap();
                    let count = Arc::clone(&count);
                    thread::spawn(move || relay(&front, &back, &count));
                }
            }
        });
        Self { exchanged }
    }

    /// How many pipes were exchanged.
    pub fn exchanged(&self) -> u64 {
        self.exchanged.load(Relaxed)
    }
}

/// Passes messages on, one way and the other, until either end leaves.
fn relay(front: &Stream, back: &Stream, exchanged: &AtomicU64) -> Option<()> {
    let mut instead = VecDeque::new();
    loop {
        if let Some((bytes, mut fds)) = receive(front)? {
            if request(&bytes) == SET_DEVICE_STATE_FD {
                let (reader, writer) = io::pipe().unwrap();
                let loads = bytes[HEADER] == 1;
                let (here, there): (OwnedFd, OwnedFd) = if loads {
                    (reader.into(), writer.into())
                } else {
                    (writer.into(), reader.into())
                };
                instead.push_back(there);
                // The front-end's own end is closed well before it has heard that it is not used.
                fds = vec![here];
                thread::sleep(Duration::from_millis(50));
            }
            send(back, &bytes, &fds)?;
        }
        if let Some((mut bytes, mut fds)) = receive(back)? {
            if request(&bytes) == SET_DEVICE_STATE_FD {
                let pipe = instead.pop_front().unwrap();
                if bytes[HEADER] == 0 {
                    // Not its bit any more: a descriptor does come with it.
                    bytes[HEADER + 1] = 0;
                    fds = vec![pipe];
                    exchanged.fetch_add(1, Relaxed);
                }
            }
            send(front, &bytes, &fds)?;
        }
    }
}

fn request(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes(bytes[..4].try_into().unwrap())
}

type Message = (Vec<u8>, Vec<OwnedFd>);

/// A whole message, if one comes soon; `None` at the end.
fn receive(stream: &Stream) -> Option<Option<Message>> {
    if !wait_readable(stream.as_fd(), Duration::from_micros(200)).ok()? {
        return Some(None);
    }
    let (mut bytes, mut fds) = (vec![0; HEADER], Vec::new());
    fill(stream, &mut bytes, &mut fds)?;
    let len = u32::from_ne_bytes(bytes[8..].try_into().unwrap());
    let mut payload = vec![0; usize::try_from(len).unwrap()];
    fill(stream, &mut payload, &mut fds)?;
    bytes.extend(payload);
    Some(Some((bytes, fds)))
}

fn fill(stream: &Stream, mut bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
    while !bytes.is_empty() {
        match stream.recv(bytes, fds) {
            Ok(0) => return None,
            Ok(n) => bytes = &mut bytes[n..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait_readable(stream.as_fd(), Duration::from_secs(1)).ok()?;
            }
            Err(_) => return None,
        }
    }
    Some(())
}

/// Messages are small, so a socket takes each at once.
fn send(stream: &Stream, bytes: &[u8], fds: &[OwnedFd]) -> Option<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    (stream.send(bytes, &fds).ok()? == bytes.len()).then_some(())
}
