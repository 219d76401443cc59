//! What is read from files that people and their spreadsheets made, against tables and against a reader that is as simple
//! as can be.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const KNOWN: &[&str] = &["sku", "name", "quantity"];

/// A row's line and its cells.
type Cells = (u64, Vec<Option<String>>);

/// Of each row its line and its cells, or what is wrong with it.
fn read(file: &[u8]) -> Vec<Result<Cells, RowError>> {
    // A byte at a time is the hardest that a reader can be fed.
    struct Slowly<'f>(&'f [u8]);
    impl Read for Slowly<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let some = buffer.len().min(3);
            Read::read(&mut self.0, &mut buffer[..some])
        }
    }
    let mut file = CsvFile::open(Slowly(file), KNOWN).expect("a header");
    let mut rows = Vec::new();
    while let Some(row) = file.next_row() {
        rows.push(row.and_then(|cells| {
            let cell = |name: &&str| cells.get(name).map(|cell| cell.map(str::to_owned));
            let all: Result<Vec<_>, String> = KNOWN.iter().map(cell).collect();
            all.map(|all| (cells.line, all)).map_err(|problem| RowError { line: cells.line, problem })
        }));
    }
    rows
}

#[test]
fn a_row_with_more_cells_than_the_header_is_refused() {
    let file =
        b"sku,name,quantity\nA,thing,1,800\nB,\"19\" rack, black\",5\nC,fine,1,,\nD,fine,\"1,800\", \t\nE,x,5,,y\n";
    let rows = read(file);
    let refused = |cells: &str| {
        format!("the row has {cells} cells, the header has 3; is there a comma in a value that is not in quotes?")
    };
    assert_eq!(rows[0], Err(RowError { line: 2, problem: refused("4") }));
    // A quote within a quoted cell ends it: what follows is a cell of its own.
    assert_eq!(rows[1], Err(RowError { line: 3, problem: refused("4") }));
    assert!(rows[2].is_ok() && rows[3].is_ok(), "{rows:?}");
    assert_eq!(rows[4], Err(RowError { line: 6, problem: refused("5") }));
    let short = read(b"sku,name,quantity\nA,thing\n");
    let problem = "the row has 2 cells, the header has 3: there is no `quantity`".to_owned();
    assert_eq!(short, [Err(RowError { line: 2, problem })]);
}

/// Nobody knows what it is, as of one beyond the header.
#[test]
fn a_cell_under_no_name_is_refused() {
    for (file, cell) in [
        (&b"sku,name,quantity,\nA,thing,1,800\nB,fine,1,\n"[..], 4),
        (b"sku,quantity,,name\nA,1,800,thing\nB,1,,fine\n", 3),
    ] {
        let rows = read(file);
        let problem =
            format!("the header has no name for cell {cell}; is there a comma in a value that is not in quotes?");
        assert_eq!(rows[0], Err(RowError { line: 2, problem }));
        assert!(rows[1].is_ok(), "{rows:?}");
    }
}

/// The rows that such a cell swallows would be missed by nobody, wherever it stands.
#[test]
fn a_quote_that_is_not_closed_is_told_in_any_column() {
    let refused = |line, cell, lines| {
        let problem = format!("cell {cell} runs over {lines} lines; is a closing quote missing?");
        Err(RowError { line, problem })
    };
    let unread = read(b"sku,name,quantity,note\nA,a,5,\"24 inch\nB,b,6,x\nC,c,7,y\n");
    assert_eq!(unread, [refused(2, 4, 3)]);
    let closed = read(b"sku,name,quantity,note\nA,a,5,\"24 inch\nB,b,6,\"\nC,c,7,\"y\"\n");
    assert_eq!(closed[0], refused(2, 4, 2));
    assert!(closed[1].is_ok(), "{closed:?}");
    // What was cut off by it is not all there is to say.
    assert_eq!(read(b"sku,name,quantity\nA,\"a,5\nB,b,6\n"), [refused(2, 2, 2)]);
    for note in ["\" \n\"", "\"mind\n\nthe edge, and the sink\""] {
        let file = format!("sku,name,quantity,note\nA,a,5,{note}\n");
        assert!(read(file.as_bytes())[0].is_ok(), "a note may have lines");
    }
}

