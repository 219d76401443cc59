//! What the server's refusal of a batch is due to.
//!
//! The server refuses a whole batch and names neither the message nor the command that it dislikes. Its error code says whether
//! time may cure it: a full disk must never turn a good order into a dead letter, and an order that can never be stored must not
//! be tried for ever. The codes are those of nats-server 2.15 (`server/errors.json`).

/// Header larger than 64 KiB.
pub(crate) const HEADER_TOO_LARGE: u64 = 10_097;
/// Message larger than the stream's `max_msg_size`, or than the server's `max_payload`.
pub(crate) const MESSAGE_TOO_LARGE: u64 = 10_054;

/// The batch is incomplete.
pub const BATCH_INCOMPLETE: u64 = 10_176;

/// What a refusal is due to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// What is in the batch: the same will never be stored.
    Content,
    /// The state of the servers or of the stream: it may be stored later.
    Server,
    /// It cannot be told from the code; whether others are stored meanwhile tells.
    Unclear,
}

impl Cause {
    /// What a refusal with this error code is due to.
    #[must_use]
    pub const fn of(code: u64) -> Self {
        match code {
            HEADER_TOO_LARGE | MESSAGE_TOO_LARGE => Self::Content,
            // Headers that the stream does not take: rollup, counters, TTL, schedules, another stream expected, a batch's
            // unsupported ones. We write none of them; where one got in it came with a command.
            10_060
            | 10_111
            | 10_165
            | 10_166
            | 10_168..=10_171
            | 10_177
            | 10_187..=10_193
            | 10_203
            | 10_223
            | 10_227 => Self::Content,
            // Resources of the account, the server, its memory and its disk; what a store says when it is full.
            10_002 | 10_023 | 10_028 | 10_047 | 10_077 | 10_120 | 10_122 => Self::Server,
            // No quorum, no leader, not assigned, JetStream off, stream offline or sealed, too many requests at once.
            10_004..=10_010
            | 10_035
            | 10_036
            | 10_039
            | 10_041
            | 10_076
            | 10_096
            | 10_109
            | 10_118
            | 10_167
            | 10_194 => Self::Server,
            // The stream itself is not there, or does not take batches: an operator's doing.
            10_059 | 10_174 => Self::Server,
            _ => Self::Unclear,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_may_cure_is_the_server_s_and_what_it_cannot_the_content_s() {
        for (code, cause) in [
            (10_097, Cause::Content),
            (10_054, Cause::Content),
            (10_023, Cause::Server),
            (10_047, Cause::Server),
            (10_077, Cause::Server),
            (10_008, Cause::Server),
            (10_118, Cause::Server),
            (10_039, Cause::Server),
            (BATCH_INCOMPLETE, Cause::Unclear),
            (0, Cause::Unclear),
            (99_999, Cause::Unclear),
        ] {
            assert_eq!(Cause::of(code), cause, "{code}");
        }
    }
}
