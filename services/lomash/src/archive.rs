//! The archive that `lomash backup` writes and `lomash restore` reads: a folder with a manifest and segments of messages.
//!
//! Owns the format and its promises:
//!
//! - `manifest.json` says what belongs to the archive: streams with their definitions, consumers, and segments with their
//!   ranges, sizes and SHA-256. It is replaced in one step (written beside, synced, renamed, the folder synced), so whoever
//!   dies leaves the one before valid. A file that it does not name is nothing, and the next backup removes it.
//! - `STREAM/FIRST-LAST-DIGEST.segment` holds the messages of a stream in the order of their sequences: MessagePack records,
//!   gzip around them. A segment is never changed once the manifest names it; the beginning of its SHA-256 in its name keeps
//!   another one of the same range apart. Sequences that the stream does not have are left out, so a gap is just that.
//! - A record is an array: sequence, the server's time in nanoseconds, subject, headers as name and value, payload. Names of
//!   headers are sorted, because the client library does not tell their order; several values of a name keep theirs. So
//!   one message has one encoding, and two sides can be compared by digest.
//! - Nothing in it is readable for others: orders name customers. One process at a time writes, by a lock on the folder.
//!
//! Assumes a file system that renames atomically. Knows nothing of servers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use lomash_ledger::direct::Held;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::output::hex;
use crate::stack::FolderLock;

/// What bytes mean. Another number is another layout, which this program does not read.
pub const FORMAT: u32 = 1;

/// Bytes of records after which a segment is closed, before compression: what a reader holds in memory of it.
pub const SEGMENT_BYTES: usize = 16 << 20;

/// Largest segment that is believed: the last message may go over the limit above, by a payload and its headers.
const MAX_SEGMENT_BYTES: u64 = (SEGMENT_BYTES + (4 << 20)) as u64;

/// Largest manifest that is believed: some hundred thousand segments.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// Largest number that is believed of a sequence: whoever forges a manifest writes its digest too. No server reaches it, and a few of
/// them can be added without a thought.
const MAX_SEQUENCE: u64 = 1 << 60;

/// Longest file of a segment that is believed: what cannot be compressed gets a little longer.
const MAX_SEGMENT_FILE_BYTES: u64 = 2 * MAX_SEGMENT_BYTES;

// A segment takes more than a hundred bytes of the manifest, so the lengths of all of them can be added up.
const _: () = assert!((MAX_MANIFEST_BYTES / 100).checked_mul(MAX_SEGMENT_FILE_BYTES).is_some());

/// How hard segments are compressed. The hardest takes several times as long for a tenth less.
const LEVEL: u32 = 1;

/// Rights of what is written: the owner's alone.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// Digits of its SHA-256 in the name of a segment.
const NAMED_DIGITS: usize = 12;

const MANIFEST: &str = "manifest.json";
const SEGMENT: &str = "segment";
const UNFINISHED: &str = "unfinished";

/// A message as the archive keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its sequence.
    pub sequence: u64,
    /// The server's clock when it stored it, in nanoseconds since 1970.
    pub stored_at: i64,
    /// Its subject.
    pub subject: String,
    /// Its headers, by name; several values of a name in their order.
    pub headers: Vec<(String, String)>,
    /// Its payload.
    pub payload: Bytes,
}

impl Record {
    /// What a stream holds, as it is kept.
    ///
    /// # Errors
    /// For a time that no clock of a server shows.
    pub fn of(held: Held) -> Result<Self> {
        let stored_at = i64::try_from(held.stored_at.unix_timestamp_nanos())
            .with_context(|| format!("message {} has a time out of range", held.sequence))?;
        let mut headers: Vec<(String, String)> = Vec::new();
        for (name, values) in held.headers.iter() {
            headers.extend(values.iter().map(|value| (name.to_string(), value.as_str().to_owned())));
        }
        // Stable: the values of one name stay in their order.
        headers.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(Self { sequence: held.sequence, stored_at, subject: held.subject, headers, payload: held.payload })
    }

