//! Orders out of a file, for `lomash orders replay`: envelopes as NDJSON, or the invoice lines of a web shop as CSV.
//!
//! Owns how an invoice becomes an order and how its ids are derived: from the invoice number, the stock code and the
//! customer alone, so that a second replay publishes the same orders under the same ids.
//!
//! Of the retail CSV (`Invoice,StockCode,Description,Quantity,InvoiceDate,Price,CustomerID`, one row a line of an
//! invoice) it assumes no order: real files interleave the lines of invoices that were rung up at the same time. So the
//! whole file is read first, at 12 bytes a line, and grouped; a year of the shop it was made for is 6 MB.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use csv::ByteRecord;
use flate2::read::MultiGzDecoder;
use lomash_contract::codec::decode;
use lomash_contract::limits::{MAX_LINE_QUANTITY, MAX_NAME_CHARS, MAX_ORDER_ITEMS, MAX_STOCK};
use lomash_contract::text;
use lomash_contract::{
    ContentType, CustomerId, Envelope, EventId, LineQuantity, OrderCreated, OrderId, OrderItem, OrderItems, Sku,
    Timestamp,
};
use serde::Serialize;
use time::PrimitiveDateTime;
use time::format_description::FormatItem;
use time::macros::format_description;
use uuid::Uuid;

use crate::catalogue::{Row, csv_reader, derived_id, excerpt, next_record, product_id, surplus};
use crate::output;

/// Longest NDJSON line, in bytes. An order of 1,000 lines with the longest units takes less than half of it.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// How a retail file writes its instants; they are taken for UTC.
const INVOICE_DATE: &[FormatItem<'_>] = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");

/// What a cancelled invoice's number begins with.
const CANCELLED: char = 'C';

/// Rows of a retail file that became no line of an order, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Skipped {
    /// The invoice was cancelled.
    pub cancelled: u64,
    /// The quantity is zero or negative: something came back, or was written off.
    pub not_positive: u64,
    /// The quantity is larger than an order line may have.
    pub too_large: u64,
    /// A cell that is needed is missing or has no sense.
    pub unreadable: u64,
    /// The first line of the file that was unreadable.
    pub first_unreadable: Option<u64>,
}

impl Skipped {
    /// All of them.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.cancelled + self.not_positive + self.too_large + self.unreadable
    }
}

/// The reasons that were met, in words, each with its count.
impl IntoIterator for Skipped {
    type Item = (String, u64);
    type IntoIter = std::vec::IntoIter<(String, u64)>;

    fn into_iter(self) -> Self::IntoIter {
        let unreadable = match self.first_unreadable {
            Some(line) => format!("unreadable, first on line {line}"),
            None => "unreadable".to_owned(),
        };
        let reasons = [
            ("cancelled invoice".to_owned(), self.cancelled),
            ("quantity not positive".to_owned(), self.not_positive),
            (format!("quantity above {MAX_LINE_QUANTITY}"), self.too_large),
            (unreadable, self.unreadable),
        ];
        let met: Vec<_> = reasons.into_iter().filter(|(_, count)| *count > 0).collect();
        met.into_iter()
    }
}

/// A product of a retail file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetailProduct {
    /// What `lomash import` would read of it; the quantity is the caller's, the line that of its first sale.
    pub row: Row,
    /// Units ordered, of all orders together.
    pub ordered: u64,
    /// Orders that have it.
    pub orders: u64,
}

