//! Programs over the header fields of a burst: straight lines of steps, each of which computes one number for every packet.
//!
//! Numbers are those of numpy: whole, of 8 to 64 bits, with or without sign, or truth values. They wrap around where numpy's do, so that
//! a program gives what the same expressions give there. A program is checked once, when it is made: every step refers to earlier ones
//! only and names what exists. It ends after as many steps as it has, whatever packets it meets.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::FixedState;
use virtnet_packet::{BURST_MAX, Burst, Fields, Picks, Writable};

/// The most steps of a program.
const STEPS_MAX: usize = 1024;

/// One step as it is written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to do: the name of a column after `column:`, of a field after `write:`, or of an operation.
    pub op: String,
    /// The type of the result, as numpy calls it.
    pub dtype: String,
    /// Numbers of earlier steps; of `number` its value, of `member` and `lookup` also the number of a table.
    pub args: Vec<i128>,
}

/// What a number is looked up in: what is found for it, and what if it is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By key, in the type of the number that is looked up; the results in that of the step.
    pub entries: HashMap<u64, u64, FixedState>,
    /// For every other key.
    pub default: u64,
}

/// What is wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {at} of the program makes no sense: {what}")]
pub struct ProgramError {
    /// Which step.
    pub at: usize,
    /// What is wrong.
    pub what: String,
}

/// A program that was found to make sense.
#[derive(Clone, Debug)]
pub struct Program {
    steps: Arc<[Checked]>,
    tables: Arc<[Table]>,
    /// Whether it looks at headers at all, and whether it writes to any.
    writes: bool,
    /// The step whose results are the answer; without, every packet passes.
    answer: Option<usize>,
}

/// One number for each packet of a burst.
type Lane = [u64; BURST_MAX];

/// What the steps of a program have computed; numbers that are the same for all packets stand there from the start.
#[derive(Debug)]
pub(super) struct Registers {
    lanes: Vec<Lane>,
    fields: Vec<Fields>,
}

/// The headers of a burst's packets.
#[derive(Clone, Copy)]
enum Headers<'a> {
    /// All are of the usual kind: what they have is where it always is, and only what is asked for is looked at.
    Usual,
    /// Parsed, in the order of the picks.
    Parsed(&'a [Fields]),
}

/// A type of whole numbers. A number lies in 64 bits, filled up with its sign if it has one and with zeros if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Type {
    bits: u32,
    signed: bool,
}

impl Type {
    const BOOL: Self = Self {
        bits: 1,
        signed: false,
    };

    fn named(name: &str) -> Option<Self> {
        let of = |bits, signed| Some(Self { bits, signed });
        match name {
            "bool" => Some(Self::BOOL),
            "uint8" => of(8, false),
            "uint16" => of(16, false),
            "uint32" => of(32, false),
            "uint64" => of(64, false),
            "int8" => of(8, true),
            "int16" => of(16, true),
            "int32" => of(32, true),
            "int64" => of(64, true),
            _ => None,
        }
    }

    /// The number of this type that has the same low bits.
    #[inline]
    fn wrap(self, number: u64) -> u64 {
        let unused = 64 - self.bits;
        if self.signed {
            (number.cast_signed() << unused >> unused).cast_unsigned()
        } else {
            number << unused >> unused
        }
    }

