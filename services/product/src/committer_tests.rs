//! The committer on the in-memory ledger, where answers get lost on demand.
//!
//! The law throughout: whatever the ledger does, every command is carried out once, its caller hears the truth, and the
//! stream is a chain.

use lomash_contract::{InventoryUpdated, ProductId, UpdatedBy};
use lomash_ledger::{Fault, FullDisk, MemoryLedger};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::inventory::{Action, Details, Order, OrderLine, ProductCommand};

fn clock() -> Timestamp {
    "2026-01-31T09:30:00.123Z".parse().expect("a valid instant")
}

fn product_id(n: u128) -> ProductId {
    ProductId(Uuid::from_u128(n))
}

fn command(n: u128, action: Action) -> Command {
    let by = UpdatedBy::System;
    Command::Product(ProductCommand::new(Uuid::new_v4(), product_id(n), by, action))
}

fn register(n: u128, quantity: u32) -> Command {
    let details = Details {
        sku: format!("SKU-{n}").parse().expect("a valid sku"),
        name: "Oak base unit".into(),
        category: None,
        low_stock_threshold: None,
        active: true,
    };
    command(n, Action::Register { details, initial_quantity: quantity })
}

fn order(n: u128, product: u128, quantity: u32) -> Command {
    let order_id = Uuid::from_u128(0xabc0_0000 + n).into();
    Command::Order(Order { order_id, lines: vec![OrderLine { product_id: product_id(product), quantity }] })
}

/// A running committer; dropping the token's guard stops it.
fn start(ledger: &MemoryLedger) -> (Committer, tokio_util::sync::DropGuard) {
    let stop = CancellationToken::new();
    let (committer, running) = committer(ledger.clone(), State::default(), clock, stop.clone());
    tokio::spawn(running);
    (committer, stop.drop_guard())
}

/// Folds what is stored, as any reader does; panics on a message that breaks the rule.
async fn fold(ledger: &MemoryLedger) -> State {
    ledger.make_unreadable(0);
    let mut state = State::default();
    catch_up(ledger, &mut state, |_, _| {}).await.expect("a ledger in memory can be read");
    assert_eq!(state.skipped(), 0, "every stored message is ours and chains");
    state
}

fn stock(state: &State, n: u128) -> u32 {
    state.product(&product_id(n)).expect("it is registered").quantity
}

#[tokio::test]
async fn each_unknown_outcome_resolves_to_exactly_one() {
    for fault in [Fault::UnknownStored, Fault::UnknownLost, Fault::UnknownLater, Fault::Refused] {
        let ledger = MemoryLedger::default();
        let (committer, _running) = start(&ledger);
        committer.submit(register(1, 10), None).await.expect("a registration");
        for (what, next, left, shows) in [
            ("an order", order(1, 1, 4), 6, Outcome::Allocated),
            (
                "an adjustment, which would act twice if it were decided twice",
                command(1, Action::Adjust { delta: -1 }),
                5,
                Outcome::StockChanged { previous_quantity: 6, new_quantity: 5, shortfall: 0 },
            ),
        ] {
            ledger.inject([fault]);
            ledger.make_unreadable(2);
            let committed = committer.submit(next, None).await.expect("it is carried out");
            assert_eq!(committed.outcome, shows, "{what} with {fault:?}");
            let state = fold(&ledger).await;
            assert_eq!(stock(&state, 1), left, "{what} with {fault:?}");
            assert_eq!(committed.sequence, state.sequence(), "{what} with {fault:?}");
        }
    }
}

#[tokio::test]
async fn a_repeated_command_is_told_so_and_its_neighbours_go_through() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 10), None).await.expect("a registration");
    let repeated = command(1, Action::Adjust { delta: -1 });
    committer.submit(repeated.clone(), None).await.expect("the first time");
    let neighbours: Vec<_> = (0..20).map(|n| committer.submit(order(n, 1, 1), None)).collect();
    let (again, neighbours) = tokio::join!(committer.submit(repeated, None), futures::future::join_all(neighbours));
    assert_eq!(again, Err(CommandError::Rejected(Rejection::Repeated)));
    let allocated =
        neighbours.iter().filter(|answer| matches!(answer, Ok(Committed { outcome: Outcome::Allocated, .. })));
    assert_eq!(allocated.count(), 9);
    assert_eq!(stock(&fold(&ledger).await, 1), 0);
}

