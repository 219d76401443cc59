//! What readers are told: that it equals the events, that it comes by an index, and that neither a swap of schemas nor a
//! restart of Postgres shows in it.
//!
//! Owns its histories: most tests here tell the projector a ledger of their own making, with store times as close together
//! as a server can make them, and hold every answer against a fold of the same events by other means.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use lomash::audit::micros;
use lomash::rebuild::{self, Options};
use lomash::stack::{Postgres, scratch};
use lomash::verify::Show;
use lomash_contract::{
    ChangedField, CommandAnswered, ContentType, CountedBy, Envelope, EventId, FailedItem, FailureReason, Fingerprint,
    InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, Payload, ProductDetails,
    ProductId, ProductRegistered, ProductRevised, ProductUpdated, Sku, Timestamp, Trigger, UpdatedBy, codec,
};
use lomash_ledger::{AppendError, BatchPosition, Carried, Ledger, Messages, NewMessage, ReadError, StoredMessage};
use lomash_platform::Secret;
use lomash_platform::postgres::Schema;
use lomash_platform::reader::Unreadable;
use lomash_tests::{Dice, PATIENCE, World, count, eventually, nowhere, order};
use product_service::projected::{NotYetProjected, Projected, WAIT_TIMEOUT};
use product_service::projection::{self, AFTER_COMMIT_TIMEOUT, AfterCommit};
use product_service::reads::{
    AllocatedLine, AsOf, At, Count, Decision, DecisionOutcome, FailedLine, HistoryQuery, MAX_PAGE, Movement, NotFound,
    PastStock, Product, ProductFilter, ProductKey, ProductQuery, ProductSort, QueryError, READ_TIMEOUT, Reads, SortBy,
    SortValue, StockThen, Words,
};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

// ── A ledger of the test's own making ───────────────────────────────────────────────────────────────────────────

/// A ledger that holds what it was told.
#[derive(Clone)]
struct Told {
    messages: Arc<Mutex<Vec<StoredMessage>>>,
    last: Arc<watch::Sender<u64>>,
}

impl Told {
    fn message(&self, sequence: u64) -> Option<StoredMessage> {
        self.messages.lock().unwrap().get(usize::try_from(sequence).ok()?.checked_sub(1)?).cloned()
    }
}

impl Ledger for Told {
    fn stage(
        &self,
        _: Vec<NewMessage>,
        _: u64,
        _: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static {
        std::future::ready(Err(AppendError::Refused { code: 0, description: "it is only read".to_owned() }))
    }

    async fn last_sequence(&self) -> Result<u64, ReadError> {
        Ok(*self.last.borrow())
    }

    async fn read(&self, after: u64) -> Result<Messages, ReadError> {
        let last = *self.last.borrow();
        Ok(self.follow(after).await?.take(usize::try_from(last.saturating_sub(after)).unwrap()).boxed())
    }

    async fn follow(&self, after: u64) -> Result<Messages, ReadError> {
        let messages = futures::stream::unfold((self.clone(), self.last.subscribe(), after + 1), async |state| {
            let (told, mut last, next) = state;
            last.wait_for(|last| *last >= next).await.ok()?;
            let message = told.message(next)?;
            Some((Ok(message), (told, last, next + 1)))
        });
        Ok(messages.boxed())
    }
}

/// Writes a history of everything that happens to products.
struct Books {
    told: Told,
    now: OffsetDateTime,
    products: BTreeMap<ProductId, (ProductDetails, u32)>,
    orders: Vec<OrderId>,
}

impl Books {
    fn new() -> Self {
        let told = Told { messages: Arc::default(), last: Arc::new(watch::Sender::new(0)) };
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::days(20_000);
        Self { told, now, products: BTreeMap::new(), orders: Vec::new() }
    }

    fn last(&self) -> u64 {
        *self.told.last.borrow()
    }

    /// Stores a batch. Several events share a microsecond now and then, a whole millisecond often.
    fn store(&mut self, dice: &mut Dice, events: Vec<LedgerEvent>, reason: Option<&str>) {
        fn bytes<P: Payload + Clone>(payload: &P, id: EventId, at: OffsetDateTime) -> Bytes {
            codec::encode(ContentType::Json, &Envelope::new(id, Timestamp::new(at), payload.clone())).into()
        }
        let (before, count, batch) = (self.last(), events.len(), dice.uuid().to_string());
        let mut messages = self.told.messages.lock().unwrap();
        for (index, event) in events.into_iter().enumerate() {
            self.now += time::Duration::nanoseconds(*dice.pick(&[0, 0, 300, 1_000, 2_500, 1_000_000, 70_000_000]));
            let id = EventId(dice.uuid());
            // The writer's clock is no clock at all.
            let at = self.now - time::Duration::seconds(dice.below(1_000).into());
            let payload = match &event {
                LedgerEvent::InventoryUpdated(payload) => bytes(payload, id, at),
                LedgerEvent::InventoryUpdateFailed(payload) => bytes(payload, id, at),
                LedgerEvent::InventoryCounted(payload) => bytes(payload, id, at),
                LedgerEvent::ProductRegistered(payload) => bytes(payload, id, at),
                LedgerEvent::ProductRevised(payload) => bytes(payload, id, at),
                LedgerEvent::ProductUpdated(payload) => bytes(payload, id, at),
                LedgerEvent::CommandAnswered(payload) => bytes(payload, id, at),
            };
            messages.push(StoredMessage {
                sequence: before + 1 + index as u64,
                stored_at: self.now,
                subject: event.subject().to_string(),
                message_id: Some(id.to_string()),
                expected_last_sequence: (index == 0).then_some(before),
                batch: Some(BatchPosition {
                    id: batch.clone(),
                    sequence: index as u64 + 1,
                    commit: index + 1 == count,
                }),
                carried: Carried { reason: reason.map(str::to_owned), ..Carried::default() },
                payload,
            });
        }
        drop(messages);
        self.told.last.send_replace(before + count as u64);
    }

    fn details(&self, dice: &mut Dice, product_id: ProductId) -> ProductDetails {
        let number = self.products.len();
        let known = self.products.get(&product_id).map(|(details, _)| details.sku.clone());
        let adjective = *dice.pick(&["Oak", "oak", "Küchen-", "GROSSE", "Élan", "x2"]);
        let noun = *dice.pick(&["worktop", "Schränke", "door/left", "handle 12mm", "—", "oakwood"]);
        ProductDetails {
            product_id,
            sku: known
                .unwrap_or_else(|| format!("{}-{number:04}", dice.pick(&["KIT", "Bed", "kit/A"])).parse().unwrap()),
            name: format!("{adjective} {noun}").into(),
            category: dice.pick(&[None, Some("kitchen"), Some("bedroom"), Some("Küche")]).map(Into::into),
            low_stock_threshold: *dice.pick(&[None, None, Some(0), Some(5), Some(40)]),
            active: dice.below(5) > 0,
        }
    }

    fn register(&mut self, dice: &mut Dice) -> ProductId {
        let product_id = ProductId(dice.uuid());
        let details = self.details(dice, product_id);
        self.products.insert(product_id, (details.clone(), 0));
        let mut events = vec![LedgerEvent::ProductRegistered(ProductRegistered(details))];
        if dice.below(3) > 0 {
            let quantity = 1 + dice.below(60);
            events.push(self.change(product_id, quantity, Trigger::AdminUpdate, None, UpdatedBy::System));
        }
        self.store(dice, events, None);
        product_id
    }

    fn change(
        &mut self,
        product_id: ProductId,
        quantity: u32,
        trigger: Trigger,
        order_id: Option<OrderId>,
        updated_by: UpdatedBy,
    ) -> LedgerEvent {
        let (details, stock) = self.products.get_mut(&product_id).unwrap();
        LedgerEvent::InventoryUpdated(InventoryUpdated {
            product_id,
            sku: details.sku.clone(),
            previous_quantity: std::mem::replace(stock, quantity),
            new_quantity: quantity,
            trigger,
            order_id,
            updated_by,
        })
    }

