//! Cumulative acknowledgement: one for everything that was settled, by the rule of [`crate::in_hand`].
//!
//! Owns finding out what others were given and asking the server for it. Assumes a consumer with one client at a time (a pinned
//! one): where several pull side by side, each would look after every delivery. A replica that is given the pin takes over what
//! the one before had in hand and did not settle: nobody acknowledges past it until it was delivered again, with its count of
//! deliveries, or tried alone.

use std::time::Instant;

use async_nats::Subject;
use async_nats::jetstream::AckKind;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use tracing::{debug, info, warn};

use crate::in_hand::{Given, InHand, Place, UPTO_THE_LAST};
use crate::receive::{DEAD_LETTER_RETRY, Done, REOPEN_PAUSE, Work, describe};
use crate::suspects::{self, Case, Looked};

/// After how many times its `ack_wait` a message that others had in hand is tried alone when it was neither settled there nor
/// came here. The server delivers again after one; what it gave up, or does not have any more, never comes.
const PATIENCE_ACK_WAITS: u32 = 3;

/// The acknowledgements of a loop.
pub(crate) struct Cumulative<'a, H> {
    work: &'a Work<'a, H>,
    /// None where each message is acknowledged by itself; then there is nothing to do here.
    in_hand: Option<InHand<Option<Subject>>>,
    /// Finding out what others have in hand, while there is a doubt.
    looking: Option<BoxFuture<'a, Found>>,
    /// What becomes of those that are awaited, and since when there are any.
    awaiting: Option<BoxFuture<'a, Awaiting>>,
    since: Option<Instant>,
}

/// What others were given and did not settle.
struct Found {
    /// Everything up to this sequence is settled.
    floor: u64,
    /// Up to where was looked.
    upto: u64,
    /// What the stream holds between.
    unsettled: Vec<u64>,
}

/// How waiting for what others have in hand went on.
enum Awaiting {
    /// Everything up to this sequence is settled by now.
    Settled(u64),
    /// These will be tried alone, for certain.
    Summoned(Vec<u64>),
}

impl<'a, H: Sync> Cumulative<'a, H> {
    pub(crate) fn new(work: &'a Work<'a, H>) -> Self {
        Self { work, in_hand: work.acks_all.then(InHand::default), looking: None, awaiting: None, since: None }
    }

    /// Takes a delivery in; false when there is nothing to be done about it.
    pub(crate) fn given(&mut self, place: Place, reply: Option<Subject>) -> bool {
        let Some(in_hand) = &mut self.in_hand else { return true };
        let Given { is_new, doubt } = in_hand.given(place, reply.clone());
        if let Some(upto) = doubt {
            self.looking = Some(look(self.work, upto, place.number, reply).boxed());
        }
        is_new
    }

    /// A delivery was handled.
    pub(crate) fn done(&mut self, done: &Done) {
        match &mut self.in_hand {
            Some(in_hand) if done.is_settled => in_hand.settled(done.sequence),
            Some(in_hand) => in_hand.given_back(done.sequence),
            None => {}
        }
    }

    /// Whether there may be something to acknowledge.
    pub(crate) fn may_acknowledge(&self) -> bool {
        self.in_hand.as_ref().is_some_and(InHand::is_changed)
    }

    /// Acknowledges what may be acknowledged, by one message.
    pub(crate) async fn acknowledge(&mut self) {
        let reply = self.in_hand.as_mut().and_then(InHand::acknowledgement).flatten();
        let Some(reply) = reply else { return };
        if let Err(problem) = self.work.context.client().publish(reply, AckKind::Ack.into()).await {
            debug!(consumer = self.work.receive.consumer, %problem, "could not acknowledge; the messages come back");
        }
    }