#[tokio::test]
async fn a_server_with_smaller_batches_is_adapted_to_and_what_cannot_fit_is_told() {
    let ledger = MemoryLedger::default();
    ledger.limit_batches(150);
    let (committer, _running) = start(&ledger);
    let registrations: Vec<_> = (0..400).map(|n| committer.submit(register(n, 1), None)).collect();
    for answer in futures::future::join_all(registrations).await {
        answer.expect("every registration fits by itself");
    }
    let lines = (0..400).map(|n| OrderLine { product_id: product_id(n), quantity: 1 }).collect();
    let large = Command::Order(Order { order_id: Uuid::from_u128(1).into(), lines });
    let answer = committer.submit(large, None).await;
    assert!(matches!(answer, Err(CommandError::TooLarge { messages: 800, limit }) if limit <= 150), "{answer:?}");
    assert_eq!(fold(&ledger).await.products().count(), 400);
}

#[tokio::test]
async fn a_no_is_said_on_fresh_knowledge() {
    let ledger = MemoryLedger::default();
    let (first, _running) = start(&ledger);
    let (second, _also_running) = start(&ledger);
    first.submit(register(1, 5), None).await.expect("a registration");
    // The second writer has not heard of the product; it must look before it says that there is none.
    let answer = second.submit(command(1, Action::Adjust { delta: -6 }), None).await;
    let expected = Rejection::BelowZero { quantity: 5, taken: 6 };
    assert_eq!(answer, Err(CommandError::Rejected(expected)));
}

#[tokio::test]
async fn foreign_messages_are_skipped_and_do_not_stop_the_writer() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 5), None).await.expect("a registration");
    let event = LedgerEvent::InventoryUpdated(InventoryUpdated {
        product_id: product_id(1),
        sku: "SKU-1".parse().expect("a valid sku"),
        previous_quantity: 77,
        new_quantity: 78,
        trigger: lomash_contract::Trigger::AdminUpdate,
        order_id: None,
        updated_by: UpdatedBy::System,
    });
    let forged = Fact { event_id: Uuid::new_v4().into(), event };
    let last = ledger.last_sequence().await.expect("readable");
    ledger.append(&[stored_as(&forged)], last).await.expect("a foreign message gets in");
    committer.submit(order(1, 1, 5), None).await.expect("the order is decided all the same");
    let mut state = State::default();
    catch_up(&ledger, &mut state, |_, _| {}).await.expect("readable");
    assert_eq!((state.skipped(), stock(&state, 1)), (1, 0));
}

/// A fact as whoever else writes would store it.
fn stored_as(fact: &Fact) -> NewMessage {
    message(fact, Encoder::default().encode(&envelope(fact, clock())), None)
}

/// The order that comes while another one is being stored is decided ahead, as if that one were stored: nothing is left
/// for it. Then the one before meets a conflict, for somebody put five more on stock. What was decided ahead is forgotten.
#[tokio::test]
async fn what_was_decided_ahead_falls_with_the_batch_before_it() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 1), None).await.expect("a registration");
    let event = LedgerEvent::InventoryUpdated(InventoryUpdated {
        product_id: product_id(1),
        sku: "SKU-1".parse().expect("a valid sku"),
        previous_quantity: 1,
        new_quantity: 6,
        trigger: lomash_contract::Trigger::AdminUpdate,
        order_id: None,
        updated_by: UpdatedBy::System,
    });
    let delivery = Fact { event_id: Uuid::new_v4().into(), event };
    let last = ledger.last_sequence().await.expect("readable");
    ledger.append(&[stored_as(&delivery)], last).await.expect("another writer's event");
    let submit = |n| {
        let committer = committer.clone();
        tokio::spawn(async move { committer.submit(order(n, 1, 1), None).await })
    };
    let mut answers = vec![submit(1)];
    // The committer takes the first one up, and the others come on its way to the ledger.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    answers.extend([submit(2), submit(3)]);
    for answer in answers {
        assert_eq!(answer.await.expect("no panic").expect("decided").outcome, Outcome::Allocated);
    }
    assert_eq!(stock(&fold(&ledger).await, 1), 3);
}

