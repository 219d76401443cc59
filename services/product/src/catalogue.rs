//! The catalogue file of `lomash import`: CSV in, checked rows out, one at a time.
//!
//! Owns what a row must be and which product a stock-keeping unit names. Assumes nothing about the file: it was made
//! in a spreadsheet, so a bad row is told with its line and the rows after it still go through. Memory is one row plus
//! 24 bytes or so for each row seen, by which a repeated unit is found.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};

use csv::{ByteRecord, ReaderBuilder};
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use lomash_contract::limits::{MAX_NAME_CHARS, MAX_STOCK};
use lomash_contract::{ProductId, Sku};
use uuid::{Uuid, uuid};

/// The namespace of every id that this tool derives from a name: the UUIDv5 of `lomash-inventory` among object ids.
///
/// Never changes: with another namespace a second import would register every product again.
pub const NAMESPACE: Uuid = uuid!("5d7df23a-48ad-5594-9842-98421ec3615d");

/// Longest row, in bytes. A row holds two names and three short fields; only a missing quote makes one this long.
pub const MAX_ROW_BYTES: u64 = 1 << 20;

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

/// A good row.
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

/// A row that cannot be imported, and all that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct RowError {
    /// The line the row begins on, counted from 1 as an editor does.
    pub line: u64,
    /// What is wrong and how it should be.
    pub problem: String,
}

/// Why a file is no catalogue at all.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Not even a header.
    #[error("the file is empty; its first line must name the columns: {COLUMNS}")]
    Empty,
    /// A column that every row needs.
    #[error(
        "the header has no column {missing}; its first line is `{found}`, but must name the columns, separated by commas: {COLUMNS}"
    )]
    MissingColumns {
        /// Their names.
        missing: String,
        /// The header.
        found: String,
    },
    /// A column that is there twice, so that nobody knows which one is meant.
    #[error("the header names the column `{0}` twice; rename or remove one of them")]
    RepeatedColumn(&'static str),
    /// The bytes could not be read.
    #[error("the header cannot be read")]
    Unreadable(#[source] csv::Error),
}

/// The columns, as an error shows them.
const COLUMNS: &str = "sku,name,category,quantity,threshold";

/// Where each column stands in a row.
#[derive(Clone, Copy)]
struct Columns {
    sku: usize,
    name: usize,
    category: Option<usize>,
    quantity: usize,
    threshold: Option<usize>,
}

impl Columns {
    fn of(header: &ByteRecord) -> Result<Self, CatalogueError> {
        let position = |name: &'static str| {
            let named = |cell: &[u8]| cell.trim_ascii().eq_ignore_ascii_case(name.as_bytes());
            let mut found = header.iter().enumerate().filter(|(_, cell)| named(cell)).map(|(index, _)| index);
            match (found.next(), found.next()) {
                (_, Some(_)) => Err(CatalogueError::RepeatedColumn(name)),
                (index, None) => Ok(index),
            }
        };
        let columns = (position("sku")?, position("name")?, position("quantity")?);
        let (category, threshold) = (position("category")?, position("threshold")?);
        let (Some(sku), Some(name), Some(quantity)) = columns else {
            let named = [("`sku`", columns.0), ("`name`", columns.1), ("`quantity`", columns.2)];
            let missing: Vec<&str> = named.iter().filter(|(_, index)| index.is_none()).map(|(name, _)| *name).collect();
            let cells: Vec<_> = header.iter().map(String::from_utf8_lossy).collect();
            return Err(CatalogueError::MissingColumns {
                missing: missing.join(", "),
                found: excerpt(&cells.join(",")),
            });
        };
        Ok(Self { sku, name, category, quantity, threshold })
    }
}