    /// A number of another type in this one, as a cast in C does it.
    #[inline]
    fn cast(self, number: u64) -> u64 {
        if self == Self::BOOL {
            u64::from(number != 0)
        } else {
            self.wrap(number)
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Binary {
    Add,
    Subtract,
    Multiply,
    And,
    Or,
    Xor,
    ShiftLeft,
    ShiftRight,
    FloorDivide,
    Remainder,
    Minimum,
    Maximum,
}

#[derive(Clone, Copy, Debug)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

#[derive(Clone, Copy, Debug)]
enum Column {
    Length,
    EthDst,
    EthSrc,
    EthType,
    Vlan,
    IpVersion,
    IpProto,
    IpTtl,
    IpSrc,
    IpDst,
    Ip6Src(u32),
    Ip6Dst(u32),
    L4Src,
    L4Dst,
    TcpFlags,
    Payload,
}

/// What a step does; numbers of steps are below its own.
#[derive(Clone, Copy, Debug)]
enum Does {
    Column(Column),
    Number(u64),
    Binary(Binary, usize, usize),
    Compare(Comparison, usize, usize),
    Invert(usize),
    Negate(usize),
    Cast(usize),
    /// By the first, one of the others.
    Select(usize, usize, usize),
    Member(usize, usize),
    Lookup(usize, usize),
    Write(Writable, usize),
    Answer(usize),
}

#[derive(Clone, Copy, Debug)]
struct Checked {
    does: Does,
    of: Type,
}

impl Program {
    /// Checks a program.
    ///
    /// # Errors
    /// A step names what there is not, or a later one. The caller's fault.
    pub fn new(steps: &[Step], tables: Vec<Table>) -> Result<Self, ProgramError> {
        let wrong = |at, what: &str| ProgramError {
            at,
            what: what.to_owned(),
        };
        if steps.len() > STEPS_MAX {
            return Err(wrong(STEPS_MAX, "there are too many before it"));
        }
        let mut checked = Vec::with_capacity(steps.len());
        for (at, step) in steps.iter().enumerate() {
            let does = does(step, at, tables.len()).map_err(|what| wrong(at, what))?;
            let of = Type::named(&step.dtype).ok_or_else(|| wrong(at, "there is no such type"))?;
            let does = match does {
                Does::Number(number) => Does::Number(of.wrap(number)),
                other => other,
            };
            checked.push(Checked { does, of });
        }
        let mut answers = checked.iter().filter_map(|step| match step.does {
            Does::Answer(of) => Some(of),
            _ => None,
        });
        let answer = answers.next_back();
        Ok(Self {
            writes: checked
                .iter()
                .any(|step| matches!(step.does, Does::Write(..))),
            steps: checked.into(),
            tables: tables.into(),
            answer,
        })
    }

    pub(super) fn registers(&self) -> Registers {
        let number = |step: &Checked| match step.does {
            Does::Number(number) => number,
            _ => 0,
        };
        Registers {
            lanes: self
                .steps
                .iter()
                .map(|step| [number(step); BURST_MAX])
                .collect(),
            fields: Vec::with_capacity(BURST_MAX),
        }
    }

    pub(super) fn writes(&self) -> bool {
        self.writes
    }

    /// Runs on the picked packets, writes to them, and gives the answer for each, in their order; `None`: all pass.
    pub(super) fn run<'a>(
        &self,
        registers: &'a mut Registers,
        burst: &mut Burst,
        picks: &Picks,
    ) -> Option<&'a Lane> {
        let Registers { lanes, fields } = registers;
        let n = picks.len();
        let headers = match picks.iter().all(|i| Fields::is_usual(burst.head(i))) {
            true => Headers::Usual,
            false => {
                fields.clear();
                fields.extend(picks.iter().map(|i| Fields::parse(burst.head(i))));
                Headers::Parsed(fields)
            }
        };
        // Columns are what packets came with: all are read before any is written.
        for (step, out) in self.steps.iter().zip(lanes.iter_mut()) {
            if let Does::Column(column) = step.does {
                read(column, headers, burst, picks, &mut out[..n]);
            }
        }
        for (at, step) in self.steps.iter().enumerate() {
            let (before, rest) = lanes.split_at_mut(at);
            let Some(out) = rest.first_mut() else { break };
            let out = &mut out[..n];
            match step.does {
                Does::Column(_) | Does::Number(_) => {}
                Does::Binary(op, a, b) => binary(op, step.of, &before[a], &before[b], out),
                Does::Compare(op, a, b) => {
                    let types = (self.steps[a].of, self.steps[b].of);
                    compare(op, types, &before[a], &before[b], out);
                }
                Does::Invert(a) => each(&before[a], out, |a| step.of.wrap(!a)),
                Does::Negate(a) => each(&before[a], out, |a| step.of.wrap(a.wrapping_neg())),
                Does::Cast(a) => each(&before[a], out, |a| step.of.cast(a)),
                Does::Select(by, a, b) => {
                    let (by, a, b) = (&before[by], &before[a], &before[b]);
                    for (k, out) in out.iter_mut().enumerate() {
                        *out = step.of.wrap(if by[k] != 0 { a[k] } else { b[k] });
                    }
                }
                Does::Member(a, table) => {
                    let entries = &self.tables[table].entries;
                    each(&before[a], out, |a| u64::from(entries.contains_key(&a)));
                }
                Does::Lookup(a, table) => {
                    let table = &self.tables[table];
                    each(&before[a], out, |a| {
                        table.entries.get(&a).copied().unwrap_or(table.default)
                    });
                }
                Does::Write(field, a) => write(field, &before[a], burst, picks, headers),
                Does::Answer(_) => {}
            }
        }
        lanes.get(self.answer?)
    }
}

/// What a step is to do, if that makes sense for step number `at`.
fn does(step: &Step, at: usize, tables: usize) -> Result<Does, &'static str> {
    let arg = |k: usize| step.args.get(k).copied().ok_or("an argument is missing");
    let earlier = |k: usize| {
        let number = usize::try_from(arg(k)?).unwrap_or(usize::MAX);
        (number < at)
            .then_some(number)
            .ok_or("it refers to no earlier step")
    };
    let table = |k: usize| {
        let number = usize::try_from(arg(k)?).unwrap_or(usize::MAX);
        (number < tables)
            .then_some(number)
            .ok_or("it refers to no table")
    };
    if let Some(name) = step.op.strip_prefix("column:") {
        return column(name)
            .map(Does::Column)
            .ok_or("there is no such column");
    }
    if let Some(name) = step.op.strip_prefix("write:") {
        let field = Writable::named(name).filter(|field| !field.is_wide());
        let field = field.ok_or("there is no such field to write")?;
        return Ok(Does::Write(field, earlier(0)?));
    }
    let binary = |op| Ok(Does::Binary(op, earlier(0)?, earlier(1)?));
    let compare = |op| Ok(Does::Compare(op, earlier(0)?, earlier(1)?));
    match step.op.as_str() {
        "number" => {
            let number = arg(0)?;
            let unsigned = u64::try_from(number);
            let signed = || i64::try_from(number).map(i64::cast_unsigned);
            unsigned
                .or_else(|_| signed())
                .map(Does::Number)
                .map_err(|_| "a number has more than 64 bits")
        }
        "add" => binary(Binary::Add),
        "subtract" => binary(Binary::Subtract),
        "multiply" => binary(Binary::Multiply),
        "bitwise_and" => binary(Binary::And),
        "bitwise_or" => binary(Binary::Or),
        "bitwise_xor" => binary(Binary::Xor),
        "left_shift" => binary(Binary::ShiftLeft),
        "right_shift" => binary(Binary::ShiftRight),
        "floor_divide" => binary(Binary::FloorDivide),
        "remainder" => binary(Binary::Remainder),
        "minimum" => binary(Binary::Minimum),
        "maximum" => binary(Binary::Maximum),
        "equal" => compare(Comparison::Equal),
        "not_equal" => compare(Comparison::NotEqual),
        "less" => compare(Comparison::Less),
        "less_equal" => compare(Comparison::LessEqual),
        "greater" => compare(Comparison::Greater),
        "greater_equal" => compare(Comparison::GreaterEqual),
        "invert" => Ok(Does::Invert(earlier(0)?)),
        "negative" => Ok(Does::Negate(earlier(0)?)),
        "cast" => Ok(Does::Cast(earlier(0)?)),
        "where" => Ok(Does::Select(earlier(0)?, earlier(1)?, earlier(2)?)),
        "member" => Ok(Does::Member(earlier(0)?, table(1)?)),
        "lookup" => Ok(Does::Lookup(earlier(0)?, table(1)?)),
        "answer" => Ok(Does::Answer(earlier(0)?)),
        _ => Err("there is no such operation"),
    }
}

