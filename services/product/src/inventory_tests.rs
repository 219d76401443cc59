//! Given a history, when a command is decided, then these events: one line per outcome, and the laws that hold for all.

use proptest::prelude::*;

use super::*;

fn id(n: u128) -> ProductId {
    ProductId(Uuid::from_u128(n))
}

fn order_id(n: u128) -> OrderId {
    OrderId(Uuid::from_u128(0xabc0_0000 + n))
}

fn now() -> Timestamp {
    "2026-01-31T09:30:00.123Z".parse().expect("a valid instant")
}

fn details(sku: &str) -> Details {
    Details {
        sku: sku.parse().expect("a valid sku"),
        name: "Oak base unit".into(),
        category: None,
        low_stock_threshold: None,
        active: true,
    }
}

fn product(n: u128, action: Action) -> Command {
    let command_id = Uuid::new_v5(&Uuid::from_u128(n), format!("{action:?}").as_bytes());
    Command::Product(ProductCommand::new(command_id, id(n), UpdatedBy::System, action))
}

fn register(n: u128, quantity: u32) -> Command {
    product(n, Action::Register { details: details(&format!("SKU-{n}")), initial_quantity: quantity })
}

fn order(n: u128, lines: &[(u128, u32)]) -> Command {
    let lines = lines.iter().map(|(product, quantity)| OrderLine { product_id: id(*product), quantity: *quantity });
    Command::Order(Order { order_id: order_id(n), lines: lines.collect() })
}

/// A count taken `minutes` before now.
fn counted(minutes: i64, quantity: u32) -> Count {
    let counted_at = Timestamp::new(now().get() - time::Duration::minutes(minutes));
    Count { quantity, counted_at, counted_by: CountedBy::Warehouse }
}

/// The same command under a key, whose request has this fingerprint.
fn keyed(command: &Command, fingerprint: u64) -> Command {
    let Command::Product(command) = command else { panic!("orders have no keys") };
    Command::Product(ProductCommand { fingerprint: Some(fingerprint), ..command.clone() })
}

/// The same command, which another replica was asked for and did not answer.
fn second_try(command: &Command) -> Command {
    let Command::Product(command) = command else { panic!("orders are tried where they are delivered") };
    Command::Product(ProductCommand { is_second_try: true, ..command.clone() })
}

/// The same command, if the product is at one of these versions.
fn if_at(command: &Command, versions: &[u64]) -> Command {
    let Command::Product(command) = command else { panic!("orders have no versions") };
    Command::Product(ProductCommand { if_version: versions.to_vec(), ..command.clone() })
}

/// Decides on the state alone.
fn decide_on(state: &State, command: &Command) -> Decision {
    decide(&Draft::new(state), command, now())
}

/// What a decision stores.
fn stored(decision: Decision) -> Vec<Fact> {
    match decision {
        Decision::Store(facts, _) => facts,
        Decision::Refuse(fact, _) => vec![*fact],
        Decision::Settled(_) | Decision::Reject(_) => Vec::new(),
    }
}

fn evolve(state: &mut State, fact: &Fact, at: Timestamp) {
    state.evolve(state.sequence() + 1, at, &fact.event, None);
}

fn given(history: &[Command]) -> State {
    let mut state = State::default();
    for command in history {
        for fact in stored(decide_on(&state, command)) {
            state.admits(&fact.event).expect("our own events chain");
            evolve(&mut state, &fact, now());
        }
    }
    state
}

/// A decision as one line: the events, then the outcome.
fn told(decision: &Decision) -> String {
    let event = |fact: &Fact| match &fact.event {
        LedgerEvent::InventoryUpdated(updated) => {
            format!("{}→{} {}", updated.previous_quantity, updated.new_quantity, updated.trigger)
        }
        LedgerEvent::InventoryUpdateFailed(failed) => {
            let item = |item: &FailedItem| format!("{}/{}", item.available, item.requested);
            format!("{} {}", failed.reason, failed.items.iter().map(item).collect::<Vec<_>>().join(" "))
        }
        LedgerEvent::ProductUpdated(updated) => format!("{:?}", updated.changed_fields),
        LedgerEvent::ProductRegistered(_) => "registered".to_owned(),
        LedgerEvent::ProductRevised(_) => "revised".to_owned(),
        LedgerEvent::InventoryCounted(_) => "counted".to_owned(),
        LedgerEvent::CommandAnswered(answered) => match &answered.refusal {
            None => format!("answered {}", answered.events),
            Some(refusal) => format!("answered {}", refusal["type"]),
        },
    };
    match decision {
        Decision::Store(facts, outcome) => {
            format!("{} => {outcome:?}", facts.iter().map(event).collect::<Vec<_>>().join(", "))
        }
        Decision::Settled(outcome) => format!("=> {outcome:?}"),
        Decision::Reject(rejection) => format!("=> {rejection}"),
        Decision::Refuse(fact, rejection) => format!("{} => {rejection}", event(fact)),
    }
}

