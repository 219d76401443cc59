//! The files that `lomash import` and `lomash orders replay` read: the catalogue, NDJSON, and the retail CSV.
//!
//! The figures of the real retail file are checked when it is there: at `LOMASH_RETAIL_CSV`, or in `../shared/data`
//! beside the workspace.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use lomash::catalogue::{self, NAMESPACE, Row, RowError, Said, product_id};
use lomash::retail::{self, NoOrder, Skipped};
use lomash_contract::codec::{decode, encode};
use lomash_contract::{ContentType, Envelope, OrderCreated, OrderId, Sku};
use tempfile::TempDir;
use uuid::Uuid;

fn sku(text: &str) -> Sku {
    text.parse().unwrap()
}

fn row(line: u64, unit: &str, name: &str, category: Option<&str>, quantity: u32, threshold: Option<u32>) -> Row {
    Row { line, sku: sku(unit), name: name.into(), category: category.map(Into::into), quantity, threshold }
}

fn rows(csv: impl AsRef<[u8]>) -> Vec<Result<Row, RowError>> {
    catalogue::read(csv.as_ref()).unwrap().collect()
}

/// The errors of a catalogue, as they are shown.
fn errors(csv: impl AsRef<[u8]>) -> Vec<String> {
    rows(csv).into_iter().filter_map(Result::err).map(|error| error.to_string()).collect()
}

// The catalogue.

#[test]
fn rows_are_read_as_they_stand() {
    let csv = "sku,name,category,quantity,threshold\n\
               KIT-1,\"Cabinet, \"\"Ash\"\"\",kitchen/cabinets,12,5\n\
               KIT-2, Tap ,,0,\n\
               KIT-3,Dübel 7\" 🪵,kitchen,1000000000,0\n";
    let expected = vec![
        Ok(row(2, "KIT-1", "Cabinet, \"Ash\"", Some("kitchen/cabinets"), 12, Some(5))),
        Ok(row(3, "KIT-2", "Tap", None, 0, None)),
        Ok(row(4, "KIT-3", "Dübel 7\" 🪵", Some("kitchen"), 1_000_000_000, Some(0))),
    ];
    assert_eq!(rows(csv), expected);
}

#[test]
fn columns_come_in_any_order_with_others_between_them() {
    let expected = vec![Ok(row(2, "KIT-1", "Tap", Some("kitchen/taps"), 12, Some(5)))];
    assert_eq!(rows("price,threshold,quantity,note,category,name,sku\n9.5,5,12,,kitchen/taps,Tap,KIT-1\n"), expected);
    assert_eq!(rows(" SKU ,Name,CATEGORY,Quantity,Threshold\nKIT-1,Tap,kitchen/taps,12,5"), expected);
    assert_eq!(rows("sku,name,quantity\nKIT-1,Tap,12\n"), vec![Ok(row(2, "KIT-1", "Tap", None, 12, None))]);
}

#[test]
fn a_byte_order_mark_and_foreign_line_ends_are_no_matter() {
    let expected = vec![Ok(row(2, "KIT-1", "Tap", None, 12, None)), Ok(row(3, "KIT-2", "Sink", None, 1, None))];
    for csv in [
        "\u{feff}sku,name,quantity\nKIT-1,Tap,12\nKIT-2,Sink,1\n",
        "\u{feff}\"sku\",name,quantity\r\nKIT-1,Tap,12\r\nKIT-2,Sink,1\r\n",
        "sku,name,quantity\r\nKIT-1,Tap,12\r\nKIT-2,Sink,1",
    ] {
        assert_eq!(rows(csv), expected, "{csv:?}");
    }
}