    /// Something happens.
    fn go_on(&mut self, dice: &mut Dice) {
        let ids: Vec<ProductId> = self.products.keys().copied().collect();
        let id = *dice.pick(&ids);
        let stock = self.products[&id].1;
        match dice.below(12) {
            0 => {
                self.register(dice);
            }
            1 => {
                let details = self.details(dice, id);
                self.products.get_mut(&id).unwrap().0 = details.clone();
                let named = ProductUpdated {
                    product_id: id,
                    changed_fields: vec![ChangedField::Name],
                    updated_at: Timestamp::new(self.now),
                };
                let revised = LedgerEvent::ProductRevised(ProductRevised(details));
                self.store(dice, vec![revised, LedgerEvent::ProductUpdated(named)], None);
            }
            2 => {
                let (sku, counted_by) = (
                    self.products[&id].0.sku.clone(),
                    if dice.below(2) == 0 { CountedBy::Warehouse } else { CountedBy::User(dice.uuid()) },
                );
                let counted_at = Timestamp::new(self.now - time::Duration::hours(dice.below(9).into()));
                let counted =
                    InventoryCounted { product_id: id, sku, quantity: dice.below(99), counted_at, counted_by };
                self.store(dice, vec![LedgerEvent::InventoryCounted(counted)], None);
            }
            3 | 4 => {
                let (trigger, by, reason) = if dice.below(2) == 0 {
                    (Trigger::ScheduledSync, UpdatedBy::System, None)
                } else {
                    (Trigger::AdminUpdate, UpdatedBy::User(dice.uuid()), Some("found behind a shelf"))
                };
                let event = self.change(id, stock + 1 + dice.below(50), trigger, None, by);
                // What was asked for under a key has its answer before it, which no read shows.
                let answered = LedgerEvent::CommandAnswered(CommandAnswered {
                    command_id: dice.uuid(),
                    fingerprint: Fingerprint(7),
                    product_id: ProductId(event.key()),
                    requested_by: UpdatedBy::System,
                    events: 1,
                    refusal: None,
                });
                let events = if reason.is_some() { vec![answered, event] } else { vec![event] };
                self.store(dice, events, reason);
            }
            5 => {
                let order_id = OrderId(dice.uuid());
                let item = FailedItem {
                    product_id: id,
                    sku: Some(self.products[&id].0.sku.clone()),
                    requested: stock + 1,
                    available: stock,
                };
                let unknown = FailedItem { product_id: ProductId(dice.uuid()), sku: None, requested: 1, available: 0 };
                let (reason, items) = if dice.below(2) == 0 {
                    (FailureReason::InsufficientStock, vec![item])
                } else {
                    (FailureReason::UnknownProduct, vec![unknown])
                };
                self.orders.push(order_id);
                let failed = InventoryUpdateFailed { order_id, reason, items };
                self.store(dice, vec![LedgerEvent::InventoryUpdateFailed(failed)], None);
            }
            _ => {
                let order_id = OrderId(dice.uuid());
                let wanted: BTreeSet<ProductId> = (0..=dice.below(4)).map(|_| *dice.pick(&ids)).collect();
                let lines: Vec<ProductId> = wanted.into_iter().filter(|id| self.products[id].1 > 0).collect();
                let mut events = Vec::new();
                for id in lines {
                    let stock = self.products[&id].1;
                    // Half of the time all of it.
                    let left = if dice.below(2) == 0 { 0 } else { dice.below(stock) };
                    events.push(self.change(id, left, Trigger::OrderConfirmed, Some(order_id), UpdatedBy::System));
                }
                if !events.is_empty() {
                    self.orders.push(order_id);
                    self.store(dice, events, None);
                }
            }
        }
    }

    fn events(&self) -> Vec<(StoredMessage, Envelope<LedgerEvent>)> {
        let messages = self.told.messages.lock().unwrap().clone();
        messages.into_iter().map(|message| (message.clone(), message.parse().unwrap())).collect()
    }
}

// ── What must be answered, by other means ───────────────────────────────────────────────────────────────────────

#[derive(Default)]
struct Oracle {
    products: BTreeMap<ProductId, Product>,
    registered: BTreeMap<ProductId, (u64, OffsetDateTime)>,
    movements: BTreeMap<ProductId, Vec<(OffsetDateTime, Movement)>>,
    decisions: BTreeMap<OrderId, Decision>,
    counts: Vec<Count>,
}

impl Oracle {
    fn of(books: &Books) -> Self {
        let mut oracle = Self::default();
        for (message, envelope) in books.events() {
            oracle.take(&message, envelope);
        }
        oracle
    }

    fn take(&mut self, message: &StoredMessage, Envelope { event_id, timestamp, payload, .. }: Envelope<LedgerEvent>) {
        let (sequence, stored_at) = (message.sequence, Timestamp::new(message.stored_at));
        match payload {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => {
                let id = details.product_id;
                let product = Product {
                    product_id: id,
                    sku: details.sku,
                    name: details.name.into(),
                    category: details.category.map(Into::into),
                    low_stock_threshold: details.low_stock_threshold,
                    active: details.active,
                    quantity: 0,
                    is_available: false,
                    version: sequence,
                    registered_at: stored_at,
                    updated_at: stored_at,
                };
                self.products.insert(id, product);
                self.registered.insert(id, (sequence, message.stored_at));
                self.movements.insert(id, Vec::new());
            }
            LedgerEvent::ProductRevised(ProductRevised(details)) => {
                let product = self.products.get_mut(&details.product_id).unwrap();
                product.sku = details.sku;
                product.name = details.name.into();
                product.category = details.category.map(Into::into);
                product.low_stock_threshold = details.low_stock_threshold;
                product.active = details.active;
                (product.version, product.updated_at) = (sequence, stored_at);
            }
            LedgerEvent::InventoryUpdated(updated) => {
                let product = self.products.get_mut(&updated.product_id).unwrap();
                product.quantity = updated.new_quantity;
                product.is_available = updated.new_quantity > 0;
                (product.version, product.updated_at) = (sequence, stored_at);
                if let Some(order_id) = updated.order_id {
                    let decision = self.decisions.entry(order_id).or_insert_with(|| Decision {
                        order_id,
                        outcome: DecisionOutcome::Allocated,
                        reason: None,
                        failed: Vec::new(),
                        allocated: Vec::new(),
                        sequence,
                        decided_at: stored_at,
                    });
                    decision.allocated.push(AllocatedLine {
                        product_id: updated.product_id,
                        sku: updated.sku,
                        quantity: updated.previous_quantity - updated.new_quantity,
                        sequence,
                    });
                }
                let movement = Movement {
                    sequence,
                    event_id,
                    previous_quantity: updated.previous_quantity,
                    new_quantity: updated.new_quantity,
                    trigger: updated.trigger,
                    order_id: updated.order_id,
                    updated_by: updated.updated_by,
                    reason: message.carried.reason.clone(),
                    occurred_at: timestamp,
                    stored_at,
                };
                self.movements.get_mut(&updated.product_id).unwrap().push((message.stored_at, movement));
            }
            LedgerEvent::InventoryUpdateFailed(failed) => {
                let lines = failed.items.into_iter().map(|item| FailedLine {
                    product_id: item.product_id,
                    sku: item.sku,
                    requested: item.requested,
                    available: item.available,
                });
                let decision = Decision {
                    order_id: failed.order_id,
                    outcome: DecisionOutcome::Refused,
                    reason: Some(failed.reason),
                    failed: lines.collect(),
                    allocated: Vec::new(),
                    sequence,
                    decided_at: stored_at,
                };
                self.decisions.insert(failed.order_id, decision);
            }
            LedgerEvent::InventoryCounted(counted) => self.counts.push(Count {
                sequence,
                event_id,
                product_id: counted.product_id,
                quantity: counted.quantity,
                counted_at: counted.counted_at,
                counted_by: counted.counted_by,
                stored_at,
            }),
            LedgerEvent::ProductUpdated(_) | LedgerEvent::CommandAnswered(_) => {}
        }
    }

