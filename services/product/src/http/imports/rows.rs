//! The rows of an import: CSV or NDJSON in, checked rows out, one at a time.
//!
//! Owns the forms. Assumes nothing about the bytes: a row that is wrong is refused with its line, and those after it are
//! read all the same. Memory is one row, and some 24 bytes for each row seen, by which a repeated product is found.

use std::fmt;
use std::io::{self, BufRead, Read};

use hashbrown::HashMap;
use lomash_contract::text::given as text;
use lomash_contract::{ProductId, Sku, Timestamp};
use lomash_web::Problem;
use lomash_web::extract::parse_json;
use lomash_web::problem::{FieldError, VALIDATION_FAILED};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::catalogue::{self, HeaderError, RowError, Said};
use crate::csv_file::{Cells, CsvFile, debris, excerpt, stock};
use crate::http::problems::sentence;
use crate::http::writes::checked_reason;
use crate::inventory::{Amendment, given};

/// Longest line of NDJSON, in bytes: as much as any other request with one product may have.
pub(super) const MAX_LINE_BYTES: usize = 64 * 1024;

/// What rows are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Products to register, or to give new details.
    Products,
    /// Counts to put on record.
    Counts,
}

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Comma-separated, under a header.
    Csv,
    /// A JSON object a line.
    Ndjson,
}

/// A row that can be tried.
#[derive(Debug)]
pub(super) struct Row {
    /// The line it begins on, counted from 1.
    pub(super) line: u64,
    pub(super) product: Named,
    pub(super) wanted: Wanted,
    /// Its own reason, if it has one.
    pub(super) reason: Option<String>,
}

/// How a row names its product.
#[derive(Clone, Debug)]
pub(super) enum Named {
    Id(ProductId),
    /// A product that has the sku already.
    Sku(Sku),
}

/// What a row wants.
#[derive(Debug)]
pub(super) enum Wanted {
    /// What the row says of the product. Of one that there is, nothing else changes, and its stock stays.
    Product {
        sku: Sku,
        details: Amendment,
        initial_quantity: Option<u32>,
    },
    Count {
        quantity: u32,
        counted_at: Timestamp,
    },
}

impl Row {
    pub(super) fn product_id(&self) -> Option<ProductId> {
        match self.product {
            Named::Id(id) => Some(id),
            Named::Sku(_) => None,
        }
    }

    /// Whether it could be about a new product if only it had a name.
    pub(super) const fn needs_name(&self) -> bool {
        matches!(&self.wanted, Wanted::Product { details: Amendment { name: None, .. }, .. })
    }

    pub(super) fn sku(&self) -> Option<&Sku> {
        match (&self.product, &self.wanted) {
            (_, Wanted::Product { sku, .. }) => Some(sku),
            (Named::Sku(sku), Wanted::Count { .. }) => Some(sku),
            (Named::Id(_), Wanted::Count { .. }) => None,
        }
    }
}

/// A row that cannot be tried.
#[derive(Debug)]
pub(super) struct BadRow {
    pub(super) line: u64,
    pub(super) problem: Problem,
}

/// A row as it was read.
pub(super) type ReadRow = Result<Row, BadRow>;

/// The rows of a body, and the columns of its header that are not read.
pub(super) struct Rows {
    pub(super) rows: Box<dyn Iterator<Item = ReadRow> + Send>,
    pub(super) ignored_columns: Vec<String>,
}

/// Reads rows.
///
/// # Errors
/// 400 when the header does not name the columns that every row needs.
pub(super) fn read<R: BufRead + Send + 'static>(kind: Kind, form: Form, file: R) -> Result<Rows, Problem> {
    let (rows, ignored_columns): (Box<dyn Iterator<Item = ReadRow> + Send>, _) = match (kind, form) {
        (Kind::Products, Form::Csv) => {
            let said = catalogue::said(file).map_err(no_header)?;
            let ignored = said.ignored().to_vec();
            (Box::new(said.map(said_row)), ignored)
        }
        (Kind::Counts, Form::Csv) => {
            let file = counts_file(file).map_err(no_header)?;
            let ignored = file.ignored().to_vec();
            (Box::new(count_rows(file)), ignored)
        }
        (Kind::Products, Form::Ndjson) => (Box::new(lines(file, product)), Vec::new()),
        (Kind::Counts, Form::Ndjson) => (Box::new(lines(file, count)), Vec::new()),
    };
    Ok(Rows { rows, ignored_columns })
}

