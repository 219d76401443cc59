//! However the ledger is cut into batches and whatever is forgotten between them, the rows come to what the fold says.

use std::collections::BTreeMap;

use lomash_contract::{Timestamp, UpdatedBy};
use lomash_ledger::MemoryLedger;
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::committer::{catch_up, committer};
use crate::inventory::{Action, Command, Details, Order, OrderLine, ProductCommand, State};

/// Products that the commands are about; the last is never registered by itself.
const PRODUCTS: u128 = 5;

fn clock() -> Timestamp {
    "2026-01-31T09:30:00.123Z".parse().expect("a valid instant")
}

fn product(n: u128) -> ProductId {
    ProductId(Uuid::from_u128(n))
}

fn details(n: u128, name: u32, threshold: Option<u32>) -> Details {
    Details {
        sku: format!("SKU-{n}").parse().expect("a valid sku"),
        name: format!("Oak base unit {name}").as_str().into(),
        category: None,
        low_stock_threshold: threshold,
        active: true,
    }
}

/// The command of the step `(kind, product, quantity)`.
fn command(step: usize, kind: u8, n: u128, quantity: u32) -> Command {
    let action = match kind {
        0 => Action::Register { details: details(n, 0, None), initial_quantity: quantity },
        1 => Action::Revise { details: details(n, quantity, Some(quantity)) },
        2 => Action::SetQuantity { quantity, expected_quantity: None },
        _ => {
            let lines = vec![OrderLine { product_id: product(n), quantity }];
            return Command::Order(Order { order_id: Uuid::from_u128(1_000 + step as u128).into(), lines });
        }
    };
    let id = Uuid::from_u128(1_000_000 + step as u128);
    Command::Product(ProductCommand::new(id, product(n), UpdatedBy::System, action))
}

/// The ledger of these steps, as the committer writes it, and its fold.
async fn ledger_of(steps: &[(u8, u128, u32)]) -> (Vec<StoredMessage>, State) {
    let ledger = MemoryLedger::default();
    let stop = CancellationToken::new();
    let (committer, running) = committer(ledger.clone(), State::default(), clock, stop.clone());
    let running = tokio::spawn(running);
    for n in 0..PRODUCTS - 1 {
        let _ = committer.submit(command(100 + usize::try_from(n).expect("few"), 0, n, 9), None).await;
    }
    for (step, (kind, n, quantity)) in steps.iter().enumerate() {
        // Some are refused; the ledger has what came of the others.
        let _ = committer.submit(command(step, *kind, *n, *quantity), None).await;
    }
    stop.cancel();
    running.await.expect("the committer ends").expect("the ledger in memory has no gap");
    let mut state = State::default();
    catch_up(&ledger, &mut state, |_, _| {}).await.expect("a ledger in memory can be read");
    (ledger.messages(), state)
}

/// What the statements of `tables` do, in memory, and what they rely on.
#[derive(Default)]
struct Tables {
    stock: BTreeMap<ProductId, (Known, u64)>,
    details: BTreeMap<ProductId, (ProductDetails, u64)>,
    movements: Vec<u64>,
    decided: BTreeMap<OrderId, u64>,
}

impl Tables {
    fn stock_of(&self, products: &[Uuid]) -> Vec<(ProductId, Known)> {
        let found = |id: &Uuid| self.stock.get(&ProductId(*id)).map(|(known, _)| (ProductId(*id), *known));
        products.iter().filter_map(found).collect()
    }

    fn write(&mut self, changes: &Changes<'_>) {
        for (product_id, row) in &changes.products.stock {
            let before = self.stock.insert(*product_id, (row.now, row.sequence));
            assert_eq!(before.is_none(), row.is_new, "stock of {product_id} is inserted once and then updated");
        }
        for (product_id, row) in &changes.products.details {
            match row.registered {
                Some((sequence, _)) => {
                    let before = self.details.insert(*product_id, (row.details.clone(), sequence));
                    assert!(before.is_none(), "details of {product_id} are inserted once");
                }
                None => self.details.get_mut(product_id).expect("an update finds its row").0 = row.details.clone(),
            }
        }
        self.movements.extend(changes.movements.iter().map(|movement| movement.message.sequence));
        for decided in &changes.decisions {
            assert!(self.decided.insert(decided.order_id, decided.sequence).is_none(), "an order is decided once");
        }
    }
}

/// Projects the messages in batches of these lengths, in turns; after those of `forgetting` nothing is remembered.
fn project(messages: &[StoredMessage], lengths: &[usize], forgetting: &[bool]) -> Tables {
    let mut tables = Tables::default();
    let mut products = Products::default();
    let (mut rest, mut turn) = (messages, 0);
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(lengths[turn % lengths.len()].min(rest.len()));
        let parsed: Vec<Parsed> = batch.iter().map(StoredMessage::parse).collect();
        let unknown = products.unknown(&parsed);
        products.learn(tables.stock_of(&unknown));
        let mut changes = Changes::over(products);
        for (message, parsed) in batch.iter().zip(parsed) {
            changes.fold(message, parsed);
        }
        assert_eq!(changes.skipped, 0, "all of it is ours");
        tables.write(&changes);
        products = changes.products;
        products.written();
        if forgetting[turn % forgetting.len()] {
            products = Products::default();
        }
        (rest, turn) = (later, turn + 1);
    }
    tables
}

proptest! {
    #[test]
    fn the_rows_are_the_fold_however_it_is_cut_and_whatever_is_forgotten(
        steps in prop::collection::vec((0_u8..6, 0..PRODUCTS, 1_u32..6), 0..60),
        lengths in prop::collection::vec(1_usize..12, 1..6),
        forgetting in prop::collection::vec(any::<bool>(), 1..6),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (messages, state) = runtime.block_on(ledger_of(&steps));
        let tables = project(&messages, &lengths, &forgetting);
        prop_assert_eq!(tables.stock.len(), state.products().count());
        for (product_id, product) in state.products() {
            let known = Known { quantity: product.quantity, threshold: product.details.low_stock_threshold };
            prop_assert_eq!(tables.stock[product_id], (known, product.version));
            prop_assert_eq!(&tables.details[product_id].0, &*product.details);
        }
        let once = project(&messages, &[messages.len().max(1)], &[false]);
        prop_assert_eq!(&tables.movements, &once.movements);
        prop_assert_eq!(&tables.decided, &once.decided);
        prop_assert_eq!(&tables.details, &once.details);
    }
}

#[test]
fn only_products_are_asked_for_and_each_once() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    // The order of a product that nobody registered is a refusal, whose key is the order.
    let (messages, _) = runtime.block_on(ledger_of(&[(2, 0, 3), (2, 0, 4), (5, PRODUCTS - 1, 1)]));
    let parsed: Vec<Parsed> = messages.iter().map(StoredMessage::parse).collect();
    let asked = Products::default().unknown(&parsed);
    assert_eq!(asked, (0..PRODUCTS - 1).map(|n| product(n).0).collect::<Vec<_>>());
    let mut products = Products::default();
    products.learn([(product(0), Known { quantity: 9, threshold: None })]);
    assert_eq!(products.unknown(&parsed).len(), asked.len() - 1, "what is known is not asked for again");
    assert!(products.of_table(7).of(product(0)).is_none(), "other tables may say something else");
}
