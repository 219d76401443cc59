//! CSV files that people made: a header of named columns, and rows of cells under it.
//!
//! The one reader of such files. It assumes nothing about them: they come from spreadsheets, whose ways of damaging a
//! figure on its way into a file are known and refused here with their reason, for each would otherwise become a number or
//! a sku that nobody wrote. A row that is wrong is told with its line, and those after it are read all the same. Memory is
//! one row.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};

use csv::{ByteRecord, ReaderBuilder};
use lomash_contract::limits::MAX_STOCK;

/// Longest row, in bytes. A row holds a few names and short fields; only a missing quote makes one this long.
pub const MAX_ROW_BYTES: u64 = 1 << 20;

/// A row that cannot be used, and all that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct RowError {
    /// The line the row begins on, counted from 1 as an editor does.
    pub line: u64,
    /// What is wrong and how it should be.
    pub problem: String,
}

/// Why a file has no rows that could be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Not even a header.
    #[error("the file is empty; its first line must name the columns: {columns}")]
    Empty {
        /// Those that there can be.
        columns: String,
    },
    /// A column that every row needs.
    #[error(
        "the header has no column {missing}; its first line is `{found}`, but must name the columns, separated by commas: {columns}"
    )]
    Missing {
        /// Their names.
        missing: String,
        /// The header.
        found: String,
        /// Those that there can be.
        columns: String,
    },
    /// The cells are not separated by commas.
    #[error("the cells of the file are separated by {separator}; save it with commas between them: {columns}")]
    OtherSeparator {
        /// By what.
        separator: &'static str,
        /// The columns that there can be.
        columns: String,
    },
    /// A column that is there twice, so that nobody knows which one is meant.
    #[error("the header names the column `{0}` twice; rename or remove one of them")]
    Repeated(&'static str),
    /// The bytes could not be read.
    #[error("the header cannot be read")]
    Unreadable(#[source] csv::Error),
}

/// A CSV file whose header is read.
pub struct CsvFile<R> {
    csv: csv::Reader<Lines<R>>,
    known: &'static [&'static str],
    /// For each known column, where it stands in a row.
    places: Vec<Option<usize>>,
    /// Cells of the header.
    width: usize,
    ignored: Vec<String>,
    /// Where the header has a cell without a name.
    unnamed: Vec<usize>,
    record: ByteRecord,
    ended: bool,
}

impl<R> fmt::Debug for CsvFile<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CsvFile").field("known", &self.known).finish_non_exhaustive()
    }
}