fn no_header(problem: HeaderError) -> Problem {
    let source = std::error::Error::source(&problem).map(|cause| format!(": {cause}")).unwrap_or_default();
    Problem::bad_request(sentence(&format!("{problem}{source}")))
}

fn said_row(said: Result<Said, RowError>) -> ReadRow {
    match said {
        Ok(Said { line, sku, details, quantity }) => {
            let product = Named::Id(catalogue::product_id(&sku));
            let wanted = Wanted::Product { sku, details, initial_quantity: quantity };
            Ok(Row { line, product, wanted, reason: None })
        }
        Err(RowError { line, problem }) => Err(BadRow { line, problem: invalid(&problem) }),
    }
}

fn invalid(problem: &str) -> Problem {
    Problem::new(&VALIDATION_FAILED, sentence(problem))
}

// ── NDJSON ──────────────────────────────────────────────────────────────────────────────────────────────────────

/// What is said of a product. A new one is registered so; of one that there is, what is left out stays, and so does its
/// stock. A null takes away what can be taken away.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct ProductRow {
    /// Its id; when it is left out, the one that is derived from the sku.
    #[schema(value_type = Option<Uuid>)]
    product_id: Option<ProductId>,
    /// Its unit; unique. 1 to 64 visible characters.
    #[serde(deserialize_with = "text::sku")]
    #[schema(value_type = String, min_length = 1, max_length = 64)]
    sku: Sku,
    /// Its name, 1 to 200 characters; a new product needs one.
    #[serde(default, deserialize_with = "text::present_name", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, min_length = 1, max_length = 200)]
    name: Option<Box<str>>,
    /// Its category, 1 to 200 characters; null for none.
    #[serde(default, deserialize_with = "text::cleared_name", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 200)]
    category: Option<Option<Box<str>>>,
    /// Its own low-stock threshold; null for the platform's.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>, maximum = 1_000_000_000)]
    low_stock_threshold: Option<Option<u32>>,
    /// Whether it is for sale; a new product is unless it says otherwise.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = bool)]
    active: Option<bool>,
    /// The first stock of a new product; 0 when it is left out.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u32, maximum = 1_000_000_000)]
    initial_quantity: Option<u32>,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

/// A count to put on record, of a product by its sku or by its id.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::http) struct CountRow {
    /// The product; this or `sku`.
    #[schema(value_type = Option<Uuid>)]
    product_id: Option<ProductId>,
    /// Its unit; this or `productId`.
    #[serde(default, deserialize_with = "text::optional_sku")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 64)]
    sku: Option<Sku>,
    /// How many were there.
    #[schema(maximum = 1_000_000_000)]
    quantity: u32,
    /// When they were counted: orders since then are not undone by the correction.
    #[schema(value_type = String, format = DateTime)]
    counted_at: Timestamp,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

fn product(line: u64, json: &[u8]) -> Result<Row, Problem> {
    let ProductRow { product_id, sku, name, category, low_stock_threshold, active, initial_quantity, reason } =
        parse_json(json)?;
    let texts = [
        ("sku", Some(sku.as_str())),
        ("name", name.as_deref()),
        ("category", category.as_ref().and_then(Option::as_deref)),
    ];
    for (field, text) in texts {
        if let Some(problem) = text.and_then(debris) {
            return Err(Problem::invalid_field(format!("/{field}"), problem));
        }
    }
    let product = Named::Id(product_id.unwrap_or_else(|| catalogue::product_id(&sku)));
    let details = Amendment { sku: Some(sku.clone()), name, category, low_stock_threshold, active };
    let wanted = Wanted::Product { sku, details, initial_quantity };
    Ok(Row { line, product, wanted, reason: reason.map(checked_reason).transpose()? })
}

fn count(line: u64, json: &[u8]) -> Result<Row, Problem> {
    let CountRow { product_id, sku, quantity, counted_at, reason } = parse_json(json)?;
    let product = match (product_id, sku) {
        (Some(id), None) => Named::Id(id),
        (None, Some(sku)) => Named::Sku(sku),
        _ => return Err(Problem::invalid_field("/sku", "must be there, or productId must, and not both")),
    };
    let wanted = Wanted::Count { quantity, counted_at };
    Ok(Row { line, product, wanted, reason: reason.map(checked_reason).transpose()? })
}