#[test]
fn every_outcome_of_every_command() {
    let set = |quantity, expected_quantity| Action::SetQuantity { quantity, expected_quantity };
    let record = |minutes, quantity| Action::RecordCount(counted(minutes, quantity));
    let correct =
        |minutes, quantity, stock_at_count| Action::CorrectCount { count: counted(minutes, quantity), stock_at_count };
    let count = |quantity, stock_at_count| Action::CorrectCount { count: counted(0, quantity), stock_at_count };
    let revise = |sku: &str, name: &str| Action::Revise { details: Details { name: name.into(), ..details(sku) } };
    let stocked = &[register(1, 10), register(2, 5)];
    let off_sale = &[register(1, 10), product(1, Action::Amend(Amendment::activate(false)))];
    let once = &[register(1, 10), order(1, &[(1, 4)])];
    let counted_once = &[register(1, 10), order(1, &[(1, 4)]), product(1, record(1, 12))];
    let refused_once = &[register(1, 1), order(1, &[(1, 4)]), product(1, set(100, None))];
    let table: &[(&str, &[Command], Command, &str)] = &[
        ("an order takes stock", stocked, order(1, &[(1, 4)]), "10→6 ORDER_CONFIRMED => Allocated"),
        (
            "an order of two lines",
            stocked,
            order(1, &[(2, 1), (1, 4)]),
            "5→4 ORDER_CONFIRMED, 10→6 ORDER_CONFIRMED => Allocated",
        ),
        (
            "the last one ends availability",
            stocked,
            order(1, &[(2, 5)]),
            "5→0 ORDER_CONFIRMED, [StockQuantity, IsAvailable] => Allocated",
        ),
        (
            "one too many takes nothing of any line",
            stocked,
            order(1, &[(1, 4), (2, 6)]),
            "INSUFFICIENT_STOCK 5/6 => Refused { reason: InsufficientStock }",
        ),
        (
            "an unknown product is the gravest reason",
            stocked,
            order(1, &[(2, 6), (9, 1)]),
            "UNKNOWN_PRODUCT 0/1 => Refused { reason: UnknownProduct }",
        ),
        (
            "a product off sale is refused whatever its stock",
            off_sale,
            order(1, &[(1, 1)]),
            "PRODUCT_INACTIVE 10/1 => Refused { reason: ProductInactive }",
        ),
        ("an order again is a no-op", once, order(1, &[(1, 4)]), "=> AlreadyDecided"),
        ("also with other lines", once, order(1, &[(1, 1), (9, 9)]), "=> AlreadyDecided"),
        ("a refused order stays refused when stock comes", refused_once, order(1, &[(1, 4)]), "=> AlreadyDecided"),
        ("registering without stock", &[], register(1, 0), "registered => Registered"),
        (
            "registering with stock",
            &[],
            register(1, 7),
            "registered, 0→7 ADMIN_UPDATE, [StockQuantity, IsAvailable] => Registered",
        ),
        ("registering the same again", once, register(1, 99), "=> Unchanged"),
        (
            "registering it with other details",
            once,
            product(1, Action::Register { details: details("OTHER"), initial_quantity: 0 }),
            "=> the product is registered already, with other details; revise it instead",
        ),
        (
            "a unit belongs to one product",
            once,
            product(3, Action::Register { details: details("SKU-1"), initial_quantity: 0 }),
            "=> the sku belongs to product 00000000-0000-0000-0000-000000000001 already",
        ),
        (
            "a name must be visible",
            stocked,
            product(1, revise("SKU-1", " ")),
            "=> the name must have 1 to 200 characters, none of them a control character",
        ),
        (
            "revising names what changed",
            stocked,
            product(1, revise("SKU-1", "Ash base unit")),
            r#"revised, [Name] => Revised { changes: [Name { before: "Oak base unit", after: "Ash base unit" }] }"#,
        ),
        ("revising to the same", stocked, product(1, revise("SKU-1", "Oak base unit")), "=> Unchanged"),
        (
            "a revised unit must be free",
            stocked,
            product(1, revise("SKU-2", "Oak base unit")),
            "=> the sku belongs to product 00000000-0000-0000-0000-000000000002 already",
        ),
        (
            "taking a product off sale",
            stocked,
            product(1, Action::Amend(Amendment::activate(false))),
            "revised, [Active] => Revised { changes: [Active { before: true, after: false }] }",
        ),
        (
            "setting the stock",
            stocked,
            product(1, set(12, Some(10))),
            "10→12 ADMIN_UPDATE => StockChanged { previous_quantity: 10, new_quantity: 12, shortfall: 0 }",
        ),
        ("setting the same stock is no event", stocked, product(1, set(10, None)), "=> Unchanged"),
        (
            "setting a stock that moved meanwhile",
            stocked,
            product(1, set(12, Some(11))),
            "=> the stock is 10, not the expected 11",
        ),
        (
            "more than there can be",
            stocked,
            product(1, set(MAX_STOCK + 1, None)),
            "=> the quantity must be from 0 to 1000000000",
        ),
        (
            "adjusting to zero and no further",
            stocked,
            product(1, Action::Adjust { delta: -10 }),
            "10→0 ADMIN_UPDATE, [StockQuantity, IsAvailable] => StockChanged { previous_quantity: 10, new_quantity: 0, \
             shortfall: 0 }",
        ),
        (
            "adjusting below zero",
            stocked,
            product(1, Action::Adjust { delta: -11 }),
            "=> the stock is 10; taking 11 away would leave less than nothing",
        ),
        (
            "adjusting by the most negative number there is",
            stocked,
            product(1, Action::Adjust { delta: i64::MIN }),
            "=> the stock is 10; taking 9223372036854775808 away would leave less than nothing",
        ),
        ("adjusting by nothing", stocked, product(1, Action::Adjust { delta: 0 }), "=> Unchanged"),
        (
            "an unknown product cannot be changed",
            &[],
            product(1, Action::Adjust { delta: 1 }),
            "=> the product is not registered",
        ),
        (
            "a count corrects by its difference, not to its figure",
            once,
            product(1, count(12, 10)),
            "counted, 6→8 SCHEDULED_SYNC => StockChanged { previous_quantity: 6, new_quantity: 8, shortfall: 0 }",
        ),
        (
            "a correction stops at zero and tells the shortfall",
            once,
            product(1, count(1, 10)),
            "counted, 6→0 SCHEDULED_SYNC, [StockQuantity, IsAvailable] => StockChanged { previous_quantity: 6, \
             new_quantity: 0, shortfall: 3 }",
        ),
        ("a count that agrees is on record", once, product(1, count(10, 10)), "counted => Unchanged"),
        ("a count by itself", once, product(1, record(1, 3)), "counted => CountRecorded"),
        ("the same count again", counted_once, product(1, record(1, 12)), "=> Unchanged"),
        (
            "an older count than the one on record",
            counted_once,
            product(1, record(2, 12)),
            "=> a count of 2026-01-31T09:29:00.123Z is on record; this one is not newer",
        ),
        (
            "another figure of the same moment",
            counted_once,
            product(1, record(1, 13)),
            "=> a count of 2026-01-31T09:29:00.123Z is on record; this one is not newer",
        ),
        (
            "a count of the future",
            once,
            product(1, record(-6, 3)),
            "=> the count is of 2026-01-31T09:36:00.123Z, which is still to come; check the clock of whoever counted",
        ),
        (
            "a count on record corrects without being recorded again",
            counted_once,
            product(1, correct(1, 12, 10)),
            "6→8 SCHEDULED_SYNC => StockChanged { previous_quantity: 6, new_quantity: 8, shortfall: 0 }",
        ),
        (
            "a count corrects once, whatever was sold since",
            &[register(1, 10), product(1, correct(1, 12, 10)), order(1, &[(1, 4)])],
            product(1, correct(1, 12, 10)),
            "=> Unchanged",
        ),
        (
            "a newer count corrects again",
            &[register(1, 10), product(1, correct(1, 12, 10))],
            product(1, correct(0, 9, 12)),
            "counted, 12→9 SCHEDULED_SYNC => StockChanged { previous_quantity: 12, new_quantity: 9, shortfall: 0 }",
        ),
        (
            "an older count does not correct any more",
            &[register(1, 10), product(1, correct(1, 12, 10))],
            product(1, correct(2, 3, 10)),
            "=> a count of 2026-01-31T09:29:00.123Z is on record; this one is not newer",
        ),
        (
            "the version that was seen",
            once,
            if_at(&product(1, set(9, None)), &[1, 4]),
            "6→9 ADMIN_UPDATE => StockChanged { previous_quantity: 6, new_quantity: 9, shortfall: 0 }",
        ),
        (
            "another version than was seen",
            once,
            if_at(&product(1, set(9, None)), &[1, 2]),
            "=> the product is at version 4, not at the expected one; read it again",
        ),
        (
            "a keyed command again, long after",
            &[register(1, 10), keyed(&product(1, set(4, None)), 7), product(1, set(8, None))],
            keyed(&product(1, set(4, None)), 7),
            "=> Replayed { first_sequence: 4 }",
        ),
        (
            "another request under a used key",
            &[register(1, 10), keyed(&product(1, set(4, None)), 7)],
            keyed(&product(1, set(4, None)), 8),
            "=> the key was used for another request before; use a new key",
        ),
        (
            "under a key the answer comes first",
            stocked,
            keyed(&product(1, Action::Adjust { delta: -10 }), 7),
            "answered 2, 10→0 ADMIN_UPDATE, [StockQuantity, IsAvailable] => StockChanged { previous_quantity: 10, \
             new_quantity: 0, shortfall: 0 }",
        ),
        (
            "what changes nothing is on record under a key",
            stocked,
            keyed(&product(1, set(10, None)), 7),
            "answered 0 => Unchanged",
        ),
        (
            "and again it changes nothing, whatever was sold since",
            &[register(1, 40), keyed(&product(1, set(40, None)), 7), order(1, &[(1, 5)])],
            keyed(&product(1, set(40, None)), 7),
            "=> Replayed { first_sequence: 4 }",
        ),
        (
            "a refusal is on record under a key",
            stocked,
            keyed(&product(1, Action::Adjust { delta: -11 }), 7),
            "answered \"belowZero\" => the stock is 10; taking 11 away would leave less than nothing",
        ),
        (
            "and it stays one when there is enough",
            &[register(1, 10), keyed(&product(1, Action::Adjust { delta: -11 }), 7), product(1, set(90, None))],
            keyed(&product(1, Action::Adjust { delta: -11 }), 7),
            "=> Replayed { first_sequence: 4 }",
        ),
        (
            "another request after a refusal",
            &[register(1, 10), keyed(&product(1, Action::Adjust { delta: -11 }), 7)],
            keyed(&product(1, Action::Adjust { delta: -11 }), 8),
            "=> the key was used for another request before; use a new key",
        ),
        (
            "another version than was seen, under a key",
            stocked,
            keyed(&if_at(&product(1, set(9, None)), &[1]), 7),
            "answered \"versionMismatch\" => the product is at version 2, not at the expected one; read it again",
        ),
        (
            "another stock than was expected, under a key",
            stocked,
            keyed(&product(1, set(12, Some(11))), 7),
            "answered \"unexpectedQuantity\" => the stock is 10, not the expected 11",
        ),
        (
            "an unknown product under a key",
            &[],
            keyed(&product(1, set(12, None)), 7),
            "answered \"unknownProduct\" => the product is not registered",
        ),
        (
            "more than a stock can be, by what is there",
            stocked,
            keyed(&product(1, Action::Adjust { delta: i64::from(MAX_STOCK) }), 7),
            "answered \"outOfRange\" => the quantity must be from 0 to 1000000000",
        ),
        (
            "what is wrong by itself leaves its key free",
            stocked,
            keyed(&product(1, set(MAX_STOCK + 1, None)), 7),
            "=> the quantity must be from 0 to 1000000000",
        ),
        (
            "a second try of a command without a key is on record too",
            stocked,
            second_try(&product(1, set(10, None))),
            "answered 0 => Unchanged",
        ),
        (
            "but not of a correction, which may be asked for again at any time",
            once,
            second_try(&product(1, count(6, 6))),
            "counted => Unchanged",
        ),
        (
            "so that the first try finds it",
            &[register(1, 10), second_try(&product(1, set(40, None))), order(1, &[(1, 5)])],
            product(1, set(40, None)),
            "=> Replayed { first_sequence: 4 }",
        ),
    ];
    for (what, history, command, expected) in table {
        assert_eq!(told(&decide_on(&given(history), command)), *expected, "{what}");
    }
}

