//! Bytes in several places that one system call takes, without a copy of ours between.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use crate::GuestSlice;

/// The most pieces of a system call: a frame of 64 KiB in pages has seventeen, in buffers of 2 KiB a little over thirty.
const PIECES: usize = 64;

/// Bytes of ours and of a peer, one behind the other, for a system call to read.
pub struct Gather<'a> {
    pieces: [libc::iovec; PIECES],
    n: usize,
    bytes: PhantomData<&'a [u8]>,
}

impl fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gather({} pieces)", self.n)
    }
}

impl Default for Gather<'_> {
    fn default() -> Self {
        let nothing = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            pieces: [nothing; PIECES],
            n: 0,
            bytes: PhantomData,
        }
    }
}

impl<'a> Gather<'a> {
    /// Appends bytes of ours; false when there is no room for another piece.
    #[must_use]
    pub fn push(&mut self, bytes: &'a [u8]) -> bool {
        self.push_piece(bytes.as_ptr(), bytes.len())
    }

    /// Appends bytes of a peer, which the kernel reads when it is told to: the peer may change them until then.
    #[must_use]
    pub fn push_guest(&mut self, bytes: GuestSlice<'a>) -> bool {
        self.push_piece(bytes.start(), bytes.len())
    }

    fn push_piece(&mut self, start: *const u8, len: usize) -> bool {
        let Some(piece) = self.pieces.get_mut(self.n) else {
            return false;
        };
        *piece = libc::iovec {
            iov_base: start.cast_mut().cast(),
            iov_len: len,
        };
        self.n += 1;
        true
    }

    /// Writes everything with one `writev`; how many bytes were taken.
    ///
    /// # Errors
    /// Those of the system call. EFAULT says that a peer has taken pages away; whoever copies the bytes instead gets zeros for them.
    pub fn write(&self, to: &impl AsFd) -> io::Result<usize> {
        let n = libc::c_int::try_from(self.n).unwrap_or_default();
        // SAFETY: each of the first `n` pieces names bytes that are borrowed for `'a` and mapped (`push` and `push_guest`), and the
        // kernel only reads them, during the call.
        let written = unsafe { libc::writev(to.as_fd().as_raw_fd(), self.pieces.as_ptr(), n) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn pieces_leave_in_order_with_one_call() {
        let (to, mut from) = UnixStream::pair().unwrap();
        let mut theirs = *b"theirs";
        // SAFETY: the bytes outlive the slice.
        let slice = unsafe { GuestSlice::new(theirs.as_mut_ptr(), theirs.len()) };
        let mut gather = Gather::default();
        assert!(gather.push(b"ours ") && gather.push_guest(slice) && gather.push(b" ours"));
        assert_eq!(gather.write(&to).unwrap(), 16);
        let mut found = [0; 16];
        from.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"ours theirs ours");
    }

    #[test]
    fn more_pieces_than_there_is_room_for_are_refused() {
        let mut gather = Gather::default();
        assert!((0..PIECES).all(|_| gather.push(b"x")));
        assert!(!gather.push(b"x") && !gather.push_guest(GuestSlice::empty()));
    }
}
