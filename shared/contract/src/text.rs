//! Text that people give: skus, names, reasons. What may come in, and in which of its forms it is kept.
//!
//! Two texts that look the same must be the same, and no text may look like another or change how the text around it is
//! shown. So what comes in is refused when it has characters that nobody sees or that turn the direction of others, and is
//! kept in Unicode's composed form (NFC). This is asked at the door only. The ledger also holds what was written before
//! there was such a door, and that is read as it is ([`Sku::from_str`], [`is_name`](crate::event::is_name)): a reader that
//! refused it could not fold the stream.

use std::borrow::Cow;
use std::str::FromStr;

use icu_normalizer::{ComposingNormalizerBorrowed, DecomposingNormalizerBorrowed};
use icu_properties::props::{DefaultIgnorableCodePoint, GeneralCategory, NoncharacterCodePoint};
use icu_properties::{CodePointMapData, CodePointSetData};

use crate::id::Sku;
use crate::limits::{MAX_NAME_CHARS, MAX_SKU_CHARS};

/// Why a text is refused: the rest of a sentence that begins with what it is the text of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadText {
    /// Nothing at all, or nothing to see.
    #[error("is empty")]
    Empty,
    /// Longer than it may be.
    #[error("has {chars} characters; at most {most} are allowed")]
    TooLong {
        /// How many it has.
        chars: usize,
        /// How many it may have.
        most: usize,
    },
    /// A character that it may not have.
    #[error("contains U+{:04X}, {what}, at position {position}", u32::from(*.character))]
    Character {
        /// The first of them.
        character: char,
        /// What it is.
        what: &'static str,
        /// Where it stands, counted from 1.
        position: usize,
    },
    /// A blank before or after all else.
    #[error("{verb} with U+{:04X}, a blank", u32::from(*.character))]
    BlankAtEnd {
        /// The blank.
        character: char,
        /// `begins` or `ends`.
        verb: &'static str,
    },
    /// A mark that would be set on whatever stands before the text.
    #[error("begins with U+{:04X}, a mark that needs a letter before it", u32::from(*.0))]
    LeadingMark(char),
}

/// The name of a product or category as it is kept: 1 to 200 characters in NFC.
///
/// # Errors
/// [`BadText`].
pub fn name(text: &str) -> Result<Box<str>, BadText> {
    let kept = kept(text, MAX_NAME_CHARS, |_| None)?;
    Ok(kept.into())
}

/// A stock-keeping unit as it is kept: 1 to 64 characters in NFC, and no blank but the ordinary one.
///
/// # Errors
/// [`BadText`].
pub fn sku(text: &str) -> Result<Sku, BadText> {
    let odd_blank = |character: char| {
        (character != ' ' && character.is_whitespace()).then_some("a blank that is not the ordinary one")
    };
    let kept = kept(text, MAX_SKU_CHARS, odd_blank)?;
    // What is refused above is more than a `Sku` refuses.
    Sku::from_str(&kept).map_err(|_| BadText::Empty)
}

/// Looks at a text of several words, such as a reason. It is kept as it is.
///
/// # Errors
/// [`BadText`].
pub fn check_prose(text: &str, most: usize) -> Result<(), BadText> {
    check(text, |_| None)?;
    fits(text, most)
}