/// What stands where an order should in a file, and is none.
#[derive(Debug, thiserror::Error)]
pub enum NoOrder {
    /// It cannot be an order; what follows it can be one.
    #[error("{what} {problem}")]
    Unfit {
        /// Which invoice, or which line.
        what: String,
        /// Why.
        problem: String,
    },
    /// The file cannot be read on.
    #[error("line {line} could not be read; nothing after it was")]
    Unreadable {
        /// Which line.
        line: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What a retail file sells.
#[derive(Debug)]
pub struct Catalogue {
    /// Its products, in the order of their first sale. What only unfit invoices sell is wanted by no order.
    pub products: Vec<RetailProduct>,
    /// Rows that became no line of an order.
    pub skipped: Skipped,
    /// Invoices that cannot be orders.
    pub unfit: Vec<NoOrder>,
}

/// Opens a file of orders. What it is shows in its first bytes: gzip or plain, and then `{` for NDJSON or a CSV header.
///
/// A retail CSV is read to its end here, so that [`Orders::skipped`] and [`Orders::total`] are known from the start.
///
/// # Errors
/// The file cannot be read, or is neither.
pub fn open(path: impl AsRef<Path>) -> anyhow::Result<Orders> {
    let path = path.as_ref();
    let context = || format!("cannot read orders from {}", path.display());
    let source = match Source::open(path).with_context(context)? {
        Source::Ndjson(file) => Orders(Kind::Ndjson { file, line: 0 }),
        Source::Csv(file) => Orders(Kind::Retail { sales: Sales::read(file).with_context(context)?, next: 0 }),
    };
    Ok(source)
}

/// The products of a retail file in the order of their first sale, each with `quantity(units ordered in all)` in stock.
///
/// A stock code is taken as the file has it, without white space at its ends. Codes that differ only by case (149 pairs
/// in the file this was made for, such as `85123A` and `85123a`) stay two products: the shop's file says two, and to
/// merge them would be a guess. Codes that are no goods (`POST`, `M`, …) are products like any other.
///
/// # Errors
/// The file cannot be read, or is no retail CSV.
pub fn catalogue_of(path: impl AsRef<Path>, quantity: impl Fn(u64) -> u32) -> anyhow::Result<Catalogue> {
    let path = path.as_ref();
    let context = || format!("cannot read products from {}", path.display());
    let Source::Csv(file) = Source::open(path).with_context(context)? else {
        return Err(anyhow!("it holds order envelopes, which name no products; give the retail CSV"))
            .with_context(context);
    };
    Ok(Sales::read(file).with_context(context)?.into_products(quantity))
}

type Bytes = Box<dyn BufRead + Send>;

/// A file, unpacked, and what its first text says it is.
enum Source {
    Ndjson(Bytes),
    Csv(Bytes),
}

impl Source {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
        let gzip = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
        let mut file: Bytes =
            if gzip { Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(file))) } else { Box::new(file) };

        if file.fill_buf().context("it begins like gzip, but does not unpack")?.starts_with(b"\xef\xbb\xbf") {
            file.consume(3);
        }
        // The white space that is looked over here is a line end or nothing to both formats. A CSV's lines are counted
        // by its reader, so it gets the blank ones back.
        let mut blank = Vec::new();
        loop {
            let buffer = file.fill_buf()?;
            let Some(first) = buffer.first().copied() else { bail!("the file is empty") };
            if first == b'{' {
                return Ok(Self::Ndjson(Box::new(std::io::Cursor::new(blank).chain(file))));
            }
            if !first.is_ascii_whitespace() {
                return Ok(Self::Csv(Box::new(std::io::Cursor::new(blank).chain(file))));
            }
            if blank.len() as u64 == MAX_LINE_BYTES {
                bail!("the file begins with {MAX_LINE_BYTES} bytes of white space");
            }
            blank.push(first);
            file.consume(1);
        }
    }
}

/// Orders from a file, one at a time.
///
/// After [`NoOrder::Unfit`] the iterator goes on with the next order. An invoice with a line that cannot be one of an order is
/// unfit as a whole: an order without one of its lines is not the order that somebody placed.
pub struct Orders(Kind);

enum Kind {
    Ndjson { file: Bytes, line: u64 },
    Retail { sales: Sales, next: usize },
    Ended,
}

impl std::fmt::Debug for Orders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Orders").field("total", &self.total()).field("skipped", &self.skipped()).finish_non_exhaustive()
    }
}

impl Orders {
    /// Rows of a retail file that became no order line. NDJSON skips nothing: what is not an order is [`NoOrder`].
    #[must_use]
    pub fn skipped(&self) -> Skipped {
        match &self.0 {
            Kind::Retail { sales, .. } => sales.skipped,
            Kind::Ndjson { .. } | Kind::Ended => Skipped::default(),
        }
    }