/// The rows of a catalogue.
///
/// # Errors
/// [`CatalogueError`] when the header does not name the columns that every row needs. Columns may come in any order,
/// names in any case; columns of other names are ignored, `category` and `threshold` may be missing.
pub fn read<R: Read>(file: R) -> Result<Rows<R>, CatalogueError> {
    let mut csv = csv_reader(file);
    let header = csv.byte_headers().map_err(CatalogueError::Unreadable)?;
    if header.is_empty() {
        return Err(CatalogueError::Empty);
    }
    let columns = Columns::of(header)?;
    Ok(Rows { csv, columns, record: ByteRecord::new(), seen: HashMap::new(), ended: false })
}

/// The rows of a catalogue, good and bad, in the order of the file.
pub struct Rows<R> {
    csv: csv::Reader<Lines<R>>,
    columns: Columns,
    record: ByteRecord,
    /// The first line of each product.
    seen: HashMap<ProductId, u64>,
    ended: bool,
}

impl<R> fmt::Debug for Rows<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("seen", &self.seen.len()).finish_non_exhaustive()
    }
}

impl<R: Read> Iterator for Rows<R> {
    type Item = Result<Row, RowError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            match next_record(&mut self.csv, &mut self.record) {
                // Spreadsheets write rows of nothing but commas below the last one.
                Ok(Some(_)) if self.record.iter().all(|cell| cell.trim_ascii().is_empty()) => {}
                Ok(Some(line)) => return Some(self.row(line)),
                Ok(None) => self.ended = true,
                Err((line, problem)) => {
                    self.ended = true;
                    return Some(Err(RowError { line, problem: format!("{problem}; nothing after it was read") }));
                }
            }
        }
        None
    }
}

impl<R: Read> Rows<R> {
    fn row(&mut self, line: u64) -> Result<Row, RowError> {
        let mut problems = Vec::new();
        let record = &self.record;
        let mut cell = |column: Option<usize>, name: &str| match record.get(column?) {
            None => {
                problems.push(format!("there is no {name}: the row has only {} columns", record.len()));
                None
            }
            Some(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => Some(text.trim()),
                Err(_) => {
                    let shown = excerpt(&String::from_utf8_lossy(bytes));
                    problems.push(format!("{name} `{shown}` is not UTF-8; save the file as UTF-8"));
                    None
                }
            },
        };
        let sku = cell(Some(self.columns.sku), "sku");
        let name = cell(Some(self.columns.name), "name");
        let category = cell(self.columns.category, "category").filter(|category| !category.is_empty());
        let quantity = cell(Some(self.columns.quantity), "quantity");
        let threshold = cell(self.columns.threshold, "threshold").filter(|threshold| !threshold.is_empty());

        let mut checked = |outcome: Result<(), String>| outcome.unwrap_or_else(|problem| problems.push(problem));
        let mut parsed_sku = None;
        if let Some(sku) = sku {
            checked(
                sku.parse().map(|sku| parsed_sku = Some(sku)).map_err(|why| format!("sku `{}`: {why}", excerpt(sku))),
            );
        }
        for (what, text) in [("name", name), ("category", category)] {
            checked(text.map_or(Ok(()), |text| check_name(what, text)));
        }
        let (mut parsed_quantity, mut parsed_threshold) = (None, None);
        if let Some(quantity) = quantity {
            checked(stock("quantity", quantity).map(|number| parsed_quantity = Some(number)));
        }
        if let Some(threshold) = threshold {
            checked(stock("threshold", threshold).map(|number| parsed_threshold = Some(number)));
        }

        let (Some(sku), Some(name), Some(quantity), true) = (parsed_sku, name, parsed_quantity, problems.is_empty())
        else {
            return Err(RowError { line, problem: problems.join("; ") });
        };
        // Only good rows claim their unit: a corrected copy of a bad row may follow it.
        match self.seen.entry(product_id(&sku)) {
            Entry::Occupied(first) => {
                let problem =
                    format!("sku `{sku}` is on line {} already; a catalogue lists a product once", first.get());
                Err(RowError { line, problem })
            }
            Entry::Vacant(free) => {
                free.insert(line);
                let (name, category) = (name.into(), category.map(Into::into));
                Ok(Row { line, sku, name, category, quantity, threshold: parsed_threshold })
            }
        }
    }
}

