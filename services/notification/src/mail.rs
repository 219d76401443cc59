//! What a mail says: headers, text and HTML of the same content.
//!
//! Names and skus are whatever somebody once registered. They are never part of a header's syntax, are escaped in HTML, and
//! lose what could make a text look like another one (control characters and marks of direction).

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lettre::address::Envelope;
use lettre::message::header::{HeaderName, HeaderValue};
use lettre::message::{Mailbox, Mailboxes, MultiPart};
use lettre::{Address, Message};
use lomash_contract::{ProductId, Timestamp};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::alerts::{Mail, Told};

/// Longest part of a name that a subject shows, in characters.
const MAX_SUBJECT_NAME_CHARS: usize = 80;

/// Dates that a mail can show: what is before or after was made with a wrong clock.
const LAST_DATE: Duration = Duration::from_secs(253_000_000_000);

/// Who writes to whom, and where a product is shown.
#[derive(Clone, Debug)]
pub struct Letterhead {
    /// The sender.
    pub from: Mailbox,
    /// The recipients; one or more.
    pub to: Mailboxes,
    /// What a product's id is put behind to make a link.
    pub link_base: String,
}

/// A mail ready to be sent.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its Message-ID, the same at every attempt.
    pub message_id: String,
    /// Sender and recipients as the server hears them.
    pub envelope: Envelope,
    /// Headers and body; ASCII only.
    pub text: String,
}

/// Writes a mail.
///
/// # Errors
/// A sentence, for a letterhead that names nobody.
pub fn write(letterhead: &Letterhead, mail_id: Uuid, mail: &Mail) -> Result<Written, String> {
    let (subject, date, text, html) = match mail {
        Mail::Alert(told) => {
            (subject(told), told.occurred_at, alert_text(letterhead, told), alert_html(letterhead, told))
        }
        Mail::Digest { alerts, total, closed_at } => {
            let lines = digest(alerts);
            let products = lines.len();
            let subject =
                format!("Low stock: {products} {} became low", if products == 1 { "product" } else { "products" });
            let more = total.saturating_sub(alerts.len() as u64);
            (subject, *closed_at, digest_text(letterhead, &lines, more), digest_html(letterhead, &lines, more))
        }
    };
    let message_id = format!("<{mail_id}@{}>", letterhead.from.email.domain());
    let mut message = Message::builder()
        .from(letterhead.from.clone())
        .raw_header(unstructured("Subject", &subject))
        .date(date_of(date))
        .message_id(Some(message_id.clone()))
        // Nobody's out-of-office should answer it (RFC 3834).
        .raw_header(HeaderValue::new(HeaderName::new_from_ascii_str("Auto-Submitted"), "auto-generated".to_owned()));
    for recipient in letterhead.to.clone() {
        message = message.to(recipient);
    }
    let message =
        message.multipart(MultiPart::alternative_plain_html(text, html)).map_err(|problem| problem.to_string())?;
    let recipients: Vec<Address> = letterhead.to.iter().map(|recipient| recipient.email.clone()).collect();
    let envelope =
        Envelope::new(Some(letterhead.from.email.clone()), recipients).map_err(|problem| problem.to_string())?;
    let text = String::from_utf8(message.formatted()).map_err(|problem| problem.to_string())?;
    if !text.is_ascii() {
        return Err("its encoding is not ASCII".to_owned());
    }
    Ok(Written { message_id, envelope, text })
}

/// Longest text of an encoded word before it is encoded, in bytes: with base64 and what stands around it, a word has at most
/// 75 characters (RFC 2047).
const MAX_ENCODED_BYTES: usize = 45;

/// A header of free text. Whatever a reader would decode is encoded whole, also what only looks as if it were encoded:
/// `=?utf-8?q?=0D=0ABcc:?=` in a name is those characters.
fn unstructured(name: &'static str, text: &str) -> HeaderValue {
    let header = HeaderName::new_from_ascii_str(name);
    if text.is_ascii() && !text.contains("=?") {
        return HeaderValue::new(header, text.to_owned());
    }
    let mut words: Vec<String> = Vec::new();
    let mut word = String::new();
    for letter in text.chars() {
        if word.len() + letter.len_utf8() > MAX_ENCODED_BYTES {
            words.push(std::mem::take(&mut word));
        }
        word.push(letter);
    }
    words.push(word);
    let encoded: Vec<String> = words.iter().map(|word| format!("=?utf-8?B?{}?=", STANDARD.encode(word))).collect();
    // Blanks between encoded words are not shown.
    HeaderValue::dangerous_new_pre_encoded(header, text.to_owned(), encoded.join("\r\n "))
}