    /// All that a list holds, in its order.
    fn list(&self, filter: &ProductFilter, text: Option<&str>, sort: ProductSort) -> Vec<Product> {
        let begins = |product: &Product, word: &str| {
            let all = format!("{} {}", product.sku, product.name).to_lowercase();
            let starts = all.char_indices().filter(|(at, letter)| {
                letter.is_alphanumeric() && !all[..*at].chars().next_back().is_some_and(char::is_alphanumeric)
            });
            starts.into_iter().any(|(at, _)| all[at..].starts_with(word))
        };
        let matches = |product: &&Product| {
            let low = product.quantity <= product.low_stock_threshold.unwrap_or(3);
            let mut words = text.unwrap_or_default().split([' ', '-', '/']).filter(|word| !word.is_empty());
            filter.category.as_ref().is_none_or(|category| product.category.as_ref() == Some(category))
                && filter.available.is_none_or(|available| product.is_available == available)
                && filter.below_threshold.is_none_or(|below| low == below)
                && filter.active.is_none_or(|active| product.active == active)
                && filter.sku.as_ref().is_none_or(|sku| product.sku.as_str() == sku)
                && words.all(|word| begins(product, &word.to_lowercase()))
        };
        let mut list: Vec<Product> = self.products.values().filter(matches).cloned().collect();
        list.sort_by(|one, other| {
            let by = match sort.by {
                SortBy::Sku => one.sku.as_str().as_bytes().cmp(other.sku.as_str().as_bytes()),
                SortBy::Name => one.name.as_bytes().cmp(other.name.as_bytes()),
                SortBy::Quantity => one.quantity.cmp(&other.quantity),
                SortBy::Updated => one.version.cmp(&other.version),
            };
            by.then(one.product_id.0.cmp(&other.product_id.0))
        });
        if sort.descending {
            list.reverse();
        }
        list
    }

    /// The stock after all movements that `until` admits.
    fn stock(&self, id: ProductId, until: impl Fn(&OffsetDateTime, &Movement) -> bool) -> PastStock {
        let moved = self.movements[&id].iter().rfind(|(at, movement)| until(at, movement));
        let (registered_sequence, registered_at) = self.registered[&id];
        let (quantity, sequence, since) = match moved {
            Some((_, movement)) => (movement.new_quantity, movement.sequence, movement.stored_at),
            None => (0, registered_sequence, Timestamp::new(registered_at)),
        };
        let sku = self.products[&id].sku.clone();
        PastStock { product_id: id, sku, quantity, is_available: quantity > 0, sequence, since }
    }
}

// ── Postgres, and a projector on it ─────────────────────────────────────────────────────────────────────────────

struct Shop {
    books: Books,
    reads: Reads,
    projected: Projected,
    stop: CancellationToken,
    projector: JoinHandle<Result<(), projection::ProjectionError>>,
    url: Secret,
    _postgres: Postgres,
    _dir: tempfile::TempDir,
}

impl Shop {
    async fn open(books: Books, after_commit: impl AfterCommit) -> Result<Self> {
        let dir = scratch()?;
        let postgres = Postgres::start(&dir.path().join("postgres")).await?;
        let url = Secret::from(postgres.url());
        let pool = lomash_platform::postgres::pool(&url)?;
        let (stop, projected) = (CancellationToken::new(), Projected::new(pool, &lomash_platform::postgres::INVENTORY));
        let projecting =
            projection::run(books.told.clone(), url.clone(), projected.clone(), after_commit, stop.clone());
        let projector = tokio::spawn(projecting);
        let reads = Reads::new(&url)?;
        Ok(Self { books, reads, projected, stop, projector, url, _postgres: postgres, _dir: dir })
    }

    /// Waits until all that happened is projected.
    async fn caught_up(&self) -> Result<()> {
        let last = self.books.last();
        eventually("the projection", PATIENCE, async || Ok(Some(self.projected.wait_for(last).await?))).await?;
        Ok(())
    }

    async fn close(self) -> Result<()> {
        self.stop.cancel();
        Ok(self.projector.await??)
    }
}

/// All pieces of a list together.
async fn walk(reads: &Reads, query: &ProductQuery) -> Result<Vec<Product>> {
    let mut query = query.clone();
    let mut all = Vec::new();
    loop {
        let page = reads.products(&query).await?.value;
        ensure!(page.items.len() <= usize::from(query.limit), "a page is too long");
        ensure!(page.next.is_none() || !page.items.is_empty(), "an empty page has no next one");
        all.extend(page.items);
        match page.next {
            Some(next) => query.after = Some(next),
            None => return Ok(all),
        }
    }
}

fn assert_kept<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let packed = rmp_serde::to_vec(value).unwrap();
    assert_eq!(&rmp_serde::from_slice::<T>(&packed).unwrap(), value, "as the cache keeps it");
    let json = serde_json::to_string(value).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&json).unwrap(), value, "as HTTP shows it");
}