    /// How many orders there are in all, fit or not, when that is known before the last was read.
    #[must_use]
    pub const fn total(&self) -> Option<usize> {
        match &self.0 {
            Kind::Retail { sales, .. } => Some(sales.invoices.len()),
            Kind::Ndjson { .. } | Kind::Ended => None,
        }
    }

    /// The orders, for commands that only need some: what cannot be one is told and passed over.
    pub fn fit(self) -> impl Iterator<Item = Result<Envelope<OrderCreated>, NoOrder>> + Send {
        self.filter(|order| match order {
            Err(unfit @ NoOrder::Unfit { .. }) => {
                output::tell(format_args!("skipped: {unfit}"));
                false
            }
            _ => true,
        })
    }
}

impl Iterator for Orders {
    type Item = Result<Envelope<OrderCreated>, NoOrder>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Kind::Retail { sales, next } => {
                let order = sales.order(*next)?;
                *next += 1;
                Some(order)
            }
            Kind::Ndjson { file, line } => match next_envelope(file, line) {
                Ok(order) => order,
                Err(source) => {
                    let line = *line;
                    self.0 = Kind::Ended;
                    Some(Err(NoOrder::Unreadable { line, source }))
                }
            },
            Kind::Ended => None,
        }
    }
}

/// The next line that is not blank, decoded. The outer error is of the file, the inner of the line.
fn next_envelope(
    file: &mut impl BufRead,
    line: &mut u64,
) -> std::io::Result<Option<Result<Envelope<OrderCreated>, NoOrder>>> {
    let mut bytes = Vec::new();
    let unfit = |line: u64, problem: String| NoOrder::Unfit { what: format!("line {line}"), problem };
    loop {
        *line += 1;
        bytes.clear();
        file.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        if bytes.len() as u64 == MAX_LINE_BYTES && !bytes.ends_with(b"\n") {
            file.skip_until(b'\n')?;
            let problem = format!("has more than {MAX_LINE_BYTES} bytes; write one order per line");
            return Ok(Some(Err(unfit(*line, problem))));
        }
        let text = bytes.trim_ascii();
        if !text.is_empty() {
            let order = decode(ContentType::Json, text);
            return Ok(Some(order.map_err(|problem| unfit(*line, format!("is no order: {problem}")))));
        }
    }
}

/// One row of the file that counts.
#[derive(Clone, Copy)]
struct Sale {
    /// Index among [`Sales::invoices`].
    invoice: u32,
    /// Index among [`Sales::products`].
    product: u32,
    /// Units.
    quantity: LineQuantity,
}

/// What is known of an invoice besides its lines.
struct Invoice {
    number: Box<str>,
    customer: Option<CustomerId>,
    at: Option<Timestamp>,
    /// Why it cannot be an order, by its first line that cannot be one of an order.
    unfit: Option<Box<str>>,
    /// Where its lines begin in [`Sales::sales`] once grouped; they end where the next invoice's begin.
    begin: usize,
}

/// What is known of a product besides its sales.
struct Product {
    sku: Sku,
    name: Option<Box<str>>,
    line: u64,
}

/// A retail file, read and grouped.
struct Sales {
    invoices: Vec<Invoice>,
    products: Vec<Product>,
    /// By invoice, in the order of the file within each.
    sales: Vec<Sale>,
    skipped: Skipped,
}

/// Where each column stands in a row.
struct Columns {
    invoice: usize,
    code: usize,
    description: Option<usize>,
    quantity: usize,
    date: usize,
    customer: Option<usize>,
    /// Cells of the header.
    width: usize,
}