/// The rows of a file with one JSON object a line. Lines of white space alone are passed over.
fn lines<R: BufRead>(
    mut file: R,
    row: fn(u64, &[u8]) -> Result<Row, Problem>,
) -> impl Iterator<Item = ReadRow> + use<R> {
    let (mut line, mut bytes, mut seen, mut ended) = (0, Vec::new(), Seen::default(), false);
    std::iter::from_fn(move || {
        while !ended {
            line += 1;
            let problem = match next_line(&mut file, &mut bytes) {
                Ok(Line::End) => break,
                Ok(Line::Whole) => {
                    let json = bytes.strip_prefix(BYTE_ORDER_MARK).filter(|_| line == 1).unwrap_or(&bytes);
                    if json.trim_ascii().is_empty() {
                        continue;
                    }
                    match row(line, json).and_then(|row| seen.first(row)) {
                        Ok(row) => return Some(Ok(row)),
                        Err(problem) => problem,
                    }
                }
                Ok(Line::TooLong) => Problem::bad_request(format!(
                    "The line has more than {MAX_LINE_BYTES} bytes, the most that one may have."
                )),
                Err(problem) => {
                    ended = true;
                    Problem::internal(format!("an import could not be read from disk: {problem}"))
                }
            };
            return Some(Err(BadRow { line, problem }));
        }
        ended = true;
        None
    })
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

enum Line {
    Whole,
    TooLong,
    End,
}

/// Reads a line, which ends with LF, with CR, or with both, as no value of JSON does; of one that is too long no more than
/// the limit is kept, and the rest is passed over.
fn next_line(file: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<Line> {
    bytes.clear();
    let (mut is_any, mut is_too_long) = (false, false);
    loop {
        let some = file.fill_buf()?;
        if some.is_empty() {
            break;
        }
        is_any = true;
        let end = some.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let text = &some[..end.unwrap_or(some.len())];
        is_too_long |= bytes.len() + text.len() > MAX_LINE_BYTES;
        if !is_too_long {
            bytes.extend_from_slice(text);
        }
        let Some(end) = end else {
            let passed = some.len();
            file.consume(passed);
            continue;
        };
        let is_cr = some[end] == b'\r';
        file.consume(end + 1);
        if is_cr && file.fill_buf()?.first() == Some(&b'\n') {
            file.consume(1);
        }
        break;
    }
    Ok(match (is_any, is_too_long) {
        (false, _) => Line::End,
        (true, true) => Line::TooLong,
        (true, false) => Line::Whole,
    })
}

/// The line on which each product was first named. By id and by sku apart: which sku a product has is not known here.
#[derive(Default)]
struct Seen {
    ids: HashMap<ProductId, u32>,
    skus: HashMap<ProductId, u32>,
}

impl Seen {
    /// Refuses what is there already: rows are carried out side by side, and the last would win or not as it happens.
    fn first(&mut self, row: Row) -> Result<Row, Problem> {
        let Self { ids, skus } = self;
        let unit = row.sku().map(catalogue::product_id);
        // By sku first: a row that does not give an id has the one that its sku names.
        let at = [(unit, &mut *skus, "sku"), (row.product_id(), &mut *ids, "productId")];
        let line = u32::try_from(row.line).unwrap_or(u32::MAX);
        for (key, lines, name) in &at {
            if let Some(first) = key.and_then(|key| lines.get(&key)) {
                let detail = format!("is on line {first} already; a file names a product once");
                return Err(Problem::invalid_field(format!("/{name}"), detail));
            }
        }
        for (key, lines, _) in at {
            lines.extend(key.map(|key| (key, line)));
        }
        Ok(row)
    }
}

// ── CSV of counts ───────────────────────────────────────────────────────────────────────────────────────────────

const COUNT_COLUMNS: &[&str] = &["sku", "productId", "quantity", "countedAt", "reason"];

/// A CSV file of counts. Columns may come in any order, names in any case; columns of other names are ignored.
fn counts_file<R: Read>(file: R) -> Result<CsvFile<R>, HeaderError> {
    let file = CsvFile::open(file, COUNT_COLUMNS)?;
    let product = if file.has("productId") { "productId" } else { "sku" };
    file.needing(&[product, "quantity", "countedAt"])
}

fn count_rows<R: Read>(mut file: CsvFile<R>) -> impl Iterator<Item = ReadRow> + use<R> {
    let mut seen = Seen::default();
    std::iter::from_fn(move || {
        Some(match file.next_row()? {
            Ok(cells) => {
                let line = cells.line;
                count_row(&cells).and_then(|row| seen.first(row)).map_err(|problem| BadRow { line, problem })
            }
            Err(RowError { line, problem }) => Err(BadRow { line, problem: invalid(&problem) }),
        })
    })
}

/// A record as the object that NDJSON would have, and then as that one is read.
fn count_row<R: Read>(cells: &Cells<'_, R>) -> Result<Row, Problem> {
    let mut object = Map::new();
    for name in COUNT_COLUMNS {
        let at_fault = |problem: String| Problem::invalid([FieldError::at(format!("/{name}"), problem)]);
        let Some(text) = cells.get(name).map_err(at_fault)?.filter(|text| !text.is_empty()) else { continue };
        let value = match *name {
            "quantity" => {
                let problem = |problem| at_fault(format!("`{}` {problem}", excerpt(text)));
                Value::from(stock(text).map_err(problem)?)
            }
            _ => Value::from(text),
        };
        object.insert((*name).to_owned(), value);
    }
    count(cells.line, Value::Object(object).to_string().as_bytes())
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Products => "products",
            Self::Counts => "counts",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;
    use uuid::Uuid;

    use super::*;

    /// Of each row its line, and its sku or what is wrong with it.
    fn told(kind: Kind, form: Form, file: &[u8]) -> Vec<(u64, Result<String, String>)> {
        let rows = read(kind, form, Cursor::new(file.to_vec())).expect("a file that can be read").rows;
        let told = rows.map(|row| match row {
            Ok(row) => (row.line, Ok(row.sku().map(ToString::to_string).unwrap_or_default())),
            Err(BadRow { line, problem }) => (
                line,
                Err(problem
                    .document()
                    .errors
                    .first()
                    .map_or_else(|| problem.detail().to_owned(), |error| error.pointer.clone().unwrap_or_default())),
            ),
        });
        told.collect()
    }

    #[test]
    fn a_bad_line_does_not_hide_those_after_it() {
        let long = format!("{{\"sku\":\"{}\"}}", "x".repeat(MAX_LINE_BYTES));
        let mut file = b"\xef\xbb\xbf{\"sku\":\"A\",\"name\":\"a\"}\n\n  \nnonsense\n".to_vec();
        file.extend_from_slice(long.as_bytes());
        file.extend_from_slice(
            b"\n{\"sku\":\"B\",\"name\":\"b\",\"initialQuantity\":-1}\r\n{\"sku\":\"\xff\",\"name\":\"b\"}\n",
        );
        file.extend_from_slice(b"{\"sku\":\"A\",\"name\":\"again\"}\n{\"sku\":\"C\",\"name\":\"c\"}");
        let rows = told(Kind::Products, Form::Ndjson, &file);
        let lines: Vec<u64> = rows.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 4, 5, 6, 7, 8, 9]);
        assert_eq!((&rows[0].1, &rows[6].1), (&Ok("A".to_owned()), &Ok("C".to_owned())));
        assert!(rows[2].1.as_ref().is_err_and(|told| told.contains("65536 bytes")), "{rows:?}");
        assert_eq!(rows[3].1, Err("/initialQuantity".to_owned()));
        assert_eq!(rows[5].1, Err("/sku".to_owned()));
    }

    #[test]
    fn counts_name_their_product_one_way() {
        let id = Uuid::nil();
        let file = format!(
            "Reason,SKU,productid,quantity,countedAt,shelf\n\
             ,A,,5,2026-01-31T09:30:00Z,9\n\
             why,,{id},5,2026-01-31T09:30:00Z\n\
             ,B,{id},5,2026-01-31T09:30:00Z\n\
             ,C,,+5,2026-01-31T09:30:00Z\n\
             ,D,,5,yesterday\n\
             ,A,,6,2026-01-31T09:31:00Z\n\
             ,,,,,\n\
             ,E,,7,2026-01-31T09:31:00Z\n"
        );
        let rows = told(Kind::Counts, Form::Csv, file.as_bytes());
        let bad = |pointer: &str| Err(pointer.to_owned());
        let expected = [
            (2, Ok("A".to_owned())),
            (3, Ok(String::new())),
            (4, bad("/sku")),
            (5, bad("/quantity")),
            (6, bad("/countedAt")),
            (7, bad("/sku")),
            (9, Ok("E".to_owned())),
        ];
        assert_eq!(rows, expected);
    }

    /// A value as a file has it, and as which text, number or flag a naive reader takes it.
    type Taken = (&'static str, Option<&'static str>, Option<u32>, Option<bool>);

    /// Values as a file has them, and as which text, number or flag a naive reader takes them; none of these where it takes
    /// them for nothing.
    const VALUES: [Taken; 16] = [
        ("\"A\"", Some("A"), None, None),
        ("\"ku\\u0308\"", Some("kü"), None, None),
        ("\"#1\"", Some("#1"), None, None),
        ("\"\\u200b\"", None, None, None),
        ("\"#N/A\"", None, None, None),
        ("\"\"", None, None, None),
        ("null", None, None, None),
        ("true", None, None, Some(true)),
        ("false", None, None, Some(false)),
        ("0", None, Some(0), None),
        ("1000000000", None, Some(1_000_000_000), None),
        ("-1", None, None, None),
        ("1.0", None, None, None),
        ("1e2", None, None, None),
        ("99999999999", None, None, None),
        ("[7,null]", None, None, None),
    ];

    const FIELDS: [&str; 7] = ["sku", "name", "category", "lowStockThreshold", "active", "initialQuantity", "price"];

    /// What the pairs say, looked at one by one; none when they say nothing that can be taken.
    fn naive(pairs: &[(&str, usize)]) -> Option<(String, Amendment, Option<u32>)> {
        let (mut sku, mut said, mut stock) = (None, Amendment::default(), None);
        for (at, (field, value)) in pairs.iter().enumerate() {
            if pairs[..at].iter().any(|(before, _)| before == field) {
                return None;
            }
            let (json, text, number, flag) = VALUES[*value];
            let is_null = json == "null";
            match *field {
                "sku" => sku = Some(text?.to_owned()),
                "name" => said.name = Some(text?.into()),
                "category" => said.category = Some(if is_null { None } else { Some(text?.into()) }),
                "lowStockThreshold" => said.low_stock_threshold = Some(if is_null { None } else { Some(number?) }),
                "active" => said.active = Some(flag?),
                "initialQuantity" => stock = Some(number?),
                _ => return None,
            }
        }
        Some((sku?, said, stock))
    }

    proptest! {
        #[test]
        fn a_row_says_what_a_naive_reader_reads(
            pairs in vec((select(&FIELDS[..]), 0..VALUES.len()), 0..6), is_list in proptest::bool::weighted(0.1),
        ) {
            let pair = |(field, value): &(&str, usize)| match is_list {
                true => VALUES[*value].0.to_owned(),
                false => format!("\"{field}\": {}", VALUES[*value].0),
            };
            let inside = pairs.iter().map(pair).collect::<Vec<_>>().join(",");
            let text = if is_list { format!("[{inside}]") } else { format!("{{{inside}}}") };
            let expected = naive(&pairs).filter(|_| !is_list);
            let read = product(1, text.as_bytes()).ok().map(|row| match row.wanted {
                Wanted::Product { sku, details, initial_quantity } => {
                    (sku.to_string(), Amendment { sku: None, ..details }, initial_quantity)
                }
                Wanted::Count { .. } => unreachable!("a row of products"),
            });
            prop_assert_eq!(read, expected, "{}", text);
        }

        /// Lines are those between the ends that an editor knows, each with its number.
        #[test]
        fn lines_are_those_of_a_naive_splitter(pieces in vec(select(vec!["\n", "\r", "\r\n", "x", " ", "{}"]), 0..40)) {
            let text = pieces.concat();
            let naive = text.replace("\r\n", "\n").replace('\r', "\n");
            let expected: Vec<u64> =
                (1..).zip(naive.split('\n')).filter(|(_, line)| !line.trim().is_empty()).map(|(at, _)| at).collect();
            let file = std::io::BufReader::with_capacity(2, Cursor::new(text.into_bytes()));
            let read: Vec<u64> = lines(file, count).map(|row| row.map_or_else(|bad| bad.line, |row| row.line)).collect();
            prop_assert_eq!(read, expected);
        }

        /// No bytes break a reader, in any form.
        #[test]
        fn any_bytes_are_read_to_their_end(bytes in vec(any::<u8>(), 0..300)) {
            for (kind, form) in [
                (Kind::Products, Form::Csv), (Kind::Counts, Form::Csv), (Kind::Products, Form::Ndjson), (Kind::Counts, Form::Ndjson),
            ] {
                if let Ok(Rows { rows, .. }) = read(kind, form, Cursor::new(bytes.clone())) {
                    rows.for_each(drop);
                }
            }
        }
    }

    #[test]
    fn a_file_without_its_columns_is_refused_as_a_whole() {
        for (kind, file) in [
            (Kind::Products, ""),
            (Kind::Products, "name,quantity\n"),
            (Kind::Counts, ""),
            (Kind::Counts, "sku,quantity\n"),
            (Kind::Counts, "sku,quantity,countedAt,SKU\n"),
        ] {
            let problem = read(kind, Form::Csv, Cursor::new(file)).err().expect(file);
            assert_eq!(problem.status().as_u16(), 400);
        }
    }
}