#[tokio::test]
async fn every_answer_equals_the_events() -> Result<()> {
    let mut dice = Dice::thrown();
    let mut books = Books::new();
    for _ in 0..30 {
        books.register(&mut dice);
    }
    for _ in 0..900 {
        books.go_on(&mut dice);
    }
    let shop = Shop::open(books, ()).await?;
    shop.caught_up().await?;
    let (reads, last) = (&shop.reads, shop.books.last());
    let oracle = Oracle::of(&shop.books);
    let nobody = ProductId(dice.uuid());

    for (id, product) in &oracle.products {
        assert_eq!(reads.product(*id).await?, At { sequence: last, value: product.clone() });
        assert_kept(product);
    }
    let unknown = reads.product(nobody).await.unwrap_err();
    assert!(
        matches!(unknown, QueryError::NotFound { what: NotFound::Product(id), sequence } if id == nobody && sequence == last)
    );

    // Lists.
    let skus: Vec<Sku> = oracle.products.values().map(|product| product.sku.clone()).collect();
    let texts =
        ["oak", "OAKW", "kü", "gross tür", "x2 do", "kit", "kit/a 00", "12", "0", "élan", "KIT-00", "ak", "worktops"];
    let mut found = 0;
    for _ in 0..400 {
        let flag = |dice: &mut Dice| *dice.pick(&[None, None, Some(true), Some(false)]);
        let text = (dice.below(3) == 0).then(|| *dice.pick(&texts));
        let filter = ProductFilter {
            category: dice.pick(&[None, None, Some("kitchen"), Some("Küche"), Some("none")]).map(str::to_owned),
            available: flag(&mut dice),
            below_threshold: flag(&mut dice),
            active: flag(&mut dice),
            sku: (dice.below(9) == 0).then(|| dice.pick(&skus).as_str().to_owned()),
            words: text.map(|text| text.parse::<Words>()).transpose()?,
        };
        let by = *dice.pick(&[SortBy::Sku, SortBy::Name, SortBy::Quantity, SortBy::Updated]);
        let sort = ProductSort { by, descending: dice.below(2) == 0 };
        let limit = *dice.pick(&[1, 2, 7, 50, MAX_PAGE]);
        let expected = oracle.list(&filter, text, sort);
        let query = ProductQuery { filter, sort, after: None, limit };
        assert_eq!(walk(reads, &query).await?, expected, "{query:?}");
        found += expected.len();
    }
    assert!(found > 1_000, "the filters let something through: {found}");
    let all = reads.products(&ProductQuery { limit: 0, ..ProductQuery::default() }).await?;
    assert_eq!((all.sequence, all.value.items.len()), (last, 1), "a limit of none is one");
    let after = Some(ProductKey { value: SortValue::Number(3), product_id: nobody });
    let other_sort = reads.products(&ProductQuery { after, ..ProductQuery::default() }).await;
    assert!(matches!(other_sort, Err(QueryError::OtherSort)));

    // Many at once.
    let mut some: Vec<Sku> = skus.iter().step_by(3).cloned().collect();
    some.push("NONE-1".parse()?);
    let by_skus = reads.products_by_skus(&some).await?;
    assert_eq!((by_skus.sequence, by_skus.value.len()), (last, some.len() - 1));
    assert!(
        by_skus
            .value
            .iter()
            .all(|(sku, product)| *sku == product.sku && oracle.products[&product.product_id] == *product)
    );
    let ids: Vec<ProductId> = oracle.products.keys().copied().chain([nobody]).collect();
    let by_ids = reads.products_by_ids(&ids).await?.value;
    assert_eq!(by_ids.into_iter().collect::<BTreeMap<_, _>>(), oracle.products);
    let of_none = reads.products_by_ids(&[]).await?;
    assert_eq!((of_none.sequence, of_none.value.len()), (last, 0));

    // Past stock, by sequence and by instant; and of many at once.
    let instants: Vec<OffsetDateTime> = shop.books.events().iter().map(|(message, _)| message.stored_at).collect();
    let mut asked = Vec::new();
    for id in oracle.products.keys() {
        let (registered_sequence, registered_at) = oracle.registered[id];
        for _ in 0..12 {
            let sequence = u64::from(dice.below(u32::try_from(last)? + 1));
            let then = reads.stock_as_of(*id, AsOf::Sequence(sequence)).await;
            if sequence < registered_sequence {
                assert!(matches!(
                    then,
                    Err(QueryError::NotFound { what: NotFound::NotYetRegistered { registered_sequence: when, .. }, .. })
                        if when == registered_sequence
                ));
            } else {
                let expected = oracle.stock(*id, |_, movement| movement.sequence <= sequence);
                assert_eq!(then?, At { sequence: last, value: expected }, "as of {sequence}");
            }
            let at = *dice.pick(&instants) + time::Duration::microseconds(i64::from(dice.below(3)) - 1);
            let then = reads.stock_as_of(*id, AsOf::Instant(at)).await;
            if micros(registered_at) > micros(at) {
                assert!(matches!(then, Err(QueryError::NotFound { what: NotFound::NotYetRegistered { .. }, .. })));
                asked.push(((*id, at), StockThen::NotYetRegistered));
            } else {
                let expected = oracle.stock(*id, |stored_at, _| micros(*stored_at) <= micros(at));
                assert_eq!(then?.value, expected, "as of {at}");
                assert_kept(&expected);
                asked.push(((*id, at), StockThen::Quantity(expected.quantity)));
            }
        }
    }
    asked.push(((nobody, instants[0]), StockThen::Unknown));
    let (moments, expected): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
    assert_eq!(reads.stock_as_of_each(&moments).await?, At { sequence: last, value: expected });
    assert_eq!(reads.stock_as_of_each(&[]).await?, At { sequence: last, value: Vec::new() });
    let (some, _) = oracle.products.first_key_value().unwrap();
    let future = reads.stock_as_of(*some, AsOf::Sequence(last + 1)).await;
    assert!(
        matches!(future, Err(QueryError::NotYet(NotYetProjected { wanted, reached })) if (wanted, reached) == (last + 1, last))
    );

    // History.
    for (id, movements) in &oracle.movements {
        for oldest_first in [true, false] {
            for trigger in
                [None, Some(Trigger::OrderConfirmed), Some(Trigger::AdminUpdate), Some(Trigger::ScheduledSync)]
            {
                let mut expected: Vec<Movement> = movements
                    .iter()
                    .map(|(_, movement)| movement.clone())
                    .filter(|movement| trigger.is_none_or(|trigger| movement.trigger == trigger))
                    .collect();
                if !oldest_first {
                    expected.reverse();
                }
                let limit = *dice.pick(&[1, 3, 50]);
                let mut query = HistoryQuery { oldest_first, after: None, trigger, limit };
                let mut all = Vec::new();
                loop {
                    let page = reads.history(*id, &query).await?.value;
                    assert!(page.items.len() <= usize::from(limit));
                    all.extend(page.items);
                    match page.next {
                        Some(next) => query.after = Some(next),
                        None => break,
                    }
                }
                assert_eq!(all, expected, "{query:?}");
                all.iter().for_each(assert_kept);
            }
        }
    }
    assert!(matches!(reads.history(nobody, &HistoryQuery::default()).await, Err(QueryError::NotFound { .. })));

    // Orders.
    for (order_id, decision) in &oracle.decisions {
        // Skus are those of today, and never change here.
        assert_eq!(reads.decision(*order_id).await?, At { sequence: last, value: decision.clone() });
        assert_kept(decision);
    }
    let outcomes: BTreeSet<bool> = oracle.decisions.values().map(|decision| decision.reason.is_some()).collect();
    assert_eq!(outcomes.len(), 2, "some of each");
    let nothing = reads.decision(OrderId(nobody.0)).await.unwrap_err().to_string();
    assert_eq!(nothing, format!("there is no decision of order {nobody}, as of sequence {last}"));

    // Counts.
    let mut all = Vec::new();
    let mut after = 0;
    loop {
        let page = reads.counts_after(after, 7).await?.value;
        all.extend(page.items);
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    assert!(!all.is_empty());
    assert_eq!(all, oracle.counts);
    shop.close().await
}

/// A list sorted by what does not change is walked while everything else does.
#[tokio::test]
async fn pages_lose_and_repeat_nothing_while_stock_changes() -> Result<()> {
    let mut dice = Dice::thrown();
    let mut books = Books::new();
    for _ in 0..60 {
        books.register(&mut dice);
    }
    let mut shop = Shop::open(books, ()).await?;
    for text in ["sku", "-sku", "name", "-name"] {
        shop.caught_up().await?;
        let there: BTreeSet<ProductId> = shop.books.products.keys().copied().collect();
        let mut seen = Vec::new();
        let mut query = ProductQuery { sort: text.parse()?, limit: 7, ..ProductQuery::default() };
        assert_eq!(query.sort.to_string(), text);
        loop {
            let page = shop.reads.products(&query).await?;
            assert!(page.sequence <= shop.books.last());
            seen.extend(page.value.items.iter().map(|product| product.product_id));
            let Some(next) = page.value.next else { break };
            query.after = Some(next);
            for _ in 0..20 {
                let id = *dice.pick(&there.iter().copied().collect::<Vec<_>>());
                let quantity = shop.books.products[&id].1 + 1 + dice.below(9);
                let event = shop.books.change(id, quantity, Trigger::AdminUpdate, None, UpdatedBy::System);
                shop.books.store(&mut dice, vec![event], None);
            }
            shop.caught_up().await?;
        }
        let distinct: BTreeSet<ProductId> = seen.iter().copied().collect();
        assert_eq!(distinct.len(), seen.len(), "{text}: none twice");
        assert_eq!(distinct, there, "{text}: none left out");
    }
    shop.close().await
}

// ── Waiting, and being told ─────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_reader_waits_for_what_it_wrote() -> Result<()> {
    let mut dice = Dice::thrown();
    let mut books = Books::new();
    let id = books.register(&mut dice);
    let mut shop = Shop::open(books, ()).await?;
    shop.caught_up().await?;
    // Another replica, whose projector is not the active one.
    let pool = lomash_platform::postgres::pool(&shop.url)?;
    let elsewhere = Projected::new(pool.clone(), &lomash_platform::postgres::INVENTORY);
    assert_eq!(elsewhere.reached(), 0, "nobody asked");

    for round in 0..20 {
        let quantity = shop.books.products[&id].1 + 1;
        let wanted = shop.books.last() + 1;
        let [here, there] = [&shop.projected, &elsewhere].map(|projected| {
            let projected = projected.clone();
            tokio::spawn(async move { projected.wait_for(wanted).await })
        });
        let event = shop.books.change(id, quantity, Trigger::AdminUpdate, None, UpdatedBy::System);
        shop.books.store(&mut dice, vec![event], None);
        for waiter in [here, there] {
            assert!(waiter.await?? >= wanted);
            let product = shop.reads.product(id).await?.at_least(wanted)?.value;
            assert_eq!(product.quantity, quantity, "round {round}");
        }
    }

    // Of many that wait in vain, one asks: one connection does.
    let wanted = shop.books.last() + 1;
    let began = Instant::now();
    let waiters: Vec<_> = (0..200)
        .map(|_| {
            let elsewhere = elsewhere.clone();
            tokio::spawn(async move { elsewhere.wait_for(wanted).await })
        })
        .collect();
    for waiter in waiters {
        assert_eq!(waiter.await?, Err(NotYetProjected { wanted, reached: wanted - 1 }));
    }
    assert!(began.elapsed() >= WAIT_TIMEOUT && began.elapsed() < WAIT_TIMEOUT * 3, "{:?}", began.elapsed());
    assert_eq!(pool.status().size, 1);
    let early = shop.reads.product(id).await?.at_least(wanted);
    assert_eq!(early.unwrap_err(), NotYetProjected { wanted, reached: wanted - 1 });

    // Whoever stops waiting leaves the asking to the next.
    let first = tokio::spawn({
        let elsewhere = elsewhere.clone();
        async move { elsewhere.wait_for(wanted).await }
    });
    tokio::task::yield_now().await;
    let second = tokio::spawn(async move { elsewhere.wait_for(wanted).await });
    first.abort();
    let event = shop.books.change(id, 77_777, Trigger::AdminUpdate, None, UpdatedBy::System);
    shop.books.store(&mut dice, vec![event], None);
    assert_eq!(second.await??, wanted);

    // Without Postgres it is "not yet", in time.
    let lost = Projected::new(lomash_platform::postgres::pool(&nowhere())?, &lomash_platform::postgres::INVENTORY);
    let began = Instant::now();
    assert_eq!(lost.wait_for(1).await, Err(NotYetProjected { wanted: 1, reached: 0 }));
    assert!(began.elapsed() < WAIT_TIMEOUT * 3);
    shop.close().await
}

