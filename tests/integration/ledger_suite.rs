//! What a ledger promises, held by both of them: the one on a real server and its twin in memory.
//!
//! Owns the meaning of `Ledger`. Every case runs on an empty ledger of its own. What only one of the two can do (the
//! twin's faults on demand, the server's size limit) is tested after the common part, or where it is used.
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use lomash_contract::EventId;
use lomash_ledger::streams::{INVENTORY, REBUILD};
use lomash_ledger::{
    AppendError, Carried, JetStreamLedger, Ledger, MAX_BATCH_MESSAGES, MemoryLedger, Messages, NewMessage, ReadError,
    StoredMessage,
};
use lomash_platform::trace::TraceContext;
use lomash_tests::{PATIENCE, World};
use tokio::sync::oneshot;
use uuid::Uuid;

/// How long silence must last to be believed. Too short only makes a test miss a fault, never fail without one.
const SILENCE: Duration = Duration::from_millis(300);

macro_rules! held_by_both {
    ($($case:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test]
            async fn $case() -> anyhow::Result<()> {
                super::$case(lomash_ledger::MemoryLedger::default()).await
            })*
        }

        mod jetstream {
            $(#[tokio::test]
            async fn $case() -> anyhow::Result<()> {
                let world = lomash_tests::World::without_postgres().await?;
                super::$case(world.ledger()).await?;
                world.close();
                Ok(())
            })*
        }
    };
}

held_by_both!(
    an_append_at_the_expected_sequence_returns_the_last_one,
    a_wrong_expected_sequence_is_a_conflict_and_stores_nothing,
    of_two_writers_one_loses,
    a_refused_batch_leaves_its_ids_free,
    a_stored_event_id_is_a_duplicate_and_the_whole_batch_is_refused,
    a_stored_event_id_is_a_duplicate_even_at_a_wrong_sequence,
    an_event_id_twice_in_one_batch_is_a_duplicate,
    the_largest_batch_is_stored_and_one_more_message_is_too_large,
    a_batch_too_large_is_that_even_at_a_wrong_sequence,
    an_empty_append_is_nothing,
    a_staged_batch_is_stored_when_it_is_told_to_go_and_never_otherwise,
    what_was_written_is_read_back,
    texts_go_through_headers,
    a_large_payload_goes_through,
    reading_ends_at_the_end,
    reading_beyond_the_end_says_that_the_stream_went_backwards,
    following_sees_what_is_there_and_what_comes,
);

fn message() -> NewMessage {
    message_of(Uuid::new_v4(), "{}".into())
}

fn message_of(event: Uuid, payload: Bytes) -> NewMessage {
    NewMessage {
        subject: format!("lomash.inventory.updated.{}", Uuid::new_v4()),
        event_id: EventId(event),
        payload,
        carried: None,
    }
}

fn batch(messages: usize) -> Vec<NewMessage> {
    (0..messages).map(|_| message()).collect()
}

async fn all(messages: Messages) -> Result<Vec<StoredMessage>> {
    let collected = tokio::time::timeout(PATIENCE, messages.collect::<Vec<_>>()).await?;
    Ok(collected.into_iter().collect::<Result<_, _>>()?)
}

async fn stored(ledger: &impl Ledger) -> Result<Vec<StoredMessage>> {
    all(ledger.read(0).await?).await
}

fn ids(messages: &[NewMessage]) -> Vec<String> {
    messages.iter().map(|message| message.event_id.to_string()).collect()
}

fn stored_ids(messages: &[StoredMessage]) -> Vec<String> {
    messages.iter().filter_map(|message| message.message_id.clone()).collect()
}

// ── Appending ───────────────────────────────────────────────────────────────────────────────────────────────────

async fn an_append_at_the_expected_sequence_returns_the_last_one(ledger: impl Ledger) -> Result<()> {
    assert_eq!(ledger.last_sequence().await?, 0);
    assert_eq!(ledger.append(&batch(1), 0).await?, 1);
    assert_eq!(ledger.append(&batch(7), 1).await?, 8);
    assert_eq!(ledger.last_sequence().await?, 8);
    Ok(())
}

