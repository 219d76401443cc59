//! What the projection answers to readers.

use crate::projected::NotYetProjected;

/// A value and the stream sequence at which it was so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// The projection's checkpoint in the snapshot that `value` was read in.
    pub sequence: u64,
    /// What was read.
    pub value: T,
}

impl<T> At<T> {
    /// Itself, if it was read at `sequence` or later.
    ///
    /// # Errors
    /// [`NotYetProjected`] otherwise.
    pub fn at_least(self, sequence: u64) -> Result<Self, NotYetProjected> {
        if self.sequence >= sequence {
            Ok(self)
        } else {
            Err(NotYetProjected { wanted: sequence, reached: self.sequence })
        }
    }
}