fn column(name: &str) -> Option<Column> {
    Some(match name {
        "length" => Column::Length,
        "eth_dst" => Column::EthDst,
        "eth_src" => Column::EthSrc,
        "eth_type" => Column::EthType,
        "vlan" => Column::Vlan,
        "ip_version" => Column::IpVersion,
        "ip_proto" => Column::IpProto,
        "ip_ttl" => Column::IpTtl,
        "ip_src" => Column::IpSrc,
        "ip_dst" => Column::IpDst,
        "ip6_src.0" => Column::Ip6Src(64),
        "ip6_src.1" => Column::Ip6Src(0),
        "ip6_dst.0" => Column::Ip6Dst(64),
        "ip6_dst.1" => Column::Ip6Dst(0),
        "l4_src" => Column::L4Src,
        "l4_dst" => Column::L4Dst,
        "tcp_flags" => Column::TcpFlags,
        "payload" => Column::Payload,
        _ => return None,
    })
}

fn read(column: Column, headers: Headers<'_>, burst: &Burst, picks: &Picks, out: &mut [u64]) {
    let half = |address: u128, shift: u32| {
        u64::try_from(address >> shift & u128::from(u64::MAX)).unwrap_or_default()
    };
    match column {
        Column::Length => {
            for (out, i) in out.iter_mut().zip(picks.iter()) {
                *out = burst.frame_len(i) as u64;
            }
        }
        Column::EthDst => fill(headers, burst, picks, out, |of| of.eth_dst),
        Column::EthSrc => fill(headers, burst, picks, out, |of| of.eth_src),
        Column::EthType => fill(headers, burst, picks, out, |of| of.eth_type.into()),
        Column::Vlan => fill(headers, burst, picks, out, |of| {
            i64::from(of.vlan).cast_unsigned()
        }),
        Column::IpVersion => fill(headers, burst, picks, out, |of| of.ip_version.into()),
        Column::IpProto => fill(headers, burst, picks, out, |of| of.ip_proto.into()),
        Column::IpTtl => fill(headers, burst, picks, out, |of| of.ip_ttl.into()),
        Column::IpSrc => fill(headers, burst, picks, out, |of| of.ip_src.into()),
        Column::IpDst => fill(headers, burst, picks, out, |of| of.ip_dst.into()),
        Column::Ip6Src(shift) => fill(headers, burst, picks, out, |of| half(of.ip6_src, shift)),
        Column::Ip6Dst(shift) => fill(headers, burst, picks, out, |of| half(of.ip6_dst, shift)),
        Column::L4Src => fill(headers, burst, picks, out, |of| of.l4_src.into()),
        Column::L4Dst => fill(headers, burst, picks, out, |of| of.l4_dst.into()),
        Column::TcpFlags => fill(headers, burst, picks, out, |of| of.tcp_flags.into()),
        Column::Payload => fill(headers, burst, picks, out, |of| of.payload.into()),
    }
}