fn check_name(what: &str, text: &str) -> Result<(), String> {
    let chars = text.chars().count();
    if chars == 0 {
        Err(format!("{what} is empty"))
    } else if text.contains('\n') {
        let lines = text.lines().count();
        Err(format!("{what} `{}` runs over {lines} lines; is a closing quote missing?", excerpt(text)))
    } else if text.chars().any(char::is_control) {
        Err(format!("{what} `{}` contains a control character, such as a tab", excerpt(text)))
    } else if chars > MAX_NAME_CHARS {
        Err(format!("{what} `{}` has {chars} characters; at most {MAX_NAME_CHARS} are allowed", excerpt(text)))
    } else {
        Ok(())
    }
}

fn stock(what: &str, text: &str) -> Result<u32, String> {
    // Digits only: `parse` alone would also take a plus sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { text.parse().ok() } else { None };
    number
        .filter(|number| *number <= MAX_STOCK)
        .ok_or_else(|| format!("{what} `{}` is not a whole number from 0 to {MAX_STOCK}", excerpt(text)))
}

/// Most characters of a file's text that an error repeats.
const EXCERPT_CHARS: usize = 60;

/// The beginning of `text`, fit for one line of a terminal.
pub fn excerpt(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut chars = text.chars();
    let mut short: String = chars.by_ref().take(EXCERPT_CHARS).map(visible).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}

/// A CSV reader for files that people made: a byte order mark is skipped, rows may be short, lines are counted.
pub fn csv_reader<R: Read>(file: R) -> csv::Reader<Lines<R>> {
    ReaderBuilder::new().flexible(true).from_reader(Lines::new(file))
}

/// Reads the next record and says on which line it begins; `None` at the end. After an error nothing more can be read.
pub fn next_record<R: Read>(
    csv: &mut csv::Reader<Lines<R>>,
    record: &mut ByteRecord,
) -> Result<Option<u64>, (u64, String)> {
    let begin = csv.position().byte();
    csv.get_mut().allow(begin + MAX_ROW_BYTES);
    let outcome = csv.read_byte_record(record);
    let line = csv.get_mut().line_at(begin);
    match outcome {
        Ok(true) => Ok(Some(line)),
        Ok(false) => Ok(None),
        Err(error) => Err((line, error.to_string())),
    }
}

/// What a CSV reader reads through: counts lines as an editor does, and ends a row that never does.
///
/// The reader's own line of a record does not count the blank lines in front of it.
pub struct Lines<R> {
    file: R,
    /// Bytes handed out.
    offset: u64,
    /// Bytes that may be handed out before the current record must have ended.
    allowed: u64,
    /// The line being handed out, and whether anything but its end was seen of it.
    line: u64,
    blank: bool,
    /// Offset and number of each line that is not blank, from the current record on.
    begun: VecDeque<(u64, u64)>,
}

impl<R> Lines<R> {
    const fn new(file: R) -> Self {
        Self { file, offset: 0, allowed: MAX_ROW_BYTES, line: 1, blank: true, begun: VecDeque::new() }
    }

    fn allow(&mut self, offset: u64) {
        self.allowed = offset;
    }

    /// The line of the record that was read from `offset` on: that of the first text at or behind it.
    fn line_at(&mut self, offset: u64) -> u64 {
        while self.begun.front().is_some_and(|(begin, _)| *begin < offset) {
            self.begun.pop_front();
        }
        self.begun.front().map_or(self.line, |(_, line)| *line)
    }
}

impl<R: Read> Read for Lines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.offset > self.allowed {
            let problem = format!("a row of more than {MAX_ROW_BYTES} bytes begins here; is a closing quote missing?");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        let read = self.file.read(buffer)?;
        for byte in &buffer[..read] {
            match byte {
                b'\n' => {
                    self.line += 1;
                    self.blank = true;
                }
                b'\r' => {}
                _ if self.blank => {
                    self.begun.push_back((self.offset, self.line));
                    self.blank = false;
                }
                _ => {}
            }
            self.offset += 1;
        }
        Ok(read)
    }
}