fn kept(text: &str, most: usize, also: impl Fn(char) -> Option<&'static str>) -> Result<Cow<'_, str>, BadText> {
    check(text, also)?;
    let blank = |character: Option<char>| character.filter(|character| character.is_whitespace());
    if let Some(character) = blank(text.chars().next()) {
        return Err(BadText::BlankAtEnd { character, verb: "begins" });
    }
    if let Some(character) = blank(text.chars().next_back()) {
        return Err(BadText::BlankAtEnd { character, verb: "ends" });
    }
    let kept = composed(text);
    fits(&kept, most)?;
    Ok(kept)
}

fn check(text: &str, also: impl Fn(char) -> Option<&'static str>) -> Result<(), BadText> {
    let refused = text.chars().zip(1..).find_map(|(character, position)| {
        let what = if character.is_ascii_graphic() { None } else { unfit(character).or_else(|| also(character)) };
        what.map(|what| BadText::Character { character, what, position })
    });
    match (refused, text.chars().next()) {
        // Of a text of blanks alone, that is the matter.
        _ if text.trim().is_empty() => Err(BadText::Empty),
        (Some(refused), _) => Err(refused),
        (None, Some(first)) if is_mark(first) => Err(BadText::LeadingMark(first)),
        (None, _) => Ok(()),
    }
}

fn fits(text: &str, most: usize) -> Result<(), BadText> {
    let chars = text.chars().count();
    if chars <= most { Ok(()) } else { Err(BadText::TooLong { chars, most }) }
}

/// What is wrong with a character wherever it stands: it cannot be seen, or changes how others are.
#[must_use]
pub fn unfit(character: char) -> Option<&'static str> {
    const TURNS: &str = "which changes the direction of the text around it";
    const UNSEEN: &str = "an invisible character";
    Some(match character {
        '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}' => TURNS,
        '\u{2028}' | '\u{2029}' => "which ends a line",
        '\u{fffd}' => "which stands for a character that was lost",
        // The braille pattern without a dot, and a note without a head.
        '\u{2800}' | '\u{1d159}' => UNSEEN,
        _ if character.is_control() => "a control character",
        _ if CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(character) => UNSEEN,
        _ if CodePointSetData::new::<NoncharacterCodePoint>().contains(character) => "which is no character",
        _ => match CodePointMapData::<GeneralCategory>::new().get(character) {
            GeneralCategory::PrivateUse => "a character of private use, which looks different everywhere",
            // Of the other format characters these are seen: they stand over or around the digits behind them.
            GeneralCategory::Format if !is_prepended(character) => UNSEEN,
            _ => return None,
        },
    })
}

/// Unicode's `Prepended_Concatenation_Mark`.
const fn is_prepended(character: char) -> bool {
    matches!(
        character,
        '\u{0600}'
            ..='\u{0605}' | '\u{06dd}' | '\u{070f}' | '\u{0890}' | '\u{0891}' | '\u{08e2}' | '\u{110bd}' | '\u{110cd}'
    )
}

fn is_mark(character: char) -> bool {
    use GeneralCategory::{EnclosingMark, NonspacingMark, SpacingMark};
    let category = CodePointMapData::<GeneralCategory>::new().get(character);
    matches!(category, EnclosingMark | NonspacingMark | SpacingMark)
}

/// The text in Unicode's composed form (NFC), in which it is kept.
#[must_use]
pub fn composed(text: &str) -> Cow<'_, str> {
    if text.is_ascii() { Cow::Borrowed(text) } else { ComposingNormalizerBorrowed::new_nfc().normalize(text) }
}

/// The forms in which a text may be found that was kept before there was one form: composed, decomposed, and as it is
/// given. Only one of ASCII, which has but one form.
#[must_use]
pub fn forms(text: &str) -> Vec<String> {
    let mut forms = vec![composed(text).into_owned()];
    if !text.is_ascii() {
        let decomposed = DecomposingNormalizerBorrowed::new_nfd().normalize(text);
        for form in [decomposed, Cow::Borrowed(text)] {
            if !forms.iter().any(|known| *known == form) {
                forms.push(form.into_owned());
            }
        }
    }
    forms
}

/// The words of a text, to be searched for: what stands between characters that are neither letters nor digits nor marks on
/// them, in lower case. Compatibility forms are folded (NFKC), so that `ﬁ` is found as `fi` and a wide `Ａ` as `a`.
pub fn words(text: &str) -> impl Iterator<Item = String> + use<> {
    // Folded after it is lowered, for lowering can decompose; and before, for a compatibility form may have no lower case.
    let folded: Cow<'_, str> = if text.is_ascii() {
        Cow::Owned(text.to_ascii_lowercase())
    } else {
        let normalizer = ComposingNormalizerBorrowed::new_nfkc();
        let lower = normalizer.normalize(text).to_lowercase();
        Cow::Owned(normalizer.normalize(&lower).into_owned())
    };
    let is_part = |letter: char| letter.is_alphanumeric() || (!letter.is_ascii() && is_mark(letter));
    let words: Vec<String> =
        folded.split(|letter: char| !is_part(letter)).filter(|word| !word.is_empty()).map(str::to_owned).collect();
    words.into_iter()
}