/// A full batch is staged while another is in flight. Whatever becomes of that one, every order is decided once.
#[tokio::test]
async fn a_staged_batch_counts_only_when_the_one_before_it_does() {
    const ORDERS: u128 = 3 * MAX_BATCH_MESSAGES as u128;
    for fault in [None, Some(Fault::UnknownStored), Some(Fault::UnknownLost), Some(Fault::UnknownLater)] {
        let ledger = MemoryLedger::default();
        let (committer, _running) = start(&ledger);
        committer.submit(register(1, 2 * MAX_BATCH_MESSAGES as u32), None).await.expect("a registration");
        ledger.inject(fault);
        ledger.answer_appends(false);
        let submit = |n| {
            let committer = committer.clone();
            async move { committer.submit(order(n, 1, 1), None).await.expect("decided").outcome }
        };
        let staged = async {
            while ledger.unanswered() < 2 {
                tokio::task::yield_now().await;
            }
            ledger.answer_appends(true);
        };
        let (outcomes, ()) = tokio::join!(futures::future::join_all((0..ORDERS).map(submit)), staged);
        let allocated = outcomes.iter().filter(|outcome| **outcome == Outcome::Allocated).count();
        let refused = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Refused { .. })).count();
        assert_eq!((allocated, refused), (2 * MAX_BATCH_MESSAGES, MAX_BATCH_MESSAGES), "{fault:?}");
        assert_eq!(stock(&fold(&ledger).await, 1), 0, "{fault:?}");
        assert_eq!(ledger.unanswered(), u64::from(fault.is_some()), "what was staged falls: {fault:?}");
    }
}

/// What was decided ahead rests on what is being stored: one product, one unit for each order, one order after the other.
#[tokio::test]
async fn orders_that_come_while_others_are_being_stored_see_what_those_left() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 50), None).await.expect("a registration");
    let mut answers = Vec::new();
    for n in 0..90 {
        // Every order twice, the second time perhaps while the first is in flight.
        for _ in 0..2 {
            let committer = committer.clone();
            answers.push(tokio::spawn(async move { committer.submit(order(n, 1, 1), None).await }));
        }
        tokio::task::yield_now().await;
    }
    let mut outcomes = hashbrown::HashMap::<&str, usize>::new();
    for answer in answers {
        let kind = match answer.await.expect("no panic").expect("decided").outcome {
            Outcome::Allocated => "allocated",
            Outcome::Refused { .. } => "refused",
            Outcome::AlreadyDecided => "known",
            other => panic!("an order came to {other:?}"),
        };
        *outcomes.entry(kind).or_default() += 1;
    }
    let expected = hashbrown::HashMap::from([("allocated", 50), ("refused", 40), ("known", 90)]);
    assert_eq!(outcomes, expected);
    assert_eq!(stock(&fold(&ledger).await, 1), 0);
}

#[tokio::test]
async fn stopping_answers_those_who_wait() {
    let ledger = MemoryLedger::default();
    ledger.inject([Fault::UnknownLost]);
    ledger.make_unreadable(u32::MAX);
    let stop = CancellationToken::new();
    let (committer, running) = committer(ledger, State::default(), clock, stop.clone());
    let running = tokio::spawn(running);
    let waiting = tokio::spawn(async move { committer.submit(register(1, 5), None).await });
    tokio::task::yield_now().await;
    stop.cancel();
    running.await.expect("no panic").expect("no fatal error");
    assert_eq!(waiting.await.expect("no panic"), Err(CommandError::Stopping));
}

// ── What the server refuses ─────────────────────────────────────────────────────────────────────────────────────

/// Makes the ledger refuse whatever these orders come to, with this error code.
fn refuse(ledger: &MemoryLedger, code: u64, orders: impl IntoIterator<Item = Command>) {
    let orders: Vec<String> = orders.into_iter().map(|order| id_of(&order).to_string()).collect();
    ledger.refuse(move |message| {
        let payload = String::from_utf8_lossy(&message.payload);
        orders.iter().any(|order| payload.contains(order)).then_some(code)
    });
}

