//! Tables that fit: columns are wrapped at blanks and never within a word, and a table that is too wide for that is shown row by
//! row, a line a cell.
//!
//! Pure: how wide it may be arrives as an argument. A name or id that is cut can neither be read nor copied, so no width is small
//! enough to do that; a single word that is wider than the terminal goes beyond its edge.

use std::fmt;

use unicode_width::UnicodeWidthStr as _;

/// Blanks beside the text of a cell.
const PADDING: usize = 1;

/// Borders of a line of a table.
const BORDERS: usize = 2;

/// Narrower than this a column of several words is not made: its cells would be read from top to bottom.
const LEAST_PROSE: usize = 12;

/// A cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    text: String,
    is_right: bool,
}

impl Cell {
    /// Any text, on the left. What would do something to a terminal is shown instead.
    #[must_use]
    #[allow(clippy::needless_pass_by_value)]
    pub fn new(text: impl ToString) -> Self {
        let text = text.to_string();
        let text = if text.chars().any(char::is_control) { visible(&text) } else { text };
        Self { text, is_right: false }
    }

    /// The same on the right, for figures.
    #[must_use]
    pub fn right(text: impl ToString) -> Self {
        Self { is_right: true, ..Self::new(text) }
    }

    fn padded(&self, text: &str, width: usize) -> String {
        let blanks = " ".repeat(width.saturating_sub(text.width()));
        if self.is_right { format!("{blanks}{text}") } else { format!("{text}{blanks}") }
    }
}

fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' | '\t' => visible.push(' '),
            letter if letter.is_control() => visible.extend(letter.escape_default()),
            letter => visible.push(letter),
        }
    }
    visible
}

impl<T: ToString> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

/// A table: a header, and rows of as many cells.
#[derive(Clone, Debug, Default)]
pub struct Table {
    header: Vec<Cell>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// One without rows.
    #[must_use]
    pub fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(Cell::new).collect(), rows: Vec::new() }
    }

    /// Adds a row; cells that are missing are empty.
    pub fn add_row<C: Into<Cell>>(&mut self, cells: impl IntoIterator<Item = C>) {
        let mut row: Vec<Cell> = cells.into_iter().map(Into::into).collect();
        row.resize_with(self.header.len(), || Cell::new(""));
        self.rows.push(row);
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table within `width` columns, or as wide as it is.
    #[must_use]
    pub fn within(&self, width: Option<usize>) -> String {
        let lines = match self.columns(width) {
            Some(columns) => self.side_by_side(&columns),
            None => self.row_by_row(width.unwrap_or(usize::MAX)),
        };
        lines.join("\n")
    }

    fn column(&self, index: usize) -> impl Iterator<Item = &Cell> {
        std::iter::once(&self.header).chain(&self.rows).map(move |row| &row[index])
    }

    /// How wide each column is made; none when they do not fit beside each other.
    fn columns(&self, width: Option<usize>) -> Option<Vec<usize>> {
        let count = self.header.len();
        let wanted: Vec<usize> =
            (0..count).map(|index| self.column(index).map(|cell| cell.text.width()).max().unwrap_or(0)).collect();
        let room = width.unwrap_or(usize::MAX).saturating_sub(BORDERS + 2 * PADDING * count);
        if wanted.iter().sum::<usize>() <= room {
            return Some(wanted);
        }
        let longest_word = |cell: &Cell| cell.text.split_whitespace().map(str::width).max().unwrap_or(0);
        let least: Vec<usize> = (0..count)
            .map(|index| {
                let word = self.column(index).map(longest_word).max().unwrap_or(0);
                word.max(LEAST_PROSE.min(wanted[index]))
            })
            .collect();
        share(&wanted, least, room)
    }

    fn side_by_side(&self, columns: &[usize]) -> Vec<String> {
        let inner: usize = columns.iter().map(|width| width + 2 * PADDING).sum();
        let mut lines = vec![format!("┌{}┐", "─".repeat(inner))];
        lines.extend(row(&self.header, columns));
        lines.push(format!("╞{}╡", "═".repeat(inner)));
        lines.extend(self.rows.iter().flat_map(|cells| row(cells, columns)));
        lines.push(format!("└{}┘", "─".repeat(inner)));
        lines
    }

    fn row_by_row(&self, width: usize) -> Vec<String> {
        let label = self.header.iter().map(|title| title.text.width()).max().unwrap_or(0);
        let mut lines = Vec::new();
        for (number, cells) in self.rows.iter().enumerate() {
            if number > 0 {
                lines.push(String::new());
            }
            for (title, cell) in self.header.iter().zip(cells).filter(|(_, cell)| !cell.text.is_empty()) {
                if title.text.is_empty() {
                    lines.extend(wrapped(&cell.text, width));
                    continue;
                }
                let indent = label + 2;
                let (mut first, longest) = (true, cell.text.split_whitespace().map(str::width).max().unwrap_or(0));
                // A word that does not fit beside its title stands below it.
                let indent = if indent + longest <= width {
                    indent
                } else {
                    lines.push(title.text.clone());
                    first = false;
                    if 2 + longest <= width { 2 } else { 0 }
                };
                for part in wrapped(&cell.text, width - indent) {
                    let beside = if std::mem::take(&mut first) { title.text.as_str() } else { "" };
                    let blanks = " ".repeat(indent - beside.width().min(indent));
                    lines.push(format!("{beside}{blanks}{part}"));
                }
            }
        }
        lines
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.within(super::width()))
    }
}

