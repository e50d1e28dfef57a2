//! Longest prefix match: a trie of 64-way nodes that are as small as what is in them.
//!
//! An address finds its place in a table of its first 18 bits, and goes on from there 6 bits at a time. A node holds two words
//! in which bits are counted: which of its 64 ways go deeper, and where among the others a new answer begins (the layout is
//! that of Poptrie, SIGCOMM 2015). So a million routes lie in a few megabytes, a /24 is at most two steps away and a /48 six,
//! and a table is never changed: another one is made beside it.

/// Bits that the first step looks at: the steps behind it end at /24, /30 and /48.
const ROOT_BITS: u32 = 18;
/// Bits that every other step looks at.
const STEP_BITS: u32 = 6;
/// In the root: what follows is the number of a node.
const DEEPER: u32 = 1 << 31;

/// What addresses lead to; 0 is nowhere.
pub(super) type Answer = u32;

/// A prefix of an address that begins at the highest bit, and where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    pub(super) bits: u128,
    pub(super) len: u32,
    pub(super) answer: Answer,
}

impl Prefix {
    /// Without the bits behind its length.
    pub(super) fn new(bits: u128, len: u32, answer: Answer) -> Self {
        let kept = u128::MAX.checked_shl(128 - len.min(128)).unwrap_or(0);
        Self {
            bits: bits & kept,
            len: len.min(128),
            answer,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// Ways that go deeper.
    deeper: u64,
    /// Ways, of those that do not, whose answer is another one than that of the last before.
    changes: u64,
    first_node: u32,
    first_answer: u32,
}

/// Prefixes of addresses, looked up by the longest that fits.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    root: Vec<u32>,
    nodes: Vec<Node>,
    answers: Vec<Answer>,
    len: usize,
}

impl Prefixes {
    /// Makes a table; of equal prefixes the last one counts.
    pub(super) fn new(mut prefixes: Vec<Prefix>) -> Self {
        // Stable: what covers stands before what it covers, and of equal ones the last is last.
        prefixes.sort_by_key(|prefix| (prefix.bits, prefix.len));
        let mut table = Self {
            len: prefixes.len(),
            ..Self::default()
        };
        if prefixes.is_empty() {
            return table;
        }
        let mut root = vec![0; 1 << ROOT_BITS];
        let below = fill(&mut root, &prefixes, 0, ROOT_BITS);
        for (way, inside) in below {
            let node = table.nodes.len();
            table.nodes.push(Node::default());
            table.nodes[node] = table.node(inside, ROOT_BITS, root[way]);
            root[way] = DEEPER | number(node);
        }
        table.root = root;
        table
    }

    /// How many prefixes there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// A node for `prefixes`, which are longer than `depth` and have that many bits in common.
    fn node(&mut self, prefixes: &[Prefix], depth: u32, around: Answer) -> Node {
        let mut ways = [around; 1 << STEP_BITS];
        let below = fill(&mut ways, prefixes, depth, STEP_BITS);
        let mut node = Node {
            first_node: number(self.nodes.len()),
            first_answer: number(self.answers.len()),
            ..Node::default()
        };
        for &(way, _) in &below {
            node.deeper |= 1 << way;
        }
        let mut last = None;
        for (way, &answer) in ways.iter().enumerate() {
            if node.deeper & 1 << way == 0 && last != Some(answer) {
                node.changes |= 1 << way;
                self.answers.push(answer);
                last = Some(answer);
            }
        }
        let first = self.nodes.len();
        self.nodes.resize(first + below.len(), Node::default());
        for (k, (way, inside)) in below.into_iter().enumerate() {
            self.nodes[first + k] = self.node(inside, depth + STEP_BITS, ways[way]);
        }
        node
    }

    /// The answer of the longest prefix that `address` begins with.
    #[inline]
    pub(super) fn find(&self, address: u128) -> Answer {
        self.walk(|depth, step| way(address, depth, step))
    }

    /// The same where no prefix is longer than 32 bits, which those of the address are.
    #[inline]
    pub(super) fn find_short(&self, address: u32) -> Answer {
        let address = u64::from(address) << 32;
        self.walk(|depth, step| {
            usize::try_from((address << depth) >> (64 - step)).unwrap_or_default()
        })
    }

