//! What the projector has read and not written yet: the next transaction, which fills while one is at work.
//!
//! Owns where a transaction is cut: at the end of an atomic batch, so that readers never see half an order, when nothing more is
//! there or enough is. So the transactions of a projector that is behind are large, and those of one that keeps up come at once.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use lomash_ledger::{Messages, ReadError, StoredMessage};

use super::{IDLE_CHECK, ProjectionError};

/// Messages after which a transaction is cut at the next end of a batch. The more, the more changes of one product are one
/// row; as many take some 0.3 s. While they are applied, as many more are read.
pub const BATCH_MESSAGES: usize = 20_000;

/// Bytes of headers and payload after which it is, too: refusals of long orders are some 100 kB each.
pub const BATCH_BYTES: usize = 16 << 20;

/// How long the rest of a batch whose beginning was read may take to arrive.
pub(super) const REST_TIMEOUT: Duration = Duration::from_secs(5);

/// Messages that were read and not applied yet.
pub(super) struct Gathered {
    stream: Messages,
    messages: Vec<StoredMessage>,
    bytes: usize,
    /// Why there are no more.
    problem: Option<ReadError>,
}

impl Gathered {
    /// Nothing yet, from this stream.
    pub(super) const fn of(stream: Messages) -> Self {
        Self { stream, messages: Vec::new(), bytes: 0, problem: None }
    }

    /// Whether an atomic batch ends here.
    fn is_whole(&self) -> bool {
        self.messages.last().is_some_and(StoredMessage::ends_batch)
    }

    fn is_full(&self) -> bool {
        self.is_whole() && (self.messages.len() >= BATCH_MESSAGES || self.bytes >= BATCH_BYTES)
    }

    fn take(&mut self, next: Option<Result<StoredMessage, ReadError>>) {
        match next {
            Some(Ok(message)) => {
                self.bytes += message.bytes();
                self.messages.push(message);
            }
            Some(Err(problem)) => self.problem = Some(problem),
            None => self.problem = Some(ReadError::Unavailable("the stream's reader ended".to_owned())),
        }
    }

    /// Reads on while `applying` is at work, and returns what that comes to.
    pub(super) async fn meanwhile<T>(&mut self, applying: impl Future<Output = T>) -> T {
        let mut applying = pin!(applying);
        loop {
            let reads_on = self.problem.is_none() && !self.is_full();
            tokio::select! {
                biased;
                applied = &mut applying => return applied,
                next = self.stream.next(), if reads_on => self.take(next),
            }
        }
    }

