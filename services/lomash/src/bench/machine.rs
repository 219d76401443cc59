//! What the figures were measured on: the machine, as far as /proc tells, and whether its disk is one.

use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;

/// The machine.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Model of the first processor.
    pub processor: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// Memory, in kibibytes; 0 when it is not known.
    pub memory_kib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Load of the last minute at the start: a quiet machine is well below one.
    pub load: String,
}

impl Machine {
    /// This machine now.
    #[must_use]
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        let memory = value(&read("/proc/meminfo"), "MemTotal");
        Self {
            processor: value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(unknown),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_kib: memory.and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split_whitespace().next().map_or_else(unknown, str::to_owned),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { processor, processors, memory_kib, kernel, load } = self;
        let memory = crate::output::bytes(memory_kib.saturating_mul(1024));
        write!(f, "{processor}, {processors} processors, {memory}, Linux {kernel}, load {load} at the start")
    }
}

/// Whether `folder` is kept in memory only, where syncing a file does nothing.
pub(super) fn is_in_memory(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}
