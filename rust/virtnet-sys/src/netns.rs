//! Network namespaces: what has to be opened in another one is opened by a thread that goes there and ends.
//!
//! A socket or interface stays in the namespace where it was made, whoever uses it. So the caller's thread never moves.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::thread;

use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::SysError;

/// Where `ip netns` keeps the namespaces that have names.
const NAMED: &str = "/run/netns";

/// Does `work` in a network namespace, or right here if none is named.
///
/// A namespace is a name that `ip netns` knows, a path (with a slash in it), or a process as `pid:NUMBER`.
///
/// # Errors
/// [`SysError::Os`]: there is no such namespace, or the right to enter it (CAP_SYS_ADMIN) is missing. `work` is not done then.
pub fn in_network_namespace<R: Send>(
    namespace: Option<&str>,
    work: impl FnOnce() -> R + Send,
) -> Result<R, SysError> {
    let Some(namespace) = namespace else {
        return Ok(work());
    };
    let path = path_of(namespace);
    let file = File::open(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => SysError::os(
            format!(
                "find network namespace {namespace:?} at {} (`ip netns` lists those that have names)",
                path.display()
            ),
            error,
        ),
        _ => SysError::os(format!("open network namespace {namespace:?}"), error),
    })?;
    in_network_namespace_of(file.as_fd(), namespace, work)
}

/// Does `work` in the network namespace that a descriptor stands for; `called` is what errors call it.
///
/// # Errors
/// As [`in_network_namespace`].
pub fn in_network_namespace_of<R: Send>(
    namespace: BorrowedFd<'_>,
    called: &str,
    work: impl FnOnce() -> R + Send,
) -> Result<R, SysError> {
    let enter = || {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)).map_err(|errno| {
            let remedy = match errno {
                Errno::PERM => " (needs root or CAP_SYS_ADMIN)",
                Errno::INVAL => " (it is something else)",
                _ => "",
            };
            SysError::os(format!("enter network namespace {called:?}{remedy}"), errno)
        })
    };
    thread::scope(|scope| {
        thread::Builder::new()
            .name("virtnet-netns".to_owned())
            .spawn_scoped(scope, || enter().map(|()| work()))
            .map_err(|error| SysError::os("start a thread", error))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn path_of(namespace: &str) -> PathBuf {
    match namespace.strip_prefix("pid:") {
        Some(pid) => format!("/proc/{pid}/ns/net").into(),
        None if namespace.contains('/') => namespace.into(),
        None => PathBuf::from(NAMED).join(namespace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> PathBuf {
        std::fs::read_link("/proc/thread-self/ns/net").unwrap()
    }

    #[test]
    fn work_is_done_elsewhere_and_the_caller_stays() {
        let before = here();
        assert_eq!(in_network_namespace(None, here).unwrap(), before);
        let own = format!("pid:{}", std::process::id());
        // Without the right to enter, even one's own namespace is closed.
        match in_network_namespace(Some(&own), here) {
            Ok(there) => assert_eq!(there, before),
            Err(error) => assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}"),
        }
        assert_eq!(here(), before);
    }

    #[test]
    fn what_is_no_namespace_is_refused_by_name() {
        for (namespace, says) in [
            ("no-such-thing", "/run/netns/no-such-thing"),
            ("/no/such/thing", "at /no/such/thing"),
            ("pid:999999999", "/proc/999999999/ns/net"),
            ("/dev/null", "enter network namespace \"/dev/null\""),
        ] {
            let error = in_network_namespace(Some(namespace), || unreachable!()).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