#[test]
fn a_file_without_the_columns_is_no_catalogue() {
    let cases = [
        ("", "the file is empty; its first line must name the columns: sku,name,category,quantity,threshold,active"),
        (
            "\n\n",
            "the file is empty; its first line must name the columns: sku,name,category,quantity,threshold,active",
        ),
        (
            "sku,quantity\nKIT-1,3\n",
            "the header has no column `name`; its first line is `sku,quantity`, but must name the columns, \
             separated by commas: sku,name,category,quantity,threshold,active",
        ),
        (
            "sku;name;quantity\nKIT-1;Tap;3\n",
            "the cells of the file are separated by semicolons; save it with commas between them: \
             sku,name,category,quantity,threshold,active",
        ),
        (
            "sku,name,quantity,Quantity\nKIT-1,Tap,3,4\n",
            "the header names the column `quantity` twice; rename or remove one of them",
        ),
    ];
    for (csv, expected) in cases {
        let error = catalogue::read(csv.as_bytes()).err().expect(csv);
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_bad_row_says_all_that_is_wrong_and_the_next_goes_through() {
    let stock_rule = "is not a whole number from 0 to 1000000000";
    let separated = "write it without a separator between its digits";
    let long = "x".repeat(201);
    let shown = "x".repeat(60);
    let cases = [
        (",Tap,,1,".to_owned(), "sku is empty".to_owned()),
        (format!("{},Tap,,1,", "x".repeat(65)), format!("sku `{shown}…` has 65 characters; at most 64 are allowed")),
        ("KIT-1,,,1,".into(), "name is empty".into()),
        (format!("KIT-1,{long},,1,"), format!("name `{shown}…` has 201 characters; at most 200 are allowed")),
        (format!("KIT-1,Tap,{long},1,"), format!("category `{shown}…` has 201 characters; at most 200 are allowed")),
        (
            "KIT-1,A\ttap,,1,".into(),
            "name `A\u{fffd}tap` contains U+0009, a control character, at position 2".into(),
        ),
        (
            "KIT\u{200b}-1,Tap,\u{202e}x,1,".into(),
            "sku `KIT\u{fffd}-1` contains U+200B, an invisible character, at position 4; category `\u{fffd}x` contains \
             U+202E, which changes the direction of the text around it, at position 1"
                .into(),
        ),
        ("KIT-1,Tap,,-3,".into(), format!("quantity `-3` {stock_rule}")),
        ("KIT-1,Tap,,+3,".into(), format!("quantity `+3` {stock_rule}")),
        ("KIT-1,Tap,,3.0,".into(), format!("quantity `3.0` {stock_rule}: {separated}")),
        ("KIT-1,Tap,,\"1,800\",".into(), format!("quantity `1,800` {stock_rule}: {separated}")),
        ("KIT-1,Tap,,,".into(), "quantity is empty".into()),
        ("KIT-1,Tap,,1000000001,".into(), format!("quantity `1000000001` {stock_rule}")),
        ("KIT-1,Tap,,99999999999999999999,".into(), format!("quantity `99999999999999999999` {stock_rule}")),
        ("KIT-1,Tap,,1,few".into(), format!("threshold `few` {stock_rule}")),
        (
            "KIT-1,Tap".into(),
            "the row has 2 cells, the header has 5: there is no `category`, `quantity`, `threshold`".into(),
        ),
        (
            "KIT-1,Tap,,1,8,00".into(),
            "the row has 6 cells, the header has 5; is there a comma in a value that is not in quotes?".into(),
        ),
        (
            " ,,,x,y".into(),
            format!("sku is empty; name is empty; quantity `x` {stock_rule}; threshold `y` {stock_rule}"),
        ),
    ];
    for (bad, problem) in cases {
        let csv = format!("sku,name,category,quantity,threshold\n{bad}\nKIT-9,Sink,,2,\n");
        let expected = vec![Err(RowError { line: 2, problem }), Ok(row(3, "KIT-9", "Sink", None, 2, None))];
        assert_eq!(rows(csv), expected, "{bad}");
    }
}

#[test]
fn a_row_says_what_its_file_names_and_no_more() {
    let said = |csv: &str| -> Vec<Result<Said, RowError>> { catalogue::said(csv.as_bytes()).unwrap().collect() };
    let one = |csv: &str| said(csv).remove(0).unwrap();
    let bare = one("sku,active\nKIT-1,no\n");
    assert_eq!((bare.details.active, bare.quantity), (Some(false), None));
    assert_eq!((bare.details.name, bare.details.category, bare.details.low_stock_threshold), (None, None, None));
    let cleared = one("sku,name,category,threshold,active\nKIT-1,Tap,,,TRUE\n");
    assert_eq!(cleared.details.category, Some(None));
    assert_eq!(cleared.details.low_stock_threshold, Some(None));
    assert_eq!((cleared.details.name.as_deref(), cleared.details.active), (Some("Tap"), Some(true)));
    let problems: Vec<String> =
        said("sku,name,active\nA,,true\nB,b,\nC,c,maybe\n").into_iter().map(|row| row.unwrap_err().problem).collect();
    assert_eq!(problems, ["name is empty", "active is empty", "active `maybe` is neither `true` nor `false`"]);
    let composed = one("sku,name\nKu\u{308}-1,Ku\u{308}che\n");
    assert_eq!((composed.sku, composed.details.name.as_deref()), (sku("Kü-1"), Some("Küche")));
    for csv in ["sku\nKIT-1\n", "name,active\nTap,true\n", "sku,price\nKIT-1,3\n"] {
        assert!(catalogue::said(csv.as_bytes()).is_err(), "{csv}");
    }
}

#[test]
fn what_is_not_utf_8_spoils_its_row_alone() {
    let csv = b"sku,name,quantity,note\nKIT-1,D\xfcbel,1,\nKIT-2,Tap,2,\nKIT-3,Sink,3,f\xfcr\n\xff\xfe,Rail,4,\nKIT-5,Bed,5,\n";
    let read = rows(csv);
    let problem = |shown: &str| format!("{shown} is not UTF-8; save the file as UTF-8");
    assert_eq!(
        read,
        vec![
            Err(RowError { line: 2, problem: problem("name `D\u{fffd}bel`") }),
            Ok(row(3, "KIT-2", "Tap", None, 2, None)),
            // A column that nobody reads may hold anything.
            Ok(row(4, "KIT-3", "Sink", None, 3, None)),
            Err(RowError { line: 5, problem: problem("sku `\u{fffd}\u{fffd}`") }),
            Ok(row(6, "KIT-5", "Bed", None, 5, None)),
        ]
    );
}

#[test]
fn a_repeated_sku_names_its_first_line() {
    let csv =
        "sku,name,quantity\nKIT-1,Tap,x\nKIT-1,Tap,1\nKIT-2,Sink,1\nkit-1,Other tap,1\n KIT-1 ,Tap,2\nKIT-1,Tap,3\n";
    let repeated = "sku `KIT-1` is on line 3 already; a catalogue lists a product once";
    let expected = [
        "line 2: quantity `x` is not a whole number from 0 to 1000000000".to_owned(),
        format!("line 6: {repeated}"),
        format!("line 7: {repeated}"),
    ];
    assert_eq!(errors(csv), expected);
    assert_eq!(rows(csv).into_iter().flatten().map(|row| row.line).collect::<Vec<_>>(), [3, 4, 5]);
}

/// Blank lines, lines within quotes and any line end: what is told is what an editor shows.
#[test]
fn lines_are_those_of_an_editor() {
    for end in ["\n", "\r\n", "\r"] {
        let lines = [
            "sku,name,quantity,note", // 1
            "",
            "KIT-1,Tap,1,", // 3
            "",
            "",
            "KIT-2,Sink,1,\"mind", // 6
            "",
            "the edge\"",
            "KIT-3,Rail,1,", // 9
            ",,,",
            "   ",
            "KIT-4,Bed,x,", // 12
            "KIT-5,\"Bed",
            "frame\",1,",
            "KIT-6,Lamp,1,", // 15
        ];
        let csv = lines.join(end);
        let read = rows(&csv);
        let good: Vec<_> = read.iter().flatten().map(|row| (row.line, row.sku.to_string())).collect();
        let expected = [(3, "KIT-1"), (6, "KIT-2"), (9, "KIT-3"), (15, "KIT-6")];
        assert_eq!(good, expected.map(|(line, sku)| (line, sku.to_owned())), "{end:?}");
        let problems = errors(&csv);
        assert!(problems[0].starts_with("line 12: quantity `x`"), "{problems:?}");
        assert!(problems[1].starts_with("line 13: name `Bed"), "{problems:?}");
        assert!(problems[1].ends_with("runs over 2 lines; is a closing quote missing?"), "{problems:?}");
        assert_eq!(problems.len(), 2);
    }
    // Blank lines in front of the header, and lines beyond the reader's buffer.
    let mut csv = "\n\nsku,name,quantity\n".to_owned();
    for line in 4..4_000 {
        csv.push_str(&if line % 7 == 0 { "\n".to_owned() } else { format!("KIT-{line},Tap no {line},{line}\n") });
    }
    let read = rows(&csv);
    assert_eq!(read.len(), 3_425);
    for row in read {
        let row = row.unwrap();
        assert_eq!(u64::from(row.quantity), row.line);
    }
}

/// A reader that never ends and counts what was taken from it.
struct Endless<'a> {
    begin: Cursor<&'static [u8]>,
    taken: &'a mut u64,
}

impl Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut read = self.begin.read(buffer)?;
        if read == 0 {
            buffer.fill(b'x');
            read = buffer.len();
        }
        *self.taken += read as u64;
        Ok(read)
    }
}

