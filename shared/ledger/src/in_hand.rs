//! What a receive loop has in hand of a consumer whose acknowledgement covers everything before it (`ack_policy: all`), and
//! which acknowledgement it may send.
//!
//! Pure. One acknowledgement settles every message up to its own, also what another replica was given before us and never
//! settled. So it may be sent only when all of those are known and settled. What the loop was given itself it knows; that
//! somebody was given something in between shows in the consumer's own numbers of deliveries, which then leave one out. From
//! that moment on nothing is acknowledged until the loop has looked (see [`crate::cumulative`]) which messages may be in other
//! hands; those are awaited here like all others, and come by themselves when they are not settled there.
//!
//! The server remembers the number of the delivery that was acknowledged last and ignores acknowledgements with a lower one.
//! What is delivered again has a high number and a low sequence, so it is not acknowledged by itself while others are in hand
//! whose numbers are lower: the acknowledgement of a message that came for the first time covers it.

use std::collections::BTreeMap;

/// A delivery, as the server numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The message's sequence in its stream.
    pub(crate) sequence: u64,
    /// The number of this delivery among all of the consumer, to whomever.
    pub(crate) number: u64,
    /// How often this message was delivered: 1 the first time.
    pub(crate) deliveries: u64,
}

/// Stands for the last sequence that was delivered to anybody.
pub(crate) const UPTO_THE_LAST: u64 = u64::MAX;

/// What is to be done about a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    /// It is to be handled. If not, it is at work, or settled and soon acknowledged.
    pub(crate) is_new: bool,
    /// It is to be found out, from now on, what others have in hand up to this sequence, or up to the last that was delivered.
    pub(crate) doubt: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not here: in other hands, or given back. It comes, or is settled there.
    Awaited,
    AtWork,
    Settled,
}

#[derive(Debug)]
struct Message<R> {
    stage: Stage,
    /// Whether it came here when it was delivered for the first time.
    is_first: bool,
    /// What acknowledges it; none when it never came here.
    reply: Option<R>,
}

/// The messages in hand.
#[derive(Debug)]
pub(crate) struct InHand<R> {
    messages: BTreeMap<u64, Message<R>>,
    /// The number of the next delivery, if nobody else is given something before.
    due: Option<u64>,
    /// Up to which sequence others may have been given what is not known here. None when all that may be is known.
    doubt: Option<u64>,
    /// Whether something changed since an acknowledgement was looked for.
    is_changed: bool,
}

impl<R> Default for InHand<R> {
    fn default() -> Self {
        Self { messages: BTreeMap::new(), due: None, doubt: None, is_changed: false }
    }
}

impl<R> InHand<R> {
    /// Takes a delivery in. One whose number leaves others out raises a doubt.
    pub(crate) fn given(&mut self, place: Place, reply: R) -> Given {
        let Place { sequence, number, deliveries } = place;
        let is_first = deliveries == 1;
        let left_out = self.due.replace(number + 1) != Some(number);
        if left_out {
            // What is delivered for the first time after this one comes here, so others can only have what is before it.
            let upto = if is_first { sequence.saturating_sub(1) } else { UPTO_THE_LAST };
            self.doubt = self.doubt.max(Some(upto));
        }
        let is_new = self.messages.get(&sequence).is_none_or(|known| known.stage == Stage::Awaited);
        if is_new {
            self.messages.insert(sequence, Message { stage: Stage::AtWork, is_first, reply: Some(reply) });
        }
        Given { is_new, doubt: self.doubt.filter(|_| left_out) }
    }

    /// Takes in what was found out since the last doubt was raised: up to `floor` everything is settled, and after it, up to
    /// `upto`, only `unsettled` are there.
    pub(crate) fn found(&mut self, floor: u64, upto: u64, unsettled: impl IntoIterator<Item = u64>) {
        self.messages.retain(|sequence, message| message.stage != Stage::Awaited || *sequence > upto.max(floor));
        for sequence in unsettled {
            let awaited = Message { stage: Stage::Awaited, is_first: false, reply: None };
            self.messages.entry(sequence).or_insert(awaited);
        }
        self.doubt = None;
        self.is_changed = true;
    }

    /// Everything up to `floor` turned out to be settled.
    pub(crate) fn settled_upto(&mut self, floor: u64) {
        let before = self.messages.len();
        self.messages.retain(|sequence, message| message.stage != Stage::Awaited || *sequence > floor);
        self.is_changed |= self.messages.len() < before;
    }

    /// What is awaited.
    pub(crate) fn awaited(&self) -> Vec<u64> {
        let awaited = self.messages.iter().filter(|(_, message)| message.stage == Stage::Awaited);
        awaited.map(|(sequence, _)| *sequence).collect()
    }

    /// A message was settled.
    pub(crate) fn settled(&mut self, sequence: u64) {
        self.becomes(sequence, Stage::Settled);
        self.is_changed = true;
    }

    /// A message was given back to the server, or given up: it comes again.
    pub(crate) fn given_back(&mut self, sequence: u64) {
        self.becomes(sequence, Stage::Awaited);
    }

    /// What was awaited in vain was put where it is settled for certain. What came meanwhile is not meant.
    pub(crate) fn given_up(&mut self, sequence: u64) {
        if self.messages.get(&sequence).is_some_and(|message| message.stage == Stage::Awaited) {
            self.settled(sequence);
        }
    }

    fn becomes(&mut self, sequence: u64, stage: Stage) {
        if let Some(message) = self.messages.get_mut(&sequence) {
            message.stage = stage;
        }
    }

    /// Whether it is worth looking for an acknowledgement.
    pub(crate) const fn is_changed(&self) -> bool {
        self.is_changed && self.doubt.is_none()
    }

    /// The acknowledgement that covers as much as may be covered now; what it covers is not in hand any more.
    pub(crate) fn acknowledgement(&mut self) -> Option<R> {
        self.is_changed = false;
        if self.doubt.is_some() {
            return None;
        }
        let is_settled = |(_, message): &(&u64, &Message<R>)| message.stage == Stage::Settled;
        let settled = || self.messages.iter().take_while(is_settled);
        // Nothing else is in hand whose number could be lower.
        let is_all = settled().count() == self.messages.len();
        let last = settled().filter(|(_, message)| message.reply.is_some() && (message.is_first || is_all)).last();
        let last = *last?.0;
        let rest = self.messages.split_off(&(last + 1));
        let covered = std::mem::replace(&mut self.messages, rest);
        covered.into_values().next_back()?.reply
    }
}

#[cfg(test)]
#[path = "in_hand_tests.rs"]
mod tests;