async fn submit_all(committer: &Committer, commands: impl IntoIterator<Item = Command>) -> Vec<Answer> {
    futures::future::join_all(commands.into_iter().map(|command| committer.submit(command, None))).await
}

fn is_allocated(answer: &Answer) -> bool {
    matches!(answer, Ok(Committed { outcome: Outcome::Allocated, .. }))
}

/// Orders that can never be stored, whatever the server says of them, are told so in time; all others are decided.
#[tokio::test(start_paused = true)]
async fn an_order_that_the_server_refuses_stops_no_other() {
    let bad = [0, 1, 17, 499];
    // Headers too large, a code that nobody knows, and a batch that it does not take in.
    for code in [10_097, 99_999, BATCH_INCOMPLETE] {
        let ledger = MemoryLedger::default();
        let (committer, _running) = start(&ledger);
        committer.submit(register(1, 1_000), None).await.expect("a registration");
        refuse(&ledger, code, bad.map(|n| order(n, 1, 1)));
        let since = Instant::now();
        let answers = submit_all(&committer, (0..500).map(|n| order(n, 1, 1))).await;
        assert!(since.elapsed() < Duration::from_secs(10), "{code}: {:?}", since.elapsed());
        for (n, answer) in (0_u128..).zip(&answers) {
            if bad.contains(&n) {
                let refused = matches!(answer, Err(CommandError::Unstorable { code: said, .. }) if *said == code);
                assert!(refused, "{code}: order {n} came to {answer:?}");
            } else {
                assert!(is_allocated(answer), "{code}: order {n} came to {answer:?}");
            }
        }
        assert_eq!(stock(&fold(&ledger).await, 1), 1_000 - 496);
        assert_eq!(committer.stall(), None);
    }
}

/// Where there is no other order to compare it with, an order that is refused for an unknown reason is given up all the same.
#[tokio::test(start_paused = true)]
async fn an_order_that_is_refused_and_the_only_one_is_given_up_in_time() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 9), None).await.expect("a registration");
    refuse(&ledger, 99_999, [order(1, 1, 1)]);
    let since = Instant::now();
    let answer = committer.submit(order(1, 1, 1), None).await;
    assert!(matches!(answer, Err(CommandError::Unstorable { code: 99_999, .. })), "{answer:?}");
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
}

/// A full disk makes no order a dead letter, however long it lasts, however few there are, and whatever the server says of it. It shows
/// as a stall, with the reason, and ends when there is room.
#[tokio::test(start_paused = true)]
async fn a_full_disk_is_waited_for_and_told() {
    for ((full, says), orders) in FULL_DISKS.into_iter().flat_map(|disk| [(disk, 1), (disk, 40)]) {
        let ledger = MemoryLedger::default();
        let (committer, _running) = start(&ledger);
        committer.submit(register(1, 1_000), None).await.expect("a registration");
        ledger.fill(Some(full));
        let waiting = tokio::spawn({
            let committer = committer.clone();
            async move { submit_all(&committer, (0..orders).map(|n| order(n, 1, 1))).await }
        });
        tokio::time::sleep(STALLED_AFTER / 2).await;
        assert_eq!(committer.stall(), None, "not yet");
        tokio::time::sleep(STALLED_AFTER).await;
        let why = committer.stall().expect("a stall");
        assert!(why.contains(says), "{why}");
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!waiting.is_finished(), "nobody gave up");
        ledger.fill(None);
        let answers = waiting.await.expect("no panic");
        assert!(answers.iter().all(is_allocated), "{answers:?}");
        assert_eq!(committer.stall(), None);
        assert_eq!(stock(&fold(&ledger).await, 1), 1_000 - u32::try_from(orders).expect("few"));
    }
}

