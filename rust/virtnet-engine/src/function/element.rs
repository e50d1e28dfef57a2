//! An element: a small program that decides on packets by their header fields, and may write some.

mod program;
#[cfg(test)]
mod tests;

use virtnet_packet::{Burst, DropReason, Picks};

pub use program::{Program, ProgramError, Step, Table};

use super::{Fate, Fates, Verdict};
use crate::graph::Gate;
use program::Registers;

/// The first gate that packets can be sent to beside those they pass between.
const ELSEWHERE: Gate = 2;

/// Runs a program on what passes between gate 0 and gate 1. It answers 0 to drop a packet, 1 to let it pass, and a number from 2 on
/// for the gate of that number; what comes in by such a gate ends here.
#[derive(Debug)]
pub struct Element {
    program: Program,
    registers: Registers,
}

impl Element {
    /// An element that runs `program`.
    #[must_use]
    pub fn new(program: Program) -> Self {
        Self {
            registers: program.registers(),
            program,
        }
    }

    /// The same for another worker.
    pub(super) fn part(&self) -> Self {
        Self::new(self.program.clone())
    }

    /// Takes a new program and gives back the old one.
    pub(super) fn order(&mut self, program: Program) -> Self {
        std::mem::replace(self, Self::new(program))
    }

    /// Whether it writes to packets.
    pub(super) fn writes(&self) -> bool {
        self.program.writes()
    }

    pub(super) fn classify(
        &mut self,
        burst: &mut Burst,
        picks: &Picks,
        came_in_by: Gate,
        fates: &mut Fates,
    ) -> Verdict {
        if came_in_by >= ELSEWHERE {
            return Verdict::All(Fate::Consumed);
        }
        let pass = Fate::To(came_in_by ^ 1);
        let Some(answers) = self.program.run(&mut self.registers, burst, picks) else {
            return Verdict::All(pass);
        };
        let answers = &answers[..picks.len()];
        let decide = |answer| match answer {
            0 => Fate::Drop(DropReason::Filtered),
            1 => pass,
            // A gate that there cannot be has no cable, which is counted there.
            gate => Fate::To(Gate::try_from(gate).unwrap_or(Gate::MAX)),
        };
        // Mostly all packets pass.
        if let Some((&first, others)) = answers.split_first()
            && others.iter().all(|&other| other == first)
        {
            return Verdict::All(decide(first));
        }
        for (fate, &answer) in fates.iter_mut().zip(answers) {
            *fate = decide(answer);
        }
        Verdict::Each
    }
}
