//! Filters: programs of the classic Berkeley Packet Filter, as libpcap compiles them from `tcp port 80`.
//!
//! A program looks at the first bytes of a frame and answers with a number; anything but 0 is a match. It is checked once, when
//! it is made: jumps lead forward and inside, the last instruction ends it, every number it names exists. So running it needs
//! no further care and ends after as many steps as it has instructions. What it asks for beyond the bytes there are is no
//! match.
//!
//! Source: McCanne and Jacobson, The BSD Packet Filter (1993); linux/filter.h for the numbers.

/// One instruction, in the form of `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip if the condition holds.
    pub jt: u8,
    /// And if it does not.
    pub jf: u8,
    /// A number that goes with it.
    pub k: u32,
}

/// A program that was found to make sense. Without instructions it matches everything.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    steps: Box<[Step]>,
}

/// What is wrong with a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("instruction {at} of the filter makes no sense (code {code:#06x})")]
pub struct FilterError {
    /// Which instruction.
    pub at: usize,
    /// Its code.
    pub code: u16,
}

/// Cells of scratch memory.
const MEMORY: usize = 16;

/// The most instructions, as in the kernel.
const LENGTH_MAX: usize = 4096;

#[derive(Clone, Copy, Debug)]
enum Step {
    Load(Size, Place),
    LoadLength,
    LoadNumber(u32),
    LoadCell(usize),
    LoadIndexNumber(u32),
    LoadIndexCell(usize),
    LoadIndexLength,
    /// Four times the low half of a byte: the length of an IPv4 header.
    LoadIndexHeader(u32),
    StoreCell(usize),
    StoreIndexCell(usize),
    Compute(Operation, Operand),
    Negate,
    Jump(usize),
    JumpIf(Condition, Operand, usize, usize),
    /// Most of what filters do, in one: loads from a place, and jumps if that is equal to a number.
    LoadAndJumpIfEqual(Size, u32, u32, u16, u16),
    Return(u32),
    ReturnAccumulator,
    ToIndex,
    ToAccumulator,
}

#[derive(Clone, Copy, Debug)]
enum Size {
    Word,
    Half,
    Byte,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    At(u32),
    /// That much behind what the index register says.
    Behind(u32),
}

#[derive(Clone, Copy, Debug)]
enum Operand {
    Number(u32),
    Index,
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
    Or,
    And,
    Xor,
    ShiftLeft,
    ShiftRight,
}

#[derive(Clone, Copy, Debug)]
enum Condition {
    Equal,
    Greater,
    GreaterOrEqual,
    AnyBit,
}

impl Filter {
    /// Takes a program.
    ///
    /// # Errors
    /// [`FilterError`], for the first instruction that makes no sense.
    pub fn new(program: &[Instruction]) -> Result<Self, FilterError> {
        let mut steps = Vec::with_capacity(program.len());
        for (at, instruction) in program.iter().enumerate() {
            let code = instruction.code;
            let left = program.len() - at - 1;
            let step = step(*instruction, at, left).filter(|_| at < LENGTH_MAX);
            steps.push(step.ok_or(FilterError { at, code })?);
        }
        if let Some(last) = program.last()
            && !matches!(
                steps.last(),
                Some(Step::Return(_) | Step::ReturnAccumulator)
            )
        {
            let at = program.len() - 1;
            return Err(FilterError {
                at,
                code: last.code,
            });
        }
        join(&mut steps);
        Ok(Self {
            steps: steps.into(),
        })
    }

    /// Whether a frame matches, of which `head` are the first bytes of `frame_len`.
    #[must_use]
    pub fn matches(&self, head: &[u8], frame_len: usize) -> bool {
        self.steps.is_empty() || self.run(head, frame_len).unwrap_or(0) != 0
    }

