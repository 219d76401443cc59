//! A stream as the server keeps it in its file store, so that `$JS.API.STREAM.RESTORE` takes it with sequences and times as
//! they were: blocks of messages, consumers with where they stand, and the archive that the server unpacks.
//!
//! Publishing anew would give every message a new time. The layout is the server's; it has to read it for ever, because disks
//! survive upgrades, and `tests/integration/backup.rs` compares what is made here byte by byte with what a server wrote.
//! It does not keep the indexes that the server derives from blocks when they are missing.
//!
//! A record of a block, numbers little-endian:
//!
//! ```text
//! u32  length of the record; the top bit says that there are headers
//! u64  sequence; the top bit marks a message that is gone
//! u64  time in nanoseconds
//! u16  length of the subject, and the subject
//! u32  length of the headers, and the headers as on the wire (only with the bit above)
//!      payload
//! u64  HighwayHash of all but the lengths
//! ```
//!
//! Memory: one block and one segment of the archive.

use std::io::{self, Write};

use anyhow::{Context as _, Result, ensure};
use highway::{HighwayHash, HighwayHasher, Key};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use snap::write::FrameEncoder;

use crate::archive::{ConsumerEntry, Record, StreamEntry};

/// Bytes after which a block is closed, what the server itself uses for a stream without limits. The last message may go
/// over it.
pub const BLOCK_BYTES: usize = 8 << 20;

/// Most bytes of a record, far below what the server takes for damage.
const MAX_RECORD_BYTES: usize = 16 << 20;

/// Length of a record without subject, headers and payload.
const RECORD_HEAD: usize = 4 + 8 + 8 + 2;
const CHECKSUM: usize = 8;
const HEADERS_BIT: u32 = 1 << 31;
const GONE_BIT: u64 = 1 << 63;

/// What a consumer's state begins with, and its version.
const STATE_MAGIC: u8 = 22;
const STATE_VERSION: u8 = 2;

const META: &str = "meta.inf";
const META_SUM: &str = "meta.sum";
const MODE: u32 = 0o600;