    /// Goes on finding out what others have in hand, until there is something new or, when nothing is to be found out, for ever.
    /// May be dropped at any time.
    pub(crate) async fn look(&mut self) {
        let Some(in_hand) = &mut self.in_hand else { return std::future::pending().await };
        tokio::select! {
            Some(Found { floor, upto, unsettled }) = OptionFuture::from(self.looking.as_mut()) => {
                self.looking = None;
                in_hand.found(floor, upto, unsettled);
            }
            Some(awaiting) = OptionFuture::from(self.awaiting.as_mut()) => match awaiting {
                Awaiting::Settled(floor) => in_hand.settled_upto(floor),
                Awaiting::Summoned(summoned) => {
                    summoned.into_iter().for_each(|sequence| in_hand.given_up(sequence));
                    self.since = None;
                }
            },
            else => return std::future::pending().await,
        }
        let awaited = in_hand.awaited();
        if awaited.is_empty() {
            (self.awaiting, self.since) = (None, None);
            return;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        self.awaiting = Some(if since.elapsed() < self.work.ack_wait * PATIENCE_ACK_WAITS {
            look_at_the_floor(self.work).boxed()
        } else {
            summon(self.work, awaited).boxed()
        });
    }
}

/// Whoever had messages in hand may have settled them since.
async fn look_at_the_floor<H: Sync>(work: &Work<'_, H>) -> Awaiting {
    tokio::time::sleep(REOPEN_PAUSE).await;
    // What could not be asked is asked again.
    let floor = describe(work.context, work.receive).await.map_or(0, |(_, info)| info.ack_floor.stream_sequence);
    Awaiting::Settled(floor)
}

/// Lets messages be tried alone: however often that happens, they are decided once.
async fn summon<H: Sync>(work: &Work<'_, H>, awaited: Vec<u64>) -> Awaiting {
    let receive = work.receive;
    warn!(consumer = receive.consumer, count = awaited.len(), "messages that others had in hand do not come");
    for sequence in &awaited {
        let case = Case::new(receive.stream, receive.consumer, *sequence, 1);
        while let Err(problem) = case.summon(work.context).await {
            debug!(consumer = receive.consumer, sequence, problem, "cannot hand a message over yet");
            tokio::time::sleep(DEAD_LETTER_RETRY).await;
        }
    }
    Awaiting::Summoned(awaited)
}

/// Finds out what others may have in hand up to `upto`, however long it takes, and asks the server for it: by itself it
/// delivers that again only after its `ack_wait`. `number` and `reply` are those of the delivery that raised the doubt.
async fn look<H: Sync>(work: &Work<'_, H>, upto: u64, number: u64, reply: Option<Subject>) -> Found {
    let consumer = work.receive.consumer;
    let found = loop {
        match try_to_look(work, upto, number).await {
            Ok(found) => break found,
            Err(problem) => debug!(consumer, problem, "cannot find out yet what others were given"),
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
    };
    let (Found { floor, upto, unsettled }, client) = (&found, work.context.client());
    if !unsettled.is_empty() {
        info!(consumer, floor, upto, count = unsettled.len(), "others were given messages that are not settled");
    }
    for reply in unsettled.iter().filter_map(|sequence| reply_for(reply.as_ref()?, *sequence)) {
        if let Err(problem) = client.publish(reply, AckKind::Nak(None).into()).await {
            debug!(consumer, %problem, "could not ask for messages; they come later");
            break;
        }
    }
    found
}

async fn try_to_look<H>(work: &Work<'_, H>, upto: u64, number: u64) -> Result<Found, String> {
    let (_, info) = describe(work.context, work.receive).await?;
    // A leader that was frozen and wakes answers from its past. What was settled then is settled; of what was delivered only one
    // that knows of our delivery knows all.
    let floor = info.ack_floor.stream_sequence;
    let upto = match upto {
        UPTO_THE_LAST if info.delivered.consumer_sequence < number => return Err("its leader is behind".to_owned()),
        UPTO_THE_LAST => info.delivered.stream_sequence,
        upto => upto,
    };
    // What cannot be delivered would cut the connection each time that it is asked for.
    let Looked { readable, .. } = suspects::look(work.deliveries, work.receive, &info, upto).await?;
    Ok(Found { floor, upto, unsettled: readable })
}

/// The reply by which the message of `sequence` is settled, made from that of another message.
fn reply_for(reply: &str, sequence: u64) -> Option<String> {
    let mut tokens: Vec<_> = reply.split('.').collect();
    // `$JS.ACK`, in the longer form the domain and the account, then stream, consumer, deliveries and the sequence.
    let place = match tokens.len() {
        9 => 5,
        11.. => 7,
        _ => return None,
    };
    let sequence = sequence.to_string();
    tokens[place] = &sequence;
    Some(tokens.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_for_another_message_differs_in_its_sequence() {
        let short = "$JS.ACK.ORDERS.product-orders.1.70.90.1769850600000000000.5";
        assert_eq!(
            reply_for(short, 12).as_deref(),
            Some("$JS.ACK.ORDERS.product-orders.1.12.90.1769850600000000000.5")
        );
        let long = "$JS.ACK._.AbCdEf.ORDERS.product-orders.1.70.90.1769850600000000000.5.x";
        assert_eq!(
            reply_for(long, 12).as_deref(),
            Some("$JS.ACK._.AbCdEf.ORDERS.product-orders.1.12.90.1769850600000000000.5.x")
        );
        assert_eq!(reply_for("_INBOX.1", 12), None);
    }
}