impl<R: Read> CsvFile<R> {
    /// Reads the header of a file that can have the columns `known`, in any order and their names in any case. Columns of
    /// other names are not read ([`CsvFile::ignored`] names them).
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn open(file: R, known: &'static [&'static str]) -> Result<Self, HeaderError> {
        let mut csv = csv_reader(file);
        let header = csv.byte_headers().map_err(HeaderError::Unreadable)?;
        if header.iter().all(|cell| trimmed(cell).is_empty()) {
            return Err(HeaderError::Empty { columns: known.join(",") });
        }
        let width = header.len();
        let mut places = vec![None; known.len()];
        let (mut ignored, mut unnamed) = (Vec::new(), Vec::new());
        for (place, cell) in header.iter().enumerate() {
            let cell = trimmed(cell);
            match known.iter().position(|name| cell.eq_ignore_ascii_case(name.as_bytes())) {
                Some(column) if places[column].is_some() => return Err(HeaderError::Repeated(known[column])),
                Some(column) => places[column] = Some(place),
                None if cell.is_empty() => unnamed.push(place),
                None => ignored.push(excerpt(&String::from_utf8_lossy(cell))),
            }
        }
        if let ([only], true) = (&ignored[..], places.iter().all(Option::is_none)) {
            let names = |separator: char| {
                let named = |cell: &str| known.iter().any(|name| cell.trim().eq_ignore_ascii_case(name));
                only.contains(separator) && only.split(separator).any(named)
            };
            let separators = [(';', "semicolons"), ('\t', "tabs"), ('\u{fffd}', "tabs"), ('|', "bars")];
            if let Some((_, separator)) = separators.into_iter().find(|(separator, _)| names(*separator)) {
                return Err(HeaderError::OtherSeparator { separator, columns: known.join(",") });
            }
        }
        Ok(Self { csv, known, places, width, ignored, unnamed, record: ByteRecord::new(), ended: false })
    }

    /// Asks for columns that every row needs.
    ///
    /// # Errors
    /// [`HeaderError::Missing`].
    pub fn needing(mut self, columns: &[&str]) -> Result<Self, HeaderError> {
        let missing: Vec<String> =
            columns.iter().filter(|name| !self.has(name)).map(|name| format!("`{name}`")).collect();
        if missing.is_empty() {
            return Ok(self);
        }
        let header = self.csv.byte_headers().map_err(HeaderError::Unreadable)?;
        let cells: Vec<_> = header.iter().map(String::from_utf8_lossy).collect();
        let (missing, found, columns) = (missing.join(", "), excerpt(&cells.join(",")), self.known.join(","));
        Err(HeaderError::Missing { missing, found, columns })
    }

    /// Whether the header names this column.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.place(name).is_some()
    }

    /// The columns that are not read, by the names that the header gives them.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.known.iter().zip(&self.places).find(|(known, _)| **known == name).and_then(|(_, place)| *place)
    }

    /// The next row that is not blank; none at the end.
    pub fn next_row(&mut self) -> Option<Result<Cells<'_, R>, RowError>> {
        while !self.ended {
            let line = match next_record(&mut self.csv, &mut self.record) {
                // Spreadsheets write rows of nothing but commas below the last one.
                Ok(Some(_)) if self.record.iter().all(|cell| trimmed(cell).is_empty()) => continue,
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err((line, problem)) => {
                    self.ended = true;
                    return Some(Err(RowError { line, problem: format!("{problem}; nothing after it was read") }));
                }
            };
            return Some(match self.misfit() {
                Some(problem) => Err(RowError { line, problem }),
                None => Ok(Cells { line, file: self }),
            });
        }
        self.ended = true;
        None
    }

    /// What is wrong with the number of cells. Each says what its column says it is, or nobody knows what it is: after a
    /// comma that stands in a value and not in quotes, all of them are something else.
    fn misfit(&self) -> Option<String> {
        if let Some(problem) = surplus(&self.record, self.width) {
            return Some(problem);
        }
        let is_filled = |place: &&usize| self.record.get(**place).is_some_and(|cell| !trimmed(cell).is_empty());
        if let Some(place) = self.unnamed.iter().find(is_filled) {
            let cell = place + 1;
            return Some(format!(
                "the header has no name for cell {cell}; is there a comma in a value that is not in quotes?"
            ));
        }
        let cells = self.record.len();
        let gone = |place: &Option<usize>| place.is_some_and(|place| place >= cells);
        let missing: Vec<String> = self
            .known
            .iter()
            .zip(&self.places)
            .filter(|(_, place)| gone(place))
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        // What a cell says that is read is looked at by whoever reads it. Others may run over lines, but a quote that is not closed
        // takes the rows after it into its cell, where nobody would miss them.
        let is_read = |place: usize| missing.is_empty() && self.places.contains(&Some(place));
        let mut others = self.record.iter().enumerate().filter(|(place, _)| !is_read(*place));
        let unclosed = others.find_map(|(place, cell)| {
            let cell = String::from_utf8_lossy(cell);
            let cell = cell.trim_matches(['\r', '\n']);
            let mut later = cell.split(['\r', '\n']).skip(1);
            let holds_rows = !missing.is_empty() || later.any(|line| line.matches(',').count() + 1 >= self.width);
            let problem = if holds_rows { unclosed(cell) } else { None };
            problem.map(|problem| format!("cell {} {problem}", place + 1))
        });
        if unclosed.is_some() {
            return unclosed;
        }
        let width = self.width;
        (!missing.is_empty()).then(|| {
            format!("the row has {}, the header has {width}: there is no {}", counted(cells), missing.join(", "))
        })
    }
}