    #[inline]
    fn walk(&self, way: impl Fn(u32, u32) -> usize) -> Answer {
        let Some(&entry) = self.root.get(way(0, ROOT_BITS)) else {
            return 0;
        };
        if entry & DEEPER == 0 {
            return entry;
        }
        let mut node = &self.nodes[(entry & !DEEPER) as usize];
        let mut depth = ROOT_BITS;
        loop {
            let way = way(depth, STEP_BITS);
            // Bits up to and with this way's.
            let up_to = u64::MAX >> (63 - way);
            if node.deeper >> way & 1 == 0 {
                let nth = (node.changes & up_to).count_ones();
                return self.answers[(node.first_answer + nth - 1) as usize];
            }
            let nth = (node.deeper & up_to).count_ones();
            node = &self.nodes[(node.first_node + nth - 1) as usize];
            depth += STEP_BITS;
        }
    }
}

/// Writes into `ways`, which tell `step` bits from `depth` on apart, what `prefixes` say that end there, and gives the ways
/// that have longer ones, with those.
fn fill<'a>(
    ways: &mut [Answer],
    prefixes: &'a [Prefix],
    depth: u32,
    step: u32,
) -> Vec<(usize, &'a [Prefix])> {
    let mut below: Vec<(usize, &[Prefix])> = Vec::new();
    let mut at = 0;
    while let Some(prefix) = prefixes.get(at) {
        let first = way(prefix.bits, depth, step);
        if prefix.len <= depth + step {
            let n = 1 << (depth + step - prefix.len);
            ways[first..first + n].fill(prefix.answer);
            at += 1;
            continue;
        }
        let rest = &prefixes[at..];
        let n = rest.partition_point(|other| way(other.bits, depth, step) == first);
        below.push((first, &rest[..n]));
        at += n;
    }
    below
}

/// The `step` bits of an address behind the first `depth`.
#[inline]
fn way(address: u128, depth: u32, step: u32) -> usize {
    // Fewer than 64 bits, since `step` is below that.
    usize::try_from((address << depth) >> (128 - step)).unwrap_or_default()
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The answer by looking at all of them.
    fn slowly(prefixes: &[Prefix], address: u128) -> Answer {
        let fitting = prefixes
            .iter()
            .filter(|prefix| Prefix::new(address, prefix.len, 0).bits == prefix.bits);
        // Of equal ones, the last.
        fitting
            .max_by_key(|prefix| prefix.len)
            .map_or(0, |prefix| prefix.answer)
    }

    #[test]
    fn nothing_leads_nowhere_and_everything_can_lead_somewhere() {
        assert_eq!(Prefixes::new(Vec::new()).find(7), 0);
        let all = Prefixes::new(vec![Prefix::new(0, 0, 9)]);
        assert_eq!((all.find(0), all.find(u128::MAX)), (9, 9));
        let one = Prefixes::new(vec![
            Prefix::new(u128::MAX, 128, 3),
            Prefix::new(u128::MAX, 127, 2),
        ]);
        assert_eq!(one.find(u128::MAX), 3);
        assert_eq!(one.find(u128::MAX - 1), 2);
        assert_eq!(one.find(u128::MAX - 2), 0);
    }

    proptest! {
        /// Near each other, so that they cover each other and share nodes.
        #[test]
        fn the_longest_that_fits_is_found(
            few in prop::collection::vec((any::<u128>(), 0..=128_u32), 1..4),
            given in prop::collection::vec((0..4_usize, 0..128_u32, any::<u8>(), 0..=128_u32), 0..60),
        ) {
            let around = |which: usize, at: u32, flip: u8| few[which % few.len()].0 ^ (u128::from(flip) << at.min(120));
            let mut prefixes: Vec<Prefix> = few.iter().map(|&(bits, len)| Prefix::new(bits, len, 1)).collect();
            for (n, &(which, at, flip, len)) in (2..).zip(&given) {
                prefixes.push(Prefix::new(around(which, at, flip), len, n));
            }
            let table = Prefixes::new(prefixes.clone());
            for &(which, at, flip, _) in &given {
                for address in [around(which, at, flip), around(which, at, flip.wrapping_add(1))] {
                    prop_assert_eq!(table.find(address), slowly(&prefixes, address));
                }
            }
            for prefix in &prefixes {
                for address in [prefix.bits, prefix.bits.wrapping_sub(1), prefix.bits | u128::MAX.checked_shr(prefix.len).unwrap_or(0)] {
                    prop_assert_eq!(table.find(address), slowly(&prefixes, address));
                }
            }
        }
    }
}
