//! A look at somebody's back-end: attach, ask what it offers, leave. No ring is set up.
//!
//! This is the one place that waits, for a person at a terminal; what runs beside others uses [`Frontend`].

use std::path::Path;
use std::time::{Duration, Instant};

use virtnet_sys::{Events, Poller, Stream};

use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::front_session::{FrontendEvent, Offered};
use crate::frontend::Frontend;

/// Asks the back-end that listens on `path` what it offers, and waits for the answers up to `timeout`.
///
/// # Errors
/// Nobody listens there, it does not answer in time, or it talks nonsense.
pub fn probe(path: &Path, timeout: Duration) -> Result<Offered, SessionError> {
    probe_stream(Stream::connect(path)?, timeout)
}

fn probe_stream(stream: Stream, timeout: Duration) -> Result<Offered, SessionError> {
    let os = |source| SessionError::Io {
        operation: "wait for",
        source,
    };
    let questions = ProtocolFeatures::FRONTEND.difference(ProtocolFeatures::BACKEND_REQ);
    let mut frontend = Frontend::start_with(stream, questions)?;
    let poller = Poller::new().map_err(os)?;
    poller.add(&frontend, 0).map_err(os)?;
    let mut events = Events::with_capacity(1);
    let start = Instant::now();
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            let request = frontend
                .session()
                .awaited()
                .map_or("the handshake", |(request, _)| request);
            return Err(SessionError::NoReply {
                request,
                after: timeout,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tc2_a_back_end_that_says_nothing_is_left_after_the_time() {
        let (ours, _silent) = Stream::pair().unwrap();
        let error = probe_stream(ours, Duration::from_millis(30)).unwrap_err();
        assert!(
            matches!(
                error,
                SessionError::NoReply {
                    request: "GET_FEATURES",
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.to_string().contains("30ms"), "{error}");
    }

    #[test]
    fn a_path_nobody_listens_on_is_named() {
        let error = probe(Path::new("/nonexistent/x.sock"), Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.sock"), "{error}");
    }
}
