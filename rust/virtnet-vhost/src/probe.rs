//! A look at somebody's back-end: attach, ask what it offers, leave. No ring is set up.

use std::path::Path;
use std::time::{Duration, Instant};

use virtnet_sys::{Events, Poller, Stream};

use crate::error::SessionError;
use crate::frontend::{Frontend, FrontendEvent, Offered};

/// Asks the back-end that listens on `path` what it offers, and waits for the answers up to `timeout`.
///
/// # Errors
/// Nobody listens there, it does not answer in time, or it talks nonsense.
pub fn probe(path: &Path, timeout: Duration) -> Result<Offered, SessionError> {
    let os = |source| SessionError::Io {
        operation: "wait for",
        source,
    };
    let mut frontend = Frontend::start(Stream::connect(path)?)?;
    let poller = Poller::new().map_err(os)?;
    poller.add(&frontend, 0).map_err(os)?;
    let mut events = Events::with_capacity(1);
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SessionError::Misuse {
                what: format!(
                    "the back-end has accepted the connection and not answered within {timeout:?}: is it serving somebody else?"
                ),
            });
        }
        poller.wait(&mut events, Some(left)).map_err(os)?;
        for event in frontend.on_readable()? {
            if let FrontendEvent::Offered(offered) = event {
                return Ok(offered);
            }
        }
    }
}