    /// Its one encoding.
    #[must_use]
    pub fn encoded(&self) -> Vec<u8> {
        rmp_serde::to_vec(self).expect("a record always encodes")
    }

    /// SHA-256 of its encoding.
    #[must_use]
    pub fn sha256(&self) -> String {
        hex(Sha256::digest(self.encoded()))
    }
}

/// A file of messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Segment {
    /// Sequence of its first message.
    pub first: u64,
    /// Sequence of its last message.
    pub last: u64,
    /// How many it holds; fewer than the range where there are gaps.
    pub messages: u64,
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
}

impl Segment {
    /// Its name within the folder of its stream.
    #[must_use]
    pub fn file_name(&self) -> String {
        let digest: String = self.sha256.chars().take(NAMED_DIGITS).collect();
        format!("{:020}-{:020}-{digest}.{SEGMENT}", self.first, self.last)
    }
}

/// The last message of a stream: by it a backup knows the stream again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastMessage {
    /// Its sequence.
    pub sequence: u64,
    /// [`Record::sha256`].
    pub sha256: String,
}

/// Up to where everything was acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Floor {
    /// In the count of the consumer's deliveries.
    pub consumer_sequence: u64,
    /// In the stream.
    pub stream_sequence: u64,
}

/// A durable consumer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerEntry {
    /// Its name.
    pub name: String,
    /// When it was made, in the server's words.
    pub created: String,
    /// Its configuration as the server had it.
    pub config: Map<String, Value>,
    /// Where it goes on when it is restored.
    pub ack_floor: Floor,
}

/// A stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamEntry {
    /// Its name.
    pub name: String,
    /// When it was made, in the server's words.
    pub created: String,
    /// Its configuration as the server had it.
    pub config: Map<String, Value>,
    /// Where it ended: its next message gets the sequence after this one, whether or not this one is still there.
    pub last_sequence: u64,
    /// How many messages the archive has of it.
    pub messages: u64,
    /// The last of them.
    pub last_message: Option<LastMessage>,
    /// Its durable consumers.
    pub consumers: Vec<ConsumerEntry>,
    /// Its messages.
    pub segments: Vec<Segment>,
}

impl StreamEntry {
    /// Length of its segments.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }
}

/// What an archive is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The program that wrote it.
    pub program: String,
    /// When the cut was made (RFC 3339), by the clock of whoever made it.
    pub taken_at: String,
    /// The sequence of the ledger as of which the whole is consistent.
    pub ledger_sequence: u64,
    /// The streams.
    pub streams: Vec<StreamEntry>,
    /// Where the projections stood before the cut, if a database was named. Nothing of them is kept: they are made anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<BTreeMap<String, u64>>,
}

impl Manifest {
    /// The stream of this name.
    #[must_use]
    pub fn stream(&self, name: &str) -> Option<&StreamEntry> {
        self.streams.iter().find(|stream| stream.name == name)
    }