    fn run(&self, head: &[u8], frame_len: usize) -> Option<u32> {
        let length = u32::try_from(frame_len).unwrap_or(u32::MAX);
        let (mut a, mut x, mut cells) = (0_u32, 0_u32, [0_u32; MEMORY]);
        let mut at = 0;
        loop {
            let step = *self.steps.get(at)?;
            at += 1;
            match step {
                Step::Load(size, place) => a = load(head, size, place, x)?,
                Step::LoadLength => a = length,
                Step::LoadNumber(k) => a = k,
                Step::LoadCell(cell) => a = cells[cell],
                Step::LoadIndexNumber(k) => x = k,
                Step::LoadIndexCell(cell) => x = cells[cell],
                Step::LoadIndexLength => x = length,
                Step::LoadIndexHeader(k) => {
                    x = 4 * (load(head, Size::Byte, Place::At(k), x)? & 0x0f);
                }
                Step::StoreCell(cell) => cells[cell] = a,
                Step::StoreIndexCell(cell) => cells[cell] = x,
                Step::Compute(operation, operand) => a = compute(operation, a, operand.value(x))?,
                Step::Negate => a = a.wrapping_neg(),
                Step::Jump(target) => at = target,
                Step::JumpIf(condition, operand, yes, no) => {
                    at = if condition.holds(a, operand.value(x)) {
                        yes
                    } else {
                        no
                    };
                }
                Step::LoadAndJumpIfEqual(size, place, number, yes, no) => {
                    a = load(head, size, Place::At(place), x)?;
                    at = usize::from(if a == number { yes } else { no });
                }
                Step::Return(k) => return Some(k),
                Step::ReturnAccumulator => return Some(a),
                Step::ToIndex => x = a,
                Step::ToAccumulator => a = x,
            }
        }
    }
}

/// Makes one step of a load and the comparison behind it. The comparison stays where it is, for those who jump there.
fn join(steps: &mut [Step]) {
    for at in 1..steps.len() {
        if let (
            Step::Load(size, Place::At(place)),
            Step::JumpIf(Condition::Equal, Operand::Number(number), yes, no),
        ) = (steps[at - 1], steps[at])
            && let (Ok(yes), Ok(no)) = (u16::try_from(yes), u16::try_from(no))
        {
            steps[at - 1] = Step::LoadAndJumpIfEqual(size, place, number, yes, no);
        }
    }
}

impl Operand {
    #[inline]
    fn value(self, x: u32) -> u32 {
        match self {
            Self::Number(k) => k,
            Self::Index => x,
        }
    }
}

impl Condition {
    fn holds(self, a: u32, b: u32) -> bool {
        match self {
            Self::Equal => a == b,
            Self::Greater => a > b,
            Self::GreaterOrEqual => a >= b,
            Self::AnyBit => a & b != 0,
        }
    }
}

#[inline]
fn load(head: &[u8], size: Size, place: Place, x: u32) -> Option<u32> {
    let start = match place {
        Place::At(k) => k,
        Place::Behind(k) => k.checked_add(x)?,
    };
    let bytes = head.get(usize::try_from(start).ok()?..)?;
    Some(match size {
        Size::Word => u32::from_be_bytes(*bytes.first_chunk()?),
        Size::Half => u16::from_be_bytes(*bytes.first_chunk()?).into(),
        Size::Byte => u32::from(*bytes.first()?),
    })
}

fn compute(operation: Operation, a: u32, b: u32) -> Option<u32> {
    Some(match operation {
        Operation::Add => a.wrapping_add(b),
        Operation::Subtract => a.wrapping_sub(b),
        Operation::Multiply => a.wrapping_mul(b),
        Operation::Divide => a.checked_div(b)?,
        Operation::Remainder => a.checked_rem(b)?,
        Operation::Or => a | b,
        Operation::And => a & b,
        Operation::Xor => a ^ b,
        Operation::ShiftLeft => a.checked_shl(b).unwrap_or(0),
        Operation::ShiftRight => a.checked_shr(b).unwrap_or(0),
    })
}