/// Writes a field of each packet that has it: a loop of its own for each.
fn write(field: Writable, values: &Lane, burst: &mut Burst, picks: &Picks, headers: Headers<'_>) {
    match field {
        Writable::EthDst => write_one(Writable::EthDst, values, burst, picks, headers),
        Writable::EthSrc => write_one(Writable::EthSrc, values, burst, picks, headers),
        Writable::Vlan => write_one(Writable::Vlan, values, burst, picks, headers),
        Writable::IpTtl => write_one(Writable::IpTtl, values, burst, picks, headers),
        Writable::IpSrc => write_one(Writable::IpSrc, values, burst, picks, headers),
        Writable::IpDst => write_one(Writable::IpDst, values, burst, picks, headers),
        Writable::L4Src => write_one(Writable::L4Src, values, burst, picks, headers),
        Writable::L4Dst => write_one(Writable::L4Dst, values, burst, picks, headers),
        // No program has 128 bits.
        Writable::Ip6Src | Writable::Ip6Dst => {}
    }
}

#[inline(always)]
fn write_one(
    field: Writable,
    values: &Lane,
    burst: &mut Burst,
    picks: &Picks,
    headers: Headers<'_>,
) {
    let values = values.iter().zip(picks.iter());
    match headers {
        Headers::Usual => {
            for (&value, i) in values {
                let offload = burst.offload(i);
                if let Some(head) = burst.head_mut(i).first_chunk_mut() {
                    let fields = Fields::at_usual_places(head);
                    field.write_to(head, &fields, &offload, value.into());
                }
            }
        }
        Headers::Parsed(fields) => {
            for ((&value, i), fields) in values.zip(fields) {
                let offload = burst.offload(i);
                field.write_to(burst.head_mut(i), fields, &offload, value.into());
            }
        }
    }
}

/// A loop of its own for each field.
#[inline]
fn fill(
    headers: Headers<'_>,
    burst: &Burst,
    picks: &Picks,
    out: &mut [u64],
    field: impl Fn(&Fields) -> u64,
) {
    match headers {
        Headers::Usual => {
            for (out, i) in out.iter_mut().zip(picks.iter()) {
                if let Some(head) = burst.head(i).first_chunk() {
                    *out = field(&Fields::at_usual_places(head));
                }
            }
        }
        Headers::Parsed(fields) => {
            for (out, fields) in out.iter_mut().zip(fields) {
                *out = field(fields);
            }
        }
    }
}

#[inline]
fn each(a: &Lane, out: &mut [u64], f: impl Fn(u64) -> u64) {
    for (out, &a) in out.iter_mut().zip(a) {
        *out = f(a);
    }
}

#[inline]
fn both(a: &Lane, b: &Lane, out: &mut [u64], f: impl Fn(u64, u64) -> u64) {
    for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = f(a, b);
    }
}