/// What a hook heard.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Heard {
    Active(u64),
    Committed(u64, BTreeSet<ProductId>),
    Idle(u64),
}

/// Writes down what it hears; on demand it does not come back.
#[derive(Clone, Default)]
struct Listener {
    heard: Arc<Mutex<Vec<Heard>>>,
    hangs: Arc<AtomicBool>,
}

impl Listener {
    async fn hear(&self, heard: Heard) {
        self.heard.lock().unwrap().push(heard);
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    }

    fn has(&self, wanted: &Heard) -> bool {
        self.heard.lock().unwrap().contains(wanted)
    }
}

impl AfterCommit for Listener {
    async fn became_active(&self, checkpoint: u64) {
        self.hear(Heard::Active(checkpoint)).await;
    }

    async fn committed(&self, reached: u64, changed: &[ProductId]) {
        self.hear(Heard::Committed(reached, changed.iter().copied().collect())).await;
    }

    async fn idle(&self, checkpoint: u64) {
        self.hear(Heard::Idle(checkpoint)).await;
    }
}

#[tokio::test]
async fn whoever_wants_hears_of_each_commit_and_holds_nothing_up() -> Result<()> {
    let mut dice = Dice::thrown();
    let listener = Listener::default();
    let mut shop = Shop::open(Books::new(), listener.clone()).await?;
    let hears = async |wanted: Heard| {
        eventually(&format!("{wanted:?}"), PATIENCE, async || Ok(listener.has(&wanted).then_some(()))).await
    };
    hears(Heard::Active(0)).await?;
    let products: Vec<ProductId> = (0..3).map(|_| shop.books.register(&mut dice)).collect();
    shop.caught_up().await?;
    hears(Heard::Idle(shop.books.last())).await?;
    let changed: BTreeSet<ProductId> = listener
        .heard
        .lock()
        .unwrap()
        .iter()
        .flat_map(|heard| if let Heard::Committed(_, changed) = heard { changed.clone() } else { BTreeSet::new() })
        .collect();
    assert_eq!(changed, products.iter().copied().collect());

    // Only those that changed; a count changes none.
    let event = shop.books.change(products[1], 500, Trigger::AdminUpdate, None, UpdatedBy::System);
    shop.books.store(&mut dice, vec![event], None);
    hears(Heard::Committed(shop.books.last(), BTreeSet::from([products[1]]))).await?;
    let sku = shop.books.products[&products[0]].0.sku.clone();
    let (counted_at, counted_by) = (Timestamp::new(shop.books.now), CountedBy::Warehouse);
    let counted = InventoryCounted { product_id: products[0], sku, quantity: 1, counted_at, counted_by };
    shop.books.store(&mut dice, vec![LedgerEvent::InventoryCounted(counted)], None);
    hears(Heard::Committed(shop.books.last(), BTreeSet::new())).await?;

    // One that never comes back is left behind.
    listener.hangs.store(true, Ordering::Relaxed);
    let began = Instant::now();
    for quantity in [501, 502, 503] {
        let event = shop.books.change(products[1], quantity, Trigger::AdminUpdate, None, UpdatedBy::System);
        shop.books.store(&mut dice, vec![event], None);
        shop.caught_up().await?;
    }
    assert!(began.elapsed() < AFTER_COMMIT_TIMEOUT * 6, "{:?}", began.elapsed());
    listener.hangs.store(false, Ordering::Relaxed);

    // Another schema in place of the live one: all may be different.
    eventually("the last one that hung", PATIENCE, async || {
        Ok(listener.has(&Heard::Idle(shop.books.last())).then_some(()))
    })
    .await?;
    listener.heard.lock().unwrap().clear();
    let mut shadow = product_service::rebuild::Rebuild::begin(shop.books.told.clone(), &shop.url).await?;
    shadow.load(shop.books.last(), &mut |_| {}).await?;
    shadow.finish().await?;
    shadow.swap().await?;
    hears(Heard::Active(shop.books.last())).await?;
    shop.close().await
}

// ── Plans ───────────────────────────────────────────────────────────────────────────────────────────────────────

/// Products of the catalogue whose plans are looked at.
const PRODUCTS: u32 = 100_000;

/// Movements of the product that sells best, and of all others together.
const BUSY_MOVEMENTS: u32 = 200_000;
const OTHER_MOVEMENTS: u32 = 200_000;

/// Ids come in no order, as real ones do: neighbours in one index are none in the other.
const SCATTER: u128 = 2_654_435_761;

/// The id with this number.
const fn numbered(number: u128) -> Uuid {
    Uuid::from_u128(((number * SCATTER % (1 << 32)) << 96) | number)
}

/// When the first of them was stored, in seconds since 1970.
const FIRST_MOVEMENT: i64 = 1_770_000_000;

/// Rows of a hundred thousand products that a list may look at, however it is filtered: a few thousand come of a filter
/// that lets one in fifty through.
const MOST_ROWS: f64 = 15_000.0;

/// Makes the server log the plan of each statement of connections that are made from now on.
pub(super) const WATCHED: &str = "ALTER ROLE CURRENT_USER SET session_preload_libraries = 'auto_explain';
     ALTER ROLE CURRENT_USER SET auto_explain.log_min_duration = 0;
     ALTER ROLE CURRENT_USER SET auto_explain.log_analyze = on;
     ALTER ROLE CURRENT_USER SET auto_explain.log_timing = off;
     ALTER ROLE CURRENT_USER SET auto_explain.log_format = json";