async fn a_wrong_expected_sequence_is_a_conflict_and_stores_nothing(ledger: impl Ledger) -> Result<()> {
    // Not empty, and one or many messages: a batch of one is stored by another way of the server.
    ledger.append(&batch(3), 0).await?;
    for (messages, expected) in [(1, 0), (1, 2), (1, 4), (1, 99), (50, 0), (50, 2), (50, 4)] {
        let refused = ledger.append(&batch(messages), expected).await;
        assert!(
            matches!(refused, Err(AppendError::Conflict(_))),
            "{messages} messages at {expected} where 3 is the last: {refused:?}"
        );
        assert_eq!(ledger.last_sequence().await?, 3, "{messages} messages at {expected}");
    }
    assert_eq!(ledger.append(&batch(50), 3).await?, 53, "the right sequence is still right");
    Ok(())
}

async fn a_staged_batch_is_stored_when_it_is_told_to_go_and_never_otherwise(ledger: impl Ledger) -> Result<()> {
    let stage = |messages: &[NewMessage], expected: u64| {
        let (go, gone) = oneshot::channel();
        (go, tokio::spawn(ledger.stage(messages.to_vec(), expected, gone)))
    };
    ledger.append(&batch(2), 0).await?;
    // Begun before the batch is stored that it rests on.
    let (go, staged) = stage(&batch(4), 5);
    assert_eq!(ledger.append(&batch(3), 2).await?, 5);
    go.send(()).expect("it waits");
    assert_eq!(staged.await??, 9);
    // One that rests on what was not stored.
    let (go, staged) = stage(&batch(4), 12);
    assert_eq!(ledger.append(&batch(1), 9).await?, 10);
    go.send(()).expect("it waits");
    let refused = staged.await?;
    assert!(matches!(refused, Err(AppendError::Conflict(_))), "{refused:?}");
    // One that is let fall, after it was sent.
    let fallen = batch(4);
    let (go, staged) = stage(&fallen, 10);
    drop(go);
    let fell = staged.await?;
    assert!(matches!(fell, Err(AppendError::Unknown(_))), "{fell:?}");
    assert_eq!(ledger.last_sequence().await?, 10);
    assert_eq!(ledger.append(&fallen, 10).await?, 14, "its ids are free");
    Ok(())
}

async fn of_two_writers_one_loses(ledger: impl Ledger) -> Result<()> {
    const ROUNDS: usize = 20;
    for _ in 0..ROUNDS {
        let before = ledger.last_sequence().await?;
        let (one, other) = (batch(2), batch(3));
        let outcomes = tokio::join!(ledger.append(&one, before), ledger.append(&other, before));
        let (winner, last) = match &outcomes {
            (Ok(last), Err(AppendError::Conflict(_))) => (&one, *last),
            (Err(AppendError::Conflict(_)), Ok(last)) => (&other, *last),
            unexpected => panic!("one must win and one must lose: {unexpected:?}"),
        };
        assert_eq!(last, before + winner.len() as u64);
        let found = all(ledger.read(before).await?).await?;
        assert_eq!(stored_ids(&found), ids(winner), "only what the winner wrote");
    }
    Ok(())
}

async fn a_refused_batch_leaves_its_ids_free(ledger: impl Ledger) -> Result<()> {
    ledger.append(&batch(1), 0).await?;
    let again = batch(5);
    ledger.append(&again, 0).await.unwrap_err();
    assert_eq!(ledger.append(&again, 1).await?, 6, "what was refused can be sent again");
    Ok(())
}

async fn a_stored_event_id_is_a_duplicate_and_the_whole_batch_is_refused(ledger: impl Ledger) -> Result<()> {
    let first = batch(3);
    ledger.append(&first, 0).await?;
    let mut mixed = batch(4);
    mixed.insert(2, first[1].clone());
    let single = vec![first[2].clone()];
    for repeated in [first, mixed, single] {
        let refused = ledger.append(&repeated, 3).await;
        assert!(matches!(refused, Err(AppendError::Duplicate(_))), "{refused:?}");
        assert_eq!(ledger.last_sequence().await?, 3, "nothing of it is stored");
    }
    Ok(())
}

/// A writer whose answer was lost sends the same again at the sequence it knew.
async fn a_stored_event_id_is_a_duplicate_even_at_a_wrong_sequence(ledger: impl Ledger) -> Result<()> {
    for messages in [1, 3] {
        let before = ledger.last_sequence().await?;
        let sent = batch(messages);
        ledger.append(&sent, before).await?;
        let again = ledger.append(&sent, before).await;
        assert!(matches!(again, Err(AppendError::Duplicate(_))), "{messages} messages: {again:?}");
        assert_eq!(ledger.last_sequence().await?, before + messages as u64);
    }
    Ok(())
}