/// Whoever waited for a write goes away after some seconds. What kept it from being stored is told until the ledger takes something.
#[tokio::test(start_paused = true)]
async fn a_full_disk_is_told_when_nobody_waits_any_more() {
    for (full, says) in FULL_DISKS {
        let ledger = MemoryLedger::default();
        let (committer, _running) = start(&ledger);
        committer.submit(register(1, 9), None).await.expect("a registration");
        ledger.fill(Some(full));
        let adjust = committer.submit(command(1, Action::Adjust { delta: 1 }), None);
        assert!(tokio::time::timeout(Duration::from_secs(4), adjust).await.is_err());
        tokio::time::sleep(STALLED_AFTER).await;
        assert!(committer.stall().is_some_and(|why| why.contains(says)), "{:?}", committer.stall());
        let before = ledger.messages().len();
        ledger.fill(None);
        tokio::time::sleep(4 * IDLE_CATCH_UP).await;
        assert_eq!(committer.stall(), None, "it looked by itself");
        // What the server may have of a batch is sent again until it is known to be stored, whoever went away.
        let carried_out = usize::from(full == FullDisk::Staged);
        assert_eq!(ledger.messages().len() - before, carried_out, "and stored nothing to find out");
    }
}

/// The ways in which a server says that its disk is full.
const FULL_DISKS: [(FullDisk, &str); 2] =
    [(FullDisk::Stream, "no space left on device"), (FullDisk::Staged, "batch is incomplete")];

/// The ledger holds an event under the id that an order's event would have: that order can never be decided, and says so. The
/// others are.
#[tokio::test(start_paused = true)]
async fn an_order_whose_event_id_is_another_s_is_told_so_and_stops_no_other() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 1_000), None).await.expect("a registration");
    let clashes = order(7, 1, 1);
    let state = fold(&ledger).await;
    let Decision::Store(mut facts, _) = decide(&Draft::new(&state), &clashes, clock()) else {
        panic!("it would be allocated");
    };
    // Its form is not that of an order's event: what was stored is somebody's change of the stock.
    let LedgerEvent::InventoryUpdated(updated) = &mut facts[0].event else { panic!("a change of the stock") };
    (updated.order_id, updated.trigger) = (None, lomash_contract::Trigger::AdminUpdate);
    ledger.append(&[stored_as(&facts[0])], state.sequence()).await.expect("another's event");
    let since = Instant::now();
    let answers = submit_all(&committer, (0..300).map(|n| order(n, 1, 1))).await;
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    for (n, answer) in answers.iter().enumerate() {
        let is_taken = matches!(answer, Err(CommandError::IdentityTaken { .. }));
        assert!(if n == 7 { is_taken } else { is_allocated(answer) }, "order {n} came to {answer:?}");
    }
    assert_eq!(stock(&fold(&ledger).await, 1), 1_000 - 300);
}

/// What nobody waits for any more when the committer gets to it is not begun.
#[tokio::test]
async fn what_was_abandoned_before_it_was_taken_up_is_not_carried_out() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 9), None).await.expect("a registration");
    ledger.answer_appends(false);
    let in_flight = tokio::spawn({
        let committer = committer.clone();
        async move { committer.submit(order(1, 1, 1), None).await }
    });
    while ledger.unanswered() == 0 {
        tokio::task::yield_now().await;
    }
    // Queued behind it, and left.
    let mut abandoned = Box::pin(committer.submit(command(1, Action::Adjust { delta: 5 }), None));
    assert!(futures::poll!(&mut abandoned).is_pending());
    drop(abandoned);
    ledger.answer_appends(true);
    assert!(is_allocated(&in_flight.await.expect("no panic")));
    committer.submit(order(2, 1, 1), None).await.expect("decided");
    assert_eq!(stock(&fold(&ledger).await, 1), 7, "without the five");
}

/// Full batches are staged ahead, and each falls with the one before it. The server keeps what fell for a while, and has room for few.
#[tokio::test(start_paused = true)]
async fn what_fell_is_not_staged_again_before_the_server_forgot_it() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    committer.submit(register(1, 5), None).await.expect("a registration");
    ledger.inject(vec![Fault::UnknownLost; 2 * lomash_ledger::MAX_STAGED_BATCHES]);
    // One that cannot be stored takes a whole batch of others along, time after time.
    let answers = submit_all(&committer, (0..2 * MAX_BATCH_MESSAGES as u128).map(|n| order(n, 1, 1))).await;
    assert_eq!(answers.iter().filter(|answer| is_allocated(answer)).count(), 5);
    assert_eq!(ledger.unplaced(), 0, "the server had room for each batch");
}

