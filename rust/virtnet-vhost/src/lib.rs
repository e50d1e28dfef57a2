//! vhost-user: messages, session as a pure state machine, connection; both roles.
#![forbid(unsafe_code)]
