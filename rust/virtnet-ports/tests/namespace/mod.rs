//! Tests that change the network, in a network namespace of their own.

#![allow(dead_code, reason = "no test program needs all of it")]

use std::process::Command;

const INSIDE: &str = "VIRTNET_TEST_NAMESPACE";

/// Runs the test `name` of this program in a new namespace.
pub(crate) fn in_namespace(name: &str) {
    run_in(&["--map-root-user", "--net"], name);
}

/// The same with all rights of whoever runs the tests, for what root of a user namespace may not do.
pub(crate) fn in_namespace_of_root(name: &str) {
    run_in(&["--net"], name);
}

fn run_in(kind: &[&str], name: &str) {
    let unshare = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(kind).arg(program);
        command
    };
    let allowed = unshare("true").output();
    let no_tap = !std::path::Path::new("/dev/net/tun").exists();
    if no_tap || !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a network namespace with a tap cannot be made here");
        return;
    }
    let program = std::env::current_exe().expect("this program");
    let output = unshare(&program.to_string_lossy())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}\n{errors}");
}

/// The guard of every test that changes the network: it must not be this machine's.
pub(crate) fn inside() {
    assert!(
        std::env::var_os(INSIDE).is_some(),
        "to be run by the test without `inside` in its name, in a namespace of its own"
    );
    // Nothing but our own packets.
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        drop(std::fs::write(path, "1"));
    }
}

pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}