    /// Refuses what no backup writes.
    fn check(&self) -> Result<()> {
        ensure!(
            self.format == FORMAT,
            "the archive is of format {} and this program reads format {FORMAT}: use the version that wrote it, {}",
            self.format,
            self.program
        );
        let believed = |what: &str, name: &str, sequence: u64| -> Result<()> {
            ensure!(sequence <= MAX_SEQUENCE, "the manifest's {what} of {name} is {sequence}, which no server reaches");
            Ok(())
        };
        believed("sequence", "the ledger", self.ledger_sequence)?;
        for (projection, checkpoint) in self.checkpoints.iter().flatten() {
            believed("checkpoint", projection, *checkpoint)?;
        }
        let mut names = BTreeSet::new();
        for stream in &self.streams {
            let name = &stream.name;
            believed("last sequence", name, stream.last_sequence)?;
            if let Some(last) = &stream.last_message {
                believed("last message", name, last.sequence)?;
            }
            // It becomes a folder's name and a subject.
            let is_plain =
                !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
            ensure!(is_plain, "`{name}` in the manifest is no name of a stream");
            ensure!(names.insert(name), "the manifest names {name} twice");
            for consumer in &stream.consumers {
                let plain = consumer.name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
                ensure!(plain && !consumer.name.is_empty(), "`{}` is no name of a consumer", consumer.name);
                believed("acknowledgement", &consumer.name, consumer.ack_floor.stream_sequence)?;
                believed("delivery", &consumer.name, consumer.ack_floor.consumer_sequence)?;
            }
            let (mut seen, mut messages) = (0, 0);
            for segment in &stream.segments {
                let is_digest = segment.sha256.len() == 64 && segment.sha256.chars().all(|c| c.is_ascii_hexdigit());
                ensure!(is_digest, "a segment of {name} in the manifest has no SHA-256");
                believed("segment", name, segment.last)?;
                let is_short = segment.bytes <= MAX_SEGMENT_FILE_BYTES;
                ensure!(is_short, "the manifest's segment of {name} after {seen} is longer than any");
                let span = (segment.last + 1).saturating_sub(segment.first);
                let fits = segment.first > seen && segment.messages > 0 && segment.messages <= span;
                ensure!(fits, "the manifest's segments of {name} do not follow each other after {seen}");
                seen = segment.last;
                messages += segment.messages;
            }
            ensure!(seen <= stream.last_sequence, "the manifest's segments of {name} go beyond its end");
            ensure!(messages == stream.messages, "the manifest's segments of {name} do not add up");
        }
        Ok(())
    }
}

/// An archive that is opened.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
    // Held until the end.
    _lock: Option<FolderLock>,
}

impl Archive {
    /// Makes the folder if need be, and locks it: for writing.
    ///
    /// # Errors
    /// When another process is at it, or it cannot be made.
    pub async fn lock(dir: &Path) -> Result<Self> {
        make_folder(dir)?;
        let lock = FolderLock::acquire(dir, Duration::ZERO).await?;
        Ok(Self { dir: dir.to_owned(), _lock: Some(lock) })
    }