/// Refusals of long orders are large: a batch of them ends by its bytes long before it ends by its messages.
#[tokio::test]
async fn a_batch_ends_by_its_bytes() {
    let ledger = MemoryLedger::default();
    let (committer, _running) = start(&ledger);
    let long = |n: u128| {
        let lines = (0..1_000).map(|line| OrderLine { product_id: product_id(1_000 + line), quantity: 1 }).collect();
        Command::Order(Order { order_id: Uuid::from_u128(n).into(), lines })
    };
    let answers = submit_all(&committer, (0..200).map(long)).await;
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Committed { outcome: Outcome::Refused { .. }, .. }))));
    let (messages, bytes) = ledger.largest_batch();
    let one = ledger.messages()[0].bytes();
    assert!(bytes < MAX_BATCH_BYTES + one + 1_024, "{bytes} bytes in {messages} messages of {one}");
    assert!(bytes > MAX_BATCH_BYTES / 2, "they were put together: {bytes}");
}

#[derive(Clone, Debug)]
enum Step {
    First(Command),
    Second(Command),
    Fault(Fault),
    Unreadable,
}

fn any_step() -> impl Strategy<Value = Step> {
    let act = prop_oneof![
        4 => (0_u128..30, 1_u128..4, 1_u32..5).prop_map(|(n, product, quantity)| order(n, product, quantity)),
        1 => (1_u128..4, -3_i64..10).prop_map(|(n, delta)| command(n, Action::Adjust { delta })),
        1 => (1_u128..4, 0_u32..9).prop_map(|(n, quantity)| register(n, quantity)),
    ];
    let fault = prop_oneof![
        Just(Fault::UnknownStored),
        Just(Fault::UnknownLost),
        Just(Fault::UnknownLater),
        Just(Fault::Refused)
    ];
    prop_oneof![
        5 => act.clone().prop_map(Step::First),
        5 => act.prop_map(Step::Second),
        2 => fault.prop_map(Step::Fault),
        1 => Just(Step::Unreadable),
    ]
}

