//! The checks of back-ends: ours passes them all, and one that does wrong is found out.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail loudly")]

mod support;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use support::other_pipe::OtherPipe;
use support::{Echo, PATIENCE, beside_others};
use virtnet_ports::check::{Checker, Finding, Outcome, checks};
use virtnet_ports::{Control, VhostUserOptions, VhostUserPort};
use virtnet_testkit::TempDir;

fn run(path: &Path, patience: Duration, wanted: impl Fn(&str) -> bool) -> Vec<Finding> {
    let mut checker = Checker::new(path, patience);
    let wanted = checks().into_iter().filter(|check| wanted(check.id));
    wanted.map(|check| checker.run(check)).collect()
}

fn told(findings: &[Finding], outcome: Outcome) -> Vec<String> {
    let these = findings.iter().filter(|finding| finding.outcome == outcome);
    these
        .map(|finding| format!("{}: {}", finding.check.id, finding.found))
        .collect()
}

#[test]
fn our_own_back_end_passes_every_check() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let mut options = VhostUserOptions::new(&path);
    options.queue_pairs = 2;
    options.in_band = true;
    options.postcopy = true;
    let echo = Echo::start(VhostUserPort::new(options, &control).unwrap());
    let findings = run(&path, PATIENCE, |_| true);
    for finding in &findings {
        eprintln!(
            "{:>8.0?} {} {:?}: {}",
            finding.took, finding.check.id, finding.outcome, finding.found
        );
    }
    assert_eq!(told(&findings, Outcome::Failed), [""; 0]);
    // One because this process is both ends.
    let not_applicable = told(&findings, Outcome::NotApplicable);
    assert!(not_applicable.len() <= 2, "{not_applicable:?}");
    echo.stop();
}

#[test]
fn a_back_end_that_moves_no_packets_is_found_out_and_the_rest_of_it_is_not_blamed() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let port = VhostUserPort::new(VhostUserOptions::new(&path), &control).unwrap();
    let findings = run(&path, Duration::from_millis(300), |id| {
        [
            "acknowledges",
            "takes-split",
            "base-is-kept",
            "returns-split",
        ]
        .contains(&id)
    });
    let outcomes = findings
        .iter()
        .map(|finding| (finding.check.id, finding.outcome));
    assert_eq!(
        outcomes.collect::<Vec<_>>(),
        [
            ("acknowledges", Outcome::Passed),
            ("base-is-kept", Outcome::Passed),
            ("takes-split", Outcome::Failed),
            ("returns-split", Outcome::NotApplicable),
        ]
    );
    assert!(
        findings[2].found.contains("of 32 frames 0 were taken"),
        "{}",
        findings[2].found
    );
    drop(port);
}

#[test]
fn a_back_end_may_have_a_pipe_of_its_own_for_its_state() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let (path, back_end) = (directory.join("between.sock"), directory.join("port.sock"));
    let port = VhostUserPort::new(VhostUserOptions::new(&back_end), &control).unwrap();
    let between = OtherPipe::start(&path, &back_end);
    let findings = run(&path, PATIENCE, |id| {
        ["state-is-moved", "state-cut-short", "state-of-no-kind"].contains(&id)
    });
    assert_eq!(told(&findings, Outcome::Passed).len(), 3, "{findings:?}");
    let moved = &findings[0].found;
    assert!(
        moved.contains("out through a pipe of its own, in through a pipe of its own"),
        "{moved}"
    );
    assert_eq!(between.exchanged(), 5);
    drop(port);
}

/// A back-end that answers every message with these bytes, and goes after `sessions`.
fn answers(path: &Path, answer: &'static [u8], sessions: usize) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().take(sessions) {
            let mut stream = stream.unwrap();
            let mut bytes = [0; 4096];
            while matches!(stream.read(&mut bytes), Ok(n) if n > 0) {
                if stream.write_all(answer).is_err() {
                    break;
                }
            }
        }
    })
}

#[test]
fn wrong_answers_silence_and_death_are_told_apart() {
    let directory = TempDir::new();
    let cases: [(&str, &'static [u8], &str); 3] = [
        (
            "flags",
            &[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            "flags 0x1",
        ),
        (
            "length",
            &[1, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0],
            "4 bytes",
        ),
        ("silence", &[], "was not answered within 50ms"),
    ];
    for (name, answer, says) in cases {
        let path = directory.join(name);
        let back_end = answers(&path, answer, 2);
        let findings = run(&path, Duration::from_millis(50), |id| {
            ["answer-form", "features-before-owner"].contains(&id)
        });
        let [form, next] = findings.as_slice() else {
            panic!("two checks were run")
        };
        assert_eq!(form.outcome, Outcome::Failed);
        assert!(form.found.contains(says), "{}", form.found);
        // A back-end that does not serve who behaves is not asked again.
        assert!(
            form.found.contains("afterwards nobody answers"),
            "{}",
            form.found
        );
        assert_eq!(next.outcome, Outcome::NotApplicable);
        back_end.join().unwrap();
    }
}

#[test]
fn every_check_has_a_name_of_its_own_and_says_what_it_demands() {
    let mut names: Vec<_> = checks().iter().map(|check| check.id).collect();
    for check in checks() {
        let plain = |text: &str| !text.is_empty() && !text.ends_with('.');
        assert!(plain(check.demand) && plain(check.source), "{}", check.id);
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(check.id.chars().all(letters), "{}", check.id);
    }
    let n = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), n);
}