async fn an_event_id_twice_in_one_batch_is_a_duplicate(ledger: impl Ledger) -> Result<()> {
    let mut twice = batch(3);
    twice.push(twice[0].clone());
    let refused = ledger.append(&twice, 0).await;
    assert!(matches!(refused, Err(AppendError::Duplicate(_))), "{refused:?}");
    assert_eq!(ledger.last_sequence().await?, 0);
    Ok(())
}

async fn the_largest_batch_is_stored_and_one_more_message_is_too_large(ledger: impl Ledger) -> Result<()> {
    let refused = ledger.append(&batch(MAX_BATCH_MESSAGES + 1), 0).await;
    assert!(
        matches!(refused, Err(AppendError::TooLarge { messages, .. }) if messages == MAX_BATCH_MESSAGES + 1),
        "{refused:?}"
    );
    assert_eq!(ledger.last_sequence().await?, 0);
    let largest = batch(MAX_BATCH_MESSAGES);
    assert_eq!(ledger.append(&largest, 0).await?, MAX_BATCH_MESSAGES as u64);
    let found = stored(&ledger).await?;
    assert_eq!(stored_ids(&found), ids(&largest), "in the order of the batch");
    Ok(())
}

async fn a_batch_too_large_is_that_even_at_a_wrong_sequence(ledger: impl Ledger) -> Result<()> {
    let refused = ledger.append(&batch(MAX_BATCH_MESSAGES + 1), 7).await;
    assert!(matches!(refused, Err(AppendError::TooLarge { .. })), "{refused:?}");
    Ok(())
}

async fn an_empty_append_is_nothing(ledger: impl Ledger) -> Result<()> {
    ledger.append(&batch(2), 0).await?;
    assert_eq!(ledger.append(&[], 2).await?, 2);
    assert_eq!(ledger.last_sequence().await?, 2);
    Ok(())
}

// ── What is stored ──────────────────────────────────────────────────────────────────────────────────────────────

async fn what_was_written_is_read_back(ledger: impl Ledger) -> Result<()> {
    let carried = Carried {
        trace: TraceContext::parse(Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), Some("shop=7")),
        reason: Some("recount".to_owned()),
        command: Some("3c9d1f58-0f0e-4d0a-8f55-2b8f0c1d7e10 00000000000000ff".to_owned()),
    };
    let mut sent = batch(5);
    for (number, message) in sent.iter_mut().enumerate() {
        message.payload = format!("{{\"number\":{number}}}").into();
    }
    sent[1].carried = Some(Arc::new(carried.clone()));
    let only_reason = Carried { reason: Some("damaged".to_owned()), ..Carried::default() };
    sent[4].carried = Some(Arc::new(only_reason.clone()));
    ledger.append(&sent[..2], 0).await?;
    ledger.append(&sent[2..], 2).await?;

    let found = stored(&ledger).await?;
    assert_eq!(found.len(), sent.len());
    let mut before = found[0].stored_at;
    for (index, (found, sent)) in found.iter().zip(&sent).enumerate() {
        assert_eq!(found.sequence, index as u64 + 1);
        assert_eq!(found.subject, sent.subject);
        assert_eq!(found.message_id.as_deref(), Some(&*sent.event_id.to_string()));
        assert_eq!(found.payload, sent.payload);
        assert_eq!(found.carried, sent.carried.as_deref().cloned().unwrap_or_default());
        assert!(found.stored_at >= before, "the store's clock goes with the sequence");
        before = found.stored_at;
    }
    let places: Vec<_> = found
        .iter()
        .map(|message| {
            let batch = message.batch.clone().unwrap();
            (batch.sequence, batch.commit, message.expected_last_sequence)
        })
        .collect();
    assert_eq!(places, [(1, false, Some(0)), (2, true, None), (1, false, Some(2)), (2, false, None), (3, true, None)]);
    let batches: HashSet<String> = found.iter().map(|message| message.batch.clone().unwrap().id).collect();
    assert_eq!(batches.len(), 2, "every batch has an id of its own: {batches:?}");
    assert_eq!(found[0].batch.as_ref().unwrap().id, found[1].batch.as_ref().unwrap().id);
    Ok(())
}