impl Columns {
    fn of(header: &ByteRecord) -> anyhow::Result<Self> {
        let position = |name: &str| {
            header.iter().position(|cell| {
                // The same data is also around with `Customer ID` and the like.
                let plain = cell.iter().filter(|byte| !byte.is_ascii_whitespace());
                plain.copied().map(|byte| byte.to_ascii_lowercase()).eq(name.bytes().map(|b| b.to_ascii_lowercase()))
            })
        };
        let needed = |name: &str| {
            position(name).with_context(|| {
                let cells: Vec<_> = header.iter().map(String::from_utf8_lossy).collect();
                format!(
                    "it is neither order envelopes (NDJSON) nor a retail CSV: its header `{}` has no column {name}; \
                     Invoice, StockCode, Quantity and InvoiceDate are needed",
                    excerpt(&cells.join(","))
                )
            })
        };
        Ok(Self {
            invoice: needed("Invoice")?,
            code: needed("StockCode")?,
            description: position("Description"),
            quantity: needed("Quantity")?,
            date: needed("InvoiceDate")?,
            customer: position("CustomerID"),
            width: header.len(),
        })
    }
}

impl Sales {
    fn read(file: impl Read) -> anyhow::Result<Self> {
        let mut csv = csv_reader(file);
        let columns = Columns::of(csv.byte_headers()?)?;
        let mut grouping = Grouping::default();
        let mut record = ByteRecord::new();
        loop {
            match next_record(&mut csv, &mut record) {
                Ok(Some(line)) => grouping.add(&columns, &record, line)?,
                Ok(None) => return Ok(grouping.finish()),
                Err((line, problem)) => bail!("line {line}: {problem}"),
            }
        }
    }

    /// The lines of the invoice at `index`; those of one product are added up where there are too many.
    fn lines(&self, index: usize) -> Result<Vec<(u32, LineQuantity)>, String> {
        let invoice = &self.invoices[index];
        if let Some(problem) = &invoice.unfit {
            return Err(problem.to_string());
        }
        let end = self.invoices.get(index + 1).map_or(self.sales.len(), |next| next.begin);
        let mut lines: Vec<(u32, LineQuantity)> =
            self.sales[invoice.begin..end].iter().map(|sale| (sale.product, sale.quantity)).collect();
        if lines.len() > MAX_ORDER_ITEMS {
            lines = merged(&lines);
        }
        let count = lines.len();
        if count > MAX_ORDER_ITEMS {
            return Err(format!(
                "has {count} lines even with those of one product added up; an order has at most {MAX_ORDER_ITEMS}"
            ));
        }
        Ok(lines)
    }

    /// The order that the invoice at `index` is.
    fn order(&self, index: usize) -> Option<Result<Envelope<OrderCreated>, NoOrder>> {
        let invoice = self.invoices.get(index)?;
        let unfit = |problem| NoOrder::Unfit { what: format!("invoice {}", excerpt(&invoice.number)), problem };
        let lines = match self.lines(index) {
            Ok(lines) => lines,
            Err(problem) => return Some(Err(unfit(problem))),
        };
        let item = |(product, quantity): (u32, LineQuantity)| {
            let sku = &self.products[product as usize].sku;
            OrderItem { product_id: product_id(sku), sku: Some(sku.clone()), quantity }
        };
        let items = OrderItems::new(lines.into_iter().map(item).collect());
        let (Some(items), Some(at)) = (items, invoice.at) else {
            return Some(Err(unfit("has no line that sells anything".to_owned())));
        };
        let order_id = OrderId(derived_id("order", &invoice.number));
        let event_id = EventId(Uuid::new_v5(&order_id.0, b"order-created"));
        Some(Ok(Envelope::new(event_id, at, OrderCreated { order_id, customer_id: invoice.customer, items })))
    }

    fn into_products(self, quantity: impl Fn(u64) -> u32) -> Catalogue {
        let unfit: HashMap<u32, NoOrder> = (0..self.invoices.len())
            .filter_map(|index| Some((u32::try_from(index).ok()?, self.order(index)?.err()?)))
            .collect();
        let mut ordered = vec![0_u64; self.products.len()];
        let mut orders = vec![0_u64; self.products.len()];
        let mut last_invoice = vec![u32::MAX; self.products.len()];
        for sale in self.sales.iter().filter(|sale| !unfit.contains_key(&sale.invoice)) {
            let product = sale.product as usize;
            ordered[product] += u64::from(sale.quantity.get());
            // Sales are grouped by invoice, so the same product in the same invoice is seen one after another.
            if std::mem::replace(&mut last_invoice[product], sale.invoice) != sale.invoice {
                orders[product] += 1;
            }
        }
        let counts = ordered.into_iter().zip(orders);
        let with_counts = |(product, (ordered, orders)): (Product, (u64, u64))| {
            let name = product.name.unwrap_or_else(|| product.sku.as_str().into());
            let quantity = quantity(ordered).min(MAX_STOCK);
            let row = Row { line: product.line, sku: product.sku, name, category: None, quantity, threshold: None };
            RetailProduct { row, ordered, orders }
        };
        let products = self.products.into_iter().zip(counts).map(with_counts).collect();
        let mut unfit: Vec<(u32, NoOrder)> = unfit.into_iter().collect();
        unfit.sort_by_key(|(invoice, _)| *invoice);
        Catalogue { products, skipped: self.skipped, unfit: unfit.into_iter().map(|(_, unfit)| unfit).collect() }
    }
}