/// What instruction number `at`, behind which there are `left` others, means.
fn step(instruction: Instruction, at: usize, left: usize) -> Option<Step> {
    let Instruction { code, jt, jf, k } = instruction;
    let number = k;
    let cell = || usize::try_from(k).ok().filter(|&cell| cell < MEMORY);
    let target = |skip: usize| (skip < left).then_some(at + 1 + skip);
    let operand = if code & 0x08 == 0 {
        Operand::Number(k)
    } else {
        Operand::Index
    };
    let (class, size, mode) = (code & 0x07, code & 0x18, code & 0xe0);
    Some(match (class, mode) {
        // ld, ldx
        (0, 0x20 | 0x40) => {
            let size = match size {
                0x00 => Size::Word,
                0x08 => Size::Half,
                0x10 => Size::Byte,
                _ => return None,
            };
            let place = if mode == 0x20 {
                Place::At(k)
            } else {
                Place::Behind(k)
            };
            Step::Load(size, place)
        }
        (0, 0x00) if size == 0 => Step::LoadNumber(number),
        (0, 0x60) if size == 0 => Step::LoadCell(cell()?),
        (0, 0x80) if size == 0 => Step::LoadLength,
        (1, 0x00) if size == 0 => Step::LoadIndexNumber(number),
        (1, 0x60) if size == 0 => Step::LoadIndexCell(cell()?),
        (1, 0x80) if size == 0 => Step::LoadIndexLength,
        (1, 0xa0) if size == 0x10 => Step::LoadIndexHeader(k),
        // st, stx
        (2, 0) if size == 0 => Step::StoreCell(cell()?),
        (3, 0) if size == 0 => Step::StoreIndexCell(cell()?),
        // alu
        (4, _) if code & 0xf0 == 0x80 => Step::Negate,
        (4, _) => {
            let operation = match code & 0xf0 {
                0x00 => Operation::Add,
                0x10 => Operation::Subtract,
                0x20 => Operation::Multiply,
                0x30 => Operation::Divide,
                0x40 => Operation::Or,
                0x50 => Operation::And,
                0x60 => Operation::ShiftLeft,
                0x70 => Operation::ShiftRight,
                0x90 => Operation::Remainder,
                0xa0 => Operation::Xor,
                _ => return None,
            };
            let divides = matches!(operation, Operation::Divide | Operation::Remainder);
            if divides && matches!(operand, Operand::Number(0)) {
                return None;
            }
            Step::Compute(operation, operand)
        }
        // jmp
        (5, 0x00) if code == 0x05 => Step::Jump(target(usize::try_from(k).ok()?)?),
        (5, _) => {
            let condition = match code & 0xf0 {
                0x10 => Condition::Equal,
                0x20 => Condition::Greater,
                0x30 => Condition::GreaterOrEqual,
                0x40 => Condition::AnyBit,
                _ => return None,
            };
            Step::JumpIf(condition, operand, target(jt.into())?, target(jf.into())?)
        }
        // ret
        (6, 0) if size == 0 => Step::Return(k),
        (6, 0) if size == 0x10 => Step::ReturnAccumulator,
        // misc
        (7, 0x00) if code == 0x07 => Step::ToIndex,
        (7, 0x80) if code == 0x87 => Step::ToAccumulator,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn op(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
        Instruction { code, jt, jf, k }
    }

    /// `ip and udp port 53`, as libpcap 1.10 compiles it for Ethernet.
    const DNS: [Instruction; 13] = [
        op(0x28, 0, 0, 12),
        op(0x15, 0, 10, 2048),
        op(0x30, 0, 0, 23),
        op(0x15, 0, 8, 17),
        op(0x28, 0, 0, 20),
        op(0x45, 6, 0, 8191),
        op(0xb1, 0, 0, 14),
        op(0x48, 0, 0, 14),
        op(0x15, 2, 0, 53),
        op(0x48, 0, 0, 16),
        op(0x15, 0, 1, 53),
        op(0x06, 0, 0, 262144),
        op(0x06, 0, 0, 0),
    ];

    fn datagram(to_port: u16) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[36..38].copy_from_slice(&to_port.to_be_bytes());
        frame
    }

    #[test]
    fn a_program_of_libpcap_finds_what_it_was_written_for() {
        let filter = Filter::new(&DNS).unwrap();
        assert!(filter.matches(&datagram(53), 60));
        assert!(!filter.matches(&datagram(54), 60));
        let mut fragment = datagram(53);
        fragment[21] = 1;
        assert!(!filter.matches(&fragment, 60));
        assert!(!filter.matches(&datagram(53)[..30], 30), "cut off");
        assert!(!filter.matches(&[], 0));
    }

    #[test]
    fn no_program_matches_everything() {
        assert!(Filter::default().matches(&[], 0));
    }

    #[test]
    fn every_operation_computes_as_it_should() {
        let cases: [(u16, u32, u32, u32); 11] = [
            (0x04, 7, 5, 12),
            (0x14, 5, 7, u32::MAX - 1),
            (0x24, 7, 5, 35),
            (0x34, 17, 5, 3),
            (0x94, 17, 5, 2),
            (0x44, 6, 3, 7),
            (0x54, 6, 3, 2),
            (0xa4, 6, 3, 5),
            (0x64, 1, 33, 0),
            (0x64, 1, 3, 8),
            (0x74, 8, 2, 2),
        ];
        for (code, a, b, expected) in cases {
            let same = |test: Instruction| {
                let program = [
                    op(0x01, 0, 0, b),
                    op(0x00, 0, 0, a),
                    test,
                    op(0x15, 0, 1, expected),
                    op(0x06, 0, 0, 1),
                    op(0x06, 0, 0, 0),
                ];
                Filter::new(&program).unwrap().matches(&[], 0)
            };
            assert!(same(op(code, 0, 0, b)), "{code:#x} {a} {b}");
            assert!(same(op(code | 0x08, 0, 0, 0)), "{code:#x} {a} x={b}");
        }
        // Division by an index register that is 0 ends the program without a match.
        let program = [op(0x00, 0, 0, 1), op(0x3c, 0, 0, 0), op(0x06, 0, 0, 1)];
        assert!(!Filter::new(&program).unwrap().matches(&[], 0));
    }

    #[test]
    fn what_makes_no_sense_is_refused_where_it_stands() {
        let ret = op(0x06, 0, 0, 1);
        let cases: [(&[Instruction], usize); 8] = [
            (&[op(0x00, 0, 0, 1)], 0),
            (&[op(0x05, 0, 0, 1), ret], 0),
            (&[op(0x05, 0, 0, u32::MAX), ret], 0),
            (&[op(0x15, 0, 1, 1), ret], 0),
            (&[ret, op(0x60, 0, 0, 16), ret], 1),
            (&[op(0x34, 0, 0, 0), ret], 0),
            (&[op(0x99, 0, 0, 0), ret], 0),
            (&[op(0x38, 0, 0, 0), ret], 0),
        ];
        for (program, at) in cases {
            assert_eq!(Filter::new(program).unwrap_err().at, at, "{program:?}");
        }
        let long = vec![ret; LENGTH_MAX + 1];
        assert_eq!(Filter::new(&long).unwrap_err().at, LENGTH_MAX);
    }

    proptest::proptest! {
        #[test]
        fn no_program_that_was_taken_panics_or_runs_for_ever(
            program in proptest::collection::vec(
                (0_u16..0x100, 0_u8..6, 0_u8..6, proptest::prop_oneof![0_u32..70, proptest::num::u32::ANY]),
                0..40,
            ),
            head in proptest::collection::vec(0_u8.., 0..64),
        ) {
            let mut program: Vec<_> = program.into_iter().map(|(code, jt, jf, k)| op(code, jt, jf, k)).collect();
            // As many of them as can be taken one by one.
            program.retain(|one| step(*one, 0, 40).is_some());
            program.push(op(0x06, 0, 0, 1));
            if let Ok(filter) = Filter::new(&program) {
                let _ = filter.matches(&head, head.len());
            }
        }
    }
}
