//! The catalogue file: CSV in, checked rows out, one at a time.
//!
//! Owns what a row must be, what it says of its product and what not, and which product a stock-keeping unit names. A
//! column that the file does not have says nothing; an empty cell says that there is none. A bad row is told with its line
//! and the rows after it still go through. Memory is one row plus 24 bytes or so for each row seen, by which a repeated
//! unit is found.

use std::io::Read;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use lomash_contract::text::{self, BadText};
use lomash_contract::{ProductId, Sku};
use uuid::{Uuid, uuid};

use crate::csv_file::{Cells, CsvFile, stock, unclosed, yes_or_no};
pub use crate::csv_file::{HeaderError, MAX_ROW_BYTES, RowError, csv_reader, excerpt, next_record, surplus};
use crate::inventory::Amendment;

/// The namespace of every id that this tool derives from a name: the UUIDv5 of `lomash-inventory` among object ids.
///
/// Never changes: with another namespace a second import would register every product again.
pub const NAMESPACE: Uuid = uuid!("5d7df23a-48ad-5594-9842-98421ec3615d");

/// The id of the thing called `name` among things of `kind`; the same for ever.
pub fn derived_id(kind: &str, name: &str) -> Uuid {
    Uuid::new_v5(&NAMESPACE, format!("{kind}:{name}").as_bytes())
}

/// The product that a stock-keeping unit names: UUIDv5 of `product:` and the unit in [`NAMESPACE`].
///
/// A second import of the same file, or of another that lists the same unit, means the same product.
#[must_use]
pub fn product_id(sku: &Sku) -> ProductId {
    ProductId(derived_id("product", sku.as_str()))
}

/// A row of a whole catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The line it begins on, counted from 1 as an editor does.
    pub line: u64,
    /// The unit; once in a file.
    pub sku: Sku,
    /// The name, within the contract's limits.
    pub name: Box<str>,
    /// The category, if it has one.
    pub category: Option<Box<str>>,
    /// The stock to begin with.
    pub quantity: u32,
    /// The product's own low-stock threshold, if it has one.
    pub threshold: Option<u32>,
}

/// What a row says of its product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The line it begins on, counted from 1 as an editor does.
    pub line: u64,
    /// The unit; once in a file.
    pub sku: Sku,
    /// The details that it names.
    pub details: Amendment,
    /// The stock to begin with, if it names one. It says nothing of a product that there is already.
    pub quantity: Option<u32>,
}

/// The columns, as an error shows them.
const COLUMNS: &[&str] = &["sku", "name", "category", "quantity", "threshold", "active"];

/// The rows of a whole catalogue: each has a name and a quantity.
///
/// # Errors
/// [`HeaderError`] when the header does not name the columns that every row needs. Columns may come in any order,
/// names in any case; columns of other names are ignored, `category` and `threshold` may be missing.
pub fn read<R: Read>(file: R) -> Result<impl Iterator<Item = Result<Row, RowError>>, HeaderError> {
    let rows = SaidRows::new(CsvFile::open(file, COLUMNS)?.needing(&["sku", "name", "quantity"])?);
    let whole = |said: Said| {
        let Said { line, sku, details, quantity } = said;
        let gone = |what: &str| RowError { line, problem: format!("there is no {what}") };
        let name = details.name.ok_or_else(|| gone("name"))?;
        let quantity = quantity.ok_or_else(|| gone("quantity"))?;
        let (category, threshold) = (details.category.flatten(), details.low_stock_threshold.flatten());
        Ok(Row { line, sku, name, category, quantity, threshold })
    };
    Ok(rows.map(move |said| said.and_then(whole)))
}

/// The rows of a file that says something of products: `sku` is the one column that each needs, and one other is there.
///
/// # Errors
/// [`HeaderError`].
pub fn said<R: Read>(file: R) -> Result<SaidRows<R>, HeaderError> {
    let file = CsvFile::open(file, COLUMNS)?.needing(&["sku"])?;
    if COLUMNS.iter().all(|name| *name == "sku" || !file.has(name)) {
        return file.needing(&["name"]).map(SaidRows::new);
    }
    Ok(SaidRows::new(file))
}

/// What the rows of a file say, good and bad, in their order.
#[derive(Debug)]
pub struct SaidRows<R> {
    file: CsvFile<R>,
    /// The first line of each product.
    seen: HashMap<ProductId, u64>,
}

impl<R: Read> SaidRows<R> {
    fn new(file: CsvFile<R>) -> Self {
        Self { file, seen: HashMap::new() }
    }

    /// The columns that are not read, by the names that the header gives them.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        self.file.ignored()
    }
}

impl<R: Read> Iterator for SaidRows<R> {
    type Item = Result<Said, RowError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { file, seen } = self;
        let said = match file.next_row()? {
            Ok(cells) => said_by(&cells),
            Err(bad) => Err(bad),
        };
        // Only good rows claim their unit: a corrected copy of a bad row may follow it.
        Some(said.and_then(|said| match seen.entry(product_id(&said.sku)) {
            Entry::Occupied(first) => {
                let (sku, first) = (&said.sku, first.get());
                let problem = format!("sku `{sku}` is on line {first} already; a catalogue lists a product once");
                Err(RowError { line: said.line, problem })
            }
            Entry::Vacant(free) => {
                free.insert(said.line);
                Ok(said)
            }
        }))
    }
}

fn said_by<R: Read>(cells: &Cells<'_, R>) -> Result<Said, RowError> {
    let mut problems = Vec::new();
    let (mut sku, mut details, mut quantity) = (None, Amendment::default(), None);
    for name in COLUMNS {
        let cell = match cells.get(name) {
            Ok(None) => continue,
            Ok(Some(cell)) => cell,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let read = match *name {
            "sku" => text::sku(cell).map(|given| sku = Some(given)).map_err(|bad| in_a_cell(cell, &bad)),
            "name" => text::name(cell).map(|given| details.name = Some(given)).map_err(|bad| in_a_cell(cell, &bad)),
            "category" => optional(cell, |cell| text::name(cell).map_err(|bad| in_a_cell(cell, &bad)))
                .map(|given| details.category = Some(given)),
            "quantity" => stock(cell).map(|given| quantity = Some(given)),
            "threshold" => optional(cell, stock).map(|given| details.low_stock_threshold = Some(given)),
            _ => yes_or_no(cell).map(|given| details.active = Some(given)),
        };
        if let Err(problem) = read {
            problems.push(if cell.is_empty() {
                format!("{name} is empty")
            } else {
                format!("{name} `{}` {problem}", excerpt(cell))
            });
        }
    }
    let line = cells.line;
    match sku {
        Some(sku) if problems.is_empty() => Ok(Said { line, sku, details, quantity }),
        _ => Err(RowError { line, problem: problems.join("; ") }),
    }
}

/// An empty cell says that there is none.
fn optional<T>(cell: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if cell.is_empty() { Ok(None) } else { read(cell).map(Some) }
}

fn in_a_cell(cell: &str, bad: &BadText) -> String {
    unclosed(cell).unwrap_or_else(|| bad.to_string())
}