/// Scans of what the statement itself found: rows that were looked at already.
const AGAIN: [&str; 3] = ["CTE Scan", "WorkTable Scan", "Subquery Scan"];

/// What Postgres did for a statement, as `auto_explain` logs it.
#[derive(Debug)]
pub(super) struct Done {
    nodes: Vec<(String, String)>,
    pub(super) rows: f64,
}

impl Done {
    pub(super) fn of(plan: &Value) -> Self {
        let mut done = Self { nodes: Vec::new(), rows: 0.0 };
        done.take(plan);
        done
    }

    fn take(&mut self, node: &Value) {
        let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| node[key].as_f64().unwrap_or_default();
        let kind = text("Node Type");
        if kind.contains("Scan") {
            let on = if node["Index Name"].is_string() { text("Index Name") } else { text("Relation Name") };
            let rows =
                number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
            if !AGAIN.contains(&kind.as_str()) {
                self.rows += rows * number("Actual Loops");
            }
            self.nodes.push((kind, on));
        }
        for child in node["Plans"].as_array().into_iter().flatten() {
            self.take(child);
        }
    }

    pub(super) fn uses(&self, index: &str) -> bool {
        self.nodes.iter().any(|(_, on)| on == index)
    }

    /// Tables that were read from beginning to end. The checkpoint is one row.
    pub(super) fn read_whole(&self) -> Vec<&str> {
        let whole = self.nodes.iter().filter(|(kind, on)| kind == "Seq Scan" && on != "checkpoint");
        whole.map(|(_, on)| on.as_str()).collect()
    }
}

/// The plans in what was added to a log.
pub(super) fn plans(log: &str) -> Vec<Value> {
    let mut plans = Vec::new();
    let mut lines = log.lines().peekable();
    while let Some(line) = lines.next() {
        if line.ends_with("plan:") {
            let mut text = String::new();
            while let Some(more) = lines.next_if(|line| line.starts_with('\t')) {
                text.push_str(more);
            }
            plans.push(serde_json::from_str(&text).unwrap());
        }
    }
    plans
}

/// One read, again and again.
type Ask = Box<dyn Fn(Reads) -> BoxFuture<'static, Result<(), QueryError>>>;

fn asking<F: Future<Output = Result<(), QueryError>> + Send + 'static>(ask: impl Fn(Reads) -> F + 'static) -> Ask {
    Box::new(move |reads| ask(reads).boxed())
}

/// The whole catalogue, sorted.
fn list(sort: &str) -> ProductQuery {
    ProductQuery { sort: sort.parse().unwrap(), limit: 50, ..ProductQuery::default() }
}

/// How long a read takes, as a rule.
async fn median(read: impl AsyncFn() -> Result<(), QueryError>) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..9 {
        let began = Instant::now();
        read().await?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times[4])
}

async fn fill(database: &tokio_postgres::Client) -> Result<()> {
    let schema = Schema::Live;
    let statements = format!(
        "CREATE FUNCTION number_id(n integer) RETURNS uuid LANGUAGE sql IMMUTABLE
             RETURN (lpad(to_hex(n::bigint * {SCATTER} % 4294967296), 8, '0') || lpad(to_hex(n), 24, '0'))::uuid;
         INSERT INTO {schema}.products
         SELECT number_id(n), 'KIT-' || lpad(n::text, 6, '0'), 'Oak worktop ' || n % 997 || ' colour ' || n % 37,
                CASE WHEN n % 10 > 0 THEN 'category ' || n % 47 END, n % 33 > 0,
                ARRAY['kit', lpad(n::text, 6, '0'), 'oak', 'worktop', (n % 997)::text, 'colour'], n,
                '2026-01-01Z'::timestamptz + n * interval '1 ms'
         FROM generate_series(1, {PRODUCTS}) n;
         INSERT INTO {schema}.stock (product_id, quantity, low_stock_threshold, sequence, updated_at)
         SELECT product_id, CASE WHEN registered_sequence % 20 = 0 THEN 0 ELSE registered_sequence % 5000 END,
                CASE WHEN registered_sequence % 7 = 0 THEN 20 END, registered_sequence, registered_at
         FROM {schema}.products;
         INSERT INTO {schema}.movements
         SELECT {PRODUCTS} + n, number_id(CASE WHEN n % 2 = 0 THEN 1 ELSE n % {PRODUCTS} + 1 END), 1, 2,
                CASE WHEN n % 5000 = 0 THEN 'ADMIN_UPDATE' ELSE 'ORDER_CONFIRMED' END,
                CASE WHEN n % 5000 > 0 THEN number_id(5000000 + n / 4) END, NULL, NULL, gen_random_uuid(), now(),
                to_timestamp({FIRST_MOVEMENT}) + n * interval '1 ms'
         FROM generate_series(1, {BUSY_MOVEMENTS} + {OTHER_MOVEMENTS}) n;
         INSERT INTO {schema}.order_decisions (order_id, outcome, sequence, decided_at)
         SELECT DISTINCT ON (order_id) order_id, 'allocated', sequence, stored_at FROM {schema}.movements
         WHERE order_id IS NOT NULL ORDER BY order_id, sequence;
         INSERT INTO {schema}.counts
         SELECT 1000000 + n, number_id(n), 7, now(), NULL, gen_random_uuid(), now()
         FROM generate_series(1, {PRODUCTS}) n;
         UPDATE {schema}.checkpoint SET sequence = 2000000;"
    );
    database.batch_execute(&statements).await.context("the catalogue cannot be made")?;
    database.batch_execute("VACUUM ANALYZE").await.context("it cannot be analysed")?;
    Ok(())
}