/// What is wrong with a row that has more cells than the header; nothing when those beyond it are empty.
#[must_use]
pub fn surplus(record: &ByteRecord, width: usize) -> Option<String> {
    let more = record.iter().skip(width).any(|cell| !trimmed(cell).is_empty());
    more.then(|| {
        let cells = counted(record.len());
        format!("the row has {cells}, the header has {width}; is there a comma in a value that is not in quotes?")
    })
}

/// What is wrong with a cell in which lines end: the rest of a sentence. It is the work of a quote that does not end.
pub(crate) fn unclosed(cell: &str) -> Option<String> {
    let lines = cell.replace("\r\n", "\n").split(['\n', '\r']).count();
    (lines > 1).then(|| format!("runs over {lines} lines; is a closing quote missing?"))
}

fn counted(cells: usize) -> String {
    format!("{cells} {}", if cells == 1 { "cell" } else { "cells" })
}

/// The cells of one row.
#[derive(Debug)]
pub struct Cells<'f, R> {
    /// The line the row begins on, counted from 1 as an editor does.
    pub line: u64,
    file: &'f CsvFile<R>,
}

impl<R: Read> Cells<'_, R> {
    /// The cell in this column without blanks around it; none when the file has no such column.
    ///
    /// # Errors
    /// What is wrong with it: it is not UTF-8, or what a spreadsheet made of something else.
    pub fn get(&self, name: &str) -> Result<Option<&str>, String> {
        let Some(bytes) = self.file.place(name).and_then(|place| self.file.record.get(place)) else { return Ok(None) };
        let text = std::str::from_utf8(bytes).map_err(|_| {
            format!("{name} `{}` is not UTF-8; save the file as UTF-8", excerpt(&String::from_utf8_lossy(bytes)))
        })?;
        let text = text.trim_matches(is_blank);
        match debris(text) {
            Some(problem) => Err(format!("{name} `{}` {problem}", excerpt(text))),
            None => Ok(Some(text)),
        }
    }
}

/// Blanks that may stand around a cell. Not all that Unicode calls white space: what ends a line is no blank of a cell.
fn is_blank(letter: char) -> bool {
    letter == '\t' || (letter.is_whitespace() && !letter.is_control() && !matches!(letter, '\u{2028}' | '\u{2029}'))
}

fn trimmed(cell: &[u8]) -> &[u8] {
    // Nothing but blanks of any kind is nothing.
    match std::str::from_utf8(cell) {
        Ok(text) => text.trim_matches(is_blank).as_bytes(),
        Err(_) => cell.trim_ascii(),
    }
}

/// What a spreadsheet made of a value on its way into a file: the rest of a sentence that says why it is refused.
#[must_use]
pub fn debris(text: &str) -> Option<&'static str> {
    if text.starts_with('=') {
        return Some("is a formula of a spreadsheet; write the value itself, and format the column as text");
    }
    if is_error_value(text) {
        return Some("is an error of a spreadsheet in place of a value");
    }
    if text.len() > 1 && text.bytes().all(|byte| byte == b'#') {
        return Some("is what a spreadsheet shows of a value that is wider than its column");
    }
    is_scientific(text)
        .then_some("is a number as a spreadsheet shortens it, whose digits are lost; format the column as text")
}