#[test]
fn a_number_is_its_digits() {
    for (text, number) in [("0", 0), ("007", 7), ("1000000000", 1_000_000_000)] {
        assert_eq!(stock(text), Ok(number));
    }
    let rule = "is not a whole number from 0 to 1000000000";
    for text in ["", "x", "-1", "+1", "1000000001", "99999999999999999999", "１２", "1e3", "0x10", "1-2", ",1", "1,"]
    {
        assert_eq!(stock(text), Err(rule.to_owned()), "{text}");
    }
    for text in ["1,800", "1.800", "1 800", "1'800", "1’800", "1\u{a0}800", "1\u{202f}800", "1_800", "3.0", "1,2,3"] {
        assert_eq!(stock(text), Err(format!("{rule}: write it without a separator between its digits")), "{text}");
    }
}

#[test]
fn what_spreadsheets_leave_is_no_value() {
    for text in [
        "#N/A",
        "#REF!",
        "#DIV/0!",
        "#VALUE!",
        "#NAME?",
        "#NUM!",
        "#NULL!",
        "#SPILL!",
        "#CALC!",
        "#GETTING_DATA",
        "#NV",
        "#BEZUG!",
        "#ÜBERLAUF!",
        "Err:502",
        "########",
        "=\"00123\"",
        "=A1",
        "=1+1",
        "1.2E+12",
        "1,2E+12",
        "5E-05",
        "1e+3",
    ] {
        assert!(debris(text).is_some(), "{text}");
    }
    for text in ["", "#1 Widget", "#", "#REF", "12E4", "1E5", "E+5", "A=B", "Err:", "Error", "1.2E12", "# N/A", "#a!"] {
        assert_eq!(debris(text), None, "{text}");
    }
    let rows = read(b"sku,name,quantity\n#N/A,x,1\nA,\"=\"\"00123\"\"\",1\nB,x,#REF!\n1.2E+12,x,1\n");
    let problems: Vec<_> = rows.iter().map(|row| row.as_ref().expect_err("refused").problem.clone()).collect();
    assert_eq!(problems[0], "sku `#N/A` is an error of a spreadsheet in place of a value");
    assert!(problems[1].starts_with("name `=\"00123\"` is a formula of a spreadsheet"), "{problems:?}");
    assert!(problems[2].starts_with("quantity `#REF!`") && problems[3].starts_with("sku `1.2E+12`"), "{problems:?}");
}

#[test]
fn lines_end_with_lf_with_cr_or_with_both() {
    let rows = |file: &str| -> Vec<u64> {
        read(file.as_bytes()).into_iter().map(|row| row.map_or_else(|bad| bad.line, |(line, _)| line)).collect()
    };
    for end in ["\n", "\r", "\r\n"] {
        assert_eq!(
            rows(&["sku,name,quantity", "K,one,5", "", "L,\"two", "", "lines\",5", "M,x,5,9", "N,y,1"].join(end)),
            [2, 4, 7, 8]
        );
    }
    assert_eq!(
        rows("sku,name,quantity\rK,one,5\nL,two,5\r\nM,three,5\r\rN,four,5\n\nO,five,5\n\rP,six,6"),
        [2, 3, 4, 6, 8, 10]
    );
}

#[test]
fn headers_say_what_they_lack() {
    let problem = |file: &str| {
        CsvFile::open(file.as_bytes(), KNOWN).and_then(|file| file.needing(&["sku"])).expect_err(file).to_string()
    };
    let columns = "sku,name,quantity";
    for (file, expected) in [
        ("", format!("the file is empty; its first line must name the columns: {columns}")),
        ("\u{feff}\n\n", format!("the file is empty; its first line must name the columns: {columns}")),
        (
            "sku;name;quantity\n",
            format!("the cells of the file are separated by semicolons; save it with commas between them: {columns}"),
        ),
        (
            "sku\tname\n",
            format!("the cells of the file are separated by tabs; save it with commas between them: {columns}"),
        ),
        ("sku,SKU\n", "the header names the column `sku` twice; rename or remove one of them".to_owned()),
        (
            "name,price\n",
            format!(
                "the header has no column `sku`; its first line is `name,price`, but must name the columns, separated by commas: {columns}"
            ),
        ),
    ] {
        assert_eq!(problem(file), expected);
    }
    let file = CsvFile::open(&b"\xef\xbb\xbfSKU, price ,,nam\n"[..], KNOWN).expect("a header");
    assert_eq!(file.ignored(), ["price", "nam"]);
}