#[test]
fn stock_that_returns_makes_available_again() {
    let state = given(&[register(1, 1), order(1, &[(1, 1)])]);
    let decision = decide_on(&state, &product(1, Action::Adjust { delta: 2 }));
    assert!(told(&decision).starts_with("0→2 ADMIN_UPDATE, [StockQuantity, IsAvailable]"), "{}", told(&decision));
}

#[test]
fn a_draft_frees_the_unit_that_it_takes_away() {
    let state = given(&[register(1, 1)]);
    let mut draft = Draft::new(&state);
    let renamed = product(1, Action::Revise { details: details("NEW") });
    let Decision::Store(facts, _) = decide(&draft, &renamed, now()) else { panic!("a revision is stored") };
    draft.apply(&facts, now());
    let heir = product(2, Action::Register { details: details("SKU-1"), initial_quantity: 0 });
    assert!(matches!(decide(&draft, &heir, now()), Decision::Store(_, Outcome::Registered)));
    let late = product(3, Action::Register { details: details("NEW"), initial_quantity: 0 });
    assert_eq!(decide(&draft, &late, now()), Decision::Reject(Rejection::SkuTaken { owner: id(1) }));
}

#[test]
fn of_two_who_saw_the_same_version_one_wins_also_within_a_batch() {
    let state = given(&[register(1, 10)]);
    let mut draft = Draft::new(&state);
    let version = state.product(&id(1)).expect("it is registered").version;
    let Decision::Store(facts, _) = decide(&draft, &if_at(&product(1, set_to(4)), &[version]), now()) else {
        panic!("the first wins")
    };
    draft.apply(&facts, now());
    let second = decide(&draft, &if_at(&product(1, set_to(5)), &[version]), now());
    assert_eq!(second, Decision::Reject(Rejection::VersionMismatch { actual: state.sequence() + 1 }));
}

