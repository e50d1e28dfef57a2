//! Puts somebody else's vhost-user back-end to the test: what the specifications demand of one, tried out one by one.
//!
//! A [`Check`] is one demand with its source. It runs in a session of its own (or a few), as a front-end that says what it means
//! to say, right or wrong (`Session`), with rings and buffers where packets are concerned (`Rig`). Every wait has an end, and
//! after every check somebody who behaves asks whether the back-end is still there. So one check costs the others nothing.
//!
//! It guarantees that the back-end gets nothing that could kill a process which maps what it is given and checks what it reads:
//! memory files are as long as they are said to be, and stay so.
//!
//! Reading order: `talk` has the messages, `device` what is told of the whole device, `memory` where it is, `rings` the states of a
//! ring, `traffic` the packets, `in_band` notifications without events, `in_flight` crashes, `migration` and `postcopy` moves to
//! other hosts, `iommu` translated addresses, `hostile` what no driver does.

mod device;
mod hostile;
mod in_band;
mod in_flight;
mod iommu;
mod memory;
mod migration;
mod postcopy;
mod rig;
mod rings;
mod session;
mod talk;
mod traffic;

use std::cell::Cell;
use std::fmt;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use virtnet_sys::Stream;
use virtnet_vhost::message::Request;
use virtnet_vhost::{ProtocolFeatures, SessionError};

use rig::{Rig, Shape};
use session::Session;

/// How much a specification insists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// MUST, or what cannot be done without.
    Must,
    /// SHOULD.
    Should,
}

/// One demand, and how to find out.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its name: lower case, words joined by `-`.
    pub id: &'static str,
    /// What is demanded, in a sentence.
    pub demand: &'static str,
    /// Who demands it: specification and section.
    pub source: &'static str,
    /// How much it is insisted on.
    pub level: Level,
    /// It sends what no correct front-end or driver sends.
    pub hostile: bool,
    run: fn(&Bench) -> Verdict,
}

impl Check {
    const fn must(
        id: &'static str,
        demand: &'static str,
        source: &'static str,
        run: fn(&Bench) -> Verdict,
    ) -> Self {
        Self {
            id,
            demand,
            source,
            level: Level::Must,
            hostile: false,
            run,
        }
    }

    const fn should(self) -> Self {
        Self {
            level: Level::Should,
            ..self
        }
    }

    const fn hostile(self) -> Self {
        Self {
            hostile: true,
            ..self
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Check({})", self.id)
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As demanded.
    Passed,
    /// Not as demanded.
    Failed,
    /// There was nothing to find out: the back-end does not offer it.
    NotApplicable,
}

impl Outcome {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::NotApplicable => "not applicable",
        }
    }
}

/// What a check has found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The check.
    pub check: &'static Check,
    /// How it ended.
    pub outcome: Outcome,
    /// What was seen, in words.
    pub found: String,
    /// How long it took.
    pub took: Duration,
}

/// All checks, in the order in which they make sense.
#[must_use]
pub fn checks() -> Vec<&'static Check> {
    let parts = [
        talk::CHECKS,
        device::CHECKS,
        memory::CHECKS,
        rings::CHECKS,
        traffic::CHECKS,
        in_band::CHECKS,
        in_flight::CHECKS,
        migration::CHECKS,
        postcopy::CHECKS,
        iommu::CHECKS,
        hostile::CHECKS,
    ];
    parts.into_iter().flatten().collect()
}

/// Finds out whether anybody listens there at all.
///
/// # Errors
/// Nobody does, or the path is none.
pub fn reach(path: &Path) -> Result<(), SessionError> {
    Ok(Stream::connect(path).map(drop)?)
}

/// A back-end on trial.
#[derive(Debug)]
pub struct Checker(Bench);

impl Checker {
    /// Looks at the back-end that listens on `path`; for nothing it is waited longer than `patience`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, patience: Duration) -> Self {
        Self(Bench {
            path: path.into(),
            patience,
            returns: Cell::new(None),
            gone: Cell::new(false),
        })
    }

    /// Tries one thing out.
    pub fn run(&mut self, check: &'static Check) -> Finding {
        let start = Instant::now();
        let bench = &self.0;
        let verdict = if bench.gone.get() {
            skipped("the back-end is gone since an earlier check")
        } else {
            bench.judge(check)
        };
        let (outcome, found) = match verdict {
            Ok(found) => (Outcome::Passed, found),
            Err(Stop::Failed(found)) => (Outcome::Failed, found),
            Err(Stop::Skipped(why)) => (Outcome::NotApplicable, why),
        };
        Finding {
            check,
            outcome,
            found,
            took: start.elapsed(),
        }
    }
}