/// Reads cells character by character, with no buffer, no state kept between calls and nothing else that could go wrong.
fn naive(text: &str) -> Vec<(u64, Vec<String>)> {
    let letters: Vec<char> = text.chars().collect();
    let (mut rows, mut at, mut line) = (Vec::new(), 0, 1);
    while at < letters.len() {
        let (mut cells, mut cell, begun) = (Vec::new(), String::new(), line);
        let (mut quoted, mut at_begin) = (false, true);
        loop {
            let letter = letters.get(at).copied();
            let next = letters.get(at + 1).copied();
            at += 1;
            let is_end = matches!(letter, Some('\n' | '\r'));
            if is_end && !(letter == Some('\r') && next == Some('\n')) {
                line += 1;
            }
            match letter {
                None => break,
                Some('"') if quoted && next == Some('"') => {
                    cell.push('"');
                    at += 1;
                }
                Some('"') if quoted => quoted = false,
                Some('"') if at_begin => quoted = true,
                Some(letter) if quoted => cell.push(letter),
                Some(',') => {
                    cells.push(std::mem::take(&mut cell));
                    at_begin = true;
                    continue;
                }
                Some('\r') if next == Some('\n') => {
                    at += 1;
                    line += 1;
                    break;
                }
                Some('\n' | '\r') => break,
                Some(letter) => cell.push(letter),
            }
            at_begin = false;
        }
        cells.push(cell);
        if cells.iter().any(|cell| !cell.trim_matches(is_blank).is_empty()) {
            rows.push((begun, cells));
        }
    }
    rows
}

proptest! {
    /// Any text that is well quoted is read as the naive reader reads it, in lines and cells.
    #[test]
    fn cells_and_lines_are_those_of_a_naive_reader(
        pieces in vec(select(vec!["a", "ü", "1", " ", ",", "\"", "\"\"", "\n", "\r", "\r\n", "\"x,y\"", "\"p\nq\""]), 0..60)
    ) {
        let text = format!("sku,name,quantity\n{}", pieces.concat());
        let expected: Vec<_> = naive(&text).into_iter().skip(1).collect();
        let found = read(text.as_bytes());
        prop_assert_eq!(found.len(), expected.len(), "{:?}", text);
        for (found, (line, cells)) in found.iter().zip(&expected) {
            let surplus = cells.iter().skip(3).any(|cell| !cell.trim_matches(is_blank).is_empty());
            match found {
                Ok((at, found)) => {
                    prop_assert!(!surplus && cells.len() >= 3);
                    prop_assert_eq!(at, line);
                    let cells: Vec<_> = cells.iter().take(3).map(|cell| Some(cell.trim_matches(is_blank).to_owned())).collect();
                    prop_assert_eq!(found, &cells, "{:?}", text);
                }
                Err(RowError { line: at, .. }) => {
                    prop_assert_eq!(at, line, "{:?}", text);
                    prop_assert!(surplus || cells.len() < 3, "{:?}", text);
                }
            }
        }
    }

    /// No bytes break the reader, and no row is told with a line that the file does not have.
    #[test]
    fn any_bytes_are_read_to_their_end(bytes in vec(any::<u8>(), 0..400)) {
        let file = [&b"sku,name,quantity\n"[..], &bytes].concat();
        let lines = 1 + file.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count() as u64;
        let mut last = 1;
        for row in read(&file) {
            let line = row.map_or_else(|bad| bad.line, |(line, _)| line);
            prop_assert!(last < line && line <= lines);
            last = line;
        }
    }
}