#[test]
fn a_row_without_an_end_is_not_held_in_memory() {
    let mut taken = 0;
    let begin = Cursor::new(&b"sku,name,quantity\nKIT-1,Tap,1\nKIT-2,\"Sink"[..]);
    let read: Vec<_> = catalogue::read(Endless { begin, taken: &mut taken }).unwrap().collect();
    assert_eq!(read.len(), 2, "one row, one error, and then the end");
    assert!(read[0].is_ok());
    let error = read[1].as_ref().unwrap_err().to_string();
    assert!(error.starts_with("line 3: "), "{error}");
    assert!(error.contains("is a closing quote missing?; nothing after it was read"), "{error}");
    assert!(taken < 2 * catalogue::MAX_ROW_BYTES, "took {taken} bytes");
}

#[test]
fn a_product_s_id_follows_from_its_sku_for_ever() {
    assert_eq!(NAMESPACE, Uuid::new_v5(&Uuid::NAMESPACE_OID, b"lomash-inventory"));
    assert_eq!(product_id(&sku("KIT-CAB-600-OAK")).0, Uuid::new_v5(&NAMESPACE, b"product:KIT-CAB-600-OAK"));
    assert_eq!(product_id(&sku("KIT-CAB-600-OAK")).to_string(), "4cc31838-422a-5a4b-b97d-3f5fe96b750f");
    assert_ne!(product_id(&sku("kit-cab-600-oak")), product_id(&sku("KIT-CAB-600-OAK")));
}