/// Shares `room` among columns that each want so much and bear no less than `least`; none when there is not even room for that.
fn share(wanted: &[usize], least: Vec<usize>, room: usize) -> Option<Vec<usize>> {
    let mut left = room.checked_sub(least.iter().sum())?;
    let mut columns = least;
    // Evenly among those that still want: what a small one does not need goes to the others.
    loop {
        let open: Vec<usize> = (0..columns.len()).filter(|index| columns[*index] < wanted[*index]).collect();
        let each = left / open.len().max(1);
        if open.is_empty() || left == 0 {
            return Some(columns);
        }
        for index in open {
            let more = each.max(1).min(wanted[index] - columns[index]).min(left);
            columns[index] += more;
            left -= more;
        }
    }
}

fn row(cells: &[Cell], columns: &[usize]) -> Vec<String> {
    let parts: Vec<Vec<String>> = cells.iter().zip(columns).map(|(cell, width)| wrapped(&cell.text, *width)).collect();
    let height = parts.iter().map(Vec::len).max().unwrap_or(1);
    let blank = " ".repeat(PADDING);
    (0..height)
        .map(|line| {
            let texts = cells.iter().zip(columns).zip(&parts).map(|((cell, width), parts)| {
                let text = parts.get(line).map_or("", String::as_str);
                format!("{blank}{}{blank}", cell.padded(text, *width))
            });
            format!("│{}│", texts.collect::<String>())
        })
        .collect()
}

/// A line as lines of at most `width` columns, broken at blanks. Its indentation is kept for all of them; a word that is wider
/// stays whole.
#[must_use]
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    if text.width() <= width {
        return vec![text.to_owned()];
    }
    let indent = &text[..text.len() - text.trim_start().len()];
    let indent = if indent.width() * 2 <= width { indent } else { "" };
    let (mut lines, mut line, mut is_begun) = (Vec::new(), indent.to_owned(), false);
    for word in text.split_whitespace() {
        if is_begun && line.width() + 1 + word.width() > width {
            lines.push(std::mem::replace(&mut line, indent.to_owned()));
            is_begun = false;
        }
        if is_begun {
            line.push(' ');
        }
        line.push_str(word);
        is_begun = true;
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Table {
        let mut table = Table::new(&["consumer", "pending", "what it is for"]);
        table.add_row([
            Cell::new("ORDERS/product-orders"),
            Cell::right("1,234"),
            Cell::new("Orders as they were published, to be decided."),
        ]);
        table.add_row([Cell::new("JOBS/snapshots"), Cell::right("0"), Cell::new("Ticks.")]);
        table
    }

    #[test]
    fn without_a_limit_a_row_is_a_line() {
        let expected = "\
┌───────────────────────────────────────────────────────────────────────────────┐
│ consumer               pending  what it is for                                │
╞═══════════════════════════════════════════════════════════════════════════════╡
│ ORDERS/product-orders    1,234  Orders as they were published, to be decided. │
│ JOBS/snapshots               0  Ticks.                                        │
└───────────────────────────────────────────────────────────────────────────────┘";
        assert_eq!(sample().within(None), expected);
        assert_eq!(sample().within(Some(200)), expected);
    }

    #[test]
    fn a_column_is_wrapped_at_blanks() {
        let expected = "\
┌──────────────────────────────────────────────────────────┐
│ consumer               pending  what it is for           │
╞══════════════════════════════════════════════════════════╡
│ ORDERS/product-orders    1,234  Orders as they were      │
│                                 published, to be         │
│                                 decided.                 │
│ JOBS/snapshots               0  Ticks.                   │
└──────────────────────────────────────────────────────────┘";
        assert_eq!(sample().within(Some(60)), expected);
    }

    #[test]
    fn what_does_not_fit_side_by_side_is_shown_row_by_row() {
        let expected = "\
consumer        ORDERS/product-orders
pending         1,234
what it is for  Orders as they were
                published, to be
                decided.

consumer        JOBS/snapshots
pending         0
what it is for  Ticks.";
        assert_eq!(sample().within(Some(40)), expected);
        let expected = "\
consumer
  ORDERS/product-orders
pending         1,234
what it is for  Orders as
                they were
                published,
                to be
                decided.

consumer
  JOBS/snapshots
pending         0
what it is for  Ticks.";
        assert_eq!(sample().within(Some(26)), expected);
    }

    #[test]
    fn what_would_move_the_cursor_is_shown() {
        let mut table = Table::new(&["name"]);
        table.add_row(["a\u{1b}[2Jb\nc"]);
        assert!(table.within(None).contains("│ a\\u{1b}[2Jb c │"), "{table}");
    }

    proptest! {
        /// At any width: no line but those with a word that is wider itself goes beyond it, and every word is there, whole and
        /// in its order.
        #[test]
        fn words_stay_whole(
            rows in proptest::collection::vec(proptest::collection::vec("([a-zé漢-]{1,12} ?){0,6}", 4), 1..5),
            width in 20_usize..120,
        ) {
            let mut table = Table::new(&["sku", "a longer title", "", "why"]);
            for row in &rows {
                table.add_row(row.iter());
            }
            let text = table.within(Some(width));
            for line in text.lines() {
                prop_assert!(line.width() <= width || line.split_whitespace().count() == 1, "{width}:\n{text}");
            }
            let words: Vec<&str> = text.split([' ', '\n', '│']).filter(|word| !word.is_empty()).collect();
            for word in rows.iter().flatten().flat_map(|cell| cell.split_whitespace()) {
                prop_assert!(words.contains(&word), "{word} at {width}:\n{text}");
            }
        }
    }
}