async fn texts_go_through_headers(ledger: impl Ledger) -> Result<()> {
    // A header cannot hold line breaks; they become blanks, and so do other control characters.
    let texts = [
        ("Schränke für Łódź, 棚卸し 📦", "Schränke für Łódź, 棚卸し 📦"),
        ("two\nlines\r\nand a\ttab", "two lines  and a tab"),
        ("bell\u{7} escape\u{1b}[31m nul\u{0}!", "bell  escape [31m nul !"),
        ("Nats-Msg-Id: forged", "Nats-Msg-Id: forged"),
        ("x\r\nNats-Batch-Commit: 1", "x  Nats-Batch-Commit: 1"),
        ("\u{85}next\u{2028}line", " next\u{2028}line"),
        (": , ; \" ' \\ %0d%0a", ": , ; \" ' \\ %0d%0a"),
    ];
    let sent: Vec<NewMessage> = texts
        .iter()
        .map(|(text, _)| NewMessage {
            carried: Some(Arc::new(Carried { reason: Some((*text).to_owned()), ..Carried::default() })),
            ..message()
        })
        .collect();
    ledger.append(&sent, 0).await?;
    let found = stored(&ledger).await?;
    assert_eq!(stored_ids(&found), ids(&sent), "no text broke out of its header");
    for ((_, expected), found) in texts.iter().zip(&found) {
        assert_eq!(found.carried.reason.as_deref().map(str::trim), Some(expected.trim()));
    }
    Ok(())
}

async fn a_large_payload_goes_through(ledger: impl Ledger) -> Result<()> {
    // Below `max_msg_size` of the stream, headers included, and any bytes: the ledger does not read them.
    let bytes: Vec<u8> = (0..500_000_u32).map(|index| (index % 251) as u8).collect();
    let large = Bytes::from(bytes);
    let sent = [message(), message_of(Uuid::new_v4(), large.clone()), message()];
    assert_eq!(ledger.append(&sent, 0).await?, 3);
    assert_eq!(stored(&ledger).await?[1].payload, large);
    Ok(())
}

// ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

async fn reading_ends_at_the_end(ledger: impl Ledger) -> Result<()> {
    assert!(stored(&ledger).await?.is_empty(), "an empty ledger ends at once");
    ledger.append(&batch(600), 0).await?;
    for (after, expected) in [(0, 600), (1, 599), (599, 1), (600, 0)] {
        let found = all(ledger.read(after).await?).await?;
        assert_eq!(found.len(), expected, "after {after}");
        let sequences: Vec<u64> = found.iter().map(|message| message.sequence).collect();
        assert_eq!(sequences, (after + 1..=600).collect::<Vec<_>>());
    }
    // What is stored after the read began is not part of it.
    let reading = ledger.read(0).await?;
    ledger.append(&batch(5), 600).await?;
    assert_eq!(all(reading).await?.len(), 600);
    Ok(())
}

async fn reading_beyond_the_end_says_that_the_stream_went_backwards(ledger: impl Ledger) -> Result<()> {
    ledger.append(&batch(2), 0).await?;
    let refused = ledger.read(3).await.map(|_| ());
    assert!(matches!(refused, Err(ReadError::WentBackwards { last: 2, seen: 3 })), "{refused:?}");
    Ok(())
}

async fn following_sees_what_is_there_and_what_comes(ledger: impl Ledger) -> Result<()> {
    ledger.append(&batch(3), 0).await?;
    let mut following = ledger.follow(1).await?;
    let mut from_the_end = ledger.follow(3).await?;
    assert_eq!(next(&mut following).await?.sequence, 2);
    assert_eq!(next(&mut following).await?.sequence, 3);
    // Neither the end of what is there nor a pause ends it.
    let quiet = tokio::time::timeout(SILENCE, following.next()).await;
    assert!(quiet.is_err(), "nothing was stored and yet it said {quiet:?}");
    ledger.append(&batch(2), 3).await?;
    ledger.append(&batch(1), 5).await?;
    for sequence in 4..=6 {
        assert_eq!(next(&mut following).await?.sequence, sequence);
        assert_eq!(next(&mut from_the_end).await?.sequence, sequence);
    }
    assert!(following.next().now_or_never().is_none(), "it waits for more");
    Ok(())
}

async fn next(messages: &mut Messages) -> Result<StoredMessage> {
    let next = tokio::time::timeout(PATIENCE, messages.next()).await?;
    Ok(next.expect("a follower does not end")?)
}

// ── What only one of them has ───────────────────────────────────────────────────────────────────────────────────