#[test]
fn a_keyed_command_twice_in_a_batch_is_carried_out_once() {
    let state = given(&[register(1, 10)]);
    let mut draft = Draft::new(&state);
    let command = keyed(&product(1, Action::Adjust { delta: 1 }), 7);
    let Decision::Store(facts, _) = decide(&draft, &command, now()) else { panic!("the first is carried out") };
    draft.apply(&facts, now());
    let first_sequence = state.sequence() + 1;
    assert_eq!(decide(&draft, &command, now()), Decision::Settled(Outcome::Replayed { first_sequence }));
}

#[test]
fn a_mark_survives_its_header_and_nothing_else_is_one() {
    let mark = CommandMark { command_id: Uuid::from_u128(7), fingerprint: 0xfe };
    assert_eq!(CommandMark::parse("00000000-0000-0000-0000-000000000007 00000000000000fe"), Some(mark));
    for text in ["", " ", "7 fe", "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000007 x"] {
        assert_eq!(CommandMark::parse(text), None, "{text}");
    }
}

fn set_to(quantity: u32) -> Action {
    Action::SetQuantity { quantity, expected_quantity: None }
}

#[test]
fn a_retry_repeats_its_event_ids_and_another_cause_does_not() {
    let state = given(&[register(1, 10)]);
    let ids = |command: &Command| match decide_on(&state, command) {
        Decision::Store(facts, _) => facts.iter().map(|fact| fact.event_id).collect::<Vec<_>>(),
        other => panic!("nothing stored: {other:?}"),
    };
    assert_eq!(ids(&order(1, &[(1, 10)])), ids(&order(1, &[(1, 10)])));
    assert_eq!(ids(&order(1, &[(1, 10)])).len(), 2, "inventory-updated and product-updated have ids of their own");
    assert_ne!(ids(&order(1, &[(1, 10)])), ids(&order(2, &[(1, 10)])));
}

