use proptest::prelude::*;

use super::*;

/// The `number`th delivery of all, of a message that is delivered for the first time.
const fn first(sequence: u64, number: u64) -> Place {
    Place { sequence, number, deliveries: 1 }
}

const fn again(sequence: u64, number: u64) -> Place {
    Place { sequence, number, deliveries: 2 }
}

/// What a loop has in hand that was given 1 to `last` from the beginning; the reply is the sequence.
fn given_upto(last: u64) -> InHand<u64> {
    let mut in_hand = InHand::default();
    for sequence in 1..=last {
        in_hand.given(first(sequence, sequence), sequence);
    }
    in_hand.found(0, 0, []);
    in_hand
}

#[test]
fn one_acknowledgement_covers_what_is_settled_from_the_front() {
    let mut in_hand = given_upto(5);
    for sequence in [2, 4, 1] {
        in_hand.settled(sequence);
    }
    assert_eq!(in_hand.acknowledgement(), Some(2));
    assert_eq!(in_hand.acknowledgement(), None, "4 is settled and 3 is not");
    in_hand.settled(3);
    in_hand.settled(5);
    assert_eq!(in_hand.acknowledgement(), Some(5));
    assert_eq!(in_hand.acknowledgement(), None);
}

#[test]
fn nothing_is_acknowledged_before_it_is_known_what_others_have() {
    let mut in_hand = InHand::default();
    assert_eq!(in_hand.given(first(8, 8), 8), Given { is_new: true, doubt: Some(7) });
    in_hand.settled(8);
    assert_eq!(in_hand.acknowledgement(), None);
    in_hand.found(5, 7, [6, 7]);
    assert_eq!(in_hand.awaited(), [6, 7]);
    assert_eq!(in_hand.acknowledgement(), None);
    // They come again, out of order, and one more comes for the first time.
    assert_eq!(in_hand.given(again(7, 9), 7), Given { is_new: true, doubt: None });
    in_hand.given(first(9, 10), 9);
    in_hand.given(again(6, 11), 6);
    in_hand.settled(7);
    in_hand.settled(6);
    // By the reply of 8 and not of 7, whose number is higher: the server would ignore that of 8 and of 9 afterwards.
    assert_eq!(in_hand.acknowledgement(), Some(8));
    in_hand.settled(9);
    assert_eq!(in_hand.acknowledgement(), Some(9));
}

#[test]
fn what_others_settled_is_not_awaited_any_more() {
    let mut in_hand = InHand::default();
    in_hand.given(first(8, 8), 8);
    in_hand.settled(8);
    in_hand.found(5, 7, [6, 7]);
    assert_eq!(in_hand.awaited(), [6, 7]);
    // Somebody else was given something, and what was awaited turns out to be settled.
    assert_eq!(in_hand.given(first(12, 14), 12), Given { is_new: true, doubt: Some(11) });
    assert_eq!(in_hand.acknowledgement(), None);
    in_hand.found(7, 11, [8, 11]);
    assert_eq!(in_hand.awaited(), [11]);
    assert_eq!(in_hand.acknowledgement(), Some(8));
    in_hand.settled(12);
    assert_eq!(in_hand.acknowledgement(), None);
    in_hand.given_up(11);
    assert_eq!(in_hand.acknowledgement(), Some(12));
}

#[test]
fn what_comes_again_alone_is_acknowledged_by_itself() {
    let mut in_hand = InHand::default();
    assert_eq!(in_hand.given(again(3, 9), 3), Given { is_new: true, doubt: Some(UPTO_THE_LAST) });
    in_hand.found(2, 4, [3, 4]);
    assert_eq!(in_hand.awaited(), [4]);
    in_hand.settled(3);
    assert_eq!(in_hand.acknowledgement(), None, "somebody may have 4 by a lower number");
    in_hand.given(again(4, 10), 4);
    in_hand.settled(4);
    assert_eq!(in_hand.acknowledgement(), Some(4));
}

#[test]
fn what_is_at_work_or_settled_is_not_handled_twice_and_what_was_given_back_is() {
    let mut in_hand = given_upto(3);
    in_hand.settled(2);
    assert!(!in_hand.given(again(1, 4), 1).is_new);
    assert!(!in_hand.given(again(2, 5), 2).is_new);
    in_hand.given_back(3);
    assert!(in_hand.given(again(3, 6), 3).is_new);
    in_hand.given_up(3);
    in_hand.settled(1);
    assert_eq!(in_hand.acknowledgement(), Some(2), "3 came and is at work");
    assert!(in_hand.given(again(2, 7), 2).is_new, "its acknowledgement was lost");
}