/// For `#[serde(deserialize_with)]` of requests: texts as they are kept, or an error that says what is wrong with them.
pub mod given {
    use serde::{Deserialize, Deserializer, de};

    use super::BadText;
    use crate::id::Sku;

    fn read<'de, D: Deserializer<'de>, T>(
        deserializer: D,
        keep: fn(&str) -> Result<T, BadText>,
    ) -> Result<T, D::Error> {
        let text = Box::<str>::deserialize(deserializer)?;
        keep(&text).map_err(de::Error::custom)
    }

    fn read_optional<'de, D: Deserializer<'de>, T>(
        deserializer: D,
        keep: fn(&str) -> Result<T, BadText>,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<Box<str>>::deserialize(deserializer)?;
        text.map(|text| keep(&text).map_err(de::Error::custom)).transpose()
    }

    /// [`super::sku`].
    ///
    /// # Errors
    /// [`BadText`].
    pub fn sku<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Sku, D::Error> {
        read(deserializer, super::sku)
    }

    /// [`super::name`].
    ///
    /// # Errors
    /// [`BadText`].
    pub fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<str>, D::Error> {
        read(deserializer, super::name)
    }

    /// [`super::sku`], or null.
    ///
    /// # Errors
    /// [`BadText`].
    pub fn optional_sku<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Sku>, D::Error> {
        read_optional(deserializer, super::sku)
    }

    /// [`super::name`], for a field that may be left out and not be null.
    ///
    /// # Errors
    /// [`BadText`].
    pub fn present_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<str>>, D::Error> {
        read(deserializer, super::name).map(Some)
    }

    /// [`super::name`], or null.
    ///
    /// # Errors
    /// [`BadText`].
    pub fn optional_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<str>>, D::Error> {
        read_optional(deserializer, super::name)
    }