#[test]
#[should_panic(expected = "without gaps")]
fn a_gap_in_the_fold_is_a_broken_invariant() {
    let mut state = given(&[register(1, 10)]);
    state.skip(state.sequence() + 2);
}

/// Commands over few products and few orders, so that they meet.
fn any_command() -> impl Strategy<Value = Command> {
    let lines = proptest::collection::btree_map(1_u128..6, 1_u32..20, 1..4);
    let an_order = (0_u128..40, lines).prop_map(|(n, lines)| order(n, &lines.into_iter().collect::<Vec<_>>()));
    let action = prop_oneof![
        (0_u32..50).prop_map(|quantity| Action::SetQuantity { quantity, expected_quantity: None }),
        (-60_i64..60).prop_map(|delta| Action::Adjust { delta }),
        (0_i64..4, 0_u32..50).prop_map(|(minutes, quantity)| Action::RecordCount(counted(minutes, quantity))),
        (0_i64..4, 0_u32..50, 0_u32..50).prop_map(|(minutes, quantity, stock_at_count)| {
            let count = counted(minutes, quantity);
            Action::CorrectCount { count, stock_at_count }
        }),
        any::<bool>().prop_map(|active| Action::Amend(Amendment::activate(active))),
        Just(Action::Revise { details: details("SKU-R") }),
    ];
    prop_oneof![
        3 => an_order,
        1 => (1_u128..6, 0_u32..50).prop_map(|(n, quantity)| register(n, quantity)),
        2 => (1_u128..6, action, any::<u128>(), any::<Option<u64>>()).prop_map(|(n, action, command, fingerprint)| {
            let command = ProductCommand::new(Uuid::from_u128(command), id(n), UpdatedBy::System, action);
            Command::Product(ProductCommand { fingerprint, ..command })
        }),
    ]
}