    /// Opens it for reading. Locked where that can be: a copy on a read-only medium is nobody's to change.
    ///
    /// # Errors
    /// When a backup is writing it, or it is none.
    pub async fn open(dir: &Path) -> Result<Self> {
        ensure!(
            dir.join(MANIFEST).is_file(),
            "{} is no archive: it has no {MANIFEST}; `lomash backup {0}` makes one",
            dir.display()
        );
        let lock = match FolderLock::acquire(dir, Duration::ZERO).await {
            Ok(lock) => Some(lock),
            Err(problem) => {
                let kind = problem.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
                match kind {
                    Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => None,
                    _ => return Err(problem),
                }
            }
        };
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is of; `None` when nothing was finished in it yet.
    ///
    /// # Errors
    /// When the manifest cannot be read, or is none of ours.
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        let path = self.dir.join(MANIFEST);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(problem) if problem.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(problem) => return Err(problem).with_context(|| format!("{} cannot be read", path.display())),
        };
        let mut text = Vec::new();
        file.take(MAX_MANIFEST_BYTES)
            .read_to_end(&mut text)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        let damaged = || format!("{} is damaged: restore the archive's folder from another copy", path.display());
        let sealed: Sealed = serde_json::from_slice(&text).with_context(damaged)?;
        let manifest = sealed.manifest;
        ensure!(sealed.sha256 == seal(&manifest)?, damaged());
        manifest.check()?;
        Ok(Some(manifest))
    }

    /// Replaces the manifest in one step.
    ///
    /// # Errors
    /// When it cannot be written; the one before is then as it was.
    pub fn replace_manifest(&self, manifest: &Manifest) -> Result<()> {
        manifest.check()?;
        let sealed = Sealed { sha256: seal(manifest)?, manifest: manifest.clone() };
        let mut text = serde_json::to_vec_pretty(&sealed).context("the manifest cannot be written as JSON")?;
        text.push(b'\n');
        write_durably(&self.dir, MANIFEST, &text)
    }

    /// The folder of a stream, made if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn stream_folder(&self, stream: &str) -> Result<PathBuf> {
        let folder = self.dir.join(stream);
        make_folder(&folder)?;
        sync_folder(&self.dir)?;
        Ok(folder)
    }

    /// Removes files of ours that the manifest does not name: what a backup left that died, or that needs no more.
    ///
    /// # Errors
    /// When a folder cannot be read, or a file not removed.
    pub fn remove_strays(&self, manifest: Option<&Manifest>) -> Result<u64> {
        let mut removed = 0;
        let named: BTreeSet<PathBuf> = manifest
            .iter()
            .flat_map(|manifest| &manifest.streams)
            .flat_map(|stream| {
                let folder = self.dir.join(&stream.name);
                stream.segments.iter().map(move |segment| folder.join(segment.file_name()))
            })
            .collect();
        let mut folders = vec![self.dir.clone()];
        for entry in entries(&self.dir)? {
            if entry.is_dir() && !entry.is_symlink() {
                folders.push(entry);
            }
        }
        for folder in folders {
            for path in entries(&folder)? {
                let is_ours = path.extension().is_some_and(|extension| extension == SEGMENT || extension == UNFINISHED);
                if is_ours && !named.contains(&path) {
                    fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    /// Reads a segment whole and proves it: length and digest of the file, and that it holds what the manifest says.
    ///
    /// # Errors
    /// What is wrong with it, naming the file.
    pub fn segment(&self, stream: &str, segment: &Segment) -> Result<Records> {
        let path = self.dir.join(stream).join(segment.file_name());
        let damaged = |what: &str| {
            format!(
                "{} is damaged ({what}): put the file back from another copy of the archive, or take a new backup into \
                 another folder",
                path.display()
            )
        };
        let mut compressed = Vec::new();
        let file = File::open(&path).with_context(|| damaged("it cannot be opened"))?;
        file.take(segment.bytes.saturating_add(1))
            .read_to_end(&mut compressed)
            .with_context(|| damaged("it cannot be read"))?;
        ensure!(compressed.len() as u64 == segment.bytes, damaged("it has another length"));
        ensure!(hex(Sha256::digest(&compressed)) == segment.sha256, damaged("its SHA-256 is another one"));
        let mut plain = Vec::new();
        GzDecoder::new(&*compressed)
            .take(MAX_SEGMENT_BYTES + 1)
            .read_to_end(&mut plain)
            .with_context(|| damaged("it cannot be decompressed"))?;
        ensure!(plain.len() as u64 <= MAX_SEGMENT_BYTES, damaged("it is larger than any segment"));
        Ok(Records { plain: io::Cursor::new(plain), segment: segment.clone(), seen: 0, messages: 0, path })
    }

    /// Proves every segment of a stream, without a server; `each` hears of each message.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, stream: &StreamEntry, mut each: impl FnMut()) -> Result<()> {
        let mut last = None;
        for segment in &stream.segments {
            for record in self.segment(&stream.name, segment)? {
                last = Some(record?);
                each();
            }
        }
        let last = last.map(|record| LastMessage { sequence: record.sequence, sha256: record.sha256() });
        ensure!(last == stream.last_message, "the last message of {} is not the one of the manifest", stream.name);
        Ok(())
    }
}

/// The messages of a segment, each checked against the segment's range as it comes.
#[derive(Debug)]
pub struct Records {
    plain: io::Cursor<Vec<u8>>,
    segment: Segment,
    seen: u64,
    messages: u64,
    path: PathBuf,
}

impl Records {
    fn advance(&mut self) -> Result<Option<Record>> {
        let path = self.path.display();
        let Segment { first, last, messages, .. } = self.segment;
        if self.plain.position() == self.plain.get_ref().len() as u64 {
            ensure!(self.messages == messages && self.seen == last, "{path} does not hold what the manifest says");
            return Ok(None);
        }
        let record: Record =
            rmp_serde::from_read(&mut self.plain).with_context(|| format!("{path} holds what is no message"))?;
        let begins = self.messages > 0 || record.sequence == first;
        ensure!(begins && record.sequence > self.seen && record.sequence <= last, "{path} has messages out of order");
        self.seen = record.sequence;
        self.messages += 1;
        Ok(Some(record))
    }
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

/// Records on their way into a segment.
#[derive(Debug, Default)]
pub struct Open {
    plain: Vec<u8>,
    first: u64,
    last: Option<LastMessage>,
    messages: u64,
}

impl Open {
    /// Takes a message; whether the segment is full now.
    pub fn push(&mut self, record: &Record) -> bool {
        let encoded = record.encoded();
        if self.messages == 0 {
            self.first = record.sequence;
        }
        self.messages += 1;
        self.plain.extend_from_slice(&encoded);
        let is_full = self.plain.len() >= SEGMENT_BYTES;
        self.last = Some(LastMessage { sequence: record.sequence, sha256: hex(Sha256::digest(encoded)) });
        is_full
    }

    /// Writes it into the folder of its stream; none when it is empty. Takes its time: not for a task.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn close(self, folder: &Path) -> Result<Option<(Segment, LastMessage)>> {
        let Some(last) = self.last else { return Ok(None) };
        let mut encoder = GzEncoder::new(Vec::with_capacity(self.plain.len() / 3), Compression::new(LEVEL));
        let compressed = encoder.write_all(&self.plain).and_then(|()| encoder.finish());
        let compressed = compressed.context("a segment cannot be compressed")?;
        let segment = Segment {
            first: self.first,
            last: last.sequence,
            messages: self.messages,
            bytes: compressed.len() as u64,
            sha256: hex(Sha256::digest(&compressed)),
        };
        write_durably(folder, &segment.file_name(), &compressed)?;
        Ok(Some((segment, last)))
    }
}

/// The file: the manifest vouches for the segments, and the digest for it.
#[derive(Serialize, Deserialize)]
struct Sealed {
    /// SHA-256 of the manifest as JSON without spaces.
    sha256: String,
    manifest: Manifest,
}

fn seal(manifest: &Manifest) -> Result<String> {
    let text = serde_json::to_vec(manifest).context("the manifest cannot be written as JSON")?;
    Ok(hex(Sha256::digest(text)))
}

fn make_folder(folder: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .with_context(|| format!("{} cannot be made", folder.display()))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    read().with_context(|| format!("{} cannot be read", folder.display()))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("{} cannot be synced", folder.display()))
}

/// All of it under its name, or nothing: written beside, synced, renamed, the folder synced.
fn write_durably(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (path, beside) = (folder.join(name), folder.join(format!("{name}.{UNFINISHED}")));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, &path)
    })();
    if let Err(problem) = written {
        let _ = fs::remove_file(&beside);
        bail!("{} cannot be written: {problem}; is there room on the disk?", path.display());
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn record(sequence: u64) -> Record {
        Record {
            sequence,
            stored_at: 1_700_000_000_000_000_000 + i64::try_from(sequence).expect("small"),
            subject: format!("lomash.orders.{sequence}"),
            headers: vec![("A".to_owned(), "1".to_owned()), ("A".to_owned(), "0".to_owned())],
            payload: Bytes::from(format!("payload {sequence}")),
        }
    }

    fn stream(segments: Vec<Segment>, last: LastMessage) -> StreamEntry {
        StreamEntry {
            name: "ORDERS".to_owned(),
            created: "2026-01-31T09:30:00Z".to_owned(),
            config: Map::new(),
            last_sequence: last.sequence,
            messages: segments.iter().map(|segment| segment.messages).sum(),
            last_message: Some(last),
            consumers: Vec::new(),
            segments,
        }
    }

    fn manifest(streams: Vec<StreamEntry>) -> Manifest {
        Manifest {
            format: FORMAT,
            program: "lomash 0".to_owned(),
            taken_at: "2026-01-31T09:30:00Z".to_owned(),
            ledger_sequence: 7,
            streams,
            checkpoints: None,
        }
    }

    /// An archive of one stream with the sequences 3, 4 and 9.
    async fn archive(dir: &Path) -> (Archive, Manifest) {
        let archive = Archive::lock(dir).await.expect("a folder");
        let folder = archive.stream_folder("ORDERS").expect("a folder");
        let mut open = Open::default();
        for sequence in [3, 4, 9] {
            assert!(!open.push(&record(sequence)));
        }
        let (segment, last) = open.close(&folder).expect("written").expect("not empty");
        let manifest = manifest(vec![stream(vec![segment], last)]);
        archive.replace_manifest(&manifest).expect("written");
        (archive, manifest)
    }

    #[tokio::test]
    async fn what_is_written_is_read_back_with_its_gaps() {
        let dir = tempfile::tempdir().expect("a folder");
        let (archive, manifest) = archive(dir.path()).await;
        assert_eq!(archive.manifest().expect("readable"), Some(manifest.clone()));
        let stream = &manifest.streams[0];
        archive.check(stream, || ()).expect("undamaged");
        let records: Vec<Record> = archive
            .segment("ORDERS", &stream.segments[0])
            .expect("undamaged")
            .collect::<Result<_>>()
            .expect("readable");
        assert_eq!(records, [record(3), record(4), record(9)]);
        for path in entries(&dir.path().join("ORDERS")).expect("readable").iter().chain([&dir.path().join(MANIFEST)]) {
            let mode = fs::metadata(path).expect("there").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} is open to others", path.display());
        }
    }

    #[tokio::test]
    async fn any_damage_is_found() {
        let dir = tempfile::tempdir().expect("a folder");
        let (archive, manifest) = archive(dir.path()).await;
        let stream = &manifest.streams[0];
        let path = dir.path().join("ORDERS").join(stream.segments[0].file_name());
        let good = fs::read(&path).expect("readable");
        for (what, bad) in [
            ("another byte", {
                let mut bad = good.clone();
                bad[good.len() / 2] ^= 1;
                bad
            }),
            ("a byte less", good[..good.len() - 1].to_vec()),
            ("a byte more", [&good[..], b"x"].concat()),
        ] {
            fs::write(&path, bad).expect("written");
            let problem = archive.check(stream, || ()).expect_err(what);
            assert!(format!("{problem:#}").contains("is damaged"), "{what}: {problem:#}");
        }
        fs::remove_file(&path).expect("removed");
        archive.check(stream, || ()).expect_err("a segment that is gone");

        let path = dir.path().join(MANIFEST);
        let text = fs::read_to_string(&path).expect("readable");
        fs::write(&path, text.replacen("\"ledgerSequence\": 7", "\"ledgerSequence\": 6", 1)).expect("written");
        let problem = archive.manifest().expect_err("a manifest that was edited");
        assert!(problem.to_string().contains("is damaged"), "{problem}");
        fs::write(&path, &text[..text.len() / 2]).expect("written");
        archive.manifest().expect_err("half a manifest");
    }

    #[tokio::test]
    async fn what_a_dead_backup_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a folder");
        let (archive, manifest) = archive(dir.path()).await;
        let folder = dir.path().join("ORDERS");
        for name in ["00000000000000000010-00000000000000000012.segment", "x.segment.unfinished", "notes.txt"] {
            fs::write(folder.join(name), "left over").expect("written");
        }
        fs::write(dir.path().join("manifest.json.unfinished"), "{").expect("written");
        assert_eq!(archive.remove_strays(Some(&manifest)).expect("removed"), 3);
        assert!(folder.join("notes.txt").exists(), "what is not ours stays");
        archive.check(&manifest.streams[0], || ()).expect("undamaged");
        let refused = Archive::lock(dir.path()).await.expect_err("in use");
        assert!(refused.to_string().contains("in use by process"), "{refused}");
    }

    #[test]
    fn a_manifest_that_no_backup_writes_is_refused() {
        let last = LastMessage { sequence: 9, sha256: String::new() };
        let segment = |first, last, messages| Segment { first, last, messages, bytes: 1, sha256: "0".repeat(64) };
        let with = |segments| manifest(vec![stream(segments, last.clone())]);
        with(vec![segment(1, 4, 2), segment(6, 9, 4)]).check().expect("as it should be");
        for (what, wrong) in [
            ("overlapping segments", with(vec![segment(1, 4, 4), segment(4, 9, 6)])),
            ("more messages than sequences", with(vec![segment(1, 9, 10)])),
            ("a segment beyond the end", with(vec![segment(1, 10, 10)])),
            ("another format", Manifest { format: FORMAT + 1, ..with(vec![]) }),
            ("a way out of the folder", {
                let mut wrong = with(vec![segment(1, 9, 9)]);
                wrong.streams[0].name = "../ORDERS".to_owned();
                wrong
            }),
        ] {
            wrong.check().expect_err(what);
        }
    }

    /// Whoever forges a manifest writes its digest too: no number in it may stop the program, whatever is done with it then.
    #[test]
    fn no_number_of_a_forged_manifest_is_added_up_unseen() {
        const OVERFLOWING: [u64; 4] = [u64::MAX, u64::MAX - 1, 1 << 63, MAX_SEQUENCE + 1];
        let honest = || {
            let last = LastMessage { sequence: 9, sha256: String::new() };
            let segment = |first, last, messages| Segment { first, last, messages, bytes: 1, sha256: "0".repeat(64) };
            let mut honest = manifest(vec![stream(vec![segment(1, 4, 2), segment(6, 9, 4)], last)]);
            honest.streams[0].consumers.push(ConsumerEntry {
                name: "product-orders".to_owned(),
                created: String::new(),
                config: Map::new(),
                ack_floor: Floor::default(),
            });
            honest.checkpoints = Some(BTreeMap::from([("inventory".to_owned(), 7)]));
            honest
        };
        honest().check().expect("as it should be");
        type Forge = fn(&mut Manifest, u64);
        let numbers: [(&str, Forge); 11] = [
            ("ledgerSequence", |forged, number| forged.ledger_sequence = number),
            ("checkpoints", |forged, number| {
                forged.checkpoints = Some(BTreeMap::from([("inventory".to_owned(), number)]));
            }),
            ("lastSequence", |forged, number| forged.streams[0].last_sequence = number),
            ("messages", |forged, number| forged.streams[0].messages = number),
            ("lastMessage", |forged, number| {
                forged.streams[0].last_message = Some(LastMessage { sequence: number, sha256: String::new() });
            }),
            ("first", |forged, number| forged.streams[0].segments[1].first = number),
            ("last", |forged, number| {
                forged.streams[0].segments[1].last = number;
                forged.streams[0].last_sequence = number;
            }),
            ("messages of a segment", |forged, number| {
                forged.streams[0].segments[1].messages = number;
                forged.streams[0].messages = 2_u64.wrapping_add(number);
            }),
            ("bytes", |forged, number| forged.streams[0].segments[1].bytes = number),
            ("consumerSequence", |forged, number| forged.streams[0].consumers[0].ack_floor.consumer_sequence = number),
            ("streamSequence", |forged, number| forged.streams[0].consumers[0].ack_floor.stream_sequence = number),
        ];
        for (what, forge) in numbers {
            for number in OVERFLOWING {
                let mut forged = honest();
                forge(&mut forged, number);
                forged.check().expect_err(&format!("{what} {number}"));
            }
        }
    }
}