#[tokio::test]
async fn every_read_of_a_hundred_thousand_products_comes_by_an_index() -> Result<()> {
    let dir = scratch()?;
    let postgres = Postgres::start(&dir.path().join("postgres")).await?;
    let url = Secret::from(postgres.url());
    lomash_platform::postgres::migrate(&url).await?;
    let database = lomash_platform::postgres::connect(&url).await?;
    fill(&database).await?;
    // Timed without being watched, looked at with.
    let plain = Reads::new(&url)?;
    let product = |number: u128| ProductId(numbered(number));
    let (busy, quiet) = (product(1), product(77_777));
    plain.product(busy).await?;
    let middle = plain.products(&ProductQuery { limit: 1, ..list("sku") }).await?.value;
    assert_eq!(middle.items[0].product_id, busy, "product 1 is the first");
    database.batch_execute(WATCHED).await?;
    let reads = Reads::new(&url)?;

    let log = postgres.log();
    let logged = || std::fs::read_to_string(&log).map(|text| text.len());
    let done = |from: usize| -> Result<Vec<Done>> {
        let text = std::fs::read_to_string(&log)?;
        let plans = plans(&text[from..]);
        ensure!(!plans.is_empty(), "auto_explain logged nothing; is it installed (postgresql-contrib)?");
        Ok(plans.iter().map(|plan| Done::of(&plan["Plan"])).collect())
    };

    let key = |value: SortValue, number: u128| Some(ProductKey { value, product_id: product(number) });
    let text = |text: &str| SortValue::Text(text.to_owned());
    let filtered = |sort: &str, filter: ProductFilter| ProductQuery { filter, ..list(sort) };
    let category = || ProductFilter { category: Some("category 11".to_owned()), ..ProductFilter::default() };
    let words = |text: &str| ProductFilter { words: Some(text.parse().unwrap()), ..ProductFilter::default() };
    let low = || ProductFilter { below_threshold: Some(true), ..ProductFilter::default() };
    let none = || ProductFilter { available: Some(false), ..ProductFilter::default() };
    let inactive = || ProductFilter { active: Some(false), ..ProductFilter::default() };
    // What, the question, an index that it must use (or one of several), and the rows it may look at.
    let lists: Vec<(&str, ProductQuery, &[&str], f64)> = vec![
        ("all by sku", list("sku"), &["products_sku"], 110.0),
        ("all by -sku", list("-sku"), &["products_sku"], 110.0),
        ("all by name", list("name"), &["products_name"], 110.0),
        ("all by quantity", list("quantity"), &["stock_quantity"], 110.0),
        ("all by -quantity", list("-quantity"), &["stock_quantity"], 110.0),
        ("all by -updated", list("-updated"), &["stock_sequence"], 110.0),
        (
            "a page in the middle by sku",
            ProductQuery { after: key(text("KIT-050000"), 50_000), ..list("sku") },
            &["products_sku"],
            110.0,
        ),
        (
            "a page in the middle by -name",
            ProductQuery { after: key(text("Oak worktop 5"), 3), ..list("-name") },
            &["products_name"],
            110.0,
        ),
        (
            "a page among ties by quantity",
            ProductQuery { after: key(SortValue::Number(0), 50_000), ..list("quantity") },
            &["stock_quantity"],
            110.0,
        ),
        (
            "a page in the middle by updated",
            ProductQuery { after: key(SortValue::Number(50_000), 50_000), ..list("updated") },
            &["stock_sequence"],
            110.0,
        ),
        ("a category by sku", filtered("sku", category()), &["products_category"], 110.0),
        ("a category by name", filtered("name", category()), &["products_category", "products_name"], MOST_ROWS),
        (
            "a category by -quantity",
            filtered("-quantity", category()),
            &["products_category", "stock_quantity"],
            MOST_ROWS,
        ),
        (
            "a category by -updated",
            filtered("-updated", category()),
            &["products_category", "stock_sequence"],
            MOST_ROWS,
        ),
        (
            "one sku",
            filtered("sku", ProductFilter { sku: Some("KIT-077777".into()), ..ProductFilter::default() }),
            &["products_sku"],
            5.0,
        ),
        ("none left by sku", filtered("sku", none()), &["products_sku", "stock_quantity"], MOST_ROWS),
        // All of one quantity come in the order of their ids, as all products do: the two are merged.
        ("none left by quantity", filtered("quantity", none()), &["stock_quantity"], 3_000.0),
        (
            "some left by name",
            filtered("name", ProductFilter { available: Some(true), ..ProductFilter::default() }),
            &["products_name"],
            MOST_ROWS,
        ),
        ("low by sku", filtered("sku", low()), &["stock_low", "products_sku"], MOST_ROWS),
        ("low by quantity", filtered("quantity", low()), &["stock_low", "stock_quantity"], 200.0),
        ("low by -updated", filtered("-updated", low()), &["stock_low", "stock_sequence"], MOST_ROWS),
        ("not for sale by sku", filtered("sku", inactive()), &["products_inactive"], 110.0),
        ("not for sale by name", filtered("name", inactive()), &["products_inactive", "products_name"], MOST_ROWS),
        ("words of one", filtered("sku", words("077777")), &["products_words"], 5.0),
        ("words of few", filtered("name", words("oak 0777")), &["products_words"], 400.0),
        ("words of all by sku", filtered("sku", words("oak kit")), &["products_sku"], MOST_ROWS),
        ("words of all by name", filtered("name", words("work")), &["products_name"], MOST_ROWS),
        ("words of nothing", filtered("sku", words("nothing")), &["products_words"], 5.0),
        (
            "low of a category, for sale, by quantity",
            filtered(
                "quantity",
                ProductFilter { active: Some(true), ..ProductFilter { below_threshold: Some(true), ..category() } },
            ),
            &["stock_low", "stock_quantity", "products_category"],
            MOST_ROWS,
        ),
        (
            "words of a category, none left, by -updated",
            filtered("-updated", ProductFilter { words: Some("oak".parse()?), available: Some(false), ..category() }),
            &["products_category", "stock_sequence", "stock_quantity"],
            MOST_ROWS,
        ),
    ];
    let mut problems = Vec::new();
    let mut judge = |what: &str, done: Vec<Done>, indexes: &[&str], most: f64, took: Duration| {
        for done in done {
            println!("{what:44} {:8.3} ms  {:6} rows  {:?}", took.as_secs_f64() * 1e3, done.rows, done.nodes);
            if !done.read_whole().is_empty() {
                problems.push(format!("{what}: reads all of {:?}", done.read_whole()));
            }
            if !indexes.iter().any(|index| done.uses(index)) {
                problems.push(format!("{what}: uses none of {indexes:?} but {:?}", done.nodes));
            }
            if done.rows > most {
                problems.push(format!("{what}: looks at {} rows, {most} at most", done.rows));
            }
        }
    };
    for (what, query, indexes, most) in &lists {
        let took = median(async || plain.products(query).await.map(drop)).await?;
        let from = logged()?;
        reads.products(query).await?;
        judge(what, done(from)?, indexes, *most, took);
    }

    // Prepared statements may get a plan for all values: after five executions at the earliest.
    let past = OffsetDateTime::from_unix_timestamp(FIRST_MOVEMENT)? + time::Duration::milliseconds(200_000);
    let past_stock = |id, as_of| asking(move |reads| async move { reads.stock_as_of(id, as_of).await.map(drop) });
    let history = |id, trigger, after, oldest_first| {
        let query = HistoryQuery { oldest_first, after, trigger, limit: 50 };
        asking(move |reads| async move { reads.history(id, &query).await.map(drop) })
    };
    let cases: Vec<(&str, Ask, &str, f64)> = vec![
        ("a product", asking(move |reads| async move { reads.product(quiet).await.map(drop) }), "products_pkey", 5.0),
        ("past stock by instant, busy", past_stock(busy, AsOf::Instant(past)), "movements_product", 5.0),
        ("past stock by sequence, busy", past_stock(busy, AsOf::Sequence(300_000)), "movements_product", 8.0),
        ("past stock by instant, quiet", past_stock(quiet, AsOf::Instant(past)), "movements_product", 5.0),
        ("past stock before any movement", past_stock(busy, AsOf::Sequence(2)), "movements_product", 5.0),
        ("history, newest", history(busy, None, None, false), "movements_product", 60.0),
        ("history, in the middle", history(busy, None, Some(300_000), false), "movements_product", 60.0),
        ("history, oldest, in the middle", history(busy, None, Some(300_000), true), "movements_product", 60.0),
        (
            "history of admins",
            history(busy, Some(Trigger::AdminUpdate), None, false),
            "movements_product_changes",
            60.0,
        ),
        (
            "history of syncs, of which there are none",
            history(busy, Some(Trigger::ScheduledSync), Some(300_000), false),
            "movements_product_changes",
            120.0,
        ),
        ("history of orders", history(busy, Some(Trigger::OrderConfirmed), None, false), "movements_product", 60.0),
        (
            "a decision",
            asking(|reads| async move { reads.decision(OrderId(numbered(5_000_777))).await.map(drop) }),
            "movements_pkey",
            15.0,
        ),
        (
            "counts",
            asking(|reads| async move { reads.counts_after(1_050_000, 50).await.map(drop) }),
            "counts_pkey",
            60.0,
        ),
        (
            "a hundred skus",
            asking(|reads| async move {
                let skus: Vec<Sku> = (1..=100).map(|number| format!("KIT-{number:06}").parse().unwrap()).collect();
                reads.products_by_skus(&skus).await.map(drop)
            }),
            "products_sku",
            210.0,
        ),
        (
            "past stock of five hundred",
            asking(move |reads| async move {
                let moments: Vec<_> = (1..=500).map(|number| (ProductId(numbered(number)), past)).collect();
                reads.stock_as_of_each(&moments).await.map(drop)
            }),
            "movements_product",
            1_600.0,
        ),
    ];
    for (what, ask, index, most) in &cases {
        let took = median(async || ask(plain.clone()).await).await?;
        let from = logged()?;
        for _ in 0..8 {
            ask(reads.clone()).await?;
        }
        let mut all = done(from)?;
        assert_eq!(all.len(), 8, "{what}: one statement a read");
        judge(what, all.split_off(7), std::slice::from_ref(index), *most, took);
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

// ── What readers must not notice ────────────────────────────────────────────────────────────────────────────────

/// Reads everything without a pause until told to stop, and returns how often.
fn reader(reads: &Reads, products: &[ProductId], sold: OrderId, stop: &CancellationToken) -> JoinHandle<Result<u64>> {
    let (reads, products, stop) = (reads.clone(), products.to_vec(), stop.clone());
    tokio::spawn(async move {
        let (mut rounds, mut seen) = (0, 0);
        let mut further = |sequence: u64| {
            ensure!(sequence >= seen, "the projection went back from {seen} to {sequence}");
            seen = sequence;
            Ok(())
        };
        let query = ProductQuery { limit: MAX_PAGE, ..ProductQuery::default() };
        while !stop.is_cancelled() {
            for id in &products {
                let product = reads.product(*id).await?;
                further(product.sequence)?;
                let then = reads.stock_as_of(*id, AsOf::Sequence(product.value.version)).await?;
                further(then.sequence)?;
                ensure!(then.value.quantity == product.value.quantity, "the stock of a version is that of the version");
                further(reads.history(*id, &HistoryQuery { limit: 5, ..HistoryQuery::default() }).await?.sequence)?;
            }
            let all = reads.products(&query).await?;
            further(all.sequence)?;
            ensure!(all.value.items.len() == products.len(), "a product is missing");
            further(reads.decision(sold).await?.sequence)?;
            rounds += 1;
        }
        Ok(rounds)
    })
}

#[tokio::test]
async fn reads_go_on_while_schemas_are_swapped() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let products = world.register_many(10, 1_000_000).await?;
    let mut dice = Dice::thrown();
    let sell = async |dice: &mut Dice, many: usize| -> Result<()> {
        let orders: Vec<_> = (0..many).map(|_| dice.order(&products, 3, 2)).collect();
        world.publish_all(&orders).await?;
        world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
        Ok(())
    };
    let sold = order(&[(products[0], 1)]);
    world.publish(&sold).await?;
    sell(&mut dice, 300).await?;
    world.quiet().await?;

    let reads = Reads::new(&world.database_url())?;
    let stop = CancellationToken::new();
    let readers: Vec<_> = (0..3).map(|_| reader(&reads, &products, sold.payload.order_id, &stop)).collect();
    let url = world.database_url();
    for _ in 0..4 {
        let swapped = rebuild::rebuild(&world.context, &url, Options::default(), Show::Nothing);
        let (outcome, ()) = tokio::try_join!(swapped, sell(&mut dice, 100))?;
        assert!(outcome.comparison.is_equal(), "{}", rebuild::render(&outcome));
    }
    stop.cancel();
    for reader in readers {
        assert!(reader.await?.context("a reader was disturbed")? > 0);
    }
    world.verified().await?;

    // A schema that is gone is not "nothing there".
    service.stop().await?;
    world.database().await?.batch_execute("DROP SCHEMA inventory CASCADE").await?;
    let gone = reads.product(products[0]).await.unwrap_err();
    assert!(
        matches!(&gone, QueryError::Unavailable(Unreadable { cause, .. }) if cause.contains("does not exist")),
        "{gone}"
    );
    let service = world.run_service().await?;
    world.quiet().await?;
    let last = world.last_sequence().await?;
    assert_eq!(reads.product(products[0]).await?.at_least(last)?.value.product_id, products[0]);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn reads_without_postgres_end_in_time_and_heal() -> Result<()> {
    let dir = scratch()?;
    let mut postgres = Postgres::start(&dir.path().join("postgres")).await?;
    let url = Secret::from(postgres.url());
    let reads = Reads::new(&url)?;
    let early = reads.products(&ProductQuery::default()).await.unwrap_err();
    assert!(matches!(early, QueryError::Unavailable { .. }), "nothing is projected yet: {early}");
    lomash_platform::postgres::migrate(&url).await?;
    // Several connections, all of which the restart breaks.
    let together = async |reads: &Reads| -> Result<()> {
        let query = ProductQuery::default();
        let many = (0..8).map(|_| reads.products(&query));
        for page in futures::future::try_join_all(many).await? {
            assert_eq!((page.sequence, page.value.items.len()), (0, 0));
        }
        Ok(())
    };
    together(&reads).await?;
    let began = Instant::now();
    postgres.stop().await?;
    let down = reads.products(&ProductQuery::default()).await.unwrap_err();
    assert!(matches!(down, QueryError::Unavailable { .. }), "{down}");
    assert!(began.elapsed() < PATIENCE);
    postgres.restart().await?;
    together(&reads).await?;

    // Frozen, so that not even an error comes back.
    let database = lomash_platform::postgres::connect(&url).await?;
    let own: i32 = database.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
    let backends = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> $1";
    let pids: Vec<i32> = database.query(backends, &[&own]).await?.iter().map(|row| row.get(0)).collect();
    assert!(!pids.is_empty());
    let signal = |signal| {
        for pid in &pids {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), signal);
        }
    };
    signal(nix::sys::signal::Signal::SIGSTOP);
    let began = Instant::now();
    let frozen = reads.products(&ProductQuery::default()).await;
    let took = began.elapsed();
    // The frozen connection is not handed to the next reader; another frozen one may be, once each.
    let healed = eventually("a connection that answers", PATIENCE, async || {
        Ok(Some(reads.products(&ProductQuery::default()).await?))
    })
    .await;
    signal(nix::sys::signal::Signal::SIGCONT);
    assert!(matches!(frozen, Err(QueryError::Unavailable { .. })), "{frozen:?}");
    assert!(took < READ_TIMEOUT + Duration::from_secs(2), "{took:?}");
    healed?;
    Ok(())
}