proptest! {
    /// Decided in one batch or one by one, it is the same: the same events, and the same state.
    #[test]
    fn a_batch_decides_as_its_commands_one_by_one(commands in proptest::collection::vec(any_command(), 0..60)) {
        let state = State::default();
        let mut draft = Draft::new(&state);
        let mut batched = Vec::new();
        for command in &commands {
            let decision = decide(&draft, command, now());
            let facts = stored(decision);
            draft.apply(&facts, now());
            batched.extend(facts);
        }
        let mut one_by_one = State::default();
        let mut single = Vec::new();
        for command in &commands {
            for fact in stored(decide_on(&one_by_one, command)) {
                evolve(&mut one_by_one, &fact, now());
                single.push(fact);
            }
        }
        prop_assert_eq!(&batched, &single);
        let mut folded = State::default();
        for fact in &batched {
            // The chain holds and nothing is negative: every reader would admit it.
            prop_assert_eq!(folded.admits(&fact.event), Ok(()));
            evolve(&mut folded, fact, now());
        }
        prop_assert_eq!(folded, one_by_one);
    }

    /// Whatever happened, the same orders again store nothing.
    #[test]
    fn an_order_twice_adds_nothing(commands in proptest::collection::vec(any_command(), 0..60)) {
        let state = given(&commands);
        for command in commands.iter().filter(|command| matches!(command, Command::Order(_))) {
            prop_assert_eq!(decide_on(&state, command), Decision::Settled(Outcome::AlreadyDecided));
        }
    }

    /// An order takes exactly what it asked for of each product, or nothing of any.
    #[test]
    fn all_lines_or_none(
        commands in proptest::collection::vec(any_command(), 0..40),
        lines in proptest::collection::btree_map(1_u128..7, 1_u32..20, 1..5),
    ) {
        let before = given(&commands);
        let mut after = before.clone();
        let wanted: Vec<_> = lines.into_iter().collect();
        let Decision::Store(facts, outcome) = decide_on(&before, &order(1_000, &wanted)) else {
            return Err(TestCaseError::fail("a new order is always decided"));
        };
        for fact in facts {
            evolve(&mut after, &fact, now());
        }
        for (product, quantity) in wanted {
            let stock = |state: &State| state.product(&id(product)).map(|product| product.quantity);
            let expected = match outcome {
                Outcome::Allocated => stock(&before).map(|stock| stock - quantity),
                _ => stock(&before),
            };
            prop_assert_eq!(stock(&after), expected);
        }
    }
}

/// Brings a copy of the state back, by way of bytes.
fn thaw(frozen: frozen::Frozen) -> State {
    let (head, parts) = (frozen.head(), frozen.into_parts().collect::<Vec<_>>());
    let mut thawing = frozen::Thawing::begin(head, parts.iter().map(Vec::len).sum());
    parts.iter().try_for_each(|part| thawing.take(part)).expect("its own parts");
    thawing.finish().expect("a whole state")
}

proptest! {
    /// A snapshot and the tail after it make the same state as the whole ledger, wherever the cut is: also between the
    /// events of one order, where a batch begins and where it ends, and with foreign messages between them. The copy is
    /// taken from the state while that goes on.
    #[test]
    fn a_snapshot_and_its_tail_are_the_whole_fold(
        commands in proptest::collection::vec(any_command(), 0..40),
        foreign in 0_usize..5,
    ) {
        let mut whole = State::default();
        let mut events: Vec<Option<Fact>> = Vec::new();
        let mut copies = vec![whole.freeze()];
        for (number, command) in commands.iter().enumerate() {
            let facts = stored(decide_on(&whole, command));
            let skipped = (number % 5 == foreign).then_some(None);
            for event in facts.into_iter().map(Some).chain(skipped) {
                fold(&mut whole, event.as_ref());
                copies.push(whole.freeze());
                events.push(event);
            }
        }
        for (cut, frozen) in copies.into_iter().enumerate() {
            let mut thawed = thaw(frozen);
            prop_assert_eq!(thawed.sequence(), cut as u64);
            for event in &events[cut..] {
                if let Some(fact) = event {
                    prop_assert_eq!(thawed.admits(&fact.event), Ok(()), "cut at {}", cut);
                }
                fold(&mut thawed, event.as_ref());
            }
            prop_assert_eq!(&thawed, &whole, "cut at {}", cut);
            // And it decides like the whole: what was decided stays decided, what is taken stays taken.
            for command in &commands {
                prop_assert_eq!(decide_on(&thawed, command), decide_on(&whole, command), "cut at {}", cut);
            }
        }
    }
}

/// The next message of a ledger: an event of ours, or something foreign.
fn fold(state: &mut State, event: Option<&Fact>) {
    match event {
        Some(fact) => evolve(state, fact, now()),
        None => state.skip(state.sequence() + 1),
    }
}

// ── Keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

/// So long after [`now`].
fn after(duration: Duration) -> Timestamp {
    Timestamp::new(now().get() + duration)
}

/// Decides at `at`, and folds what is stored in.
fn decided_at(state: &mut State, command: &Command, at: Timestamp) -> Decision {
    let decision = decide(&Draft::new(state), command, at);
    for fact in stored(decision.clone()) {
        evolve(state, &fact, at);
    }
    decision
}