/// Adds up the lines of each product, as far as one line may go.
fn merged(lines: &[(u32, LineQuantity)]) -> Vec<(u32, LineQuantity)> {
    let mut merged: Vec<(u32, LineQuantity)> = Vec::new();
    let mut open: HashMap<u32, usize> = HashMap::new();
    for &(product, quantity) in lines {
        let line = open.get(&product).copied();
        let sum = line.and_then(|line| LineQuantity::new(merged[line].1.get() + quantity.get()));
        if let (Some(line), Some(sum)) = (line, sum) {
            merged[line].1 = sum;
        } else {
            open.insert(product, merged.len());
            merged.push((product, quantity));
        }
    }
    merged
}

/// The file while it is read.
#[derive(Default)]
struct Grouping {
    sales: Vec<Sale>,
    invoices: Vec<Invoice>,
    invoice_by_number: HashMap<Box<str>, u32>,
    products: Vec<Product>,
    product_by_code: HashMap<Box<str>, u32>,
    skipped: Skipped,
}

impl Grouping {
    fn add(&mut self, columns: &Columns, record: &ByteRecord, line: u64) -> anyhow::Result<()> {
        if record.iter().all(|cell| cell.trim_ascii().is_empty()) {
            return Ok(());
        }
        match Self::text(record, columns.invoice) {
            Some(invoice) if invoice.starts_with(CANCELLED) => self.skipped.cancelled += 1,
            Some(invoice) => match Self::quantity(record, columns) {
                Ok(quantity) if quantity <= 0 => self.skipped.not_positive += 1,
                Ok(quantity) => {
                    let invoice = self.invoice(columns, record, invoice)?;
                    let quantity = u32::try_from(quantity).ok().and_then(LineQuantity::new);
                    match quantity {
                        Some(quantity) => {
                            if let Err(problem) = self.sold(columns, record, line, invoice, quantity)? {
                                self.unfit(invoice, line, &problem);
                                self.unreadable(line);
                            }
                        }
                        None => {
                            let asked = excerpt(Self::text(record, columns.quantity).unwrap_or_default());
                            let problem = format!("asks for {asked} units, and a line has at most {MAX_LINE_QUANTITY}");
                            self.unfit(invoice, line, &problem);
                            self.skipped.too_large += 1;
                        }
                    }
                }
                Err(problem) => {
                    let invoice = self.invoice(columns, record, invoice)?;
                    self.unfit(invoice, line, &problem);
                    self.unreadable(line);
                }
            },
            None => self.unreadable(line),
        }
        // Indexes are 32 bits wide; a file that large would need 50 GB here.
        anyhow::ensure!(self.sales.len() < u32::MAX as usize, "the file has more than {} lines", u32::MAX);
        Ok(())
    }

    const fn unreadable(&mut self, line: u64) {
        self.skipped.unreadable += 1;
        if self.skipped.first_unreadable.is_none() {
            self.skipped.first_unreadable = Some(line);
        }
    }

    /// The cell, if it is text and not blank.
    fn text(record: &ByteRecord, column: usize) -> Option<&str> {
        std::str::from_utf8(record.get(column)?).ok().map(str::trim).filter(|text| !text.is_empty())
    }

