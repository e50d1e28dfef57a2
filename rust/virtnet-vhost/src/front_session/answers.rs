//! Reading the answers of a back-end.

use crate::error::SessionError;
use crate::message::Request;
use crate::payload::{Length, Payload};

/// Reads the answer to a request.
pub(super) fn parse<P: Payload>(request: &Request, payload: &[u8]) -> Result<P, SessionError> {
    P::from_bytes(payload).ok_or_else(|| wrong_length(request, payload, P::LENGTH))
}

pub(super) fn wrong_length(request: &Request, payload: &[u8], length: Length) -> SessionError {
    let expected = match request {
        Request::GetConfig(config) => Length::Exact(12 + config.data.len()),
        _ => length,
    };
    SessionError::ReplyLength {
        request: request.kind().name(),
        expected,
        found: payload.len(),
    }
}

/// Reads the answer to a question that a back-end may leave open, by answering nothing.
pub(super) fn optional<P: Payload>(
    request: &Request,
    payload: &[u8],
) -> Result<Option<P>, SessionError> {
    if payload.is_empty() {
        Ok(None)
    } else {
        parse(request, payload).map(Some)
    }
}