#[test]
fn a_key_holds_as_long_as_it_is_kept_and_then_acts_anew_under_new_ids() {
    assert!(KEYS_KEPT >= Duration::from_secs(24 * 3_600), "as is promised");
    let five_more = keyed(&product(1, Action::Adjust { delta: 5 }), 7);
    let mut state = given(&[register(1, 10)]);
    let first = stored(decided_at(&mut state, &five_more, now()));
    let at_last = after(KEYS_KEPT);
    assert!(matches!(decided_at(&mut state, &five_more, at_last), Decision::Settled(Outcome::Replayed { .. })));
    // Nothing else was written meanwhile, so it is remembered still; and yet it is too old.
    let over = after(KEYS_KEPT + Duration::from_millis(1));
    let second = stored(decided_at(&mut state, &five_more, over));
    assert_eq!(state.product(&id(1)).expect("registered").quantity, 20, "carried out as new");
    for fact in &second {
        assert!(first.iter().all(|earlier| earlier.event_id != fact.event_id), "{fact:?} has an id of then");
    }
    assert_eq!((first.len(), second.len()), (2, 2));
    // From now on the new answer holds, and the old one is forgotten.
    assert_eq!(state.remembered_commands(), 1);
    assert_eq!(
        decided_at(&mut state, &five_more, over),
        Decision::Settled(Outcome::Replayed { first_sequence: state.sequence() - 1 })
    );
}

#[test]
fn what_is_forgotten_is_forgotten_by_the_ledger_s_own_time() {
    let mut state = given(&[register(1, 10), keyed(&product(1, set_to(4)), 7), keyed(&product(1, set_to(4)), 8)]);
    let Command::Product(command) = product(1, set_to(4)) else { panic!("a product command") };
    assert!(state.remembers(&command.command_id));
    // An order, much later: whatever is stored tells the time.
    decided_at(&mut state, &order(1, &[(1, 1)]), after(KEYS_KEPT));
    assert!(state.remembers(&command.command_id));
    decided_at(&mut state, &order(2, &[(1, 1)]), after(KEYS_KEPT + Duration::from_millis(1)));
    assert_eq!(state.remembered_commands(), 0);
}

#[test]
fn a_command_without_a_key_takes_no_room() {
    let commands: Vec<_> = (0..50).map(|n| product(1, set_to(n))).collect();
    let state = given(&[&[register(1, 10)], &commands[..]].concat());
    assert_eq!(state.remembered_commands(), 0);
    assert!(given(&[register(1, 10), product(1, set_to(10))]).sequence() == 3, "and nothing is stored of a no-op");
}

#[test]
fn keys_of_an_older_ledger_hold() {
    let mut state = given(&[register(1, 10)]);
    let Command::Product(command) = keyed(&product(1, Action::Adjust { delta: -10 }), 7) else { panic!("a product's") };
    let unkeyed = Command::Product(ProductCommand { fingerprint: None, ..command.clone() });
    let mark = CommandMark { command_id: command.command_id, fingerprint: 7 };
    let first_sequence = state.sequence() + 1;
    for fact in stored(decide_on(&state, &unkeyed)) {
        state.evolve(state.sequence() + 1, now(), &fact.event, Some(mark));
    }
    assert_eq!(state.remembered_commands(), 1);
    assert_eq!(
        decide_on(&state, &Command::Product(command.clone())),
        Decision::Settled(Outcome::Replayed { first_sequence })
    );
    let other = Command::Product(ProductCommand { fingerprint: Some(8), ..command });
    assert_eq!(decide_on(&state, &other), Decision::Reject(Rejection::KeyReused));
}

/// A state that remembers so many commands of each caller.
fn remembering(of_each: &[(Uuid, usize)]) -> State {
    let mut state = given(&[register(1, 10)]);
    for (caller, commands) in of_each {
        for n in 0..*commands {
            let command_id = Uuid::from_u128(caller.as_u128() + 1 + n as u128);
            let (by, at_ms) = (*caller, millis(now()));
            state.remembered.note(RememberedCommand { command_id, fingerprint: 1, sequence: 1, at_ms, by });
        }
    }
    state
}