#[test]
fn the_demo_catalogue_is_sound() {
    let file = std::fs::File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/catalogue.csv")).unwrap();
    let rows: Vec<Row> = catalogue::read(file).unwrap().collect::<Result<_, _>>().unwrap();
    assert!((40..=60).contains(&rows.len()));
    assert!(rows.iter().filter(|row| row.quantity == 0).count() >= 3, "some are sold out");
    assert!(rows.iter().filter(|row| (1..=3).contains(&row.quantity)).count() >= 5, "several are low");
    assert!(rows.iter().filter(|row| row.threshold.is_some()).count() >= 5);
    for kind in ["KIT-", "BED-"] {
        assert!(rows.iter().filter(|row| row.sku.as_str().starts_with(kind)).count() >= 15);
    }
}

// Orders: retail CSV.

/// A file of this content in a folder of its own.
fn file(content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("orders");
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

const HEADER: &str = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,CustomerID\n";

fn orders(path: &Path) -> Vec<Envelope<OrderCreated>> {
    retail::open(path)
        .unwrap()
        .filter(|order| !matches!(order, Err(NoOrder::Unfit { .. })))
        .collect::<Result<_, _>>()
        .unwrap()
}

/// An order's lines as code and quantity.
fn lines(order: &Envelope<OrderCreated>) -> Vec<(String, u32)> {
    let items = order.payload.items.as_slice();
    items.iter().map(|item| (item.sku.as_ref().unwrap().to_string(), item.quantity.get())).collect()
}

fn order_id(invoice: &str) -> OrderId {
    OrderId(Uuid::new_v5(&NAMESPACE, format!("order:{invoice}").as_bytes()))
}

const SHOP: &str = "1001,A1,Lamp,2,2009-12-01 07:45:00,1.5,77\n\
                    1002,B2,\"Tap, small\",1,2009-12-01 07:46:00,1.5,\n\
                    1001,B2,Tap,3,2009-12-01 07:46:00,1.5,77\n\
                    C1003,A1,Lamp,-1,2009-12-01 07:47:00,1.5,77\n\
                    C1004,A1,Lamp,1,2009-12-01 07:47:00,1.5,77\n\
                    1005,A1,damaged,-4,2009-12-01 07:48:00,0,\n\
                    1005,A1,nothing,0,2009-12-01 07:48:00,0,\n\
                    1006,A1,Lamp,1000001,2009-12-01 07:49:00,0,\n\
                    1007,POST,POSTAGE,1,2009-12-01 07:50:00,18,78\n\
                    1001,A1,Lamp,1,2009-12-01 07:45:00,1.5,77\n\
                    1008,,No code,1,2009-12-01 07:51:00,1.5,\n\
                    1008,A1,Lamp,few,2009-12-01 07:51:00,1.5,\n\
                    1008,A1,Lamp,1,yesterday,1.5,\n\
                    ,A1,Lamp,1,2009-12-01 07:51:00,1.5,\n\
                    1009,A1\n\
                    1010,a1 ,Lamp in small,1,2010-12-09 20:01:00,1.5,78\n";

#[test]
fn an_invoice_is_one_order_wherever_its_lines_stand() {
    let (_folder, path) = file(format!("{HEADER}{SHOP}"));
    let read = orders(&path);
    let expected: [(&str, &[(&str, u32)]); 4] = [
        ("1001", &[("A1", 2), ("B2", 3), ("A1", 1)]),
        ("1002", &[("B2", 1)]),
        ("1007", &[("POST", 1)]),
        ("1010", &[("a1", 1)]),
    ];
    assert_eq!(read.len(), expected.len());
    for (order, (invoice, expected)) in read.iter().zip(expected) {
        assert_eq!(order.payload.order_id, order_id(invoice));
        assert_eq!(order.event_id.0, Uuid::new_v5(&order.payload.order_id.0, b"order-created"));
        let expected: Vec<_> = expected.iter().map(|(code, quantity)| ((*code).to_owned(), *quantity)).collect();
        assert_eq!(lines(order), expected);
        for item in order.payload.items.as_slice() {
            assert_eq!(item.product_id, product_id(item.sku.as_ref().unwrap()));
        }
        let bytes = encode(ContentType::Json, order);
        assert_eq!(decode::<OrderCreated>(ContentType::Json, &bytes).as_ref(), Ok(order));
    }
    assert_eq!(read[0].timestamp.to_string(), "2009-12-01T07:45:00.000Z");
    assert_eq!(read[3].timestamp.to_string(), "2010-12-09T20:01:00.000Z");
    assert_eq!(read[0].payload.customer_id.unwrap().0, Uuid::new_v5(&NAMESPACE, b"customer:77"));
    assert_eq!(read[1].payload.customer_id, None);
    assert_eq!(read[2].payload.customer_id, read[3].payload.customer_id);
}

#[test]
fn skipped_lines_are_counted_by_reason() {
    let (_folder, path) = file(format!("{HEADER}{SHOP}"));
    let mut orders = retail::open(&path).unwrap();
    let expected = Skipped { cancelled: 2, not_positive: 2, too_large: 1, unreadable: 5, first_unreadable: Some(12) };
    assert_eq!(orders.skipped(), expected);
    assert_eq!(orders.skipped().total(), 10);
    let in_words = [
        ("cancelled invoice", 2),
        ("quantity not positive", 2),
        ("quantity above 1000000", 1),
        ("unreadable, first on line 12", 5),
    ];
    assert!(orders.skipped().into_iter().eq(in_words.map(|(reason, count)| (reason.to_owned(), count))));
    assert_eq!(Skipped::default().into_iter().next(), None);
    assert_eq!(orders.total(), Some(7));
    let unfit: Vec<String> = orders.by_ref().filter_map(|order| Some(order.err()?.to_string())).collect();
    let named = [
        "invoice 1006 cannot be an order: line 9 asks for 1000001 units, and a line has at most 1000000",
        "invoice 1008 cannot be an order: line 12 has no stock code",
        "invoice 1009 cannot be an order: line 16 has no quantity",
    ];
    assert_eq!(unfit, named);
    assert_eq!(orders.skipped(), expected);
}

/// An invoice of which one line has no sense is left out as a whole, wherever that line stands; the others stay.
#[test]
fn an_invoice_with_a_bad_line_is_unfit_as_a_whole() {
    for (bad, problem) in [
        ("2001,A1,Lamp,few,2009-12-01 07:45:00,1,", "has the quantity `few`, which is no whole number"),
        ("2001,A1,Lamp,2.5,2009-12-01 07:45:00,1,", "has the quantity `2.5`, which is no whole number"),
        ("2001,A1,Lamp,,2009-12-01 07:45:00,1,", "has no quantity"),
        (
            "2001,A1,Lamp,99999999999,2009-12-01 07:45:00,1,",
            "asks for 99999999999 units, and a line has at most 1000000",
        ),
        ("2001,,Lamp,1,2009-12-01 07:45:00,1,", "has no stock code"),
        (
            "2001,A1,Lamp, 19 inch,3,2009-12-01 07:45:00,1,77",
            "is not what it seems: the row has 8 cells, the header has 7; is there a comma in a value that is not in quotes?",
        ),
    ] {
        let good = "2001,B2,Tap,1,2009-12-01 07:45:00,1,\n";
        let next = "2002,B2,Tap,2,2009-12-01 07:46:00,1,\n2003,C3,Rack,3,2009-12-01 07:46:00,1,\n";
        for (content, line) in
            [(format!("{HEADER}{bad}\n{good}{next}"), 2), (format!("{HEADER}{good}{next}{bad}\n"), 5)]
        {
            let (_folder, path) = file(&content);
            let read: Vec<_> = retail::open(&path).unwrap().collect();
            let unfit: Vec<String> = read.iter().filter_map(|order| Some(order.as_ref().err()?.to_string())).collect();
            assert_eq!(unfit, [format!("invoice 2001 cannot be an order: line {line} {problem}")], "{content}");
            let fit: Vec<_> = read.iter().flatten().map(|order| order.payload.order_id).collect();
            assert_eq!(fit, [order_id("2002"), order_id("2003")], "{content}");
            // What it would have taken is wanted by nobody.
            let catalogue = retail::catalogue_of(&path, |ordered| u32::try_from(ordered).unwrap()).unwrap();
            let tap = catalogue.products.iter().find(|product| product.row.sku.as_str() == "B2").unwrap();
            assert_eq!((tap.ordered, tap.orders), (2, 1), "{content}");
            assert_eq!(catalogue.unfit.len(), 1, "{content}");
        }
    }
    let bad_date = format!("{HEADER}2001,A1,Lamp,1,01/12/2009 07:45,1,\n2002,A1,Lamp,1,2009-12-01 07:45:00,1,\n");
    let (_folder, path) = file(bad_date);
    let read: Vec<_> = retail::open(&path).unwrap().collect();
    assert_eq!(read.len(), 2);
    assert_eq!(
        read[0].as_ref().unwrap_err().to_string(),
        "invoice 2001 cannot be an order: line 2 has the date `01/12/2009 07:45`, and one looks like 2009-12-01 07:45:00"
    );
    assert!(read[1].is_ok());
}

#[test]
fn packed_or_plain_in_one_member_or_several_is_the_same() {
    let text = format!("{HEADER}{SHOP}");
    let expected = orders(&file(&text).1.clone()).len();
    let (_plain, plain) = file(&text);
    let (_packed, packed) = file(gzip(text.as_bytes()));
    let (first, second) = text.as_bytes().split_at(text.len() / 2);
    let (_members, members) = file([gzip(first), gzip(second)].concat());
    let (_marked, marked) = file(format!("\u{feff}{}", text.replace('\n', "\r\n")));
    for path in [&packed, &members, &marked] {
        assert_eq!(orders(path), orders(&plain));
    }
    assert_eq!(expected, 4);
}

#[test]
fn an_order_of_too_many_lines_is_added_up_first() {
    let line = |invoice: &str, code: &str, quantity: u32| {
        format!("{invoice},{code},Thing,{quantity},2009-12-01 07:45:00,1,\n")
    };
    let mut csv = HEADER.to_owned();
    for n in 0..1_000 {
        csv += &line("full", &format!("P{}", n % 10), 1);
    }
    for n in 0..1_001 {
        csv += &line("over", &format!("P{}", n % 10), 1);
    }
    for n in 0..1_001 {
        csv += &line("wide", &format!("P{n}"), 1);
    }
    for n in 0..1_001 {
        csv += &line("heavy", &format!("P{}", n % 10), 400_000);
    }
    let (_folder, path) = file(csv);
    let read: Vec<_> = retail::open(&path).unwrap().collect();
    assert_eq!(read.len(), 4);
    assert_eq!(lines(read[0].as_ref().unwrap()).len(), 1_000, "an order that fits stays as it is");
    let over: Vec<_> = (0..10).map(|n| (format!("P{n}"), if n == 0 { 101 } else { 100 })).collect();
    assert_eq!(lines(read[1].as_ref().unwrap()), over);
    assert_eq!(
        read[2].as_ref().unwrap_err().to_string(),
        "invoice wide has 1001 lines even with those of one product added up; an order has at most 1000"
    );
    let heavy = lines(read[3].as_ref().unwrap());
    assert!(heavy.iter().all(|(_, quantity)| *quantity <= 1_000_000));
    assert_eq!(heavy.iter().map(|(_, quantity)| u64::from(*quantity)).sum::<u64>(), 1_001 * 400_000);
}

#[test]
fn products_are_named_by_their_first_description_and_stocked_as_asked() {
    let more = "1011,Z9,,5,2009-12-01 07:45:00,1,\n\
                1012,Y8,  ,5,2009-12-01 07:45:00,1,\n\
                1012,Y8,Tray\t\u{7}round,5,2009-12-01 07:45:00,1,\n\
                1012,Y8,Tray,5,2009-12-01 07:45:00,1,\n";
    let (_folder, path) = file(format!("{HEADER}{SHOP}{more}1013,X7,{},1,2009-12-01 07:45:00,1,\n", "é".repeat(300)));
    let products = retail::catalogue_of(&path, |ordered| u32::try_from(ordered).unwrap() / 2).unwrap().products;
    let read: Vec<_> = products
        .iter()
        .map(|product| {
            let row = &product.row;
            (row.sku.as_str(), &*row.name, row.line, row.quantity, product.ordered, product.orders)
        })
        .collect();
    let cut = "é".repeat(200);
    let expected = [
        ("A1", "Lamp", 2, 1, 3, 1),
        ("B2", "Tap, small", 3, 2, 4, 2),
        ("POST", "POSTAGE", 10, 0, 1, 1),
        ("a1", "Lamp in small", 17, 0, 1, 1),
        ("Z9", "Z9", 18, 2, 5, 1),
        ("Y8", "Tray  round", 19, 7, 15, 1),
        ("X7", &*cut, 22, 0, 1, 1),
    ];
    assert_eq!(read, expected);
    assert!(products.iter().all(|product| product.row.category.is_none() && product.row.threshold.is_none()));

    let ample = retail::catalogue_of(&path, |_| u32::MAX).unwrap().products;
    assert_eq!(ample.len(), expected.len());
    assert!(ample.iter().all(|product| product.row.quantity == 1_000_000_000), "no more than a product can have");
}

// Orders: NDJSON.

#[test]
fn envelopes_are_replayed_as_they_are() {
    let (_folder, retail) = file(format!("{HEADER}{SHOP}"));
    let expected = orders(&retail);
    let text: Vec<String> =
        expected.iter().map(|order| String::from_utf8(encode(ContentType::Json, order)).unwrap()).collect();
    for content in [text.join("\n"), format!("\u{feff}\n  \r\n{}\r\n\r\n", text.join("\r\n\n"))] {
        for content in [content.clone().into_bytes(), gzip(content.as_bytes())] {
            let (_folder, path) = file(content);
            assert_eq!(orders(&path), expected);
            let opened = retail::open(&path).unwrap();
            assert_eq!((opened.total(), opened.skipped()), (None, Skipped::default()));
        }
    }
    let (_folder, path) = file(text.join("\n"));
    let error = retail::catalogue_of(&path, |_| 0).unwrap_err();
    assert_eq!(error.root_cause().to_string(), "it holds order envelopes, which name no products; give the retail CSV");
}

#[test]
fn a_bad_line_is_named_and_the_next_goes_through() {
    let (_folder, retail) = file(format!("{HEADER}{SHOP}"));
    let good = String::from_utf8(encode(ContentType::Json, &orders(&retail)[0])).unwrap();
    let long = format!("{{\"x\":\"{}\"}}", "x".repeat(3 << 20));
    let exact = format!("{good}{}", " ".repeat((1 << 20) - good.len() - 1));
    let (_folder, path) = file([&*good, "", "{\"eventId\":7}", "oops", &long, &exact, &good].join("\n"));
    let read: Vec<_> = retail::open(&path).unwrap().collect();
    let shown: Vec<String> =
        read.iter().map(|order| order.as_ref().map_or_else(|error| format!("{error:#}"), |_| "order".into())).collect();
    let expected = [
        "order",
        "line 3 is no order: not a valid order-created as application/json: eventId: invalid type: integer `7`, \
         expected an event id as a UUID at line 1 column 12",
        "line 4 is no order: not a valid order-created as application/json: message: expected value at line 1 column 1",
        "line 5 has more than 1048576 bytes; write one order per line",
        "order",
        "order",
    ];
    assert_eq!(shown, expected);
}

#[test]
fn what_is_no_orders_file_is_refused_with_its_name() {
    let truncated = gzip(format!("{HEADER}{SHOP}").as_bytes());
    let truncated = truncated[..truncated.len() - 20].to_vec();
    let cases: [(Vec<u8>, &str); 5] = [
        (b"".into(), "the file is empty"),
        (b" \n\n ".into(), "the file is empty"),
        (
            b"sku,name,quantity\nKIT-1,Tap,3\n".into(),
            "it is neither order envelopes (NDJSON) nor a retail CSV: its header `sku,name,quantity` has no column \
             Invoice; Invoice, StockCode, Quantity and InvoiceDate are needed",
        ),
        (truncated, ""),
        (b"\x1f\x8bnot gzip".into(), ""),
    ];
    for (content, expected) in cases {
        let (_folder, path) = file(content);
        let error = format!("{:#}", retail::open(&path).unwrap_err());
        assert!(error.starts_with(&format!("cannot read orders from {}: ", path.display())), "{error}");
        assert!(error.ends_with(expected), "{error}");
    }
    let error = format!("{:#}", retail::open("/nonexistent/orders.csv").unwrap_err());
    assert!(error.starts_with("cannot read orders from /nonexistent/orders.csv: "), "{error}");
}

/// A packed NDJSON file that ends too early: the orders before the damage come out, then one error, then the end.
#[test]
fn a_damaged_file_ends_with_an_error() {
    let (_folder, retail) = file(format!("{HEADER}{SHOP}"));
    let text = String::from_utf8(encode(ContentType::Json, &orders(&retail)[0])).unwrap() + "\n";
    let packed = gzip(text.repeat(1_000).as_bytes());
    let (_folder, path) = file(&packed[..packed.len() - 4]);
    let read: Vec<_> = retail::open(&path).unwrap().collect();
    let (last, before) = read.split_last().unwrap();
    assert!(before.iter().all(Result::is_ok));
    assert!(last.as_ref().unwrap_err().to_string().ends_with("could not be read; nothing after it was"));
}

// The real file.

/// The year of real orders, if it is there.
fn real_file() -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/online-retail-2009-2010.csv.gz");
    let path = std::env::var_os("LOMASH_RETAIL_CSV").map_or_else(|| PathBuf::from(beside), PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: no file at {}; set LOMASH_RETAIL_CSV to the retail data", path.display());
    None
}

/// Against a plain reading of the file that shares nothing with ours but the CSV crate.
#[test]
fn a_year_of_real_orders_has_its_known_figures() {
    let Some(path) = real_file() else { return };
    let begun = Instant::now();
    let opened = retail::open(&path).unwrap();
    assert_eq!(opened.total(), Some(22_103));
    assert_eq!(
        opened.skipped(),
        Skipped { cancelled: 10_206, not_positive: 2_121, too_large: 0, unreadable: 0, first_unreadable: None }
    );
    let orders: Vec<_> = opened.collect::<Result<_, _>>().unwrap();
    println!("{} orders in {:?}", orders.len(), begun.elapsed());

    // The oracle: units of each code by invoice, codes as the file writes them.
    let mut packed = std::fs::File::open(&path).unwrap();
    let mut csv = csv::Reader::from_reader(MultiGzDecoder::new(&mut packed));
    let mut expected: HashMap<String, BTreeMap<String, u64>> = HashMap::new();
    let (mut line_count, mut codes) = (0, BTreeSet::new());
    for record in csv.records() {
        let record = record.unwrap();
        let quantity: i64 = record[3].parse().unwrap();
        if !record[0].starts_with('C') && quantity > 0 {
            let lines = expected.entry(record[0].to_owned()).or_default();
            *lines.entry(record[1].to_owned()).or_default() += quantity.unsigned_abs();
            codes.insert(record[1].to_owned());
            line_count += 1;
        }
    }
    assert_eq!(codes.len(), 4_317, "codes as they are written");
    // One of them is another with a blank behind it, which no sku can have: they are one product.
    assert!(codes.remove("47503J ") && codes.contains("47503J"));
    assert_eq!(expected.values().map(BTreeMap::len).max(), Some(674));

    assert_eq!(orders.len(), 22_103);
    assert_eq!(orders.iter().map(|order| order.payload.items.as_slice().len()).sum::<usize>(), line_count);
    assert_eq!(line_count, 513_134);
    let by_id: HashMap<OrderId, _> = orders.iter().map(|order| (order.payload.order_id, order)).collect();
    assert_eq!(by_id.len(), orders.len(), "ids are distinct");
    let events: BTreeSet<_> = orders.iter().map(|order| order.event_id).collect();
    assert_eq!(events.len(), orders.len());
    for (invoice, wanted) in &expected {
        let mut ours: BTreeMap<String, u64> = BTreeMap::new();
        for (code, quantity) in lines(by_id[&order_id(invoice)]) {
            *ours.entry(code).or_default() += u64::from(quantity);
        }
        let mut trimmed: BTreeMap<String, u64> = BTreeMap::new();
        for (code, quantity) in wanted {
            *trimmed.entry(code.trim().to_owned()).or_default() += quantity;
        }
        assert_eq!(ours, trimmed, "invoice {invoice}");
    }
    let mut largest: Vec<usize> = orders.iter().map(|order| lines(order).len()).collect();
    largest.sort_unstable();
    assert_eq!((largest[largest.len() / 2], largest.last().copied()), (14, Some(675)));
    assert!(orders.is_sorted_by_key(|order| order.timestamp), "the file is in the order of time");

    let products = retail::catalogue_of(&path, |ordered| u32::try_from(ordered).unwrap()).unwrap().products;
    let skus: BTreeSet<String> = products.iter().map(|product| product.row.sku.to_string()).collect();
    assert_eq!(skus, codes);
    assert_eq!(products.len(), 4_316);
    assert_eq!(products.iter().map(|product| product.orders).max(), Some(3_282));
    assert_eq!(products.iter().map(|product| product.ordered).sum::<u64>(), 6_011_587);
    assert_eq!(products.iter().map(|product| u64::from(product.row.quantity)).sum::<u64>(), 6_011_587);
    let folded: BTreeSet<String> = codes.iter().map(|code| code.to_uppercase()).collect();
    assert_eq!(codes.len() - folded.len(), 149, "pairs that differ only by case, as `catalogue_of` tells");
}
