//! Memory whose pages arrive after the guest: post-copy migration, as its front-end at the destination sees it.
//!
//! The back-end is warned, and hands out a userfaultfd of its own ([`FrontendSession::advise_postcopy`]). Memory that it is told
//! from then on is empty, and nobody there touches it: the back-end answers where it has each region, because faults are told by
//! those addresses ([`FrontendEvent::MemoryMapped`]). Only when somebody serves faults ([`FrontendSession::memory_is_served`]) does
//! the handshake go on. When the last page has arrived, the back-end lets go of it all ([`FrontendSession::end_postcopy`]).
//!
//! Spec: vhost-user, Migration, Front-end post-copy messages: `VHOST_USER_POSTCOPY_ADVISE`, `_LISTEN`, `_END`

use std::os::fd::OwnedFd;

use super::answers::parse;
use super::{FrontendEvent, FrontendSession, Phase, misuse};
use crate::connection::Message;
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::message::Request;
use crate::payload::{MemoryRegion, MemoryTable};

/// How far a post-copy migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Postcopy {
    Off,
    /// Memory that is told now comes later.
    Listening,
    /// The back-end has said where it has the memory, and waits until faults are served.
    Mapped,
    /// Faults are served.
    Served,
}

impl FrontendSession {
    /// Tells that the memory's pages will come later. After [`FrontendEvent::Offered`] and before [`FrontendSession::set_up`],
    /// which then stops at [`FrontendEvent::MemoryMapped`].
    ///
    /// # Errors
    /// Called at another time; the back-end does not offer PAGEFAULT, or it was not asked for. Nothing was sent.
    pub fn advise_postcopy(&mut self) -> Result<(), SessionError> {
        if self.phase != Phase::Choosing || self.postcopy != Postcopy::Off {
            return Err(misuse(
                "post-copy is announced once, after the offer and before the memory".to_owned(),
            ));
        }
        if !self.protocol.contains(ProtocolFeatures::PAGEFAULT) {
            return Err(misuse(
                "PAGEFAULT was not negotiated: the back-end cannot wait for pages".to_owned(),
            ));
        }
        self.ask(Request::PostcopyAdvise);
        self.ask(Request::PostcopyListen);
        self.postcopy = Postcopy::Listening;
        Ok(())
    }

    /// The back-end's userfaultfd, after [`FrontendEvent::MemoryMapped`]: where its faults are read and served.
    pub fn take_userfault(&mut self) -> Option<OwnedFd> {
        self.userfault.take()
    }

    /// Says that faults are served from now on; the handshake goes on.
    ///
    /// # Errors
    /// The back-end has not said where it has the memory. Nothing was sent.
    pub fn memory_is_served(&mut self) -> Result<(), SessionError> {
        if self.postcopy != Postcopy::Mapped {
            return Err(misuse(
                "the back-end has not said yet where it has the memory".to_owned(),
            ));
        }
        self.postcopy = Postcopy::Served;
        // QEMU's way of saying so: a table of no regions, which is no request and has no answer.
        let ready = Request::SetMemTable(MemoryTable(Vec::new()));
        self.queue.push_front((ready, Vec::new()));
        Ok(())
    }

    /// Tells that all pages have arrived; [`FrontendEvent::PostcopyEnded`] says that the back-end has let go of its userfaultfd.
    ///
    /// # Errors
    /// Nobody serves faults. Nothing was sent.
    pub fn end_postcopy(&mut self) -> Result<(), SessionError> {
        if self.postcopy != Postcopy::Served {
            return Err(misuse("there is no post-copy to end".to_owned()));
        }
        self.ask(Request::PostcopyEnd);
        Ok(())
    }

    /// Whether a request is answered with what it tells, not with an acknowledgement.
    pub(super) fn is_answered_with_places(&self, request: &Request) -> bool {
        self.postcopy == Postcopy::Listening && matches!(request, Request::SetMemTable(_))
    }

    /// Whether a message is only a word that faults are served.
    pub(super) fn is_served_note(request: &Request) -> bool {
        matches!(request, Request::SetMemTable(MemoryTable(regions)) if regions.is_empty())
    }

    /// Takes the userfaultfd. The length of the answer says nothing: some back-ends answer with a number.
    pub(super) fn take_advice(&mut self, message: Message) -> Result<(), SessionError> {
        let found = message.fds.len();
        let mut files = message.fds.into_iter();
        match (files.next(), files.next()) {
            (Some(file), None) if !message.misplaced => {
                self.userfault = Some(file);
                Ok(())
            }
            _ => Err(SessionError::NoUserfault { found }),
        }
    }

    /// Takes where the back-end has each region.
    pub(super) fn take_places(
        &mut self,
        request: &Request,
        payload: &[u8],
    ) -> Result<(), SessionError> {
        let Request::SetMemTable(MemoryTable(told)) = request else {
            return Ok(());
        };
        let MemoryTable(found) = parse(request, payload)?;
        let key = |region: &MemoryRegion| (region.guest_addr, region.size);
        if !found.iter().map(key).eq(told.iter().map(key)) {
            return Err(SessionError::ReplyRegions);
        }
        self.postcopy = Postcopy::Mapped;
        self.events.push_back(FrontendEvent::MemoryMapped(found));
        Ok(())
    }
}