/// A server left at its default takes smaller batches; the twin can be such a one.
#[tokio::test]
async fn the_twin_can_have_a_smaller_limit() -> Result<()> {
    let ledger = MemoryLedger::default();
    ledger.limit_batches(10);
    let refused = ledger.append(&batch(11), 0).await;
    assert!(matches!(refused, Err(AppendError::TooLarge { messages: 11, .. })), "{refused:?}");
    assert_eq!(ledger.append(&batch(10), 0).await?, 10);
    Ok(())
}

/// `max_msg_size` guards the ledger against what is no event; the batch around it is refused with it.
#[tokio::test]
async fn the_server_refuses_what_is_larger_than_any_event() -> Result<()> {
    let world = World::without_postgres().await?;
    let ledger = world.ledger();
    let large = || message_of(Uuid::new_v4(), vec![b' '; 600_000].into());
    // Alone or last it is answered itself; before the last one the server only says that the batch is incomplete.
    for sent in [vec![large()], vec![message(), large()], vec![message(), large(), message()]] {
        let refused = ledger.append(&sent, 0).await;
        assert!(matches!(refused, Err(AppendError::Refused { .. } | AppendError::Incomplete(_))), "{refused:?}");
        assert_eq!(ledger.last_sequence().await?, 0);
    }
    assert_eq!(ledger.append(&batch(2), 0).await?, 2, "it does not stand in the way of others");
    world.close();
    Ok(())
}

/// A long range is read by other means than a short one: by a consumer of one's own, by direct gets, or through the consumer
/// that is there for rebuilding.
#[tokio::test]
async fn a_long_ledger_reads_the_same_by_whatever_means() -> Result<()> {
    let world = World::without_postgres().await?;
    let (ledger, stream) = (world.ledger(), world.context.get_stream(INVENTORY).await?);
    let mut sent = Vec::new();
    for _ in 0..3 {
        let batch = batch(MAX_BATCH_MESSAGES);
        ledger.append(&batch, sent.len() as u64).await?;
        sent.extend(ids(&batch));
    }
    let read_only = || JetStreamLedger::read_only(world.context.clone(), INVENTORY);
    let through = || read_only().through(REBUILD);
    let delivered = async || anyhow::Ok(stream.consumer_info(REBUILD).await?.delivered.stream_sequence);

    for after in [0, 2_500] {
        for ledger in [world.ledger(), read_only()] {
            assert_eq!(stored_ids(&all(ledger.read(after).await?).await?), sent[usize::try_from(after)?..]);
        }
    }
    assert_eq!(delivered().await?, 0, "they left it alone");
    let reader = through();
    for after in [0, 2_500, 0] {
        assert_eq!(stored_ids(&all(reader.read(after).await?).await?), sent[usize::try_from(after)?..]);
        assert_eq!(delivered().await?, sent.len() as u64);
    }

    // Two at once take each other's messages away: what comes is right as far as it goes, and the next try has all.
    let (one, other) = (through(), through());
    let mut begun = one.read(0).await?;
    let mut found = vec![next(&mut begun).await?];
    let (interrupted, others) = tokio::join!(
        async {
            while let Some(message) = begun.next().await {
                found.push(message?);
            }
            Ok(())
        },
        async { all(other.read(0).await?).await }
    );
    let taken: Result<(), ReadError> = interrupted;
    assert!(taken.as_ref().is_ok_and(|()| found.len() == sent.len()) || taken.is_err_and(|error| error.is_transient()));
    assert_eq!(stored_ids(&found), sent[..found.len()]);
    if let Ok(others) = others {
        assert_eq!(stored_ids(&others), sent);
    }
    for ledger in [one, other] {
        assert_eq!(stored_ids(&stored(&ledger).await?), sent);
    }

    // An older deployment does not have it.
    stream.delete_consumer(REBUILD).await?;
    assert_eq!(stored_ids(&stored(&through()).await?), sent);
    world.close();
    Ok(())
}

/// A stream that is not there is a fault to recover from and not the end of a writer.
#[tokio::test]
async fn without_its_stream_the_outcome_is_unknown() -> Result<()> {
    let world = World::without_postgres().await?;
    let ledger = world.ledger();
    world.context.delete_stream(INVENTORY).await?;
    let outcome = ledger.append(&batch(2), 0).await;
    assert!(matches!(outcome, Err(AppendError::Unknown(_))), "{outcome:?}");
    let read = ledger.read(0).await.map(|_| ());
    assert!(matches!(read, Err(ReadError::Unavailable(_))), "{read:?}");
    world.close();
    Ok(())
}