/// A consumer as the server keeps it, two replicas of which one at a time is given messages, and what happens to them.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The server hands out the next message, or one that is due again.
    Deliver,
    /// A message is due again: nobody heard of it for long.
    Expire(u8),
    /// The replica settles one of those that it has in hand, or gives it back.
    Settle(u8),
    GiveBack(u8),
    /// It sends what it may.
    Acknowledge,
    /// It finds out what others have in hand, or have settled by now.
    Look,
    /// The other replica is pinned; this one goes on with what it has.
    Pin,
    /// The replica dies and forgets everything.
    Die,
    /// What the server sent last does not arrive.
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Deliver),
        2 => any::<u8>().prop_map(Step::Expire),
        8 => any::<u8>().prop_map(Step::Settle),
        1 => any::<u8>().prop_map(Step::GiveBack),
        4 => Just(Step::Acknowledge),
        3 => Just(Step::Look),
        1 => Just(Step::Pin),
        1 => Just(Step::Die),
        1 => Just(Step::Lose),
    ];
    prop::collection::vec(step, 0..200)
}

/// The server's rules for `ack_policy: all`, as read in its source and tried.
#[derive(Default)]
struct Server {
    /// The last sequence that was delivered, and the number of the last delivery.
    delivered: u64,
    number: u64,
    floor: (u64, u64),
    pending: BTreeMap<u64, u64>,
    due: Vec<u64>,
}

impl Server {
    /// Where the stream ends.
    const LAST: u64 = 40;

    fn deliver(&mut self) -> Option<Place> {
        let is_due = |sequence: &u64| self.pending.contains_key(sequence);
        self.due.retain(is_due);
        let sequence = if self.due.is_empty() {
            if self.delivered == Self::LAST {
                return None;
            }
            self.delivered += 1;
            self.delivered
        } else {
            self.due.remove(0)
        };
        self.number += 1;
        let deliveries = self.pending.entry(sequence).or_insert(0);
        *deliveries += 1;
        Some(Place { sequence, number: self.number, deliveries: *deliveries })
    }

    fn expire(&mut self, sequence: u64) {
        if self.pending.contains_key(&sequence) && !self.due.contains(&sequence) {
            self.due.push(sequence);
        }
    }

    fn acknowledge(&mut self, place: Place) {
        let (sequence, number) = self.floor;
        if place.sequence <= sequence || place.number <= number {
            return;
        }
        self.floor = (place.sequence, place.number);
        self.pending = self.pending.split_off(&(place.sequence + 1));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever happens, in whatever order: what the server counts as settled is settled, and once everything is quiet it is
    /// everything.
    #[test]
    fn nothing_is_acknowledged_that_is_not_settled(steps in steps()) {
        let mut server = Server::default();
        let mut replicas: [InHand<Place>; 2] = Default::default();
        let mut at_work: [Vec<u64>; 2] = Default::default();
        let mut settled = std::collections::BTreeSet::new();
        let mut pinned = 0;
        // Every message is settled, and delivered again until it is, when all is over.
        let quiet = (0..400).flat_map(|n| [Step::Expire(n as u8), Step::Deliver, Step::Look, Step::Settle(0), Step::Acknowledge]);
        for (at, step) in steps.iter().copied().chain(quiet).enumerate() {
            let mine = &mut at_work[pinned];
            let in_hand = &mut replicas[pinned];
            match step {
                Step::Deliver => {
                    let given = server.deliver().filter(|place| in_hand.given(*place, *place).is_new);
                    mine.extend(given.map(|place| place.sequence));
                }
                Step::Lose => { server.deliver(); }
                Step::Expire(which) => server.expire(u64::from(which) % Server::LAST + 1),
                Step::Settle(which) if !mine.is_empty() => {
                    let sequence = mine.remove(usize::from(which) % mine.len());
                    settled.insert(sequence);
                    in_hand.settled(sequence);
                }
                Step::GiveBack(which) if !mine.is_empty() => {
                    let sequence = mine.remove(usize::from(which) % mine.len());
                    in_hand.given_back(sequence);
                    server.expire(sequence);
                }
                Step::Settle(_) | Step::GiveBack(_) => {}
                Step::Acknowledge => for in_hand in &mut replicas {
                    if let Some(place) = in_hand.acknowledgement() {
                        server.acknowledge(place);
                    }
                }
                Step::Look => {
                    let floor = server.floor.0;
                    match in_hand.doubt {
                        Some(upto) => in_hand.found(floor, upto, floor + 1..=upto.min(server.delivered)),
                        None => in_hand.settled_upto(floor),
                    }
                }
                Step::Pin => pinned = 1 - pinned,
                Step::Die => {
                    *in_hand = InHand::default();
                    mine.clear();
                }
            }
            prop_assert!((1..=server.floor.0).all(|sequence| settled.contains(&sequence)), "step {at}, {step:?}: {:?}", server.floor);
        }
        prop_assert_eq!(server.floor.0, Server::LAST);
        prop_assert!(server.pending.is_empty());
    }
}