    /// [`super::name`] of a field that is there, be it null: one that is not there is `None`.
    ///
    /// # Errors
    /// [`BadText`].
    pub fn cleared_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Box<str>>>, D::Error> {
        read_optional(deserializer, super::name).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_sees_or_what_turns_the_text_is_refused_by_its_code_point() {
        let table = [
            ('\u{0}', "a control character"),
            ('\t', "a control character"),
            ('\u{85}', "a control character"),
            ('\u{ad}', "an invisible character"),
            ('\u{34f}', "an invisible character"),
            ('\u{61c}', "which changes the direction of the text around it"),
            ('\u{115f}', "an invisible character"),
            ('\u{180e}', "an invisible character"),
            ('\u{200b}', "an invisible character"),
            ('\u{200d}', "an invisible character"),
            ('\u{200f}', "which changes the direction of the text around it"),
            ('\u{2028}', "which ends a line"),
            ('\u{2029}', "which ends a line"),
            ('\u{202e}', "which changes the direction of the text around it"),
            ('\u{2060}', "an invisible character"),
            ('\u{2066}', "which changes the direction of the text around it"),
            ('\u{2069}', "which changes the direction of the text around it"),
            ('\u{2800}', "an invisible character"),
            ('\u{3164}', "an invisible character"),
            ('\u{e000}', "a character of private use, which looks different everywhere"),
            ('\u{fe0f}', "an invisible character"),
            ('\u{feff}', "an invisible character"),
            ('\u{ffa0}', "an invisible character"),
            ('\u{fff9}', "an invisible character"),
            ('\u{fffd}', "which stands for a character that was lost"),
            ('\u{fffe}', "which is no character"),
            ('\u{1d173}', "an invisible character"),
            ('\u{e0041}', "an invisible character"),
            ('\u{e0100}', "an invisible character"),
            ('\u{10fffe}', "which is no character"),
        ];
        for (character, what) in table {
            let text = format!("ab{character}cd");
            let expected = Err(BadText::Character { character, what, position: 3 });
            assert_eq!(name(&text).map(|_| ()), expected, "{character:?}");
            assert_eq!(sku(&text).map(|_| ()), expected, "{character:?}");
            assert_eq!(check_prose(&text, 500), expected, "{character:?}");
        }
        let told = name("ab\u{200b}").expect_err("refused").to_string();
        assert_eq!(told, "contains U+200B, an invisible character, at position 3");
    }

    #[test]
    fn what_people_write_is_taken() {
        for text in
            ["Dübel 7\" 🪵", "キッチン 棚", "مطبخ", "שולחן", "रसोई", "x\u{a0}y", "½ \u{2033} – “Oak”", "\u{600}12"]
        {
            assert_eq!(name(text).as_deref(), Ok(text));
        }
        assert_eq!(name(&"ü".repeat(200)).map(|name| name.chars().count()), Ok(200));
        assert_eq!(name(&"u\u{308}".repeat(200)).map(|name| name.chars().count()), Ok(200), "as it is kept");
        assert_eq!(name(&"ü".repeat(201)), Err(BadText::TooLong { chars: 201, most: 200 }));
    }

    #[test]
    fn blanks_of_any_kind_are_no_text_and_no_ends() {
        for blank in [' ', '\u{a0}', '\u{2003}', '\u{3000}', '\u{1680}', '\u{202f}'] {
            assert_eq!(name(&String::from_iter([blank; 3])), Err(BadText::Empty), "{blank:?}");
            assert_eq!(check_prose(&String::from_iter([blank; 3]), 9), Err(BadText::Empty), "{blank:?}");
            let begins = BadText::BlankAtEnd { character: blank, verb: "begins" };
            assert_eq!(name(&format!("{blank}Oak")), Err(begins), "{blank:?}");
            let ends = BadText::BlankAtEnd { character: blank, verb: "ends" };
            assert_eq!(name(&format!("Oak{blank}")), Err(ends), "{blank:?}");
            assert_eq!(name(&format!("Oak{blank}top")).is_ok(), sku("A").is_ok());
            assert_eq!(sku(&format!("A{blank}B")).is_ok(), blank == ' ', "{blank:?}");
        }
        assert_eq!(sku(""), Err(BadText::Empty));
        assert_eq!(name("\u{301}a"), Err(BadText::LeadingMark('\u{301}')));
    }

    #[test]
    fn the_same_text_is_kept_the_same_way() {
        assert_eq!(name("ku\u{308}che").as_deref(), Ok("küche"));
        assert_eq!(sku("ku\u{308}che"), sku("küche"));
        assert_eq!(forms("abc"), ["abc"]);
        assert_eq!(forms("ku\u{308}"), ["kü", "ku\u{308}"]);
        // Half of it composed: neither of the two forms.
        assert_eq!(forms("üu\u{308}"), ["üü", "u\u{308}u\u{308}", "üu\u{308}"]);
    }

    #[test]
    fn words_are_those_of_either_form() {
        let table: [(&str, &[&str]); 8] = [
            ("KIT-0001 Oak", &["kit", "0001", "oak"]),
            ("KÜCHE", &["küche"]),
            ("ku\u{308}che", &["küche"]),
            ("KU\u{308}CHE", &["küche"]),
            ("İstanbul", &["i\u{307}stanbul"]),
            ("ﬁlter Ａ１", &["filter", "a1"]),
            ("x\u{30c}\u{331}y", &["x\u{331}\u{30c}y"]),
            ("–…", &[]),
        ];
        for (text, expected) in table {
            assert_eq!(words(text).collect::<Vec<_>>(), expected, "{text}");
        }
    }
}
