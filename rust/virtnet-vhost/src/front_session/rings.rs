//! What a back-end is told about a ring.

use std::os::fd::OwnedFd;

use virtnet_sys::EventFd;

use super::{FrontendRing, misuse};
use crate::error::SessionError;
use crate::message::Request;
use crate::payload::{VringFd, VringState};

/// All that is told about one ring. One without events is started by its first kick, which says nothing beyond that.
pub(super) struct RingMessages {
    pub(super) call: Option<(Request, Vec<OwnedFd>)>,
    pub(super) others: [(Request, Vec<OwnedFd>); 4],
}

impl RingMessages {
    pub(super) fn new(
        index: usize,
        ring: &FrontendRing,
        in_band: bool,
    ) -> Result<Self, SessionError> {
        let Ok(word) = u8::try_from(index) else {
            return Err(misuse(format!(
                "there can be no ring {index}: 256 is the most, counted from 0"
            )));
        };
        let copy = |event: &EventFd| -> Result<_, SessionError> {
            let copy = event.try_clone().map_err(|source| SessionError::Io {
                operation: "hand an event to",
                source,
            })?;
            Ok(vec![OwnedFd::from(copy)])
        };
        let index = u32::from(word);
        let plain = |request| (request, Vec::new());
        let addresses = ring.addresses.of_ring(index);
        let (call, start) = if in_band {
            let kick = Request::VringKick(VringState { index, num: 0 });
            (None, plain(kick))
        } else {
            let word = VringFd::new(word, true);
            let kick = (Request::SetVringKick(word), copy(&ring.kick)?);
            let call = (Request::SetVringCall(word), copy(&ring.call)?);
            (Some(call), kick)
        };
        Ok(Self {
            call,
            others: [
                plain(Request::SetVringNum(VringState {
                    index,
                    num: ring.size.into(),
                })),
                plain(Request::SetVringBase(VringState {
                    index,
                    num: ring.base,
                })),
                plain(Request::SetVringAddr(addresses)),
                start,
            ],
        })
    }
}
