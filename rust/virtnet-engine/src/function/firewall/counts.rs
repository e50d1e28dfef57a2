//! What rules have counted, each in a place of its own for as long as it is there or a flow of it is.
//!
//! Flows know the place, not the number of their rule: rules come, go and change their order without a look at a single flow.

use super::rules::RuleSet;

/// The place of what no rule matched, and of flows whose rule is gone.
pub(super) const NOBODY: u32 = 0;

/// What was counted in one place.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    packets: u64,
    bytes: u64,
    /// Flows that its rule has let begin.
    flows: u32,
    /// Whether its rule is there.
    is_there: bool,
}

/// All places.
#[derive(Debug)]
pub(super) struct Counts {
    all: Vec<Count>,
    free: Vec<u32>,
    /// By the number of a rule.
    places: Vec<u32>,
}

impl Counts {
    pub(super) fn new(rules: &RuleSet) -> Self {
        let n = u32::try_from(rules.rules.len()).unwrap_or(u32::MAX);
        let fresh = Count {
            is_there: true,
            ..Count::default()
        };
        Self {
            all: vec![fresh; rules.rules.len() + 1],
            free: Vec::new(),
            places: (1..=n).collect(),
        }
    }

    /// The place of a rule, and of what none matched.
    #[inline]
    pub(super) fn place(&self, rule: usize) -> u32 {
        self.places.get(rule).copied().unwrap_or(NOBODY)
    }

    #[inline]
    pub(super) fn count(&mut self, place: u32, bytes: usize) {
        self.count_all(place, 1, bytes as u64);
    }

    /// Counts several packets.
    #[inline]
    pub(super) fn count_all(&mut self, place: u32, packets: u64, bytes: u64) {
        let mut place = place as usize;
        if !self.all[place].is_there {
            place = NOBODY as usize;
        }
        let count = &mut self.all[place];
        count.packets += packets;
        count.bytes += bytes;
    }

    /// A flow has begun by the rule of a place.
    pub(super) fn begin(&mut self, place: u32) {
        self.all[place as usize].flows += 1;
    }

    /// Such a flow has ended.
    pub(super) fn end(&mut self, place: u32) {
        let count = &mut self.all[place as usize];
        count.flows -= 1;
        if count.flows == 0 && !count.is_there {
            self.free.push(place);
        }
    }

    /// Takes other rules: those that stay as written go on counting. Gives back what is needed no more.
    pub(super) fn order(&mut self, rules: &RuleSet, before: &RuleSet) -> impl Send + use<> {
        let mut places = vec![NOBODY; rules.rules.len()];
        for place in &self.places {
            self.all[*place as usize].is_there = false;
        }
        for (number, stayed) in rules.stayed(before) {
            if let Some(old) = stayed {
                let place = self.places[old as usize];
                self.all[place as usize].is_there = true;
                places[number as usize] = place;
            }
        }
        for place in &self.places {
            let count = &self.all[*place as usize];
            if !count.is_there && count.flows == 0 {
                self.free.push(*place);
            }
        }
        for place in places.iter_mut().filter(|place| **place == NOBODY) {
            *place = self.open();
        }
        std::mem::replace(&mut self.places, places)
    }

    fn open(&mut self) -> u32 {
        let fresh = Count {
            is_there: true,
            ..Count::default()
        };
        if let Some(place) = self.free.pop() {
            self.all[place as usize] = fresh;
            return place;
        }
        self.all.push(fresh);
        u32::try_from(self.all.len() - 1).unwrap_or(NOBODY)
    }

    /// Packets and bytes of each rule, and last of what none matched.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.places.iter().chain([&NOBODY]).map(|&place| {
            let count = &self.all[place as usize];
            (count.packets, count.bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Action, Ends, Rule};
    use super::*;

    fn rules(texts: &[&str]) -> RuleSet {
        let rule = |text: &&str| Rule {
            action: Action::Pass,
            came_in_by: None,
            version: None,
            protocols: Vec::new(),
            ethertype: None,
            from: Ends::default(),
            to: Ends::default(),
            filter: None,
            keep_state: true,
            text: (*text).to_owned(),
        };
        RuleSet::new(
            texts.iter().map(rule).collect(),
            Vec::new(),
            Action::Drop,
            true,
        )
    }

    fn packets(counts: &Counts) -> Vec<u64> {
        counts.all().map(|(packets, _)| packets).collect()
    }

    #[test]
    fn rules_that_stay_go_on_counting_wherever_they_are() {
        let before = rules(&["a", "b", "b", "c"]);
        let mut counts = Counts::new(&before);
        for (rule, n) in [(0, 1), (1, 2), (2, 3), (3, 4)] {
            (0..n).for_each(|_| counts.count(counts.place(rule), 10));
        }
        counts.count(NOBODY, 10);
        drop(counts.order(&rules(&["d", "c", "b", "a", "b"]), &before));
        assert_eq!(packets(&counts), [0, 4, 2, 1, 3, 1]);
    }

    #[test]
    fn flows_of_a_rule_that_is_gone_keep_its_place_and_count_as_nobodys() {
        let (first, second) = (rules(&["a", "b"]), rules(&["c", "a"]));
        let mut counts = Counts::new(&first);
        let place = counts.place(1);
        counts.begin(place);
        counts.count(place, 10);
        drop(counts.order(&second, &first));
        assert_ne!(counts.place(0), place);
        counts.count(place, 10);
        assert_eq!(packets(&counts), [0, 0, 1]);
        counts.end(place);
        let third = rules(&["c", "a", "d"]);
        drop(counts.order(&third, &second));
        assert_eq!(counts.place(2), place);
        assert_eq!(packets(&counts), [0, 0, 0, 1]);
        // Rules that come and go for ever take no more room than those that are there.
        let mut last = third;
        for n in 0..100 {
            let next = rules(&[&format!("{n}")]);
            drop(counts.order(&next, &last));
            last = next;
        }
        assert!(counts.all.len() <= 5, "{}", counts.all.len());
    }
}