fn date_of(at: OffsetDateTime) -> SystemTime {
    let seconds = u64::try_from(at.unix_timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds).min(LAST_DATE)
}

/// What could change how the text around it looks is left out.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().filter(|letter| is_plain(*letter)).try_for_each(|letter| f.write_char(letter))
    }
}

fn is_plain(letter: char) -> bool {
    // What is refused at the door today; the ledger has texts of before.
    lomash_contract::text::unfit(letter).is_none()
}

/// Text in HTML, also within a quoted attribute.
struct Html<'a>(&'a str);

impl fmt::Display for Html<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().filter(|letter| is_plain(*letter)).try_for_each(|letter| match letter {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            other => f.write_char(other),
        })
    }
}

fn subject(told: &Told) -> String {
    let name: String = told.name.chars().filter(|letter| is_plain(*letter)).take(MAX_SUBJECT_NAME_CHARS).collect();
    let sku = Plain(&told.sku);
    match (told.is_low, told.quantity) {
        (false, quantity) => format!("Stock recovered: {name} ({sku}), {quantity} in stock"),
        (true, 0) => format!("Out of stock: {name} ({sku})"),
        (true, quantity) => format!("Low stock: {name} ({sku}), {quantity} left"),
    }
}

fn cause(told: &Told) -> String {
    match (told.trigger.as_str(), told.order_id) {
        ("ORDER_CONFIRMED", Some(order)) => format!("order {order}"),
        ("ADMIN_UPDATE", _) if told.updated_by == "system" => "a change by the system".to_owned(),
        ("ADMIN_UPDATE", _) => format!("a change by the admin {}", told.updated_by),
        ("SCHEDULED_SYNC", _) => "a correction by reconciliation".to_owned(),
        (trigger, _) => trigger.to_owned(),
    }
}

fn link(letterhead: &Letterhead, product: ProductId) -> String {
    format!("{}{product}", letterhead.link_base)
}

fn facts(letterhead: &Letterhead, told: &Told) -> [(&'static str, String); 8] {
    [
        ("Product", told.name.clone()),
        ("SKU", told.sku.clone()),
        ("In stock", format!("{} (before: {})", told.quantity, told.previous_quantity)),
        ("Threshold", told.threshold.to_string()),
        ("Caused by", cause(told)),
        ("When", Timestamp::new(told.occurred_at).to_string()),
        ("Event", told.caused_by.to_string()),
        ("Link", link(letterhead, told.product_id)),
    ]
}

fn alert_text(letterhead: &Letterhead, told: &Told) -> String {
    let headline = if told.is_low { "Stock is low." } else { "Stock is above its threshold again." };
    let mut text = format!("{headline}\n\n");
    for (name, value) in facts(letterhead, told) {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{name:<10} {}", Plain(&value));
    }
    text
}

fn alert_html(letterhead: &Letterhead, told: &Told) -> String {
    let headline = if told.is_low { "Stock is low" } else { "Stock is above its threshold again" };
    let mut rows = String::new();
    for (name, value) in facts(letterhead, told) {
        let value = match name {
            "Link" => format!("<a href=\"{0}\">{0}</a>", Html(&value)),
            _ => Html(&value).to_string(),
        };
        let _ = writeln!(rows, "<tr><th align=\"left\">{name}</th><td>{value}</td></tr>");
    }
    page(headline, &format!("<table cellpadding=\"4\">\n{rows}</table>"))
}

/// A product in a digest: its newest alert, and how many there were.
struct Line<'m> {
    newest: &'m Told,
    alerts: u64,
}

/// One line a product, in the order of the first alert; `alerts` are from the newest to the oldest.
fn digest(alerts: &[Told]) -> Vec<Line<'_>> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for told in alerts {
        let place = *places.entry(told.product_id).or_insert_with(|| {
            lines.push(Line { newest: told, alerts: 0 });
            lines.len() - 1
        });
        lines[place].alerts += 1;
    }
    lines.reverse();
    lines
}