fn binary(op: Binary, of: Type, a: &Lane, b: &Lane, out: &mut [u64]) {
    let signed = |number: u64| number.cast_signed();
    match op {
        Binary::Add => both(a, b, out, |a, b| of.wrap(a.wrapping_add(b))),
        Binary::Subtract => both(a, b, out, |a, b| of.wrap(a.wrapping_sub(b))),
        Binary::Multiply => both(a, b, out, |a, b| of.wrap(a.wrapping_mul(b))),
        Binary::And => both(a, b, out, |a, b| of.wrap(a & b)),
        Binary::Or => both(a, b, out, |a, b| of.wrap(a | b)),
        Binary::Xor => both(a, b, out, |a, b| of.wrap(a ^ b)),
        Binary::ShiftLeft => both(a, b, out, |a, b| {
            // A negative distance is a very large one.
            let distance = u32::try_from(of.wrap(b)).unwrap_or(u32::MAX);
            if distance < of.bits {
                of.wrap(a << distance)
            } else {
                0
            }
        }),
        Binary::ShiftRight => both(a, b, out, |a, b| {
            let distance = u32::try_from(of.wrap(b)).unwrap_or(u32::MAX);
            let a = of.wrap(a);
            match (of.signed, distance < of.bits) {
                (false, true) => a >> distance,
                (false, false) => 0,
                (true, true) => of.wrap((signed(a) >> distance).cast_unsigned()),
                (true, false) => (signed(a) >> 63).cast_unsigned(),
            }
        }),
        Binary::FloorDivide => both(a, b, out, |a, b| match (of.wrap(a), of.wrap(b)) {
            (_, 0) => 0,
            (a, b) if !of.signed => a / b,
            (a, b) => {
                let (a, b) = (signed(a), signed(b));
                let quotient = a.wrapping_div(b);
                let is_between = a.wrapping_rem(b) != 0 && (a < 0) != (b < 0);
                of.wrap(quotient.wrapping_sub(i64::from(is_between)).cast_unsigned())
            }
        }),
        Binary::Remainder => both(a, b, out, |a, b| match (of.wrap(a), of.wrap(b)) {
            (_, 0) => 0,
            (a, b) if !of.signed => a % b,
            (a, b) => {
                let (a, b) = (signed(a), signed(b));
                let rest = a.wrapping_rem(b);
                let is_other_side = rest != 0 && (rest < 0) != (b < 0);
                (rest + if is_other_side { b } else { 0 }).cast_unsigned()
            }
        }),
        Binary::Minimum if of.signed => {
            both(a, b, out, |a, b| signed(a).min(signed(b)).cast_unsigned())
        }
        Binary::Maximum if of.signed => {
            both(a, b, out, |a, b| signed(a).max(signed(b)).cast_unsigned())
        }
        Binary::Minimum => both(a, b, out, u64::min),
        Binary::Maximum => both(a, b, out, u64::max),
    }
}

/// Compares what the numbers are, whatever their types.
fn compare(op: Comparison, (a_is, b_is): (Type, Type), a: &Lane, b: &Lane, out: &mut [u64]) {
    // All but large numbers without sign are the same with one.
    let is_small = |of: Type| of.signed || of.bits < 64;
    if is_small(a_is) && is_small(b_is) {
        ordered(op, a, b, out, u64::cast_signed, u64::cast_signed);
    } else if !a_is.signed && !b_is.signed {
        ordered(op, a, b, out, |a| a, |b| b);
    } else {
        let whole = |of: Type| {
            move |number: u64| {
                if of.signed {
                    i128::from(number.cast_signed())
                } else {
                    i128::from(number)
                }
            }
        };
        ordered(op, a, b, out, whole(a_is), whole(b_is));
    }
}

#[inline]
fn ordered<T: Ord>(
    op: Comparison,
    a: &Lane,
    b: &Lane,
    out: &mut [u64],
    left: impl Fn(u64) -> T,
    right: impl Fn(u64) -> T,
) {
    match op {
        Comparison::Equal => both(a, b, out, |a, b| u64::from(left(a) == right(b))),
        Comparison::NotEqual => both(a, b, out, |a, b| u64::from(left(a) != right(b))),
        Comparison::Less => both(a, b, out, |a, b| u64::from(left(a) < right(b))),
        Comparison::LessEqual => both(a, b, out, |a, b| u64::from(left(a) <= right(b))),
        Comparison::Greater => both(a, b, out, |a, b| u64::from(left(a) > right(b))),
        Comparison::GreaterEqual => both(a, b, out, |a, b| u64::from(left(a) >= right(b))),
    }
}