proptest! {
    /// Two committers on one ledger, both given the same orders among others, with answers getting lost: the stream is
    /// one chain, every order is decided once, and every answer that was given is true.
    #[test]
    fn two_committers_interleaved_end_in_one_chain(steps in proptest::collection::vec(any_step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            let ledger = MemoryLedger::default();
            let (first, _first_running) = start(&ledger);
            let (second, _second_running) = start(&ledger);
            let mut answers = Vec::new();
            for step in steps {
                match step {
                    Step::First(command) => {
                        let first = first.clone();
                        answers.push(tokio::spawn(async move { (command.clone(), first.submit(command, None).await) }));
                    }
                    Step::Second(command) => {
                        let second = second.clone();
                        answers.push(tokio::spawn(async move { (command.clone(), second.submit(command, None).await) }));
                    }
                    Step::Fault(fault) => ledger.inject([fault]),
                    Step::Unreadable => ledger.make_unreadable(1),
                }
            }
            let mut adjusted = 0_i64;
            let mut registered = 0_i64;
            let mut orders = hashbrown::HashMap::new();
            for answer in answers {
                let (command, answer) = answer.await.expect("no panic");
                match (command, answer) {
                    (Command::Order(order), Ok(committed)) => {
                        let decisions: &mut Vec<Outcome> = orders.entry(order).or_default();
                        decisions.push(committed.outcome);
                    }
                    (Command::Product(ProductCommand { action, .. }), Ok(committed)) => match (action, committed.outcome) {
                        (_, Outcome::StockChanged { previous_quantity, new_quantity, .. }) => {
                            adjusted += i64::from(new_quantity) - i64::from(previous_quantity);
                        }
                        (Action::Register { initial_quantity, .. }, Outcome::Registered) => {
                            registered += i64::from(initial_quantity);
                        }
                        _ => {}
                    },
                    (_, Err(CommandError::Rejected(_))) => {}
                    (command, Err(problem)) => panic!("{command:?} got {problem}"),
                }
            }
            // fold() panics on a message that does not chain; what is left is arithmetic over the true answers.
            let state = fold(&ledger).await;
            let mut sold = 0_i64;
            let mut decided = hashbrown::HashMap::new();
            for message in ledger.messages() {
                let event = message.parse().expect("ours").payload;
                let (order, outcome) = match event {
                    LedgerEvent::InventoryUpdated(InventoryUpdated {
                        order_id: Some(order),
                        previous_quantity,
                        new_quantity,
                        ..
                    }) => {
                        sold += i64::from(previous_quantity) - i64::from(new_quantity);
                        (order, Outcome::Allocated)
                    }
                    LedgerEvent::InventoryUpdateFailed(failed) => {
                        (failed.order_id, Outcome::Refused { reason: failed.reason })
                    }
                    _ => continue,
                };
                assert_eq!(decided.insert(order, outcome), None, "order {order} is decided once");
            }
            for (order, decisions) in orders {
                // A writer whose answer was lost may find the other's identical decision and tell that: also true.
                let stored = &decided[&order.order_id];
                let told = |decision: &Outcome| decision == stored || *decision == Outcome::AlreadyDecided;
                assert!(decisions.iter().all(told), "{order:?} came to {stored:?} and was told {decisions:?}");
            }
            let total: i64 = state.products().map(|(_, product)| i64::from(product.quantity)).sum();
            assert_eq!(total, registered + adjusted - sold);
        });
    }
    /// Two committers, both given the same commands under keys among others, with answers getting lost: each acts once, and
    /// whoever asks hears that it did, or of a refusal that it was refused.
    #[test]
    fn a_keyed_command_at_two_committers_acts_once(
        steps in proptest::collection::vec((any_step(), 0_u128..6, any::<bool>()), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            let ledger = MemoryLedger::default();
            let (first, _first_running) = start(&ledger);
            let (second, _second_running) = start(&ledger);
            first.submit(register(1, 10), None).await.expect("a registration");
            let mut answers = Vec::new();
            for (step, key, at_first) in steps {
                match step {
                    Step::First(other) | Step::Second(other) => {
                        // Adds, takes away more than there may be, or changes nothing.
                        let action = match key % 3 {
                            0 => Action::Adjust { delta: 1 },
                            1 => Action::Adjust { delta: -12 },
                            _ => Action::SetQuantity { quantity: 7, expected_quantity: None },
                        };
                        let by = UpdatedBy::System;
                        let keyed = ProductCommand::new(Uuid::from_u128(0xcafe + key), product_id(1), by, action);
                        let keyed = Command::Product(ProductCommand { fingerprint: Some(7), ..keyed });
                        for command in [other, keyed] {
                            let committer = if at_first { first.clone() } else { second.clone() };
                            answers.push(tokio::spawn(async move {
                                (command.clone(), committer.submit(command, None).await)
                            }));
                        }
                    }
                    Step::Fault(fault) => ledger.inject([fault]),
                    Step::Unreadable => ledger.make_unreadable(1),
                }
            }
            let mut told = hashbrown::HashMap::<Uuid, Vec<bool>>::new();
            for answer in answers {
                let (command, answer) = answer.await.expect("no panic");
                if let Command::Product(ProductCommand { command_id, fingerprint: Some(_), .. }) = command {
                    assert!(
                        matches!(
                            answer,
                            Ok(_) | Err(CommandError::Rejected(Rejection::BelowZero { .. }))
                        ),
                        "{answer:?}"
                    );
                    told.entry(command_id).or_default().push(answer.is_err());
                }
            }
            fold(&ledger).await;
            let mut answered = hashbrown::HashMap::new();
            for message in ledger.messages() {
                if let LedgerEvent::CommandAnswered(answer) = message.parse().expect("ours").payload {
                    let command = answer.command_id;
                    assert!(answered.insert(command, answer.refusal.is_some()).is_none(), "{command} is answered twice");
                }
            }
            for (command, refused) in told {
                // A repetition hears where its answer is, and reads there that it was refused.
                let is_refused = answered[&command];
                assert!(is_refused || refused.iter().all(|refused| !refused), "{command}: {refused:?}");
            }
        });
    }
}