#[test]
fn no_key_is_forgotten_before_its_time_for_want_of_room() {
    let (greedy, other) = (Uuid::from_u128(1 << 100), Uuid::from_u128(2 << 100));
    let by = |user: Uuid, fingerprint: Option<u64>| {
        let command = ProductCommand::new(Uuid::from_u128(3), id(1), UpdatedBy::User(user), set_to(3));
        Command::Product(ProductCommand { fingerprint, ..command })
    };
    // One caller alone takes half of the room at most.
    let mut state = remembering(&[(greedy, MAX_REMEMBERED_OF_ONE as usize)]);
    let full = Decision::Reject(Rejection::TooManyKeys { of_caller: true });
    assert_eq!(decide_on(&state, &by(greedy, Some(7))), full);
    assert!(matches!(decide_on(&state, &by(greedy, None)), Decision::Store(..)), "a write without a key goes on");
    assert!(matches!(decide_on(&state, &by(other, Some(7))), Decision::Store(..)), "and so does whoever else");
    assert!(state.remembers(&Uuid::from_u128(greedy.as_u128() + 1)), "nothing was forgotten");
    let over = after(KEYS_KEPT + Duration::from_millis(1));
    assert!(matches!(decided_at(&mut state, &by(greedy, Some(7)), over), Decision::Store(..)), "until it is over");
    assert_eq!(state.remembered_commands(), 1);

    let most = MAX_REMEMBERED_COMMANDS - MAX_REMEMBERED_OF_ONE as usize;
    let third = Uuid::from_u128(3 << 100);
    let state = remembering(&[(greedy, most), (third, MAX_REMEMBERED_OF_ONE as usize)]);
    let full = Decision::Reject(Rejection::TooManyKeys { of_caller: false });
    assert_eq!(decide_on(&state, &by(other, Some(7))), full);
    assert!(matches!(decide_on(&state, &by(other, None)), Decision::Store(..)));
}

#[test]
fn room_is_counted_within_a_batch() {
    let caller = Uuid::from_u128(1 << 100);
    let state = remembering(&[(caller, MAX_REMEMBERED_OF_ONE as usize - 1)]);
    let mut draft = Draft::new(&state);
    let by = |n: u128| {
        let command = ProductCommand::new(Uuid::from_u128(n), id(1), UpdatedBy::User(caller), set_to(n as u32));
        Command::Product(ProductCommand { fingerprint: Some(7), ..command })
    };
    let last = stored(decide(&draft, &by(3), now()));
    draft.apply(&last, now());
    assert_eq!(decide(&draft, &by(4), now()), Decision::Reject(Rejection::TooManyKeys { of_caller: true }));
}

#[test]
fn an_order_under_the_id_of_a_command_has_ids_of_its_own() {
    let state = given(&[register(1, 10)]);
    let ids = |command: &Command| {
        let facts = stored(decide_on(&state, command));
        facts.into_iter().map(|fact| fact.event_id).collect::<HashSet<_>>()
    };
    let Command::Product(command) = product(1, set_to(0)) else { panic!("a product command") };
    let count = counted(1, 2);
    let correction = Action::CorrectCount { count, stock_at_count: 12 };
    let causes = [
        Command::Product(command.clone()),
        keyed(&Command::Product(command.clone()), 7),
        Command::Product(ProductCommand { action: correction, ..command.clone() }),
        Command::Order(Order {
            order_id: OrderId(command.command_id),
            lines: vec![OrderLine { product_id: id(1), quantity: 10 }],
        }),
    ];
    let all: Vec<_> = causes.iter().flat_map(ids).collect();
    let distinct: HashSet<_> = all.iter().collect();
    assert_eq!((all.len(), distinct.len()), (2 + 3 + 3 + 2, all.len()));
}

proptest! {
    /// However often and between whatever a command comes under its key, it acts once, and is answered as at first.
    #[test]
    fn a_keyed_command_any_number_of_times_acts_once(
        others in proptest::collection::vec(any_command(), 0..40),
        again in proptest::collection::vec(any::<bool>(), 40),
        action in prop_oneof![
            (0_u32..50).prop_map(set_to),
            (-20_i64..20).prop_map(|delta| Action::Adjust { delta }),
        ],
    ) {
        let command = Command::Product(ProductCommand {
            fingerprint: Some(7),
            ..ProductCommand::new(Uuid::from_u128(u128::MAX), id(1), UpdatedBy::System, action)
        });
        let mut state = State::default();
        let first = decided_at(&mut state, &command, now());
        prop_assert!(matches!(first, Decision::Refuse(..)), "{:?}", first);
        let command = Command::Product(ProductCommand {
            command_id: Uuid::from_u128(u128::MAX - 1),
            ..match command { Command::Product(command) => command, Command::Order(_) => unreachable!() }
        });
        decided_at(&mut state, &register(1, 10), now());
        let first_sequence = state.sequence() + 1;
        let effect = stored(decided_at(&mut state, &command, now())).len();
        let mut without = state.clone();
        for (other, again) in others.iter().zip(again) {
            decided_at(&mut state, other, now());
            decided_at(&mut without, other, now());
            if again {
                prop_assert_eq!(
                    decided_at(&mut state, &command, now()),
                    Decision::Settled(Outcome::Replayed { first_sequence })
                );
            }
        }
        prop_assert!(effect >= 1);
        prop_assert_eq!(state, without);
    }
}