/// A count that is damaged is noticed by the verifier and by a rebuild, which mends it.
#[tokio::test]
async fn a_damaged_count_is_noticed() -> Result<()> {
    let mut dice = Dice::thrown();
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("COUNTED-1", 10).await?;
    for quantity in [7, 9] {
        let counted_at = Timestamp::new(OffsetDateTime::now_utc() - time::Duration::hours(i64::from(20 - quantity)));
        let counted_by = CountedBy::User(dice.uuid());
        let counted = product_service::inventory::Count { quantity, counted_at, counted_by };
        world.act(product, product_service::inventory::Action::RecordCount(counted)).await?;
    }
    world.verified().await?;
    let reads = Reads::new(&world.database_url())?;
    let counts = reads.counts_after(0, 50).await?.value.items;
    assert_eq!(counts.iter().map(|count| count.quantity).collect::<Vec<_>>(), [7, 9]);
    assert_eq!(reads.counts_after(counts[0].sequence, 50).await?.value.items, counts[1..]);

    let database = world.database().await?;
    database.batch_execute("UPDATE inventory.counts SET quantity = 8 WHERE quantity = 7").await?;
    let report = world.report().await?;
    let seven = report.invariant(7).unwrap();
    assert_eq!(
        (seven.violations, seven.first[0].source, seven.first[0].sequence),
        (1, "counts", Some(counts[0].sequence))
    );
    let outcome = rebuild::rebuild(&world.context, &world.database_url(), Options::default(), Show::Nothing).await?;
    assert!(!outcome.comparison.is_equal() && rebuild::render(&outcome).contains("counts"));
    assert_eq!(count(&database, "SELECT sum(quantity)::bigint FROM inventory.counts").await?, 16);
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}
