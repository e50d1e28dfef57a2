use std::fs::File;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::EventFd;

/// A directory of its own for one test, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "virtnet-sys-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Makes a socket file whose owner is gone.
fn leave_stale(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
    assert!(path.exists());
}

#[test]
fn a_connection_carries_bytes_both_ways() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    let client = Stream::connect(&path).unwrap();
    let server = listener.accept().unwrap();
    assert_eq!(client.send(b"ping", &[]).unwrap(), 4);
    let mut buffer = [0; 16];
    assert_eq!(server.recv(&mut buffer, &mut Vec::new()).unwrap(), 4);
    assert_eq!(
        server
            .recv(&mut buffer, &mut Vec::new())
            .unwrap_err()
            .kind(),
        io::ErrorKind::WouldBlock
    );
    drop(client);
    assert_eq!(server.recv(&mut buffer, &mut Vec::new()).unwrap(), 0);
    assert_eq!(
        server.send(b"x", &[]).unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}

#[test]
fn the_peer_is_known() {
    let (a, _b) = Stream::pair().unwrap();
    let peer = a.peer().unwrap();
    assert_eq!(u32::try_from(peer.pid).unwrap(), std::process::id());
    assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
}

#[test]
fn te23_the_file_has_the_asked_mode() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    drop(listener);
    let _listener = Listener::bind_with_mode(&path, 0o666).unwrap();
    assert_eq!(mode(&path), 0o666);
}

#[test]
fn te13_a_stale_socket_is_replaced() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    leave_stale(&path);
    let listener = Listener::bind(&path).unwrap();
    Stream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn te13_a_live_socket_is_left_alone_and_named() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    let first = Listener::bind(&path).unwrap();
    let error = Listener::bind(&path).unwrap_err();
    assert!(matches!(error, SysError::AddressInUse { .. }));
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    Stream::connect(&path).unwrap();
    first.accept().unwrap();
}

#[test]
fn te13_what_is_no_socket_is_never_removed() {
    let directory = Directory::new();
    let (file, link, folder, stale) = (
        directory.join("file"),
        directory.join("link"),
        directory.join("folder"),
        directory.join("stale"),
    );
    fs::write(&file, "precious").unwrap();
    fs::create_dir(&folder).unwrap();
    leave_stale(&stale);
    std::os::unix::fs::symlink(&stale, &link).unwrap();
    for (path, name) in [
        (&file, "regular file"),
        (&link, "symbolic link"),
        (&folder, "directory"),
    ] {
        let error = Listener::bind(path).unwrap_err();
        assert!(
            matches!(error, SysError::NotASocket { found, .. } if found == name),
            "{error}"
        );
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(link.is_symlink() && folder.is_dir() && stale.exists());
}

#[test]
fn te14_only_our_own_file_is_removed_at_the_end() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    drop(Listener::bind(&path).unwrap());
    assert!(!path.exists());

    let ours = Listener::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    drop(ours);
    assert!(path.exists());
}

#[test]
fn impossible_paths_are_explained() {
    let directory = Directory::new();
    let missing = directory.join("missing/a.sock");
    assert!(matches!(
        Listener::bind(&missing),
        Err(SysError::NoDirectory { .. })
    ));
    assert!(matches!(
        Stream::connect(&missing),
        Err(SysError::NobodyListens { .. })
    ));
    let long = directory.join(&"x".repeat(120));
    for error in [
        Listener::bind(&long).unwrap_err(),
        Stream::connect(&long).unwrap_err(),
    ] {
        assert!(
            matches!(error, SysError::PathTooLong { max: 107, .. }),
            "{error}"
        );
    }
    Listener::bind("").unwrap_err();
    let longest = directory.join(&"y".repeat(106 - directory.0.as_os_str().len()));
    assert_eq!(longest.as_os_str().len(), MAX_PATH);
    Listener::bind(&longest).unwrap();
}

#[test]
fn descriptors_arrive_with_the_first_byte_they_rode_on() {
    let (a, b) = Stream::pair().unwrap();
    let event = EventFd::new().unwrap();
    a.send(b"12", &[event.as_fd()]).unwrap();
    a.send(b"34", &[event.as_fd(), event.as_fd()]).unwrap();
    let (mut buffer, mut fds) = ([0; 16], Vec::new());
    assert_eq!(b.recv(&mut buffer[..1], &mut fds).unwrap(), 1);
    assert_eq!(fds.len(), 1);
    // The rest of the first send carries none any more, and the kernel joins it with the second.
    assert_eq!(b.recv(&mut buffer, &mut fds).unwrap(), 3);
    assert_eq!(fds.len(), 3);
    let received = EventFd::from_owned(fds.pop().unwrap()).unwrap();
    received.signal().unwrap();
    assert!(event.drain());
}

#[test]
fn tb14_descriptors_of_two_sends_never_arrive_together() {
    let (a, b) = Stream::pair().unwrap();
    let event = EventFd::new().unwrap();
    a.send(b"12", &[event.as_fd()]).unwrap();
    a.send(b"34", &[event.as_fd()]).unwrap();
    for expected in 1..=2 {
        let mut fds = Vec::new();
        assert_eq!(
            b.recv(&mut [0; 16], &mut fds).unwrap(),
            2,
            "send {expected}"
        );
        assert_eq!(fds.len(), 1);
    }
}

#[test]
fn tb11_as_many_descriptors_as_the_kernel_allows_are_taken() {
    let (a, b) = Stream::pair().unwrap();
    let event = EventFd::new().unwrap();
    a.send(b"x", &[event.as_fd(); MAX_FDS]).unwrap();
    let mut fds = Vec::new();
    assert_eq!(b.recv(&mut [0; 4], &mut fds).unwrap(), 1);
    assert_eq!(fds.len(), MAX_FDS);
    assert_eq!(
        a.send(b"x", &[event.as_fd(); MAX_FDS + 1])
            .unwrap_err()
            .kind(),
        io::ErrorKind::InvalidInput
    );
}

#[test]
fn received_descriptors_are_closed_on_exec() {
    let (a, b) = Stream::pair().unwrap();
    a.send(b"x", &[a.as_fd()]).unwrap();
    let mut fds = Vec::new();
    b.recv(&mut [0; 4], &mut fds).unwrap();
    let flags = rustix::io::fcntl_getfd(&fds[0]).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn tb9_a_peer_that_does_not_read_stops_the_sender_without_blocking() {
    let (a, _b) = Stream::pair().unwrap();
    let bytes = [0; 4096];
    let error = (0..10_000).find_map(|_| a.send(&bytes, &[]).err()).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn tb93_only_unix_stream_sockets_are_taken_over() {
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cases: Vec<(OwnedFd, &str)> = vec![
        (File::open("/dev/null").unwrap().into(), "device"),
        (datagram.into(), "no stream"),
        (tcp.into(), "another family"),
    ];
    for (fd, text) in cases {
        let error = Stream::from_owned(fd.try_clone().unwrap()).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        Listener::from_owned(fd).unwrap_err();
    }
    let (stream, _other) = UnixStream::pair().unwrap();
    Listener::from_owned(stream.try_clone().unwrap().into()).unwrap_err();
    let stream = Stream::from_owned(stream.into()).unwrap();
    assert_eq!(
        stream.recv(&mut [0], &mut Vec::new()).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn a_listener_handed_over_leaves_its_file() {
    let directory = Directory::new();
    let path = directory.join("a.sock");
    let listener = Listener::from_owned(UnixListener::bind(&path).unwrap().into()).unwrap();
    let _client = Stream::connect(&path).unwrap();
    listener.accept().unwrap();
    drop(listener);
    assert!(path.exists());
}
