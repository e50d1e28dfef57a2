//! A network interface watched: whether it is up, how long its frames may be, whether it is still there.
//!
//! The kernel tells of changes through a netlink socket, which is readable when there is something to read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::error::SysError;

/// Numbers of rtnetlink. Source: linux/rtnetlink.h, linux/if_link.h, linux/if.h
const RTMGRP_LINK: u32 = 1;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
/// Lengths of a netlink message's header, a link message's and an attribute's.
const MESSAGE: usize = 16;
const LINK: usize = 16;
const ATTRIBUTE: usize = 4;

/// How an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// It is up, and so is the other end of its cable.
    pub up: bool,
    /// The largest payload of a frame, in bytes.
    pub mtu: u32,
}

/// What has become of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkNews {
    /// It is so now.
    State(LinkState),
    /// It is gone, or in another network namespace.
    Gone,
}

/// Watches one interface.
#[derive(Debug)]
pub struct LinkWatch {
    fd: OwnedFd,
    index: u32,
}

impl LinkWatch {
    /// Watches the interface `name` of the network namespace that the calling thread is in. How it is now is the first news.
    ///
    /// # Errors
    /// [`SysError::Os`]: there is no such interface, or the process is out of descriptors.
    pub fn open(name: &str) -> Result<Self, SysError> {
        let failed = |errno| SysError::os(format!("watch interface {name:?}"), errno);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // The protocol of number 0, which is none, is routing.
        let family = AddressFamily::NETLINK;
        let fd = net::socket_with(family, SocketType::RAW, flags, None).map_err(failed)?;
        let index = net::netdevice::name_to_index(&fd, name)
            .map_err(|errno| SysError::os(format!("find interface {name:?}"), errno))?;
        net::bind(&fd, &SocketAddrNetlink::new(0, RTMGRP_LINK)).map_err(failed)?;
        let watch = Self { fd, index };
        watch
            .ask()
            .map_err(|error| SysError::os(format!("watch interface {name:?}"), error))?;
        Ok(watch)
    }

    /// The interface's number.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Asks how the interface is; the answer is among the news.
    fn ask(&self) -> io::Result<()> {
        let mut request = [0; MESSAGE + LINK];
        let len = u32::try_from(request.len()).unwrap_or_default();
        request[..4].copy_from_slice(&len.to_ne_bytes());
        request[4..6].copy_from_slice(&RTM_GETLINK.to_ne_bytes());
        request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        request[MESSAGE + 4..MESSAGE + 8].copy_from_slice(&self.index.to_ne_bytes());
        net::send(&self.fd, &request, SendFlags::empty())?;
        Ok(())
    }

    /// What has become of the interface since the last look, in order.
    ///
    /// # Errors
    /// None in practice; having missed something is none, it asks again.
    pub fn news(&self) -> io::Result<Vec<LinkNews>> {
        let mut news = Vec::new();
        let mut bytes = vec![0; 32 << 10];
        loop {
            match net::recv(&self.fd, &mut bytes[..], RecvFlags::empty()) {
                Ok((n, _)) => self.read(bytes.get(..n).unwrap_or_default(), &mut news),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOBUFS) => self.ask()?,
                Err(rustix::io::Errno::AGAIN) => return Ok(news),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn read(&self, mut bytes: &[u8], news: &mut Vec<LinkNews>) {
        while let Some((kind, message, rest)) = next_message(bytes) {
            bytes = rest;
            match kind {
                RTM_NEWLINK if word(message, 4) == Some(self.index) => {
                    news.extend(state_of(message).map(LinkNews::State));
                }
                RTM_DELLINK if word(message, 4) == Some(self.index) => news.push(LinkNews::Gone),
                // The answer to our question, when there is no such interface any more.
                NLMSG_ERROR => news.push(LinkNews::Gone),
                _ => {}
            }
        }
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The first message: its kind, what is in it, and the bytes behind it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = word(bytes, 0)? as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let message = bytes.get(MESSAGE..len)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, message, rest))
}

fn state_of(message: &[u8]) -> Option<LinkState> {
    let flags = word(message, 8)?;
    let mut attributes = message.get(LINK..)?;
    let mut mtu = 0;
    while let Some([a, b, c, d]) = attributes.first_chunk() {
        let (len, kind) = (u16::from_ne_bytes([*a, *b]), u16::from_ne_bytes([*c, *d]));
        let len = usize::from(len).max(ATTRIBUTE);
        if kind == IFLA_MTU {
            mtu = word(attributes, ATTRIBUTE)?;
        }
        attributes = attributes
            .get(len.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(LinkState {
        up: flags & IFF_UP != 0 && flags & IFF_LOWER_UP != 0,
        mtu,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|word| u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_there() {
        let watch = LinkWatch::open("lo").unwrap();
        let news = watch.news().unwrap();
        assert!(
            matches!(news[..], [LinkNews::State(LinkState { mtu: 1.., .. }), ..]),
            "{news:?}"
        );
        let error = LinkWatch::open("no-such-thing").unwrap_err().to_string();
        assert!(
            error.contains("find interface \"no-such-thing\""),
            "{error}"
        );
    }

    #[test]
    fn messages_that_are_cut_off_or_lie_are_no_news() {
        let watch = LinkWatch::open("lo").unwrap();
        let mut message = [0; MESSAGE + LINK + 8];
        message[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
        message[MESSAGE + 4..MESSAGE + 8].copy_from_slice(&watch.index().to_ne_bytes());
        for len in [0, 1, 15, 16, 17, 40, 41, 1 << 31, u32::MAX] {
            message[..4].copy_from_slice(&len.to_ne_bytes());
            for cut in 0..message.len() {
                watch.read(&message[..cut], &mut Vec::new());
            }
        }
    }
}