    /// The messages that are there, up to where an atomic batch ends; none when none came for [`IDLE_CHECK`].
    ///
    /// # Errors
    /// When the stream cannot be read on, or the rest of an atomic batch does not come.
    pub(super) async fn batch(&mut self) -> Result<Vec<StoredMessage>, ProjectionError> {
        loop {
            if self.is_full() || self.is_whole() && self.problem.is_some() {
                break;
            }
            if let Some(problem) = self.problem.take() {
                return Err(problem.into());
            }
            let next = if self.messages.is_empty() {
                match tokio::time::timeout(IDLE_CHECK, self.stream.next()).await {
                    Ok(next) => next,
                    Err(_) => break,
                }
            } else if self.is_whole() {
                match self.stream.next().now_or_never() {
                    Some(next) => next,
                    None => break,
                }
            } else {
                let rest = tokio::time::timeout(REST_TIMEOUT, self.stream.next()).await;
                let seen = self.messages.last().map_or(0, |message| message.sequence);
                rest.map_err(|_| ProjectionError::Stalled(seen))?
            };
            self.take(next);
        }
        self.bytes = 0;
        Ok(std::mem::take(&mut self.messages))
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use lomash_ledger::{BatchPosition, Carried};
    use proptest::prelude::*;
    use time::OffsetDateTime;
    use tokio::sync::mpsc;

    use super::*;

    /// Messages of atomic batches of these sizes, one batch after the other.
    fn messages(sizes: &[usize], bytes: usize) -> Vec<StoredMessage> {
        let ends = sizes.iter().flat_map(|size| (1..=*size).map(move |position| position == *size));
        let message = |(commit, sequence)| StoredMessage {
            sequence,
            stored_at: OffsetDateTime::UNIX_EPOCH,
            subject: String::new(),
            message_id: None,
            expected_last_sequence: None,
            batch: Some(BatchPosition { id: String::new(), sequence: 1, commit }),
            carried: Carried::default(),
            payload: vec![0; bytes].into(),
        };
        ends.zip(1..).map(message).collect()
    }

    type Feed = mpsc::UnboundedSender<Result<StoredMessage, ReadError>>;

    /// What reads a stream that is fed by hand, and ends when it is fed no more.
    fn fed() -> (Feed, Gathered) {
        let (feed, fed) = mpsc::unbounded_channel();
        let stream = stream::unfold(fed, async |mut fed| fed.recv().await.map(|next| (next, fed)));
        (feed, Gathered::of(stream.boxed()))
    }

    fn feed_all(feed: &Feed, messages: impl IntoIterator<Item = StoredMessage>) {
        messages.into_iter().for_each(|message| feed.send(Ok(message)).expect("somebody reads"));
    }

    fn sequences(batch: &[StoredMessage]) -> Vec<u64> {
        batch.iter().map(|message| message.sequence).collect()
    }

    /// Ends when there was time to read everything that was fed.
    async fn applied() {
        for _ in 0..2 * BATCH_MESSAGES {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn while_a_batch_is_applied_the_next_is_read() {
        let (feed, mut gathered) = fed();
        feed_all(&feed, messages(&[1, 2, 3], 0));
        gathered.meanwhile(applied()).await;
        assert_eq!(sequences(&gathered.messages), [1, 2, 3, 4, 5, 6]);
        // Half of the fourth is there. It is waited for, and the fifth is not.
        let mut more = messages(&[1, 2, 3, 2, 2], 0).split_off(6);
        let fifth = more.split_off(2);
        let rest = more.pop();
        feed_all(&feed, more);
        gathered.meanwhile(applied()).await;
        feed_all(&feed, rest);
        assert_eq!(sequences(&gathered.batch().await.expect("a batch")), [1, 2, 3, 4, 5, 6, 7, 8]);
        feed_all(&feed, fifth);
        assert_eq!(sequences(&gathered.batch().await.expect("a batch")), [9, 10]);
    }

    #[tokio::test]
    async fn no_more_is_held_than_one_transaction_takes() {
        for (sizes, bytes, held) in [
            (vec![1; BATCH_MESSAGES + 10], 0, BATCH_MESSAGES),
            (vec![1; 40], BATCH_BYTES / 16, 16),
            // What cannot be cut is not.
            (vec![30, 10], BATCH_BYTES / 16, 30),
        ] {
            let (feed, mut gathered) = fed();
            feed_all(&feed, messages(&sizes, bytes));
            gathered.meanwhile(applied()).await;
            assert_eq!(gathered.messages.len(), held);
            assert_eq!(gathered.batch().await.expect("a batch").len(), held);
        }
    }

    #[tokio::test]
    async fn what_ends_the_reading_is_told_after_what_came_before() {
        let (feed, mut gathered) = fed();
        feed_all(&feed, messages(&[1, 1], 0));
        feed.send(Err(ReadError::Gap { after: 2, found: 4 })).expect("somebody reads");
        gathered.meanwhile(applied()).await;
        assert_eq!(sequences(&gathered.batch().await.expect("a batch")), [1, 2]);
        let told = gathered.batch().await.map(|batch| sequences(&batch));
        assert!(matches!(told, Err(ProjectionError::Read(ReadError::Gap { after: 2, found: 4 }))), "{told:?}");

        let (feed, mut gathered) = fed();
        drop(feed);
        let told = gathered.batch().await.map(|batch| sequences(&batch));
        assert!(matches!(told, Err(ProjectionError::Read(ReadError::Unavailable(_)))), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_an_empty_batch_and_within_an_order_a_fault() {
        let (feed, mut gathered) = fed();
        assert!(gathered.batch().await.expect("nothing").is_empty());
        feed_all(&feed, messages(&[2], 0).into_iter().take(1));
        let told = gathered.batch().await.map(|batch| sequences(&batch));
        assert!(matches!(told, Err(ProjectionError::Stalled(1))), "{told:?}");
    }

    proptest! {
        /// However messages arrive, every batch ends where an atomic one does, and all come once and in order.
        #[test]
        fn batches_are_whole_and_complete(
            sizes in proptest::collection::vec(1usize..5, 1..40),
            arrivals in proptest::collection::vec(1usize..9, 1..40),
        ) {
            let all = messages(&sizes, 0);
            let (feed, mut gathered) = fed();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            let runtime = runtime.expect("a runtime");
            let batches = runtime.block_on(async {
                let feeding = tokio::spawn({
                    let mut left = all.clone().into_iter();
                    async move {
                        for count in arrivals.into_iter().cycle() {
                            let arrived: Vec<_> = left.by_ref().take(count).collect();
                            if arrived.is_empty() {
                                break;
                            }
                            feed_all(&feed, arrived);
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    }
                });
                let mut batches = Vec::new();
                while let Ok(batch) = gathered.batch().await {
                    batches.push(batch);
                    gathered.meanwhile(tokio::time::sleep(Duration::from_millis(25))).await;
                }
                feeding.await.expect("all was fed");
                batches
            });
            prop_assert!(batches.iter().all(|batch| batch.last().is_some_and(StoredMessage::ends_batch)));
            let together: Vec<u64> = batches.iter().flat_map(|batch| sequences(batch)).collect();
            prop_assert_eq!(together, sequences(&all));
        }
    }
}