/// What checks know of the back-end, and of each other.
#[derive(Debug)]
struct Bench {
    path: PathBuf,
    patience: Duration,
    /// Whether frames that it is sent come back to who sent them, once that was tried.
    returns: Cell<Option<bool>>,
    /// Nobody answers any more.
    gone: Cell<bool>,
}

impl Bench {
    fn judge(&self, check: &Check) -> Verdict {
        let verdict = (check.run)(self);
        let Err(Stop::Failed(why)) = self.greets() else {
            return verdict;
        };
        self.gone.set(true);
        let mut found = match verdict {
            Ok(found) | Err(Stop::Failed(found) | Stop::Skipped(found)) => found,
        };
        // Writing to a string does not fail.
        let _ = write!(found, "; afterwards nobody answers: {why}");
        Err(Stop::Failed(found))
    }

    /// Whether somebody who behaves is served.
    fn greets(&self) -> Result<(), Stop> {
        self.connect()?.number(&Request::GetFeatures).map(drop)
    }

    /// A connection on which nothing has been said.
    fn connect(&self) -> Result<Session, Stop> {
        Session::connect(&self.path, self.patience)
    }

    /// A session that knows what is offered, and has acknowledgements where they can be had.
    fn session(&self) -> Result<Session, Stop> {
        let mut session = self.connect()?;
        session.greet(rig::PROTOCOL)?;
        Ok(session)
    }

    /// A session with acknowledgements.
    fn acknowledged_session(&self) -> Result<Session, Stop> {
        let session = self.session()?;
        if session.acknowledges() {
            Ok(session)
        } else {
            skipped("REPLY_ACK is not offered, so a refusal cannot be told")
        }
    }

    /// A session that has agreed on these of the protocol's features as well.
    fn session_with(&self, features: ProtocolFeatures) -> Result<Session, Stop> {
        let mut session = self.connect()?;
        session.greet(rig::PROTOCOL | features)?;
        let missing = features - session.protocol;
        if missing.is_empty() {
            Ok(session)
        } else {
            skipped(format!("{} is not offered", missing.names().join(", ")))
        }
    }

    /// A session with memory and rings of which nothing has been told, that has agreed on these as well.
    fn rig_with(&self, shape: &Shape, features: ProtocolFeatures) -> Result<Rig, Stop> {
        Rig::new(self.session_with(features)?, shape)
    }

    /// A session with memory and rings of which nothing has been told.
    fn rig(&self, shape: &Shape) -> Result<Rig, Stop> {
        Rig::new(self.session()?, shape)
    }

    /// The same, with everything told and packets flowing.
    fn running(&self, shape: &Shape) -> Result<Rig, Stop> {
        let mut rig = self.rig(shape)?;
        rig.start()?;
        Ok(rig)
    }

    /// Goes on only if frames come back to who sent them.
    fn needs_return(&self) -> Result<(), Stop> {
        let returns = match self.returns.get() {
            Some(returns) => returns,
            None => {
                let returns = traffic::comes_back(self)?;
                self.returns.set(Some(returns));
                returns
            }
        };
        if returns {
            Ok(())
        } else {
            skipped(
                "frames do not come back: put an echo behind the back-end to check what it receives",
            )
        }
    }
}

/// Why a check did not pass.
#[derive(Debug)]
enum Stop {
    Failed(String),
    Skipped(String),
}

impl Stop {
    /// Something went wrong on our side.
    fn host(error: impl fmt::Display) -> Self {
        Self::Skipped(format!("this host is short of something: {error}"))
    }
}

type Verdict = Result<String, Stop>;

fn failed<T>(found: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Failed(found.into()))
}

fn skipped<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Skipped(why.into()))
}

/// Passes if it is so.
fn holds(is_so: bool, found: impl Into<String>) -> Verdict {
    if is_so {
        Ok(found.into())
    } else {
        failed(found)
    }
}