/// `#N/A`, `#REF!`, `#DIV/0!`, `#NAME?` and the others, in any language; and `Err:502`.
fn is_error_value(text: &str) -> bool {
    if let Some(rest) = text.strip_prefix('#') {
        let word = rest.trim_end_matches(['!', '?']);
        let is_word = !word.is_empty()
            && word.chars().all(|letter| letter.is_uppercase() || letter.is_ascii_digit() || "/_".contains(letter));
        let is_ended = word.len() < rest.len();
        return is_word && (is_ended || matches!(word, "N/A" | "NA" | "NV" | "N/D" | "GETTING_DATA"));
    }
    text.strip_prefix("Err:").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `1.2E+12`. A sign stands there always, as in no sku such as `12E4`.
fn is_scientific(text: &str) -> bool {
    let Some((mantissa, exponent)) = text.split_once(['E', 'e']) else { return false };
    let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let mantissa = mantissa.strip_prefix(['+', '-']).unwrap_or(mantissa);
    let (whole, fraction) = mantissa.split_once(['.', ',']).unwrap_or((mantissa, "0"));
    all_digits(whole) && all_digits(fraction) && exponent.strip_prefix(['+', '-']).is_some_and(all_digits)
}

/// A whole number of units.
///
/// # Errors
/// Why it is none: the rest of a sentence that begins with the number.
pub fn stock(text: &str) -> Result<u32, String> {
    // Digits only: `parse` alone would also take a plus sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { text.parse().ok() } else { None };
    number.filter(|number| *number <= MAX_STOCK).ok_or_else(|| {
        let rule = format!("is not a whole number from 0 to {MAX_STOCK}");
        if is_separated(text) { format!("{rule}: write it without a separator between its digits") } else { rule }
    })
}

/// Digits with something between them: `1,800`, `1.800`, `1 800`, `1'800`.
fn is_separated(text: &str) -> bool {
    let is_digit = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_digit());
    let between = |letter: char| letter.is_ascii_digit() || letter.is_whitespace() || ".,'’_".contains(letter);
    is_digit(text.chars().next())
        && is_digit(text.chars().next_back())
        && text.chars().all(between)
        && !text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A yes or a no, as spreadsheets and people write it.
///
/// # Errors
/// That it is neither: the rest of a sentence that begins with the text.
pub fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "1" => Ok(true),
        "false" | "no" | "0" => Ok(false),
        _ => Err("is neither `true` nor `false`".to_owned()),
    }
}

/// Most characters of a file's text that an error repeats.
const EXCERPT_CHARS: usize = 60;

/// The beginning of `text`, fit for one line of a terminal.
#[must_use]
pub fn excerpt(text: &str) -> String {
    let visible = |c: char| if lomash_contract::text::unfit(c).is_some() { '\u{fffd}' } else { c };
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
///
/// # Errors
/// The line, and what is wrong there.
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
/// A line ends with LF, with CR and LF, or with CR alone, as those of a record do. The reader's own line of a record does
/// not count the blank lines in front of it.
pub struct Lines<R> {
    file: R,
    /// Bytes handed out.
    offset: u64,
    /// Bytes that may be handed out before the current record must have ended.
    allowed: u64,
    /// The line being handed out, whether anything but its end was seen of it, and whether a CR was the last of it.
    line: u64,
    blank: bool,
    after_cr: bool,
    /// Offset and number of each line that is not blank, from the current record on.
    begun: VecDeque<(u64, u64)>,
}

impl<R> fmt::Debug for Lines<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("line", &self.line).finish_non_exhaustive()
    }
}

impl<R> Lines<R> {
    const fn new(file: R) -> Self {
        let begun = VecDeque::new();
        Self { file, offset: 0, allowed: MAX_ROW_BYTES, line: 1, blank: true, after_cr: false, begun }
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
                // The second half of one end.
                b'\n' if self.after_cr => {}
                b'\n' | b'\r' => {
                    self.line += 1;
                    self.blank = true;
                }
                _ if self.blank => {
                    self.begun.push_back((self.offset, self.line));
                    self.blank = false;
                }
                _ => {}
            }
            self.after_cr = *byte == b'\r';
            self.offset += 1;
        }
        Ok(read)
    }
}

#[cfg(test)]
#[path = "csv_file_tests.rs"]
mod tests;
