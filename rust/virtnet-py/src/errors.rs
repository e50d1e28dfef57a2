//! The one place where errors of the crates below become exceptions of `virtnet.errors`.

/// The exceptions, which are written in Python; importing is left to their first use.
mod exceptions {
    use pyo3::import_exception;

    import_exception!(virtnet.errors, ConfigError);
    import_exception!(virtnet.errors, StateError);
}

pub(crate) use exceptions::{ConfigError, StateError};