fn hasher(name: &str) -> HighwayHasher {
    let key = Sha256::digest(name.as_bytes());
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(key.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    HighwayHasher::new(Key(words))
}

/// Headers as they are on the wire; nothing when there are none.
fn wire(headers: &[(String, String)]) -> Vec<u8> {
    if headers.is_empty() {
        return Vec::new();
    }
    let mut text = b"NATS/1.0\r\n".to_vec();
    for (name, value) in headers {
        text.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    text.extend_from_slice(b"\r\n");
    text
}

/// The block with this number of a stream, while it is filled.
#[derive(Debug)]
pub struct Block {
    bytes: Vec<u8>,
    hasher: HighwayHasher,
    number: u64,
}

impl Block {
    /// An empty one.
    #[must_use]
    pub fn new(stream: &str, number: u64) -> Self {
        Self { bytes: Vec::new(), hasher: hasher(&format!("{stream}-{number}")), number }
    }

    /// Adds a message.
    ///
    /// # Errors
    /// For one that no server has.
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let headers = wire(&record.headers);
        self.add(record.sequence, record.stored_at, &record.subject, &headers, &record.payload)
            .with_context(|| format!("message {} cannot be restored", record.sequence))
    }

    /// Marks that the stream once had a message with this sequence, so that no other one gets it.
    ///
    /// # Errors
    /// Never, for a sequence that a server gave.
    pub fn push_gone(&mut self, sequence: u64) -> Result<()> {
        self.add(sequence | GONE_BIT, 0, "", &[], &[])
    }

    fn add(&mut self, sequence: u64, time: i64, subject: &str, headers: &[u8], payload: &[u8]) -> Result<()> {
        let with_headers = if headers.is_empty() { 0 } else { 4 + headers.len() };
        let length = RECORD_HEAD + subject.len() + with_headers + payload.len() + CHECKSUM;
        ensure!(length <= MAX_RECORD_BYTES, "it takes {length} bytes");
        let bit = if headers.is_empty() { 0 } else { HEADERS_BIT };
        let length = u32::try_from(length).context("its length")? | bit;
        let subject_length = u16::try_from(subject.len()).context("the length of its subject")?;
        let mut hash = self.hasher.clone();
        self.bytes.extend_from_slice(&length.to_le_bytes());
        for number in [sequence.to_le_bytes(), time.to_le_bytes()] {
            self.bytes.extend_from_slice(&number);
            hash.append(&number);
        }
        self.bytes.extend_from_slice(&subject_length.to_le_bytes());
        self.bytes.extend_from_slice(subject.as_bytes());
        hash.append(subject.as_bytes());
        if !headers.is_empty() {
            self.bytes
                .extend_from_slice(&u32::try_from(headers.len()).context("the length of its headers")?.to_le_bytes());
            self.bytes.extend_from_slice(headers);
            hash.append(headers);
        }
        self.bytes.extend_from_slice(payload);
        hash.append(payload);
        self.bytes.extend_from_slice(&hash.finalize64().to_le_bytes());
        Ok(())
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What the server says of a stream or consumer in its folder, and the check of that.
#[must_use]
pub fn meta(created: &str, name: Option<&str>, config: &Map<String, Value>, key: &str) -> (Vec<u8>, String) {
    let mut meta = config.clone();
    meta.insert("Created".to_owned(), json!(created));
    if let Some(name) = name {
        meta.insert("Name".to_owned(), json!(name));
    }
    let text = Value::Object(meta).to_string().into_bytes();
    let sum = checksum(&text, key);
    (text, sum)
}

/// The check of a description: `key` is the stream, or `stream/consumer`.
#[must_use]
pub fn checksum(text: &[u8], key: &str) -> String {
    let mut hash = hasher(key);
    hash.append(text);
    crate::output::hex(hash.finalize64().to_le_bytes())
}

/// Where a consumer stands that has everything acknowledged up to its floor and nothing delivered beyond.
#[must_use]
pub fn consumer_state(consumer: &ConsumerEntry) -> Vec<u8> {
    let floor = consumer.ack_floor;
    let mut state = vec![STATE_MAGIC, STATE_VERSION];
    // Acknowledged, delivered; then how many are outstanding and how many were delivered again.
    for number in [floor.consumer_sequence, floor.stream_sequence, floor.consumer_sequence, floor.stream_sequence, 0, 0]
    {
        varint(&mut state, number);
    }
    state
}

fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    loop {
        let seven = u8::try_from(number & 0x7f).unwrap_or_default();
        number >>= 7;
        if number == 0 {
            bytes.push(seven);
            return;
        }
        bytes.push(seven | 0x80);
    }
}

/// Writes what the server unpacks: a tar in the framing of Snappy, which its decompressor reads.
pub struct Image<W: Write> {
    tar: tar::Builder<FrameEncoder<W>>,
    stream: String,
    block: Block,
}

impl<W: Write> Image<W> {
    /// Begins with the stream's description and its consumers.
    ///
    /// # Errors
    /// When `target` takes no more.
    pub fn begin(stream: &StreamEntry, config: &Map<String, Value>, target: W) -> Result<Self> {
        let mut image = Self {
            tar: tar::Builder::new(FrameEncoder::new(target)),
            stream: stream.name.clone(),
            block: Block::new(&stream.name, 1),
        };
        let (text, sum) = meta(&stream.created, None, config, &stream.name);
        image.file(META, &text)?;
        image.file(META_SUM, sum.as_bytes())?;
        for consumer in &stream.consumers {
            let folder = format!("obs/{}", consumer.name);
            let key = format!("{}/{}", stream.name, consumer.name);
            let (text, sum) = meta(&consumer.created, Some(&consumer.name), &consumer.config, &key);
            image.file(&format!("{folder}/{META}"), &text)?;
            image.file(&format!("{folder}/{META_SUM}"), sum.as_bytes())?;
            image.file(&format!("{folder}/o.dat"), &consumer_state(consumer))?;
        }
        Ok(image)
    }

    /// Adds a message.
    ///
    /// # Errors
    /// When `target` takes no more.
    pub fn push(&mut self, record: &Record) -> Result<()> {
        self.block.push(record)?;
        if self.block.bytes.len() >= BLOCK_BYTES { self.next_block() } else { Ok(()) }
    }

    /// Ends it: `last_sequence` is where the stream ended, `seen` the sequence of its last message that is left.
    ///
    /// # Errors
    /// When `target` takes no more.
    pub fn finish(mut self, seen: u64, last_sequence: u64) -> Result<()> {
        if last_sequence > seen {
            self.block.push_gone(last_sequence)?;
        }
        if !self.block.bytes.is_empty() {
            self.next_block()?;
        }
        let frames = self.tar.into_inner().context("the end cannot be sent")?;
        // The encoder's own error holds the encoder and cannot be handed on.
        let mut target = frames.into_inner().map_err(|problem| io::Error::other(problem.to_string()))?;
        target.flush().context("the end cannot be sent")
    }

    fn next_block(&mut self) -> Result<()> {
        let next = Block::new(&self.stream, self.block.number + 1);
        let block = std::mem::replace(&mut self.block, next);
        self.file(&format!("msgs/{}.blk", block.number), &block.bytes)
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(MODE);
        self.tar.append_data(&mut header, name, bytes).with_context(|| format!("{name} cannot be sent"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::archive::Floor;

    /// Sequence, time, subject, headers and payload.
    type Decoded = (u64, i64, String, Vec<u8>, Vec<u8>);

    /// A reader of blocks that knows nothing of the writer.
    fn decode(stream: &str, number: u64, mut bytes: &[u8]) -> Vec<Decoded> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
            let (has_headers, length) = (length >> 31 == 1, (length & !(1 << 31)) as usize);
            let (record, rest) = bytes.split_at(length);
            bytes = rest;
            let (record, sum) = record.split_at(length - 8);
            let sequence = u64::from_le_bytes(record[4..12].try_into().expect("eight bytes"));
            let time = i64::from_le_bytes(record[12..20].try_into().expect("eight bytes"));
            let subject_length = u16::from_le_bytes(record[20..22].try_into().expect("two bytes")) as usize;
            let (subject, mut rest) = record[22..].split_at(subject_length);
            let mut headers: &[u8] = &[];
            if has_headers {
                let headers_length = u32::from_le_bytes(rest[..4].try_into().expect("four bytes")) as usize;
                (headers, rest) = rest[4..].split_at(headers_length);
            }
            let mut hash = hasher(&format!("{stream}-{number}"));
            hash.append(&[&record[4..20], subject, headers, rest].concat());
            assert_eq!(sum, hash.finalize64().to_le_bytes());
            let subject = String::from_utf8(subject.to_vec()).expect("text");
            found.push((sequence, time, subject, headers.to_vec(), rest.to_vec()));
        }
        found
    }

    prop_compose! {
        fn record()(
            sequence in 1_u64..1 << 40,
            stored_at in 0_i64..i64::MAX,
            subject in "[a-z.]{1,40}",
            headers in prop::collection::vec(("[A-Za-z-]{1,12}", "[ -~]{0,20}"), 0..4),
            payload in prop::collection::vec(any::<u8>(), 0..200),
        ) -> Record {
            Record { sequence, stored_at, subject, headers, payload: Bytes::from(payload) }
        }
    }

    proptest! {
        #[test]
        fn a_block_holds_what_was_put_into_it(records in prop::collection::vec(record(), 0..20), number in 1_u64..9) {
            let mut block = Block::new("ORDERS", number);
            for record in &records {
                block.push(record).expect("it fits");
            }
            let found = decode("ORDERS", number, block.bytes());
            prop_assert_eq!(found.len(), records.len());
            for (found, record) in found.into_iter().zip(&records) {
                let Record { sequence, stored_at, subject, headers, payload } = record.clone();
                prop_assert_eq!(found, (sequence, stored_at, subject, wire(&headers), payload.to_vec()));
            }
        }

        #[test]
        fn a_record_is_decoded_as_it_was(record in record()) {
            let encoded = record.encoded();
            prop_assert_eq!(rmp_serde::from_slice::<Record>(&encoded).expect("a record"), record);
        }

        #[test]
        fn numbers_are_written_in_sevens(number: u64) {
            let mut bytes = Vec::new();
            varint(&mut bytes, number);
            let (last, others) = bytes.split_last().expect("at least one");
            prop_assert!(last & 0x80 == 0 && others.iter().all(|byte| byte & 0x80 != 0));
            let read = bytes.iter().rev().fold(0_u64, |read, byte| (read << 7) | u64::from(byte & 0x7f));
            prop_assert_eq!(read, number);
        }
    }

    #[test]
    fn an_image_is_a_tar_in_frames_with_blocks_of_bounded_size() {
        let floor = Floor { consumer_sequence: 300, stream_sequence: 5 };
        let consumer = ConsumerEntry {
            name: "product-orders".to_owned(),
            created: "2026-01-31T09:30:00Z".to_owned(),
            config: Map::new(),
            ack_floor: floor,
        };
        let stream = StreamEntry {
            name: "ORDERS".to_owned(),
            created: "2026-01-31T09:30:00Z".to_owned(),
            config: Map::new(),
            last_sequence: 50,
            messages: 40,
            last_message: None,
            consumers: vec![consumer],
            segments: Vec::new(),
        };
        let mut sent = Vec::new();
        let mut image = Image::begin(&stream, &stream.config, &mut sent).expect("begun");
        let payload = Bytes::from(vec![7; 512 << 10]);
        for sequence in 1..=40 {
            let subject = "lomash.orders.created".to_owned();
            let record = Record { sequence, stored_at: 1, subject, headers: Vec::new(), payload: payload.clone() };
            image.push(&record).expect("sent");
        }
        image.finish(40, 50).expect("sent");

        let mut tar = tar::Archive::new(snap::read::FrameDecoder::new(&*sent));
        let mut files = Vec::new();
        for entry in tar.entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a name").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            files.push((name, bytes));
        }
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "meta.inf",
                "meta.sum",
                "obs/product-orders/meta.inf",
                "obs/product-orders/meta.sum",
                "obs/product-orders/o.dat",
                "msgs/1.blk",
                "msgs/2.blk",
                "msgs/3.blk"
            ]
        );
        assert_eq!(files[4].1, [22, 2, 0xac, 2, 5, 0xac, 2, 5, 0, 0]);
        let mut sequences = Vec::new();
        for (number, (_, bytes)) in (1..).zip(&files[5..]) {
            assert!(bytes.len() < BLOCK_BYTES + (1 << 20));
            sequences.extend(decode("ORDERS", number, bytes).into_iter().map(|record| record.0));
        }
        assert_eq!(sequences[..40], (1..=40).collect::<Vec<_>>());
        assert_eq!(sequences[40..], [50 | 1 << 63], "the end of the stream is marked");
    }
}