    /// What the row says of units; or what is wrong with that, or with the row as a whole.
    fn quantity(record: &ByteRecord, columns: &Columns) -> Result<i64, String> {
        // After a comma in a value that is not in quotes, each cell is something else.
        if let Some(problem) = surplus(record, columns.width) {
            return Err(format!("is not what it seems: {problem}"));
        }
        let quantity = Self::text(record, columns.quantity).ok_or("has no quantity")?;
        quantity.parse().map_err(|_| format!("has the quantity `{}`, which is no whole number", excerpt(quantity)))
    }

    /// The index of the row's invoice, which may be new.
    fn invoice(&mut self, columns: &Columns, record: &ByteRecord, number: &str) -> anyhow::Result<u32> {
        let customer = columns.customer.and_then(|column| Self::text(record, column));
        let customer_id = || customer.map(|customer| CustomerId(derived_id("customer", customer)));
        if let Some(&index) = self.invoice_by_number.get(number) {
            let known = &mut self.invoices[index as usize];
            known.customer = known.customer.or_else(customer_id);
            return Ok(index);
        }
        let index = u32::try_from(self.invoices.len()).context("the file has too many invoices")?;
        let customer = customer_id();
        self.invoices.push(Invoice { number: number.into(), customer, at: None, unfit: None, begin: 0 });
        self.invoice_by_number.insert(number.into(), index);
        Ok(index)
    }

    fn unfit(&mut self, invoice: u32, line: u64, problem: &str) {
        self.invoices[invoice as usize]
            .unfit
            .get_or_insert_with(|| format!("cannot be an order: line {line} {problem}").into());
    }

    /// Takes one line into its invoice; the inner error is why its code or date has no sense.
    fn sold(
        &mut self,
        columns: &Columns,
        record: &ByteRecord,
        line: u64,
        invoice: u32,
        quantity: LineQuantity,
    ) -> anyhow::Result<Result<(), String>> {
        let Some(code) = Self::text(record, columns.code) else { return Ok(Err("has no stock code".to_owned())) };
        let product = self.product_by_code.get(code).copied();
        let known = &mut self.invoices[invoice as usize];
        if known.at.is_none() {
            let date = Self::text(record, columns.date).unwrap_or_default();
            match PrimitiveDateTime::parse(date, INVOICE_DATE) {
                Ok(at) => known.at = Some(at.assume_utc().into()),
                Err(_) => {
                    let date = excerpt(date);
                    return Ok(Err(format!("has the date `{date}`, and one looks like 2009-12-01 07:45:00")));
                }
            }
        }
        let product = match product {
            Some(product) => product,
            None => {
                let sku: Sku = match text::sku(code) {
                    Ok(sku) => sku,
                    Err(problem) => return Ok(Err(format!("has the stock code `{}`: {problem}", excerpt(code)))),
                };
                let index = u32::try_from(self.products.len()).context("the file has too many products")?;
                self.products.push(Product { sku, name: None, line });
                self.product_by_code.insert(code.into(), index);
                index
            }
        };
        let name = &mut self.products[product as usize].name;
        if name.is_none() {
            *name = columns.description.and_then(|column| record.get(column)).and_then(clean_name);
        }
        self.sales.push(Sale { invoice, product, quantity });
        Ok(Ok(()))
    }

    fn finish(mut self) -> Sales {
        // Stable: lines keep the order of the file within their invoice. Mostly sorted already, so it is quick.
        self.sales.sort_by_key(|sale| sale.invoice);
        let mut next = 0;
        // An unfit invoice may have no line at all.
        for (index, invoice) in self.invoices.iter_mut().enumerate() {
            next += self.sales[next..].iter().take_while(|sale| (sale.invoice as usize) < index).count();
            invoice.begin = next;
        }
        Sales { invoices: self.invoices, products: self.products, sales: self.sales, skipped: self.skipped }
    }
}

/// A description as a name within the contract's limits, if anything is left of it.
fn clean_name(description: &[u8]) -> Option<Box<str>> {
    let description = String::from_utf8_lossy(description);
    let visible: String =
        description.chars().map(|c| if text::unfit(c).is_some() { ' ' } else { c }).take(MAX_NAME_CHARS).collect();
    text::name(visible.trim()).ok()
}