fn digest_text(letterhead: &Letterhead, lines: &[Line<'_>], more: u64) -> String {
    let mut text = "What became low since the last mail:\n\n".to_owned();
    for Line { newest, alerts } in lines {
        let _ = writeln!(
            text,
            "{} ({}): {} left, threshold {}, {alerts} {}, last by {} at {}\n  {}",
            Plain(&newest.name),
            Plain(&newest.sku),
            newest.quantity,
            newest.threshold,
            if *alerts == 1 { "change" } else { "changes" },
            cause(newest),
            Timestamp::new(newest.occurred_at),
            link(letterhead, newest.product_id),
        );
    }
    if more > 0 {
        let _ = writeln!(text, "\n{more} more changes are not listed.");
    }
    text
}

fn digest_html(letterhead: &Letterhead, lines: &[Line<'_>], more: u64) -> String {
    let mut rows = String::new();
    for Line { newest, alerts } in lines {
        let _ = writeln!(
            rows,
            "<tr><td><a href=\"{}\">{}</a></td><td>{}</td><td align=\"right\">{}</td><td align=\"right\">{}</td>\
             <td align=\"right\">{alerts}</td><td>{}</td><td>{}</td></tr>",
            Html(&link(letterhead, newest.product_id)),
            Html(&newest.name),
            Html(&newest.sku),
            newest.quantity,
            newest.threshold,
            Html(&cause(newest)),
            Timestamp::new(newest.occurred_at),
        );
    }
    let more = if more > 0 { format!("<p>{more} more changes are not listed.</p>") } else { String::new() };
    let heads = ["Product", "SKU", "In stock", "Threshold", "Changes", "Last caused by", "When"];
    let heads: String = heads.iter().map(|head| format!("<th align=\"left\">{head}</th>")).collect();
    page(
        "What became low since the last mail",
        &format!("<table cellpadding=\"4\">\n<tr>{heads}</tr>\n{rows}</table>{more}"),
    )
}

fn page(headline: &str, content: &str) -> String {
    format!("<!doctype html>\n<html lang=\"en\"><body>\n<h2>{headline}</h2>\n{content}\n</body></html>\n")
}

#[cfg(test)]
mod tests {
    use lomash_contract::{EventId, OrderId};

    use super::*;

    fn letterhead() -> Letterhead {
        Letterhead {
            from: "Lomash Inventory <inventory@lomash.example>".parse().expect("a mailbox"),
            to: "Kitchens <a@lomash.example>, b@lomash.example".parse().expect("mailboxes"),
            link_base: "https://shop.example/products/".to_owned(),
        }
    }

    fn told(name: &str, sku: &str) -> Told {
        Told {
            caused_by: EventId(Uuid::from_u128(1)),
            is_low: true,
            product_id: ProductId(Uuid::from_u128(2)),
            sku: sku.to_owned(),
            name: name.to_owned(),
            previous_quantity: 5,
            quantity: 2,
            threshold: 3,
            trigger: "ORDER_CONFIRMED".to_owned(),
            order_id: Some(OrderId(Uuid::from_u128(3))),
            updated_by: "system".to_owned(),
            occurred_at: time::macros::datetime!(2026-01-31 09:30 UTC),
            traceparent: None,
            tracestate: None,
        }
    }

    fn written(told: Told) -> String {
        let written = write(&letterhead(), Uuid::from_u128(1), &Mail::Alert(told)).expect("written");
        assert_eq!(written.envelope.to().len(), 2);
        written.text
    }

    /// The headers without their folding, one a line.
    fn headers(mail: &str) -> Vec<String> {
        let (head, _) = mail.split_once("\r\n\r\n").expect("a body");
        head.replace("\r\n ", " ").split("\r\n").map(str::to_owned).collect()
    }

    #[test]
    fn a_mail_says_all_there_is_to_know() {
        let mail = written(told("Oak sink", "SINK-1"));
        // Quoted-printable, as far as ASCII needs it.
        let readable = mail.replace("=\r\n", "").replace("=3D", "=");
        let headers = headers(&mail);
        for header in [
            "Subject: Low stock: Oak sink (SINK-1), 2 left",
            "Date: Sat, 31 Jan 2026 09:30:00 +0000",
            "Message-ID: <00000000-0000-0000-0000-000000000001@lomash.example>",
            "Auto-Submitted: auto-generated",
            "From: \"Lomash Inventory\" <inventory@lomash.example>",
        ] {
            assert!(headers.contains(&header.to_owned()), "{header} is missing in {headers:#?}");
        }
        for fact in [
            "Oak sink",
            "SINK-1",
            "2 (before: 5)",
            "order 00000000-0000-0000-0000-000000000003",
            "2026-01-31T09:30:00.000Z",
        ] {
            assert!(readable.matches(fact).count() >= 2, "{fact} is missing in text or HTML of\n{mail}");
        }
        assert!(mail.contains("text/plain") && mail.contains("text/html") && mail.contains("multipart/alternative"));
        assert!(readable.contains("https://shop.example/products/00000000-0000-0000-0000-000000000002"), "{mail}");
    }

    #[test]
    fn no_name_becomes_a_header_or_a_tag() {
        let hostile = [
            "x\r\nBcc: victim@example.com\r\n\r\nbody",
            "</td><script>alert(1)</script>&\"'",
            "\u{202e}knis\u{2028}\u{85}\u{0}",
            "=?utf-8?q?=0d=0aBcc:_victim@example.com?=",
            &"ü".repeat(200),
        ];
        let names = headers(&written(told("plain", "SKU")))
            .iter()
            .map(|line| line.split(':').next().map(str::to_owned))
            .collect::<Vec<_>>();
        for name in hostile {
            let mail = written(told(name, name));
            let found: Vec<_> = headers(&mail).iter().map(|line| line.split(':').next().map(str::to_owned)).collect();
            assert_eq!(found, names, "{name:?}: {mail}");
            assert!(mail.is_ascii() && mail.lines().all(|line| line.len() <= 998), "{mail}");
        }
        let html = alert_html(&letterhead(), &told(hostile[1], "SKU"));
        assert!(!html.contains("<script>"), "{html}");
        assert!(html.contains("&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#39;"), "{html}");
        let text = alert_text(&letterhead(), &told(hostile[2], "SKU"));
        assert!(text.contains("knis\n"), "{text:?}");
    }

    /// What a reader shows of a header: encoded words decoded, blanks between them gone (RFC 2047).
    fn shown(header: &str) -> String {
        let mut text = String::new();
        let mut was_encoded = false;
        for word in header.split(' ') {
            let encoded = word.strip_prefix("=?utf-8?B?").and_then(|word| word.strip_suffix("?="));
            assert!(encoded.is_some() || !word.contains("=?"), "{word}: a reader may decode it");
            assert!(word.len() <= 75, "{word}");
            let are_joined = was_encoded && encoded.is_some();
            if !text.is_empty() && !are_joined {
                text.push(' ');
            }
            was_encoded = encoded.is_some();
            match encoded {
                Some(encoded) => {
                    text.push_str(
                        &String::from_utf8(STANDARD.decode(encoded).expect("base64")).expect("whole letters"),
                    );
                }
                None => text.push_str(word),
            }
        }
        text
    }

    #[test]
    fn a_subject_shows_the_name_as_it_is() {
        for name in [
            "Oak sink",
            "=?utf-8?q?=0D=0ABcc:_x@y.z?=",
            "a =?us-ascii?B?QkNDOg==?= b",
            "=?",
            "Küche =?utf-8?q?=0D=0A?= \u{1fab5}",
            &"ü\u{1fab5}".repeat(40),
        ] {
            let headers = headers(&written(told(name, "SKU")));
            let subject = headers.iter().find_map(|line| line.strip_prefix("Subject: ")).expect("a subject");
            let name: String = name.chars().take(MAX_SUBJECT_NAME_CHARS).collect();
            assert_eq!(shown(subject), format!("Low stock: {name} (SKU), 2 left"));
        }
    }

    #[test]
    fn a_digest_lists_each_product_once_with_its_newest_stock() {
        let of =
            |product, quantity| Told { product_id: ProductId(Uuid::from_u128(product)), quantity, ..told("Sink", "S") };
        let alerts = vec![of(1, 0), of(2, 3), of(1, 1), of(1, 2)];
        let closed_at = time::macros::datetime!(2026-02-01 00:00 UTC);
        let mail = Mail::Digest { alerts, total: 9, closed_at };
        let written = write(&letterhead(), Uuid::from_u128(1), &mail).expect("written");
        let text = written.text;
        assert!(text.contains("Subject: Low stock: 2 products became low"), "{text}");
        assert!(
            text.contains("0 left, threshold 3, 3 changes") && text.contains("3 left, threshold 3, 1 change,"),
            "{text}"
        );
        assert!(text.contains("5 more changes are not listed"), "{text}");
    }

    #[test]
    fn no_date_is_too_odd() {
        for at in [time::macros::datetime!(0000-01-01 00:00 UTC), time::macros::datetime!(9999-12-31 23:59 UTC)] {
            written(Told { occurred_at: at, ..told("Sink", "S") });
        }
    }
}
